"""The adapter's formula on a frozen base: what tuning trains, and what both halves together must equal.

    y_t = W_t x_t + s · B_t M_t A u          M_t = P_t M where one core M is shared (plan: shared_injection)
    y_t = W_t x_t + s · B_t M_t φ            φ = silu(F A u + f), of a source with private features (plan: features)

PrivateLoRA, arXiv 2311.14030, section 3; source layers, shared injections and features: docs/exchange-plans.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact.errors import AdapterError
from ..artifact.names import core_name, down_name, expand_name, features_bias_name, features_weight_name, shared_core_name, up_name
from ..artifact.plan import Column, Exchange, Source
from ..artifact.shape import check_fits
from .adapter import Adapter, expansion, replace_cores
from .checkpoint import decoder_shape
from .features import features_of


class Cores(nn.Module):
    """The adapter's formula, hooked into a transformers model: the unsplit oracle, and what tuning trains.

    u is captured at each source layer's input RMSNorm; each target projection's output gains s · B M A u. A, B and P are buffers,
    so that they go where the model goes. compressed, read: A u, and what the cores read of it, by source and down-projection.
    """

    def __init__(self, model: Any, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = adapter.config.plan
        self.scale = adapter.config.scale
        device = next(model.parameters()).device
        self.cores = nn.ParameterDict({_key(name): nn.Parameter(core.to(device, dtype)) for name, core in adapter.cores.items()})
        frozen = dict(adapter.basis)
        for exchange in self.plan.all_exchanges:
            if exchange.shared:
                places, signs = expansion(frozen, exchange)
                del frozen[expand_name(exchange.source)]  # places are integers, no numbers to be rounded
                self.register_buffer(f"places_{exchange.source}", places.to(device), persistent=False)
                self.register_buffer(f"signs_{exchange.source}", signs.to(device, dtype), persistent=False)
        for name, tensor in frozen.items():
            self.register_buffer(_key(name), tensor.to(device, dtype), persistent=False)
        self.compressed: dict[tuple[int, str], Tensor] = {}
        self.read: dict[tuple[int, str], Tensor] = {}
        self.expanded: dict[int, Tensor] = {}
        self.handles: list[Any] = []
        layers = model.model.layers
        for exchange in self.plan.all_exchanges:
            norm = layers[exchange.source].input_layernorm
            self.handles.append(norm.register_forward_hook(self._capture(self.plan.source(exchange.source), exchange)))
            for column in exchange.columns:
                projection = target_projection(layers[column.layer], column.target)
                self.handles.append(projection.register_forward_hook(self._inject(exchange, column)))

    def frozen(self, name: str) -> Tensor:
        """A or B by its name in the basis."""
        return self.get_buffer(_key(name))

    def core(self, name: str) -> Tensor:
        """Any trained tensor by its name in cores.safetensors."""
        return self.cores[_key(name)]

    def _capture(self, source: Source, exchange: Exchange) -> Any:
        def hook(module: nn.Module, inputs: Any, u: Tensor) -> None:
            for name, _ in source.ranks:
                compressed = nn.functional.linear(u, self.frozen(down_name(source.layer, name)))
                self.compressed[source.layer, name] = compressed
                self.read[source.layer, name] = self.features(source.layer, compressed) if source.features else compressed
            if exchange.shared:
                places, signs = self.get_buffer(f"places_{source.layer}"), self.get_buffer(f"signs_{source.layer}")
                self.expanded[source.layer] = self.injection(exchange).index_select(-1, places) * signs

        return hook

    def features(self, source: int, compressed: Tensor) -> Tensor:
        """φ of a source that has features: compressed `[…, C]` -> `[…, n]`."""
        return features_of(compressed, self.core(features_weight_name(source)), self.core(features_bias_name(source)))

    def _inject(self, exchange: Exchange, column: Column) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            if exchange.shared:
                injection = self.expanded[exchange.source][..., column.start : column.stop]
            else:
                core = self.core(core_name(column.layer, column.target))
                injection = nn.functional.linear(self.read[exchange.source, column.down], core)
            return output + self.scale * nn.functional.linear(injection, self.frozen(up_name(column.layer, column.target)))

        return hook

    def injection(self, exchange: Exchange) -> Tensor:
        """What the device returns in the step that ran last: `[..., injection_columns]`."""
        if exchange.shared:
            (core,) = exchange.cores
            (down,) = (name for name, _ in self.plan.source(exchange.source).ranks)
            return nn.functional.linear(self.read[exchange.source, down], self.core(core.name))
        parts = [
            nn.functional.linear(self.read[exchange.source, column.down], self.core(core_name(column.layer, column.target)))
            for column in exchange.columns
        ]
        return torch.cat(parts, -1)

    def tuned(self, adapter: Adapter) -> Adapter:
        """`adapter` with the cores as they stand now."""
        return replace_cores(adapter, {name: self.core(name).detach().float().cpu().clone() for name in adapter.cores})

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _key(name: str) -> str:
    """A tensor's name as torch takes it for a module's member."""
    return name.replace(".", "_")


def effective_core(adapter: Adapter, exchange: Exchange, column: Column) -> Tensor:
    """M_t `[out_rank, rank]` of one target, whether its injection is shared or not; `[out_rank, n]` if its source has features."""
    if exchange.shared:
        places, signs = (each[column.start : column.stop] for each in expansion(adapter.basis, exchange))
        return adapter.cores[shared_core_name(exchange.source)][places] * signs[:, None]
    return adapter.cores[core_name(column.layer, column.target)]


def target_projection(layer: Any, target: str) -> nn.Module:
    """The linear module of a transformers decoder layer that a target names."""
    owner = layer.self_attn if target in ("q", "k", "v", "o") else layer.mlp
    return getattr(owner, f"{target}_proj")


@contextmanager
def adapted(model: Any, adapter: Adapter, dtype: torch.dtype | None = None) -> Iterator[Cores]:
    """`model` computes with `adapter` inside the block: the oracle. dtype: of u; None for that of the weights."""
    check_fits(adapter.config.plan, decoder_shape(model))
    cores = Cores(model, adapter, dtype or next(model.parameters()).dtype)
    try:
        yield cores
    finally:
        cores.remove()


@torch.no_grad()
def merge(model: Any, adapter: Adapter) -> None:
    """Adds s · B M A to the weights in place: only where a target's own input is u (source = own layer; q, k or v).

    Raises AdapterError for any other column, and for private features, before anything is changed: no weight of the base can hold it.
    """
    columns = [(exchange, column) for exchange in adapter.config.plan.all_exchanges for column in exchange.columns]
    for exchange, column in columns:
        if exchange.features:
            raise AdapterError(
                f"source {exchange.source} has {exchange.features} private features, which are not linear: cannot be merged into a weight"
            )
        if column.layer != exchange.source or column.target not in ("q", "k", "v"):
            raise AdapterError(f"layer {column.layer}, target {column.target}, source {exchange.source}: cannot be merged into a weight")
    for exchange, column in columns:
        down = adapter.basis[down_name(exchange.source, column.down)]
        up = adapter.basis[up_name(column.layer, column.target)]
        weight = target_projection(model.model.layers[column.layer], column.target).weight
        assert isinstance(weight, Tensor)
        weight += (adapter.config.scale * (up @ effective_core(adapter, exchange, column) @ down)).to(weight.dtype)
