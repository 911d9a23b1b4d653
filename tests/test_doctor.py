"""The doctor: predictions by hand, the order of its knobs, and one examination of real halves from end to end."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.cost import payload, prompt_bytes
from plora.artifact.errors import RefusedContract, RefusedVersion, Unreachable, UsageError, WrongPair
from plora.artifact.shape import DecoderShape, Rope, check_fits
from plora.device_runtime import measure
from plora.device_runtime.chunks import Chunk
from plora.device_runtime.cli import main
from plora.device_runtime.doctor import check_bases, examine
from plora.device_runtime.forecast import (
    DRAFTED,
    FRAME_BYTES,
    NOTHING,
    CloudFigures,
    Curve,
    DeviceFigures,
    LinkFigures,
    Setup,
    ahead_share,
    first_token,
    flow,
    legs,
    predict,
    reconcile,
    speculate,
    step,
)
from plora.device_runtime.knobs import SHARED_VALUES, bound, knobs, with_front, with_shared_injections, without_exchanges
from plora.device_runtime.measure import measure_rate, typical
from plora.device_runtime.speculation import MATCHES, USUAL, expected_tokens
from plora.protocol import Precision, uniform

from .conftest import Made, cloud, make_export
from .strategies import legal_plans

SHAPE = DecoderShape(64, 8, 4, 2, 16, 128, 300, 2048, 1e-5, (0,) * 8, Rope((1.0,) * 8, 1.0))
LINK = LinkFigures(0.020, 0.020, 0.025, 0.001, 40, 8e6, 80e6)
DEVICE = DeviceFigures(
    1,
    embedding=Curve(((1, 0.001),)),
    front=Curve(((1, 0.002), (9, 0.010))),
    entry_injection=Curve(((1, 0.0005),)),
    cores=Curve(((1, 0.0002),)),
    back=NOTHING,
    head=Curve(((1, 0.004), (9, 0.008))),
)
CLOUD = CloudFigures(Curve(((1, 0.001), (9, 0.003), (64, 0.014))), 0.0015, 256, 4, 2048)
ENTRY = entry_plan(8, 2, 4, shared_injection=16)
PAPER = paper_plan(8, 4)


def setup_of(plan: ExchangePlan, **changes: Any) -> Setup:
    device = DEVICE if plan.front_layers else dataclasses.replace(DEVICE, front=NOTHING)
    device = device if plan.entry_exchange else dataclasses.replace(device, entry_injection=NOTHING)
    return dataclasses.replace(Setup(plan, SHAPE, Precision(), LINK, device, CLOUD), **changes)


def link_of(rtt: float = 0.020, up: float = 8e6, down: float = 80e6) -> LinkFigures:
    return LinkFigures(rtt, rtt, rtt, 0.0, 40, up, down)


# Curves and typical values


def test_a_curve_is_straight_between_and_beyond_its_points() -> None:
    curve = Curve(((2, 1.0), (4, 2.0), (8, 6.0)))
    assert [curve.seconds(rows) for rows in (1, 2, 3, 4, 6, 8, 10)] == [1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert Curve(((1, 3.0),)).seconds(100) == 3.0
    assert Curve(((1, 3.0), (2, 2.0))).seconds(50) == 2.0  # never less for more
    assert curve.times(2).seconds(3) == 3.0


@pytest.mark.parametrize("points", [(), ((0, 1.0),), ((2, 1.0), (1, 1.0)), ((1, -1.0),), ((1, math.nan),)], ids=str)
def test_a_curve_that_is_none_is_refused(points: Any) -> None:
    with pytest.raises(UsageError, match="expected rising rows"):
        Curve(points)


def test_figures_of_no_link_are_refused() -> None:
    with pytest.raises(UsageError, match="up_bits_per_second"):
        link_of(up=0.0)


def test_typical_is_the_mean_without_what_is_far_out() -> None:
    assert typical([1.0, 2.0, 3.0]) == 2.0
    assert typical([1.0, 1.0, 1.0, 1.0, 100.0]) == pytest.approx(8 / 5)


# One step, by hand


def test_a_step_of_the_entry_plan() -> None:
    """One round trip; 64 + 16 values up, 64 down; six layers in the cloud; embedding, front, injection and head here."""
    got = step(setup_of(ENTRY))
    assert (got.up_bytes, got.down_bytes) == (4 * 80 + FRAME_BYTES, 4 * 64 + FRAME_BYTES)
    assert got.parts == pytest.approx(
        {
            "round_trips": 0.020,
            "up": 8 * (320 + FRAME_BYTES) / 8e6,
            "down": 8 * (256 + FRAME_BYTES) / 80e6,
            "cloud": 0.006,
            "device": 0.001 + 0.002 + 0.0005 + 0.004,
            "overhead": 0.0015,
        }
    )
    assert got.seconds == pytest.approx(sum(got.parts.values()))


def test_a_step_of_the_papers_plan() -> None:
    """Nine round trips; while an exchange is away the cloud computes q, k and v of the layer that it starts."""
    setup = setup_of(PAPER)
    qkv, rest, adapter = 64 * (64 + 32 + 32), 64 * (64 + 3 * 128), 4 * (64 + 32 + 32)
    share = qkv / (qkv + rest + adapter)
    assert ahead_share(PAPER, SHAPE, PAPER.exchanges[3]) == pytest.approx(share)
    got = step(setup)
    assert got.round_trips_seconds == pytest.approx(9 * 0.020)
    assert got.up_bytes == 4 * (64 + 8 * 12) + 9 * FRAME_BYTES
    assert got.down_bytes == 4 * (8 * 4 + 64) + 9 * FRAME_BYTES
    assert got.device_seconds == pytest.approx(0.001 + 8 * 0.0002 + 0.004)
    assert got.cloud_seconds == pytest.approx(8 * 0.001 * (1 - share))
    near = setup_of(PAPER, link=link_of(rtt=1e-9, up=1e15, down=1e15), device=dataclasses.replace(DEVICE, cores=NOTHING))
    assert step(near).cloud_seconds == pytest.approx(8 * 0.001, rel=1e-3)  # there is no time to hide it in


def test_more_rows_cost_what_the_curves_say() -> None:
    got = step(setup_of(ENTRY), 5)
    assert got.up_bytes == 5 * 4 * 80 + FRAME_BYTES
    assert got.cloud_seconds == pytest.approx(6 * 0.002)
    assert got.device_seconds == pytest.approx(0.001 + 0.006 + 0.0005 + 0.006)


@given(legal_plans(), st.integers(1, 300))
def test_bytes_are_those_of_the_cost_model(plan: ExchangePlan, rows: int) -> None:
    setup = setup_of(plan)
    for dtype in ("fp32", "fp16", "bf16"):
        got, one = step(dataclasses.replace(setup, precision=uniform(dtype)), rows), payload(plan, SHAPE, dtype)
        framing = plan.round_trips * FRAME_BYTES
        assert (got.up_bytes - framing, got.down_bytes - framing) == (rows * one.up, rows * one.down)
    fp16, int8 = (step(dataclasses.replace(setup, precision=uniform(dtype)), rows) for dtype in ("fp16", "int8"))
    tensors_up, tensors_down = 1 + len(plan.all_exchanges), plan.round_trips
    values_up, values_down = ((each - framing) // (2 * rows) for each in (fp16.up_bytes, fp16.down_bytes))
    assert int8.up_bytes - framing == rows * (values_up + 4 * tensors_up)
    assert int8.down_bytes - framing == rows * (values_down + 4 * tensors_down)


def test_a_precision_by_kind() -> None:
    got = step(setup_of(ENTRY, precision=Precision(entry="fp16", injections="int8")))
    assert got.up_bytes == 2 * 64 + (16 + 4) + FRAME_BYTES
    assert got.down_bytes == 4 * 64 + FRAME_BYTES


def test_a_step_as_a_whole_corrects_the_rtt_or_adds_overhead() -> None:
    """Pings that are all alike leave nothing to correct; where they differ and trips are many, the RTT is what was off."""
    setup = setup_of(ENTRY, cloud=dataclasses.replace(CLOUD, overhead_seconds=0.0))
    whole = step(setup).seconds + 0.003
    steady = dataclasses.replace(LINK, jitter_seconds=0.0)
    assert reconcile(dataclasses.replace(setup, link=steady), whole)[0] == steady
    assert reconcile(dataclasses.replace(setup, link=steady), whole)[1].overhead_seconds == pytest.approx(0.003)
    assert reconcile(dataclasses.replace(setup, link=steady), whole - 0.004)[1].overhead_seconds == 0.0
    own = 0.05 * (0.006 + 0.0075)
    uneven = dataclasses.replace(LINK, jitter_seconds=own * math.sqrt(40))  # as uncertain as the parts are
    link, figures = reconcile(dataclasses.replace(setup, link=uneven), whole)
    assert (link.rtt_seconds, figures.overhead_seconds) == (pytest.approx(0.0215), pytest.approx(0.0015))
    many = setup_of(PAPER, link=uneven, cloud=setup.cloud)
    link, figures = reconcile(many, step(many).seconds - 0.009)
    assert link.rtt_seconds == pytest.approx(0.019, rel=1e-3) and figures.overhead_seconds == 0.0
    link, _ = reconcile(many, 0.001)
    assert link.rtt_seconds == LINK.rtt_seconds / 2


# Prompts, by hand


def chunk(rows: int, exit_rows: int = 0) -> Chunk:
    return Chunk(0, [0] * rows, exit_rows, exit_rows)


BARE = dataclasses.replace(DEVICE, embedding=NOTHING, front=NOTHING, entry_injection=NOTHING, cores=NOTHING, head=NOTHING)


def bare(window: int = 4, rtt: float = 0.1, layer: float = 0.0, up: float = 1e15) -> Setup:
    """An entry plan of eight layers in the cloud; only what is named takes time."""
    cloud_figures = CloudFigures(Curve(((1, layer),)), 0.0, 10, window, 2048)
    return Setup(entry_plan(8, 0, 4), SHAPE, Precision(), link_of(rtt, up, 1e15), BARE, cloud_figures)


def test_chunks_follow_one_another_without_waiting() -> None:
    """Half a round trip, four chunks of 8 · 0.05 s at the cloud, half a round trip; the link carries the next one meanwhile."""
    steps = [chunk(10) for _ in range(4)]
    assert flow(bare(layer=0.05), steps).seconds == pytest.approx(0.1 + 4 * 0.4)
    assert flow(bare(layer=0.05, window=1), steps).seconds == pytest.approx(4 * (0.1 + 0.4))
    assert flow(bare(layer=0.05, window=2, rtt=1.0), steps).seconds == pytest.approx(2 * (1.0 + 0.4) + 0.4)


def test_a_slow_uplink_is_what_a_prompt_waits_for() -> None:
    """Chunks of 10 tokens: 10 · 4 · (64 + 8 · 7 · 4) bytes; the last one's compute comes on top."""
    size = 8 * (10 * 4 * (64 + 224) + FRAME_BYTES)
    walked = flow(bare(layer=0.001, up=size), [chunk(10) for _ in range(3)])
    assert walked.seconds == pytest.approx(3 + 0.1 + 0.008)
    assert (walked.up_seconds, walked.cloud_seconds) == (pytest.approx(3), pytest.approx(3 * 0.008))


