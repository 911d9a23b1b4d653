"""Tunes the cores of an adapter with transformers' Trainer: everything else is frozen (arXiv 2311.14030, 3.1)."""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..artifact.errors import ModelError, UsageError
from ..artifact.folders import check_new
from ..artifact.plan import ExchangePlan, require_runnable
from .adapter import Adapter, Cores, check_base, make_adapter, read_adapter, write_adapter
from .basis import new_adapter
from .checkpoint import Base, read_base, read_tokenizer
from .rows import IGNORED, Example, read_rows, tokenize

METRICS = "metrics.jsonl"
LEARNING_RATES = {"random": 1e-2, "svd": 1e-2, "imported": 1e-2}
"""Peak rates. 1e-2 tuned the demo's persona (docs/tuning.md); it is not the outcome of a sweep."""


@dataclass(frozen=True)
class TuneConfig:
    """base: folder, hub id or GGUF; basis: an adapter folder whose basis to keep, None for a fresh one of `basis_kind`;
    plan: from the number of layers, for a fresh one; steps: None for `epochs` over the data; learning_rate: peak, None for the
    basis' default; max_tokens: longest row; held_out: rows to evaluate on at the end."""

    base: str
    data: Path
    out: Path
    plan: Callable[[int], ExchangePlan] | None = None
    basis: Path | None = None
    basis_kind: str = "random"
    scale: float = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    learning_rate: float | None = None
    seed: int = 0
    max_tokens: int = 512
    held_out: Path | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.basis is None):
            raise UsageError("either a plan for a fresh basis or --basis DIR, which brings its plan, not both")
        positive = {"--epochs": self.epochs, "--batch-size": self.batch_size, "--scale": self.scale, "--max-tokens": self.max_tokens}
        if self.steps is not None:
            positive["--steps"] = self.steps
        if self.learning_rate is not None:
            positive["--learning-rate"] = self.learning_rate
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        for name, value in positive.items():
            if not value > 0 or not math.isfinite(value):
                raise UsageError(f"{name} {value}: expected more than 0")


def tune(config: TuneConfig, say: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Writes the tuned adapter to `config.out`, whole or not at all; returns the summary. `say` is told each log record.

    Raises UsageError, ModelError, DataError, PlanError and their children.
    """
    check_new(config.out, config.replace)
    base = read_base(config.base)
    tokenizer = read_tokenizer(base.source)
    adapter = _start(config, base)
    examples = _examples(config.data, tokenizer, config.max_tokens)
    held_out = _examples(config.held_out, tokenizer, config.max_tokens) if config.held_out else None
    base.model.float()  # cores of 16 bits would lose small updates
    torch.manual_seed(config.seed)
    cores = Cores(base.model, adapter, torch.float32)
    base.model.plora_cores = cores  # a submodule, so that the Trainer finds what to train
    with tempfile.TemporaryDirectory() as scratch:
        records: list[dict[str, Any]] = []
        trainer = _trainer(config, adapter, base.model, tokenizer, examples, held_out, scratch, lambda r: (records.append(r), say(r)))
        began = time.monotonic()
        result = trainer.train()
        if not math.isfinite(result.training_loss):
            raise ModelError(f"the loss is {result.training_loss} after {result.global_step} steps; lower --learning-rate")
        summary = {
            "steps": result.global_step,
            "seconds": round(time.monotonic() - began, 1),
            "train_loss": result.training_loss,
            "parameters": sum(core.numel() for core in adapter.cores.values()),
            "rows": len(examples),
        }
        if held_out is not None:
            summary["held_out_loss"] = trainer.evaluate()["eval_loss"]
        tuned = cores.tuned(adapter)
        metrics = "".join(json.dumps(record) + "\n" for record in [*records, summary])
        write_adapter(tuned, config.out, config.replace, {METRICS: metrics})
    return summary


def _start(config: TuneConfig, base: Base) -> Adapter:
    """The adapter with cores of zero."""
    if config.basis is None:
        assert config.plan is not None  # TuneConfig checked it
        plan = config.plan(base.shape.layers)
        require_runnable(plan)
        return new_adapter(base, plan, config.basis_kind, config.scale, config.seed)
    given = read_adapter(config.basis)
    check_base(given, base.fingerprint, base.name)
    kept = given.config
    return make_adapter(kept.plan, base.shape, given.basis, kept.scale, kept.basis_kind, kept.seed, kept.base, kept.base_name)


def _examples(path: Path, tokenizer: Any, max_tokens: int) -> list[Example]:
    return [tokenize(row, tokenizer, max_tokens, f"{path}, row {number}") for number, row in enumerate(read_rows(path), 1)]


def _trainer(
    config: TuneConfig,
    adapter: Adapter,
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    held_out: list[Example] | None,
    scratch: str,
    say: Callable[[dict[str, Any]], Any],
) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        num_train_epochs=config.epochs,
        max_steps=config.steps or -1,
        learning_rate=config.learning_rate or LEARNING_RATES[adapter.config.basis_kind],
        lr_scheduler_type="linear",
        warmup_steps=5,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=5,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,  # the adapter's hooks hold A and B where the model was loaded
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=_Rows(examples),
        eval_dataset=_Rows(held_out) if held_out is not None else None,
        data_collator=_Collator(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        callbacks=[_Say(say)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class _Rows(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class _Collator:
    """Pads on the right; padding is attended by nobody before it and counted by no loss."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, examples: list[Example]) -> dict[str, Tensor]:
        longest = max(len(example.input_ids) for example in examples)
        return {
            "input_ids": torch.tensor([e.input_ids + [self.pad] * (longest - len(e.input_ids)) for e in examples]),
            "labels": torch.tensor([e.labels + [IGNORED] * (longest - len(e.labels)) for e in examples]),
            "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]),
        }


class _Say(transformers.TrainerCallback):
    """Passes each log record on, and stops at a loss that is no number."""

    def __init__(self, say: Callable[[dict[str, Any]], Any]) -> None:
        self.say = say

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.say({"step": state.global_step, "of": state.max_steps, "loss": loss, "learning_rate": float(logs["learning_rate"])})
        if not math.isfinite(loss):
            raise ModelError(f"the loss is {loss} at step {state.global_step}; lower --learning-rate or look at the rows")
