"""`plora-export --dry-run`: the plan's stages, every parameter on its side, and what a token would cost. Loads no weight."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from ..artifact.cost import RTTS_MILLIS, payload, prompt_bytes, tokens_per_second, unshared
from ..artifact.errors import UsageError
from ..artifact.names import ADAPTER_CONFIG
from ..artifact.plan import Exchange, ExchangePlan, Segment
from ..artifact.shape import DTYPE_BYTES, DecoderShape, check_fits
from ..artifact.walk import BackLayers, Entry, Exit, FrontLayers, Stage, walk
from ..models.adapter import read_config
from ..models.authors import read_authors_checkpoint
from ..models.checkpoint import read_skeleton
from ..models.plan_flags import PlanChoice
from ..models.sides import half, sides
from ..protocol.limits import step_tokens

BYTES_PER_SECOND = 10e9
"""Memory bandwidth behind the estimate of compute: about one core of a small server, or a phone."""
PROMPT_TOKENS = 512
"""Length of the prompt whose bytes are listed."""
DEVICE_CACHE_DTYPE = "fp32"
"""Of the KV cache of the device's layers, whatever their weights are stored in."""


def dry_run(
    base: str, adapter: Path | None, choice: PlanChoice | None, dtype: str, edge_dtype: str, compute_millis: float | None
) -> dict[str, Any]:
    """The facts, as one JSON object. adapter, choice: one of them has the plan.

    Raises UsageError, and what an export would raise before it reads weights.
    """
    if (adapter is None) == (choice is None):
        got = "neither" if adapter is None else "both"
        raise UsageError(f"--dry-run draws the plan of an adapter (--adapter PATH) or of flags (--plan, --rank, …); got {got}")
    if compute_millis is not None and not 0 < compute_millis < math.inf:
        raise UsageError(f"--compute-ms {compute_millis:g}: expected a time above 0")
    shape, skeleton = read_skeleton(base)
    plan = choice.plan(shape.layers) if choice else _adapters_plan(adapter or Path(), shape)
    check_fits(plan, shape)
    step_tokens(plan, shape)
    cloud, edge = sides(skeleton, plan, shape)
    halves = {"cloud": half(cloud, dtype, dtype), "edge": half(edge, edge_dtype, "fp32")}
    looked_up = halves["edge"]["parts"]["embedding"]["bytes"] if "head" in halves["edge"]["parts"] else 0  # one row of it, not all
    estimate = 1000 * (halves["cloud"]["bytes"] + halves["edge"]["bytes"] - looked_up) / BYTES_PER_SECOND
    compute = estimate if compute_millis is None else compute_millis
    shares = any(source.shared_injection for source in plan.sources)
    return {
        "base": base,
        "plan": {
            "layers": plan.layers,
            "front_layers": plan.front_layers,
            "back_layers": plan.back_layers,
            "exchanges": len(plan.exchanges),
            "segments": len(plan.segments),
            "round_trips_per_token": plan.round_trips,
            "stages": [stage_facts(stage, plan, shape) for stage in walk(plan)],
        },
        **halves,
        "kv_cache_bytes_per_token": shape.kv_bytes_per_token(dtype, plan.cloud_layers),
        "device_kv_cache_bytes_per_token": shape.kv_bytes_per_token(DEVICE_CACHE_DTYPE, len(plan.device_layers)),
        "prompt_tokens": PROMPT_TOKENS,
        "wire_bytes_per_token": wire_facts(plan, shape),
        "wire_bytes_per_token_unshared": wire_facts(unshared(plan), shape) if shares else None,
        "compute_millis": round(compute, 2),
        "compute_is_assumed": compute_millis is None,
        "tokens_per_second": {f"{rtt:g}": round(tokens_per_second(plan, rtt, compute), 2) for rtt in RTTS_MILLIS},
    }


