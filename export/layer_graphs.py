"""One decoder layer as an ONNX graph for the device: weights and KV cache are inputs, so one graph serves every layer.

    hidden [T, H], position, cos, sin, past_key, past_value [1, kv_heads, P, head_dim], weights
        -> output [T, H], present_key, present_value [1, kv_heads, P + T, head_dim]

Attention is onnxruntime's GroupQueryAttention where it takes the heads, else plain ONNX operators (artifact/edge_layout.py). With the
former, past and present may be one buffer of more than P + T tokens, written in place; with the latter, P must be the position.
Decoder: Llama (arXiv 2302.13971).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..artifact.edge_layout import fused_attention, layer_graph, layer_tensors
from ..artifact.shape import DecoderShape
from .onnx_nodes import FLOAT, INT64, MICROSOFT, Nodes, model, value


def layer_model(shape: DecoderShape, window: int) -> onnx.ModelProto:
    """A device layer with this sliding window in tokens; 0: full attention."""
    nodes = Nodes()
    nodes.rms_norm("hidden", "input_norm", shape.epsilon, "u")
    nodes.linear("u", "qkv", "projected")
    nodes.add("Shape", ["hidden"], "tokens", end=1)
    nodes.add("Add", ["position", "tokens"], "length")
    attend = _fused if fused_attention(shape) else _plain
    attend(nodes, shape, window)
    nodes.linear("attended", "o", "attention")
    nodes.add("Add", ["hidden", "attention"], "middle")
    nodes.rms_norm("middle", "mlp_norm", shape.epsilon, "normed")
    nodes.linear("normed", "gate_up", "both")
    nodes.nodes.append(helper.make_node("Split", ["both"], ["gate", "up"], axis=1))
    nodes.add("Sigmoid", ["gate"], "sigmoid")
    nodes.add("Mul", ["gate", "sigmoid"], "silu")
    nodes.add("Mul", ["silu", "up"], "inner")
    nodes.linear("inner", "down", "mlp")
    nodes.add("Add", ["middle", "mlp"], "output")
    cache = [1, shape.kv_heads, None, shape.head_dim]
    inputs = [
        value("hidden", FLOAT, ["T", shape.hidden]),
        value("position", INT64, [1]),
        value("cos", FLOAT, ["context", shape.head_dim // 2]),
        value("sin", FLOAT, ["context", shape.head_dim // 2]),
        value("past_key", FLOAT, cache),
        value("past_value", FLOAT, cache),
        *(value(name, FLOAT, list(size)) for name, size in layer_tensors(shape)),
    ]
    outputs = [
        value("output", FLOAT, ["T", shape.hidden]),
        value("present_key", FLOAT, cache),
        value("present_value", FLOAT, cache),
    ]
    return model(layer_graph(window), nodes, inputs, outputs)


def _fused(nodes: Nodes, shape: DecoderShape, window: int) -> None:
    """Rope, cache and attention in one operator (onnxruntime, contrib operator GroupQueryAttention, packed q, k, v)."""
    nodes.add("Unsqueeze", ["projected", nodes.constant("first_axis", [0])], "query")
    nodes.add("Cast", ["length"], "length32", to=TensorProto.INT32)
    nodes.add("Sub", ["length32", nodes.constant("one", [1], np.int32)], "last")
    nodes.add("Squeeze", ["length32"], "total")
    nodes.nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            ["query", "", "", "past_key", "past_value", "last", "total", "cos", "sin"],
            ["grouped", "present_key", "present_value"],
            domain=MICROSOFT,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=window or -1,
        )
    )
    nodes.add("Squeeze", ["grouped", "first_axis"], "attended")


def _plain(nodes: Nodes, shape: DecoderShape, window: int) -> None:
    """The same with plain operators."""
    nodes.add("Squeeze", ["position"], "start")
    nodes.add("Squeeze", ["length"], "stop")
    step = nodes.constant("step", 1)
    nodes.add("Range", ["start", "stop", step], "positions")
    for table in ("cos", "sin"):
        nodes.add("Gather", [table, "positions"], f"{table}_rows", axis=0)
    split = nodes.constant("split", [shape.query_width, shape.kv_width, shape.kv_width])
    nodes.nodes.append(helper.make_node("Split", ["projected", split], ["q_flat", "k_flat", "v_flat"], axis=1))
    for name, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
        nodes.add("Reshape", [f"{name}_flat", nodes.constant(f"{name}_heads", [1, -1, heads, shape.head_dim])], f"{name}_rows")
        nodes.add("Transpose", [f"{name}_rows"], f"{name}_plain", perm=[0, 2, 1, 3])
    for name in ("q", "k"):
        _rotate(nodes, name)
    nodes.add("Concat", ["past_key", "k_rotated"], "present_key", axis=2)
    nodes.add("Concat", ["past_value", "v_plain"], "present_value", axis=2)
    groups = shape.heads // shape.kv_heads
    nodes.add("Reshape", ["q_rotated", nodes.constant("grouped_shape", [shape.kv_heads, groups, -1, shape.head_dim])], "q_grouped")
    for name in ("key", "value"):  # [1, kv_heads, L, D] -> [kv_heads, 1, L, D]: the heads of a group share it
        nodes.add("Transpose", [f"present_{name}"], f"{name}_shared", perm=[1, 0, 2, 3])
    nodes.add("Transpose", ["key_shared"], "key_columns", perm=[0, 1, 3, 2])
    nodes.add("MatMul", ["q_grouped", "key_columns"], "products")
    nodes.add("Mul", ["products", nodes.constant("scale", shape.head_dim**-0.5, np.float32)], "scores")
    zero = nodes.constant("zero", 0)
    nodes.add("Range", [zero, "stop", step], "keys")
    nodes.add("Unsqueeze", ["positions", nodes.constant("column", [1])], "rows")
    nodes.add("LessOrEqual", ["keys", "rows"], "seen")
    if window:
        nodes.add("Sub", ["rows", nodes.constant("window", window)], "too_early")
        nodes.add("Greater", ["keys", "too_early"], "recent")
        nodes.add("And", ["seen", "recent"], "visible")
    visible = "visible" if window else "seen"
    nodes.add("Where", [visible, "scores", nodes.constant("hidden_score", np.finfo(np.float32).min, np.float32)], "masked")
    nodes.add("Softmax", ["masked"], "weights", axis=-1)
    nodes.add("MatMul", ["weights", "value_shared"], "heads")
    nodes.add("Transpose", ["heads"], "tokens_first", perm=[2, 0, 1, 3])
    nodes.add("Reshape", ["tokens_first", nodes.constant("flat", [-1, shape.query_width])], "attended")


def _rotate(nodes: Nodes, name: str) -> None:
    """Rope on halves (arXiv 2104.09864): [a, b] -> [a cos - b sin, b cos + a sin]."""
    nodes.nodes.append(helper.make_node("Split", [f"{name}_plain"], [f"{name}_a", f"{name}_b"], axis=3))
    for half in ("a", "b"):
        for table in ("cos", "sin"):
            nodes.add("Mul", [f"{name}_{half}", f"{table}_rows"], f"{name}_{half}_{table}")
    nodes.add("Sub", [f"{name}_a_cos", f"{name}_b_sin"], f"{name}_left")
    nodes.add("Add", [f"{name}_b_cos", f"{name}_a_sin"], f"{name}_right")
    nodes.add("Concat", [f"{name}_left", f"{name}_right"], f"{name}_rotated", axis=3)