@given(legal_plans(), st.lists(st.integers(1, 64), min_size=1, max_size=9), st.integers(1, 4))
def test_a_flow_is_no_shorter_than_its_busiest_place_and_no_longer_than_one_after_the_other(
    plan: ExchangePlan, sizes: list[int], window: int
) -> None:
    setup = setup_of(plan, cloud=dataclasses.replace(CLOUD, window=window))
    steps = [chunk(rows) for rows in sizes]
    walked, alone = flow(setup, steps), [flow(setup, [each]).seconds for each in steps]
    busy = (walked.device_seconds, walked.up_seconds, walked.down_seconds)
    assert walked.seconds >= max(*busy, *alone) * (1 - 1e-9)
    ahead = sum(leg.ahead_seconds for rows in sizes for leg in legs(setup, rows, 0))  # keeps the cloud from others' chunks
    assert walked.seconds <= (sum(alone) + ahead) * (1 + 1e-9)
    if window == 1:
        assert walked.seconds == pytest.approx(sum(alone))


def test_the_first_token_of_a_prompt() -> None:
    """One chunk: a step of which one row comes back, and the head for it. Two: the second's cloud work on top."""
    setup = setup_of(ENTRY)
    up, down = prompt_bytes(ENTRY, SHAPE, "fp32", 128)
    sent = 8 * (up + FRAME_BYTES) / 8e6 + 8 * (down + FRAME_BYTES) / 80e6
    device = DEVICE.before(128) + 0.004
    layers = 6 * (0.014 + 64 * 0.0002)
    assert first_token(setup, 128).seconds == pytest.approx(0.020 + sent + device + layers + 0.0015)
    assert first_token(setup, 512).seconds > first_token(setup, 257).seconds > first_token(setup, 256).seconds
    back = setup_of(entry_plan(8, 2, 4, back_layers=2))
    assert first_token(back, 128).down_seconds == pytest.approx(8 * (128 * 4 * 64 + FRAME_BYTES) / 80e6)  # its cache needs every row


