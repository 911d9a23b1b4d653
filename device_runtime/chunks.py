"""Cuts what is to be fed into steps: as few as go, or all of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

CHUNK_TOKENS = 128
"""Of a prompt per step: as fast in the cloud as twice as many, and the first chunk is computed while the second is on its way up."""


@dataclass(frozen=True)
class Chunk:
    """One step. ids: T tokens from `position` on, the last `padding` of them no tokens of the conversation; exit_rows: to ask for;
    wanted: of the rows that are no padding, so many at the end."""

    position: int
    ids: list[int]
    exit_rows: int
    wanted: int
    padding: int = 0

    @property
    def stop(self) -> int:
        """Tokens of the conversation once the step is done."""
        return self.position + len(self.ids) - self.padding


def chunks(first: int, tokens: list[int], wanted: int, most: int, every_row: bool) -> Iterator[Chunk]:
    """Steps of at most `most` tokens for tokens[first:]; rows from token `wanted` on are of use, and all are asked for if `every_row`."""
    for start in range(first, len(tokens), most):
        ids = tokens[start : start + most]
        useful = min(len(ids), max(0, start + len(ids) - wanted))
        yield Chunk(start, ids, len(ids) if every_row else useful, useful)


def aligned_chunks(first: int, tokens: list[int], wanted: int, bucket: int, every_row: bool) -> Iterator[Chunk]:
    """Steps of exactly `bucket` tokens, each from a multiple of it: the first goes back to where its bucket begins, the last is padded."""
    for start in range(first // bucket * bucket, len(tokens), bucket):
        ids = tokens[start : start + bucket]
        padding = bucket - len(ids)
        useful = min(len(ids), max(0, start + len(ids) - wanted))
        yield Chunk(start, ids + [0] * padding, bucket if every_row else useful + padding if useful else 0, useful, padding)
