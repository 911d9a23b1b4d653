"""Held-out losses by prompt and seed, and what is said of them: shares of an improvement, with intervals.

95 %, percentile bootstrap over held-out prompts (with all their rows) and over seeds, the same draw for every method. Three seeds are few
for that: their part comes out too narrow, so each seed's share is given, too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 4000
HELD_OUT_PHRASINGS = 2
"""Rows of a persona's fact: they are drawn together, as the references of an E2E prompt are."""


@dataclass(frozen=True)
class Losses:
    """sums: nats, tokens: response tokens, both `[seeds, prompts]`; seeds: their numbers."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, outcomes: list[dict[str, Any]]) -> Losses:
        """Raises ValueError for no outcomes."""
        if not outcomes:
            raise ValueError("no final run")
        rows = [(_by_prompt(each, each["rows"]), _by_prompt(each, each["tokens"])) for each in outcomes]
        return cls(np.array([sums for sums, _ in rows]), np.array([tokens for _, tokens in rows]), tuple(each["seed"] for each in outcomes))

    @property
    def mean(self) -> float:
        """Nats per token, seeds alike."""
        return float((self.sums.sum(1) / self.tokens.sum(1)).mean())

    def only(self, seeds: tuple[int, ...]) -> Losses:
        at = [self.seeds.index(seed) for seed in seeds]
        return Losses(self.sums[at], self.tokens[at], seeds)

    def first(self, prompts: int) -> Losses:
        return Losses(self.sums[:, :prompts], self.tokens[:, :prompts], self.seeds)

    def drawn(self, draws: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Nats per token in every draw, `[D]`. draws: how often each prompt is drawn, `[D, prompts]`; picks: seeds, `[D, seeds]`."""
        by_seed = (draws @ self.sums.T) / (draws @ self.tokens.T)
        return np.take_along_axis(by_seed, picks, 1).mean(1)


def _by_prompt(outcome: dict[str, Any], values: list[float]) -> list[float]:
    sizes = outcome["groups"]
    if outcome["task"] == "persona":
        sizes = [HELD_OUT_PHRASINGS] * (len(values) // HELD_OUT_PHRASINGS)
    ends = np.cumsum(sizes)
    return [float(sum(values[end - size : end])) for size, end in zip(sizes, ends, strict=True)]


def refuse_unlike(task: str, outcomes: list[dict[str, Any]]) -> None:
    """Raises ValueError unless all were judged by the same rows with products alike: losses are compared row by row."""
    kinds = {json.dumps([each["tokens"], each["groups"], each.get("products", "fp32")]): each for each in outcomes}
    if len(kinds) > 1:
        names = ", ".join(f"{each['method']} of seed {each['seed']}" for each in kinds.values())
        raise ValueError(f"{task}: {names} were judged by other rows, or in another precision, than each other; run them again")


def share(control: Losses, lora: Losses, x: Losses, draws: int = DRAWS) -> tuple[float, tuple[float, float], tuple[int, ...]]:
    """(share, its 95 % interval, seeds), over the seeds that all three have."""
    seeds = tuple(seed for seed in x.seeds if seed in control.seeds and seed in lora.seeds)
    control, lora, x = control.only(seeds), lora.only(seeds), x.only(seeds)
    random = np.random.default_rng(0)
    prompts = control.sums.shape[1]
    drawn = random.multinomial(prompts, np.full(prompts, 1 / prompts), draws).astype(np.float64)
    picks = random.integers(0, len(seeds), (draws, len(seeds)))
    c, reference, own = (each.drawn(drawn, picks) for each in (control, lora, x))
    low, high = np.percentile((c - own) / (c - reference), [2.5, 97.5])
    return (control.mean - x.mean) / (control.mean - lora.mean), (float(low), float(high)), seeds
