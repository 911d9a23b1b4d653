"""The frozen public part of an adapter, A, B and P: random (the paper), from the SVD of the base weights (LoRA-XS), or with A from
the principal components of u on a little public text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.errors import AdapterError
from ..artifact.names import down_name, expand_name, up_name
from ..artifact.plan import SHARED, Exchange, ExchangePlan
from ..artifact.shape import DecoderShape, check_fits
from .adapter import Adapter, expected_basis, make_adapter
from .calibration import covariances, whitened_directions
from .checkpoint import Base
from .formula import target_projection

BASIS_KINDS = ("random", "svd", "pca")


def random_basis(plan: ExchangePlan, shape: DecoderShape, seed: int) -> dict[str, Tensor]:
    """Gaussian A with variance 1/hidden and B with variance 1/out_rank (PrivateLoRA, arXiv 2311.14030, 3.1: random and
    frozen), so that compressed and injected values keep the scale of u. Same seed, same basis on every machine."""
    generator = torch.Generator().manual_seed(seed)
    shared = {expand_name(exchange.source): exchange for exchange in plan.all_exchanges if exchange.shared}
    return {
        name: random_expansion(shared[name], generator) if name in shared else torch.randn(size, generator=generator) / size[1] ** 0.5
        for name, size in expected_basis(plan, shape).items()
    }


def random_expansion(exchange: Exchange, generator: torch.Generator) -> Tensor:
    """P of a shared injection: every column reads one of the k values, with a random sign; each value is read by I / k columns,
    one more or less. Weight sharing by a random map, as in HashedNets (arXiv 1504.04788): nothing to multiply, next to nothing to keep."""
    columns, values = exchange.up_columns, exchange.injection_columns
    rounds = [torch.randperm(values, generator=generator) for _ in range(-(-columns // values))]
    signs = 2.0 * torch.randint(0, 2, (columns,), generator=generator) - 1
    return torch.stack([torch.cat(rounds)[:columns].float(), signs])


def svd_basis(plan: ExchangePlan, base: Base, seed: int) -> dict[str, Tensor]:
    """A = V_rᵀ and B = U_r Σ_r of the target's weight (LoRA-XS, arXiv 2405.17604); a shared A takes the SVD of the stacked
    weights of its source layer's own targets. P is random.

    Raises AdapterError where a rank exceeds the rank that a weight can have, or a target does not read u.
    """
    basis = random_basis(plan, base.shape, seed)
    layers = base.model.model.layers
    for source in plan.sources:
        targets = {column.target for exchange in plan.all_exchanges if exchange.source == source.layer for column in exchange.columns}
        readers = [target for target in ("q", "k", "v") if target in targets] or ["q", "k", "v"]
        for name, rank in source.ranks:
            if name != SHARED and name not in ("q", "k", "v"):
                raise AdapterError(
                    f"source {source.layer}: no SVD for a down-projection of {name}, whose input is not u; use --basis-kind random"
                )
            weights = [_weight(layers[source.layer], target) for target in (readers if name == SHARED else [name])]
            basis[down_name(source.layer, name)] = _truncated_svd(torch.cat(weights), rank, f"source {source.layer} {name}")[1]
    for column in plan.columns:
        weight = _weight(layers[column.layer], column.target)
        basis[up_name(column.layer, column.target)] = _truncated_svd(weight, column.out_rank, f"layer {column.layer} {column.target}")[0]
    return basis


def pca_basis(plan: ExchangePlan, base: Base, seed: int, calibration: Path | None) -> dict[str, Tensor]:
    """A = Λ^-1/2 Eᵀ: the leading principal directions of u on calibration text, scaled to unit variance; B = the leading left
    singular vectors of the target's weight; P random.

    calibration: a UTF-8 text file; None for the one that comes with plora. Raises MissingFile, DataError if it is too short,
    AdapterError where an out_rank exceeds the rank that a weight can have.
    """
    basis = random_basis(plan, base.shape, seed)
    measured = covariances(base, [source.layer for source in plan.sources], max(r for s in plan.sources for _, r in s.ranks), calibration)
    for source in plan.sources:
        for name, rank in source.ranks:
            basis[down_name(source.layer, name)] = whitened_directions(measured[source.layer], rank, f"source {source.layer}")
    layers = base.model.model.layers
    for column in plan.columns:
        weight = _weight(layers[column.layer], column.target)
        basis[up_name(column.layer, column.target)] = _left_vectors(weight, column.out_rank, f"layer {column.layer} {column.target}")
    return basis


def _weight(layer: Any, target: str) -> Tensor:
    weight = target_projection(layer, target).weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _truncated_svd(weight: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    """(U_r Σ_r `[out, r]`, V_rᵀ `[r, in]`)."""
    _check_rank(weight, rank, where)
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    return (u[:, :rank] * s[:rank]).contiguous(), vt[:rank].contiguous()


def _left_vectors(weight: Tensor, rank: int, where: str) -> Tensor:
    """U_r `[out, r]`, from the eigenvectors of the smaller Gram matrix: no V is needed."""
    _check_rank(weight, rank, where)
    wide = weight.double()
    if weight.shape[0] <= weight.shape[1]:
        return torch.linalg.eigh(wide @ wide.T).eigenvectors.flip(-1)[:, :rank].float().contiguous()
    vectors = wide @ torch.linalg.eigh(wide.T @ wide).eigenvectors.flip(-1)[:, :rank]
    return torch.nn.functional.normalize(vectors, dim=0).float().contiguous()


def _check_rank(weight: Tensor, rank: int, where: str) -> None:
    if rank > min(weight.shape):
        raise AdapterError(f"{where}: rank {rank} exceeds {min(weight.shape)}, the smaller side of a weight {list(weight.shape)}")


def new_adapter(
    base: Base,
    plan: ExchangePlan,
    kind: str,
    scale: float,
    seed: int,
    calibration: Path | None = None,
    features_seed: int | None = None,
) -> Adapter:
    """An adapter with a fresh basis of `kind` and cores of zero. calibration: text for "pca"; None for plora's own; features_seed: of F,
    for tests and studies alone (features.py)."""
    if kind not in BASIS_KINDS:
        raise AdapterError(f"basis {kind!r}; supported: {', '.join(BASIS_KINDS)}")
    check_fits(plan, base.shape)
    if not plan.sources or kind == "random":
        basis = random_basis(plan, base.shape, seed)
    else:
        basis = svd_basis(plan, base, seed) if kind == "svd" else pca_basis(plan, base, seed, calibration)
    places = {expand_name(exchange.source) for exchange in plan.all_exchanges if exchange.shared}
    basis = {name: tensor if name in places else rounded(tensor) for name, tensor in basis.items()}
    return make_adapter(plan, base.shape, basis, scale, kind, seed, base.fingerprint, base.name, features_seed)


def rounded(tensor: Tensor) -> Tensor:
    """To values that 16 bits hold, so that the file is half: a basis is frozen, so rounding it once, before tuning, costs nothing.
    As it is where 16 bits do not reach."""
    narrow = tensor.half()
    return narrow.float() if torch.isfinite(narrow).all() else tensor
