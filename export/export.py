"""From a checkpoint and an adapter to a verified artifact folder: `cloud/`, `edge/`, and `verification/` beside them."""

from __future__ import annotations

import gc
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..artifact.errors import UsageError
from ..artifact.folders import check_new, new_folder
from ..artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract, record_files
from ..artifact.manifest import FORMAT_VERSION, FORMATS, MANIFEST, CloudManifest, EdgeManifest, write_json
from ..artifact.names import CLOUD_GRAPH
from ..artifact.plan import require_runnable
from ..artifact.shape import DecoderShape, check_fits
from ..models.adapter import Adapter, check_base, check_shapes, expected_basis, read_adapter
from ..models.authors import read_authors_checkpoint
from ..models.checkpoint import Base, is_tied, read_base, read_tokenizer
from ..protocol.limits import step_tokens
from .cloud_file import write_cloud_graph
from .cloud_graph import build_cloud_graph
from .edge_files import TABLE_DTYPES, write_edge
from .reference import REFERENCE, record_reference
from .verify import verify_in_process, write_report

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STAGES = ("read the checkpoint", "record the unsplit model", "write the edge half", "write the cloud half", "hash", "verify")


@dataclass(frozen=True)
class ExportConfig:
    """base: folder, hub id or GGUF; adapter: our folder or the authors' torch file; dtype: of the cloud's weights and cache;
    edge_dtype: of the tables."""

    base: str
    adapter: Path
    out: Path
    dtype: str = "fp32"
    edge_dtype: str = "fp32"
    replace: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}, expected one of {', '.join(DTYPES)}")
        if self.edge_dtype not in TABLE_DTYPES:
            raise UsageError(f"--edge-dtype {self.edge_dtype}, expected one of {', '.join(TABLE_DTYPES)}")


def open_adapter(path: Path, shape: DecoderShape) -> Adapter:
    """Our folder or the authors' file, checked against the decoder."""
    adapter = read_adapter(path) if path.is_dir() else read_authors_checkpoint(path, shape)
    check_fits(adapter.config.plan, shape)
    check_shapes(adapter.basis, expected_basis(adapter.config.plan, shape), str(path))
    require_runnable(adapter.config.plan)
    step_tokens(adapter.config.plan, shape)  # refuses ranks of which not even one token fits a frame
    return adapter


def export(config: ExportConfig, progress: Callable[[str], None]) -> dict[str, Any]:
    """Writes `config.out` whole or not at all; returns the verification report. `progress` is told each of STAGES.

    Raises UsageError, ModelError, PlanError, ArtifactError, VerificationError and their children.
    """
    check_new(config.out, config.replace)
    stages = iter(STAGES)
    progress(next(stages))
    base = read_base(config.base)
    tokenizer = read_tokenizer(base.source)
    adapter = open_adapter(config.adapter, base.shape)
    check_base(adapter, base.fingerprint, base.name)
    contract = Contract(PROTOCOL_MAJOR, adapter.config.plan, base.shape, adapter.config.basis, base.fingerprint, EXIT_CONVENTION)
    with new_folder(config.out, config.replace) as out:
        cloud, edge, verification = (out / name for name in ("cloud", "edge", "verification"))
        for folder in (cloud, edge, verification):
            folder.mkdir()
        progress(next(stages))
        record_reference(base, adapter, tokenizer, verification / REFERENCE)
        progress(next(stages))
        tied = is_tied(base.model)
        edge_names = write_edge(edge, base, tokenizer, adapter, config.edge_dtype)
        progress(next(stages))
        write_cloud(base, adapter, config.dtype, cloud / CLOUD_GRAPH)
        progress(next(stages))
        made_by = f"plora {importlib.metadata.version('plora')}"
        common = (FORMAT_VERSION, made_by, contract.hash, contract)
        files = record_files(cloud, [CLOUD_GRAPH])
        write_json(cloud / MANIFEST, CloudManifest(FORMATS[CloudManifest], *common, config.dtype, files))
        files = record_files(edge, edge_names)
        write_json(edge / MANIFEST, EdgeManifest(FORMATS[EdgeManifest], *common, config.edge_dtype, tied, files))
        progress(next(stages))
        report = verify_in_process(out)
        write_report(out, report)
    return report


def write_cloud(base: Base, adapter: Adapter, dtype: str, path: Path) -> None:
    """Consumes the base model: its tables go first, its layers one by one, so that the peak is one copy and a layer."""
    model = base.model
    model.lm_head = None
    model.model.embed_tokens = None
    gc.collect()
    model.to(DTYPES[dtype])
    write_cloud_graph(build_cloud_graph(model, base.shape, adapter), path)
    base.model = None
    gc.collect()
