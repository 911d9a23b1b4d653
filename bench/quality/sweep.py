"""Which learning rate: one grid for all methods and tasks, half a decade a step, searched until the best does not lie at an edge.

Each try is a whole run of the first seed, judged by validation rows that no run trains on. The best try is the first seed's result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GRID = tuple(10 ** (half / 2) for half in range(-9, 1))
"""3.2e-5 to 1."""


@dataclass(frozen=True)
class Search:
    """wanted: the rate to try next, None if the search has ended; best: of those tried, None before the first; tried: validation loss by
    rate."""

    wanted: float | None
    best: float | None
    tried: dict[float, float]

    @classmethod
    def of(cls, outcomes: list[dict[str, Any]], guess: float) -> Search:
        """outcomes: of the first seed, one method, one task, all of the same steps."""
        tried = {each["rate"]: _worth(each["validation_nll"]) for each in outcomes}
        near = min(range(len(GRID)), key=lambda at: abs(math.log(GRID[at] / guess)))
        best = min(tried, key=lambda rate: tried[rate]) if tried else None
        if best is None:
            return cls(GRID[near], None, tried)
        at = GRID.index(best)
        for neighbour in (at - 1, at + 1):
            if 0 <= neighbour < len(GRID) and GRID[neighbour] not in tried:
                return cls(GRID[neighbour], best, tried)
        return cls(None, best, tried)

    @property
    def at_edge(self) -> bool:
        """The grid ends at the best: a better rate may lie beyond."""
        return self.best in (GRID[0], GRID[-1])

    @property
    def best_loss(self) -> float:
        """What a try has to beat."""
        return math.inf if self.best is None else self.tried[self.best]


def _worth(nll: float) -> float:
    """A run that diverged is the worst."""
    return nll if math.isfinite(nll) else math.inf
