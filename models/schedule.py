"""Which rows a run reads, and when: by the seed alone, whatever the number of processes, and so the same after a resume."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import Dataset

from ..artifact.errors import UsageError
from .packing import pack
from .rows import Example

WARMUP_STEPS = 5
WARMUP_SHARE = 0.05
RECORDS = 20
EVALUATIONS = 4
SAVES = 10
"""Of a run, unless --eval-every or --save-every say otherwise."""


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(to train on, held out): `share` of the rows, at least one, chosen by the seed, and all rows whose prompt one of them has, as
    `leaks` compares prompts: one that is trained on measures memory. Raises UsageError if none is left."""
    count = max(1, round(share * len(examples)))
    chosen = random.Random(f"{seed} held out").sample(range(len(examples)), min(count, len(examples)))
    prompts = {examples[at].prompt for at in chosen}
    kept = [each for each in examples if each.prompt not in prompts]
    held_out = [each for each in examples if each.prompt in prompts]
    if not kept:
        raise UsageError(f"--held-out-share {share} of {len(examples)} rows with {len(prompts)} prompts leaves none to train on")
    return kept, held_out


@dataclass(frozen=True)
class Schedule:
    """steps: of the optimizer, each reading `parts` batches of `batch_size` rows (parts: processes · accumulation).

    Every step is full: the last one reads on into the next pass over the data.
    """

    rows: int
    batch_size: int
    parts: int
    steps: int
    seed: int

    @classmethod
    def plan(cls, rows: int, batch_size: int, parts: int, epochs: float, steps: int | None, seed: int) -> Schedule:
        """steps: None for `epochs` passes over the rows. A step never reads more rows than there are."""
        batch_size = min(batch_size, max(1, rows // parts))
        return cls(rows, batch_size, parts, steps or max(1, math.ceil(epochs * rows / (batch_size * parts))), seed)

    def of_step(self, step: int) -> list[int]:
        """Indices of the rows that a step (from 0) reads."""
        size = self.batch_size * self.parts
        return [_order(self.rows, self.seed, at // self.rows)[at % self.rows] for at in range(step * size, (step + 1) * size)]

    @property
    def warmup_steps(self) -> int:
        return warmup_of(self.steps)

    def every(self, times: int) -> int:
        """Steps between events of which a run has about `times`."""
        return max(1, round(self.steps / times))


def warmup_of(steps: int) -> int:
    """Of a run of so many steps."""
    return min(max(WARMUP_STEPS, math.ceil(WARMUP_SHARE * steps)), steps // 2)


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed} epoch {epoch}").shuffle(order)
    return order


class Batches(Dataset[dict[str, Any]]):
    """The whole run, one item per batch; a step's batches lie together, and each has its share of the step's long rows."""

    def __init__(self, examples: Sequence[Example], schedule: Schedule) -> None:
        self.examples = examples
        self.schedule = schedule

    def __len__(self) -> int:
        return self.schedule.steps * self.schedule.parts

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, part = divmod(index, self.schedule.parts)
        rows = sorted((self.examples[at] for at in self.schedule.of_step(step)), key=lambda each: len(each.input_ids))
        packs = pack(rows[part :: self.schedule.parts])
        return {"packs": packs, "labels": torch.cat([each.next_ids for each in packs])}

    def numbers(self, step: int) -> list[int]:
        """Numbers in the file of the rows that a step reads."""
        return sorted({self.examples[at].row for at in self.schedule.of_step(step)})
