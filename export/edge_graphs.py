"""The edge half's ONNX graphs: embedding, cores, entry, final norm + head; and (layer_graphs.py) decoder layers.

Tables, cores and layer weights are inputs, not weights of a graph. That way a tied table is one file, mapped once, read by two
graphs; cores can be swapped; and the `.ort` files, which would embed every weight, stay small. The price is that onnxruntime cannot
prepack them: docs/artifacts.md has the figures.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ..artifact.edge_layout import graph_names, layer_graph
from ..artifact.names import CORES_GRAPH, EMBEDDING_GRAPH, ENTRY_GRAPH, FEATURES, HEAD_GRAPH
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from .layer_graphs import layer_model
from .onnx_nodes import FLOAT, INT64, Nodes, model, value

ELEMENTS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def embedding_graph(shape: DecoderShape, dtype: str) -> onnx.ModelProto:
    """ids int64 [T], table [V, H] -> hidden float32 [T, H]."""
    nodes = Nodes()
    if dtype == "fp32":
        nodes.add("Gather", ["table", "ids"], "hidden", axis=0)
    else:
        nodes.add("Gather", ["table", "ids"], "row", axis=0)
        nodes.add("Cast", ["row"], "hidden", to=FLOAT)
    inputs = [value("ids", INT64, ["T"]), value("table", ELEMENTS[dtype], [shape.vocabulary, shape.hidden])]
    return model(EMBEDDING_GRAPH, nodes, inputs, [value("hidden", FLOAT, ["T", shape.hidden])])


def cores_graph(features: bool = False) -> onnx.ModelProto:
    """compressed [T, C], cores [I, C] -> injection [T, I]: one exchange; the same graph serves all of them.

    cores: the exchange's cores M as blocks, zero where a core does not read a column of the compressed. With features: cores [I, N],
    features [N, C], features_bias [N].
    """
    nodes = Nodes()
    private = _inject(nodes, features)
    inputs = [value("compressed", FLOAT, ["T", "C"]), *private]
    return model(CORES_GRAPH + FEATURES * features, nodes, inputs, [value("injection", FLOAT, ["T", "I"])])


def _inject(nodes: Nodes, features: bool) -> list[onnx.ValueInfoProto]:
    """compressed -> injection = M A u, or M silu(F A u + f); returns the inputs that it adds: what is private."""
    if not features:
        nodes.add("Gemm", ["compressed", "cores"], "injection", transB=1)
        return [value("cores", FLOAT, ["I", "C"])]
    z = nodes.linear("compressed", "features", "features.linear")
    nodes.add("Sigmoid", [z], "features.gate")
    nodes.add("Mul", [z, "features.gate"], "features.active")
    nodes.add("Gemm", ["features.active", "cores"], "injection", transB=1)
    return [value("cores", FLOAT, ["I", "N"]), value("features", FLOAT, ["N", "C"]), value("features_bias", FLOAT, ["N"])]


def entry_graph(shape: DecoderShape, features: bool = False) -> onnx.ModelProto:
    """hidden [T, H], down [C, H], cores [I, C] -> injection [T, I]: what the device sends with the entry.

    down: A of the entry source with the weight of its input RMSNorm folded in, so that down · hidden / rms = A u. features: as above.
    """
    nodes = Nodes()
    nodes.unit("hidden", shape.epsilon, "entry")
    nodes.add("Gemm", ["entry.unit", "down"], "compressed", transB=1)
    private = _inject(nodes, features)
    inputs = [value("hidden", FLOAT, ["T", shape.hidden]), value("down", FLOAT, ["C", shape.hidden]), *private]
    return model(ENTRY_GRAPH + FEATURES * features, nodes, inputs, [value("injection", FLOAT, ["T", "I"])])


def head_graph(shape: DecoderShape, norm: NDArray[np.float32], dtype: str) -> onnx.ModelProto:
    """exit float32 [T, H], table [V, H] -> logits float32 [T, V]. norm: weight of the final RMSNorm [H].

    Gemm with transB reads the table as it lies; a fp16 table is widened on the fly (half the file, more time per token).
    """
    nodes = Nodes()
    nodes.rms_norm("exit", nodes.constant("norm", norm, np.float32), shape.epsilon, "normed")
    if dtype == "fp32":
        nodes.add("Gemm", ["normed", "table"], "logits", transB=1)
    else:
        nodes.add("Cast", ["table"], "wide", to=FLOAT)
        nodes.add("Gemm", ["normed", "wide"], "logits", transB=1)
    inputs = [value("exit", FLOAT, ["T", shape.hidden]), value("table", ELEMENTS[dtype], [shape.vocabulary, shape.hidden])]
    return model(HEAD_GRAPH, nodes, inputs, [value("logits", FLOAT, ["T", shape.vocabulary])])


def write_graphs(folder: Path, plan: ExchangePlan, shape: DecoderShape, norm: NDArray[np.float32], dtype: str) -> list[str]:
    """Writes the `.onnx` files that `plan` needs; returns the graphs' names."""
    graphs = {
        EMBEDDING_GRAPH: lambda: embedding_graph(shape, dtype),
        HEAD_GRAPH: lambda: head_graph(shape, norm, dtype),
        CORES_GRAPH: cores_graph,
        ENTRY_GRAPH: lambda: entry_graph(shape),
        CORES_GRAPH + FEATURES: lambda: cores_graph(True),
        ENTRY_GRAPH + FEATURES: lambda: entry_graph(shape, True),
        **{layer_graph(window): partial(layer_model, shape, window) for window in set(shape.windows)},
    }
    names = list(graph_names(plan, shape))
    for name in names:
        (folder / f"{name}.onnx").write_bytes(graphs[name]().SerializeToString(deterministic=True))
    return names
