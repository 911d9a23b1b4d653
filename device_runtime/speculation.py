"""Speculative decoding without loss: what a step of drafted tokens yields, and how many tokens to draft for the next one.

The target model is remote, and a step costs round trips whatever it carries: with k drafted tokens behind the last one, the k + 1 rows of
logits of one step yield 1 to k + 1 tokens, distributed as plain decoding's (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318). One turn of the loop, with K the tokens that the cloud has cached, all but the conversation's last:

    draft = drafter.propose(tokens, length.choose(drafter.match(tokens)), sampling)     feed tokens[-1:] + draft.ids, k + 1 exit rows
    verdict = verify(sampler, logits, tokens, draft)                                    truncate the cache to K + 1 + verdict.accepted
    length.observe(len(draft.ids), verdict.accepted, draft.matched, seconds)            of one such step, not of a prefill
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import UsageError
from .drafts import Draft
from .sampling import Sampler

Odds = NDArray[np.float64]


# Which drafted tokens stay


@dataclass(frozen=True)
class Verdict:
    """tokens: the accepted drafted tokens and one more, the correction or (if all were accepted) the bonus; accepted: how many."""

    tokens: list[int]
    accepted: int


def acceptance(p: Odds, q: Odds, token: int) -> float:
    """min(1, p(x) / q(x)): the chance that x, drawn from q, stays. 0 where q(x) = 0: no x is drawn there."""
    return float(min(1.0, p[token] / q[token])) if q[token] > 0 else 0.0


def residual(p: Odds, q: Odds) -> Odds:
    """[V]: max(p - q, 0), normalised: what a rejected token is replaced from. p where nothing is left: p = q, and none is rejected.

    q(x) acceptance(x) = min(p, q)(x); the rest of p(x) is max(p - q, 0)(x), and that is what all rejections together weigh.
    """
    left = np.maximum(p - q, 0.0)
    total = left.sum()
    return left / total if total > 0 else p


def verify(sampler: Sampler, logits: NDArray[np.float32], seen: list[int], draft: Draft) -> Verdict:
    """Judges a draft of k tokens by the target's logits [k + 1, V] float32; row i follows `seen` and i drafted tokens.

    A draft that was not drawn (a point mass) stays while the sampler would choose it: accepted with p(x), else replaced from p without x,
    as the rule above says, and with the draws of plain decoding: from equal logits a seed gives the same answer with any such draft or
    none. A draft that was drawn from odds gives the same distribution, but not the same answer, since it costs other draws. Its odds must
    not share the sampler's random numbers (drafts.OWN_STREAM).

    A caller that must end within `tokens` (end token, stop text, max_tokens) cuts them: the first n are what plain decoding gives. It keeps
    the first min(accepted, n) drafted tokens in the cache and truncates the rest.
    Raises UsageError for a draft that does not fit the logits.
    """
    count = len(draft.ids)
    if logits.ndim != 2 or len(logits) != count + 1:
        raise UsageError(f"logits of shape {list(logits.shape)} for {count} drafted tokens, expected [{count + 1}, vocabulary]")
    vocabulary = logits.shape[1]
    if max(draft.ids, default=0) >= vocabulary or any(len(odds) != vocabulary for odds in draft.odds or ()):
        raise UsageError(f"a draft of tokens {draft.ids}, or its odds, from another vocabulary than the target's {vocabulary} tokens")
    drawn_from = draft.odds if sampler.sampling.temperature > 0.0 else None
    tokens: list[int] = []
    for index, token in enumerate(draft.ids):
        if drawn_from is not None:
            p, q = sampler.probabilities(logits[index], seen + tokens), drawn_from[index]
            accepted = sampler.generator.random() < acceptance(p, q, token)
            tokens.append(token if accepted else int(sampler.generator.choice(vocabulary, p=residual(p, q))))
        else:
            tokens.append(sampler.choose(logits[index], seen + tokens))
            accepted = tokens[-1] == token
        if not accepted:
            return Verdict(tokens, index)
    tokens.append(sampler.choose(logits[count], seen + tokens))
    return Verdict(tokens, count)


# How many tokens to draft

MATCHES = (1, 2, 3, 4, 8, 16)
"""Lower ends of the classes of match lengths; class 0 is below the first: not known, as for a draft model."""
USUAL = (0.6, 0.2, 0.4, 0.6, 0.75, 0.85, 0.95)
"""Acceptance by class before anything is known. From class 1 up: between what SmolLM2-135M's answers to eight prompts had at temperatures
0 and 0.8 (1,200 tokens each; after one matching token 0.25 and 0.12, after three 0.62 and 0.42, after sixteen 0.97 and 0.91). Class 0: a
guess for small draft models of the target's family, not measured here."""
USUAL_WEIGHT = 3.0
"""In drafted tokens: what USUAL weighs against the session's average, and that against the last steps."""
REMEMBERED = 0.98
"""Each step, what earlier steps saw weighs so much less: about 50 steps count. Text changes from copying to telling and back."""
PROBE_STEPS = 16
"""After so many steps of a class without a draft, one token is drafted to see: at worst 1/16 of the time is spent on it."""
USUAL_SHARE, SHARE_WEIGHT = 0.05, 5.0
"""Cost of a drafted token as a share of a step without any, before steps of several lengths were timed; in squared tokens."""
SHARES = (0.01, 1.0)
"""A drafted token costs at least the radio's and the battery's trouble, at most a step of its own."""
SLOWEST = 4.0
"""A step that took longer, in multiples of what was expected, counts as so many: the network stumbled."""


