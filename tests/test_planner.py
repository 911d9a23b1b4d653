"""plora-plan: predictions against hand calculations, what is proposed and why, calibration that trains and resumes, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

import plora.planner.calibration as calibrating
from plora.artifact import DecoderShape, ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.cost import payload
from plora.artifact.errors import AdapterError, DamagedFile, DataError, ModelError, NeedsUnmet, PlanError, UsageError
from plora.artifact.plan import TARGETS
from plora.artifact.plans import QKV, read_plan
from plora.device_runtime.doctor import EdgeReport
from plora.device_runtime.forecast import FRAME_BYTES, CloudFigures, Curve, LinkFigures
from plora.export.config import ExportConfig
from plora.export.dry_run import dry_run
from plora.export.export import export
from plora.export.halves import write_halves
from plora.models.basis import new_adapter
from plora.models.checkpoint import read_base, read_skeleton
from plora.models.plan_flags import PlanChoice
from plora.models.report import Report
from plora.models.tune import tune
from plora.models.tune_config import TuneConfig
from plora.models.unfinished import Unfinished
from plora.planner.basis_pool import BasisPool
from plora.planner.calibration import CalibrationConfig, read_calibration
from plora.planner.candidates import EXCHANGES, Candidate, default_rank, grid, own_inputs, ranks
from plora.planner.cli import main
from plora.planner.config import Link, PlanConfig
from plora.planner.machine import COPIES, GROWTH, OVERHEAD_SECONDS, Side, copies, from_doctor, layer_values, measure, stated
from plora.planner.needs import Needs, explain, number, unmet
from plora.planner.planning import plan_for
from plora.planner.predict import Figures, World, predict, setup
from plora.planner.proposal import Proposal, Quality, choose, dominates, pareto, rounded
from plora.planner.quality import Interpolation, rising, skeleton
from plora.planner.table import commands
from plora.protocol import uniform

from .conftest import save_tiny_base

LAYERS = 6
ROWS = [{"prompt": f"what is {n}?", "response": f"it is {'quick ' * (n % 4)}{n * n}"} for n in range(24)]
LINK = ("--rtt-ms", "40", "--up-mbit", "8", "--down-mbit", "80")
SPEEDS = ("--device-ms-per-layer", "1.5", "--cloud-ms-per-layer", "0.5")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and rows. Do not change them."""
    folder = tmp_path_factory.mktemp("planner")
    save_tiny_base(folder / "base", "llama", num_hidden_layers=LAYERS)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


@pytest.fixture(scope="module")
def world(work: Path) -> World:
    """40 ms, 8 and 80 Mbit/s, 2 ms a layer on the device and 1 in the cloud, whatever the rows; fp16; 10 prompt tokens."""
    shape, bare = read_skeleton(str(work / "base"))
    link = LinkFigures(0.04, 0.04, 0.04, 0.0, 1, 8e6, 80e6)
    device, cloud = (Side(Curve(((1, seconds),)), None, "stated") for seconds in (2e-3, 1e-3))
    return World(shape, bare, link, device, cloud, uniform("fp16"), "fp32", 10)


