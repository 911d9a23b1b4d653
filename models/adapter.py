"""The PrivateLoRA adapter: its tensors, its files, and its formula on a frozen base.

    y_t = W_t x_t + s · B_t M_t A u

Basis (A, B, s, plan) and cores (M) live in files of their own, so that many personas share one basis.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from ..artifact.errors import AdapterError, DamagedFile, MissingFile, WrongPair
from ..artifact.folders import new_file, new_folder
from ..artifact.hashes import hash_tensors
from ..artifact.manifest import read_json, write_json
from ..artifact.names import ADAPTER_CONFIG, BASIS, CORES, CORES_FORMAT, core_name, down_name, up_name
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape, check_fits
from ..artifact.strict import canonical_json, decode
from .checkpoint import decoder_shape, fp32_bytes


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`. basis: hash of plan, scale, A and B; base: fingerprint of the model it was made for, or ""
    if unknown (imported checkpoints); basis_kind: random, svd or imported."""

    format: str
    version: int
    plan: ExchangePlan
    scale: float
    basis_kind: str
    seed: int
    basis: str
    base: str
    base_name: str


@dataclass
class Adapter:
    """Tensors by file name: basis holds each A `[rank, hidden]` and B `[out, out_rank]`, cores each M `[out_rank, rank]`;
    all fp32 on the CPU."""

    config: AdapterConfig
    basis: dict[str, Tensor]
    cores: dict[str, Tensor]


def expected_basis(plan: ExchangePlan, shape: DecoderShape) -> dict[str, tuple[int, int]]:
    """Name -> shape of every basis tensor of `plan`."""
    shapes: dict[str, tuple[int, int]] = {}
    for source in plan.sources:
        for name, rank in source.ranks:
            shapes[down_name(source.layer, name)] = (rank, shape.hidden)
    for adapted in plan.adapted:
        for target, out_rank in adapted.out_ranks:
            shapes[up_name(adapted.layer, target)] = (shape.out_features(target), out_rank)
    return shapes


def expected_cores(plan: ExchangePlan) -> dict[str, tuple[int, int]]:
    """Name -> shape of every core of `plan`."""
    return {core_name(column.layer, column.target): (column.out_rank, column.rank) for column in plan.columns}


def hash_basis(plan: ExchangePlan, scale: float, basis: dict[str, Tensor]) -> str:
    """SHA-256 of plan, scale and tensors: what every persona on this basis shares."""
    named = ((name, tuple(basis[name].shape), fp32_bytes(basis[name])) for name in sorted(basis))
    return hash_tensors(named, salt=canonical_json({"plan": plan, "scale": scale}))


def make_adapter(
    plan: ExchangePlan, shape: DecoderShape, basis: dict[str, Tensor], scale: float, kind: str, seed: int, base: str, base_name: str
) -> Adapter:
    """An adapter with cores of zero. Raises AdapterError or PlanError where tensors, plan and shape do not fit."""
    check_fits(plan, shape)
    check_shapes(basis, expected_basis(plan, shape), "basis")
    config = AdapterConfig("plora-adapter", 1, plan, scale, kind, seed, hash_basis(plan, scale, basis), base, base_name)
    cores = {name: torch.zeros(size) for name, size in expected_cores(plan).items()}
    return Adapter(config, basis, cores)


def check_shapes(tensors: dict[str, Tensor], expected: dict[str, tuple[int, int]], what: str) -> None:
    """Raises AdapterError for the first tensor that is missing, unknown, of a wrong shape or not finite."""
    for name in tensors:
        if name not in expected:
            raise AdapterError(f"{what}: unknown tensor {name}; the plan has {len(expected)} tensors")
    for name, size in expected.items():
        if name not in tensors:
            raise AdapterError(f"{what}: tensor {name} is missing, expected shape {list(size)}")
        if tuple(tensors[name].shape) != size:
            raise AdapterError(f"{what}: tensor {name} has shape {list(tensors[name].shape)}, expected {list(size)}")
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(f"{what}: tensor {name} has values that are not finite")


def check_base(adapter: Adapter, fingerprint: str, base_name: str) -> None:
    """Raises WrongPair if the adapter was made for another base."""
    if adapter.config.base and adapter.config.base != fingerprint:
        raise WrongPair(
            f"the adapter was made for {adapter.config.base_name} (fingerprint {adapter.config.base[:16]}…), but {base_name} has "
            f"{fingerprint[:16]}…; pass the base that it was tuned on"
        )


def write_adapter(adapter: Adapter, out: Path, replace_existing: bool = False, notes: dict[str, str] | None = None) -> None:
    """Writes the three files, and private text `notes` by file name, into a new folder. Raises UsageError if it exists."""
    with new_folder(out, replace_existing) as folder:
        for name, text in (notes or {}).items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text, encoding="utf-8")
        write_json(folder / ADAPTER_CONFIG, adapter.config)
        save_file({name: tensor.contiguous() for name, tensor in adapter.basis.items()}, folder / BASIS)
        write_cores(adapter, folder / CORES)


