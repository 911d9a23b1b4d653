"""The KV cache: one pool of slots per layer, allocated once, handed out by the session, zeroed when it comes back."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..artifact.errors import UsageError
from ..artifact.shape import DecoderShape


class Pool:
    """keys, values: per layer [slots, kv_heads, context_tokens, head_dim], zeros.

    Pages of a slot that was never written take no memory: numpy's zeros are mapped on first use, torch's are written at once.
    Raises UsageError if `budget_bytes` holds no slot.
    """

    def __init__(self, shape: DecoderShape, layers: int, context_tokens: int, budget_bytes: int, dtype: torch.dtype, name: str) -> None:
        self.context_tokens = context_tokens
        self.slot_bytes = shape.kv_bytes_per_token(name, layers) * context_tokens
        self.slots = budget_bytes // self.slot_bytes
        if self.slots < 1:
            raise UsageError(
                f"a KV budget of {budget_bytes:,} bytes holds no session: one of {context_tokens} tokens takes {self.slot_bytes:,}; "
                "raise --kv-bytes or lower --context"
            )
        size = (self.slots, shape.kv_heads, context_tokens, shape.head_dim)
        try:
            self.keys: list[Tensor] = [_lazy_zeros(size, dtype) for _ in range(layers)]
            self.values: list[Tensor] = [_lazy_zeros(size, dtype) for _ in range(layers)]
        except MemoryError:
            raise UsageError(f"a KV budget of {budget_bytes:,} bytes is more than this machine can map; lower --kv-bytes") from None
        self._free = list(range(self.slots - 1, -1, -1))
        self._touched = [0] * self.slots

    def take(self) -> int | None:
        """A slot of zeros, or None if all are in use."""
        return self._free.pop() if self._free else None

    def touch(self, slot: int, length: int) -> None:
        """Tokens up to `length` of the slot are written now."""
        self._touched[slot] = max(self._touched[slot], length)

    def give_back(self, slot: int) -> None:
        """Zeroes what was written: a NaN left in a masked key or value would poison the next session's attention."""
        written = self._touched[slot]
        for tensors in (self.keys, self.values):
            for tensor in tensors:
                tensor[slot, :, :written].zero_()
        self._touched[slot] = 0
        self._free.append(slot)


def _lazy_zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    integers = {2: np.int16, 4: np.int32}[dtype.itemsize]  # zeros look alike in any type; numpy has no bf16
    return torch.from_numpy(np.zeros(size, integers)).view(dtype)
