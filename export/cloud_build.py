"""Takes a transformers model apart into the cloud graph: fused weights, the adapter's basis, one segment after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..artifact.memory import give_back
from ..artifact.names import down_name, up_name
from ..artifact.plan import ExchangePlan, Segment
from ..artifact.shape import DecoderShape
from ..models.adapter import Adapter, expansion
from ..models.formula import target_projection
from .cloud_graph import FIRST_MASK, CloudGraph, Expansion, Layer, Projection, SegmentGraph, UpProjection
from .memory import give_back_pages

MATRICES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
"""Targets that read the same input are one matrix, its rows side by side."""


def up_projections(
    plan: ExchangePlan, segment: Segment, layer: int, adapter: Adapter, shape: DecoderShape, dtype: torch.dtype, starts: dict[int, int]
) -> dict[str, list[UpProjection]]:
    """Of one layer, by the matrix that they add to. starts: of each input's columns that the segment keeps."""
    ups: dict[str, list[UpProjection]] = {matrix: [] for matrix in MATRICES}
    offsets = {"k": shape.query_width, "v": shape.query_width + shape.kv_width, "up": shape.intermediate}
    for exchange in plan.all_exchanges:
        for column in exchange.columns:
            if column.layer == layer:
                up = (adapter.config.scale * adapter.basis[up_name(layer, column.target)]).to(dtype)
                matrix = next(matrix for matrix, targets in MATRICES.items() if column.target in targets)
                start = column.start - starts[exchange.index]
                ups[matrix].append(UpProjection(up, segment.inputs.index(exchange.index), start, offsets.get(column.target, 0)))
    return ups


def expansions(plan: ExchangePlan, segment: Segment, adapter: Adapter, dtype: torch.dtype) -> tuple[list[Expansion], dict[int, int]]:
    """Of each of the segment's inputs: the part of P that its layers read, and the column at which it starts."""
    modules, starts = [], {}
    for exchange in plan.all_exchanges:
        if exchange.index not in segment.inputs:
            continue
        starts[exchange.index] = 0
        places, signs = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=dtype)
        if exchange.shared:
            own = [column for column in exchange.columns if segment.first <= column.layer < segment.stop]
            starts[exchange.index] = own[0].start
            places, signs = (each[own[0].start : own[-1].stop].clone() for each in expansion(adapter.basis, exchange))
        modules.append(Expansion(places, signs.to(dtype)))
    return modules, starts


def fuse(*projections: Any) -> Projection:
    """Weights of projections that read the same input as one matrix (and bias); the originals are let go, pages and all."""
    weights = [projection.weight.data for projection in projections]
    weight = weights[0]
    if len(weights) > 1:
        weight = torch.cat(weights)
        for original in weights:
            give_back_pages(original)
    biases = [projection.bias.data for projection in projections if projection.bias is not None]
    for projection in projections:
        projection.weight = None
    return Projection(weight, torch.cat(biases) if biases else None)


def build_segment(model: Any, segment: Segment, shape: DecoderShape, adapter: Adapter, windows: list[int]) -> SegmentGraph:
    """One segment from the layers of a transformers model, which it takes apart as it goes (peak memory: one layer more)."""
    plan = adapter.config.plan
    dtype = model.dtype
    layers = []
    modules, starts = expansions(plan, segment, adapter, dtype)
    for index in range(segment.first, segment.stop):
        layer = model.model.layers[index]
        norms = (layer.input_layernorm.weight.data, layer.post_attention_layernorm.weight.data)
        projections = {matrix: fuse(*(target_projection(layer, target) for target in targets)) for matrix, targets in MATRICES.items()}
        ups = up_projections(plan, segment, index, adapter, shape, dtype, starts)
        mask = FIRST_MASK + windows.index(shape.windows[index])
        layers.append(Layer(norms, projections, ups, index - segment.first, mask, len(windows), shape.windows[index], shape))
        model.model.layers[index] = nn.Identity()
        give_back()
    downs = []
    if segment.exchange is not None:
        source = plan.source(segment.first)
        downs = [adapter.basis[down_name(source.layer, name)] for name, _ in source.ranks]
    down = torch.cat(downs).to(dtype) if downs else torch.zeros(0, shape.hidden, dtype=dtype)
    return SegmentGraph(layers, down, modules)


def build_cloud_graph(model: Any, shape: DecoderShape, adapter: Adapter) -> CloudGraph:
    """The cloud half of `model` with `adapter`'s basis; consumes the model's layers. Holds no core, table, head or tokenizer."""
    windows = cloud_windows(adapter.config.plan, shape)
    segments = [build_segment(model, segment, shape, adapter, windows) for segment in adapter.config.plan.segments]
    return CloudGraph(segments, windows, shape).eval().requires_grad_(False)


def cloud_windows(plan: ExchangePlan, shape: DecoderShape) -> list[int]:
    """The sliding windows among the cloud's layers; each has a mask."""
    return sorted(set(shape.windows[plan.front_layers : plan.layers - plan.back_layers]))