# What follows from steps


def test_speculation_is_that_of_the_usual_acceptance() -> None:
    setup = setup_of(ENTRY)
    one, checked = step(setup).seconds, step(setup, 1 + DRAFTED).seconds
    for matched in MATCHES:
        got = speculate(setup, matched)
        assert got.tokens_per_second == pytest.approx(got.tokens_per_step / step(setup, 1 + got.drafted).seconds)
        assert 0 <= got.drafted <= 16
    longest = speculate(setup, 16)  # every class from there on is the last
    assert longest.tokens_per_step == pytest.approx(float(expected_tokens([USUAL[-1]] * longest.drafted)[-1]))
    forecast = predict(setup)
    assert forecast.tokens_per_second == pytest.approx(1 / one)
    assert forecast.tokens_per_second_yielding == pytest.approx({2: 2 / checked, 3: 3 / checked})
    assert forecast.up_megabytes_per_1000_tokens == pytest.approx((320 + FRAME_BYTES) * 1000 / 1e6)
    assert list(forecast.first_token_seconds) == [128, 512]


def test_prompts_that_do_not_fit_are_not_predicted() -> None:
    small = setup_of(ENTRY, cloud=dataclasses.replace(CLOUD, context_tokens=256))
    assert list(predict(small).first_token_seconds) == [128]
    tiny = setup_of(ENTRY, cloud=dataclasses.replace(CLOUD, context_tokens=40))
    assert list(predict(tiny).first_token_seconds) == [20]


