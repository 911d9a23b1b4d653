"""How our ONNX graphs are written: nodes and constants under names that say where they come from."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 9
"""Old enough for every onnxruntime since 1.15; only GroupQueryAttention needs a newer one (docs/artifacts.md)."""
MICROSOFT = "com.microsoft"
"""Domain of onnxruntime's own operators."""
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64

value = helper.make_tensor_value_info


class Nodes:
    """Collects nodes and constants under names that say where they come from."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: type = np.int64) -> str:
        if all(each.name != name for each in self.constants):
            self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def rms_norm(self, x: str, weight: str, epsilon: float, output: str) -> str:
        """x / sqrt(mean(x²) + ε) · weight (arXiv 1910.07467)."""
        return self.add("Mul", [self.unit(x, epsilon, output), weight], output)

    def unit(self, x: str, epsilon: float, output: str) -> str:
        """x / sqrt(mean(x²) + ε)."""
        self.add("Mul", [x, x], f"{output}.square")
        self.add("ReduceMean", [f"{output}.square"], f"{output}.mean", axes=[-1], keepdims=1)
        self.add("Add", [f"{output}.mean", self.constant("epsilon", epsilon, np.float32)], f"{output}.above_zero")
        self.add("Sqrt", [f"{output}.above_zero"], f"{output}.root")
        return self.add("Div", [x, f"{output}.root"], f"{output}.unit")

    def linear(self, x: str, name: str, output: str) -> str:
        """x Wᵀ + b with the layer's tensors `name` and `name_bias`."""
        return self.add("Gemm", [x, name, f"{name}_bias"], output, transB=1)


def model(name: str, nodes: Nodes, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """A checked model of one graph."""
    graph = helper.make_graph(nodes.nodes, f"plora_{name}", inputs, outputs, initializer=nodes.constants)
    domains = sorted({"", *(node.domain for node in nodes.nodes)})
    opsets = [helper.make_opsetid(domain, OPSET if domain == "" else 1) for domain in domains]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="plora")
    onnx.checker.check_model(made, full_check=True)
    return made
