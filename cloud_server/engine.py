"""Runs the artifact's segments for a batch of sessions that stand at the same one. The only file that runs TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.errors import DamagedFile, UsageError
from ..artifact.manifest import CloudManifest, check_files, read_manifest, require_file
from ..artifact.names import CLOUD_GRAPH
from ..protocol.limits import step_tokens
from .cache import Pool

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Floats = NDArray[np.float32]


@dataclass
class Row:
    """One session's running step. hidden: [1, T, H]; injections: [1, T, I] by exchange, -1 the entry's; u, qkv: [1, T, …] of the
    segment that was opened; slots, lengths: int64 [1]; tables: of this row alone."""

    slots: Tensor
    lengths: Tensor
    hidden: Tensor
    injections: dict[int, Tensor]
    u: Tensor | None = None
    qkv: Tensor | None = None
    tables: list[Tensor] | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        return self.hidden.shape[1]


@dataclass(frozen=True)
class Calls:
    """One segment's compiled methods: calling a module instead would go through nn.Module's hooks every time."""

    open: Callable[..., Any]
    ahead: Callable[..., Any]
    run: Callable[..., Any]
    through: Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """Rows side by side: hidden [B, T, H], injections [B, T, I] of the segment's inputs, slots and lengths int64 [B]."""

    hidden: Tensor
    injections: list[Tensor]
    slots: Tensor
    lengths: Tensor


