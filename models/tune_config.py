"""What a tuning run is asked for: checked when it is built, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import UsageError
from ..artifact.plan import ExchangePlan
from .basis import BASIS_KINDS

LEARNING_RATES = {"random": 1e-2, "svd": 1e-2, "pca": 4e-3, "imported": 1e-2}
"""Peak rates by basis: docs/tuning.md says how they were found."""
SHARED_LEARNING_RATE = 1e-2
"""Peak rate where injections are shared: one value then moves every layer and target a little."""


def default_learning_rate(plan: ExchangePlan, basis_kind: str) -> float:
    """The peak rate if none is given."""
    return SHARED_LEARNING_RATE if any(source.shared_injection for source in plan.sources) else LEARNING_RATES[basis_kind]


DEVICES = ("auto", "cpu")


@dataclass(frozen=True)
class TuneConfig:
    """base: folder, hub id or GGUF; data: rows; plan: from the number of layers, for a fresh basis of `basis_kind`; basis: instead, an
    adapter folder whose basis and plan to keep; calibration: text for a "pca" basis, None for plora's own; steps: None for `epochs`
    over the data; batch_size: rows per process and accumulated batch; learning_rate: peak, None for the basis' default; max_tokens:
    longest row; held_out: rows to evaluate on, or held_out_share of the data; eval_every, save_every: steps, None for 4 and 10 times
    in a run; restart: discard what an interrupted run left; features_seed: of the private features' start, for tests and studies alone:
    None draws it from the system's entropy.

    Raises UsageError.
    """

    base: str
    data: Path
    out: Path
    plan: Callable[[int], ExchangePlan] | None = None
    basis: Path | None = None
    basis_kind: str = "random"
    calibration: Path | None = None
    scale: float = 1.0
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    seed: int = 0
    max_tokens: int = 512
    held_out: Path | None = None
    held_out_share: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    device: str = "auto"
    replace: bool = False
    restart: bool = False
    features_seed: int | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.basis is None):
            raise UsageError("either plan flags, for a fresh basis, or --basis DIR, which brings its plan: give one of the two")
        if self.basis_kind not in BASIS_KINDS:
            raise UsageError(f"--basis-kind {self.basis_kind}: expected one of {', '.join(BASIS_KINDS)}")
        if self.calibration is not None and (self.basis is not None or self.basis_kind != "pca"):
            raise UsageError(f"--calibration {self.calibration} goes with --basis-kind pca alone")
        if self.held_out is not None and self.held_out_share is not None:
            raise UsageError("either --held-out FILE or --held-out-share F, not both")
        if self.held_out_share is not None and not 0 < self.held_out_share < 0.5:
            raise UsageError(f"--held-out-share {self.held_out_share}: expected more than 0 and less than 0.5")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        if self.device not in DEVICES:
            raise UsageError(f"--device {self.device}: expected one of {', '.join(DEVICES)}")
        positive = {"--epochs": self.epochs, "--batch-size": self.batch_size, "--accumulate": self.accumulate, "--scale": self.scale}
        positive |= {"--max-tokens": self.max_tokens, "--steps": self.steps, "--learning-rate": self.learning_rate}
        positive |= {"--eval-every": self.eval_every, "--save-every": self.save_every}
        for name, value in positive.items():
            if value is not None and (not value > 0 or not math.isfinite(value)):
                raise UsageError(f"{name} {value}: expected more than 0")
