"""`plora-export --dry-run`: every parameter on its side, file sizes, and what a token would cost. Loads no weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifact.cost import RTTS_MILLIS, payload, tokens_per_second
from ..artifact.manifest import read_json
from ..artifact.names import ADAPTER_CONFIG
from ..artifact.plan import ExchangePlan, require_runnable
from ..artifact.shape import DTYPE_BYTES, DecoderShape, check_fits
from ..artifact.strict import decode
from ..models.adapter import AdapterConfig, expected_basis, expected_cores
from ..models.authors import read_authors_checkpoint
from ..models.checkpoint import read_skeleton

BYTES_PER_SECOND = 10e9
"""Memory bandwidth behind the estimate of compute: about one core of a small server, or a phone."""


def read_plan(adapter: Path, shape: DecoderShape) -> ExchangePlan:
    if adapter.is_dir():
        where = adapter / ADAPTER_CONFIG
        return decode(AdapterConfig, read_json(where), str(where)).plan
    return read_authors_checkpoint(adapter, shape).config.plan


def dry_run(base: str, adapter: Path, dtype: str, edge_dtype: str, compute_millis: float | None) -> dict[str, Any]:
    """The facts, as one JSON object. Raises what an export would raise before it reads weights."""
    shape, skeleton = read_skeleton(base)
    plan = read_plan(adapter, shape)
    check_fits(plan, shape)
    require_runnable(plan)
    cloud, edge = sides(skeleton, plan, shape)
    cloud_bytes = sum(cloud.values()) * DTYPE_BYTES[dtype]
    tables = sum(count for name, count in edge.items() if not name.startswith("layers."))
    edge_bytes = tables * DTYPE_BYTES[edge_dtype] + 4 * (sum(edge.values()) - tables)
    assumed = compute_millis is None
    compute = compute_millis if compute_millis is not None else 1000 * (cloud_bytes + head_bytes(shape, edge_dtype)) / BYTES_PER_SECOND
    return {
        "base": base,
        "plan": {
            "layers": plan.layers,
            "exchanges": len(plan.exchanges),
            "segments": len(plan.segments),
            "round_trips_per_token": plan.round_trips,
        },
        "cloud": {"parameters": cloud, "total": sum(cloud.values()), "bytes": cloud_bytes, "dtype": dtype},
        "edge": {"parameters": edge, "total": sum(edge.values()), "bytes": edge_bytes, "dtype": edge_dtype},
        "kv_cache_bytes_per_token": shape.kv_bytes_per_token(dtype, plan.cloud_layers),
        "wire_bytes_per_token": {
            wire: {"up": cost.up, "down": cost.down, "communication_reduction": round(cost.communication_reduction, 4)}
            for wire in DTYPE_BYTES
            for cost in [payload(plan, shape, wire)]
        },
        "compute_millis": round(compute, 2),
        "compute_is_assumed": assumed,
        "tokens_per_second": {f"{rtt:g}": round(tokens_per_second(plan, rtt, compute), 2) for rtt in RTTS_MILLIS},
    }


def head_bytes(shape: DecoderShape, dtype: str) -> int:
    return shape.vocabulary * shape.hidden * DTYPE_BYTES[dtype]


def sides(model: Any, plan: ExchangePlan, shape: DecoderShape) -> tuple[dict[str, int], dict[str, int]]:
    """Values per tensor, by name: (cloud, edge). Every parameter of base and adapter is on exactly one side."""
    cloud: dict[str, int] = {}
    edge: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        (cloud if name.startswith("model.layers.") else edge)[name] = parameter.numel()
    for name, (rows, columns) in expected_basis(plan, shape).items():
        cloud[name] = rows * columns
    for name, (rows, columns) in expected_cores(plan).items():
        edge[name] = rows * columns
    return cloud, edge


def format_dry_run(facts: dict[str, Any]) -> str:
    """For a person: sums by kind of tensor, then the costs."""
    plan = facts["plan"]
    lines = [
        f"{facts['base']}: {plan['layers']} layers, {plan['exchanges']} exchanges, {plan['segments']} cloud segments, "
        f"{plan['round_trips_per_token']} round trips per token"
    ]
    for side in ("cloud", "edge"):
        half = facts[side]
        lines.append(f"{side}: {half['total']:,} values, {half['bytes'] / 1e6:,.1f} MB in {half['dtype']}")
        lines += [f"  {kind:<44}{count:>16,}" for kind, count in kinds(half["parameters"]).items()]
    lines.append(f"KV cache in the cloud: {facts['kv_cache_bytes_per_token']:,} bytes per token")
    for wire, cost in facts["wire_bytes_per_token"].items():
        lines.append(
            f"wire in {wire}: {cost['up']:,} bytes up, {cost['down']:,} down per token; "
            f"{100 * cost['communication_reduction']:.1f} % less than full-rank exchange"
        )
    source = f"assumed: weights read at {BYTES_PER_SECOND / 1e9:g} GB/s" if facts["compute_is_assumed"] else "given"
    rates = ", ".join(f"{rtt} ms: {rate:g}" for rtt, rate in facts["tokens_per_second"].items())
    lines.append(f"predicted tokens/s at {facts['compute_millis']:g} ms of compute ({source}), by RTT: {rates}")
    return "\n".join(lines)


def kinds(parameters: dict[str, int]) -> dict[str, int]:
    """Layer numbers replaced by *, counts summed."""
    sums: dict[str, int] = {}
    for name, count in parameters.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        sums[kind] = sums.get(kind, 0) + count
    return sums
