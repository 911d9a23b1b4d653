"""Drafts: cheap guesses at the next tokens, which one step of the remote model checks all at once (speculation.py).

A drafter costs exactness nothing: whatever it proposes, the answer's distribution is the model's. Two are here: `NgramDrafts` copies from
the conversation (prompt look-up decoding: Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding; LLMA, arXiv 2304.04487), and
`ModelDrafts` asks a small model of the same vocabulary (arXiv 2211.17192, arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import UsageError
from .sampling import Sampler, Sampling

MATCH_AT_MOST = 16
"""Longer matches are not told apart: nearly all of their drafts are accepted."""
OWN_STREAM = 1
"""Beside the seed, for a draft model's draws: the sampler draws from the seed alone. If both drew the same numbers, what is accepted
would depend on how it was drafted, and the answer's distribution would be wrong."""


@dataclass(frozen=True, eq=False)
class Draft:
    """ids: drafted tokens, k of them, possibly none; odds: for each the distribution [V] float64 that it was drawn from, None if nothing
    was drawn (a point mass); matched: how many of the conversation's last tokens the copied place shares, 0 if none or not known.

    Raises UsageError for odds that the tokens cannot have been drawn from.
    """

    ids: tuple[int, ...] = ()
    odds: tuple[NDArray[np.float64], ...] | None = None
    matched: int = 0

    def __post_init__(self) -> None:
        if min(self.ids, default=0) < 0 or self.matched < 0:
            raise UsageError(f"a draft of tokens {self.ids}, {self.matched} tokens matched: expected 0 or more")
        if self.odds is None:
            return
        if len(self.odds) != len(self.ids):
            raise UsageError(f"a draft of {len(self.ids)} tokens with {len(self.odds)} distributions, expected one each")
        for index, (token, odds) in enumerate(zip(self.ids, self.odds, strict=True)):
            if odds.ndim != 1 or token >= len(odds) or not odds[token] > 0:
                raise UsageError(f"drafted token {index} is {token}, which its distribution of shape {odds.shape} cannot give")
            if not (odds.min() >= 0 and abs(odds.sum() - 1) < 1e-9):
                raise UsageError(
                    f"the distribution of drafted token {index} sums to {odds.sum():g} from {odds.min():g} up, expected 1 and 0"
                )


class Drafter(Protocol):
    """Guesses what comes next. Never sees the network; may keep what it learnt of the conversation between calls."""

    @property
    def vocabulary(self) -> int | None:
        """Size of the vocabulary that it drafts from; None: it only repeats tokens that it was given."""
        ...

    def match(self, tokens: Sequence[int]) -> int:
        """`matched` of the next draft, before it is made: what the choice of its length rests on."""
        ...

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        """At most `count` tokens to follow `tokens`, the whole conversation so far, prompt and answer."""
        ...

    def reset(self) -> None:
        """Forgets the conversation. Not needed between turns, and not to be called within an answer."""
        ...


def require_vocabulary(drafter: Drafter, vocabulary: int) -> None:
    """Raises UsageError if the drafter's tokens are not the target's."""
    if drafter.vocabulary not in (None, vocabulary):
        raise UsageError(
            f"the draft model has a vocabulary of {drafter.vocabulary} tokens, the target one of {vocabulary}: "
            "both need the same tokenizer; take a smaller model of the target's family, or drafts copied from the conversation"
        )


