"""Quality of every candidate from a few that were tuned: the share of the reference's held-out improvement over the control.

    quality = (control's loss - plan's) / (control's loss - reference's)

The reference is the better of the tuned plans that exchange over the network: own inputs (the paper's arrangement), entry with exchanges.
What was tuned differs from the anchor in one thing each. A candidate differs in several: the differences are added up, each read off
its own line, in the logarithm where doubling is what counts. More injected values, rank and targets never make a line fall; exchanges and
front layers may: what an earlier layer sees is not always worth less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log2

from ..artifact.errors import DataError
from ..artifact.plan import TARGETS, ExchangePlan
from ..artifact.plans import QKV
from .candidates import Candidate, own_inputs, ranks
from .proposal import Quality

CONTROL = "control"
ANCHOR_FRONT_LAYERS = 4


def skeleton(layers: int, grid: Mapping[Candidate, ExchangePlan], rank: int) -> list[Candidate]:
    """What is tuned, beside the control: own inputs, the anchor (the entry plan, unshared, all targets), and for each thing that
    candidates differ in one or two plans that differ from the anchor in it alone. At most eight."""
    fronts = sorted({each.front_layers for each in grid if not each.own})
    front = max(each for each in fronts if each <= ANCHOR_FRONT_LAYERS)
    anchor = Candidate(front, 0, False, TARGETS, 0, rank)
    exchanges = max((each.exchanges for each in grid if not each.own and each.front_layers == front), default=0)
    shared = sorted(each.shared for each in grid if each.shared and replace(each, shared=0) == anchor)
    wanted = [
        replace(own_inputs(rank), exchanges=layers),
        anchor,
        *(replace(anchor, shared=each) for each in (*shared[-1:], *shared[:1])),
        replace(anchor, exchanges=exchanges),
        replace(anchor, front_layers=fronts[0]),
        replace(anchor, rank=ranks(rank)[-1]),
        replace(anchor, targets=QKV),
    ]
    return [each for each in dict.fromkeys(wanted) if each in grid]


@dataclass(frozen=True)
class Line:
    """y by x, straight between the points and level beyond them. x rises."""

    points: tuple[tuple[float, float], ...]

    def at(self, x: float) -> float:
        points = self.points
        if x <= points[0][0]:
            return points[0][1]
        for (low, least), (high, most) in pairwise(points):
            if x <= high:
                return least + (most - least) * (x - low) / (high - low)
        return points[-1][1]


def rising(points: Sequence[tuple[float, float]]) -> Line:
    """The nearest line that never falls: neighbours that do are made level at their mean (pool adjacent violators)."""
    pools: list[tuple[list[float], list[float]]] = []
    for x, y in sorted(points):
        pools.append(([x], [y]))
        while len(pools) > 1 and _mean(pools[-2][1]) > _mean(pools[-1][1]):
            xs, ys = pools.pop()
            pools[-1][0].extend(xs)
            pools[-1][1].extend(ys)
    return Line(tuple((x, _mean(ys)) for xs, ys in pools for x in xs))


def from_anchor(line: Line, x: float) -> Line:
    """The same line, moved so that it is 0 at x."""
    return Line(tuple((at, y - line.at(x)) for at, y in line.points))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Interpolation:
    """losses: held-out, by candidate that was tuned; control: the static biases'. Raises DataError where the reference is no better than
    the control: then there is nothing to have a share of."""

    def __init__(self, layers: int, control: float, losses: Mapping[Candidate, float]) -> None:
        many = {each: loss for each, loss in losses.items() if each.exchanges}
        own = next((each for each in losses if each.own), None)
        anchor_plan = next((each for each in losses if not each.own), None)
        if own is None or anchor_plan is None:
            lacking = "own inputs, the paper's arrangement" if own is None else "the entry plan"
            raise DataError(f"the calibration lacks {lacking}; calibrate again")
        self.reference = min(many, key=lambda each: many[each])
        best = many[self.reference]
        self.layers = layers
        gain = control - best
        if not gain > 0:
            raise DataError(
                f"after so short a tune the reference's held-out loss is {best:.4f}, the control's {control:.4f}: no improvement to have a "
                "share of; give more --calibration-steps, or more rows"
            )
        self.known = {each: (control - loss) / gain for each, loss in losses.items()}
        self.anchor = anchor_plan
        anchor = self.known[self.anchor]

        def points(name: str) -> list[tuple[float, float]]:
            differing = [each for each in self.known if not each.own and replace(each, **{name: getattr(self.anchor, name)}) == self.anchor]
            return [(self._x(name, each), self.known[each] - anchor) for each in differing]

        def level(name: str) -> Line:
            return from_anchor(rising(points(name)), self._x(name, self.anchor))

        self.own = self.known[own] - anchor
        self.front = Line(tuple(sorted(points("front_layers"))))
        self.exchanges = Line(tuple(sorted(points("exchanges"))))
        self.shared, self.rank, self.targets = level("shared"), level("rank"), level("targets")

    def _x(self, name: str, candidate: Candidate) -> float:
        if name == "front_layers":
            return float(candidate.front_layers)
        if name == "exchanges":
            return log2(1 + candidate.exchanges)
        if name == "shared":
            return log2(candidate.shared or self._unshared(candidate))
        if name == "rank":
            return log2(candidate.rank)
        return float(len(candidate.targets))

    def _unshared(self, candidate: Candidate) -> int:
        """Values of the injections of a token if each layer and target has its own."""
        return (self.layers - candidate.front_layers) * len(candidate.targets) * candidate.rank

    def quality(self, candidate: Candidate) -> Quality:
        """Of any candidate of the same decoder."""
        if candidate in self.known:
            return Quality(self.known[candidate], "calibrated")
        share = self.known[self.anchor] + self.targets.at(self._x("targets", candidate)) + self.rank.at(self._x("rank", candidate))
        if candidate.own:  # which differ from the anchor in exchanges and front layers at once
            share += self.own
        else:
            share += self.exchanges.at(self._x("exchanges", candidate)) + self.front.at(self._x("front_layers", candidate))
        if candidate.shared:  # what is left unshared has no such difference: the anchor's line ends there
            share += self.shared.at(self._x("shared", candidate))
        return Quality(share, "interpolated")
