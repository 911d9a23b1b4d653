"""Runs the artifact's segments for batches of sessions. The only file that runs TorchScript.

A batch is packed: pieces of rows one behind the other, [N, ...], whatever their lengths. Between two waits for its device a row goes one
`Leg`: the layers of a segment, then what the device needs next, the compressed of an exchange or the exit.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..artifact.errors import DamagedFile, UsageError, first_line
from ..artifact.manifest import CloudManifest, check_files, read_manifest, require_file
from ..artifact.names import CLOUD_GRAPH
from ..artifact.walk import Leg, legs
from ..protocol.limits import step_tokens
from .budget import context_of
from .cache import Pool

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Floats = NDArray[np.float32]


@dataclass(eq=False)
class Row:
    """One session's running step of T tokens. slot, length: in the pool, and tokens cached before; hidden: [T, H], the entry, then behind
    each segment; injections: [T, I] by exchange, -1 the entry's; leg: its next; done: tokens that have gone through that leg's segment,
    and `parts` is what came out; u, qkv: [T, ...] of the segment that the exchange opened; result: of its last leg; alone: in
    batches of its own; seconds: that the engine worked on batches that it was in."""

    slot: int
    length: int
    hidden: Tensor
    injections: dict[int, Tensor]
    exit_rows: int = 1
    alone: bool = False
    leg: int = 0
    done: int = 0
    parts: list[Tensor] = field(default_factory=list, repr=False)
    u: Tensor | None = field(default=None, repr=False)
    qkv: Tensor | None = field(default=None, repr=False)
    result: Floats | None = field(default=None, repr=False)
    seconds: float = 0.0

    @property
    def count(self) -> int:
        return self.hidden.shape[0]

    @property
    def left(self) -> int:
        """Tokens that have not gone through the leg's segment yet."""
        return self.count - self.done


@dataclass(frozen=True)
class Piece:
    """The next `count` tokens of a row's leg: a long prompt goes in pieces, so that others are not kept waiting."""

    row: Row
    count: int

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(0, self.row.done, self.count)


@dataclass(frozen=True)
class Calls:
    """One segment's compiled methods: calling a module instead would go through nn.Module's hooks every time."""

    open: Callable[..., Any]
    ahead: Callable[..., Any]
    run: Callable[..., Any]
    through: Callable[..., Any]


