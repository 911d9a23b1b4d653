"""One training run: the loss, optimizer and schedule of plora-tune, for anything that can be attached to the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from plora.artifact.errors import ModelError
from plora.models.packing import Pack, pack
from plora.models.schedule import Schedule
from plora.models.short_tune import short_tune
from plora.models.trainer import Tuned

from .methods import Attached
from .tasks import Group, Task

PACK_TOKENS = 512
"""Attention costs the square of a sequence: on a CPU shorter ones are faster, though they repeat the prefix."""


def mixed(model: Any, products: str) -> AbstractContextManager[Any]:
    """products: "fp32"; or "bf16", torch's mixed precision: bf16 numbers, sums in fp32; the rest and what is trained stay in fp32."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=products == "bf16")


class Mixed(Tuned):
    """Tuned with products as `mixed` says."""

    products = "fp32"

    def forward(self, packs: list[Pack]) -> dict[str, Tensor]:
        with mixed(self.model, self.products):
            return super().forward(packs)


def packs_of(groups: Sequence[Group]) -> list[Pack]:
    """Rows that share a prompt lie together, and their prompt is computed once; single rows share sequences."""
    if all(len(group) == 1 for group in groups):
        return pack(sorted((group[0] for group in groups), key=lambda row: len(row.input_ids)), PACK_TOKENS)
    return [each for group in groups for each in pack(list(group), PACK_TOKENS)]


def batches(task: Task, steps: int, seed: int) -> list[list[Group]]:
    """What each step reads: by the seed alone, whatever the method."""
    schedule = Schedule.plan(len(task.train), task.groups, 1, 1.0, steps, seed)
    return [[task.train[at] for at in schedule.of_step(step)] for step in range(steps)]


def train(
    model: Any,
    attached: Attached,
    windows: tuple[int, ...],
    steps: Sequence[Sequence[Group]],
    rate: float,
    products: str,
    tell: Callable[[str], None],
) -> float:
    """Mean loss per response token over the last quarter of the steps; NaN once a loss is not finite, and the run ends there.

    products: as `mixed` takes it.
    """
    losses: list[float] = []

    def told(step: int, loss: float) -> None:
        losses.append(loss)
        tell(f"step {step}/{len(steps)}: loss {loss:.3f}")

    tuned = Mixed(model, attached, windows)  # pyright: ignore[reportArgumentType]  it only keeps the module
    tuned.products = products
    try:
        short_tune(tuned, (packs_of(groups) for groups in steps), len(steps), rate, told)
    except ModelError:
        return math.nan
    last = losses[len(steps) * 3 // 4 :]
    return sum(last) / len(last)