@pytest.fixture(scope="module")
def calibrated(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `plora-plan --data` left: a plan and its calibration. Do not change them."""
    out = tmp_path_factory.mktemp("calibrated") / "plan.json"
    result = run(work, "--data", str(work / "rows.jsonl"), "--calibration-steps", "12", "--out", str(out))
    assert result.exit_code == 0, result.stderr
    return out


def run(work: Path, *flags: str) -> Result:
    return CliRunner().invoke(main, [str(work / "base"), *LINK, *SPEEDS, *flags])


# Predictions


def adapter_share(plan: ExchangePlan, shape: DecoderShape) -> float:
    """Of a cloud layer's weights, those that the adapter adds."""
    up = sum(column.out_rank * shape.out_features(column.target) for column in plan.columns)
    down = sum(rank * shape.hidden for source in plan.sources if not source.on_device for _, rank in source.ranks)
    return (up + down) / (layer_values(shape) * plan.cloud_layers)


def test_an_entry_plan_takes_what_the_formula_says(world: World) -> None:
    shape, plan = world.shape, entry_plan(LAYERS, 2, 4, shared_injection=16)
    hidden, whole = shape.hidden, layer_values(shape)
    own = predict(plan, world)
    up, down = 2 * (hidden + 16) + FRAME_BYTES, 2 * hidden + FRAME_BYTES
    device = 2e-3 * (2 + (4 * hidden + 16 * 4 + shape.vocabulary * hidden) / whole)
    cloud = 4 * 1e-3 * (1 + adapter_share(plan, shape))
    seconds = 0.04 + 8 * up / 8e6 + 8 * down / 80e6 + device + cloud + OVERHEAD_SECONDS
    assert own.tokens_per_second == pytest.approx(1 / seconds)
    assert own.megabytes_per_1000_tokens == pytest.approx((up + down) / 1e3)
    assert own.trained_values == 64
    # one chunk: nothing of it overlaps; the exit is one row
    prompt_up = 10 * 2 * (hidden + 16) + FRAME_BYTES
    first = seconds + 8 * (prompt_up - up) / 8e6
    assert own.first_token_millis == pytest.approx(1e3 * first)


def test_every_exchange_costs_a_round_trip(world: World) -> None:
    none = predict(grouped_plan(LAYERS, 3, 4, TARGETS, entry_on_device=True), world)
    more = predict(grouped_plan(LAYERS, 1, 4, TARGETS, entry_on_device=True), world)
    assert 1 / more.tokens_per_second - 1 / none.tokens_per_second == pytest.approx(4 * (0.04 + OVERHEAD_SECONDS), rel=0.05)


@pytest.mark.parametrize("wire", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize(
    "plan",
    [paper_plan(LAYERS, 4), entry_plan(LAYERS, 0, 4), entry_plan(LAYERS, 2, 4, QKV, shared_injection=12),
     grouped_plan(LAYERS, 2, 4, TARGETS, shared_injection=8, front_layers=1, entry_on_device=True)],
)  # fmt: skip
def test_bytes_are_those_of_the_cost_model_and_framing(plan: ExchangePlan, wire: str, world: World) -> None:
    own = predict(plan, dataclasses.replace(world, precision=uniform(wire)))
    cost = payload(plan, world.shape, wire)
    assert own.megabytes_per_1000_tokens == pytest.approx((cost.up + cost.down + 2 * plan.round_trips * FRAME_BYTES) / 1e3)


@pytest.mark.parametrize("edge_dtype", ["fp32", "fp16"])
def test_the_device_holds_what_the_dry_run_says(work: Path, world: World, edge_dtype: str) -> None:
    choice = PlanChoice("entry", (4,), front_layers=2, shared_injection=12)
    facts = dry_run(str(work / "base"), None, choice, "fp32", edge_dtype, None)
    own = predict(choice.plan(LAYERS), dataclasses.replace(world, edge_dtype=edge_dtype))
    assert own.device_megabytes == facts["edge"]["bytes"] / 1e6


def test_figures_of_a_side() -> None:
    assert stated("1.5", "--x").layer == Curve(tuple((rows, 1.5 * factor / 1e3) for rows, factor in GROWTH))
    assert stated("1:2,64:9", "--x").layer == Curve(((1, 2e-3), (64, 9e-3)))
    for wrong in ("fast", "64:9,1:2", "1:2,", "-1", "nan", "1:-3"):
        with pytest.raises(UsageError, match=f"--x {wrong}: expected milliseconds"):
            stated(wrong, "--x")


def test_a_doctors_report_says_the_rest(work: Path, world: World, tmp_path: Path) -> None:
    report = doctors_report()
    edge, link, cloud = report["edges"][0], report["link"], report["cloud"]
    told = from_doctor(report, "file")
    assert told.device == Side(Curve(((1, 0.002), (9, 0.004))), 0.002, "file")
    assert told.cloud == Side(Curve(((1, 0.001), (9, 0.003))), None, "file", adapted=True)
    assert told.link == LinkFigures(0.03, 0.03, 0.03, 0.0, 1, 5e6, 6e6)
    assert told.overhead_seconds == 0.0004
    bare = {**edge, "front_layers": 0, "back_layers": 0, "device": {**edge["device"], "head": {"1": 0.009}}}
    assert from_doctor({**report, "edges": [bare, edge]}, "file").device == told.device  # whichever the cloud serves
    assert from_doctor({**report, "edges": [bare]}, "file").device is None
    (tmp_path / "doctor.json").write_text(json.dumps(report))
    result = CliRunner().invoke(main, [str(work / "base"), "--doctor", str(tmp_path / "doctor.json"), "--rtt-ms", "70", "--json"])
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["link"] == {"rtt_millis": 70, "up_mbit": 5, "down_mbit": 6}
    assert facts["device"] == {"layer_millis": {"1": 2, "9": 4}, "head_millis": 2, "origin": str(tmp_path / "doctor.json")}
    flags = ["--doctor", str(tmp_path / "doctor.json"), "--device-ms-per-layer", "1:7,9:8", "--json"]
    facts = json.loads(CliRunner().invoke(main, [str(work / "base"), *flags]).stdout)
    assert facts["device"] == {"layer_millis": {"1": 7, "9": 8}, "head_millis": 2, "origin": "stated"}  # what is not stated is the report's
    wrong_links = ({}, None, {**link, "rtt_seconds": "0.03"}, {**link, "rtt_seconds": 0}, {**link, "up_bits_per_second": math.nan})
    wrongs: list[Any] = [[], {"edges": []}, {**report, "edges": [{**edge, "device": {}}]}, {**report, "cloud": {"layer": {"x": 1}}}]
    wrongs += [{**report, "link": wrong} for wrong in wrong_links]
    wrongs += [{**report, "cloud": {**cloud, "overhead_seconds": -1}}, {**report, "edges": [{**edge, "round_trips": 0}]}]
    for wrong in wrongs:
        with pytest.raises(DamagedFile, match="file: no report of `plora-device doctor --json`"):
            from_doctor(wrong, "file")


def test_a_doctor_says_what_is_read() -> None:
    report = doctors_report()
    for part, cls in ((report["link"], LinkFigures), (report["cloud"], CloudFigures), (report["edges"][0], EdgeReport)):
        assert set(part) <= {field.name for field in dataclasses.fields(cls)}


def doctors_report() -> dict[str, Any]:
    """The part of one that is read."""
    edge = {"round_trips": 2, "front_layers": 2, "back_layers": 0, "device": {"front": {"1": 0.004, "9": 0.008}, "head": {"1": 0.002}}}
    link = {"rtt_seconds": 0.03, "up_bits_per_second": 5e6, "down_bits_per_second": 6e6}
    return {"link": link, "cloud": {"layer": {"1": 0.001, "9": 0.003}, "overhead_seconds": 0.0008}, "edges": [edge]}


def test_what_a_doctor_measured_is_not_counted_twice(work: Path, world: World, tmp_path: Path) -> None:
    (tmp_path / "doctor.json").write_text(json.dumps(doctors_report()))
    flags = [str(work / "base"), "--doctor", str(tmp_path / "doctor.json"), "--json"]
    for link, overhead in (((), 0.4), (("--rtt-ms", "70"), 1e3 * OVERHEAD_SECONDS)):  # the overhead goes with the RTT
        facts = json.loads(CliRunner().invoke(main, [*flags, *link]).stdout)
        assert facts["overhead_millis_per_round_trip"] == pytest.approx(overhead)
    plan = entry_plan(LAYERS, 2, 4)
    adapted = setup(plan, dataclasses.replace(world, cloud=dataclasses.replace(world.cloud, adapted=True)))
    assert adapted.cloud.layer == world.cloud.layer
    assert setup(plan, world).cloud.layer.seconds(1) > world.cloud.layer.seconds(1)


def test_this_machine_can_be_measured(world: World) -> None:
    side = measure(world.shape, 1, True, lambda line: None)
    assert side.origin == "measured here"
    assert all(0 < seconds < 10 for _, seconds in side.layer.points)
    assert side.head_seconds is not None and side.head_seconds > 0


def test_large_layers_are_timed_once_in_memory(world: World) -> None:
    assert copies(world.shape) == COPIES
    assert copies(dataclasses.replace(world.shape, hidden=4096, intermediate=14336)) == 1


# Candidates


def test_the_grid_is_bounded_and_legal(world: World) -> None:
    rank = default_rank(world.shape)
    assert rank == 16  # the narrowest projection's width
    found = grid(world.shape, rank)
    assert len(found) == len(set(found.values())) <= 600
    for candidate, plan in found.items():
        assert candidate.plan(LAYERS) == plan
        assert (plan.front_layers, len(plan.exchanges)) == (candidate.front_layers, candidate.exchanges)
        assert {name for adapted in plan.adapted for name, _ in adapted.out_ranks} == set(candidate.targets)
        assert {rank for source in plan.sources for _, rank in source.ranks} == {candidate.rank}
        if not candidate.own:
            assert plan.entry_exchange is not None and candidate.exchanges in EXCHANGES
            assert bool(plan.sources[0].shared_injection) == bool(candidate.shared)
            assert sum(source.shared_injection for source in plan.sources) <= candidate.shared
    assert dataclasses.replace(own_inputs(rank), exchanges=LAYERS) in found
    assert found[dataclasses.replace(own_inputs(rank), exchanges=LAYERS)] == paper_plan(LAYERS, rank, TARGETS)
    with pytest.raises(PlanError, match="rank 17 exceeds 16, the width of the narrowest projection; give a smaller --rank"):
        grid(world.shape, 17)


def test_ranks() -> None:
    assert ranks(64) == (64, 32, 16)
    assert ranks(6) == (6,)
    assert ranks(2) == (2,)


# Front and choice


def proposal(
    rate: float = 10.0, first: float = 100.0, link: float = 5.0, device: float = 100.0, quality: float | None = 0.9, rank: int = 4
) -> Proposal:
    candidate = Candidate(0, 0, False, TARGETS, 0, rank)
    share = None if quality is None else Quality(quality, "calibrated")
    return Proposal(candidate, entry_plan(LAYERS, 0, 4), Figures(rate, first, link, device, 1000), share)


figures = st.integers(1, 4).map(float)
proposals = st.lists(st.builds(proposal, figures, figures, figures, figures, figures), min_size=1, max_size=12)


@given(proposals)
def test_the_front_is_what_none_dominates(every: list[Proposal]) -> None:
    front = pareto(every)
    assert front
    for one in front:
        assert not any(dominates(other.scores, one.scores) for other in every)
    for one in every:
        assert any(other.scores == one.scores or dominates(other.scores, one.scores) for other in front)
    assert len({one.scores for one in front}) == len(front)
    assert [one.scores for one in front] == sorted((one.scores for one in front), reverse=True)


@given(proposals)
def test_what_is_chosen_has_the_most_of_it(every: list[Proposal]) -> None:
    front = pareto(every)
    for name, axis in (("fastest", 0), ("best", 4), ("smallest", 3), ("leanest", 2)):
        assert choose(front, name).scores[axis] == max(each.scores[axis] for each in every)


def test_without_quality_more_trained_values_are_better() -> None:
    few, many = proposal(quality=None), proposal(quality=None)
    many = dataclasses.replace(many, figures=dataclasses.replace(many.figures, trained_values=9000))
    assert pareto([few, many]) == [many]
    with pytest.raises(UsageError, match="--choose worst: expected a number of the table, or one of fastest, best"):
        choose([few], "worst")


def test_scores_are_rounded() -> None:
    assert (rounded(0.0123456), rounded(19.94), rounded(99.6), rounded(0)) == (0.012, 20, 100, 0)


# Needs


def test_the_need_that_binds_is_named() -> None:
    every = [proposal(rate=12, device=150, quality=0.8), proposal(rate=8, device=90, quality=0.85, rank=8)]
    needs = Needs(device_megabytes=200, quality=0.9, tokens_per_second=7)
    found = unmet(every, needs)
    assert found is not None
    assert (found.binding, found.freed) == ((("--quality",),), (2,))
    assert found.nearest == every[1]
    assert found.shortfalls == {"--quality": pytest.approx(0.05 / 0.9)}
    text = explain(found, needs)
    assert "none of 2 plans meets every need; --quality 0.9 binds: without it 2 plans would do" in text
    assert "Nearest: entry, front 0, all seven, unshared, rank 8: 0.85 quality against 0.9 (6% short)" in text
    assert "8 tokens/s, first token 100 ms, 5 MB per 1,000 tokens, 90 MB on the device, quality 0.85" in text


def test_either_of_two_needs_may_bind() -> None:
    every = [proposal(rate=20, device=300), proposal(rate=5, device=90, rank=8)]
    found = unmet(every, Needs(device_megabytes=100, tokens_per_second=10))
    assert found is not None
    assert found.binding == (("--device-mb",), ("--min-tokens-per-second",))
    assert found.freed == (1, 1)
    assert found.nearest == every[1]  # half as fast is nearer than three times as large


def test_a_shortfall_in_the_third_digit_does_not_outweigh_another_need() -> None:
    """All are 26 % too large, as tables and head make them; one of them is fast enough."""
    every = [proposal(rate=3, device=113.3), proposal(rate=9, device=113.6, rank=8), proposal(rate=3, device=113.4, rank=4)]
    found = unmet(every, Needs(device_megabytes=90, tokens_per_second=5))
    assert found is not None
    assert found.nearest == every[1]
    assert set(found.shortfalls) == {"--device-mb"}


def test_needs_may_bind_together() -> None:
    needs = Needs(device_megabytes=10, tokens_per_second=100, first_token_millis=1000)
    found = unmet([proposal()], needs)
    assert found is not None
    assert found.binding == (("--device-mb", "--min-tokens-per-second"),)
    assert "--device-mb 10 and --min-tokens-per-second 100 bind together: without them 1 plan would do" in explain(found, needs)
    assert found.shortfalls == {"--device-mb": pytest.approx(9.0), "--min-tokens-per-second": pytest.approx(0.9)}


def test_figures_for_a_person_have_no_exponents() -> None:
    shown = [number(value, 3) for value in (1234567.0, 999.7, 123.456, 0.5, 0.00001234, -1.0)]
    assert shown == ["1,234,567", "1,000", "123", "0.5", "0.0000123", "-1"]
    needs = Needs(device_megabytes=20000, tokens_per_second=1e-5)
    found = unmet([proposal(rate=0.0000012, first=1234567, link=123456, device=1234567)], Needs(20000, None, 1e-5))
    assert found is not None
    text = explain(found, needs)
    assert "1,234,567 MB on the device against 20,000 (6,073% over), 0.0000012 tokens/s against 0.00001 (88% short)" in text
    assert "first token 1,234,567 ms, 123,456 MB per 1,000 tokens" in text
    assert "--device-mb 20000 and --min-tokens-per-second 0.00001 bind together" in text  # as flags are typed


def test_needs_that_are_met() -> None:
    needs = Needs(100, 0.9, 10, 100, 5)
    assert len(needs.all) == 5
    assert unmet([proposal(), proposal(rate=1)], needs) is None  # limits are met by what equals them
    assert needs.unmet(proposal(rate=9, link=6)) == ("--min-tokens-per-second", "--max-mb-per-1000-tokens")
    assert needs.unmet(proposal(quality=None)) == ("--quality",)


# Quality from a few


def test_a_line_that_falls_is_made_level() -> None:
    assert rising([(3, 2.0), (1, 1.0), (2, 3.0)]).points == ((1, 1.0), (2, 2.5), (3, 2.5))


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(-5, 5)), min_size=1, max_size=8, unique_by=lambda point: point[0]))
def test_a_rising_line_never_falls(points: list[tuple[int, float]]) -> None:
    line = rising([(float(x), y) for x, y in points])
    heights = [line.at(x / 2) for x in range(-2, 104)]
    assert all(after >= before - 1e-12 for before, after in zip(heights, heights[1:], strict=False))
    assert min(y for _, y in points) - 1e-12 <= heights[0] and heights[-1] <= max(y for _, y in points) + 1e-12


