"""transformers' Trainer for cores: logits where a response is predicted and nowhere else, checkpoints of the cores alone."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn

from ..artifact.errors import ModelError, first_line
from ..artifact.manifest import read_json
from ..artifact.names import CORES
from .adapter import Adapter, read_cores, write_cores
from .formula import Cores
from .packing import Pack, pack
from .report import Report
from .rows import Example
from .schedule import RECORDS, Batches
from .unfinished import Unfinished

PROGRESS = "progress.json"


class Tuned(nn.Module):
    """A frozen base with the adapter's hooks, as the Trainer and DistributedDataParallel call it."""

    accepts_loss_kwargs = True
    """Tells the Trainer that the loss is divided by the tokens of the whole step, on all devices."""

    def __init__(self, model: Any, cores: Cores, windows: tuple[int, ...]) -> None:
        super().__init__()
        self.model = model
        self.cores = cores
        self.windows = windows

    def forward(self, packs: list[Pack]) -> dict[str, Tensor]:
        """loss: sum of the response tokens' cross entropies, with gradient; right: how many of them have the largest logit."""
        loss = torch.zeros((), device=self.model.lm_head.weight.device)
        right = torch.zeros_like(loss)
        for each in packs:
            hidden = self.model.model(
                input_ids=each.input_ids[None], attention_mask=self._masks(each), position_ids=each.positions[None], use_cache=False
            ).last_hidden_state[0]
            logits = self.model.lm_head(hidden[each.at]).float()
            loss = loss + nn.functional.cross_entropy(logits, each.next_ids, reduction="sum")
            right = right + (logits.detach().argmax(-1) == each.next_ids).sum()
        return {"loss": loss, "right": right}

    def train(self, mode: bool = True) -> Tuned:
        """The base stays in eval mode: a dropout of its own would train another formula than the one that is exported."""
        super().train(mode)
        self.model.eval()
        return self

    def _masks(self, each: Pack) -> Any:
        """One mask if all layers attend alike; else by the name that transformers gives to each kind of layer."""
        if len(set(self.windows)) == 1:
            return each.mask(self.windows[0])
        return {"full_attention": each.mask(0), "sliding_attention": each.mask(max(self.windows))}


