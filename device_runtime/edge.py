"""The edge half on disk, opened: hashes checked, tables mapped once, three onnxruntime graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..artifact.errors import DamagedFile, UsageError
from ..artifact.manifest import EdgeManifest, check_files, read_manifest, require_file
from ..artifact.names import CORES, CORES_GRAPH, EMBEDDING_GRAPH, GRAPH_FORMATS, HEAD_GRAPH, HEAD_TABLE, TABLE
from ..artifact.plan import Exchange
from .cores import Floats, read_cores, zero_cores

TABLE_DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}


class Edge:
    """embed: ids -> entry; cores: compressed -> injection; logits: exit -> logits.

    cores_file: a persona's cores for this basis; None for those of the artifact; base_only: none at all, the base model.
    Raises ArtifactError's children, naming the file.
    """

    def __init__(
        self, folder: Path, cores_file: Path | None = None, base_only: bool = False, graphs: str = "onnx", threads: int = 1
    ) -> None:
        if graphs not in GRAPH_FORMATS:
            raise UsageError(f"graph format {graphs!r}, expected one of {', '.join(GRAPH_FORMATS)}")
        self.folder = folder
        self.manifest = read_manifest(EdgeManifest, folder)
        self.contract = self.manifest.contract
        self.plan, self.shape = self.contract.plan, self.contract.shape
        other = "ort" if graphs == "onnx" else "onnx"
        unused = {CORES} if cores_file or base_only else set()
        check_files(folder, self.manifest, frozenset(n for n in self.manifest.files if not n.endswith(f".{other}") and n not in unused))
        self._embedding = self._open(f"{EMBEDDING_GRAPH}.{graphs}", 1)
        self._cores = self._open(f"{CORES_GRAPH}.{graphs}", 1)
        self._head = self._open(f"{HEAD_GRAPH}.{graphs}", threads)
        self.table = self._map(TABLE)
        self.head_table = self.table if self.manifest.tied else self._map(HEAD_TABLE)
        if base_only:
            self._blocks = zero_cores(self.plan)
        else:
            self._blocks = read_cores(cores_file or require_file(self.manifest, folder, CORES), self.plan, self.contract.basis)

    def _open(self, name: str, threads: int) -> ort.InferenceSession:
        path = require_file(self.manifest, self.folder, name)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Runs lie a network round trip apart: threads that spin in between only heat the phone.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises its own unexported kinds
            raise DamagedFile(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from None

    def _map(self, name: str) -> NDArray[Any]:
        path = require_file(self.manifest, self.folder, name)
        shape = (self.shape.vocabulary, self.shape.hidden)
        dtype = TABLE_DTYPES.get(self.manifest.dtype)
        if dtype is None:
            raise UsageError(f"{self.folder}: edge dtype {self.manifest.dtype}, this runtime reads {', '.join(TABLE_DTYPES)}")
        if path.stat().st_size != shape[0] * shape[1] * dtype.itemsize:
            raise DamagedFile(f"{path}: {path.stat().st_size} bytes, expected {list(shape)} values of {self.manifest.dtype}")
        return np.memmap(path, dtype, mode="r", shape=shape)

    def _run(self, session: ort.InferenceSession, **inputs: NDArray[Any]) -> Floats:
        (output,) = session.run(None, inputs)
        return output  # pyright: ignore[reportReturnType]  each of our graphs has one float32 output

    def embed(self, ids: list[int]) -> Floats:
        """Token ids -> entry [T, hidden] float32. Ids must lie in the vocabulary."""
        return self._run(self._embedding, ids=np.asarray(ids, np.int64), table=self.table)

    def inject(self, exchange: Exchange, compressed: Floats) -> Floats:
        """One exchange: compressed [T, C] -> injection M A u [T, I], float32."""
        return self._run(self._cores, compressed=compressed, cores=self._blocks[exchange.index])

    def logits(self, exit_rows: Floats) -> Floats:
        """exit [T, hidden] float32 -> logits [T, vocabulary] float32."""
        return self._run(self._head, exit=exit_rows, table=self.head_table)
