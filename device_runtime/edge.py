"""The edge half on disk, opened: hashes checked, tables mapped once, its onnxruntime graphs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from ..artifact.edge_layout import graph_names, injection_graph, layer_graph, layer_slices
from ..artifact.errors import DamagedFile, UsageError, first_line
from ..artifact.manifest import EdgeManifest, check_files, read_manifest, require_file
from ..artifact.names import (
    CORES,
    EMBEDDING_GRAPH,
    ENTRY_DOWN,
    GRAPH_FORMATS,
    HEAD_GRAPH,
    HEAD_TABLE,
    LAYERS,
    TABLE,
)
from ..artifact.plan import Exchange
from .cores import Floats, read_cores, zero_cores
from .layers import DeviceLayers, Layer

DTYPES = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}


class Edge:
    """embed: ids -> hidden; entry_injection, inject: -> injection; logits: residual -> logits; device_layers: the device's own.

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
        one_row = {EMBEDDING_GRAPH, *map(injection_graph, self.plan.all_exchanges)}
        self._graphs = {
            name: self._open(f"{name}.{graphs}", 1 if name in one_row else threads) for name in graph_names(self.plan, self.shape)
        }
        table = (self.shape.vocabulary, self.shape.hidden)
        self.table = self._map(TABLE, self._dtype(), table)
        self.head_table = self.table if self.manifest.tied else self._map(HEAD_TABLE, self._dtype(), table)
        self._layers = self._read_layers() if self.plan.device_layers else {}
        if held := self.plan.entry_exchange:
            self._entry_down = self._map(ENTRY_DOWN, np.dtype("<f4"), (held.compressed_columns, self.shape.hidden))
        if base_only:
            self._private = zero_cores(self.plan)
        else:
            self._private = read_cores(cores_file or require_file(self.manifest, folder, CORES), self.plan, self.contract.basis)

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
            raise DamagedFile(f"{path}: onnxruntime cannot load it: {first_line(error)}") from None

    def _dtype(self) -> np.dtype[Any]:
        """Of tables and layers."""
        dtype = DTYPES.get(self.manifest.dtype)
        if dtype is None:
            raise UsageError(f"{self.folder}: edge dtype {self.manifest.dtype}, this runtime reads {', '.join(DTYPES)}")
        return dtype

    def _map(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
        path = require_file(self.manifest, self.folder, name)
        if path.stat().st_size != math.prod(shape) * dtype.itemsize:
            raise DamagedFile(f"{path}: {path.stat().st_size} bytes, expected {list(shape)} values of {dtype.itemsize} bytes")
        return np.memmap(path, dtype, mode="r", shape=shape)

    def _read_layers(self) -> dict[int, Layer]:
        """The device's decoder layers: mapped in float32, widened once in float16."""
        slices = list(layer_slices(self.plan, self.shape))
        values = self._map(LAYERS, self._dtype(), (slices[-1][2].stop,))
        weights: dict[int, dict[str, Floats]] = {layer: {} for layer in self.plan.device_layers}
        for layer, name, where, size in slices:
            weights[layer][name] = values[where].reshape(size).astype(np.float32, copy=False)
        return {layer: Layer(self._graphs[layer_graph(self.shape.windows[layer])], own) for layer, own in weights.items()}

    def device_layers(self, first: int, stop: int, context_tokens: int) -> DeviceLayers:
        """Decoder layers `first <= layer < stop` with an empty cache for one conversation."""
        return DeviceLayers([self._layers[index] for index in range(first, stop)], self.shape, context_tokens)

    def _run(self, graph: str, **inputs: NDArray[Any]) -> Floats:
        (output,) = self._graphs[graph].run(None, inputs)
        return output  # pyright: ignore[reportReturnType]  each of these graphs has one float32 output

    def embed(self, ids: list[int]) -> Floats:
        """Token ids -> hidden [T, hidden] float32. Ids must lie in the vocabulary."""
        return self._run(EMBEDDING_GRAPH, ids=np.asarray(ids, np.int64), table=self.table)

    def inject(self, exchange: Exchange, compressed: Floats) -> Floats:
        """One exchange: compressed [T, C] -> injection M A u, or M silu(F A u + f), [T, I], float32."""
        return self._run(injection_graph(exchange), compressed=compressed, **self._private[exchange.index])

    def entry_injection(self, exchange: Exchange, hidden: Floats) -> Floats:
        """What goes with the entry [T, hidden] if the entry layer is a source: as above, [T, I], float32."""
        return self._run(injection_graph(exchange), hidden=hidden, down=self._entry_down, **self._private[exchange.index])

    def logits(self, residual: Floats) -> Floats:
        """The residual stream before the final norm [T, hidden] float32 -> logits [T, vocabulary] float32."""
        return self._run(HEAD_GRAPH, exit=residual, table=self.head_table)
