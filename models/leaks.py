"""Held-out rows that are trained on measure memory: found before anything is trained, and refused by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import DataError
from .rows import Message, read_rows

NAMED = 8
"""Pairs of rows that a message names; it counts the rest."""
Key = tuple[tuple[str, str], ...]


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
    said: dict[Key, int] = {}
    for number, messages in zip(trained.numbers, trained.messages, strict=True):
        said.setdefault(_key(messages, prompts), number)
    pairs = [
        (said[key], number)
        for number, messages in zip(held_out.numbers, held_out.messages, strict=True)
        if (key := _key(messages, prompts)) in said
    ]
    if not pairs:
        return
    named = ", ".join(f"row {number} is row {trained_on} of {trained.path}" for trained_on, number in pairs[:NAMED])
    more = f", and {len(pairs) - NAMED} more" if len(pairs) > NAMED else ""
    what = "prompts" if prompts else "rows"
    raise DataError(
        f"{held_out.path}: {len(pairs)} of {len(held_out.messages)} held-out {what} are trained on: {named}{more}; take them out of one "
        "of the two"
    )


def _key(messages: list[Message], prompts: bool) -> Key:
    counted = messages[:-1] if prompts else messages
    return tuple((message["role"], " ".join(message["content"].split()).casefold()) for message in counted)
