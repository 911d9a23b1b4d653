"""What a plan would do on a link, a device and a cloud: the device's forecast (device_runtime/forecast.py) fed with sizes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from ..device_runtime.chunks import CHUNK_TOKENS
from ..device_runtime.forecast import NOTHING, CloudFigures, Curve, DeviceFigures, LinkFigures, Setup, first_token, step
from ..models.sides import half, sides
from ..protocol.limits import WINDOW, step_tokens
from ..protocol.precision import Precision
from .machine import OVERHEAD_SECONDS, Side, layer_values


@dataclass(frozen=True)
class World:
    """All that a prediction rests on beside the plan. skeleton: the base without weights; edge_dtype: of the device's tables and layers;
    overhead_seconds: of each round trip, beyond RTT, rates and compute."""

    shape: DecoderShape
    skeleton: Any
    link: LinkFigures
    device: Side
    cloud: Side
    precision: Precision
    edge_dtype: str
    prompt_tokens: int
    overhead_seconds: float = OVERHEAD_SECONDS


@dataclass(frozen=True)
class Figures:
    """Predicted. first_token_millis: of a prompt of World.prompt_tokens; megabytes (10^6): up and down of 1,000 generated tokens, with
    framing; device_megabytes: parameters that the device holds, cores included; trained_values: of the cores."""

    tokens_per_second: float
    first_token_millis: float
    megabytes_per_1000_tokens: float
    device_megabytes: float
    trained_values: int


def predict(plan: ExchangePlan, world: World) -> Figures:
    own = setup(plan, world)
    plain = step(own)
    _, edge = sides(world.skeleton, plan, world.shape)
    return Figures(
        tokens_per_second=1 / plain.seconds,
        first_token_millis=1e3 * first_token(own, world.prompt_tokens).seconds,
        megabytes_per_1000_tokens=(plain.up_bytes + plain.down_bytes) / 1e3,
        device_megabytes=half(edge, world.edge_dtype, "fp32")["bytes"] / 1e6,
        trained_values=sum(core.out_rank * core.rank for core in plan.cores),
    )


def setup(plan: ExchangePlan, world: World) -> Setup:
    """For the forecast: whatever is no decoder layer takes as long as a layer's share of its size."""
    shape = world.shape
    whole = layer_values(shape)

    def share(side: Side, values: int) -> Curve:
        return side.layer.times(values / whole)

    held = plan.entry_exchange
    cores = sum(core.out_rank * core.rank for exchange in plan.exchanges for core in exchange.cores)
    down = sum(rank for source in plan.sources if source.on_device for _, rank in source.ranks) * shape.hidden
    head = world.device.head_seconds
    device = DeviceFigures(
        front=world.device.layer.times(plan.front_layers) if plan.front_layers else NOTHING,
        back=world.device.layer.times(plan.back_layers) if plan.back_layers else NOTHING,
        entry_injection=share(world.device, down + sum(core.out_rank * core.rank for core in held.cores)) if held else NOTHING,
        cores=share(world.device, cores // len(plan.exchanges)) if plan.exchanges else NOTHING,
        head=Curve(((1, head),)) if head is not None else share(world.device, shape.vocabulary * shape.hidden),
    )
    adapter = sum(column.out_rank * shape.out_features(column.target) for column in plan.columns)
    adapter += sum(rank * shape.hidden for source in plan.sources if not source.on_device for _, rank in source.ranks)
    layer = world.cloud.layer if world.cloud.adapted else world.cloud.layer.times(1 + adapter / (whole * plan.cloud_layers))
    overhead = plan.round_trips * world.overhead_seconds
    cloud = CloudFigures(layer, overhead, min(CHUNK_TOKENS, step_tokens(plan, shape)), WINDOW, shape.context_tokens)
    return Setup(plan, shape, world.precision, world.link, device, cloud)