class Engine:
    """The cloud half of one artifact and its KV pool. Inference mode (per call, since it belongs to a thread) spares every operation
    the bookkeeping of gradients: about 4 % of a decode step. Raises ArtifactError's children and UsageError."""

    def __init__(self, folder: Path, kv_bytes: int, context_tokens: int | None = None) -> None:
        self.manifest = read_manifest(CloudManifest, folder)
        check_files(folder, self.manifest)
        self.contract = self.manifest.contract
        self.plan, self.shape = self.contract.plan, self.contract.shape
        if self.manifest.dtype not in DTYPES:
            raise UsageError(f"{folder}: dtype {self.manifest.dtype}, this engine runs {', '.join(DTYPES)}")
        self.dtype = DTYPES[self.manifest.dtype]
        context = min(self.shape.context_tokens, DEFAULT_CONTEXT_TOKENS) if context_tokens is None else context_tokens
        if not 1 <= context <= self.shape.context_tokens:
            raise UsageError(f"--context {context}, expected 1..{self.shape.context_tokens}, the model's own")
        self.step_tokens = min(step_tokens(self.plan, self.shape), context)
        layers = self.plan.cloud_layers
        self.pool = Pool(self.shape, layers, context, kv_bytes, self.dtype, self.manifest.dtype)
        path = require_file(self.manifest, folder, CLOUD_GRAPH)
        self.layer_bytes = self.manifest.files[CLOUD_GRAPH].bytes // layers
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
                self.graph = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise DamagedFile(f"{path}: not a TorchScript file: {str(error).splitlines()[0]}") from None
        segments = list(self.graph.segments.children())
        own = [self.plan.cache_of(segment) for segment in self.plan.segments]
        self.keys, self.values = [self.pool.keys[part] for part in own], [self.pool.values[part] for part in own]
        if len(segments) != len(self.plan.segments):
            raise DamagedFile(f"{path}: {len(segments)} segments, the plan has {len(self.plan.segments)}")
        self.calls = [Calls(each.open, each.ahead, each.forward, each.through) for each in segments]

    @torch.inference_mode()
    def begin(self, slot: int, length: int, hidden: Floats, injection: Floats | None) -> Row:
        """hidden: [T, H] float32 at position `length` of the session in `slot`; injection: [T, I], the entry's."""
        self.pool.touch(slot, length + len(hidden))
        injections = {} if injection is None else {-1: self._tensor(injection)}
        return Row(torch.tensor([slot]), torch.tensor([length]), self._tensor(hidden), injections)

    @torch.inference_mode()
    def open(self, segment: int, rows: list[Row]) -> list[Floats]:
        """Each row's compressed [T, C] float32, what the exchange before `segment` sends."""
        u, compressed = self.calls[segment].open(_join([row.hidden for row in rows]))
        for row, own in zip(rows, _part(u, rows), strict=True):
            row.u = own
        return [own[0].float().numpy() for own in _part(compressed, rows)]

    @torch.inference_mode()
    def ahead(self, segment: int, rows: list[Row]) -> None:
        """What of `segment` needs no injection: run it while the exchange is in flight."""
        qkv = self.calls[segment].ahead(_join([row.u for row in rows if row.u is not None]))
        for row, own in zip(rows, _part(qkv, rows), strict=True):
            row.qkv = own

    @torch.inference_mode()
    def inject(self, row: Row, exchange: int, values: Floats) -> None:
        """The injections [T, I] float32 of the exchange that the row waited for."""
        row.injections[exchange] = self._tensor(values)

    @torch.inference_mode()
    def run(self, segment: int, rows: list[Row]) -> None:
        """The rest of `segment`, once it was opened, for a batch of rows of any lengths; each row's hidden moves on, its tokens
        are cached."""
        batch = self._batch(segment, rows)
        qkv = _join([row.qkv for row in rows if row.qkv is not None])
        hidden = self.calls[segment].run(
            batch.hidden, qkv, batch.injections, self._tables(rows, batch), batch.slots, batch.lengths, *self._cache(segment)
        )
        self._move_on(rows, hidden)

    @torch.inference_mode()
    def through(self, segment: int, rows: list[Row]) -> None:
        """All of a segment that no exchange starts; where it is the plan's only one, the whole step in one call of the graph."""
        batch = self._batch(segment, rows)
        if len(self.calls) == 1:
            counts = torch.tensor([row.count for row in rows])
            hidden = self.graph(batch.hidden, batch.injections, counts, batch.slots, batch.lengths, *self._cache(segment))
        else:
            hidden = self.calls[segment].through(
                batch.hidden, batch.injections, self._tables(rows, batch), batch.slots, batch.lengths, *self._cache(segment)
            )
        self._move_on(rows, hidden)

    def _batch(self, segment: int, rows: list[Row]) -> Batch:
        return Batch(
            _join([row.hidden for row in rows]),
            [_join([row.injections[exchange] for row in rows]) for exchange in self.plan.segments[segment].inputs],
            torch.cat([row.slots for row in rows]),
            torch.cat([row.lengths for row in rows]),
        )

    def _tables(self, rows: list[Row], batch: Batch) -> list[Tensor]:
        """A row that runs alone keeps its tables for all segments of its step."""
        if len(rows) == 1 and rows[0].tables is not None:
            return rows[0].tables
        tables = self.graph.tables(batch.lengths, torch.tensor([row.count for row in rows]), batch.slots, batch.hidden)
        if len(rows) == 1:
            rows[0].tables = tables
        return tables

    def _cache(self, segment: int) -> tuple[list[Tensor], list[Tensor]]:
        return self.keys[segment], self.values[segment]

    def _move_on(self, rows: list[Row], hidden: Tensor) -> None:
        for row, own in zip(rows, _part(hidden, rows), strict=True):
            row.hidden = own

    @torch.inference_mode()
    def exit(self, row: Row, exit_rows: int) -> Floats:
        """The last `exit_rows` rows of the exit [exit_rows, H] float32."""
        return row.hidden[0, row.count - exit_rows :].float().numpy()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs a prompt and two tokens through every segment, so that TorchScript has specialised before anyone waits."""
        slot = self.pool.take()
        assert slot is not None
        length = 0
        for tokens in (8, 8, 1, 1, 1):
            tokens = min(tokens, self.pool.context_tokens - length)
            if tokens < 1:
                break
            self.blank_step(slot, length, tokens)
            length += tokens
        self.pool.give_back(slot)

    def blank_step(self, slot: int, length: int, tokens: int) -> None:
        """One step of zeros through every segment, as `Service` walks it, without a device."""
        held = self.plan.entry_exchange
        injection = np.zeros((tokens, held.injection_columns), np.float32) if held else None
        row = self.begin(slot, length, np.zeros((tokens, self.shape.hidden), np.float32), injection)
        for segment in self.plan.segments:
            if segment.exchange is None:
                self.through(segment.index, [row])
                continue
            self.open(segment.index, [row])
            self.ahead(segment.index, [row])
            columns = self.plan.exchanges[segment.exchange].injection_columns
            self.inject(row, segment.exchange, np.zeros((tokens, columns), np.float32))
            self.run(segment.index, [row])

    def _tensor(self, values: Floats) -> Tensor:
        """[T, N] float32 -> [1, T, N] in the engine's dtype."""
        return torch.from_numpy(values.copy()).to(self.dtype)[None]  # a copy: what comes off the wire is read-only


DEFAULT_CONTEXT_TOKENS = 2048
"""Tokens of one session's cache unless told otherwise: long enough to chat, and many fit."""


def _join(rows: list[Tensor]) -> Tensor:
    """[1, T, N] each -> [B, longest T, N], padded with zeros."""
    if len(rows) == 1:
        return rows[0]
    return torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)


def _part(batch: Tensor, rows: list[Row]) -> list[Tensor]:
    """[B, longest T, N] -> each row's own [1, T, N]."""
    if len(rows) == 1:
        return [batch]
    return [batch[index : index + 1, : row.count] for index, row in enumerate(rows)]
