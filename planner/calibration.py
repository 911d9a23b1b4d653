"""Short tunes of a few plans on the user's rows, kept in a file as they are made: the same command goes on where it stopped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..artifact.errors import DamagedFile, ModelError, UsageError
from ..artifact.folders import new_file
from ..artifact.manifest import read_json, write_json
from ..artifact.plan import ExchangePlan
from ..artifact.plans import QKV
from ..artifact.shape import DecoderShape
from ..artifact.strict import canonical_json, decode, plain
from ..models.checkpoint import Base, read_base, read_tokenizer
from ..models.control import StaticBias
from ..models.formula import Cores
from ..models.leaks import Rows, refuse_leaks
from ..models.report import Report
from ..models.rows import Example, read_examples
from ..models.schedule import Batches, Schedule, split
from ..models.short_tune import held_out_loss, short_tune
from ..models.trainer import Tuned
from ..models.tune_config import default_learning_rate
from ..models.unfinished import Unfinished
from .basis_pool import KIND, BasisPool
from .candidates import Candidate
from .quality import CONTROL

CONTROL_LEARNING_RATE = 1e-2
"""Peak rate of the control's vectors."""
CONTROL_TARGETS = QKV
"""Where they are added: as the study's control (docs/quality.md)."""
CALMER = 3.0
"""By which the rate of a tune that diverges is divided."""
FORMAT = "plora-calibration"
VERSION = 2
"""2: says which tunes were wanted; the control is at q, k, v."""


@dataclass(frozen=True)
class CalibrationConfig:
    """data: rows; held_out: rows of their own, or held_out_share of the data by the seed; steps, batch_size: of each tune; max_tokens:
    longest row. Raises UsageError."""

    data: Path
    held_out: Path | None = None
    held_out_share: float = 0.2
    steps: int = 40
    batch_size: int = 8
    max_tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out_share < 0.5:
            raise UsageError(f"--held-out-share {self.held_out_share}: expected more than 0 and less than 0.5")
        for flag, value in (("--calibration-steps", self.steps), ("--batch-size", self.batch_size), ("--max-tokens", self.max_tokens)):
            if value < 1:
                raise UsageError(f"{flag} {value}: expected at least 1")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Loss:
    """candidate: None for the control; learning_rate: the one used; held_out_loss: per response token, after the tune."""

    name: str
    candidate: Candidate | None
    learning_rate: float
    held_out_loss: float


@dataclass(frozen=True)
class Calibration:
    """The file. key: hash of base, data and settings; sizes: of the base, for those who have it not loaded; wanted: names of all tunes,
    of which `losses` has those that are done."""

    format: str
    version: int
    key: str
    base_name: str
    sizes: tuple[int, ...]
    steps: int
    rows: int
    held_out_rows: int
    wanted: tuple[str, ...]
    losses: tuple[Loss, ...]

    @property
    def control(self) -> float | None:
        return next((each.held_out_loss for each in self.losses if each.candidate is None), None)

    @property
    def missing(self) -> list[str]:
        done = {each.name for each in self.losses}
        return [name for name in self.wanted if name not in done]

    @property
    def by_candidate(self) -> dict[Candidate, float]:
        return {each.candidate: each.held_out_loss for each in self.losses if each.candidate is not None}


def sizes(shape: DecoderShape) -> tuple[int, ...]:
    return shape.layers, shape.hidden, shape.intermediate, shape.query_width, shape.kv_width, shape.vocabulary