def _adapters_plan(adapter: Path, shape: DecoderShape) -> ExchangePlan:
    if adapter.is_dir():
        return read_config(adapter / ADAPTER_CONFIG).plan
    return read_authors_checkpoint(adapter, shape).config.plan


def stage_facts(stage: Stage, plan: ExchangePlan, shape: DecoderShape) -> dict[str, Any]:
    """One stage of the walk: its kind and figures, values and bytes per token."""
    match stage:
        case FrontLayers():
            return {"kind": "front_layers", "first": 0, "stop": stage.stop}
        case Entry():
            injection = exchange_facts(stage.exchange, plan) if stage.exchange else None
            return {"kind": "entry", "hidden": shape.hidden, "bytes_up": in_dtypes(shape.hidden), "injection": injection}
        case Exchange():
            return {"kind": "exchange", "hidden": shape.hidden, **exchange_facts(stage, plan)}
        case Segment():
            return {"kind": "segment", "index": stage.index, "first": stage.first, "stop": stage.stop, "inputs": list(stage.inputs)}
        case Exit():
            rows = "all" if plan.back_layers else "last"
            return {"kind": "exit", "hidden": shape.hidden, "bytes_down": in_dtypes(shape.hidden), "prompt_rows": rows}
        case BackLayers():
            return {"kind": "back_layers", "first": stage.first, "stop": stage.stop}


def exchange_facts(exchange: Exchange, plan: ExchangePlan) -> dict[str, Any]:
    """Ranks, cores, values and bytes of an exchange or of the entry's injection, which has nothing to send down."""
    on_device = exchange.index < 0
    return {
        "index": exchange.index,
        "source": exchange.source,
        "ranks": dict(plan.source(exchange.source).ranks),
        "compressed": exchange.compressed_columns,
        "injection": exchange.injection_columns,
        "expanded": exchange.up_columns if exchange.shared else None,
        "features": exchange.features or None,
        "cores": [
            {"count": count, "out_rank": out_rank, "rank": rank}
            for (out_rank, rank), count in Counter((core.out_rank, core.rank) for core in exchange.cores).items()
        ],
        "feeds": feeds(exchange),
        "bytes_down": in_dtypes(0 if on_device else exchange.compressed_columns),
        "bytes_up": in_dtypes(exchange.injection_columns),
    }


def feeds(exchange: Exchange) -> list[dict[str, Any]]:
    """Ranges of layers `first <= layer < stop` that the exchange feeds in the same targets."""
    targets: dict[int, list[str]] = {}
    for column in exchange.columns:
        targets.setdefault(column.layer, []).append(column.target)
    found: list[dict[str, Any]] = []
    for layer, names in targets.items():
        if found and found[-1]["stop"] == layer and found[-1]["targets"] == names:
            found[-1]["stop"] += 1
        else:
            found.append({"first": layer, "stop": layer + 1, "targets": names})
    return found


def in_dtypes(values: int) -> dict[str, int]:
    """Bytes of `values` values in each dtype that the wire may have."""
    return {dtype: values * size for dtype, size in DTYPE_BYTES.items()}


def wire_facts(plan: ExchangePlan, shape: DecoderShape) -> dict[str, dict[str, Any]]:
    """By wire dtype: bytes of a token and of a prompt, and what full rank would be."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in DTYPE_BYTES:
        cost = payload(plan, shape, dtype)
        prompt_up, prompt_down = prompt_bytes(plan, shape, dtype, PROMPT_TOKENS)
        found[dtype] = {
            "up": cost.up,
            "down": cost.down,
            "communication_reduction": round(cost.communication_reduction, 4),
            "entry_up": cost.entry_up,
            "exit_down": cost.exit_down,
            "low_rank_up": cost.low_rank_up,
            "low_rank_down": cost.low_rank_down,
            "full_rank_up": cost.full_rank_up,
            "full_rank_down": cost.full_rank_down,
            "prompt_up": prompt_up,
            "prompt_down": prompt_down,
        }
    return found
