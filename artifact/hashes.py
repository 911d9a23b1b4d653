"""Hashes that bind the halves together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .errors import DamagedFile, MissingFile
from .plan import ExchangePlan
from .shape import DecoderShape
from .strict import canonical_json

PROTOCOL_MAJOR = 1
"""Major version of the wire (protocol/plora.proto). Peers of different majors refuse each other."""

EXIT_CONVENTION = "residual_before_final_norm"
"""What the exit is; part of the contract, so that a later convention cannot be mistaken for this one."""

READ_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Contract:
    """Everything that must be equal on both sides for their tensors to mean the same (design, part 4)."""

    protocol_major: int
    plan: ExchangePlan
    shape: DecoderShape
    basis: str
    base: str
    exit: str

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON, as 64 hex digits."""
        return hashlib.sha256(canonical_json(self)).hexdigest()


def hash_tensors(named: Iterable[tuple[str, tuple[int, ...], bytes | memoryview]], salt: bytes = b"") -> str:
    """SHA-256 over (name, shape, little-endian fp32 bytes) in the order given, after `salt`; 64 hex digits."""
    digest = hashlib.sha256(salt)
    for name, shape, data in named:
        digest.update(canonical_json([name, list(shape)]))
        digest.update(data)
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes; 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of an artifact."""

    bytes: int
    sha256: str


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    return {name: FileRecord((folder / name).stat().st_size, hash_file(folder / name)) for name in sorted(names)}


def check_file(path: Path, record: FileRecord) -> None:
    """Raises MissingFile or DamagedFile unless `path` is exactly what `record` says."""
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise DamagedFile(f"{path}: got {size} bytes, expected {record.bytes}; copy or export it again")
        digest = hash_file(path)
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found, though the manifest lists it; copy or export it again") from None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}") from None
    if digest != record.sha256:
        raise DamagedFile(f"{path}: SHA-256 is {digest[:16]}…, expected {record.sha256[:16]}…; copy or export it again")