# Knobs


def names(setup: Setup, **more: Any) -> list[str]:
    return [knob.name for knob in knobs(setup, **more)]


def test_far_away_round_trips_bind() -> None:
    setup = setup_of(PAPER, link=link_of(rtt=0.1, up=1e9, down=1e9))
    assert "9 round trips: round trips 900 ms" in bound(setup)
    assert names(setup)[0] == "entry plan"
    assert "nearer cloud" in names(setup)
    best = knobs(setup)[0]
    assert 5 < best.decode_gain == pytest.approx(step(setup).seconds * best.tokens_per_second)
    assert best.sentence.startswith("An entry plan, 96 values a token (1 round trip a token instead of 9; tuned anew): ")
    assert f"{best.tokens_per_second:.3g} instead of {1 / step(setup).seconds:.3g} tokens/s" in best.sentence


def test_on_a_slow_uplink_bytes_bind() -> None:
    plan = entry_plan(8, 0, 60)  # 3,360 values up
    setup = setup_of(plan, link=link_of(rtt=0.001, up=1e6, down=1e9))
    assert "uplink" in bound(setup).split(":")[1].split("(")[0]
    assert names(setup)[:2] == ["int8 on the wire", "fp16 on the wire"]
    assert "shared injection" in names(setup)
    assert names(dataclasses.replace(setup, precision=uniform("int8")))[0] != "int8 on the wire"


def test_a_slow_device_wants_threads_and_fewer_layers() -> None:
    device = dataclasses.replace(DEVICE, front=Curve(((1, 0.1),)), head=Curve(((1, 0.2),)))
    setup = setup_of(ENTRY, device=device, link=link_of(rtt=0.001, up=1e9, down=1e9))
    faster = dataclasses.replace(device, threads=2, head=Curve(((1, 0.1),)))
    assert "device compute" in bound(setup).split(":")[1].split("(")[0]
    found = knobs(setup, faster)
    assert [knob.name for knob in found if knob.name in ("threads", "fewer front layers")] == ["threads", "fewer front layers"]
    assert next(knob.sentence for knob in found if knob.name == "threads").startswith("--threads 2 instead of 1: ")
    fewer = next(knob for knob in found if knob.name == "fewer front layers")
    assert 1 / fewer.tokens_per_second == pytest.approx(step(setup).seconds - 0.05 + 0.001)  # one layer less here, one more there
    assert fewer.sentence.startswith("2 front layers made 1 (")


def test_what_helps_little_is_not_said_and_the_rest_is_in_order() -> None:
    setup = setup_of(PAPER)
    found = knobs(setup, DEVICE, {"other": setup_of(ENTRY), "same": setup})
    assert [knob.answer_gain for knob in found] == sorted((knob.answer_gain for knob in found), reverse=True)
    assert all(knob.answer_gain >= 1.03 for knob in found)
    assert "threads" not in [knob.name for knob in found]
    assert [knob.sentence.split(":")[0] for knob in found if knob.name == "other edge"] == ["The plan of other"]