class CoresTrainer(transformers.Trainer):
    """evaluates on `held_out`; tells `report` every metric; keeps its checkpoints in `unfinished`.

    Raises ModelError at the step whose loss or gradient is not finite.
    """

    def __init__(
        self,
        tuned: Tuned,
        arguments: transformers.TrainingArguments,
        adapter: Adapter,
        batches: Batches,
        held_out: list[Example],
        unfinished: Unfinished,
        report: Report,
        eval_every: int,
        save_every: int,
    ) -> None:
        steps = batches.schedule.steps
        pace = _Pace(self, batches.schedule.every(RECORDS), eval_every if held_out else 0, save_every, steps)
        super().__init__(model=tuned, args=arguments, train_dataset=batches, data_collator=_only, callbacks=[pace])
        self.remove_callback(transformers.PrinterCallback)
        self.tuned = tuned
        self.adapter = adapter
        self.batches = batches
        self.held_out = sorted(held_out, key=lambda each: len(each.input_ids))
        self.unfinished = unfinished
        self.report = report
        self.steps = steps
        self.records: list[dict[str, Any]] = []
        self.sums = [0.0, 0.0, 0.0]  # since the last record: loss, right, response tokens
        self.seconds_before = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Spent on this run, earlier sittings included."""
        return self.seconds_before + time.monotonic() - self.began

    # Loss

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Mean over the response tokens of the whole step: all accumulated batches, all processes."""
        out = model(inputs["packs"])
        self.sums = [a + float(b) for a, b in zip(self.sums, (out["loss"].detach(), out["right"], len(inputs["labels"])), strict=True)]
        tokens = len(inputs["labels"]) if num_items_in_batch is None else num_items_in_batch
        loss = out["loss"] / tokens * self.accelerator.num_processes  # processes average their gradients
        return (loss, out) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        losses = cast(Tensor, self.accelerator.gather(loss.reshape(1))) if self.accelerator.num_processes > 1 else loss
        self.refuse_unless_finite("loss", float(losses.sum()))
        return loss

    def refuse_unless_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        rate = float(cast(Any, self.optimizer).param_groups[0]["lr"])
        numbers = self.batches.numbers(self.state.global_step)
        rows = ", ".join(map(str, numbers[:32])) + (f" and {len(numbers) - 32} more" if len(numbers) > 32 else "")
        raise ModelError(
            f"the {what} is {value} at step {self.state.global_step + 1} of {self.steps} (learning rate {rate:.2e}, rows {rows}); "
            "lower --learning-rate or look at these rows"
        )

    # Metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            loss, right, tokens = self._over_processes(self.sums)
            self.sums = [0.0, 0.0, 0.0]
            self._record({"loss": loss / tokens, "accuracy": right / tokens, "learning_rate": logs["learning_rate"]})
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluate(self, *args: Any, **keywords: Any) -> dict[str, float]:
        """Loss per response token and token accuracy on the held-out rows, shared out among the processes."""
        size, state = self.batches.schedule.batch_size, self.accelerator
        sums = [0.0, 0.0, 0.0]
        self.tuned.eval()
        for at in range(state.process_index * size, len(self.held_out), state.num_processes * size):
            packs = [each.to(self.args.device) for each in pack(self.held_out[at : at + size])]
            out = self.tuned(packs)
            sums = [a + float(b) for a, b in zip(sums, (out["loss"], out["right"], sum(len(p.at) for p in packs)), strict=True)]
        loss, right, tokens = self._over_processes(sums)
        if not math.isfinite(loss):
            raise ModelError(f"the held-out loss is {loss} after step {self.state.global_step}; lower --learning-rate")
        metrics = {"held_out_loss": loss / tokens, "held_out_accuracy": right / tokens}
        self._record(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _over_processes(self, sums: list[float]) -> list[float]:
        if self.accelerator.num_processes == 1:
            return sums
        return cast(Tensor, self.accelerator.reduce(torch.tensor(sums, device=self.args.device), "sum")).tolist()

    def _record(self, metrics: dict[str, float]) -> None:
        record = {"step": self.state.global_step, "of": self.steps, **metrics}
        self.records.append(record)
        self.report.metric(record)

    # Checkpoints: optimizer, scheduler, random numbers and the Trainer's own state are the Trainer's

    def _save_checkpoint(self, *args: Any, **keywords: Any) -> None:
        """Raises OSError where it cannot be written; torch.save has an error of its own for that."""
        try:
            super()._save_checkpoint(*args, **keywords)
        except RuntimeError as error:
            raise OSError(
                f"{self.unfinished.writing}: the checkpoint cannot be written ({first_line(error)}); is the disk full?"
            ) from error

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        write_cores(self.tuned.cores.tuned(self.adapter), folder / CORES)
        (folder / PROGRESS).write_text(json.dumps({"seconds": self.seconds, "records": self.records}), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        with torch.no_grad():
            for name, core in read_cores(folder / CORES, self.adapter.config).items():
                self.tuned.cores.core(name).copy_(core)
        progress = read_json(folder / PROGRESS)
        self.records, self.seconds_before = progress["records"], progress["seconds"]


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The schedule has made the batch already."""
    (item,) = items
    return item


class _Pace(transformers.TrainerCallback):
    """When to record, evaluate (0: never) and save, in steps; the last step does all three."""

    def __init__(self, trainer: CoresTrainer, log_every: int, eval_every: int, save_every: int, steps: int) -> None:
        self.trainer = trainer
        self.log_every = log_every
        self.eval_every = eval_every
        self.save_every = save_every
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        step, last = state.global_step, state.global_step == self.steps
        control.should_save = last or step % self.save_every == 0
        control.should_log = control.should_save or step % self.log_every == 0  # a checkpoint leaves no sum open
        control.should_evaluate = self.eval_every > 0 and (last or step % self.eval_every == 0)
        self.trainer.report.advance(step, self.steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        gradients = [core.grad for core in self.trainer.tuned.cores.parameters() if core.grad is not None]
        self.trainer.refuse_unless_finite("gradient's norm", float(torch.nn.utils.get_total_norm(gradients)))

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            self.trainer.unfinished.commit(state.global_step)
