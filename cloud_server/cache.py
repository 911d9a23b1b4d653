"""The KV cache: one pool per layer, handed out slot by slot and paid for block by block, cleared when it comes back.

A slot has addresses for a whole context, so that attention reads one stretch of memory and no page table; what of it is used is mapped by
the kernel when it is first written, and counted here in blocks against the budget. So a session costs what it has cached, not what it might
(vAttention, arXiv 2405.04437, does so on a GPU; docs/load.md measures it against whole slots).
"""

from __future__ import annotations

import mmap

import numpy as np
import torch
from torch import Tensor

from ..artifact.errors import UsageError
from ..artifact.shape import DecoderShape
from .budget import block_tokens_of, blocks_of

DTYPES = {"fp32": (torch.float32, np.int32), "fp16": (torch.float16, np.int16), "bf16": (torch.bfloat16, np.int16)}
"""Zeros look alike in any type; numpy has no bf16."""

MAX_SLOTS = 1024
"""Sessions at the most unless told otherwise: slots cost addresses only, but the kernel has a table for those."""

MAP_NORESERVE = 0x4000
"""mmap(2), Linux: no swap is set aside for what may never be written. Python names it from 3.13 on."""


class Pool:
    """keys, values: per layer [slots, kv_heads, context_tokens, head_dim], zeros.

    budget_bytes: of all blocks handed out; sessions: slots, None for as many as the budget has blocks for, MAX_SLOTS at the most. Not for
    two threads at a time, but for `clear`. Raises UsageError if the budget holds no whole context, or is more than the machine has.
    """

    def __init__(
        self, shape: DecoderShape, layers: int, context_tokens: int, budget_bytes: int, dtype: str, sessions: int | None = None
    ) -> None:
        self.context_tokens = context_tokens
        self.token_bytes = shape.kv_bytes_per_token(dtype, layers)
        self.block_tokens = block_tokens_of(context_tokens)
        self.block_bytes = self.block_tokens * self.token_bytes
        self.blocks = blocks_of(context_tokens, self.token_bytes, budget_bytes)
        self.slots = min(self.blocks, MAX_SLOTS if sessions is None else sessions)
        self.free_blocks = self.blocks
        size = (self.slots, shape.kv_heads, context_tokens, shape.head_dim)
        try:
            self._maps = [_Map(size, dtype) for _ in range(2 * layers)]
        except (OSError, MemoryError):
            raise UsageError(
                f"addresses for {self.slots:,} sessions of {context_tokens:,} tokens are more than this machine gives; lower --sessions, "
                "--kv-bytes or --context"
            ) from None
        self.keys: list[Tensor] = [each.tensor for each in self._maps[:layers]]
        self.values: list[Tensor] = [each.tensor for each in self._maps[layers:]]
        self._free = list(range(self.slots - 1, -1, -1))
        self._held = [0] * self.slots

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def held_bytes(self) -> int:
        """Of all sessions' blocks."""
        return (self.blocks - self.free_blocks) * self.block_bytes

    def blocks_of(self, slot: int) -> int:
        return self._held[slot]

    def bytes_of(self, slot: int) -> int:
        return self._held[slot] * self.block_bytes

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)

    def take(self) -> int | None:
        """A slot of zeros with its first block, or None if all of either are in use."""
        if not self._free or not self.free_blocks:
            return None
        slot = self._free.pop()
        self._hold(slot, 1)
        return slot

    def reserve(self, slot: int, tokens: int) -> bool:
        """Blocks for the slot's first `tokens` tokens, at most context_tokens; what it holds it keeps. False if they are not to be had:
        then nothing changed."""
        wanted = self.blocks_for(tokens) - self._held[slot]
        if wanted > self.free_blocks:
            return False
        if wanted > 0:
            self._hold(slot, wanted)
        return True

    def _hold(self, slot: int, blocks: int) -> None:
        self._held[slot] += blocks
        self.free_blocks -= blocks

    def clear(self, slot: int) -> None:
        """The slot's memory goes back to the kernel and reads as zeros; for the engine's thread, before `free`."""
        written = self._held[slot] * self.block_tokens
        for each in self._maps:
            each.clear(slot, min(written, self.context_tokens))

    def free(self, slot: int) -> None:
        """Others may have the slot and its blocks: nothing of what was in it is left."""
        self.free_blocks += self._held[slot]
        self._held[slot] = 0
        self._free.append(slot)

    def give_back(self, slot: int) -> None:
        self.clear(slot)
        self.free(slot)


class _Map:
    """One layer's keys or values, in memory of its own that the kernel maps in small pages: in huge ones, a token would cost 2 MiB."""

    def __init__(self, size: tuple[int, int, int, int], dtype: str) -> None:
        kind, integers = DTYPES[dtype]
        self.row_bytes = size[3] * np.dtype(integers).itemsize
        self.heads, self.tokens = size[1], size[2]
        self.memory = mmap.mmap(
            -1, size[0] * self.heads * self.tokens * self.row_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        )
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.tensor = torch.from_numpy(np.frombuffer(self.memory, integers).reshape(size)).view(kind)

    def clear(self, slot: int, tokens: int) -> None:
        """The first `tokens` tokens of each head."""
        for head in range(self.heads):
            start = (slot * self.heads + head) * self.tokens * self.row_bytes
            stop = start + tokens * self.row_bytes
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if first >= last:
                self.bytes[start:stop] = 0
                continue
            self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)
            self.bytes[start:first] = 0
            self.bytes[last:stop] = 0