@given(legal_plans(min_layers=2))
def test_the_plans_that_knobs_speak_of_are_legal_and_what_they_claim(plan: ExchangePlan) -> None:
    if plan.exchanges:
        without = without_exchanges(plan)
        check_fits(without, dataclasses.replace(SHAPE, layers=plan.layers, windows=(0,) * plan.layers))
        assert (without.round_trips, without.device_layers) == (1, plan.device_layers)
    shared = with_shared_injections(plan)
    assert shared.round_trips == plan.round_trips and shared.adapted == plan.adapted
    for fewer in range(plan.front_layers):
        moved = with_front(plan, fewer)
        assert (moved.front_layers, moved.round_trips, moved.back_layers) == (fewer, plan.round_trips, plan.back_layers)
        assert len(moved.adapted) == len(plan.adapted) + (plan.front_layers - fewer if plan.entry_exchange else 0)


def test_wide_injections_are_shared() -> None:
    plan = grouped_plan(8, 2, 64, targets=("q", "k", "v", "o", "gate", "up", "down"))
    shared = with_shared_injections(plan)
    assert sum(exchange.injection_columns for exchange in shared.exchanges) == SHARED_VALUES
    assert with_shared_injections(shared) == shared


# Rates


def test_a_rate_is_that_of_the_largest_probe_that_was_needed() -> None:
    sizes: list[int] = []

    def probe(size: int) -> float:
        sizes.append(size)
        return 8 * size / 10e6

    rate, at_least = measure_rate(probe, 1e-3)
    assert (rate, at_least) == (pytest.approx(10e6), False)
    assert sizes == [16 << 10, 64 << 10, 256 << 10, 256 << 10, 256 << 10]  # 0.2 s tell enough


def test_a_link_that_is_too_fast_to_tell() -> None:
    rate, at_least = measure_rate(lambda size: 8 * size / 1e9, 1e-3)
    assert at_least and rate == pytest.approx(1e9)
    rate, at_least = measure_rate(lambda size: -1e-4, 2e-3)
    assert at_least and rate == pytest.approx(8 * (1 << 20) / 2e-3)


def test_probes_of_a_very_slow_link_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def probe(size: int) -> float:
        now[0] += 8 * size / 64e3
        return 8 * size / 64e3

    assert measure_rate(probe, 1e-3) == (pytest.approx(64e3), False)
    assert now[0] < 2.1


# End to end


