"""Which learning rate: one grid for all methods, half a decade a step, searched until no task's best lies at an edge.

A sweep's run is short and tunes on a mixture of the three tasks; each task's rate is the one that did best on that task's validation
rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .methods import Method
from .tasks import NAMES

GRID = tuple(10 ** (half / 2) for half in range(-9, 1))
"""3.2e-5 to 1."""
MIXTURE = "mixture"
TURNS = ("persona", "e2e", "persona", "e2e", "persona", "gsm8k")
"""Whose step comes when."""
SWEEP_STEPS = 30


@dataclass(frozen=True)
class Search:
    """wanted: the rate to try next, None if there is none; best: by task, None until the search has ended."""

    wanted: float | None
    best: dict[str, float] | None
    tried: dict[float, dict[str, float]]

    @classmethod
    def of(cls, store: Any, method: Method, times: float) -> Search:
        steps = round(SWEEP_STEPS * times)
        tried = {
            each["rate"]: {task: _worth(nll) for task, nll in each["validation"].items()}
            for each in store.outcomes.values()
            if (each["kind"], each["method"], each["steps"]) == ("sweep", method.name, steps)
        }
        near = min(range(len(GRID)), key=lambda at: abs(math.log(GRID[at] / method.guess)))
        for at in (near, near - 1, near + 1):
            if GRID[at] not in tried:
                return cls(GRID[at], None, tried)
        best = {task: min(tried, key=lambda rate: tried[rate][task]) for task in NAMES}
        lowest, highest = min(tried), max(tried)
        for rate in best.values():
            at = GRID.index(rate)
            if rate == lowest and at > 0:
                return cls(GRID[at - 1], None, tried)
            if rate == highest and at < len(GRID) - 1:
                return cls(GRID[at + 1], None, tried)
        return cls(None, best, tried)


def _worth(nll: float) -> float:
    """A run that diverged is the worst."""
    return nll if math.isfinite(nll) else math.inf