def read_calibration(path: Path, shape: DecoderShape) -> Calibration:
    """Raises MissingFile, DamagedFile, ManifestError, and UsageError for one of another base's sizes, or one that is not done."""
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DamagedFile(f"{path}: no calibration; plora-plan --data makes one beside its --out")
    if value.get("version") != VERSION:
        raise DamagedFile(f"{path}: a calibration of version {value.get('version')}, expected {VERSION}; calibrate anew with --data")
    found = decode(Calibration, value, str(path))
    if found.sizes != sizes(shape):
        raise UsageError(
            f"{path}: calibrated on {found.base_name}, whose sizes are {list(found.sizes)}, not {list(sizes(shape))}; calibrate anew"
        )
    if found.missing:
        raise UsageError(
            f"{path}: {len(found.wanted) - len(found.missing)} of {len(found.wanted)} tunes are there; run the command that made it again "
            "to finish"
        )
    if found.control is None:
        raise UsageError(f"{path}: lacks the control, which quality is measured against; calibrate anew with --data")
    return found


def calibrate(
    base: str, config: CalibrationConfig, plans: dict[Candidate, ExchangePlan], rank: int, kept: Path, report: Report
) -> Calibration:
    """Tunes the control and each of `plans`, but for what `kept` has of the same base, data and settings; writes `kept` after each, for
    its owner alone: it tells about private rows. A tune that diverges is made once more at a lower rate.

    report: told of every tune and step. Raises what reading base and rows raises, DataError for held-out rows that are trained on,
    AdapterError for a rank that the calibration text does not have, UsageError where another plora-plan is at work on `kept`, and
    ModelError for a plan that diverges at both rates.
    """
    with _held(kept):
        return _calibrate(base, config, plans, rank, kept, report)


def _calibrate(
    base: str, config: CalibrationConfig, plans: dict[Candidate, ExchangePlan], rank: int, kept: Path, report: Report
) -> Calibration:
    loaded = read_base(base)
    tokenizer = read_tokenizer(loaded.source)
    examples, held_out = _rows(config, tokenizer)
    schedule = Schedule.plan(len(examples), config.batch_size, 1, 1.0, config.steps, config.seed)
    key = _key(loaded, config, rank)
    done = _kept(kept, key, report)
    wanted: dict[str, Candidate | None] = {CONTROL: None, **{each.words: each for each in plans}}
    missing = {name: candidate for name, candidate in wanted.items() if name not in done}
    counts = (config.steps, len(examples), len(held_out))
    state = Calibration(FORMAT, VERSION, key, loaded.name, sizes(loaded.shape), *counts, tuple(wanted), tuple(done.values()))
    if not missing:
        return state
    loaded.model.float()
    report.note(f"calibrating {len(missing)} of {len(wanted)}: {config.steps} steps each on {len(examples)} rows, {len(held_out)} held out")
    progress = _Progress(report, len(missing) * schedule.steps)
    try:
        pool = BasisPool.of(loaded, rank, config.seed) if any(missing.values()) else None  # first: it judges the rank
        tuner = _Tuner(loaded, pool, Batches(examples, schedule), schedule, held_out, config.seed)
        for number, (name, candidate) in enumerate(missing.items(), 1):
            report.note(f"[{number}/{len(missing)}] tuning {name}")
            plan = None if candidate is None else plans[candidate]
            usual = CONTROL_LEARNING_RATE if plan is None else default_learning_rate(plan, KIND)
            progress.before = (number - 1) * schedule.steps
            rate, loss = _calmly(partial(tuner.loss, plan, progress.advance), usual, name, report)
            state = replace(state, losses=(*state.losses, Loss(name, candidate, rate, loss)))
            with new_file(kept) as temporary:
                temporary.touch(0o600)
                write_json(temporary, state)
            report.note(f"[{number}/{len(missing)}] held-out loss {loss:.4f} (learning rate {rate:g})")
    except KeyboardInterrupt:
        tunes = f"{len(state.losses)} of {len(wanted)} tunes are kept in {kept}: the same command goes on behind them"
        report.note(tunes if state.losses else "no tune is done yet: the same command starts anew")
        raise
    finally:
        report.close()
    return state


