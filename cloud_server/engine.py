"""Runs the artifact's segments for a batch of sessions that stand at the same one. The only file that runs TorchScript."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

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
    """One session's running step. hidden: [T, H]; injections: [T, I] each, position 0 the entry's; u, qkv: [T, …] of the
    segment that was opened."""

    slot: int
    length: int
    hidden: Tensor
    injections: list[Tensor]
    u: Tensor | None = None
    qkv: Tensor | None = None
    tables: list[Tensor] | None = field(default=None, repr=False)

    @property
    def count(self) -> int:
        return self.hidden.shape[0]


class Engine:
    """The cloud half of one artifact and its KV pool. Raises ArtifactError's children and UsageError."""

    def __init__(self, folder: Path, kv_bytes: int, context_tokens: int | None = None) -> None:
        self.manifest = read_manifest(CloudManifest, folder)
        check_files(folder, self.manifest)
        self.contract = self.manifest.contract
        self.plan, self.shape = self.contract.plan, self.contract.shape
        if self.manifest.dtype not in DTYPES:
            raise UsageError(f"{folder}: dtype {self.manifest.dtype}, this engine runs {', '.join(DTYPES)}")
        self.dtype = DTYPES[self.manifest.dtype]
        context = context_tokens or min(self.shape.context_tokens, DEFAULT_CONTEXT_TOKENS)
        if not 1 <= context <= self.shape.context_tokens:
            raise UsageError(f"--context {context}, expected 1..{self.shape.context_tokens}, the model's own")
        self.step_tokens = min(step_tokens(self.plan, self.shape), context)
        layers = self.plan.layers - self.plan.front_layers - self.plan.back_layers
        self.pool = Pool(self.shape, layers, context, kv_bytes, self.dtype, self.manifest.dtype)
        path = require_file(self.manifest, folder, CLOUD_GRAPH)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated", DeprecationWarning)
                self.graph = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise DamagedFile(f"{path}: not a TorchScript file: {str(error).splitlines()[0]}") from None
        self.segments = list(self.graph.segments.children())
        if len(self.segments) != len(self.plan.segments):
            raise DamagedFile(f"{path}: {len(self.segments)} segments, the plan has {len(self.plan.segments)}")

    def begin(self, slot: int, length: int, hidden: Floats, injection: Floats | None) -> Row:
        """hidden: [T, H] float32 at position `length` of the session in `slot`; injection: [T, I], the entry's."""
        entry = torch.empty(len(hidden), 0, dtype=self.dtype) if injection is None else self._tensor(injection)
        self.pool.touch(slot, length + len(hidden))
        return Row(slot, length, self._tensor(hidden), [entry])

    @torch.inference_mode()
    def open(self, segment: int, rows: list[Row]) -> list[Floats]:
        """Each row's compressed [T, C] float32, what the exchange before `segment` sends."""
        u, compressed = self.segments[segment].open(_stack([row.hidden for row in rows]))
        for index, row in enumerate(rows):
            row.u = u[index, : row.count]
        return [compressed[index, : row.count].float().numpy() for index, row in enumerate(rows)]

    @torch.inference_mode()
    def ahead(self, segment: int, rows: list[Row]) -> None:
        """What of `segment` needs no injection: run it while the exchange is in flight."""
        qkv = self.segments[segment].ahead(_stack([row.u for row in rows if row.u is not None]))
        for index, row in enumerate(rows):
            row.qkv = qkv[index, : row.count]

    def inject(self, row: Row, values: Floats) -> None:
        """The injections [T, I] float32 of the exchange that the row waited for."""
        row.injections.append(self._tensor(values))

    @torch.inference_mode()
    def run(self, segment: int, rows: list[Row]) -> None:
        """The rest of `segment` for a batch of rows of any lengths; each row's hidden moves on, its tokens are cached."""
        slots = torch.tensor([row.slot for row in rows])
        lengths = torch.tensor([row.length for row in rows])
        hidden = _stack([row.hidden for row in rows])
        if len(rows) == 1 and rows[0].tables is not None:
            tables = rows[0].tables
        else:
            tables = self.graph.tables(lengths, torch.tensor([row.count for row in rows]), slots, hidden)
            if len(rows) == 1:
                rows[0].tables = tables
        hidden = self.segments[segment](
            hidden,
            _stack([row.qkv for row in rows if row.qkv is not None]),
            [_stack([row.injections[at] for row in rows]) for at in range(len(rows[0].injections))],
            tables,
            slots,
            lengths,
            self.pool.keys,
            self.pool.values,
        )
        for index, row in enumerate(rows):
            row.hidden = hidden[index, : row.count]

    def exit(self, row: Row, exit_rows: int) -> Floats:
        """The last `exit_rows` rows of the exit [exit_rows, H] float32."""
        return row.hidden[row.count - exit_rows :].float().numpy()

    def warm_up(self) -> None:
        """Runs a prompt and two tokens through every segment, so that TorchScript has specialised before anyone waits."""
        slot = self.pool.take()
        assert slot is not None
        length = 0
        for tokens in (8, 8, 1, 1, 1):
            tokens = min(tokens, self.pool.context_tokens - length)
            if tokens < 1:
                break
            row = self.begin(slot, length, np.zeros((tokens, self.shape.hidden), np.float32), None)
            for segment in self.plan.segments:
                self.open(segment.index, [row])
                self.ahead(segment.index, [row])
                if segment.exchange is not None:
                    self.inject(row, np.zeros((tokens, self.plan.exchanges[segment.exchange].injection_columns), np.float32))
                self.run(segment.index, [row])
            length += tokens
        self.pool.give_back(slot)

    def _tensor(self, values: Floats) -> Tensor:
        return torch.tensor(values, dtype=self.dtype)


DEFAULT_CONTEXT_TOKENS = 2048
"""Tokens of one session's cache unless told otherwise: long enough to chat, and many fit."""


def _stack(rows: list[Tensor]) -> Tensor:
    """[T, N] each -> [B, longest T, N], padded with zeros."""
    if len(rows) == 1:
        return rows[0][None]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
