"""The frozen public halves A and B of an adapter: random (the paper) or from the SVD of the base weights (LoRA-XS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..artifact.errors import AdapterError
from ..artifact.names import down_name, up_name
from ..artifact.plan import SHARED, ExchangePlan
from ..artifact.shape import DecoderShape
from .adapter import Adapter, expected_basis, make_adapter, target_projection
from .checkpoint import Base

BASIS_KINDS = ("random", "svd")


def random_basis(plan: ExchangePlan, shape: DecoderShape, seed: int) -> dict[str, Tensor]:
    """Gaussian A with variance 1/hidden and B with variance 1/out_rank (PrivateLoRA, arXiv 2311.14030, 3.1: random and
    frozen), so that compressed and injected values keep the scale of u. Same seed, same basis on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, generator=generator) / size[1] ** 0.5 for name, size in expected_basis(plan, shape).items()}


def svd_basis(plan: ExchangePlan, base: Base) -> dict[str, Tensor]:
    """A = V_rᵀ and B = U_r Σ_r of the target's weight (LoRA-XS, arXiv 2405.17604); a shared A takes the SVD of the stacked
    weights of its source layer's own targets.

    Raises AdapterError where a rank exceeds the rank that a weight can have, or a target does not read u.
    """
    basis: dict[str, Tensor] = {}
    layers = base.model.model.layers
    for source in plan.sources:
        targets = {column.target for exchange in plan.exchanges if exchange.source == source.layer for column in exchange.columns}
        readers = [target for target in ("q", "k", "v") if target in targets] or ["q", "k", "v"]
        for name, rank in source.ranks:
            if name != SHARED and name not in ("q", "k", "v"):
                raise AdapterError(
                    f"source {source.layer}: no SVD for a down-projection of {name}, whose input is not u; use --basis-kind random"
                )
            weights = [_weight(layers[source.layer], target) for target in (readers if name == SHARED else [name])]
            basis[down_name(source.layer, name)] = _truncated_svd(torch.cat(weights), rank, f"source {source.layer} {name}")[1]
    for adapted in plan.adapted:
        for target, out_rank in adapted.out_ranks:
            weight = _weight(layers[adapted.layer], target)
            basis[up_name(adapted.layer, target)] = _truncated_svd(weight, out_rank, f"layer {adapted.layer} {target}")[0]
    return basis


def _weight(layer: Any, target: str) -> Tensor:
    weight = target_projection(layer, target).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _truncated_svd(weight: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    """(U_r Σ_r `[out, r]`, V_rᵀ `[r, in]`)."""
    if rank > min(weight.shape):
        raise AdapterError(f"{where}: rank {rank} exceeds {min(weight.shape)}, the smaller side of a weight {list(weight.shape)}")
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vt[:rank].contiguous()


def new_adapter(base: Base, plan: ExchangePlan, kind: str, scale: float, seed: int) -> Adapter:
    """An adapter with a fresh basis of `kind` and cores of zero."""
    if kind not in BASIS_KINDS:
        raise AdapterError(f"basis {kind!r}; supported: {', '.join(BASIS_KINDS)}")
    basis = random_basis(plan, base.shape, seed) if kind == "random" else svd_basis(plan, base)
    return make_adapter(plan, base.shape, basis, scale, kind, seed, base.fingerprint, base.name)
