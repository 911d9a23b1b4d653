"""The exchange plan: what is legal, what follows from it, and that the contract hash sees every change of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from plora.artifact import (
    AdaptedLayer,
    BackLayers,
    Column,
    Core,
    DecoderShape,
    Entry,
    Exchange,
    ExchangePlan,
    Exit,
    FrontLayers,
    Rope,
    Segment,
    Source,
    entry_plan,
    grouped_plan,
    paper_plan,
    walk,
)
from plora.artifact.errors import DamagedFile, ManifestError, MissingFile, PlanError, PloraError
from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract
from plora.artifact.manifest import write_json
from plora.artifact.plan import SHARED, TARGETS
from plora.artifact.plans import read_plan
from plora.artifact.shape import check_fits
from plora.artifact.strict import canonical_json, decode, plain

from .strategies import legal_plans

SHAPE = DecoderShape(16, 4, 4, 2, 4, 24, 50, 64, 1e-5, (0, 0, 0, 0), Rope((1.0, 0.01), 1.0))
QKV = (("q", 3), ("k", 3), ("v", 3))
DOC = Path(__file__).parent.parent / "docs" / "exchange-plans.md"


def plan_of(sources: list[Source], adapted: list[AdaptedLayer], layers: int = 4, front: int = 0, back: int = 0) -> ExchangePlan:
    return ExchangePlan(layers, front, back, tuple(sources), tuple(adapted))


def contract_of(plan: ExchangePlan, shape: DecoderShape = SHAPE) -> Contract:
    return Contract(PROTOCOL_MAJOR, plan, shape, "ba" * 32, "5e" * 32, EXIT_CONVENTION)


SOURCE, ADAPTED = Source(1, ((SHARED, 3),)), AdaptedLayer(1, 1, QKV)
ILLEGAL: dict[str, tuple[Any, str]] = {
    "no layers": (lambda: plan_of([], [], layers=0), "plan has 0 layers, expected at least 1"),
    "front below 0": (lambda: plan_of([], [], front=-1), "front_layers -1 and back_layers 0"),
    "back below 0": (lambda: plan_of([], [], back=-1), "front_layers 0 and back_layers -1"),
    "none left for the cloud": (lambda: plan_of([], [], front=2, back=2), "at least one of 4 layers"),
    "front and back overlap": (lambda: plan_of([], [], front=3, back=2), "front_layers 3 and back_layers 2 must .* one of 4 layers"),
    "front and back of entry_plan overlap": (lambda: entry_plan(4, 3, 2, back_layers=2), "front_layers 3 and back_layers 2"),
    "front of grouped_plan below 0": (lambda: grouped_plan(4, 2, 3, front_layers=-1), "front_layers -1"),
    "sources fall": (lambda: plan_of([Source(2, ((SHARED, 3),)), SOURCE], [ADAPTED]), r"sources \[2, 1\] must be in rising order"),
    "source twice": (lambda: plan_of([SOURCE, SOURCE], [ADAPTED]), r"sources \[1, 1\] must be in rising order"),
    "source without readers": (lambda: plan_of([SOURCE], []), "source 1 feeds no layer"),
    "source in the front": (lambda: plan_of([SOURCE], [AdaptedLayer(2, 1, QKV)], front=2), r"source 1 lies outside .* 2\.\.3"),
    "source in the back": (lambda: plan_of([Source(3, ((SHARED, 3),))], [AdaptedLayer(3, 3, QKV)], back=1), r"source 3 .* 0\.\.2"),
    "source on device, not the entry": (
        lambda: plan_of([Source(1, ((SHARED, 3),), True)], [ADAPTED]), "source 1 is on the device, but only the entry layer 0"
    ),
    "shared injection with separate A": (
        lambda: plan_of([Source(1, QKV, shared_injection=2)], [ADAPTED]),
        r"source 1: a shared injection of 2 values with down-projections \['q', 'k', 'v'\]",
    ),
    "shared injection below 0": (lambda: plan_of([Source(1, ((SHARED, 3),), shared_injection=-1)], [ADAPTED]), "injection of -1 values"),
    "shared injection larger than what it stands for": (
        lambda: plan_of([Source(1, ((SHARED, 3),), shared_injection=10)], [ADAPTED]),
        "source 1: a shared injection of 10 values stands for 9 only",
    ),
    "shared injection of entry_plan, separate": (
        lambda: entry_plan(4, 1, 3, separate=True, shared_injection=2), "source 1: a shared injection of 2 values with down-projections"
    ),
    "down-projection that nobody reads": (
        lambda: plan_of([Source(1, (("q", 3), ("k", 3), ("v", 3), ("o", 3)))], [ADAPTED]), "no layer reads its down-projection o"
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
    "adapted in the front": (lambda: plan_of([Source(2, ((SHARED, 3),))], [AdaptedLayer(1, 2, QKV)], front=2), r"layer 1 is .*2\.\.3"),
    "source not listed": (lambda: plan_of([SOURCE], [ADAPTED, AdaptedLayer(2, 0, QKV)]), r"layer 2 has source 0, .* not among .*\[1\]"),
    "no targets": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, ())]), r"layer 1 has targets \[\]"),
    "targets out of order": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("v", 3), ("q", 3)))]), r"layer 1 has targets \['v', 'q'\]"),
    "target unknown": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("z", 3),))]), r"layer 1 has targets \['z'\]"),
    "out_rank 0": (lambda: plan_of([SOURCE], [AdaptedLayer(1, 1, (("q", 0),))]), "layer 1, target q: out_rank 0"),
    "no down-projection for a target": (
        lambda: plan_of([Source(1, (("q", 3), ("k", 3)))], [ADAPTED]), "layer 1, target v: source 1 has no down-projection for it"
    ),
    "group 0": (lambda: grouped_plan(4, 0, 3), "group of 0 layers"),
    "two ranks for four sources": (lambda: paper_plan(4, (3, 4)), r"2 ranks for 4 sources \(layers 0, 1, 2, 3\); give one, or one each"),
    "two ranks for one source": (lambda: entry_plan(4, 1, (3, 4)), r"2 ranks for 1 sources \(layers 1\)"),
    "no rank": (lambda: paper_plan(4, ()), "0 ranks for 4 sources"),
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
    assert plan.exchanges[1].columns == (Column(1, "q", SHARED, 0, 2), Column(1, "k", SHARED, 2, 4), Column(1, "v", SHARED, 4, 6))
    assert plan.exchanges[1].cores == (
        Core("layers.1.q.core", 0, 2, 0, 2), Core("layers.1.k.core", 0, 2, 2, 4), Core("layers.1.v.core", 0, 2, 4, 6)
    )  # fmt: skip


def test_separate_down_projections_have_columns_of_their_own() -> None:
    (exchange,) = paper_plan(1, 2, ("v", "q"), out_rank=5, separate=True).exchanges
    assert (exchange.compressed_columns, exchange.injection_columns) == (4, 10)
    assert exchange.columns == (Column(0, "q", "q", 0, 5), Column(0, "v", "v", 5, 10))
    assert exchange.cores == (Core("layers.0.q.core", 0, 2, 0, 5), Core("layers.0.v.core", 2, 4, 5, 10))
    assert [(core.rank, core.out_rank) for core in exchange.cores] == [(2, 5), (2, 5)]


def test_a_shared_injection_is_one_core_whose_expansion_has_the_columns() -> None:
    (own,) = grouped_plan(2, 2, 3, ("q", "v")).exchanges
    (shared,) = grouped_plan(2, 2, 3, ("q", "v"), shared_injection=5).exchanges
    assert shared.cores == (Core("sources.0.core", 0, 3, 0, 5),)
    assert (shared.injection_columns, shared.up_columns, shared.shared) == (5, 12, True)
    assert (own.injection_columns, own.up_columns, own.shared) == (12, 12, False)
    assert shared.columns == own.columns  # what each B reads is the same, before or after the expansion


def test_every_source_may_have_a_rank_of_its_own() -> None:
    plan = grouped_plan(6, 2, (4, 3, 2), ("q",))
    assert [source.ranks for source in plan.sources] == [((SHARED, rank),) for rank in (4, 3, 2)]
    assert [each.out_ranks for each in plan.adapted] == [(("q", rank),) for rank in (4, 4, 3, 3, 2, 2)]
    assert grouped_plan(6, 2, (4,)) == grouped_plan(6, 2, 4)
    assert {rank for each in grouped_plan(6, 2, (4, 3, 2), ("q",), out_rank=5).adapted for _, rank in each.out_ranks} == {5}


def test_the_entry_plan_is_one_round_trip() -> None:
    plan = entry_plan(6, 2, 3, back_layers=1)
    (source,) = plan.sources
    assert (source.layer, source.on_device) == (2, True)
    assert [(each.layer, each.source) for each in plan.adapted] == [(layer, 2) for layer in (2, 3, 4)]
    assert all(tuple(target for target, _ in each.out_ranks) == TARGETS for each in plan.adapted)
    assert (plan.exchanges, plan.round_trips, plan.cloud_layers, plan.device_layers) == ((), 1, 3, (0, 1, 5))
    assert walk(plan) == (
        FrontLayers(2), Entry(plan.entry_exchange), Segment(0, 2, 5, None, (-1,)), Exit(), BackLayers(5, 6)
    )  # fmt: skip


def test_groups_begin_after_the_front_layers() -> None:
    plan = grouped_plan(8, 3, 2, ("q",), front_layers=1, back_layers=2, entry_on_device=True)
    assert [(source.layer, source.on_device) for source in plan.sources] == [(1, True), (4, False)]
    assert plan.segments == (Segment(0, 1, 4, None, (-1,)), Segment(1, 4, 6, 0, (0,)))
    assert [plan.cache_of(segment) for segment in plan.segments] == [slice(0, 3), slice(3, 5)]
    assert plan.round_trips == 2


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

    for exchange in plan.all_exchanges:
        for starts, stops, end in (
            ([c.start for c in exchange.columns], [c.stop for c in exchange.columns], exchange.up_columns),
            ([c.up_start for c in exchange.cores], [c.up_stop for c in exchange.cores], exchange.injection_columns),
        ):
            assert [*starts, end] == [0, *stops]  # side by side, no gaps
        assert all(0 <= core.down_start < core.down_stop <= exchange.feature_columns for core in exchange.cores)
        assert exchange.shared or exchange.up_columns == exchange.injection_columns
        assert len(exchange.cores) == (1 if exchange.shared else len(exchange.columns))
        ranks = dict(plan.source(exchange.source).ranks)
        names = [SHARED] if exchange.shared else [column.down for column in exchange.columns]
        assert [core.rank for core in exchange.cores] == [exchange.features or ranks[name] for name in names]
    assert len({core.name for core in plan.cores}) == len(plan.cores)
    wanted = {(each.layer, target, out_rank) for each in plan.adapted for target, out_rank in each.out_ranks}
    assert sorted(wanted) == sorted((c.layer, c.target, c.out_rank) for c in plan.columns)
    assert (plan.device_layers, plan.cloud_layers) == (tuple(each for each in range(plan.layers) if each not in cloud), len(cloud))


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


# Plans from files


@settings(max_examples=20, deadline=None)
@given(plan=legal_plans())
def test_a_plan_file_is_read_as_it_was_written(plan: ExchangePlan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    write_json(path, plan)
    assert read_plan(path) == plan


def documented() -> str:
    """The plan that the documentation shows."""
    (block,) = re.findall(r"^```json\n(.*?)^```", DOC.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return block


def test_the_documented_plan_is_what_the_document_says(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(documented())
    plan = read_plan(tmp_path / "plan.json")
    assert (plan.layers, plan.front_layers, plan.back_layers) == (30, 2, 1)
    assert plan.round_trips == 2
    assert plan.entry_exchange is not None
    assert {column.layer for column in plan.entry_exchange.columns} == {2, 3}
    assert [(each.source, each.shared, each.injection_columns) for each in plan.exchanges] == [(12, True, 48)]
    assert [(segment.first, segment.stop) for segment in plan.segments] == [(2, 12), (12, 29)]
    check_fits(plan, dataclasses.replace(SHAPE, hidden=576, layers=30, windows=(0,) * 30))


WRONG_FILES: dict[str, tuple[Callable[[dict[str, Any]], object], type[PloraError], str]] = {
    "unknown key": (lambda plan: plan.update(exchanges=3), ManifestError, r"plan\.json\.exchanges: unknown key; known: layers, "),
    "unknown key inside": (lambda plan: plan["sources"][0].update(rank=3), ManifestError, r"\.sources\[0\]\.rank: unknown key"),
    "missing key": (lambda plan: plan.pop("back_layers"), ManifestError, r"plan\.json\.back_layers: missing key"),
    "rank as text": (lambda plan: plan["sources"][0].update(ranks=[["shared", "3"]]), ManifestError, r"\.ranks\[0\]\[1\]: got '3'"),
    "illegal": (
        lambda plan: plan["sources"][1].update(on_device=True),
        PlanError,
        "source 12 is on the device, but only the entry layer 2 can be",
    ),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_wrong_plan_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, error, message = WRONG_FILES[name]
    plan = json.loads(documented())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(error, match=message):
        read_plan(tmp_path / "plan.json")


def test_a_plan_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"none\.json: not found"):
        read_plan(tmp_path / "none.json")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(DamagedFile, match="not valid JSON"):
        read_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(ManifestError, match="expected an object with the keys of ExchangePlan"):
        read_plan(tmp_path / "plan.json")
