"""Hypothesis strategies: exchange plans, small decoders of every family, and what a person does in a session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from plora.artifact import AdaptedLayer, ExchangePlan, Source
from plora.artifact.plan import SHARED, TARGETS

from .conftest import FAMILIES, LLAMA3_ROPE, YARN_ROPE

MAX_FEATURES = 8
"""Of a source; fewer than any of the tiny decoders' intermediate sizes."""


@st.composite
def legal_plans(draw: st.DrawFn, min_layers: int = 1, max_layers: int = 8, max_rank: int = 6) -> ExchangePlan:
    """Any legal plan of a few layers: device layers, sources shared by groups or not, an entry source, shared injections, private
    features, any adapted layers (or none), targets and ranks."""
    layers = draw(st.integers(min_layers, max_layers))
    front = draw(st.sampled_from([0, 1, 2]).map(lambda count: min(count, layers - 1)))
    back = draw(st.sampled_from([0, 1, 2]).map(lambda count: min(count, layers - 1 - front)))
    ranks = st.integers(1, max_rank)
    adapted = []
    for layer in range(front, layers - back):
        if draw(st.sampled_from([True, True, True, False])):  # drawn layer by layer: a list of them would mostly be short
            chosen = draw(st.sets(st.sampled_from(TARGETS), min_size=1))
            source = draw(st.integers(front, layer))
            adapted.append(AdaptedLayer(layer, source, tuple((target, draw(ranks)) for target in TARGETS if target in chosen)))
    sources = []
    for layer in sorted({each.source for each in adapted}):
        read = {target for each in adapted if each.source == layer for target, _ in each.out_ranks}
        names = draw(st.sampled_from([(SHARED,), tuple(target for target in TARGETS if target in read)]))
        on_device = layer == front and draw(st.booleans())
        stands_for = sum(rank for each in adapted if each.source == layer for _, rank in each.out_ranks)
        shared = draw(st.integers(0, stands_for)) if names == (SHARED,) else 0
        features = draw(st.one_of(st.just(0), st.integers(1, MAX_FEATURES))) if names == (SHARED,) else 0
        sources.append(Source(layer, tuple((name, draw(ranks)) for name in names), on_device, shared, features))
    return ExchangePlan(layers, front, back, tuple(sources), tuple(adapted))


@dataclass(frozen=True)
class TinyModel:
    """family: a key of FAMILIES; overrides: of its config."""

    family: str
    overrides: dict[str, Any]


@st.composite
def tiny_models(draw: st.DrawFn, layers: int) -> TinyModel:
    """Any family with other sizes: heads of 16 values run fused on the device, others do not."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kv_heads = draw(st.integers(1, 2))
    overrides: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 3)),
        "head_dim": draw(st.sampled_from([6, 8, 16])),
        "hidden_size": draw(st.sampled_from([24, 36])),  # transformers wants multiples of the heads
        "intermediate_size": draw(st.sampled_from([12, 36])),
    }
    if family.endswith("window"):
        overrides["sliding_window"] = draw(st.integers(2, 8))
    if family == "qwen2-window":
        overrides["max_window_layers"] = draw(st.integers(0, layers))
    if FAMILIES[family][0] != "Qwen2":
        overrides |= draw(st.sampled_from([{}, {"rope_parameters": LLAMA3_ROPE}, {"rope_parameters": YARN_ROPE}]))
    return TinyModel(family, overrides)


@dataclass(frozen=True)
class Act:
    """Back to the first `keep` thousandths of what was said, then `tokens` new ones in one step, `exit_rows` of them wanted back
    (at most all). interrupted_after: frames of this step that arrive before Ctrl-C does; None: it does not."""

    keep: int
    tokens: int
    exit_rows: int
    interrupted_after: int | None


def sessions() -> st.SearchStrategy[list[Act]]:
    """A few acts; the last one is undisturbed and wants its last row."""
    keep = st.one_of(st.just(1000), st.integers(0, 1000))
    tokens = st.sampled_from([1, 2, 3, 5, 9])
    act = st.builds(Act, keep, tokens, st.integers(0, 9), st.one_of(st.none(), st.none(), st.integers(0, 3)))
    last = st.builds(Act, st.integers(500, 1000), tokens, st.integers(1, 9), st.none())
    return st.tuples(st.lists(act, min_size=1, max_size=5), last).map(lambda acts: [*acts[0], acts[1]])
