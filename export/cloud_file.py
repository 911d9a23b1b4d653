"""Compiles the cloud graph to TorchScript and writes it: the only file that writes TorchScript."""

from __future__ import annotations

import warnings
import zipfile
from pathlib import Path

import torch

from .cloud_graph import CloudGraph

ALIGNMENT_BYTES = 64
"""torch aligns tensor data in its files, so that they could be mapped; we keep it so."""
LOCAL_HEADER_BYTES = 30
COPY_BLOCK_BYTES = 1 << 20


def write_cloud_graph(graph: CloudGraph, path: Path) -> None:
    """Scripts and saves `graph` at `path`, without the debug records, which name the folders of the machine that exported."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.(script|script_method|save)` is deprecated", DeprecationWarning)
        scripted = torch.jit.script(graph)
        full = path.with_name(f".full-{path.name}") / path.name  # the archive's inner folder is named after the file
        full.parent.mkdir()
        torch.jit.save(scripted, str(full))
    try:
        drop_debug_records(full, path)
    finally:
        full.unlink()
        full.parent.rmdir()


def drop_debug_records(source: Path, target: Path) -> None:
    """Copies a torch archive without its `*.debug_pkl`; same bytes for the same content, whenever and wherever made."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as new:
        for record in old.infolist():
            if record.filename.endswith(".debug_pkl"):
                continue
            entry = zipfile.ZipInfo(record.filename)  # dated 1980: no clock in the file
            entry.file_size = record.file_size
            start = new.fp.tell() + LOCAL_HEADER_BYTES + len(entry.filename.encode()) + 4  # type: ignore[union-attr]
            padding = -start % ALIGNMENT_BYTES
            entry.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with old.open(record) as reader, new.open(entry, "w") as writer:
                while block := reader.read(COPY_BLOCK_BYTES):
                    writer.write(block)
