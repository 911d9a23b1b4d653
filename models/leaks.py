"""Held-out rows that are trained on measure memory: found before anything is trained, and refused by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import DataError
from .rows import Message, Said, read_rows, said

NAMED = 8
"""Pairs of rows that a message names; it counts the rest."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a file. numbers: of each in the file, from 1; messages: what each says, in the same order."""

    path: Path
    numbers: Sequence[int]
    messages: Sequence[list[Message]]

    @classmethod
    def of(cls, path: Path, numbers: Sequence[int] | None = None) -> Rows:
        """The rows of a file, or those of these numbers. Raises as rows.read_rows."""
        every = read_rows(path)
        numbers = range(1, len(every) + 1) if numbers is None else numbers
        return cls(path, numbers, [every[number - 1] for number in numbers])


def refuse_leaks(trained: Rows, held_out: Rows, prompts: bool = False) -> None:
    """Raises DataError naming the rows that both have, told apart neither by white space nor by case. prompts: those with the same
    prompt too, whatever they answer; the prompt is all before the last response."""
    trained_on: dict[Said, int] = {}
    for number, messages in zip(trained.numbers, trained.messages, strict=True):
        trained_on.setdefault(_said(messages, prompts), number)
    pairs = [
        (trained_on[its], number)
        for number, messages in zip(held_out.numbers, held_out.messages, strict=True)
        if (its := _said(messages, prompts)) in trained_on
    ]
    if not pairs:
        return
    named = ", ".join(f"row {number} is row {other} of {trained.path}" for other, number in pairs[:NAMED])
    more = f", and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    what = "prompts" if prompts else "rows"
    raise DataError(
        f"{held_out.path}: {len(pairs)} of {len(held_out.messages)} held-out {what} are trained on: {named}{more}; take them out of one "
        "of the two"
    )


def _said(messages: list[Message], prompts: bool) -> Said:
    return said(messages[:-1] if prompts else messages)