@pytest.fixture(scope="module")
def other_plan(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The base of `made` with a plan of one round trip and a front layer."""
    plan = entry_plan(3, 1, 5, shared_injection=6)
    other = make_export(tmp_path_factory.mktemp("other"), plan=lambda layers: plan, verified=False)
    assert (other.base / "model.safetensors").read_bytes() == (made.base / "model.safetensors").read_bytes()
    return other


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure from few samples."""
    monkeypatch.setattr(measure, "PINGS", 4)
    monkeypatch.setattr(measure, "STEPS", {1: 3, 9: 2, 64: 2, 128: 1})
    monkeypatch.setattr(measure, "CYCLES", {1: 2, 9: 2, 64: 2, 128: 1})
    monkeypatch.setattr(measure, "PROBES", (16 << 10, 64 << 10))


def examined(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def edge(made: Made) -> str:
    return str(made.out / "edge")


def check(value: Any, where: str = "report") -> None:
    """Every number finite and not negative, but for what pauses cost, which is a difference."""
    if isinstance(value, dict):
        for key, each in value.items():
            check(each, f"{where}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            check(each, f"{where}[{index}]")
    elif isinstance(value, int | float):
        assert math.isfinite(value) and (value >= 0 or where.endswith("pause_cost_seconds")), where


@pytest.mark.usefixtures("hurried")
def test_an_examination_as_json(made: Made, served: str, other_plan: Made) -> None:
    result = examined("--edge", edge(made), "--edge", edge(other_plan), "--cloud", served, "--threads", "1", "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert list(report) == [
        "address", "wire_dtype", "threads", "link", "cloud", "steps", "edges", "bytes_up", "bytes_down", "reconnections"
    ]  # fmt: skip
    check(report)
    assert (report["address"], report["wire_dtype"], report["threads"]) == (served, "fp32", 1)
    assert report["link"]["pings"] == 4
    for name in ("rtt_seconds", "median_seconds", "p95_seconds", "up_bits_per_second", "down_bits_per_second"):
        assert report["link"][name] > 0
    assert list(report["cloud"]["layer"]) == ["1", "9", "64", "128"] == list(report["steps"]["seconds"])[::-1]
    assert all(seconds > 0 for seconds in report["cloud"]["layer"].values())
    assert [one["edge"] for one in report["edges"]] == [edge(made), edge(other_plan)]
    assert [(one["round_trips"], one["cloud_layers"], one["front_layers"]) for one in report["edges"]] == [(4, 3, 0), (1, 2, 1)]
    for one in report["edges"]:
        for name in ("embedding", "head", "front" if one["front_layers"] else "cores"):
            assert all(seconds > 0 for seconds in one["device"][name].values())
        assert list(one["device"]["head"]) == ["1", "9"]
        forecast = one["forecast"]
        assert forecast["tokens_per_second"] > 0
        assert list(forecast["tokens_per_second_yielding"]) == ["2", "3"]
        assert [each["matched"] for each in forecast["speculation"]] == list(MATCHES)
        assert list(forecast["first_token_seconds"]) == ["128"]
        assert forecast["step"]["up_bytes"] == pytest.approx(1e3 * forecast["up_megabytes_per_1000_tokens"])
        assert "round trip" in one["bound"]
        assert all(knob["sentence"].endswith(".") and ": " in knob["sentence"] for knob in one["knobs"])
    assert "pinging" in result.stderr and "timing the device's part" in result.stderr
    assert report["bytes_up"] > 64 << 10


@pytest.mark.usefixtures("hurried")
def test_an_examination_for_a_person(made: Made, served: str) -> None:
    result = examined("--edge", edge(made), "--cloud", served, "--wire-dtype", "int8", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("link: RTT ") and "Mbit/s" in lines[0]
    assert lines[1].startswith("cloud: ms a layer ")
    assert sum(line.startswith(edge(made)) for line in lines) == 3  # the device's row, the prediction's, its knobs
    assert any(line.startswith("A token takes ") for line in lines)


@pytest.mark.usefixtures("hurried")
def test_device_layers_at_both_ends(layered: Made) -> None:
    with cloud(layered.out / "cloud") as (address, _):
        report = examine([layered.out / "edge"], address)
    (one,) = report.edges
    assert (one.front_layers, one.back_layers, one.round_trips) == (1, 1, 1)
    assert all(curve.seconds(1) > 0 for curve in (one.device.front, one.device.back, one.device.entry_injection))
    assert one.device.cores.seconds(1) == 0
    assert one.forecast.step.up_bytes == 4 * (48 + 6) + FRAME_BYTES


def test_an_edge_of_another_base_is_refused_by_name(made: Made, layered: Made, served: str) -> None:
    with pytest.raises(WrongPair, match="exported from base"):
        check_bases([made.out / "edge", layered.out / "edge"])
    result = examined("--edge", edge(made), "--edge", edge(layered), "--cloud", served)
    assert result.exit_code == 3 and result.stdout == ""
    assert result.stderr.startswith(f"error: {edge(layered)}: exported from base ") and edge(made) in result.stderr


def test_a_cloud_of_another_plan_is_refused_by_name(made: Made, served: str, other_plan: Made) -> None:
    with pytest.raises(RefusedContract, match="WRONG_CONTRACT"):
        examine([other_plan.out / "edge"], served)
    result = examined("--edge", edge(other_plan), "--edge", edge(made), "--cloud", served)
    assert result.exit_code == 8
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"the first --edge ({edge(other_plan)}) must be the half of what {served} serves" in line


def test_nobody_there_and_flags_that_make_no_sense(made: Made, served: str, tmp_path: Path) -> None:
    assert examined("--cloud", served).exit_code == 2
    unreachable = examined("--edge", edge(made), "--cloud", "127.0.0.1:1")
    assert unreachable.exit_code == Unreachable.exit_code and "127.0.0.1:1" in unreachable.stderr.splitlines()[-1]
    assert examined("--edge", edge(made), "--cloud", served, "--wire-dtype", "fp8").exit_code == UsageError.exit_code
    assert examined("--edge", str(tmp_path), "--cloud", served).exit_code == 3


@pytest.mark.usefixtures("hurried")
def test_a_cloud_that_does_not_say_how_long_it_computes(made: Made, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.Visit, "step", lambda self, ids, exit_rows, position: (0.01, 0.0))
    with pytest.raises(RefusedVersion, match="does not say how long it computes"):
        examine([made.out / "edge"], served)
