"""The device's own decoder layers, from a written edge half, against transformers' layers: output, keys and values of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import plora.device_runtime.layers as device_layers
import plora.export.layer_graphs as layer_graphs
from plora.artifact import ExchangePlan
from plora.artifact.edge_layout import fused_attention, layer_tensors
from plora.artifact.names import OPERATORS
from plora.device_runtime.edge import Edge
from plora.device_runtime.layers import DeviceLayers, _BufferCache, _GrowingCache, rope_tables
from plora.export.verify import TOLERANCES
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base

from .conftest import LLAMA3_ROPE, YARN_ROPE
from .joined import CONTEXT, VOCABULARY, error, tiny_base, unsplit, write_edge_half

TOLERANCE = 2e-5
"""Of the tensor's largest value, fp32: products are summed in another order, some 1e-6; a wrong weight gives 1e-2."""
TOKENS = 29
PLAN = ExchangePlan(5, 2, 2, (), ())
"""Two layers in front, two at the back, and nothing that the cloud adapts."""
CHUNKS = {"whole": [TOKENS], "single": [1] * TOKENS, "mixed": [5, 1, 1, 13, 2, 7]}

GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": ("llama", {"head_dim": 16, **GQA}),
    "fused-32": ("llama-tied", {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "fused-llama3-rope": ("llama", {"head_dim": 16, "rope_parameters": LLAMA3_ROPE}),
    "fused-yarn-rope": ("mistral", {"head_dim": 16, "rope_parameters": YARN_ROPE}),
    "fused-mha-biases": ("llama-mha-bias", {"head_dim": 16}),
    "fused-qkv-biases": ("qwen2", {"head_dim": 16}),
    "fused-window": ("mistral-window", {"head_dim": 16}),
    "fused-two-windows": ("qwen2-window", {"head_dim": 16, "max_window_layers": 1}),
    "plain": ("llama", {"head_dim": 8, **GQA}),
    "plain-10": ("llama-odd-heads", {}),
    "plain-llama3-rope": ("llama3-rope", {}),
    "plain-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "plain-mha-biases": ("llama-mha-bias", {"head_dim": 12}),
    "plain-qkv-biases": ("qwen2", {}),
    "plain-window": ("mistral-window", {}),
    "plain-two-windows": ("qwen2-window", {"max_window_layers": 1}),
}
FUSED = [name for name in MODELS if name.startswith("fused")]


def model_of(name: str) -> Base:
    family, overrides = MODELS[name]
    return tiny_base(family, num_hidden_layers=PLAN.layers, **overrides)


def edge_of(base: Base, folder: Path, dtype: str = "fp32", ort: bool = False) -> Edge:
    adapter = new_adapter(base, PLAN, "random", 1.0, 0)
    return Edge(write_edge_half(folder, base, adapter, dtype, ort), graphs="ort" if ort else "onnx")


@dataclass
class Expected:
    """What transformers computes for one prompt: hidden[i] is what layer i reads [T, H]; keys and values [kv_heads, T, head_dim]."""

    hidden: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]


@torch.no_grad()
def expected_of(base: Base, ids: list[int]) -> Expected:
    hidden = unsplit(base, new_adapter(base, PLAN, "random", 1.0, 0), ids).hidden
    cache = DynamicCache()  # without a config: keeps everything, whatever the window
    base.model(torch.tensor([ids]), past_key_values=cache)
    return Expected(hidden, [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers])


def said(seed: int = 0, count: int = TOKENS) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, count).tolist()


def run_chunks(layers: DeviceLayers, hidden: Tensor, chunks: list[int] | int, start: int = 0) -> Tensor:
    """hidden [T, H] of the tokens at `start` and after, in steps -> what the last layer gives [T, H]."""
    parts, position = [], start
    for chunk in hidden.split(chunks):
        parts.append(torch.from_numpy(layers.run(chunk.numpy(), position).copy()))
        position += len(chunk)
    return torch.cat(parts)


