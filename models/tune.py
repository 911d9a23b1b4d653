"""Tunes the cores of an adapter with transformers' Trainer: everything else is frozen (arXiv 2311.14030, 3.1)."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers

from ..artifact.errors import ModelError, PloraError, UsageError
from ..artifact.folders import check_new
from ..artifact.plan import ExchangePlan
from ..artifact.shape import check_fits
from ..artifact.strict import canonical_json
from .adapter import Adapter, check_base, make_adapter, read_adapter, write_adapter
from .basis import new_adapter
from .card import card, plan_words
from .checkpoint import Base, read_base, read_tokenizer
from .formula import Cores
from .leaks import Rows, refuse_leaks
from .report import Report
from .rows import Example, read_examples
from .schedule import EVALUATIONS, SAVES, Batches, Schedule, split
from .trainer import CoresTrainer, Tuned
from .tune_config import TuneConfig, default_learning_rate
from .unfinished import Settings, Unfinished

METRICS = "metrics.jsonl"
CARD = "README.md"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; the text says how to go on."""


def tune(config: TuneConfig, report: Report | None = None) -> dict[str, Any]:
    """Writes the tuned adapter to `config.out`, whole or not at all; returns the summary.

    Resumes what an interrupted run with the same settings left beside `config.out`. Raises UsageError, ModelError, DataError,
    PlanError and their children, and Interrupted.
    """
    check_new(config.out, config.replace)
    processes = accelerate.PartialState(cpu=config.device == "cpu")
    report = report if report is not None and processes.is_main_process else Report()
    base = read_base(config.base)
    kept = _kept(config.basis, base) if config.basis is not None else None
    plan = _plan(config, base, kept)
    tokenizer = read_tokenizer(base.source)
    examples, held_out = _rows(config, tokenizer)
    parts = config.accumulate * processes.num_processes
    schedule = Schedule.plan(len(examples), config.batch_size, parts, config.epochs, config.steps, config.seed)
    unfinished = Unfinished.of(config.out)
    arguments = _arguments(config, plan, kept, schedule, unfinished)
    settings = _settings(config, base, plan, kept, schedule, processes.num_processes, arguments.device.type)
    with unfinished.held() if processes.is_main_process else nullcontext():
        goes_on = unfinished.resumable(settings, config.restart)
        processes.wait_for_everyone()  # all have looked before one writes
        if processes.is_main_process and not goes_on:
            unfinished.remove()
            adapter = _start(config, base, plan, kept)
            try:
                unfinished.begin(settings, adapter)
            except OSError as error:
                raise PloraError(f"{error}; nothing is kept: the same command starts anew") from error
        processes.wait_for_everyone()
        return _run(config, base, unfinished, arguments, Batches(examples, schedule), held_out, report)


def _run(
    config: TuneConfig,
    base: Base,
    unfinished: Unfinished,
    arguments: transformers.TrainingArguments,
    batches: Batches,
    held_out: list[Example],
    report: Report,
) -> dict[str, Any]:
    schedule, adapter = batches.schedule, unfinished.start()
    base.model.float()  # cores of 16 bits would lose small updates
    cores = Cores(base.model, adapter, torch.float32)
    every = (config.eval_every or schedule.every(EVALUATIONS), config.save_every or schedule.every(SAVES))
    tuned = Tuned(base.model, cores, base.shape.windows)
    trainer = CoresTrainer(tuned, arguments, adapter, batches, held_out, unfinished, report, *every)
    try:
        checkpoint = unfinished.latest()
        if checkpoint is not None:
            report.note(f"resuming at step {checkpoint[0]} of {schedule.steps}")
        elif held_out:
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(checkpoint[1]) if checkpoint is not None else None)
        summary = _summary(trainer, batches, held_out)
        if trainer.is_world_process_zero():
            metrics = "".join(json.dumps(record) + "\n" for record in [*trainer.records, summary])
            text = card(adapter.config, base.name, config.out.name, summary, arguments.learning_rate, config.calibration is not None)
            write_adapter(cores.tuned(adapter), config.out, config.replace, private={METRICS: metrics}, public={CARD: text})
            unfinished.remove()
        return summary
    except KeyboardInterrupt:
        raise Interrupted(_leave(unfinished, schedule)) from None
    except ModelError:  # the same command would only meet it again
        if trainer.is_world_process_zero():
            unfinished.remove()
        raise
    except OSError as error:  # a full disk, say
        raise PloraError(f"{error}; {_leave(unfinished, schedule)}") from error
    except BaseException:
        _leave(unfinished, schedule)
        raise
    finally:
        report.close()
        cores.remove()


def _leave(unfinished: Unfinished, schedule: Schedule) -> str:
    """Keeps a folder from which a run can go on, and no other; says which."""
    if (checkpoint := unfinished.latest()) is None:
        unfinished.remove()
        return "nothing saved yet: the same command starts anew"
    return f"saved up to step {checkpoint[0]} of {schedule.steps}: the same command resumes there"