@dataclass(frozen=True)
class StepCosts:
    """A step with k drafted tokens takes fixed_seconds + k per_token_seconds: round trips and one row; one more row and its bytes."""

    fixed_seconds: float
    per_token_seconds: float

    def __post_init__(self) -> None:
        if not (0 < self.fixed_seconds < np.inf and 0 <= self.per_token_seconds < np.inf):
            raise UsageError(
                f"a step of {self.fixed_seconds} s and {self.per_token_seconds} s per drafted token, expected finite, the first above 0"
            )

    def seconds(self, drafted: int) -> float:
        return self.fixed_seconds + drafted * self.per_token_seconds


def expected_tokens(chances: Sequence[float]) -> Odds:
    """[k + 1]: tokens that a step yields with 0 to k drafts, if draft i is accepted with chances[i] once those before it are.

    1 + a_1 + a_1 a_2 + ...: for equal chances (1 - a^(k+1)) / (1 - a), equation 1 of arXiv 2211.17192.
    """
    return np.concatenate(([1.0], 1.0 + np.cumsum(np.cumprod(np.asarray(chances, np.float64)))))


def best_length(chances: Sequence[float], costs: StepCosts) -> int:
    """The k of 0..len(chances) with the most tokens per second, the least such k (arXiv 2211.17192, sections 3.3 and 3.5; its cost ratio c
    is per_token / fixed). A longer round trip never makes it less: E(k') / E(k) > cost(k') / cost(k) with k' > k stays so as fixed grows.
    """
    seconds = costs.fixed_seconds + costs.per_token_seconds * np.arange(len(chances) + 1)
    return int(np.argmax(expected_tokens(chances) / seconds))


