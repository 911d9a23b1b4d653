"""Both halves of an artifact, read from their files and driven by the walk, without a network: what verification runs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from ..artifact.edge_layout import graph_names, injection_graph, layer_graph, layer_slices
from ..artifact.errors import DamagedFile, WrongPair
from ..artifact.manifest import CloudManifest, EdgeManifest, read_manifest
from ..artifact.names import (
    CLOUD_GRAPH,
    CORES,
    EMBEDDING_GRAPH,
    ENTRY_DOWN,
    HEAD_GRAPH,
    HEAD_TABLE,
    LAYERS,
    TABLE,
    features_bias_name,
    features_weight_name,
)
from ..artifact.plan import Exchange, Segment
from ..artifact.walk import BackLayers, Entry, Exit, FrontLayers, walk

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
EDGE_DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
CACHE_TOKENS = 512
"""Of the verifier's one session: the probe and its continuation are under 100 tokens."""

Floats = NDArray[np.float32]


class Halves:
    """One session over both halves. graphs: "onnx" or "ort"."""

    def __init__(self, out: Path, graphs: str) -> None:
        self.cloud = read_manifest(CloudManifest, out / "cloud")
        self.edge = read_manifest(EdgeManifest, out / "edge")
        if self.cloud.contract_hash != self.edge.contract_hash:
            raise WrongPair(
                f"{out}: cloud has contract {self.cloud.contract_hash[:16]}…, edge {self.edge.contract_hash[:16]}…: not of one export"
            )
        self.plan, self.shape = self.cloud.contract.plan, self.cloud.contract.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
            self.graph: Any = torch.jit.load(str(out / "cloud" / CLOUD_GRAPH), map_location="cpu")
        self.segments = list(self.graph.segments.children())
        self.folder = out / "edge"
        self.sessions = self.open_graphs(graphs)
        table = (self.shape.vocabulary, self.shape.hidden)
        self.table = self._map(TABLE).reshape(table)
        self.head_table = self.table if self.edge.tied else self._map(HEAD_TABLE).reshape(table)
        with safe_open(self.folder / CORES, framework="np") as file:
            self.cores: dict[str, Floats] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.layers = self._layers() if self.plan.device_layers else {}
        entry = self.plan.entry_exchange
        if entry:
            self.entry_down = np.fromfile(self.folder / ENTRY_DOWN, "<f4").reshape(entry.compressed_columns, self.shape.hidden)
        self.cos, self.sin = rope_tables(self.shape.rope.inv_freq, self.shape.rope.attention_scaling)
        self.reset()

    def open_graphs(self, graphs: str) -> dict[str, ort.InferenceSession]:
        return {
            name: ort.InferenceSession(str(self.folder / f"{name}.{graphs}"), providers=["CPUExecutionProvider"])
            for name in graph_names(self.plan, self.shape)
        }

    def _map(self, name: str) -> NDArray[Any]:
        return np.memmap(self.folder / name, EDGE_DTYPES[self.edge.dtype], "r")

    def _layers(self) -> dict[int, dict[str, Floats]]:
        """Weights of the device's layers."""
        values, slices = self._map(LAYERS), list(layer_slices(self.plan, self.shape))
        if len(values) != slices[-1][2].stop:
            raise DamagedFile(f"{self.folder / LAYERS}: {len(values)} values, expected {slices[-1][2].stop}")
        layers: dict[int, dict[str, Floats]] = {layer: {} for layer in self.plan.device_layers}
        for layer, name, where, size in slices:
            layers[layer][name] = values[where].astype(np.float32).reshape(size)
        return layers

    def reset(self) -> None:
        """Forgets the session."""
        dtype = DTYPES[self.cloud.dtype]
        size = (1, self.shape.kv_heads, CACHE_TOKENS, self.shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype) for _ in range(self.plan.cloud_layers)]
        self.values = [torch.zeros(size, dtype=dtype) for _ in range(self.plan.cloud_layers)]
        empty = np.zeros((1, self.shape.kv_heads, 0, self.shape.head_dim), np.float32)
        self.cache = dict.fromkeys(self.plan.device_layers, (empty, empty))
        self.length = 0

    def run(self, name: str, **inputs: NDArray[Any]) -> Any:
        outputs = self.sessions[name].run(None, inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def embed(self, ids: list[int]) -> Floats:
        return self.run(EMBEDDING_GRAPH, ids=np.asarray(ids, np.int64), table=self.table)

    def logits(self, residual: Floats) -> Floats:
        return self.run(HEAD_GRAPH, exit=residual, table=self.head_table)

    def private(self, exchange: Exchange) -> dict[str, Floats]:
        """The private inputs of the exchange's graph: its cores as one matrix [I, N], and F and f of its features."""
        block = np.zeros((exchange.injection_columns, exchange.feature_columns), np.float32)
        for core in exchange.cores:
            block[core.up_start : core.up_stop, core.down_start : core.down_stop] = self.cores[core.name]
        if not exchange.features:
            return {"cores": block}
        weight, bias = self.cores[features_weight_name(exchange.source)], self.cores[features_bias_name(exchange.source)]
        return {"cores": block, "features": weight, "features_bias": bias}

    def inject(self, exchange: Exchange, compressed: Floats) -> Floats:
        return self.run(injection_graph(exchange), compressed=compressed, **self.private(exchange))

    def entry_injection(self, exchange: Exchange, hidden: Floats) -> Floats:
        return self.run(injection_graph(exchange), hidden=hidden, down=self.entry_down, **self.private(exchange))

    def device_layers(self, first: int, stop: int, hidden: Floats) -> Floats:
        """[T, H] through device layers at the session's position; their caches grow."""
        for layer in range(first, stop):
            past_key, past_value = self.cache[layer]
            hidden, *cache = self.run(
                layer_graph(self.shape.windows[layer]),
                hidden=hidden,
                position=np.array([self.length]),
                cos=self.cos,
                sin=self.sin,
                past_key=past_key,
                past_value=past_value,
                **self.layers[layer],
            )
            self.cache[layer] = (cache[0], cache[1])
        return hidden

    @torch.inference_mode()
    def step(self, ids: list[int]) -> dict[str, Floats]:
        """One step; every tensor that crosses between parts, by the names of the record (reference.py)."""
        device = self.embed(ids)
        seen: dict[str, Floats] = {"embedded": device}
        slots, lengths, counts = [0], [self.length], [len(ids)]
        injections: dict[int, Tensor] = {}
        hidden, tables = torch.empty(0), []
        for stage in walk(self.plan):
            if isinstance(stage, FrontLayers):
                device = self.device_layers(0, stage.stop, device)
            elif isinstance(stage, Entry):
                seen["entry"] = device
                hidden = torch.tensor(device, dtype=self.keys[0].dtype)
                tables = self.graph.tables(slots, lengths, counts, hidden)
                if stage.exchange is not None:
                    seen["injection.-1"] = self.entry_injection(stage.exchange, device)
                    injections[-1] = torch.tensor(seen["injection.-1"], dtype=hidden.dtype)
            elif isinstance(stage, Segment):
                segment, own = self.segments[stage.index], self.plan.cache_of(stage)
                rest = (tables, slots, lengths, counts, self.keys[own], self.values[own])
                if stage.exchange is None:
                    inputs = [injections[index] for index in stage.inputs]
                    # A plan's only segment is a whole step in one call, as the server makes it.
                    whole = len(self.segments) == 1
                    hidden = self.graph(hidden, inputs, *rest[1:]) if whole else segment.through(hidden, inputs, *rest)
                    continue
                u, compressed = segment.open(hidden)
                exchange = self.plan.exchanges[stage.exchange]
                seen[f"compressed.{exchange.index}"] = compressed.float().numpy()
                injection = self.inject(exchange, seen[f"compressed.{exchange.index}"])
                seen[f"injection.{exchange.index}"] = injection
                injections[exchange.index] = torch.tensor(injection, dtype=hidden.dtype)
                hidden = segment(hidden, segment.ahead(u), [injections[index] for index in stage.inputs], *rest)
            elif isinstance(stage, Exit):
                device = seen["exit"] = hidden.float().numpy()
            elif isinstance(stage, BackLayers):
                device = self.device_layers(stage.first, stage.stop, device)
        seen["residual"] = device
        self.length += len(ids)
        return seen


def rope_tables(inv_freq: tuple[float, ...], scaling: float) -> tuple[Floats, Floats]:
    """cos and sin [CACHE_TOKENS, head_dim / 2] of every position (arXiv 2104.09864)."""
    angles = np.arange(CACHE_TOKENS, dtype=np.float32)[:, None] * np.asarray(inv_freq, np.float32)
    return np.cos(angles) * np.float32(scaling), np.sin(angles) * np.float32(scaling)
