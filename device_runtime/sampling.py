"""From logits to a token. Temperature 0 is plain argmax; else temperature, top-k, top-p, in transformers' order."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """temperature: 0 for argmax; top_k: 0 for off; top_p: 1 for off; repetition_penalty: 1 for off, not applied at
    temperature 0; seed: None for a random one; max_tokens: at most so many new tokens; stop: texts that end the answer."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = (
            (0.0 <= self.temperature <= 100.0, f"temperature {self.temperature}, expected 0 to 100"),
            (self.top_k >= 0, f"top-k {self.top_k}, expected 0 (off) or more"),
            (0.0 < self.top_p <= 1.0, f"top-p {self.top_p}, expected above 0 and at most 1"),
            (0.0 < self.repetition_penalty <= 100.0, f"repetition penalty {self.repetition_penalty}, expected above 0"),
            (self.seed is None or self.seed >= 0, f"seed {self.seed}, expected 0 or more"),
            (self.max_tokens >= 1, f"max-tokens {self.max_tokens}, expected at least 1"),
            (all(self.stop), "an empty stop text"),
        )
        for good, message in checks:
            if not good:
                raise UsageError(message)


def choose_sampling(flags: dict[str, object], artifact: dict[str, object]) -> Sampling:
    """Flags win over the artifact's generation config, that over the defaults of Sampling; None means not given.

    The artifact's may say more than Sampling has. Raises UsageError for a flag that it has not, or of a value that it does not take.
    """
    names = [field.name for field in fields(Sampling)]
    if unknown := sorted(set(flags) - set(names)):
        raise UsageError(f"no sampling flag {', '.join(unknown)}; expected some of {', '.join(names)}")
    chosen = {name: value for name, value in artifact.items() if name in names and value is not None}
    chosen.update({name: value for name, value in flags.items() if value is not None})
    return Sampling(**chosen)  # type: ignore[arg-type]


class Sampler:
    """Draws tokens for one answer, from a generator of its own."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.generator = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32], seen: list[int]) -> int:
        """logits: [V] float32; seen: prompt and answer so far, for the repetition penalty."""
        if self.sampling.temperature == 0.0:
            return int(logits.argmax())
        return int(self.generator.choice(len(logits), p=self.probabilities(logits, seen)))

    def probabilities(self, logits: NDArray[np.float32], seen: list[int]) -> NDArray[np.float64]:
        """[V], the distribution that `choose` draws from."""
        chosen = self.sampling
        scores = logits.astype(np.float64)
        if chosen.repetition_penalty != 1.0 and seen:
            ids = np.unique(np.asarray(seen))
            scores[ids] = np.where(scores[ids] > 0, scores[ids] / chosen.repetition_penalty, scores[ids] * chosen.repetition_penalty)
        scores /= chosen.temperature
        if 0 < chosen.top_k < len(scores):
            scores[scores < np.partition(scores, -chosen.top_k)[-chosen.top_k]] = -np.inf
        odds = np.exp(scores - scores.max())
        odds /= odds.sum()
        if chosen.top_p < 1.0:
            order = np.argsort(-odds, kind="stable")
            cumulative = np.cumsum(odds[order])
            odds[order[1:][cumulative[:-1] >= chosen.top_p]] = 0.0  # the token that crosses top_p stays
            odds /= odds.sum()
        return odds