@dataclass(frozen=True)
class _Tuner:
    """Short tunes of one base on the same rows in the same order. pool: None where only the control is tuned."""

    base: Base
    pool: BasisPool | None
    batches: Batches
    schedule: Schedule
    held_out: list[Example]
    seed: int

    def loss(self, plan: ExchangePlan | None, told: Callable[[int, float], None], rate: float) -> float:
        """Held-out loss after a tune; of the control without a plan. The base is left as it was. Raises ModelError where it diverges."""
        model, steps = self.base.model, self.schedule.steps
        if plan is None:
            cores: Any = StaticBias(model, CONTROL_TARGETS)
        else:
            assert self.pool is not None  # made if any plan is to be tuned
            cores = Cores(model, self.pool.adapter(plan), torch.float32)
        try:
            torch.manual_seed(self.seed)
            tuned = Tuned(model, cores, self.base.shape.windows)
            short_tune(tuned, (self.batches[step]["packs"] for step in range(steps)), steps, rate, told)
            return held_out_loss(tuned, self.held_out, self.schedule.batch_size)
        finally:
            cores.remove()


def _calmly(tune: Callable[[float], float], rate: float, name: str, report: Report) -> tuple[float, float]:
    """(learning rate, held-out loss): at `rate`, or lower where that diverges. Raises ModelError where the lower one does, too."""
    lower = rate / CALMER
    try:
        return rate, tune(rate)
    except ModelError as error:
        report.note(f"{name}: {error}; once more at learning rate {lower:g}")
    try:
        return lower, tune(lower)
    except ModelError as error:
        raise ModelError(
            f"{name}: its tune diverges at learning rate {rate:g} and at {lower:g} ({error}); look at the rows, or give a larger "
            "--batch-size or another --seed, which calibrates anew"
        ) from None


@contextmanager
def _held(kept: Path) -> Iterator[None]:
    """No other plora-plan calibrates for this --out meanwhile. Raises UsageError if one does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(Unfinished(kept.absolute()).held())
        except UsageError:
            raise UsageError(f"{kept}: another plora-plan is at work there; wait for it, or choose another --out") from None
        yield


class _Progress:
    """Steps of all tunes together. before: those of the tunes before this one."""

    def __init__(self, report: Report, of: int) -> None:
        self.report = report
        self.before, self.of = 0, of

    def advance(self, step: int, loss: float) -> None:
        self.report.advance(self.before + step, self.of)


def _kept(path: Path, key: str, report: Report) -> dict[str, Loss]:
    """By name, of a file with the same key; none of another, which is replaced."""
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UsageError(f"{path}: not written by plora-plan; move it away, or choose another --out")
    if value.get("key") != key or value.get("version") != VERSION:
        why = "of another base, other rows or settings" if value.get("version") == VERSION else "of another version"
        report.note(f"{path}: {why}: calibrating anew")
        return {}
    found = decode(Calibration, value, str(path))
    return {each.name: each for each in found.losses}


def _key(base: Base, config: CalibrationConfig, rank: int) -> str:
    """SHA-256 of all that a held-out loss depends on, beside the plan itself."""
    settings = {
        "base": base.fingerprint,
        "data": _hash(config.data),
        "held_out": _hash(config.held_out) if config.held_out else config.held_out_share,
        "settings": [config.steps, config.batch_size, config.max_tokens, config.seed, rank],
        "control": [CONTROL_LEARNING_RATE, *CONTROL_TARGETS],
    }
    return hashlib.sha256(canonical_json(plain(settings))).hexdigest()


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _rows(config: CalibrationConfig, tokenizer: Any) -> tuple[list[Example], list[Example]]:
    """(to train on, held out); no prompt is in both."""
    examples = read_examples(config.data, tokenizer, config.max_tokens)
    if config.held_out is not None:
        trained, held_out = examples, read_examples(config.held_out, tokenizer, config.max_tokens)
    else:
        trained, held_out = split(examples, config.held_out_share, config.seed)
    numbers = [each.row for each in trained], [each.row for each in held_out]
    refuse_leaks(Rows.of(config.data, numbers[0]), Rows.of(config.held_out or config.data, numbers[1]), prompts=True)
    return trained, held_out
