"""Rows of a step laid end to end in one sequence, what they all begin with written once: no padding, no token computed twice.

    prefix | rest of row 1 | rest of row 2 | …        a token attends the prefix and its own row, at its row's positions

Chat templates open every row with the same system text: half of the tokens of short rows. Exact: attention is causal, so nothing in
the prefix can depend on what follows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .rows import IGNORED, Example

PACK_TOKENS = 1024
"""Of one sequence: attention costs its square, whatever the mask leaves out; up to here the linear layers cost several times as much."""


@dataclass(frozen=True)
class Pack:
    """input_ids, positions, row (-1: prefix) `[N]` int64; at: `[R]`, the indices whose next token is a response's; next_ids: `[R]`,
    those tokens."""

    input_ids: Tensor
    positions: Tensor
    row: Tensor
    at: Tensor
    next_ids: Tensor

    def to(self, device: torch.device) -> Pack:
        return Pack(*(each.to(device) for each in (self.input_ids, self.positions, self.row, self.at, self.next_ids)))

    def mask(self, window: int) -> Tensor:
        """Who attends whom: `[1, 1, N, N]` bool. window: of a sliding attention, 0 for none."""
        distance = self.positions[:, None] - self.positions[None, :]
        allowed = (distance >= 0) & ((self.row[:, None] == self.row[None, :]) | (self.row[None, :] == -1))
        if window:
            allowed &= distance < window
        return allowed[None, None]


def pack(examples: Sequence[Example], pack_tokens: int = PACK_TOKENS) -> list[Pack]:
    """The examples, in order, in as few sequences as `pack_tokens` allows; a longer row has one of its own."""
    packs: list[Pack] = []
    begun: list[Example] = []
    for example in examples:
        if begun and _tokens([*begun, example]) > pack_tokens:
            packs.append(_pack(begun))
            begun = []
        begun.append(example)
    return [*packs, _pack(begun)]


def _used(example: Example) -> int:
    """Tokens that a label depends on: all before the last label."""
    return max(at for at, label in enumerate(example.labels) if label != IGNORED)


def _prefix(examples: Sequence[Example]) -> int:
    """Tokens that all begin with and that predict no response."""
    if len(examples) == 1:
        return 0
    first = min(next(at for at, label in enumerate(example.labels) if label != IGNORED) for example in examples)
    rows = [example.input_ids for example in examples]
    pairs = zip(min(rows), max(rows), strict=False)  # what the first and the last in order begin with, all between them do
    return min(next((at for at, (one, other) in enumerate(pairs) if one != other), len(min(rows))), first - 1)


def _tokens(examples: Sequence[Example]) -> int:
    prefix = _prefix(examples)
    return prefix + sum(_used(example) - prefix for example in examples)


def _pack(examples: Sequence[Example]) -> Pack:
    prefix = _prefix(examples)
    input_ids = examples[0].input_ids[:prefix]
    positions, row = list(range(prefix)), [-1] * prefix
    at: list[int] = []
    next_ids: list[int] = []
    for number, example in enumerate(examples):
        used = _used(example)
        for position in range(prefix, used):
            if example.labels[position + 1] != IGNORED:
                at.append(len(input_ids) + position - prefix)
                next_ids.append(example.labels[position + 1])
        input_ids = input_ids + example.input_ids[prefix:used]
        positions += range(prefix, used)
        row += [number] * (used - prefix)
    return Pack(*(torch.tensor(each, dtype=torch.long) for each in (input_ids, positions, row, at, next_ids)))
