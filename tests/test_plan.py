"""The exchange plan: what is legal, what follows from it, and that the contract hash sees every change of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.artifact import (
    AdaptedLayer,
    BackLayers,
    DecoderShape,
    Entry,
    Exchange,
    ExchangePlan,
    Exit,
    FrontLayers,
    Rope,
    Segment,
    Source,
    grouped_plan,
    paper_plan,
    walk,
)
from plora.artifact.errors import PlanError, UnsupportedPlan
from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract
from plora.artifact.plan import SHARED, TARGETS, require_runnable
from plora.artifact.shape import check_fits
from plora.artifact.strict import canonical_json, decode, plain

SHAPE = DecoderShape(16, 4, 4, 2, 4, 24, 50, 64, 1e-5, (0, 0, 0, 0), Rope((1.0, 0.01), 1.0))
QKV = (("q", 3), ("k", 3), ("v", 3))


def plan_of(sources: list[Source], adapted: list[AdaptedLayer], layers: int = 4, front: int = 0, back: int = 0) -> ExchangePlan:
    return ExchangePlan(layers, front, back, tuple(sources), tuple(adapted))


def contract_of(plan: ExchangePlan, shape: DecoderShape = SHAPE) -> Contract:
    return Contract(PROTOCOL_MAJOR, plan, shape, "ba" * 32, "5e" * 32, EXIT_CONVENTION)


@st.composite
def legal_plans(draw: st.DrawFn) -> ExchangePlan:
    """Any legal plan of a few layers: device layers, sources shared by groups or not, an entry source, any targets and ranks."""
    layers = draw(st.integers(1, 8))
    front = draw(st.integers(0, layers - 1))
    back = draw(st.integers(0, layers - 1 - front))
    ranks = st.integers(1, 6)
    adapted = []
    for layer in draw(st.lists(st.integers(front, layers - back - 1), unique=True).map(sorted)):
        chosen = draw(st.sets(st.sampled_from(TARGETS), min_size=1))
        source = draw(st.integers(front, layer))
        adapted.append(AdaptedLayer(layer, source, tuple((target, draw(ranks)) for target in TARGETS if target in chosen)))
    sources = []
    for layer in sorted({each.source for each in adapted}):
        read = {target for each in adapted if each.source == layer for target, _ in each.out_ranks}
        names = draw(st.sampled_from([(SHARED,), tuple(target for target in TARGETS if target in read)]))
        on_device = layer == front and draw(st.booleans())
        sources.append(Source(layer, tuple((name, draw(ranks)) for name in names), on_device))
    return ExchangePlan(layers, front, back, tuple(sources), tuple(adapted))


SOURCE, ADAPTED = Source(1, ((SHARED, 3),)), AdaptedLayer(1, 1, QKV)
ILLEGAL: dict[str, tuple[Any, str]] = {
    "no layers": (lambda: plan_of([], [], layers=0), "plan has 0 layers, expected at least 1"),
    "front below 0": (lambda: plan_of([], [], front=-1), "front_layers -1 and back_layers 0"),
    "back below 0": (lambda: plan_of([], [], back=-1), "front_layers 0 and back_layers -1"),
    "none left for the cloud": (lambda: plan_of([], [], front=2, back=2), "at least one of 4 layers"),
    "sources fall": (lambda: plan_of([Source(2, ((SHARED, 3),)), SOURCE], [ADAPTED]), r"sources \[2, 1\] must be in rising order"),
    "source twice": (lambda: plan_of([SOURCE, SOURCE], [ADAPTED]), r"sources \[1, 1\] must be in rising order"),
    "source without readers": (lambda: plan_of([SOURCE], []), "source 1 feeds no layer"),
    "source in the front": (lambda: plan_of([SOURCE], [AdaptedLayer(2, 1, QKV)], front=2), r"source 1 lies outside .* 2\.\.3"),
    "source in the back": (lambda: plan_of([Source(3, ((SHARED, 3),))], [AdaptedLayer(3, 3, QKV)], back=1), r"source 3 .* 0\.\.2"),
    "source on device, not the entry": (
        lambda: plan_of([Source(1, ((SHARED, 3),), True)], [ADAPTED]), "source 1 is on the device, but only the entry layer 0"
    ),
    "no down-projections": (lambda: plan_of([Source(1, ())], [ADAPTED]), r"source 1 has down-projections \[\]"),
    "shared and own": (lambda: plan_of([Source(1, ((SHARED, 3), ("q", 3)))], [ADAPTED]), r"source 1 .*'shared', 'q'"),
    "down-projections out of order": (lambda: plan_of([Source(1, (("v", 3), ("q", 3), ("k", 3)))], [ADAPTED]), r"source 1 .*'v', 'q', 'k'"),
    "down-projection twice": (lambda: plan_of([Source(1, (("q", 3), ("q", 3)))], [ADAPTED]), r"source 1 .*'q', 'q'"),
    "down-projection unknown": (lambda: plan_of([Source(1, (("z", 3),))], [ADAPTED]), r"source 1 .*'z'"),
    "rank 0": (lambda: plan_of([Source(1, ((SHARED, 0),))], [ADAPTED]), "source 1, down-projection shared: rank 0"),
    "adapted layers fall": (lambda: plan_of([SOURCE], [AdaptedLayer(2, 1, QKV), ADAPTED]), r"adapted layers \[2, 1\]"),
    "adapted layer twice": (lambda: plan_of([SOURCE], [ADAPTED, ADAPTED]), r"adapted layers \[1, 1\]"),
    "adapted in the back": (lambda: plan_of([SOURCE], [AdaptedLayer(3, 1, QKV)], back=1), r"layer 3 is adapted, but only .*0\.\.2"),
    "source after the layer": (lambda: plan_of([SOURCE], [AdaptedLayer(0, 1, QKV)]), "layer 0 has source 1, which lies after it"),
    "source not listed": (lambda: plan_of([SOURCE], [ADAPTED, AdaptedLayer(2, 0, QKV)]), r"layer 2 has source 0, .* not among .*\[1\]"),
    "no targets": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, ())]), r"layer 1 has targets \[\]"),
    "targets out of order": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("v", 3), ("q", 3)))]), r"layer 1 has targets \['v', 'q'\]"),
    "target unknown": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("z", 3),))]), r"layer 1 has targets \['z'\]"),
    "out_rank 0": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("q", 0),))]), "layer 1, target q: out_rank 0"),
    "no down-projection for a target": (
        lambda: plan_of([Source(1, (("q", 3), ("k", 3)))], [ADAPTED]), "layer 1, target v: source 1 has no down-projection for it"
    ),
    "group 0": (lambda: grouped_plan(4, 0, 3), "group of 0 layers"),
    "targets of grouped_plan unknown": (lambda: paper_plan(4, 3, ("q", "z")), r"targets \['q', 'z'\]"),
    "targets of grouped_plan twice": (lambda: paper_plan(4, 3, ("q", "q")), r"targets \['q', 'q'\]"),
    "targets of grouped_plan empty": (lambda: paper_plan(4, 3, ()), r"targets \[\]"),
    "rank 0 of grouped_plan": (lambda: paper_plan(4, 0), "source 0, down-projection shared: rank 0"),
    "out_rank 0 of grouped_plan": (lambda: paper_plan(4, 3, out_rank=0), "layer 0, target q: out_rank 0"),
}  # fmt: skip


def test_the_plan_that_the_illegal_ones_vary_is_legal() -> None:
    plan = plan_of([SOURCE], [ADAPTED])
    assert [exchange.source for exchange in plan.exchanges] == [1]


@pytest.mark.parametrize("name", ILLEGAL)
def test_illegal_plans_are_refused_by_name(name: str) -> None:
    make, message = ILLEGAL[name]
    with pytest.raises(PlanError, match=message):
        make()


def test_a_plan_must_fit_the_shape() -> None:
    check_fits(paper_plan(4, 16), SHAPE)
    with pytest.raises(PlanError, match="the plan is for 3 layers, the model has 4"):
        check_fits(paper_plan(3, 2), SHAPE)
    with pytest.raises(PlanError, match="source 0, down-projection k: rank 17 exceeds the hidden size 16"):
        check_fits(plan_of([Source(0, (("q", 16), ("k", 17)))], [AdaptedLayer(0, 0, (("q", 1), ("k", 1)))]), SHAPE)


def test_the_papers_plan_exchanges_once_per_layer() -> None:
    plan = paper_plan(3, 2)
    assert [(e.index, e.source, e.compressed_columns, e.injection_columns) for e in plan.exchanges] == [(i, i, 2, 6) for i in range(3)]
    assert plan.segments == tuple(Segment(i, i, i + 1, i, (i,)) for i in range(3))
    assert plan.entry_exchange is None
    assert plan.round_trips == 4
    assert [(c.layer, c.target, c.down, c.down_start, c.down_stop, c.up_start, c.up_stop) for c in plan.exchanges[1].columns] == [
        (1, "q", "shared", 0, 2, 0, 2), (1, "k", "shared", 0, 2, 2, 4), (1, "v", "shared", 0, 2, 4, 6),
    ]  # fmt: skip


def test_separate_down_projections_have_columns_of_their_own() -> None:
    (exchange,) = paper_plan(1, 2, ("v", "q"), out_rank=5, separate=True).exchanges
    assert (exchange.compressed_columns, exchange.injection_columns) == (4, 10)
    assert [(c.target, c.down, c.down_start, c.down_stop, c.rank, c.out_rank) for c in exchange.columns] == [
        ("q", "q", 0, 2, 2, 5), ("v", "v", 2, 4, 2, 5),
    ]  # fmt: skip


def test_a_group_shares_one_exchange() -> None:
    plan = grouped_plan(5, 2, 3, ("q",))
    assert [exchange.source for exchange in plan.exchanges] == [0, 2, 4]
    assert [(segment.first, segment.stop, segment.exchange) for segment in plan.segments] == [(0, 2, 0), (2, 4, 1), (4, 5, 2)]
    assert [[c.layer for c in exchange.columns] for exchange in plan.exchanges] == [[0, 1], [2, 3], [4]]
    assert grouped_plan(5, 1, 3) == paper_plan(5, 3)
    assert grouped_plan(5, 99, 3).round_trips == 2


def test_a_source_on_the_device_needs_no_exchange() -> None:
    plan = plan_of([Source(0, ((SHARED, 3),), True)], [AdaptedLayer(2, 0, QKV)])
    assert plan.exchanges == ()
    assert plan.round_trips == 1
    assert plan.entry_exchange is not None
    assert (plan.entry_exchange.index, plan.entry_exchange.injection_columns) == (-1, 9)
    assert plan.columns == plan.entry_exchange.columns
    assert walk(plan) == (Entry(plan.entry_exchange), Segment(0, 0, 4, None, (-1,)), Exit())


def test_the_walk_of_every_stage() -> None:
    plan = plan_of([Source(3, ((SHARED, 2),))], [AdaptedLayer(3, 3, QKV)], layers=6, front=1, back=2)
    assert walk(plan) == (
        FrontLayers(1), Entry(None), Segment(0, 1, 3, None, ()), plan.exchanges[0], Segment(1, 3, 4, 0, (0,)), Exit(), BackLayers(4, 6),
    )  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(legal_plans())
def test_what_follows_from_any_plan(plan: ExchangePlan) -> None:
    cloud = list(range(plan.front_layers, plan.layers - plan.back_layers))
    assert [layer for segment in plan.segments for layer in range(segment.first, segment.stop)] == cloud
    assert all(segment.first < segment.stop for segment in plan.segments)
    assert [segment.index for segment in plan.segments] == list(range(len(plan.segments)))
    for segment in plan.segments:
        assert segment.exchange is None or plan.exchanges[segment.exchange].source == segment.first
    assert [segment.exchange for segment in plan.segments if segment.exchange is not None] == list(range(len(plan.exchanges)))

    for exchange in (*plan.exchanges, *([plan.entry_exchange] if plan.entry_exchange else [])):
        edges = [0, *(column.up_stop for column in exchange.columns)]
        assert [column.up_start for column in exchange.columns] == edges[:-1]
        assert edges[-1] == exchange.injection_columns
        assert all(0 <= c.down_start < c.down_stop <= exchange.compressed_columns for c in exchange.columns)
    wanted = {(each.layer, target, out_rank) for each in plan.adapted for target, out_rank in each.out_ranks}
    assert sorted(wanted) == sorted((c.layer, c.target, c.out_rank) for c in plan.columns)
    ranks = {source.layer: dict(source.ranks) for source in plan.sources}
    source_of = {each.layer: each.source for each in plan.adapted}
    assert all(c.rank == ranks[source_of[c.layer]][c.down] for c in plan.columns)


@settings(max_examples=100, deadline=None)
@given(legal_plans())
def test_the_walk_of_any_plan(plan: ExchangePlan) -> None:
    stages = walk(plan)
    assert sum(isinstance(stage, Exchange | Exit) for stage in stages) == plan.round_trips
    assert tuple(stage for stage in stages if isinstance(stage, Segment)) == plan.segments
    assert tuple(stage for stage in stages if isinstance(stage, Exchange)) == plan.exchanges
    available = {column.layer for column in plan.entry_exchange.columns} if plan.entry_exchange else set()
    for stage in stages:
        if isinstance(stage, Exchange):
            available |= {column.layer for column in stage.columns}
        if isinstance(stage, Segment):
            here = {each.layer for each in plan.adapted if stage.first <= each.layer < stage.stop}
            assert here <= available  # an injection is there before its layer runs
            assert set(stage.inputs) == {each.index for each in plan.all_exchanges if here & {column.layer for column in each.columns}}


@settings(max_examples=50, deadline=None)
@given(legal_plans(), legal_plans())
def test_json_and_contract_hash(plan: ExchangePlan, other: ExchangePlan) -> None:
    before = contract_of(plan).hash
    read = decode(ExchangePlan, json.loads(json.dumps(plain(plan))), "plan")
    assert read == plan
    assert (read.exchanges, read.segments, walk(read)) == (plan.exchanges, plan.segments, walk(plan))
    assert contract_of(read).hash == contract_of(plan).hash == before  # what follows from a plan is no part of it
    assert (contract_of(other).hash == before) == (other == plan)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all numbers, strings and truth values in parsed JSON."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, item in items for leaf in leaves(item, (*path, key))]
    return [path]


def changed(value: Any, path: tuple[Any, ...]) -> Any:
    """A copy with one leaf changed."""
    copy = json.loads(json.dumps(value))
    at = copy
    for key in path[:-1]:
        at = at[key]
    old = at[path[-1]]
    at[path[-1]] = not old if isinstance(old, bool) else old + "x" if isinstance(old, str) else old + 1
    return copy


@settings(max_examples=10, deadline=None)
@given(legal_plans())
def test_every_value_of_a_contract_changes_its_hash(plan: ExchangePlan) -> None:
    contract = contract_of(plan)
    value = plain(contract)
    hashes = {hashlib.sha256(canonical_json(changed(value, path))).hexdigest() for path in leaves(value)}
    assert len(hashes) == len(leaves(value))
    assert contract.hash not in hashes
    assert hashlib.sha256(canonical_json(value)).hexdigest() == contract.hash


def test_every_field_of_contract_and_shape_is_hashed() -> None:
    contract = contract_of(paper_plan(4, 3))
    for field in dataclasses.fields(DecoderShape):
        old = getattr(SHAPE, field.name)
        new = (*old, 1) if isinstance(old, tuple) else Rope((1.0,), 1.0) if isinstance(old, Rope) else old * 2
        assert contract_of(contract.plan, dataclasses.replace(SHAPE, **{field.name: new})).hash != contract.hash, field.name
    others = {
        "protocol_major": 2,
        "plan": paper_plan(4, 2),
        "shape": dataclasses.replace(SHAPE, hidden=17),
        "basis": "",
        "base": "",
        "exit": "",
    }
    assert set(others) == {field.name for field in dataclasses.fields(Contract)}
    for name, new in others.items():
        assert dataclasses.replace(contract, **{name: new}).hash != contract.hash, name


def test_what_this_release_does_not_run_is_refused_by_name() -> None:
    require_runnable(paper_plan(4, 3))
    require_runnable(plan_of([], []))
    for plan, message in (
        (plan_of([], [], front=1), "front_layers 1 and back_layers 0"),
        (plan_of([], [], back=2), "front_layers 0 and back_layers 2"),
        (plan_of([Source(0, ((SHARED, 3),), True)], [AdaptedLayer(0, 0, QKV)]), "source 0 is on the device"),
    ):
        with pytest.raises(UnsupportedPlan, match=message):
            require_runnable(plan)
