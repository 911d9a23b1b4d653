"""Speculative decoding: the answer's distribution is plain decoding's, whatever is drafted; look-up drafts; the choice of length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from plora.artifact.errors import UsageError
from plora.device_runtime import speculation
from plora.device_runtime.drafts import MATCH_AT_MOST, Draft, Drafter, ModelDrafts, NgramDrafts, require_vocabulary
from plora.device_runtime.sampling import Sampler, Sampling
from plora.device_runtime.speculation import (
    PROBE_STEPS,
    SHARES,
    USUAL,
    USUAL_SHARE,
    CostEstimate,
    DraftLength,
    StepCosts,
    acceptance,
    best_length,
    expected_tokens,
    residual,
    verify,
)

Odds = NDArray[np.float64]


# A toy target, and the loop


@dataclass(frozen=True)
class Toy:
    """Logits by the last two tokens: table [V, V, V] float32."""

    table: NDArray[np.float32]

    @property
    def vocabulary(self) -> int:
        return len(self.table)

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        return self.table[tokens[-2], tokens[-1]]


def toy(seed: int, vocabulary: int, spread: float = 1.5) -> Toy:
    return Toy((np.random.default_rng(seed).standard_normal((vocabulary,) * 3) * spread).astype(np.float32))


def plain(target: Toy, sampler: Sampler, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        tokens.append(sampler.choose(target.logits(tokens), tokens))
    return tokens[len(prompt) :]


def speculated(target: Toy, sampler: Sampler, prompt: list[int], count: int, drafter: Drafter, length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        draft = drafter.propose(tokens, length, sampler.sampling)
        rows = [target.logits(tokens + list(draft.ids[:index])) for index in range(len(draft.ids) + 1)]
        verdict = verify(sampler, np.stack(rows), tokens, draft)
        assert len(verdict.tokens) == verdict.accepted + 1
        assert tuple(verdict.tokens[: verdict.accepted]) == draft.ids[: verdict.accepted]
        tokens += verdict.tokens
    return tokens[len(prompt) : len(prompt) + count]


class Scripted:
    """Drafts what it is told, whatever was said."""

    vocabulary = None

    def __init__(self, drafts: Sequence[Sequence[int]]) -> None:
        self.drafts: Iterator[Sequence[int]] = iter(drafts)

    def match(self, tokens: Sequence[int]) -> int:
        return 0

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        return Draft(tuple(next(self.drafts, ()))[:count])

    def reset(self) -> None: ...


# Exactness: the rule, in closed form


@st.composite
def distributions(draw: st.DrawFn, size: int) -> Odds:
    """Any, with zeros, point masses and odds far apart."""
    weights = st.one_of(st.just(0.0), st.floats(1e-3, 1.0), st.sampled_from([1e-300, 1e-30, 1e-9, 1.0]))
    chosen = draw(st.lists(weights, min_size=size, max_size=size).filter(lambda each: max(each) >= 1e-3))
    return np.array(chosen) / sum(chosen)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Odds, Odds]:
    size = draw(st.integers(1, 8))
    p = draw(distributions(size))
    alike = st.just(p), st.just(p[::-1].copy()), st.integers(0, size - 1).map(lambda at: np.eye(size)[at])
    return p, draw(st.one_of(distributions(size), *alike))


def marginal(p: Odds, q: Odds, accept: Callable[[Odds, Odds, int], float], rest: Callable[[Odds, Odds], Odds]) -> Odds:
    """[V]: of the token that comes of one drafted from q."""
    kept = np.array([q[token] * accept(p, q, token) for token in range(len(p))])
    return kept + (1.0 - kept.sum()) * rest(p, q)


@given(pairs())
@settings(max_examples=300, deadline=None)
def test_one_drafted_token_leaves_the_distribution_as_it_was(both: tuple[Odds, Odds]) -> None:
    p, q = both
    np.testing.assert_allclose(marginal(p, q, acceptance, residual), p, rtol=0, atol=1e-12)
    assert abs(residual(p, q).sum() - 1) < 1e-12
    assert not residual(p, q)[p == 0].any()
    assert all(0.0 <= acceptance(p, q, token) <= 1.0 for token in range(len(p)))


def test_a_wrong_rule_is_seen() -> None:
    """Negative control of the test above."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    assert abs(marginal(p, q, lambda p, q, token: 1.0, residual) - p).max() > 0.1
    assert abs(marginal(p, q, acceptance, lambda p, q: p) - p).max() > 0.05