def cached(layers: DeviceLayers, place: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values [kv_heads, length, head_dim] of one of the layers."""
    cache: Any = layers.caches[place]
    arrays = (cache.key, cache.value) if isinstance(cache, _GrowingCache) else (cache.buffers["key"], cache.buffers["value"])
    key, value = (torch.from_numpy(array[0, :, :length].copy()) for array in arrays)
    return key, value


def check(edge: Edge, expected: Expected, chunks: list[int], tolerance: float = TOLERANCE) -> None:
    """Each device layer alone, on what it reads in transformers; then front and back as the stepper runs them."""
    for index in PLAN.device_layers:
        layers = edge.device_layers(index, index + 1, CONTEXT)
        assert error(run_chunks(layers, expected.hidden[index], chunks), expected.hidden[index + 1]) < tolerance, f"layer {index}"
        key, value = cached(layers, 0, TOKENS)
        assert error(key, expected.keys[index]) < tolerance, f"keys of layer {index}"
        assert error(value, expected.values[index]) < tolerance, f"values of layer {index}"
    for first, stop in ((0, 2), (3, 5)):
        layers = edge.device_layers(first, stop, CONTEXT)
        assert error(run_chunks(layers, expected.hidden[first], chunks), expected.hidden[stop]) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_layers_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    base = model_of(name)
    assert fused_attention(base.shape) == (name in FUSED)
    edge, expected = edge_of(base, tmp_path), expected_of(base, said())
    for chunks in CHUNKS.values():
        check(edge, expected, chunks)
    layers = edge.device_layers(0, 2, CONTEXT)
    assert {type(cache) for cache in layers.caches} == {_BufferCache if name in FUSED else _GrowingCache}
    kv_values = 2 * base.shape.kv_heads * base.shape.head_dim * CONTEXT
    assert layers.cache_bytes == 2 * 4 * kv_values


@pytest.mark.parametrize("name", ["fused-window", "fused-qkv-biases", "plain-10", "plain-two-windows"])
def test_ort_graphs_equal_them_too(name: str, tmp_path: Path) -> None:
    """And the list of operators, from which a runtime for phones is built, names the fused one only where it is used."""
    base = model_of(name)
    edge = edge_of(base, tmp_path, ort=True)
    check(edge, expected_of(base, said()), CHUNKS["mixed"])
    operators = (tmp_path / OPERATORS).read_text()
    assert ("GroupQueryAttention" in operators) == (name in FUSED)
    for path in tmp_path.glob("layer*.onnx"):
        graph = onnx.load(path)
        assert ("com.microsoft" in {opset.domain for opset in graph.opset_import}) == (name in FUSED)
        assert ("GroupQueryAttention" in {node.op_type for node in graph.graph.node}) == (name in FUSED)


@pytest.mark.parametrize("name", ["fused", "fused-window", "plain", "plain-window"])
def test_going_back_forgets_what_came_after(name: str, tmp_path: Path) -> None:
    """Steps at an earlier position, to one token and to none; a longer prompt after a shorter one; each as if it were the first."""
    base = model_of(name)
    edge = edge_of(base, tmp_path)
    first = said(1)
    for front, back in ((0, 2), (3, 5)):
        layers = edge.device_layers(front, back, CONTEXT)
        run_chunks(layers, expected_of(base, first).hidden[front], CHUNKS["mixed"])
        now = first
        for seed, (position, count) in enumerate([(20, 7), (13, 20), (12, 1), (1, 3), (0, 29), (29, 4)], 2):
            now = now[:position] + said(seed, count)
            expected = expected_of(base, now)
            got = run_chunks(layers, expected.hidden[front][position:], 3, position)
            assert error(got, expected.hidden[back][position:]) < TOLERANCE
            key, value = cached(layers, 0, len(now))
            assert error(key, expected.keys[front]) < TOLERANCE
            assert error(value, expected.values[front]) < TOLERANCE


@pytest.mark.parametrize("name", FUSED)
def test_fused_and_plain_graphs_agree(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights through both: a plain graph can stand in wherever the fused operator cannot run."""
    base = model_of(name)
    fused = edge_of(base, tmp_path / "fused")
    monkeypatch.setattr(layer_graphs, "fused_attention", lambda shape: False)
    monkeypatch.setattr(device_layers, "fused_attention", lambda shape: False)
    plain = edge_of(base, tmp_path / "plain")
    expected = expected_of(base, said())
    check(plain, expected, CHUNKS["mixed"])
    growing = plain.device_layers(0, 2, CONTEXT)
    monkeypatch.undo()
    buffered = fused.device_layers(0, 2, CONTEXT)
    assert {type(cache) for cache in (*growing.caches, *buffered.caches)} == {_GrowingCache, _BufferCache}
    a, b = (run_chunks(layers, expected.hidden[0], CHUNKS["mixed"]) for layers in (growing, buffered))
    assert error(a, b) < TOLERANCE


@pytest.mark.parametrize("name", ["fused-mha-biases", "plain-window"])
def test_layers_in_half_precision(name: str, tmp_path: Path) -> None:
    """As close as export's verification demands; and equal, but for rounding, to a model whose weights were rounded."""
    base = model_of(name)
    edge, exact = edge_of(base, tmp_path, "fp16"), expected_of(base, said())
    check(edge, exact, CHUNKS["mixed"], TOLERANCES["fp16"])
    layers = edge.device_layers(0, 2, CONTEXT)
    assert error(run_chunks(layers, exact.hidden[0], CHUNKS["mixed"]), exact.hidden[2]) > TOLERANCE  # the control: they are rounded
    for weight in base.model.parameters():
        weight.copy_(weight.half())
    check(edge, expected_of(base, said()), CHUNKS["mixed"])


@pytest.mark.parametrize("name", ["fused-mha-biases", "plain-mha-biases"])
def test_one_wrong_weight_is_seen(name: str, tmp_path: Path) -> None:
    """The control of all of the above: every tensor of a layer matters."""
    base = model_of(name)
    edge, expected = edge_of(base, tmp_path), expected_of(base, said())
    right = edge._layers[1]
    for tensor, _ in layer_tensors(base.shape):
        weight = right.weights[tensor].copy()
        weight.flat[len(weight.flat) // 2] += 1
        edge._layers[1] = dataclasses.replace(right, weights={**right.weights, tensor: weight})
        layers = edge.device_layers(1, 2, CONTEXT)
        assert error(run_chunks(layers, expected.hidden[1], CHUNKS["mixed"]), expected.hidden[2]) > 10 * TOLERANCE, tensor


@pytest.mark.parametrize("name", ["fused", "plain"])
def test_a_position_off_by_one_is_seen(name: str, tmp_path: Path) -> None:
    base = model_of(name)
    edge, expected = edge_of(base, tmp_path), expected_of(base, said())
    for off, tolerated in ((0, True), (-1, False)):
        layers = edge.device_layers(1, 2, CONTEXT)
        layers.run(expected.hidden[1][:20].numpy(), 0)
        got = layers.run(expected.hidden[1][20:].numpy(), 20 + off)
        assert (error(got, expected.hidden[2][20:]) < TOLERANCE) == tolerated
        assert tolerated or error(got, expected.hidden[2][20:]) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["fused-llama3-rope", "plain-llama3-rope", "plain-yarn-rope"])
def test_rope_tables_are_those_of_transformers(name: str) -> None:
    base = model_of(name)
    rotary = base.model.model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(CONTEXT)[None])
    half = base.shape.head_dim // 2
    for ours, theirs in zip(rope_tables(base.shape.rope, CONTEXT), (cos, sin), strict=True):
        assert error(ours, theirs[0, :, :half]) < 1e-5
    plain = tiny_base("llama", head_dim=base.shape.head_dim).shape.rope
    assert error(rope_tables(plain, CONTEXT)[0], cos[0, :, :half]) > 1e-2  # the control: the scaling changes them
