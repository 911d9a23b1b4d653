"""The edge half's ONNX graphs: embedding, cores, final norm + head. Tables and cores are inputs, not weights of a graph.

That way a tied table is one file, mapped once, read by two graphs; cores can be swapped; and the `.ort` files, which would
embed every weight, stay small. The price is that onnxruntime cannot prepack the head: docs/artifacts.md has the figures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ..artifact.names import CORES_GRAPH, EMBEDDING_GRAPH, HEAD_GRAPH
from ..artifact.shape import DecoderShape

OPSET = 17
IR_VERSION = 9
"""Old enough for every onnxruntime since 1.15; nothing here needs more."""

ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def _model(
    name: str, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], output: onnx.ValueInfoProto, weights: list[onnx.TensorProto]
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, f"plora_{name}", inputs, [output], initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="plora")
    onnx.checker.check_model(model, full_check=True)
    return model


def embedding_graph(shape: DecoderShape, dtype: str) -> onnx.ModelProto:
    """ids int64 [T], table [V, H] -> hidden float32 [T, H]."""
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["T"]),
        helper.make_tensor_value_info("table", ELEMENTS[dtype], [shape.vocabulary, shape.hidden]),
    ]
    output = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["T", shape.hidden])
    if dtype == "fp32":
        nodes = [helper.make_node("Gather", ["table", "ids"], ["hidden"], axis=0)]
    else:
        nodes = [
            helper.make_node("Gather", ["table", "ids"], ["row"], axis=0),
            helper.make_node("Cast", ["row"], ["hidden"], to=TensorProto.FLOAT),
        ]
    return _model(EMBEDDING_GRAPH, nodes, inputs, output, [])


def cores_graph() -> onnx.ModelProto:
    """compressed [T, C], cores [I, C] -> injection [T, I]: one exchange; the same graph serves all of them.

    cores: the exchange's cores M as blocks, zero where a core does not read a column of the compressed.
    """
    inputs = [
        helper.make_tensor_value_info("compressed", TensorProto.FLOAT, ["T", "C"]),
        helper.make_tensor_value_info("cores", TensorProto.FLOAT, ["I", "C"]),
    ]
    output = helper.make_tensor_value_info("injection", TensorProto.FLOAT, ["T", "I"])
    return _model(CORES_GRAPH, [helper.make_node("Gemm", ["compressed", "cores"], ["injection"], transB=1)], inputs, output, [])


def head_graph(shape: DecoderShape, norm: NDArray[np.float32], dtype: str) -> onnx.ModelProto:
    """exit float32 [T, H], table [V, H] -> logits float32 [T, V]. norm: weight of the final RMSNorm [H].

    Gemm with transB reads the table as it lies; a fp16 table is widened on the fly (half the file, more time per token).
    """
    inputs = [
        helper.make_tensor_value_info("exit", TensorProto.FLOAT, ["T", shape.hidden]),
        helper.make_tensor_value_info("table", ELEMENTS[dtype], [shape.vocabulary, shape.hidden]),
    ]
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["T", shape.vocabulary])
    weights = [
        numpy_helper.from_array(norm.astype(np.float32), "norm"),
        numpy_helper.from_array(np.asarray(shape.epsilon, np.float32), "epsilon"),
    ]
    nodes = [
        helper.make_node("Mul", ["exit", "exit"], ["square"]),
        helper.make_node("ReduceMean", ["square"], ["mean"], axes=[-1], keepdims=1),
        helper.make_node("Add", ["mean", "epsilon"], ["above_zero"]),
        helper.make_node("Sqrt", ["above_zero"], ["root"]),
        helper.make_node("Div", ["exit", "root"], ["unit"]),
        helper.make_node("Mul", ["unit", "norm"], ["normed"]),
    ]
    if dtype == "fp32":
        nodes.append(helper.make_node("Gemm", ["normed", "table"], ["logits"], transB=1))
    else:
        nodes.append(helper.make_node("Cast", ["table"], ["wide"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Gemm", ["normed", "wide"], ["logits"], transB=1))
    return _model(HEAD_GRAPH, nodes, inputs, output, weights)


def write_graphs(folder: Path, shape: DecoderShape, norm: NDArray[np.float32], dtype: str) -> list[str]:
    """Writes the three `.onnx` files; returns their names."""
    graphs = {EMBEDDING_GRAPH: embedding_graph(shape, dtype), CORES_GRAPH: cores_graph(), HEAD_GRAPH: head_graph(shape, norm, dtype)}
    for name, model in graphs.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return [f"{name}.onnx" for name in graphs]