# Exactness: `verify` and the drafters, every branch of every draw


class Branches:
    """Stands for a numpy generator: replays `path`, then takes the first way at each draw, and notes the odds of all."""

    def __init__(self, path: list[int]) -> None:
        self.path = path
        self.taken: list[tuple[int, list[int], float]] = []  # way, the other ways after it, odds of the way

    def _branch(self, odds: Sequence[float]) -> int:
        ways = [way for way, chance in enumerate(odds) if chance > 0]
        way = self.path[len(self.taken)] if len(self.taken) < len(self.path) else ways[0]
        self.taken.append((way, ways[ways.index(way) + 1 :], float(odds[way])))
        return way

    def choice(self, count: int, p: Odds) -> int:
        assert len(p) == count
        return self._branch(list(p))

    def random(self) -> Any:
        return Coin(self)


class Coin:
    """A uniform number that knows only whether it is below a chance."""

    def __init__(self, branches: Branches) -> None:
        self.branches = branches

    def __lt__(self, chance: float) -> bool:
        return self.branches._branch([1.0 - chance, chance]) == 1


def law(run: Callable[[Any], list[int]]) -> dict[tuple[int, ...], float]:
    """The exact distribution of what `run` returns, over all draws from the generator that it is given."""
    odds: Counter[tuple[int, ...]] = Counter()
    paths: list[list[int]] = [[]]
    while paths:
        branches = Branches(paths.pop())
        outcome = tuple(run(branches))
        odds[outcome] += float(np.prod([chance for _, _, chance in branches.taken]))  # type: ignore[assignment]
        ways = [way for way, _, _ in branches.taken]
        for index in range(len(branches.path), len(branches.taken)):
            paths += [[*ways[:index], other] for other in branches.taken[index][1]]
    return dict(odds)


def sampler_with(sampling: Sampling, generator: Any) -> Sampler:
    sampler = Sampler(sampling)
    sampler.generator = generator
    return sampler


def sampled_drafts(model: Toy, sampling: Sampling, generator: Any) -> ModelDrafts:
    drafter = ModelDrafts(model)
    drafter._own_sampler(sampling).generator = generator
    return drafter


class OneHot(Scripted):
    """Copies from the conversation, and says so as odds: a point mass that takes the other path through `verify`."""

    def __init__(self, vocabulary: int) -> None:
        self.drafter, self.rows = NgramDrafts(), np.eye(vocabulary)

    def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
        ids = self.drafter.propose(tokens, count, sampling).ids
        return Draft(ids, tuple(self.rows[token] for token in ids))


SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=1.5, repetition_penalty=1.8),
    Sampling(temperature=0.8, top_k=2),
    Sampling(temperature=1.2, top_p=0.8, repetition_penalty=0.6),
]
PROMPT = [0, 1, 0, 1]


def largest_difference(one: dict[tuple[int, ...], float], other: dict[tuple[int, ...], float]) -> float:
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one | other)


