"""One short tune as plora-tune would run it: AdamW without weight decay, gradient norm clipped at 1, a warm-up, then linear decay.

For cores, and for the control: a constant vector at every target's output, which knows neither the token nor what was said before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact.errors import ModelError
from ..artifact.plan import TARGETS
from ..artifact.shape import DecoderShape
from ..models.formula import target_projection
from ..models.packing import pack
from ..models.rows import Example
from ..models.schedule import Batches
from ..models.trainer import Tuned

CONTROL_LEARNING_RATE = 1e-2
"""Peak rate of the control's vectors."""


class Biases(nn.Module):
    """The control: y_t = W_t x_t + b_t for every linear projection of every layer, `[out]` each, from zero."""

    def __init__(self, model: Any, shape: DecoderShape) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self.vectors = nn.ParameterDict()
        self.handles: list[Any] = []
        for index, layer in enumerate(model.model.layers):
            for target in TARGETS:
                vector = nn.Parameter(torch.zeros(shape.out_features(target), device=device))
                self.vectors[f"{index}_{target}"] = vector
                self.handles.append(target_projection(layer, target).register_forward_hook(self._add(vector)))

    @staticmethod
    def _add(vector: Tensor) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + vector

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def short_tune(tuned: Tuned, batches: Batches, held_out: list[Example], learning_rate: float, advance: Callable[[], None]) -> float:
    """Held-out loss per response token after the schedule's steps. advance: told after each.

    Raises ModelError where a loss is not finite.
    """
    parameters = list(tuned.cores.parameters())
    schedule = batches.schedule
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    warm_up, steps = schedule.warmup_steps, schedule.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / max(1, warm_up) if step < warm_up else (steps - step) / max(1, steps - warm_up)
    )
    tuned.train()
    for step in range(steps):
        item = batches[step]
        loss = tuned(item["packs"])["loss"] / len(item["labels"])
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"the loss is {value} at step {step + 1} of {steps}, rows {batches.numbers(step)}; look at these rows")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        advance()
    return held_out_loss(tuned, held_out, schedule.batch_size)


@torch.no_grad()
def held_out_loss(tuned: Tuned, held_out: list[Example], size: int) -> float:
    """Per response token. size: rows at a time. Raises ModelError where it is not finite."""
    tuned.eval()
    rows = sorted(held_out, key=lambda each: len(each.input_ids))
    loss, tokens = 0.0, 0
    for at in range(0, len(rows), size):
        packs = pack(rows[at : at + size])
        loss += float(tuned(packs)["loss"])
        tokens += sum(len(each.at) for each in packs)
    if not math.isfinite(loss):
        raise ModelError(f"the held-out loss is {loss} over {len(rows)} rows; look at these rows")
    return loss / tokens
