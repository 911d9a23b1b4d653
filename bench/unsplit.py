"""The model that is compared with: the same decoder and adapter, unsplit, in TorchScript, same kernels, no network.

Merged into the weights where the plan allows it (the paper's: q, k, v from the layer's own input); else computed in place, every
A, M and B, since no weight can hold it.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora.artifact import ExchangePlan
from plora.artifact.errors import AdapterError, UsageError
from plora.cloud_server.engine import padded_rows
from plora.export.cloud_build import build_cloud_graph
from plora.export.cloud_graph import CloudGraph, RMSNorm
from plora.models.adapter import Adapter, read_adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base, read_base
from plora.models.formula import merge


class Unsplit(nn.Module):
    """Token ids to logits; the layers are the cloud graph of the plan, its exchanges a matrix product each."""

    def __init__(self, graph: CloudGraph, plan: ExchangePlan, blocks: list[Tensor], table: Tensor, head: Tensor, norm: RMSNorm) -> None:
        super().__init__()
        self.graph = graph
        self.blocks = torch.jit.Attribute(blocks, list[Tensor])  # every exchange's cores [I, C]
        self.exchanges = [-1 if segment.exchange is None else segment.exchange for segment in plan.segments]
        self.inputs = torch.jit.Attribute([list(segment.inputs) for segment in plan.segments], list[list[int]])
        self.firsts = [plan.cache_of(segment).start for segment in plan.segments]
        self.stops = [plan.cache_of(segment).stop for segment in plan.segments]
        self.table, self.head, self.norm = table, head, norm
        self.pairs = padded_rows(1) > 1

    def forward(self, ids: Tensor, length: int, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """ids [T], behind `length` cached tokens -> logits [V] after the last."""
        padding = 1 if self.pairs and len(ids) == 1 else 0  # as the server does it
        return self.batch(ids, [length], [len(ids)], padding, [0], keys, values)[0]

    @torch.jit.export
    def batch(
        self,
        ids: Tensor,
        lengths: list[int],
        counts: list[int],
        padding: int,
        slots: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        """ids: of all rows, one behind the other -> logits [rows, V] after each row's last."""
        hidden = F.pad(F.embedding(ids, self.table), [0, 0, 0, padding])
        tables = self.graph.tables(slots, lengths, counts, hidden)
        injections: list[Tensor] = []
        for index, segment in enumerate(self.graph.segments):
            first, stop = self.firsts[index], self.stops[index]
            u, compressed = segment.open(hidden)
            if self.exchanges[index] >= 0:
                injections.append(F.linear(compressed, self.blocks[self.exchanges[index]]))
            inputs = [injections[exchange] for exchange in self.inputs[index]]
            hidden = segment(hidden, segment.ahead(u), inputs, tables, slots, lengths, counts, keys[first:stop], values[first:stop])
        last = torch.tensor(counts).cumsum(0) - 1
        return F.linear(self.norm(hidden[last]), self.head)


class UnsplitModel:
    """Greedy decoding with `base` and `adapter`. merged: whether the adapter is in the weights."""

    def __init__(self, base_path: str, adapter_path: Path, context_tokens: int = 1024, sessions: int = 1) -> None:
        base = read_base(base_path)
        adapter, self.merged = self._adapter(base, read_adapter(adapter_path))
        plan, shape, model = adapter.config.plan, base.shape, base.model
        norm = RMSNorm(model.model.norm.weight.data, shape.epsilon)
        table, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        blocks = [_block(adapter, index) for index in range(len(plan.exchanges))]
        graph = build_cloud_graph(model, shape, adapter)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
            self.module = torch.jit.script(Unsplit(graph, plan, blocks, table, head, norm).eval().requires_grad_(False))
        size = (sessions, shape.kv_heads, context_tokens, shape.head_dim)
        self.keys = [torch.zeros(size) for _ in range(shape.layers)]
        self.values = [torch.zeros(size) for _ in range(shape.layers)]

    @staticmethod
    def _adapter(base: Base, adapter: Adapter) -> tuple[Adapter, bool]:
        """The adapter on a plan without device layers, and whether it is in the base's weights now."""
        try:
            merge(base.model, adapter)
        except AdapterError:
            plan = adapter.config.plan
            if any(source.features for source in plan.sources):
                raise UsageError("the unsplit model of the bench computes linear cores only; this plan has private features") from None
            sources = tuple(dataclasses.replace(source, on_device=False) for source in plan.sources)
            plan = dataclasses.replace(plan, front_layers=0, back_layers=0, sources=sources)
            return dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, plan=plan)), False
        return new_adapter(base, ExchangePlan(base.shape.layers, 0, 0, (), ()), "random", 1.0, 0), True

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, list[float], list[float]]:
        """(tokens, seconds to the first, seconds of each later one, for each the gap between the two best logits)."""
        began = time.perf_counter()
        logits = self.module(torch.tensor(prompt), 0, self.keys, self.values)
        tokens, length, seconds = [int(logits.argmax())], len(prompt), []
        first = time.perf_counter() - began
        gaps = [_gap(logits)]
        for _ in range(count - 1):
            began = time.perf_counter()
            logits = self.module(torch.tensor(tokens[-1:]), length, self.keys, self.values)
            tokens.append(int(logits.argmax()))
            length += 1
            seconds.append(time.perf_counter() - began)
            gaps.append(_gap(logits))
        return tokens, first, seconds, gaps


def _gap(logits: Tensor) -> float:
    best, second = logits.topk(2).values.tolist()
    return best - second


def _block(adapter: Adapter, index: int) -> Tensor:
    exchange = adapter.config.plan.exchanges[index]
    block = torch.zeros(exchange.injection_columns, exchange.compressed_columns)
    for core in exchange.cores:
        block[core.up_start : core.up_stop, core.down_start : core.down_stop] = adapter.cores[core.name]
    return block