def both_laws(sampling: Sampling, drafts: str, length: int, seed: int) -> tuple[dict[tuple[int, ...], float], dict[tuple[int, ...], float]]:
    """Of three tokens: plain, and drafted."""
    target, small = toy(seed, 3), toy(seed + 1000, 3)

    def run(generator: Any) -> list[int]:
        drafters: dict[str, Callable[[], Drafter]] = {
            "ngram": NgramDrafts,
            "one-hot": lambda: OneHot(3),
            "model": lambda: sampled_drafts(small, sampling, generator),
            "perfect": lambda: sampled_drafts(target, sampling, generator),
            "hostile": lambda: Scripted([[2, 2, 2]] * 3),
        }
        return speculated(target, sampler_with(sampling, generator), PROMPT, 3, drafters[drafts](), length)

    return law(lambda generator: plain(target, sampler_with(sampling, generator), PROMPT, 3)), law(run)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("drafts", ["ngram", "one-hot", "model", "perfect", "hostile"])
@pytest.mark.parametrize("length", [1, 2])
def test_drafted_answers_have_the_law_of_plain_ones(sampling: Sampling, drafts: str, length: int) -> None:
    """Exactly: every branch is taken, and the odds of each answer of three tokens are summed."""
    for seed in range(2):
        expected, got = both_laws(sampling, drafts, length, seed)
        assert abs(sum(got.values()) - 1) < 1e-12
        assert largest_difference(expected, got) < 1e-12


@pytest.mark.parametrize("drafts", ["one-hot", "model"])
def test_a_wrong_verifier_changes_the_law(drafts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    with monkeypatch.context() as patch:
        patch.setattr(speculation, "acceptance", lambda p, q, token: 1.0)
        assert largest_difference(*both_laws(SAMPLINGS[0], drafts, 2, 0)) > 1e-2
    with monkeypatch.context() as patch:
        patch.setattr(speculation, "residual", lambda p, q: p)
        assert largest_difference(*both_laws(SAMPLINGS[0], drafts, 2, 0)) > 1e-3
    assert largest_difference(*both_laws(SAMPLINGS[0], drafts, 2, 0)) < 1e-12


def chi_square(own_stream: bool) -> float:
    """Of 4000 seeded answers of two tokens against the exact law; 16 outcomes."""
    sampling = Sampling(temperature=1.0)
    target, small = toy(5, 4, spread=0.7), toy(6, 4, spread=0.7)
    expected = law(lambda generator: plain(target, sampler_with(sampling, generator), PROMPT, 2))
    counts: Counter[tuple[int, ...]] = Counter()
    samples = 4000
    for seed in range(samples):
        chosen = replace(sampling, seed=seed)
        drafter = ModelDrafts(small) if own_stream else sampled_drafts(small, chosen, np.random.default_rng(seed))
        counts[tuple(speculated(target, Sampler(chosen), PROMPT, 2, drafter, 2))] += 1
    assert len(expected) == 16
    assert min(expected.values()) * samples > 20
    return sum((counts[key] - odds * samples) ** 2 / (odds * samples) for key, odds in expected.items())


def test_seeded_samples_follow_the_law() -> None:
    """15 degrees of freedom: above 37.7 once in 1000. The control: a draft model that draws the sampler's own random numbers."""
    assert chi_square(own_stream=True) < 37.7
    assert chi_square(own_stream=False) > 60


# Exactness: the same tokens where nothing is drawn for a draft


@given(
    st.integers(0, 1000),
    st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=30),
    st.booleans(),
    st.sampled_from(
        [Sampling(repetition_penalty=1.3), Sampling(temperature=0.9, seed=3), Sampling(temperature=1.3, repetition_penalty=1.4, seed=4)]
    ),
)
@settings(max_examples=150, deadline=None)
def test_point_mass_drafts_give_the_very_answer_of_plain_decoding(
    seed: int, drafts: list[list[int]], honest: bool, sampling: Sampling
) -> None:
    """At temperature 0, and with a seed at any other: drafts of noise, or of the truth with noise after it."""
    target = toy(seed, 5)
    expected = plain(target, Sampler(sampling), PROMPT, 30)

    class Half(Scripted):
        def propose(self, tokens: Sequence[int], count: int, sampling: Sampling) -> Draft:
            done = len(tokens) - len(PROMPT)
            noise = super().propose(tokens, count, sampling).ids
            return Draft((*expected[done : done + len(noise)], *noise) if honest else noise)

    assert speculated(target, Sampler(sampling), PROMPT, 30, Half(drafts), 5) == expected
    assert speculated(target, Sampler(sampling), PROMPT, 30, NgramDrafts(), 4) == expected
    if sampling.temperature == 0.0:
        assert speculated(target, Sampler(sampling), PROMPT, 30, ModelDrafts(toy(seed + 1, 5)), 3) == expected
        assert speculated(target, Sampler(sampling), PROMPT, 30, OneHot(5), 3) == expected


