"""Which parameter of base and adapter is on which side under a plan, and the bytes that makes. Reads no weight."""

from __future__ import annotations

import math
from typing import Any

from ..artifact.names import down_name
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DTYPE_BYTES, DecoderShape
from .adapter import expected_basis

BASE_PREFIXES = ("model.", "lm_head.")
"""How the names of the base's parameters begin; the adapter's begin otherwise (artifact/names.py)."""


def sides(model: Any, plan: ExchangePlan, shape: DecoderShape) -> tuple[dict[str, int], dict[str, int]]:
    """Values per tensor, by name: (cloud, edge). Every parameter of base and adapter is on exactly one side.

    The entry source's A is the device's, with that layer's input norm folded in; the norm itself stays with its layer in the cloud.
    """
    cloud: dict[str, int] = {}
    edge: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        in_cloud = parts[:2] == ["model", "layers"] and int(parts[2]) not in plan.device_layers
        (cloud if in_cloud else edge)[name] = parameter.numel()
    held = {down_name(source.layer, name) for source in plan.sources if source.on_device for name, _ in source.ranks}
    for name, (rows, columns) in expected_basis(plan, shape).items():
        (edge if name in held else cloud)[name] = rows * columns
    edge |= {name: math.prod(size) for name, size in plan.trained.items()}
    return cloud, edge


def part(name: str) -> str:
    """Which part of the model a parameter belongs to, as the table of sides calls it."""
    if name.startswith(BASE_PREFIXES):
        return {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "final norm"}.get(
            name, "decoder layers"
        )
    return {"down": "A", "up": "B", "expand": "P", "core": "cores", "weight": "features", "bias": "features"}[name.rpartition(".")[2]]


def half(parameters: dict[str, int], base_dtype: str, adapter_dtype: str) -> dict[str, Any]:
    """One side's parameters, with values and bytes by part; base and adapter are stored in dtypes of their own."""
    parts: dict[str, dict[str, int]] = {}
    for name, count in parameters.items():
        sums = parts.setdefault(part(name), {"values": 0, "bytes": 0})
        sums["values"] += count
        sums["bytes"] += count * DTYPE_BYTES[base_dtype if name.startswith(BASE_PREFIXES) else adapter_dtype]
    total = sum(parameters.values())
    return {
        "parameters": parameters,
        "parts": parts,
        "total": total,
        "bytes": sum(sums["bytes"] for sums in parts.values()),
        "dtype": base_dtype,
    }
