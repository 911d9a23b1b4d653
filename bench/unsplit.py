"""The model that is compared with: the same decoder, unsplit, in TorchScript, weights merged, same kernels, no network."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora.artifact import ExchangePlan
from plora.export.cloud_graph import CloudGraph, RMSNorm, build_cloud_graph
from plora.models.adapter import merge, read_adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import read_base


class Unsplit(nn.Module):
    """Token ids to logits; the layers are the cloud graph of a plan without exchanges, that is, one segment."""

    def __init__(self, graph: CloudGraph, table: Tensor, head: Tensor, norm: RMSNorm) -> None:
        super().__init__()
        self.graph = graph
        self.segment = graph.segments[0]
        self.table, self.head, self.norm = table, head, norm

    def forward(self, ids: Tensor, length: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """ids [T], length [1] -> logits [V] after the last."""
        hidden = F.embedding(ids, self.table)[None]
        slot = torch.zeros_like(length)
        tables = self.graph.tables(length, torch.full_like(length, ids.shape[0]), slot, hidden)
        u, _ = self.segment.open(hidden)
        no_injections: list[Tensor] = []
        hidden = self.segment(hidden, self.segment.ahead(u), no_injections, tables, slot, length, keys, values)
        return F.linear(self.norm(hidden[:, -1]), self.head)[0]


class UnsplitModel:
    """Greedy decoding with `base` and `adapter` merged."""

    def __init__(self, base_path: str, adapter_path: Path, context_tokens: int = 1024) -> None:
        base = read_base(base_path)
        merge(base.model, read_adapter(adapter_path))
        shape, model = base.shape, base.model
        norm = RMSNorm(model.model.norm.weight.data, shape.epsilon)
        table, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
        plan = ExchangePlan(shape.layers, 0, 0, (), ())
        graph = build_cloud_graph(model, shape, new_adapter(base, plan, "random", 1.0, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit", DeprecationWarning)
            self.module = torch.jit.script(Unsplit(graph, table, head, norm).eval().requires_grad_(False))
        size = (1, shape.kv_heads, context_tokens, shape.head_dim)
        self.keys = [torch.zeros(size) for _ in range(shape.layers)]
        self.values = [torch.zeros(size) for _ in range(shape.layers)]

    @torch.inference_mode()
    def generate(self, prompt: list[int], count: int) -> tuple[list[int], float, list[float]]:
        """(tokens, seconds to the first, seconds of each later one)."""
        began = time.perf_counter()
        logits = self.module(torch.tensor(prompt), torch.tensor([0]), self.keys, self.values)
        tokens, length, seconds = [int(logits.argmax())], len(prompt), []
        first = time.perf_counter() - began
        for _ in range(count - 1):
            began = time.perf_counter()
            logits = self.module(torch.tensor(tokens[-1:]), torch.tensor([length]), self.keys, self.values)
            tokens.append(int(logits.argmax()))
            length += 1
            seconds.append(time.perf_counter() - began)
        return tokens, first, seconds
