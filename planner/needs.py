"""What is asked of a plan; and where no plan gives it, which need binds and which plan comes nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import combinations
from math import inf, isfinite

from ..artifact.errors import UsageError
from .proposal import Proposal


@dataclass(frozen=True)
class Need:
    """limit: at least (sense 1) or at most (-1) so much of what `flag` names."""

    flag: str
    limit: float
    sense: int
    unit: str

    def value(self, proposal: Proposal) -> float:
        own = proposal.figures
        if self.flag == "--quality":
            return proposal.quality.share if proposal.quality else -inf
        return {
            "--device-mb": own.device_megabytes,
            "--min-tokens-per-second": own.tokens_per_second,
            "--max-ttft-ms": own.first_token_millis,
            "--max-mb-per-1000-tokens": own.megabytes_per_1000_tokens,
        }[self.flag]

    def shortfall(self, proposal: Proposal) -> float:
        """By which share of the limit the plan misses it; 0 if it meets it."""
        return max(0.0, self.sense * (self.limit - self.value(proposal)) / self.limit)


@dataclass(frozen=True)
class Needs:
    """None: not asked for. device_megabytes, first_token_millis, megabytes_per_1000_tokens: at most; tokens_per_second, quality (a share
    of the reference's): at least.

    Raises UsageError.
    """

    device_megabytes: float | None = None
    quality: float | None = None
    tokens_per_second: float | None = None
    first_token_millis: float | None = None
    megabytes_per_1000_tokens: float | None = None

    def __post_init__(self) -> None:
        for need in self.all:
            if not isfinite(need.limit) or need.limit <= 0:
                raise UsageError(f"{need.flag} {need.limit:g}: expected more than 0")
        if self.quality is not None and self.quality > 2:
            raise UsageError(f"--quality {self.quality:g}: expected a share of the reference's improvement, such as 0.95")

    @property
    def all(self) -> tuple[Need, ...]:
        """Those that are asked for."""
        found = (
            ("--device-mb", self.device_megabytes, -1, "MB on the device"),
            ("--quality", self.quality, 1, "quality"),
            ("--min-tokens-per-second", self.tokens_per_second, 1, "tokens/s"),
            ("--max-ttft-ms", self.first_token_millis, -1, "ms to the first token"),
            ("--max-mb-per-1000-tokens", self.megabytes_per_1000_tokens, -1, "MB per 1,000 tokens"),
        )
        return tuple(Need(flag, limit, sense, unit) for flag, limit, sense, unit in found if limit is not None)

    def unmet(self, proposal: Proposal) -> tuple[str, ...]:
        """Flags of the needs that the plan misses."""
        return tuple(need.flag for need in self.all if need.shortfall(proposal))


@dataclass(frozen=True)
class Unmet:
    """binding: the sets of needs of which each alone, given up, leaves `freed` plans;
    nearest: its largest shortfall is smallest, then their sum."""

    looked_at: int
    binding: tuple[tuple[str, ...], ...]
    freed: tuple[int, ...]
    nearest: Proposal
    shortfalls: dict[str, float]


def unmet(proposals: Sequence[Proposal], needs: Needs) -> Unmet | None:
    """None if a plan meets every need. The binding sets are the smallest ones that there are."""
    missed = [frozenset(needs.unmet(proposal)) for proposal in proposals]
    if not all(missed):
        return None
    flags = [need.flag for need in needs.all]
    by_size = (
        [given_up for given_up in combinations(flags, size) if any(each <= set(given_up) for each in missed)]
        for size in range(1, len(flags) + 1)
    )
    sets = next(found for found in by_size if found)  # at the latest all of them
    freed = tuple(sum(each <= set(given_up) for each in missed) for given_up in sets)

    def shortfalls(proposal: Proposal) -> dict[str, float]:
        return {need.flag: need.shortfall(proposal) for need in needs.all if need.shortfall(proposal)}

    def distance(proposal: Proposal) -> tuple[float, ...]:
        """Of the largest shortfall, then of all, in whole percent: predictions are no finer. Of those alike the best, then the fastest."""
        short = shortfalls(proposal).values()
        return round(max(short), 2), round(sum(short), 2), -proposal.goodness, -proposal.figures.tokens_per_second

    nearest = min(proposals, key=distance)
    return Unmet(len(proposals), tuple(sets), freed, nearest, shortfalls(nearest))


def explain(found: Unmet, needs: Needs) -> str:
    """One line: which need binds, and the nearest plan with its figures."""
    limits = {need.flag: f"{need.flag} {Decimal(f'{need.limit:.15g}'):f}" for need in needs.all}
    parts = []
    for given_up, freed in zip(found.binding, found.freed, strict=True):
        named = " and ".join(limits[flag] for flag in given_up)
        verb = "binds" if len(given_up) == 1 else "bind together"
        parts.append(f"{named} {verb}: without {'it' if len(given_up) == 1 else 'them'} {freed} plan{'s' if freed > 1 else ''} would do")
    by_flag = {need.flag: need for need in needs.all}
    short = ", ".join(
        f"{number(by_flag[flag].value(found.nearest), 4)} {by_flag[flag].unit} against {number(by_flag[flag].limit, 6)} "
        f"({share:,.0%} {'short' if by_flag[flag].sense > 0 else 'over'})"
        for flag, share in found.shortfalls.items()
    )
    own, quality = found.nearest.figures, found.nearest.quality
    figures = (
        f"{number(own.tokens_per_second, 3)} tokens/s, first token {number(own.first_token_millis, 3)} ms, "
        f"{number(own.megabytes_per_1000_tokens, 3)} MB per 1,000 tokens, {number(own.device_megabytes, 4)} MB on the device, "
        f"quality {f'{quality.share:.2f}' if quality else 'unknown'}"
    )
    return (
        f"none of {found.looked_at} plans meets every need; {'; or '.join(parts)}. Nearest: {found.nearest.candidate.words}: {short}; "
        f"it would give {figures}. Relax what binds"
    )


def number(value: float, digits: int) -> str:
    """For a person: so many significant digits, whole with separators from 1,000 on, never an exponent."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{Decimal(f'{value:.{digits}g}'):f}"
