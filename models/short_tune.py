"""A tune that leaves no folder: for calibrations and studies, with the optimizer and the schedule of plora-tune (a test compares cores).

AdamW without weight decay, gradient norm clipped at 1, a warm-up, then linear decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import transformers
from torch import nn

from ..artifact.errors import ModelError
from .packing import Pack, pack
from .rows import Example
from .schedule import warmup_of
from .trainer import Tuned


def short_tune(tuned: Tuned, batches: Iterable[Sequence[Pack]], steps: int, rate: float, told: Callable[[int, float], None]) -> None:
    """Trains `tuned.cores`, one step for each of the `steps` batches. rate: peak; told: each step, from 1, and its loss per response token.

    Raises ModelError at the step whose loss is not finite.
    """
    trained = [parameter for parameter in tuned.cores.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    pace = transformers.get_linear_schedule_with_warmup(optimizer, warmup_of(steps), steps)
    device = next(tuned.model.parameters()).device
    tuned.train()
    for step, packs in enumerate(batches, 1):
        tokens, total = sum(len(each.at) for each in packs), 0.0
        optimizer.zero_grad(set_to_none=True)
        for each in packs:  # one at a time: memory for the activations of one sequence
            loss = tuned([each.to(device)])["loss"] / tokens
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise ModelError(f"the loss is {total} at step {step} of {steps}, learning rate {rate:g}")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        pace.step()
        told(step, total)


@torch.no_grad()
def held_out_loss(tuned: Tuned, held_out: Sequence[Example], size: int) -> float:
    """Per response token. size: rows at a time. Raises ModelError where it is not finite."""
    tuned.eval()
    device = next(tuned.model.parameters()).device
    rows = sorted(held_out, key=lambda each: len(each.input_ids))
    loss, tokens = 0.0, 0
    for at in range(0, len(rows), size):
        packs = [each.to(device) for each in pack(rows[at : at + size])]
        loss += float(tuned(packs)["loss"])
        tokens += sum(len(each.at) for each in packs)
    if not math.isfinite(loss):
        raise ModelError(f"the held-out loss is {loss} over {len(rows)} rows; look at these rows")
    return loss / tokens