class NgramDrafts:
    """Copies what followed the most recent earlier place that ends as the conversation ends.

    The place: the longest n-gram, of `longest` tokens down to `shortest`, that the conversation ends with and that occurred before; the
    last such place. If what followed there runs into the conversation's end, it goes on from its start: a loop repeats.
    A new token costs `longest` dictionary entries, a dropped one as many; telling what changed costs one comparison of the lists.
    """

    vocabulary: int | None = None

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        if not 1 <= shortest <= longest:
            raise UsageError(f"n-grams of {shortest} to {longest} tokens, expected 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest
        self.reset()

    def reset(self) -> None:
        self._tokens: list[int] = []
        self._index: dict[tuple[int, ...], list[int]] = {}  # n-gram -> ascending positions of the tokens that followed it

    def match(self, tokens: Sequence[int]) -> int:
        self._follow(list(tokens))
        return self._find()[1]

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        self._follow(list(tokens))
        place, matched = self._find()
        period = len(tokens) - place
        ids = tuple(self._tokens[place + step % period] for step in range(count)) if matched else ()
        return Draft(ids, matched=matched)

    def _find(self) -> tuple[int, int]:
        """(position of the token to copy first, how many tokens before it match the end), (0, 0) if none does."""
        tokens, end = self._tokens, len(self._tokens)
        for size in range(min(self.longest, end), self.shortest - 1, -1):
            places = self._index.get(tuple(tokens[end - size :]))
            if places:
                place, matched = places[-1], size
                while matched < min(MATCH_AT_MOST, place) and tokens[place - 1 - matched] == tokens[end - 1 - matched]:
                    matched += 1
                return place, matched
        return 0, 0

    def _follow(self, tokens: list[int]) -> None:
        """Makes the index that of `tokens`: unlearns what is no longer there, learns what is new."""
        old = self._tokens
        kept = min(len(old), len(tokens))
        if old[:kept] != tokens[:kept]:
            kept = next(at for at in count_from() if old[at] != tokens[at])
        for at in range(len(old) - 1, kept - 1, -1):
            for gram in self._before(old, at):
                self._index[gram].pop()
                if not self._index[gram]:
                    del self._index[gram]
        for at in range(kept, len(tokens)):
            for gram in self._before(tokens, at):
                self._index.setdefault(gram, []).append(at)
        self._tokens = tokens

    def _before(self, tokens: list[int], at: int) -> Iterator[tuple[int, ...]]:
        """The n-grams that token `at` follows."""
        return (tuple(tokens[at - size : at]) for size in range(self.shortest, min(self.longest, at) + 1))


class DraftModel(Protocol):
    """A small language model on the device; it may keep its own cache, and finds out itself what of `tokens` is new."""

    @property
    def vocabulary(self) -> int: ...

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[V] float32: of the token that follows `tokens`."""
        ...


class ModelDrafts:
    """Asks a model, token by token: its argmax at temperature 0, else drawn as the sampler draws, and the odds recorded."""

    def __init__(self, model: DraftModel) -> None:
        self.model = model
        self.reset()

    @property
    def vocabulary(self) -> int | None:
        return self.model.vocabulary

    def reset(self) -> None:
        self._sampler: Sampler | None = None

    def match(self, tokens: Sequence[int]) -> int:
        return 0

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        sampler = self._own_sampler(sampling)
        seen, ids, odds = list(tokens), [], []
        for _ in range(count):
            logits = self._logits(seen + ids)
            if sampling.temperature == 0.0:
                ids.append(sampler.choose(logits, seen))
            else:
                odds.append(sampler.probabilities(logits, seen + ids))
                ids.append(int(sampler.generator.choice(len(logits), p=odds[-1])))
        return Draft(tuple(ids), None if sampling.temperature == 0.0 else tuple(odds))

    def _own_sampler(self, sampling: Sampling) -> Sampler:
        """Kept from draft to draft: one that began anew would draw the same numbers again, see OWN_STREAM."""
        if self._sampler is None or self._sampler.sampling != sampling:
            self._sampler = Sampler(sampling)
            if sampling.seed is not None:
                self._sampler.generator = np.random.default_rng([sampling.seed, OWN_STREAM])
        return self._sampler

    def _logits(self, tokens: list[int]) -> NDArray[np.float32]:
        logits = self.model.logits(tokens)
        if logits.shape != (self.model.vocabulary,) or not np.isfinite(logits).all():
            shape, expected = list(logits.shape), [self.model.vocabulary]
            raise UsageError(f"the draft model gave logits of shape {shape} after {len(tokens)} tokens, expected {expected}, finite")
        return logits