def test_a_right_draft_is_accepted_whole_and_one_token_more() -> None:
    target, sampler = toy(0, 6), Sampler(Sampling())
    answer = plain(target, sampler, PROMPT, 6)
    rows = np.stack([target.logits(PROMPT + answer[:index]) for index in range(6)])
    assert verify(sampler, rows, PROMPT, Draft(tuple(answer[:5]))) == speculation.Verdict(answer, 5)
    wrong = (*answer[:2], (answer[2] + 1) % 6, *answer[3:5])
    assert verify(sampler, rows, PROMPT, Draft(wrong)) == speculation.Verdict(answer[:3], 2)


def test_no_draft_is_plain_decoding() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 50)).astype(np.float32)
    one, other = Sampler(Sampling(temperature=1.0, seed=1)), Sampler(Sampling(temperature=1.0, seed=1))
    for _ in range(20):
        assert verify(one, logits, [3], Draft()).tokens == [other.choose(logits[0], [3])]


@pytest.mark.parametrize("filtered", [Sampling(temperature=1.0, top_k=1), Sampling(temperature=1.0, top_p=0.01)], ids=str)
def test_a_token_that_the_sampler_filters_out_is_never_accepted(filtered: Sampling) -> None:
    """p(x) = 0, and all of p's mass is where the draft has some too."""
    logits = np.array([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]], np.float32)
    for token in (0, 2):
        draft = Draft((token,), (np.array([0.4, 0.2, 0.4]),))
        assert verify(Sampler(filtered), logits, [], draft) == speculation.Verdict([1], 0)
        assert verify(Sampler(filtered), logits, [], Draft((token,))) == speculation.Verdict([1], 0)
    assert verify(Sampler(filtered), logits, [], Draft((1,), (np.array([0.0, 1.0, 0.0]),))) == speculation.Verdict([1, 0], 1)


def test_corner_cases_of_the_rule() -> None:
    p = np.array([0.5, 0.5, 0.0])
    assert acceptance(p, np.array([0.0, 0.5, 0.5]), 0) == 0.0  # q(x) = 0: never drawn
    assert acceptance(p, np.array([0.0, 0.5, 0.5]), 2) == 0.0  # p(x) = 0
    assert acceptance(p, p, 0) == 1.0
    np.testing.assert_array_equal(residual(p, p), p)  # nothing left
    np.testing.assert_array_equal(residual(np.eye(3)[1], np.eye(3)[1]), np.eye(3)[1])
    np.testing.assert_array_equal(residual(p, np.eye(3)[0]), np.eye(3)[1])  # p without x


