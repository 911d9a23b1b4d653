"""A plan with its figures, and which of many are worth proposing: those that no other is better than in everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..artifact.errors import UsageError
from ..artifact.plan import ExchangePlan
from .candidates import Candidate
from .predict import Figures

CHOICES = ("fastest", "best", "smallest", "leanest")
"""Beside a number of the table: most tokens per second, quality, fewest device MB, fewest MB on the link."""
DIGITS = 2
"""Figures that agree in so many significant digits are taken for equal: predictions are not finer than that."""


@dataclass(frozen=True)
class Quality:
    """share: of the reference's held-out improvement over the control; origin: "calibrated" or "interpolated"."""

    share: float
    origin: str


@dataclass(frozen=True)
class Proposal:
    """quality: None where nothing was calibrated."""

    candidate: Candidate
    plan: ExchangePlan
    figures: Figures
    quality: Quality | None

    @property
    def goodness(self) -> float:
        """What stands for quality: its share, or the trained values where that is unknown."""
        return self.quality.share if self.quality else float(self.figures.trained_values)

    @property
    def scores(self) -> tuple[float, ...]:
        """Higher is better: tokens per second, first token, bytes, device, quality."""
        own = self.figures
        return (
            rounded(own.tokens_per_second),
            -rounded(own.first_token_millis),
            -rounded(own.megabytes_per_1000_tokens),
            -rounded(own.device_megabytes),
            round(self.quality.share, DIGITS) if self.quality else rounded(self.goodness),
        )


def rounded(value: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{value:.{DIGITS}g}")


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Nowhere worse and somewhere better."""
    return all(a >= b for a, b in zip(one, other, strict=True)) and any(a > b for a, b in zip(one, other, strict=True))


def pareto(proposals: Sequence[Proposal]) -> list[Proposal]:
    """Those that none dominates, fastest first; of those alike in every score the first."""
    first: dict[tuple[float, ...], Proposal] = {}
    for proposal in proposals:
        first.setdefault(proposal.scores, proposal)
    found = [own for scores, own in first.items() if not any(dominates(other, scores) for other in first)]
    return sorted(found, key=lambda each: each.scores, reverse=True)


def choose(front: Sequence[Proposal], name: str) -> Proposal:
    """The one that `name` asks for, of CHOICES; of those alike in that the best, then the fastest. Raises UsageError."""
    if name not in CHOICES:
        raise UsageError(f"--choose {name}: expected a number of the table, or one of {', '.join(CHOICES)}")
    order = {"fastest": (0, 4, 1, 2, 3), "best": (4, 0, 1, 2, 3), "smallest": (3, 4, 0, 1, 2), "leanest": (2, 4, 0, 1, 3)}[name]
    return max(front, key=lambda each: tuple(each.scores[axis] for axis in order))