def _plan(config: TuneConfig, base: Base, kept: Adapter | None) -> ExchangePlan:
    if kept is not None:
        plan = kept.config.plan
    else:
        assert config.plan is not None  # TuneConfig checked it
        plan = config.plan(base.shape.layers)
    if not plan.cores:
        raise UsageError("the plan adapts no layer: there is nothing to tune")
    check_fits(plan, base.shape)
    return plan


def _kept(basis: Path, base: Base) -> Adapter:
    """The adapter whose plan, basis and scale are kept."""
    given = read_adapter(basis)
    check_base(given, base.fingerprint, base.name)
    return given


def _start(config: TuneConfig, base: Base, plan: ExchangePlan, kept: Adapter | None) -> Adapter:
    """The adapter with cores of zero."""
    if kept is None:
        base.model.float()
        return new_adapter(base, plan, config.basis_kind, config.scale, config.seed, config.calibration, config.features_seed)
    its = kept.config
    same = (its.scale, its.basis_kind, its.seed, its.base, its.base_name)
    return make_adapter(its.plan, base.shape, kept.basis, *same, config.features_seed)


def _rows(config: TuneConfig, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """(to train on, held out). Raises DataError for rows of a held-out file that are trained on."""
    examples = read_examples(config.data, tokenizer, config.max_tokens)
    if config.held_out_share is not None:
        return split(examples, config.held_out_share, config.seed)
    if config.held_out is None:
        return examples, []
    held_out = read_examples(config.held_out, tokenizer, config.max_tokens)
    refuse_leaks(Rows.of(config.data), Rows.of(config.held_out))
    return examples, held_out


def _arguments(
    config: TuneConfig, plan: ExchangePlan, kept: Adapter | None, schedule: Schedule, unfinished: Unfinished
) -> transformers.TrainingArguments:
    kind = config.basis_kind if kept is None else kept.config.basis_kind
    arguments = transformers.TrainingArguments(
        output_dir=str(unfinished.writing),
        per_device_train_batch_size=1,  # an item is a whole batch
        gradient_accumulation_steps=config.accumulate,
        max_steps=schedule.steps,
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate or default_learning_rate(plan, kind),
        lr_scheduler_type="linear",
        warmup_steps=schedule.warmup_steps,
        max_grad_norm=1.0,
        weight_decay=0.0,
        optim="adamw_torch",
        seed=config.seed,
        data_seed=config.seed,
        save_strategy="no",  # when to save, evaluate and log is said in trainer.py
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it hides what we refuse
        report_to=[],
        remove_unused_columns=False,
        use_cpu=config.device == "cpu",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # A, B and P never change
    )
    if arguments.n_gpu > 1:  # of one process: hooks do not survive DataParallel; more devices take more processes
        arguments._n_gpu = 1
    return arguments


def _settings(
    config: TuneConfig, base: Base, plan: ExchangePlan, kept: Adapter | None, schedule: Schedule, processes: int, device: str
) -> Settings:
    """What two commands must share for one to resume the other, by the names that the user knows."""
    fresh = kept is None
    return {
        "BASE": base.fingerprint[:16],
        "--data": _hash(config.data),
        "plan": f"{plan_words(plan)} ({hashlib.sha256(canonical_json(plan)).hexdigest()[:8]})",
        "--basis": None if kept is None else kept.config.basis[:16],
        "--basis-kind": config.basis_kind if fresh else None,
        "--calibration": _hash(config.calibration),
        "--scale": config.scale if fresh else None,
        "steps": schedule.steps,
        "--batch-size": schedule.batch_size,
        "--accumulate": config.accumulate,
        "processes": processes,
        "device": device,
        "--learning-rate": config.learning_rate,
        "--seed": config.seed,
        "features seed": config.features_seed,
        "--max-tokens": config.max_tokens,
        "--held-out": _hash(config.held_out),
        "--held-out-share": config.held_out_share,
        "--eval-every": config.eval_every,
    }


def _hash(path: Path | None) -> str | None:
    return None if path is None else f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}" if path.is_file() else str(path)


def _summary(trainer: CoresTrainer, batches: Batches, held_out: list[Example]) -> dict[str, Any]:
    """train_loss, train_accuracy: over the last steps that were recorded."""
    trained = [record for record in trainer.records if "loss" in record][-1]
    summary = {
        "steps": trainer.steps,
        "seconds": round(trainer.seconds, 1),
        "train_loss": trained["loss"],
        "train_accuracy": trained["accuracy"],
        "parameters": sum(core.numel() for core in trainer.adapter.cores.values()),
        "rows": len(batches.examples),
        "held_out_rows": len(held_out),
    }
    if held_out:
        evaluated = [record for record in trainer.records if "held_out_loss" in record][-1]
        summary |= {name: evaluated[name] for name in ("held_out_loss", "held_out_accuracy")}
    return summary