def losses_of(shape: DecoderShape) -> dict[Candidate, float]:
    """Of the skeleton, as if: 1 is the reference's, 2 the control's."""
    plans = grid(shape, default_rank(shape))
    found = skeleton(shape.layers, plans, default_rank(shape))
    return {each: 1.0 if each.own else 1.3 + 0.02 * number for number, each in enumerate(found)}


def test_the_skeleton_is_small_and_varies_one_thing_at_a_time(world: World) -> None:
    own, anchor, *others = losses_of(world.shape)
    assert own == dataclasses.replace(own_inputs(16), exchanges=LAYERS)
    assert len(others) <= 6
    for each in others:
        names = [field.name for field in dataclasses.fields(each) if getattr(each, field.name) != getattr(anchor, field.name)]
        assert len(names) == 1
    rope = dataclasses.replace(world.shape.rope, inv_freq=(1.0,) * 32)
    sizes: dict[str, Any] = {"layers": 30, "hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "intermediate": 1536}
    big = dataclasses.replace(world.shape, **sizes, windows=(0,) * 30, rope=rope)
    found = skeleton(30, grid(big, 64), 64)
    assert [each.words for each in found] == [
        "own inputs, front 0, all seven, unshared, rank 64", "entry, front 4, all seven, unshared, rank 64",
        "entry, front 4, all seven, shared 2048, rank 64", "entry, front 4, all seven, shared 128, rank 64",
        "entry + 4 exchanges, front 4, all seven, unshared, rank 64", "entry, front 0, all seven, unshared, rank 64",
        "entry, front 4, all seven, unshared, rank 16", "entry, front 4, q,k,v, unshared, rank 64",
    ]  # fmt: skip


def test_what_was_tuned_is_not_interpolated(world: World) -> None:
    losses = losses_of(world.shape)
    quality = Interpolation(LAYERS, 2.0, losses)
    for candidate, loss in losses.items():
        assert quality.quality(candidate) == Quality(pytest.approx(2.0 - loss), "calibrated")


def test_interpolation_never_falls_with_more_values_rank_or_targets(world: World) -> None:
    plans = grid(world.shape, 16)
    quality = Interpolation(LAYERS, 2.0, losses_of(world.shape))
    guessed = {each: quality.quality(each) for each in plans}
    assert {each.origin for each in guessed.values()} == {"calibrated", "interpolated"}
    compared = 0
    for one in (each for each in plans if guessed[each].origin == "interpolated" and not each.own):
        for other in (each for each in plans if guessed[each].origin == "interpolated" and not each.own):
            unshared = (one.shared or math.inf) <= (other.shared or math.inf)
            rest = one.rank <= other.rank and len(one.targets) <= len(other.targets)
            if (one.front_layers, one.exchanges) == (other.front_layers, other.exchanges) and unshared and rest:
                compared += 1
                assert guessed[one].share <= guessed[other].share + 1e-12
    assert compared > 10


def test_differences_add_up(world: World) -> None:
    anchor = next(each for each in losses_of(world.shape) if not each.own)
    losses = {each: 1.0 if each.own else 1.2 if each == anchor else 1.3 + 0.05 * (each.rank < 16) for each in losses_of(world.shape)}
    quality = Interpolation(LAYERS, 2.0, losses)
    narrow, fewer = dataclasses.replace(anchor, targets=QKV), dataclasses.replace(anchor, rank=4)
    shares = {each: 2.0 - loss for each, loss in losses.items()}
    both = quality.quality(dataclasses.replace(anchor, targets=QKV, rank=4))
    assert both == Quality(pytest.approx(shares[narrow] + shares[fewer] - shares[anchor]), "interpolated")


def test_a_lucky_small_plan_moves_no_other(world: World) -> None:
    """A smaller rank that did better than the anchor makes its line level, and takes nothing from plans that have the anchor's rank."""
    losses = losses_of(world.shape)
    anchor = next(each for each in losses if not each.own)
    lucky = {each: 1.0 if each.own else 1.2 if each.rank < 16 else 1.3 for each in losses}
    quality = Interpolation(LAYERS, 2.0, lucky)
    shares = [quality.quality(dataclasses.replace(anchor, rank=rank, front_layers=2, targets=QKV)).share for rank in (4, 8, 16)]
    assert shares == [pytest.approx(0.7)] * 3


def test_a_reference_that_gains_nothing_is_refused(world: World) -> None:
    with pytest.raises(DataError, match="the reference's held-out loss is 1.0000, the control's 0.9000: .* more --calibration-steps"):
        Interpolation(LAYERS, 0.9, losses_of(world.shape))
    with pytest.raises(DataError, match="lacks own inputs"):
        Interpolation(LAYERS, 2.0, {})
    with pytest.raises(DataError, match="lacks the entry plan"):
        Interpolation(LAYERS, 2.0, {own_inputs(16): 1.0})


def test_the_reference_is_the_better_of_those_that_exchange(world: World) -> None:
    losses = losses_of(world.shape)
    mixed = next(each for each in losses if each.exchanges and not each.own)
    quality = Interpolation(LAYERS, 2.0, {**losses, mixed: 0.9})
    assert quality.reference == mixed
    assert quality.quality(mixed).share == pytest.approx(1.0)
    assert quality.quality(next(each for each in losses if each.own)).share == pytest.approx(1 / 1.1)


# Calibration


def test_the_pool_has_the_basis_that_a_plan_would_have_alone(work: Path) -> None:
    base = read_base(str(work / "base"))
    base.model.float()
    pool = BasisPool.of(base, 8, 0)
    for plan in (
        entry_plan(LAYERS, 2, 8),
        grouped_plan(LAYERS, 3, 4, QKV, entry_on_device=True),
        entry_plan(LAYERS, 0, 8, shared_injection=12),
    ):
        alone, pooled = new_adapter(base, plan, "pca", 1.0, 0), pool.adapter(plan)
        assert alone.basis.keys() == pooled.basis.keys()
        for name, tensor in alone.basis.items():
            if not name.endswith("expand"):
                assert (tensor - pooled.basis[name]).abs().max() < 2e-3 * tensor.abs().max()


def test_calibration_trains_and_tells(work: Path, calibrated: Path, world: World) -> None:
    found = read_calibration(calibrated.with_name("plan.json.calibration.json"), world.shape)
    assert found.steps == 12 and (found.rows, found.held_out_rows) == (19, 5)
    assert found.control is not None
    assert len(found.by_candidate) <= 8
    own, *rest = found.by_candidate.values()
    assert own < found.control  # another formula learns more than a constant
    assert min(rest) < found.control
    assert len({round(loss, 6) for loss in found.by_candidate.values()}) == len(found.by_candidate)
    rates = {each.name: each.learning_rate for each in found.losses}
    assert rates["control"] == 1e-2
    assert {rate for name, rate in rates.items() if "unshared" in name} == {4e-3}
    assert {rate for name, rate in rates.items() if ", shared" in name} == {1e-2}


def test_the_same_command_tunes_nothing_twice(work: Path, calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = json.loads(calibrated.with_name("plan.json.calibration.json").read_text())
    left = {**kept, "losses": kept["losses"][:-2]}  # as an interrupted run leaves it
    (tmp_path / "plan.json.calibration.json").write_text(json.dumps(left))
    tuned: list[Any] = []
    real = calibrating.short_tune

    def counted(*arguments: Any) -> float:
        tuned.append(arguments[0])
        return real(*arguments)

    monkeypatch.setattr(calibrating, "short_tune", counted)
    flags = ("--data", str(work / "rows.jsonl"), "--calibration-steps", "12", "--out", str(tmp_path / "plan.json"))
    result = run(work, *flags)
    assert result.exit_code == 0, result.stderr
    assert len(tuned) == 2
    again = json.loads((tmp_path / "plan.json.calibration.json").read_text())
    assert [each["name"] for each in again["losses"]] == [each["name"] for each in kept["losses"]]
    assert again["wanted"] == [each["name"] for each in kept["losses"]]
    for one, other in zip(again["losses"], kept["losses"], strict=True):
        assert one["held_out_loss"] == pytest.approx(other["held_out_loss"], rel=1e-4)
    assert run(work, *flags, "--replace").exit_code == 0
    assert len(tuned) == 2
    result = run(work, *flags[:3], "1", *flags[4:], "--replace")  # other settings
    assert len(tuned) == 2 + len(kept["losses"])
    assert "of another base, other rows or settings: calibrating anew" in result.stderr


def test_an_interrupted_calibration_keeps_what_it_has(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = calibrating.short_tune, []

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(calibrating, "short_tune", interrupted)
    result = run(work, "--data", str(work / "rows.jsonl"), "--calibration-steps", "1", "--out", str(tmp_path / "plan.json"))
    assert result.exit_code == 130
    assert "2 of 9 tunes are kept in" in result.stderr or "2 of 8 tunes are kept in" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json.calibration.json"]
    assert len(json.loads((tmp_path / "plan.json.calibration.json").read_text())["losses"]) == 2


def calibrate_few(work: Path, kept: Path, rank: int = 16) -> Any:
    """The control and the anchor, one step each."""
    shape, _ = read_skeleton(str(work / "base"))
    plans = grid(shape, 16)
    anchor = skeleton(LAYERS, plans, 16)[1]
    return calibrating.calibrate(
        str(work / "base"), CalibrationConfig(work / "rows.jsonl", steps=1), {anchor: plans[anchor]}, rank, kept, Report()
    )


def test_calibrations_are_private(calibrated: Path) -> None:
    assert calibrated.with_name("plan.json.calibration.json").stat().st_mode & 0o777 == 0o600


def test_the_control_has_the_studys_targets(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors: list[set[str]] = []
    real = calibrating.StaticBias

    def spied(*arguments: Any) -> Any:
        control = real(*arguments)
        vectors.append({name.split("_", 1)[1] for name in control.vectors})
        return control

    monkeypatch.setattr(calibrating, "StaticBias", spied)
    first = calibrate_few(work, tmp_path / "kept")
    assert vectors == [set(QKV)]
    monkeypatch.setattr(calibrating, "CONTROL_TARGETS", TARGETS)
    assert calibrate_few(work, tmp_path / "kept").key != first.key
    assert vectors == [set(QKV), set(TARGETS)]


def test_a_rank_that_the_text_lacks_ends_before_the_first_tune(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> Any:
        raise AdapterError("rank")

    monkeypatch.setattr(calibrating.BasisPool, "of", refused)
    monkeypatch.setattr(calibrating, "short_tune", lambda *arguments: pytest.fail("tuned"))
    with pytest.raises(AdapterError, match="rank"):
        calibrate_few(work, tmp_path / "kept")


def test_machines_are_judged_before_calibration(work: Path, tmp_path: Path) -> None:
    """There are no rows, which calibration would say."""
    (tmp_path / "doctor.json").write_text("{}")
    flags = ("--data", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "plan.json"))
    assert "no report of `plora-device doctor" in run(work, *flags, "--doctor", str(tmp_path / "doctor.json")).stderr
    assert "--device-ms-per-layer slow" in run(work, *flags, "--device-ms-per-layer", "slow").stderr


@pytest.mark.parametrize("times", [1, 2])
def test_a_tune_that_diverges_is_made_once_more_at_a_lower_rate(
    times: int, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, rates = calibrating.short_tune, []

    def diverging(tuned: Any, packs: Any, steps: int, rate: float, told: Any) -> None:
        rates.append(rate)
        if 2 <= len(rates) < 2 + times:  # of the anchor, behind the control
            raise ModelError("the loss is nan")
        real(tuned, packs, steps, rate, told)

    monkeypatch.setattr(calibrating, "short_tune", diverging)
    if times == 1:
        assert [each.learning_rate for each in calibrate_few(work, tmp_path / "kept").losses] == [1e-2, pytest.approx(4e-3 / 3)]
    else:
        with pytest.raises(
            ModelError, match=r"entry, front .*: its tune diverges at learning rate 0.004 and at 0.00133333 \(the loss is nan"
        ):
            calibrate_few(work, tmp_path / "kept")
    assert rates == [1e-2, 4e-3, pytest.approx(4e-3 / 3)]


def test_one_calibration_at_a_time(work: Path, tmp_path: Path) -> None:
    with Unfinished(tmp_path / "kept").held(), pytest.raises(UsageError, match="kept: another plora-plan is at work there"):
        calibrate_few(work, tmp_path / "kept")
    calibrate_few(work, tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("there", [2, 3, 5])
def test_a_calibration_that_is_not_done_is_refused(there: int, work: Path, calibrated: Path, tmp_path: Path) -> None:
    whole = json.loads(calibrated.with_name("plan.json.calibration.json").read_text())
    left = tmp_path / "left.json"
    left.write_text(json.dumps({**whole, "losses": whole["losses"][:there]}))
    result = run(work, "--quality-from", str(left), "--quality", "0.1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{there} of {len(whole['wanted'])} tunes are there; run the command that made it again to finish" in result.stderr


def test_a_calibration_that_says_nothing_is_refused(work: Path, calibrated: Path, tmp_path: Path) -> None:
    whole = json.loads(calibrated.with_name("plan.json.calibration.json").read_text())
    control, *rest = whole["losses"]
    wrongs: list[tuple[dict[str, Any], int, str]] = [
        ({**whole, "losses": rest, "wanted": whole["wanted"][1:]}, 2, "lacks the control"),
        ({**whole, "version": 1}, 3, "a calibration of version 1, expected 2; calibrate anew"),
        ({**whole, "losses": [{**control, "held_out_loss": math.nan}, *rest]}, 3, "not finite"),
        ({**whole, "losses": [{**control, "held_out_loss": math.inf}, *rest]}, 3, "not finite"),
    ]
    for wrong, code, complaint in wrongs:
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        result = run(work, "--quality-from", str(tmp_path / "wrong.json"))
        assert (result.exit_code, complaint in result.stderr) == (code, True), result.stderr
    (tmp_path / "renamed.json").write_text(json.dumps({**whole, "base_name": "cousin"}))
    result = run(work, "--quality-from", str(tmp_path / "renamed.json"))
    assert result.exit_code == 0
    assert "renamed.json: calibrated on cousin; quality is only right if that is the same base" in result.stderr


def test_the_base_is_left_as_it_was(work: Path, tmp_path: Path) -> None:
    """No hook of one tune stays for the next: the last plan's loss does not depend on those before it."""
    base = work / "base"
    shape, _ = read_skeleton(str(base))
    plans = grid(shape, 16)
    own, anchor, *_ = skeleton(LAYERS, plans, 16)
    config = CalibrationConfig(work / "rows.jsonl", steps=3)
    both = calibrating.calibrate(str(base), config, {own: plans[own], anchor: plans[anchor]}, 16, tmp_path / "both", Report())
    alone = calibrating.calibrate(str(base), config, {anchor: plans[anchor]}, 16, tmp_path / "alone", Report())
    assert both.by_candidate[anchor] == pytest.approx(alone.by_candidate[anchor], rel=1e-5)


def test_leaky_rows_are_refused(work: Path, tmp_path: Path) -> None:
    (tmp_path / "held.jsonl").write_text(
        json.dumps({"prompt": "new?", "response": "yes"}) + "\n" + json.dumps({**ROWS[2], "response": "no"}) + "\n"
    )
    flags = ("--data", str(work / "rows.jsonl"), "--out", str(tmp_path / "plan.json"))
    result = run(work, *flags, "--held-out", str(tmp_path / "held.jsonl"))
    assert result.exit_code == 5
    assert "1 of 2 held-out prompts are trained on: row 2 is row 3 of" in result.stderr
    assert not (tmp_path / "plan.json").exists()


# The command


def test_the_plan_written_can_be_tuned_exported_and_drawn(work: Path, calibrated: Path, tmp_path: Path) -> None:
    plan = read_plan(calibrated)
    facts = dry_run(str(work / "base"), None, PlanChoice(str(calibrated)), "fp32", "fp32", None)
    assert facts["plan"]["round_trips_per_token"] == plan.round_trips
    config = TuneConfig(
        str(work / "base"), work / "rows.jsonl", tmp_path / "adapter", PlanChoice(str(calibrated)).plan, None, "pca", steps=2, device="cpu"
    )
    tune(config)
    export(ExportConfig(str(work / "base"), tmp_path / "adapter", tmp_path / "out"), lambda stage: None, write_halves)
    manifest = json.loads((tmp_path / "out" / "edge" / "manifest.json").read_text())
    assert manifest["contract"]["plan"] == json.loads(calibrated.read_text())


def test_json_says_everything(work: Path, calibrated: Path) -> None:
    kept = calibrated.with_name("plan.json.calibration.json")
    result = run(work, "--quality-from", str(kept), "--json", "--device-mb", "10")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["needs"] == {"--device-mb": 10}
    assert facts["calibration"] == json.loads(kept.read_text())
    assert [each["number"] for each in facts["proposals"] if not each["misses"]] == list(
        range(1, 1 + sum(not each["misses"] for each in facts["proposals"]))
    )
    assert {each["quality_origin"] for each in facts["proposals"]} <= {"calibrated", "interpolated"}
    assert facts["chosen"]["quality"] == pytest.approx(max(each["quality"] for each in facts["proposals"] if not each["misses"]), abs=0.01)
    assert facts["unmet"] is None and facts["out"] is None


def test_a_person_sees_the_front_and_what_comes_next(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = run(work, "--out", str(out), "--choose", "2")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "link: RTT 40 ms, up 8, down 80 Mbit/s, fp32 on the wire" in lines[0]
    assert "device: 1.5 ms a layer (stated); cloud: 0.5 ms a layer (stated)" in lines[1]
    assert "quality: unknown" in lines[3]
    row = next(line for line in lines if line.lstrip().startswith("2  "))
    chosen = next(line for line in lines if line.startswith("chosen: 2, "))
    assert chosen.removeprefix("chosen: 2, ") in row
    assert f"plora-tune {work / 'base'} --data rows.jsonl --plan {out} --out adapter" in result.stdout
    assert read_plan(out).layers == LAYERS
    result = run(work, "--out", str(out))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "already exists; choose another --out or pass --replace" in result.stderr


def test_out_is_judged_before_anything_long(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(work, "--out", str(tmp_path), "--replace")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{tmp_path}: is a folder; give --out a file" in result.stderr
    result = run(work, "--out", "entry")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--out entry: `--plan entry` names a plan that plora has" in result.stderr
    monkeypatch.setattr("plora.artifact.folders.os.access", lambda *arguments: False)  # root may write everywhere
    result = run(work, "--out", str(tmp_path / "plan.json"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "plan.json: cannot be made" in result.stderr


def test_what_comes_next_has_the_flags_that_were_given() -> None:
    link, out = Link(20, 10, 10), Path("plan.json")
    config = PlanConfig("base", link, Needs(), edge_dtype="fp16", calibration=CalibrationConfig(Path("r.jsonl"), max_tokens=99), out=out)
    assert commands(config) == [
        "plora-export base --dry-run --plan plan.json --edge-dtype fp16",
        "plora-tune base --data r.jsonl --plan plan.json --max-tokens 99 --out adapter",
        "plora-export base --adapter adapter --edge-dtype fp16 --out out",
    ]
    plain = commands(PlanConfig("base", link, Needs(), calibration=CalibrationConfig(Path("r.jsonl")), out=out))
    assert not any("--edge-dtype" in line or "--max-tokens" in line for line in plain)


def test_needs_that_no_plan_meets_end_with_11(work: Path, tmp_path: Path) -> None:
    flags = ("--min-tokens-per-second", "50", "--device-mb", "1", "--out", str(tmp_path / "plan.json"))
    result = run(work, *flags)
    assert (result.exit_code, result.stdout) == (NeedsUnmet.exit_code, "")
    assert "--min-tokens-per-second 50 binds: without it" in result.stderr
    assert "Nearest: entry" in result.stderr
    assert not (tmp_path / "plan.json").exists()
    result = run(work, *flags, "--all")
    assert result.exit_code == NeedsUnmet.exit_code
    assert "misses --min-tokens-per-second" in result.stdout and "Nearest: entry" in result.stderr
    assert "chosen" not in result.stdout
    result = run(work, *flags, "--json")
    assert result.exit_code == 11
    facts = json.loads(result.stdout)
    assert facts["chosen"] is None
    assert facts["unmet"]["binding"] == [["--min-tokens-per-second"]]
    assert list(facts["unmet"]["shortfalls"]) == ["--min-tokens-per-second"]


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--quality", "0.9"), "--quality 0.9 cannot be judged: the quality of a plan is unknown without --data FILE"),
        (("--rtt-ms", "0"), "--rtt-ms 0: expected more than 0"),
        (("--rtt-ms", "nan"), "--rtt-ms nan: expected more than 0"),
        (("--up-mbit", "-1"), "--up-mbit -1: expected more than 0"),
        (("--device-mb", "0"), "--device-mb 0: expected more than 0"),
        (("--wire", "fp8"), "wire dtype 'fp8'"),
        (("--device-ms-per-layer", "slow"), "--device-ms-per-layer slow: expected milliseconds"),
        (("--prompt-tokens", "256"), "--prompt-tokens 256: the context holds 256"),
        (("--prompt-tokens", "0"), "--prompt-tokens 0: expected at least 1"),
        (("--choose", "worst"), "--choose worst: expected a number of the table"),
        (("--choose", "900"), "--choose 900: "),
        (("--held-out", "x"), "--held-out x goes with --data"),
        (("--data", "x"), "--data needs --out FILE"),
        (("--data", "x", "--out", "/nowhere/plan.json"), "there is no folder /nowhere"),
        (("--data", "x", "--quality-from", "y", "--out", "z"), "either --data FILE, to calibrate, or --quality-from"),
        (("--data", "x", "--out", "z", "--calibration-steps", "0"), "--calibration-steps 0: expected at least 1"),
        (("--data", "x", "--out", "z", "--held-out-share", "0.5"), "--held-out-share 0.5: expected more than 0 and less than 0.5"),
    ],
)
def test_bad_flags(flags: tuple[str, ...], complaint: str, work: Path) -> None:
    result = run(work, *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert complaint in result.stderr
    assert "Traceback" not in result.stderr


def test_the_link_must_be_known(work: Path) -> None:
    result = CliRunner().invoke(main, [str(work / "base"), "--rtt-ms", "5"])
    assert result.exit_code == 2
    assert "the link is not known: give --up-mbit, --down-mbit, or --doctor FILE" in result.stderr
    with pytest.raises(UsageError, match="the link is not known"):
        PlanConfig("base", Link(), Needs())


def test_a_calibration_of_another_base_is_refused(work: Path, calibrated: Path, tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "other", "llama", num_hidden_layers=4)
    kept = calibrated.with_name("plan.json.calibration.json")
    result = CliRunner().invoke(main, [str(tmp_path / "other"), *LINK, *SPEEDS, "--quality-from", str(kept)])
    assert result.exit_code == 2
    assert "calibrated on base, whose sizes are" in result.stderr
    (tmp_path / "junk.json").write_text("{}")
    assert run(work, "--quality-from", str(tmp_path / "junk.json")).exit_code == 3


def test_in_process_it_is_one_call(work: Path, tmp_path: Path) -> None:
    config = PlanConfig(str(work / "base"), Link(20, 10, 10), Needs(), "1", "1", rank=4, choose="smallest", out=tmp_path / "plan.json")
    planned = plan_for(config)
    assert planned.chosen is not None
    assert planned.chosen.scores[3] == max(each.scores[3] for each in planned.front)
    assert read_plan(tmp_path / "plan.json") == planned.chosen.plan
