"""Writes both halves of an export, unverified. Run in a process of its own (`python -m plora.export.halves`), whose memory is
given back whole before verification begins."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..artifact.errors import PloraError
from ..artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract, record_files
from ..artifact.manifest import FORMATS, MANIFEST, VERSIONS, CloudManifest, EdgeManifest, write_json
from ..artifact.memory import give_back
from ..artifact.names import CLOUD_GRAPH
from ..artifact.shape import DecoderShape, check_fits
from ..models.adapter import Adapter, check_base, check_expansions, check_shapes, expected_basis, read_adapter
from ..models.authors import read_authors_checkpoint
from ..models.checkpoint import Base, is_tied, read_base, read_tokenizer
from ..protocol.limits import step_tokens
from .cloud_build import build_cloud_graph
from .cloud_file import write_cloud_graph
from .config import STAGES, ExportConfig
from .edge_files import write_edge
from .export import private_stdout
from .memory import give_back_pages
from .reference import REFERENCE, record_reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write_halves(config: ExportConfig, out: Path, progress: Callable[[str], None]) -> None:
    """Writes `cloud/`, `edge/` and the record for verification into the folder `out`; `progress` is told all but the last of
    STAGES. Raises ModelError, PlanError, ArtifactError and their children."""
    stages = iter(STAGES)
    progress(next(stages))
    base = read_base(config.base)
    tokenizer = read_tokenizer(base.source)
    adapter = open_adapter(config.adapter, base.shape)
    check_base(adapter, base.fingerprint, base.name)
    contract = Contract(PROTOCOL_MAJOR, adapter.config.plan, base.shape, adapter.config.basis, base.fingerprint, EXIT_CONVENTION)
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
    common = (made_by, contract.hash, contract)
    files = record_files(cloud, [CLOUD_GRAPH])
    write_json(cloud / MANIFEST, CloudManifest(FORMATS[CloudManifest], VERSIONS[CloudManifest], *common, config.dtype, files))
    files = record_files(edge, edge_names)
    write_json(edge / MANIFEST, EdgeManifest(FORMATS[EdgeManifest], VERSIONS[EdgeManifest], *common, config.edge_dtype, tied, files))


def open_adapter(path: Path, shape: DecoderShape) -> Adapter:
    """Our folder or the authors' file, checked against the decoder."""
    adapter = read_adapter(path) if path.is_dir() else read_authors_checkpoint(path, shape)
    check_fits(adapter.config.plan, shape)
    check_shapes(adapter.basis, expected_basis(adapter.config.plan, shape), str(path))
    check_expansions(adapter.basis, adapter.config.plan, str(path))
    step_tokens(adapter.config.plan, shape)  # refuses ranks of which not even one token fits a frame
    return adapter


def write_cloud(base: Base, adapter: Adapter, dtype: str, path: Path) -> None:
    """Consumes the base model: what the device holds goes first, then its layers one by one, so that the peak is one copy and a layer."""
    model = base.model
    for table in (model.lm_head, model.model.embed_tokens):
        give_back_pages(table.weight.data)
    model.lm_head = None
    model.model.embed_tokens = None
    for layer in adapter.config.plan.device_layers:
        model.model.layers[layer] = torch.nn.Identity()
    give_back()
    model.to(DTYPES[dtype])
    write_cloud_graph(build_cloud_graph(model, base.shape, adapter), path)
    base.model = None
    gc.collect()


def main() -> int:
    """Arguments: the config as JSON, the folder. Each line on standard output is a stage or the error as JSON."""
    import transformers

    out = private_stdout()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    given = json.loads(sys.argv[1])
    config = ExportConfig(**{**given, "adapter": Path(given["adapter"]), "out": Path(given["out"])})
    try:
        write_halves(config, Path(sys.argv[2]), lambda stage: print(json.dumps({"stage": stage}), file=out, flush=True))
    except PloraError as error:
        print(json.dumps({"error": type(error).__name__, "message": str(error)}), file=out, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