class Engine:
    """The cloud half of one artifact and its KV pool. Inference mode (per call, since it belongs to a thread) spares every operation
    the bookkeeping of gradients: about 4 % of a decode step. Raises ArtifactError's children and UsageError."""

    def __init__(self, folder: Path, kv_bytes: int, context_tokens: int | None = None, sessions: int | None = None) -> None:
        self.manifest = read_manifest(CloudManifest, folder)
        check_files(folder, self.manifest)
        self.contract = self.manifest.contract
        if self.manifest.dtype not in DTYPES:
            raise UsageError(f"{folder}: dtype {self.manifest.dtype}, this engine runs {', '.join(DTYPES)}")
        shape = self.contract.shape
        context = context_of(shape, context_tokens)
        pool = Pool(shape, self.contract.plan.cloud_layers, context, kv_bytes, self.manifest.dtype, sessions)
        path = require_file(self.manifest, folder, CLOUD_GRAPH)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
                graph = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise DamagedFile(f"{path}: not a TorchScript file: {first_line(error)}") from None
        found = len(list(graph.segments.children()))
        if found != len(self.contract.plan.segments):
            raise DamagedFile(f"{path}: {found} segments, the plan has {len(self.contract.plan.segments)}")
        self._hold(graph, pool, DTYPES[self.manifest.dtype])

    def _hold(self, graph: Any, pool: Pool, dtype: torch.dtype) -> None:
        self.plan, self.shape = self.contract.plan, self.contract.shape
        self.graph, self.pool, self.dtype = graph, pool, dtype
        self.legs = legs(self.plan)
        self.merge_seconds = [0.0] * len(self.legs)
        self.step_tokens = min(step_tokens(self.plan, self.shape), pool.context_tokens)
        own = [self.plan.cache_of(segment) for segment in self.plan.segments]
        self.keys, self.values = [pool.keys[part] for part in own], [pool.values[part] for part in own]
        self.calls = [Calls(each.open, each.ahead, each.forward, each.through) for each in graph.segments.children()]

    @torch.inference_mode()
    def begin(self, slot: int, length: int, hidden: Floats, injection: Floats | None, exit_rows: int = 1, alone: bool = False) -> Row:
        """hidden: [T, H] float32 at position `length` of the session in `slot`, which the pool has room for; injection: [T, I], the
        entry's; exit_rows: of the exit, wanted; alone: in batches of its own."""
        injections = {} if injection is None else {-1: self._tensor(injection)}
        return Row(slot, length, self._tensor(hidden), injections, exit_rows, alone)

    @torch.inference_mode()
    def inject(self, row: Row, exchange: int, values: Floats) -> None:
        """The injections [T, I] float32 of the exchange that the row waited for."""
        row.injections[exchange] = self._tensor(values)

    @torch.inference_mode()
    def go(self, index: int, pieces: list[Piece]) -> list[Row]:
        """Pieces of rows that stand at the same leg. Returns the rows that have finished it: their `result` is what the device needs, the
        compressed [T, C] or the exit [exit_rows, H], float32, and the next leg is theirs."""
        leg = self.legs[index]
        if leg.segment is not None:
            out = self._run(leg, pieces)
            start = 0
            for piece in pieces:
                piece.row.parts.append(out.narrow(0, start, piece.count))
                start += piece.count
        finished = []
        for piece in pieces:
            row = piece.row
            row.done += piece.count
            if not row.left:
                finished.append(row)
                if row.parts:
                    row.hidden = _join(row.parts)
                    row.parts, row.u, row.qkv = [], None, None
        if finished and leg.exchange is not None:
            self._open(leg, finished)
        for row in finished:
            row.leg, row.done = index + 1, 0
            if leg.exchange is None:
                row.result = row.hidden[row.count - row.exit_rows :].float().numpy()
        return finished

    @torch.inference_mode()
    def ahead(self, rows: list[Row]) -> None:
        """What of their next segment needs no injection, for rows at the same leg that wait for their devices."""
        (leg,) = {row.leg for row in rows}
        segment = self.legs[leg].segment
        assert segment is not None  # an exchange opens one
        counts = [row.count for row in rows]
        padding = self._padding(sum(counts))
        qkv = self.calls[segment.index].ahead(_join([row.u for row in rows if row.u is not None], padding))
        for row, own in zip(rows, qkv.split([*counts, padding]), strict=False):
            row.qkv = own

    def _padding(self, rows: int) -> int:
        return padded_rows(rows) - rows if self.dtype is torch.float32 else 0

    def _run(self, leg: Leg, pieces: list[Piece]) -> Tensor:
        """The leg's segment: hidden [N, H] behind it, padding and all; the pieces' tokens are cached."""
        segment = leg.segment
        assert segment is not None
        padding = self._padding(sum(piece.count for piece in pieces))
        slots = [piece.row.slot for piece in pieces]
        lengths = [piece.row.length + piece.row.done for piece in pieces]
        counts = [piece.count for piece in pieces]
        hidden = _join([piece.of(piece.row.hidden) for piece in pieces], padding)
        injections = [_join([piece.of(piece.row.injections[exchange]) for piece in pieces], padding) for exchange in segment.inputs]
        calls, cache = self.calls[segment.index], (self.keys[segment.index], self.values[segment.index])
        if segment.exchange is None and len(self.calls) == 1:
            return self.graph(hidden, injections, slots, lengths, counts, *cache)
        tables = self.graph.tables(slots, lengths, counts, hidden)
        rest = (injections, tables, slots, lengths, counts, *cache)
        if segment.exchange is None:
            return calls.through(hidden, *rest)
        if late := [piece.row for piece in pieces if piece.row.qkv is None]:
            self.ahead(late)
        qkv = _join([piece.of(piece.row.qkv) for piece in pieces if piece.row.qkv is not None], padding)
        return calls.run(hidden, qkv, *rest)

    def _open(self, leg: Leg, rows: list[Row]) -> None:
        """Norm and down-projection of the segment that the leg's exchange starts."""
        assert leg.opens is not None
        counts = [row.count for row in rows]
        u, compressed = self.calls[leg.opens.index].open(_join([row.hidden for row in rows]))
        values = compressed.float().numpy()
        start = 0
        for row, own in zip(rows, u.split(counts), strict=True):
            row.u, row.result = own, values[start : start + row.count]
            start += row.count

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs a prompt and tokens through every leg, alone and in batches, so that TorchScript has specialised before anyone waits;
        `merge_seconds` is then what is measured."""
        slots = [slot for slot in (self.pool.take() for _ in range(MERGED_ROWS)) if slot is not None]
        half = len(slots) // 2
        seconds: dict[int, list[float]] = {}
        for rows in dict.fromkeys((len(slots), half or 1, 1)):
            length = 0
            for tokens in (8, 1, 1, 1, 1, 1, 1):
                tokens = min(tokens, self.pool.context_tokens - length)
                if tokens < 1 or not all(self.pool.reserve(slot, length + tokens) for slot in slots[:rows]):
                    break
                taken = self.blank_step([(slot, length, tokens) for slot in slots[:rows]])
                seconds[rows] = [min(pair) for pair in zip(seconds[rows], taken, strict=True)] if length > 8 else taken
                length += tokens
        if half in seconds and len(slots) in seconds:
            self.merge_seconds = [max(2 * two - one, 0.0) for two, one in zip(seconds[half], seconds[len(slots)], strict=True)]
        for slot in slots:
            self.pool.give_back(slot)

    def blank_step(self, steps: list[tuple[int, int, int]]) -> list[float]:
        """One step of zeros through every leg, as sessions walk it, without a device: seconds of each leg. steps: slot, length and tokens
        of each row."""
        held = self.plan.entry_exchange
        rows, seconds = [], []
        for slot, length, tokens in steps:
            injection = np.zeros((tokens, held.injection_columns), np.float32) if held else None
            rows.append(self.begin(slot, length, np.zeros((tokens, self.shape.hidden), np.float32), injection))
        for index, leg in enumerate(self.legs):
            began = time.perf_counter()
            self.go(index, [Piece(row, row.count) for row in rows])
            seconds.append(time.perf_counter() - began)
            if leg.exchange is not None:
                self.ahead(rows)
                for row in rows:
                    self.inject(row, leg.exchange.index, np.zeros((row.count, leg.exchange.injection_columns), np.float32))
        return seconds

    def _tensor(self, values: Floats) -> Tensor:
        """[T, N] float32 -> [T, N] in the engine's dtype."""
        return torch.from_numpy(values.copy()).to(self.dtype)  # a copy: what comes off the wire is read-only


MERGED_ROWS = 16
"""Rows of the batch that `merge_seconds` is measured with: by leg, what it takes less than two of half as many."""


def padded_rows(rows: int) -> int:
    """To what number of rows a packed batch is filled up: MKL's products of 2, 4, 8 and multiples of 16 rows are faster than those of
    fewer rows in between (docs/load.md); a single row gains where there are two threads."""
    if rows == 1:
        return 2 if torch.get_num_threads() > 1 else 1
    if rows > 8:
        return -(-rows // 16) * 16
    return {3: 4, 7: 8}.get(rows, rows)


def _join(parts: list[Tensor], padding: int = 0) -> Tensor:
    """[T, N] each -> [all T, N], and rows of zeros behind."""
    if padding:
        parts = [*parts, parts[0].new_zeros((padding, parts[0].shape[1]))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