class CostEstimate:
    """StepCosts f, c from timed steps: least squares over (drafted tokens k, seconds s), older steps weighing less.

    Minimises sum w (s - f - c k)^2 + SHARE_WEIGHT (c - USUAL_SHARE f)^2, so that steps of one length alone give the usual share,
    within SHARES: the closest edge where the minimum lies outside.
    """

    def __init__(self) -> None:
        self.costs: StepCosts | None = None
        self._sums = np.zeros(5)  # of 1, k, k k, s, k s

    def observe(self, drafted: int, seconds: float) -> None:
        if self.costs is not None:
            seconds = min(seconds, SLOWEST * self.costs.seconds(drafted))
        self._sums = REMEMBERED * self._sums + np.array([1, drafted, drafted * drafted, seconds, drafted * seconds])
        steps, k, kk, s, ks = self._sums
        weight, usual = SHARE_WEIGHT, USUAL_SHARE
        normal = np.array([[steps + weight * usual * usual, k - weight * usual], [k - weight * usual, kk + weight]])
        fixed, per_token = np.linalg.solve(normal, [s, ks])
        low, high = SHARES
        if not low * fixed <= per_token <= high * fixed:
            share = low if per_token < low * fixed else high
            fixed = (s + share * ks) / (steps + 2 * share * k + share * share * kk)
            per_token = share * fixed
        self.costs = StepCosts(float(fixed), float(per_token))


class DraftLength:
    """Chooses how many tokens to draft, 0 to `limit`, from what became of earlier drafts and how long their steps took.

    Acceptance is estimated per class of match length (MATCHES). A copied draft that matched m tokens has, once i of it are accepted,
    matched m + i: its chances rise as it goes on, and one estimate per class tells both how good a match is and how far to follow it.
    Without a match (a draft model) there is one class, and the paper's formula. An estimate is the rate of the last steps, leaning on that
    of the session where they say little, which leans on the usual one. costs: stated; None: learnt from the steps.
    """

    def __init__(self, limit: int = 16, costs: StepCosts | None = None) -> None:
        if limit < 0:
            raise UsageError(f"drafts of at most {limit} tokens, expected 0 (off) or more")
        self.limit = limit
        self._stated, self._learnt = costs, CostEstimate()
        self._lately, self._ever = np.zeros((2, 2, len(USUAL)))  # of each: accepted, judged; by class
        self._idle = [0] * len(USUAL)  # steps without a draft, by class, since the last one with

    @property
    def costs(self) -> StepCosts | None:
        """None before the first step was seen."""
        return self._stated or self._learnt.costs

    def chances(self, matched: int) -> list[float]:
        """[limit]: of each token of a draft that rests on `matched` tokens, once those before it are accepted."""
        rates = np.array(USUAL)
        for hits, tries in (self._ever, self._lately):
            rates = (hits + USUAL_WEIGHT * rates) / (tries + USUAL_WEIGHT)
        return [float(rates[_class(matched, index)]) for index in range(self.limit)]

    def choose(self, matched: int = 0) -> int:
        """Length of the next draft, if it rests on `matched` tokens (Drafter.match)."""
        best = best_length(self.chances(matched), self.costs or StepCosts(1.0, USUAL_SHARE))
        probe = self._idle[_class(matched, 0)] >= PROBE_STEPS
        return max(best, int(probe and self.limit > 0))

    def observe(self, drafted: int, accepted: int, matched: int, seconds: float) -> None:
        """One step after the prefill: what was drafted for it, how many of that were accepted, on what the draft rested (of an empty draft
        too), seconds from asking the drafter to the verdict. Raises UsageError for what cannot be."""
        if not (0 <= accepted <= drafted and matched >= 0 and isfinite(seconds) and seconds > 0):
            raise UsageError(f"{accepted} of {drafted} drafted tokens accepted, {matched} matched, in {seconds} s: no step is like that")
        self._lately *= REMEMBERED
        for counts in (self._lately, self._ever):
            for index in range(min(accepted + 1, drafted)):
                counts[:, _class(matched, index)] += (index < accepted, 1)
        first = _class(matched, 0)
        self._idle[first] = 0 if drafted else self._idle[first] + 1
        self._learnt.observe(drafted, seconds)


def _class(matched: int, index: int) -> int:
    """Of a draft's token `index`: it rests on the match and on the drafted tokens before it; 0 if there is no match."""
    return bisect_right(MATCHES, matched + index) if matched else 0