def write_cores(adapter: Adapter, path: Path) -> None:
    """The private half of an adapter as one file that names the basis it belongs to."""
    metadata = {"format": CORES_FORMAT, "basis": adapter.config.basis}
    with new_file(path) as temporary:
        temporary.touch(0o600)  # private: for its owner alone
        temporary.write_bytes(sorted_header(save({name: tensor.contiguous() for name, tensor in adapter.cores.items()}, metadata)))


def sorted_header(file: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes them as a hash map that it seeds in every process."""
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    return file[:8] + json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size) + file[8 + size :]


def read_adapter(folder: Path) -> Adapter:
    """Reads and checks the three files. Raises MissingFile, DamagedFile, ManifestError, AdapterError, WrongPair."""
    where = folder / ADAPTER_CONFIG
    config = decode(AdapterConfig, read_json(where), str(where))
    if (config.format, config.version) != ("plora-adapter", 1):
        raise AdapterError(f"{where}: format {config.format} {config.version}, expected plora-adapter 1")
    basis, _ = read_tensors(folder / BASIS)
    if (found := hash_basis(config.plan, config.scale, basis)) != config.basis:
        raise DamagedFile(f"{folder / BASIS}: basis hash is {found[:16]}…, {ADAPTER_CONFIG} says {config.basis[:16]}…; copy it again")
    return Adapter(config, basis, read_cores(folder / CORES, config))


def read_cores(path: Path, config: AdapterConfig) -> dict[str, Tensor]:
    """Cores that belong to the basis of `config`. Raises WrongPair for another basis."""
    cores, metadata = read_tensors(path)
    if metadata.get("format") != CORES_FORMAT:
        raise AdapterError(f"{path}: format {metadata.get('format')!r}, expected {CORES_FORMAT!r}")
    if metadata.get("basis") != config.basis:
        raise WrongPair(f"{path}: cores for basis {str(metadata.get('basis'))[:16]}…, but this basis is {config.basis[:16]}…")
    check_shapes(cores, expected_cores(config.plan), str(path))
    return cores


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (as fp32) and metadata of a safetensors file. Raises MissingFile, DamagedFile."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).float() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found") from None
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file: {error}") from None


class Cores(nn.Module):
    """The adapter's formula, hooked into a transformers model: the unsplit oracle, and what tuning trains.

    u is captured at each source layer's input RMSNorm; each target projection's output gains s · B M A u.
    """

    def __init__(self, model: Any, adapter: Adapter, dtype: torch.dtype) -> None:
        super().__init__()
        self.plan = adapter.config.plan
        self.scale = adapter.config.scale
        self.names = {name: name.replace(".", "_") for name in adapter.cores}
        self.cores = nn.ParameterDict({self.names[name]: nn.Parameter(core.to(dtype)) for name, core in adapter.cores.items()})
        device = next(model.parameters()).device
        self.basis = {name: tensor.to(device, dtype) for name, tensor in adapter.basis.items()}
        self.compressed: dict[tuple[int, str], Tensor] = {}
        self.handles: list[Any] = []
        layers = model.model.layers
        for source in self.plan.sources:
            self.handles.append(layers[source.layer].input_layernorm.register_forward_hook(self._capture(source)))
        for exchange in self.plan.all_exchanges:
            for column in exchange.columns:
                projection = target_projection(layers[column.layer], column.target)
                self.handles.append(projection.register_forward_hook(self._inject(exchange.source, column)))

    def _capture(self, source: Any) -> Any:
        downs = [(name, self.basis[down_name(source.layer, name)]) for name, _ in source.ranks]

        def hook(module: nn.Module, inputs: Any, u: Tensor) -> None:
            for name, down in downs:
                self.compressed[source.layer, name] = nn.functional.linear(u, down)

        return hook

    def _inject(self, source: int, column: Any) -> Any:
        up = self.basis[up_name(column.layer, column.target)]
        name = self.names[core_name(column.layer, column.target)]

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            injection = nn.functional.linear(self.compressed[source, column.down], self.cores[name])
            return output + self.scale * nn.functional.linear(injection, up)

        return hook

    def tuned(self, adapter: Adapter) -> Adapter:
        """`adapter` with the cores as they stand now."""
        cores = {name: self.cores[key].detach().float().cpu().clone() for name, key in self.names.items()}
        return replace_cores(adapter, cores)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def replace_cores(adapter: Adapter, cores: dict[str, Tensor]) -> Adapter:
    return replace(adapter, cores=cores)


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

    Raises AdapterError for any other column: no weight of the base can hold it.
    """
    for exchange in adapter.config.plan.exchanges:
        for column in exchange.columns:
            if column.layer != exchange.source or column.target not in ("q", "k", "v"):
                raise AdapterError(
                    f"layer {column.layer}, target {column.target}, source {exchange.source}: cannot be merged into a weight"
                )
            down = adapter.basis[down_name(exchange.source, column.down)]
            up = adapter.basis[up_name(column.layer, column.target)]
            core = adapter.cores[core_name(column.layer, column.target)]
            weight = target_projection(model.model.layers[column.layer], column.target).weight
            assert isinstance(weight, Tensor)
            weight += (adapter.config.scale * (up @ core @ down)).to(weight.dtype)
