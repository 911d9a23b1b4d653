"""The manifests of the two halves: versioned, strict, hashed. An artifact folder is the only bridge from export to run time."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .errors import DamagedFile, ManifestError, MissingFile
from .hashes import Contract, FileRecord, check_file
from .shape import DTYPE_BYTES, check_fits
from .strict import decode, plain

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20
"""A manifest of a 1,000-layer model with all targets is under 1 MiB; more is not a manifest."""

PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
"""No folder, no hidden file, nothing that a file system or shell reads in its own way."""


@dataclass(frozen=True)
class CloudManifest:
    """`out/cloud/manifest.json`. dtype: of the weights and the KV cache."""

    format: str
    version: int
    made_by: str
    contract_hash: str
    contract: Contract
    dtype: str
    files: dict[str, FileRecord]


@dataclass(frozen=True)
class EdgeManifest:
    """`out/edge/manifest.json`. dtype: of the table(s) and the device's layers; tied: embedding and head are one table."""

    format: str
    version: int
    made_by: str
    contract_hash: str
    contract: Contract
    dtype: str
    tied: bool
    files: dict[str, FileRecord]


Manifest = TypeVar("Manifest", CloudManifest, EdgeManifest)
FORMATS: dict[type, str] = {CloudManifest: "plora-cloud", EdgeManifest: "plora-edge"}
VERSIONS: dict[type, int] = {CloudManifest: 3, EdgeManifest: 2}
"""Of each half: a cloud half that is exported again serves the edge bundles that are out already, if the contract is the same."""


def read_json(path: Path) -> Any:
    """Parsed JSON of a small file. Raises MissingFile or DamagedFile."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DamagedFile(f"{path}: {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found; is {path.parent} the folder that you meant?") from None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number of thousands of digits
        raise DamagedFile(f"{path}: not valid JSON: {error}") from None


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(plain(value), indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(cls: type[Manifest], folder: Path) -> Manifest:
    """The manifest of `folder`, its contract checked; the files are not touched.

    Raises MissingFile, DamagedFile, ManifestError, PlanError.
    """
    path = folder / MANIFEST
    value = read_json(path)
    where = str(path)
    if isinstance(value, dict):  # format and version first: they explain every other difference
        if value.get("format") != FORMATS[cls]:
            raise ManifestError(f"{where}.format: got {value.get('format')!r}, expected {FORMATS[cls]!r}")
        if value.get("version") != VERSIONS[cls]:
            raise ManifestError(f"{where}.version: got {value.get('version')!r}, this plora reads {VERSIONS[cls]}; export again")
    manifest = decode(cls, value, where)
    if manifest.dtype not in DTYPE_BYTES:
        raise ManifestError(f"{where}.dtype: got {manifest.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}")
    check_fits(manifest.contract.plan, manifest.contract.shape)
    if manifest.contract.hash != manifest.contract_hash:
        raise ManifestError(
            f"{where}.contract_hash: got {manifest.contract_hash[:16]}…, but the contract hashes to "
            f"{manifest.contract.hash[:16]}…: the manifest was edited; export again"
        )
    for name in manifest.files:
        if not PLAIN_FILE_NAME.fullmatch(name):
            raise ManifestError(f"{where}.files.{name!r}: not a plain file name")
    return manifest


def check_files(folder: Path, manifest: CloudManifest | EdgeManifest, only: frozenset[str] | None = None) -> None:
    """Raises MissingFile or DamagedFile for the first listed file (of `only`) that is not as recorded."""
    for name, record in manifest.files.items():
        if only is None or name in only:
            check_file(folder / name, record)


def require_file(manifest: CloudManifest | EdgeManifest, folder: Path, name: str) -> Path:
    if name not in manifest.files:
        raise ManifestError(f"{folder / MANIFEST}.files: {name} is not listed; export again")
    return folder / name