@pytest.mark.parametrize(
    ("logits", "draft", "says"),
    [
        (np.zeros((2, 4)), Draft(()), r"shape \[2, 4\] for 0 drafted tokens, expected \[1"),
        (np.zeros((2, 4)), Draft((1, 2)), r"shape \[2, 4\] for 2 drafted tokens, expected \[3"),
        (np.zeros(4), Draft(()), r"shape \[4\]"),
        (np.zeros((2, 4)), Draft((4,)), "another vocabulary than the target's 4"),
        (np.zeros((2, 4)), Draft((1,), (np.full(5, 0.2),)), "another vocabulary than the target's 4"),
    ],
)
def test_a_draft_that_does_not_fit_is_refused(logits: Any, draft: Draft, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        verify(Sampler(Sampling()), logits.astype(np.float32), [], draft)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"ids": (1, -1)}, "-1"),
        ({"matched": -1}, "-1 tokens matched"),
        ({"ids": (1, 2), "odds": (np.ones(3) / 3,)}, "2 tokens with 1 distributions"),
        ({"ids": (1,), "odds": (np.array([1.0, 0.0]),)}, "drafted token 0 is 1, which"),
        ({"ids": (2,), "odds": (np.array([0.5, 0.5]),)}, "drafted token 0 is 2, which"),
        ({"ids": (0,), "odds": (np.ones((1, 1)),)}, r"shape \(1, 1\)"),
        ({"ids": (0,), "odds": (np.array([0.5, 0.4]),)}, "sums to 0.9"),
        ({"ids": (0,), "odds": (np.array([1.5, -0.5]),)}, "from -0.5 up"),
        ({"ids": (0,), "odds": (np.array([1.0, np.nan]),)}, "sums to nan"),
    ],
)
def test_drafts_are_checked(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Draft(**fields)


# Look-up drafts


def looked_up(tokens: list[int], longest: int, shortest: int, count: int) -> tuple[tuple[int, ...], int]:
    """NgramDrafts by its description, searching everything."""
    for size in range(min(longest, len(tokens)), shortest - 1, -1):
        for place in range(len(tokens) - 1, size - 1, -1):
            if tokens[place - size : place] == tokens[len(tokens) - size :]:
                matched = size
                while matched < min(MATCH_AT_MOST, place) and tokens[place - matched - 1] == tokens[-matched - 1]:
                    matched += 1
                text = list(tokens)
                for step in range(count):
                    text.append(text[place + step])
                return tuple(text[len(tokens) :]), matched
    return (), 0


@st.composite
def conversations(draw: st.DrawFn) -> list[list[int]]:
    """One conversation at several times: it grows, is cut, is said anew."""
    words = st.lists(st.integers(0, draw(st.integers(0, 3))), max_size=25)
    now, times = draw(words), []
    for _ in range(draw(st.integers(1, 8))):
        kept = draw(st.sampled_from([len(now), len(now), len(now) // 2, 0]))
        now = now[:kept] + draw(words)
        times.append(now)
    return times


@given(conversations(), st.integers(1, 5), st.integers(0, 4), st.integers(0, 12))
@settings(max_examples=300, deadline=None)
def test_look_up_drafts_are_those_of_a_full_search(times: list[list[int]], shortest: int, more: int, count: int) -> None:
    drafter = NgramDrafts(shortest + more, shortest)
    for tokens in times:
        ids, matched = looked_up(tokens, drafter.longest, shortest, count)
        assert drafter.match(tuple(tokens)) == matched
        draft = drafter.propose(tokens, count, Sampling())
        assert (draft.ids, draft.matched, draft.odds) == (ids, matched, None)
        fresh = NgramDrafts(shortest + more, shortest)
        fresh.match(tokens)
        assert drafter._index == fresh._index
    drafter.reset()
    assert drafter.match([]) == 0
    assert not drafter._index


def test_a_loop_is_drafted_on_and_on() -> None:
    assert NgramDrafts().propose([9, 1, 2, 3, 1, 2, 3], 7, Sampling()).ids == (1, 2, 3, 1, 2, 3, 1)
    assert NgramDrafts().propose([7, 7], 4, Sampling()).ids == (7, 7, 7, 7)
    assert NgramDrafts().propose([1, 2, 3], 4, Sampling()).ids == ()


def test_the_longest_match_wins_then_the_last() -> None:
    tokens = [1, 2, 3, 8, 5, 3, 9, 1, 2, 3]
    assert NgramDrafts().propose(tokens, 1, Sampling()).ids == (8,)
    assert NgramDrafts(longest=1).propose(tokens, 1, Sampling()).ids == (9,)
    assert NgramDrafts(shortest=4).propose(tokens, 1, Sampling()).ids == ()
    assert NgramDrafts(longest=1).propose([*range(40), *range(40)], 1, Sampling()).matched == MATCH_AT_MOST


def test_one_new_token_costs_one_token_of_work() -> None:
    class Counted(NgramDrafts):
        grams = 0

        def _before(self, tokens: list[int], at: int) -> Iterator[tuple[int, ...]]:
            for gram in super()._before(tokens, at):
                self.grams += 1
                yield gram

    drafter, tokens = Counted(longest=4), [number % 7 for number in range(500)]
    drafter.match(tokens)
    for more in range(50):
        before = drafter.grams
        tokens.append(more % 5)
        drafter.match(tokens)
        drafter.propose(tokens, 8, Sampling())
        assert drafter.grams - before == 4


@pytest.mark.parametrize(("longest", "shortest"), [(0, 0), (2, 3), (3, 0)])
def test_n_gram_sizes_are_checked(longest: int, shortest: int) -> None:
    with pytest.raises(UsageError, match=f"n-grams of {shortest} to {longest}"):
        NgramDrafts(longest, shortest)


# A draft model


def test_a_draft_model_is_asked_token_by_token() -> None:
    model = toy(3, 7)
    draft = ModelDrafts(model).propose(PROMPT, 4, Sampling(repetition_penalty=2.0))
    assert list(draft.ids) == plain(model, Sampler(Sampling()), PROMPT, 4)
    assert (draft.odds, draft.matched) == (None, 0)

    sampling = Sampling(temperature=0.9, top_k=4, repetition_penalty=1.3, seed=5)
    drafter = ModelDrafts(model)
    draft, again = drafter.propose(PROMPT, 4, sampling), drafter.propose(PROMPT, 4, sampling)
    assert draft.odds is not None
    for index, odds in enumerate(draft.odds):
        tokens = PROMPT + list(draft.ids[:index])
        np.testing.assert_array_equal(odds, Sampler(sampling).probabilities(model.logits(tokens), tokens))
    assert draft.ids != again.ids  # its draws go on from draft to draft
    drafter.reset()
    assert drafter.propose(PROMPT, 4, sampling).ids == draft.ids
    assert ModelDrafts(model).propose(PROMPT, 0, sampling).ids == ()


def test_draft_models_of_another_vocabulary_are_refused() -> None:
    require_vocabulary(NgramDrafts(), 300)
    require_vocabulary(ModelDrafts(toy(0, 5)), 5)
    with pytest.raises(UsageError, match="vocabulary of 5 tokens, the target one of 6"):
        require_vocabulary(ModelDrafts(toy(0, 5)), 6)


@pytest.mark.parametrize(
    "logits", [np.zeros(4, np.float32), np.zeros((1, 5), np.float32), np.full(5, np.nan, np.float32)], ids=["4", "1x5", "nan"]
)
def test_a_draft_models_logits_are_checked(logits: NDArray[np.float32]) -> None:
    class Bad:
        vocabulary = 5

        def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
            return logits

    with pytest.raises(UsageError, match=r"after 4 tokens, expected \[5\], finite"):
        ModelDrafts(Bad()).propose(PROMPT, 1, Sampling())


# How many to draft

chance_lists = st.lists(st.integers(0, 100).map(lambda percent: percent / 100), max_size=12)


@given(st.integers(0, 99), st.integers(0, 20))
def test_expected_tokens_are_the_papers(percent: int, count: int) -> None:
    chance = percent / 100
    assert expected_tokens([chance] * count)[-1] == pytest.approx((1 - chance ** (count + 1)) / (1 - chance), rel=1e-12)


@given(chance_lists, st.floats(1e-4, 10), st.floats(1, 100), st.floats(0, 1))
def test_longer_round_trips_make_longer_drafts(chances: list[float], seconds: float, times: float, per_token: float) -> None:
    near, far = StepCosts(seconds, per_token), StepCosts(seconds * times, per_token)
    assert best_length(chances, near) <= best_length(chances, far)


@given(chance_lists, st.floats(1e-4, 10), st.floats(0, 1))
def test_the_best_length_yields_the_most(chances: list[float], fixed: float, per_token: float) -> None:
    costs = StepCosts(fixed, per_token)
    rates = [expected_tokens(chances[:count])[-1] / costs.seconds(count) for count in range(len(chances) + 1)]
    assert rates[best_length(chances, costs)] == pytest.approx(max(rates), rel=1e-12)


STEPS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 20)), max_size=60)


@given(STEPS, st.integers(0, 20))
@settings(deadline=None)
def test_after_the_same_drafts_a_longer_round_trip_never_drafts_less(steps: list[tuple[int, int, int]], matched: int) -> None:
    near, far = DraftLength(8, StepCosts(0.01, 0.002)), DraftLength(8, StepCosts(0.1, 0.002))
    for drafted, accepted, match in steps:
        for length in (near, far):
            length.observe(drafted, min(drafted, accepted), match, 0.1)
    assert 0 <= near.choose(matched) <= far.choose(matched) <= 8


def drive(length: DraftLength, steps: int, chance: float, matched: int = 0, costs: StepCosts | None = None, seed: int = 0) -> list[int]:
    """The lengths that it chooses while each drafted token has this chance and steps take as long as they do."""
    generator, chosen = np.random.default_rng(seed), []
    costs = costs or StepCosts(0.1, 0.001)
    for _ in range(steps):
        drafted = length.choose(matched)
        accepted = 0
        while accepted < drafted and generator.random() < chance:
            accepted += 1
        length.observe(drafted, accepted, matched, costs.seconds(drafted) * generator.uniform(0.9, 1.3))
        chosen.append(drafted)
    return chosen


@pytest.mark.parametrize("matched", [0, 2, 16])
def test_useless_drafts_end_and_good_ones_come_back(matched: int) -> None:
    length = DraftLength(16)
    useless = drive(length, 400, 0.0, matched, StepCosts(0.02, 0.005))[200:]
    assert set(useless) == {0, 1}
    assert sum(useless) <= 200 / PROBE_STEPS + 1  # a probe now and then
    assert min(drive(length, 200, 1.0, matched, StepCosts(0.02, 0.005))[-50:]) >= 8


def test_a_far_cloud_is_sent_long_drafts_and_costly_rows_short_ones() -> None:
    means = [
        np.mean(drive(DraftLength(16), 300, 0.8, 0, StepCosts(0.3 * share, 0.3 * (1 - share)))[100:]) for share in (0.99, 0.9, 0.7, 0.5)
    ]
    assert means[0] > 8
    assert means == sorted(means, reverse=True)
    assert means[-1] < 2


def test_a_long_match_is_followed_further_than_a_short_one() -> None:
    length = DraftLength(16)
    untaught = [length.choose(matched) for matched in (1, 2, 3, 4, 8, 16)]
    assert untaught == sorted(untaught)
    for _ in range(60):
        length.observe(4, 0, 1, 0.1)
        length.observe(16, 16, 8, 0.1)
    assert (length.choose(1), length.choose(8)) == (0, 16)
    assert length.chances(8)[0] > 0.9 > USUAL[1] > length.chances(1)[0]


def test_an_accepted_token_lengthens_the_match() -> None:
    """A match of 1 whose drafts hold after the first token: class 1 learns the first, later classes the others."""
    length = DraftLength(8, StepCosts(1.0, 0.05))
    for hit in [1, 0] * 40:
        length.observe(8, 8 * hit, 1, 1.0)
    first, *rest = length.chances(1)
    assert 0.35 < first < 0.6
    assert min(rest) > 0.8
    assert length.choose(1) == 8


def test_after_a_spell_without_drafts_one_token_is_tried() -> None:
    """Even where a drafted token costs a step of its own, so that nothing is ever gained."""
    length = DraftLength(8, StepCosts(1.0, 1.0))
    for _ in range(3):
        for _ in range(PROBE_STEPS):
            assert length.choose(2) == 0
            length.observe(0, 0, 2, 1.0)
        assert (length.choose(2), length.choose(4)) == (1, 0)
        length.observe(1, 0, 2, 2.0)
    off = DraftLength(0)
    for _ in range(PROBE_STEPS + 1):
        off.observe(0, 0, 0, 1.0)
    assert off.choose() == 0


def test_limits_and_stated_costs_are_kept() -> None:
    for limit in (0, 1, 5):
        assert max(drive(DraftLength(limit), 60, 0.0)) <= limit
        assert max(drive(DraftLength(limit), 60, 1.0, 16)) == limit
    stated = DraftLength(4, StepCosts(0.5, 0.25))
    drive(stated, 30, 0.5)
    assert stated.costs == StepCosts(0.5, 0.25)
    assert DraftLength().costs is None


@pytest.mark.parametrize("fixed", [0.002, 0.05, 0.4])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_costs_are_learnt(fixed: float, share: float) -> None:
    estimate, true = CostEstimate(), StepCosts(fixed, fixed * share)
    for step in range(200):
        estimate.observe(step % 6, true.seconds(step % 6))
    assert estimate.costs is not None
    assert estimate.costs.fixed_seconds == pytest.approx(true.fixed_seconds, rel=0.05)
    assert estimate.costs.per_token_seconds == pytest.approx(true.per_token_seconds, rel=0.2)


def test_one_length_alone_gives_the_usual_share_and_a_stumble_does_not_stay() -> None:
    estimate = CostEstimate()
    for _ in range(50):
        estimate.observe(0, 0.08)
    assert estimate.costs is not None
    assert estimate.costs.fixed_seconds == pytest.approx(0.08)
    assert estimate.costs.per_token_seconds == pytest.approx(0.08 * USUAL_SHARE)
    estimate.observe(0, 60.0)
    assert estimate.costs.fixed_seconds < 0.1
    for _ in range(200):
        estimate.observe(0, 0.4)  # a slower network, not a stumble
    assert estimate.costs.fixed_seconds == pytest.approx(0.4, rel=0.05)


@given(st.lists(st.tuples(st.integers(0, 16), st.floats(1e-6, 1e3)), min_size=1, max_size=50))
@settings(deadline=None)
def test_any_timings_give_costs_within_bounds(steps: list[tuple[int, float]]) -> None:
    estimate = CostEstimate()
    for drafted, seconds in steps:
        estimate.observe(drafted, seconds)
        assert estimate.costs is not None
        share = estimate.costs.per_token_seconds / estimate.costs.fixed_seconds
        assert SHARES[0] * (1 - 1e-9) <= share <= SHARES[1] * (1 + 1e-9)


@pytest.mark.parametrize(
    ("drafted", "accepted", "matched", "seconds"),
    [(1, 2, 0, 1.0), (1, -1, 0, 1.0), (0, 0, -1, 1.0), (0, 0, 0, 0.0), (0, 0, 0, float("nan"))],
)
def test_impossible_steps_are_refused(drafted: int, accepted: int, matched: int, seconds: float) -> None:
    with pytest.raises(UsageError, match="no step is like that"):
        DraftLength().observe(drafted, accepted, matched, seconds)


@pytest.mark.parametrize("costs", [(0.0, 0.1), (1.0, -0.1), (float("inf"), 0.1), (1.0, float("nan"))])
def test_impossible_costs_and_limits_are_refused(costs: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="expected finite"):
        StepCosts(*costs)
    with pytest.raises(UsageError, match="at most -1"):
        DraftLength(-1)
