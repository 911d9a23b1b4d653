"""What an edge half holds for a plan: which graphs, and how the weights of the device's own layers lie in their file."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .names import CORES_GRAPH, EMBEDDING_GRAPH, ENTRY_GRAPH, FEATURES, HEAD_GRAPH, LAYER_GRAPH
from .plan import Exchange, ExchangePlan
from .shape import DecoderShape


def graph_names(plan: ExchangePlan, shape: DecoderShape) -> tuple[str, ...]:
    """The graphs of an edge half, each there as `.onnx` and as `.ort`. None holds a table, a core or a layer's weights: those are
    inputs, from files of their own."""
    injections = sorted({injection_graph(exchange) for exchange in plan.all_exchanges})
    return (EMBEDDING_GRAPH, HEAD_GRAPH, *injections, *sorted({layer_graph(shape.windows[layer]) for layer in plan.device_layers}))


def injection_graph(exchange: Exchange) -> str:
    """The graph that makes this exchange's injection, of compressed or (index -1) of the entry. One serves all such exchanges."""
    name = ENTRY_GRAPH if exchange.index < 0 else CORES_GRAPH
    return name + FEATURES if exchange.features else name


def layer_graph(window: int) -> str:
    """The graph that runs a device layer of this sliding window in tokens; 0: full attention. One serves all such layers."""
    return f"{LAYER_GRAPH}_window_{window}" if window else LAYER_GRAPH


def fused_attention(shape: DecoderShape) -> bool:
    """Whether onnxruntime's GroupQueryAttention takes these heads: its CPU kernel refuses sizes that are no multiple of 16
    when it rotates (1.31)."""
    return shape.head_dim % 16 == 0


def layer_slices(plan: ExchangePlan, shape: DecoderShape) -> Iterator[tuple[int, str, slice, tuple[int, ...]]]:
    """Where each tensor lies in `layers.bin`, in values: (layer, name, slice, shape), front to back."""
    start = 0
    for layer in plan.device_layers:
        for name, size in layer_tensors(shape):
            stop = start + math.prod(size)
            yield layer, name, slice(start, stop), size
            start = stop


def layer_tensors(shape: DecoderShape) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of one device layer's tensors, in the order of its graph's inputs and of the file `layers.bin`: one layer of
    `plan.device_layers` after the other, row-major, little-endian, no gaps. A bias that the base lacks is zero."""
    qkv = shape.query_width + 2 * shape.kv_width
    return (
        ("input_norm", (shape.hidden,)),
        ("qkv", (qkv, shape.hidden)),
        ("qkv_bias", (qkv,)),
        ("o", (shape.hidden, shape.query_width)),
        ("o_bias", (shape.hidden,)),
        ("mlp_norm", (shape.hidden,)),
        ("gate_up", (2 * shape.intermediate, shape.hidden)),
        ("gate_up_bias", (2 * shape.intermediate,)),
        ("down", (shape.hidden, shape.intermediate)),
        ("down_bias", (shape.hidden,)),
    )
