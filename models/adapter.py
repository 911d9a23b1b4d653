"""The PrivateLoRA adapter: its tensors and its files. Its formula is in formula.py.

Basis (A, B, s, plan) and cores (M) live in files of their own, so that many personas share one basis.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..artifact.errors import AdapterError, DamagedFile, MissingFile, WrongPair
from ..artifact.folders import new_file, new_folder
from ..artifact.hashes import hash_tensors
from ..artifact.manifest import read_json, write_json
from ..artifact.names import ADAPTER_CONFIG, BASIS, CORES, CORES_FORMAT, down_name, expand_name, up_name
from ..artifact.plan import Exchange, ExchangePlan
from ..artifact.shape import DecoderShape, check_fits
from ..artifact.strict import canonical_json, decode
from .checkpoint import fp32_bytes
from .features import start_features

ADAPTER_FORMAT = "plora-adapter"
ADAPTER_VERSION = 2
"""2: plans may share an injection."""
BASIS_ORIGINS = ("random", "svd", "pca", "imported")


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`. basis: hash of plan, scale, A, B and P; base: fingerprint of the model it was made for, or ""
    if unknown (imported checkpoints); basis_kind: random, svd, pca or imported."""

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
    """Tensors by file name: basis holds each A `[rank, hidden]`, B `[out, out_rank]` and, where an injection is shared, P as `[2, I]`
    (expansion); cores each M `[out_rank, rank]` and, of a source with private features, F `[n, C]` and f `[n]`; all fp32 on the CPU."""

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
    for exchange in plan.all_exchanges:
        if exchange.shared:
            shapes[expand_name(exchange.source)] = (2, exchange.up_columns)
    return shapes


def hash_basis(plan: ExchangePlan, scale: float, basis: dict[str, Tensor]) -> str:
    """SHA-256 of plan, scale and tensors: what every persona on this basis shares."""
    named = ((name, tuple(basis[name].shape), fp32_bytes(basis[name])) for name in sorted(basis))
    return hash_tensors(named, salt=canonical_json({"plan": plan, "scale": scale}))


def make_adapter(
    plan: ExchangePlan,
    shape: DecoderShape,
    basis: dict[str, Tensor],
    scale: float,
    kind: str,
    seed: int,
    base: str,
    base_name: str,
    features_seed: int | None = None,
) -> Adapter:
    """An adapter with cores of zero. features_seed: of F, for tests and studies alone (features.py).

    Raises AdapterError or PlanError where tensors, plan and shape do not fit.
    """
    check_fits(plan, shape)
    check_shapes(basis, expected_basis(plan, shape), "basis")
    check_expansions(basis, plan, "basis")
    config = AdapterConfig(ADAPTER_FORMAT, ADAPTER_VERSION, plan, scale, kind, seed, hash_basis(plan, scale, basis), base, base_name)
    cores = {name: torch.zeros(size) for name, size in plan.trained.items()}
    return Adapter(config, basis, cores | start_features(plan, features_seed))


def check_shapes(tensors: dict[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str) -> None:
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


def expansion(basis: dict[str, Tensor], exchange: Exchange) -> tuple[Tensor, Tensor]:
    """P of a shared injection: column i of the I is sign[i] · value[place[i]]. (place int64 `[I]`, sign `[I]`)."""
    places, signs = basis[expand_name(exchange.source)]
    return places.long(), signs


def check_expansions(basis: dict[str, Tensor], plan: ExchangePlan, what: str) -> None:
    """Raises AdapterError for a place that is none of an injection's values. Shapes are checked already."""
    for exchange in plan.all_exchanges:
        if exchange.shared:
            places = basis[expand_name(exchange.source)][0]
            if not torch.equal(places, places.round()) or places.min() < 0 or places.max() >= exchange.injection_columns:
                raise AdapterError(
                    f"{what}: tensor {expand_name(exchange.source)} names values {places.min():g} to {places.max():g}, expected whole "
                    f"numbers from 0 to {exchange.injection_columns - 1}"
                )


def check_base(adapter: Adapter, fingerprint: str, base_name: str) -> None:
    """Raises WrongPair if the adapter was made for another base."""
    if adapter.config.base and adapter.config.base != fingerprint:
        raise WrongPair(
            f"the adapter was made for {adapter.config.base_name} (fingerprint {adapter.config.base[:16]}…), but {base_name} has "
            f"{fingerprint[:16]}…; pass the base that it was tuned on"
        )


def write_adapter(
    adapter: Adapter, out: Path, replace_existing: bool = False, private: dict[str, str] | None = None, public: dict[str, str] | None = None
) -> None:
    """Writes the three files into a new folder, and texts by file name: private ones for their owner alone, as the cores are.

    Raises UsageError if it exists.
    """
    with new_folder(out, replace_existing) as folder:
        for name, text in (private or {}).items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_text(text, encoding="utf-8")
        for name, text in (public or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        write_json(folder / ADAPTER_CONFIG, adapter.config)
        (folder / BASIS).write_bytes(save({name: _narrow(tensor).contiguous() for name, tensor in adapter.basis.items()}))
        write_cores(adapter, folder / CORES)


def _narrow(tensor: Tensor) -> Tensor:
    """In half the bytes where that loses nothing."""
    narrow = tensor.half()
    return narrow if torch.equal(narrow.float(), tensor) else tensor


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


def read_config(path: Path) -> AdapterConfig:
    """`adapter_config.json`. Raises MissingFile, DamagedFile, ManifestError, PlanError, AdapterError."""
    value = read_json(path)
    if isinstance(value, dict) and (value.get("format"), value.get("version")) != (ADAPTER_FORMAT, ADAPTER_VERSION):
        raise AdapterError(
            f"{path}: format {value.get('format')} {value.get('version')}, expected {ADAPTER_FORMAT} {ADAPTER_VERSION}; tune it again"
        )
    config = decode(AdapterConfig, value, str(path))
    if config.basis_kind not in BASIS_ORIGINS:
        raise AdapterError(f"{path}: basis_kind {config.basis_kind!r}, expected one of {', '.join(BASIS_ORIGINS)}")
    return config


def read_adapter(folder: Path) -> Adapter:
    """Reads and checks the three files. Raises MissingFile, DamagedFile, ManifestError, AdapterError, WrongPair."""
    where = folder / ADAPTER_CONFIG
    config = read_config(where)
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
    check_shapes(cores, config.plan.trained, str(path))
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


def replace_cores(adapter: Adapter, cores: dict[str, Tensor]) -> Adapter:
    return replace(adapter, cores=cores)
