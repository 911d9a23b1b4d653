"""The device's own decoder layers and their KV cache: one onnxruntime graph, run once per layer with that layer's weights.

The cache holds no length of its own: a step says at which position it starts, and whatever lies beyond is overwritten. So truncating
and cancelling cost nothing here, and the device's cache cannot run apart from the cloud's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..artifact.edge_layout import fused_attention
from ..artifact.shape import DecoderShape, Rope
from .cores import Floats


@dataclass(frozen=True)
class Layer:
    """One device layer. session: of the graph for its window; weights: by name (edge_layout.layer_tensors), float32."""

    session: ort.InferenceSession
    weights: dict[str, Floats]


class DeviceLayers:
    """The layers `first <= index < stop` of one conversation of at most `context_tokens`."""

    def __init__(self, layers: list[Layer], shape: DecoderShape, context_tokens: int) -> None:
        tables = rope_tables(shape.rope, context_tokens)
        kind = _BufferCache if fused_attention(shape) else _GrowingCache
        self.caches = [kind(layer, tables, shape, context_tokens) for layer in layers]

    def run(self, hidden: Floats, position: int) -> Floats:
        """hidden [T, H] float32 of the tokens at `position` and after -> what the last of the layers gives, [T, H] float32.

        The tokens before `position` are those of the steps before; later ones are forgotten.
        """
        for cache in self.caches:
            hidden = cache.run(np.ascontiguousarray(hidden), position)
        return hidden

    @property
    def cache_bytes(self) -> int:
        """Room that the caches take when full."""
        return sum(cache.bytes for cache in self.caches)


def rope_tables(rope: Rope, tokens: int) -> tuple[Floats, Floats]:
    """cos and sin [tokens, head_dim / 2] float32 (arXiv 2104.09864)."""
    angles = np.arange(tokens, dtype=np.float32)[:, None] * np.asarray(rope.inv_freq, np.float32)
    return np.cos(angles) * np.float32(rope.attention_scaling), np.sin(angles) * np.float32(rope.attention_scaling)


class _BufferCache:
    """GroupQueryAttention writes the new keys and values into one buffer, where they stay: no copy of the past."""

    def __init__(self, layer: Layer, tables: tuple[Floats, Floats], shape: DecoderShape, context_tokens: int) -> None:
        size = (1, shape.kv_heads, context_tokens, shape.head_dim)
        self.buffers = {name: np.zeros(size, np.float32) for name in ("key", "value")}  # mapped when first written
        self.bytes = sum(buffer.nbytes for buffer in self.buffers.values())
        self.session = layer.session
        self.binding = layer.session.io_binding()
        self.kept: list[ort.OrtValue] = []
        for name, array in (*layer.weights.items(), ("cos", tables[0]), ("sin", tables[1])):
            self._bind(name, array)
        for name, buffer in self.buffers.items():
            value = self._bind(f"past_{name}", buffer)
            self.binding.bind_ortvalue_output(f"present_{name}", value)

    def _bind(self, name: str, array: NDArray[np.float32]) -> ort.OrtValue:
        value = ort.OrtValue.ortvalue_from_numpy(array)
        self.kept.append(value)
        self.binding.bind_ortvalue_input(name, value)
        return value

    def run(self, hidden: Floats, position: int) -> Floats:
        self.binding.bind_cpu_input("hidden", hidden)
        self.binding.bind_cpu_input("position", np.array([position], np.int64))
        self.binding.bind_output("output")  # afresh: its shape changes from step to step
        self.session.run_with_iobinding(self.binding)
        output: Any = self.binding.get_outputs()[-1].numpy()
        return output


class _GrowingCache:
    """Plain operators return the past with the new tokens appended; the next step passes in as much of it as it wants kept."""

    def __init__(self, layer: Layer, tables: tuple[Floats, Floats], shape: DecoderShape, context_tokens: int) -> None:
        self.session = layer.session
        self.fixed = {**layer.weights, "cos": tables[0], "sin": tables[1]}
        self.key = self.value = np.zeros((1, shape.kv_heads, 0, shape.head_dim), np.float32)
        self.bytes = 2 * 4 * shape.kv_width * context_tokens

    def run(self, hidden: Floats, position: int) -> Floats:
        past = {"past_key": self._past(self.key, position), "past_value": self._past(self.value, position)}
        inputs = {"hidden": hidden, "position": np.array([position], np.int64), **past, **self.fixed}
        outputs: Any = self.session.run(["output", "present_key", "present_value"], inputs)
        output, self.key, self.value = outputs
        return output

    def _past(self, cache: Floats, position: int) -> Floats:
        return cache if cache.shape[2] == position else np.ascontiguousarray(cache[:, :, :position])
