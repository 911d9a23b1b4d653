"""The soak of bench/ in a quarter of a minute, its judges with something to find, and what the long one has found."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import soak_hostile, soak_report
from bench.cuts import NEAR_TIE, NEW_TOKENS, Undisturbed
from bench.soak import PLAN, Run, Soak
from bench.soak_device import STYLES, Device, Devices, Turn, Watch, judge, read_truth, record
from bench.soak_hostile import HELD, Hostile, Peers, visit
from bench.soak_plot import plot
from bench.soak_processes import Deadlines, SoakServer
from bench.soak_report import HARMLESS, faults, report
from bench.soak_watch import Sample, Watched, leaks, over_time, read_metrics, slope, thinned
from plora.artifact.errors import UsageError
from plora.device_runtime import open_session

from .conftest import Made, answer, cloud, make_export

MINUTES = 0.25
SHORT = Deadlines(lease_seconds=1.0, idle_seconds=4.0, quiet_seconds=0.5)
BOUND_SECONDS = 30.0


@pytest.fixture(scope="module")
def soaked(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Layers on the device, and exchanges."""
    return make_export(tmp_path_factory.mktemp("soaked"), plan=PLAN["soak"].plan, verified=False, num_hidden_layers=4, head_dim=16)


@pytest.fixture(scope="module")
def server(soaked: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SoakServer]:
    served = SoakServer(soaked.out / "cloud", 4, Deadlines(), tmp_path_factory.mktemp("server") / "server.log")
    yield served
    served.stop(15)
    assert served.process.returncode == 0


def test_a_quarter_of_a_minute(soaked: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = Soak(MINUTES, devices=4, calm_seconds=1.0, rate=4.0, sample_seconds=1.0, settle_seconds=0.0, deadlines=SHORT)
    raw = Run(soak, soaked.out, tmp_path, tmp_path / "raw.json").go()
    (tmp_path / "fuzz.json").write_text('{"messages": 7, "crashes": 0}', encoding="utf-8")
    monkeypatch.setattr(soak_report, "RESULTS", tmp_path)
    figures = report(raw)
    assert faults(figures) == []
    assert (figures["ended"], figures["server_exit_code"], figures["processes_left"]) == ("in time", 0, 0)
    assert (figures["wrong_tokens"], figures["deterministic_rows_with_other_bits"], figures["leaked_file_descriptors"]) == (0, 0, 0)
    assert figures["leaked_sessions"] == figures["leaked_kv_bytes"] == (0 if figures["metrics"] else None)
    for name in ("answers", "finished_answers", "tokens", "cuts", "device_kills", "hostile_connections", "reconnections"):
        assert figures[name] > 0, name
    assert (figures["fuzz_messages"], figures["fuzz_crashes"]) == (7, 0)
    assert len(figures["samples"]) == len(raw["samples"]) >= 2
    assert report(json.loads((tmp_path / "raw.json").read_text(encoding="utf-8"))) == json.loads(json.dumps(figures))
    assert "<svg" in plot(figures, tmp_path).read_text(encoding="utf-8")


def test_a_soak_of_no_time_or_no_devices_is_refused() -> None:
    for fields in ({"minutes": 0.0}, {"minutes": math.inf}, {"devices": 0}):
        with pytest.raises(UsageError):
            Soak(**fields)  # type: ignore[arg-type]


# What is wrong is seen


def turn(gaps: float = 1.0) -> Turn:
    return Turn(Undisturbed([1, 2], [3, 4, 5, 6], [gaps] * 4), ["a", "b", "c", "d"])


def test_a_wrong_token_is_counted_and_a_near_tie_apart() -> None:
    plain, exact = STYLES["plain"], STYLES["deterministic"]
    right = judge(plain, turn(), [3, 4, 5, 6], [])
    assert right == {"wrong_tokens": 0, "near_ties": 0, "other_bits": 0}
    assert judge(plain, turn(), [3, 4], []) == right, "closed early"
    assert judge(plain, turn(), [3, 9, 5, 6], [])["wrong_tokens"] == 1
    assert judge(plain, turn(), [3, 9], [])["wrong_tokens"] == 1, "closed early, and wrong before"
    near = judge(plain, turn(NEAR_TIE / 2), [3, 9, 8, 7], [])
    assert (near["wrong_tokens"], near["near_ties"]) == (0, 1)
    digests = list("abcd")
    assert judge(exact, turn(NEAR_TIE / 2), [3, 4, 5, 6], digests) == right
    assert judge(exact, turn(NEAR_TIE / 2), [3, 4, 9, 6], digests)["wrong_tokens"] == 1, "no tie is near enough"
    assert judge(exact, turn(), [3, 4, 5, 6], list("abcx"))["other_bits"] == 1


def test_a_device_tells_of_an_answer_that_is_not_what_was_recorded(
    soaked: Made, server: SoakServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edge = soaked.out / "edge"
    record(edge, server.address, tmp_path / "truth.json", (("The ferry", " And then?"),))
    truth = read_truth(tmp_path / "truth.json")
    devices = Devices(server.address, str(edge), "", 1, "seed", ())
    for name in ("plain", "deterministic"):
        right = truth[name][0][1]
        tokens = [*right.wanted.tokens[:5], (right.wanted.tokens[5] + 1) % 300, *right.wanted.tokens[6:]]
        wrong = dataclasses.replace(right, wanted=Undisturbed(right.wanted.prompt, tokens, [1.0] * NEW_TOKENS))
        with STYLES[name].open(edge, server.address) as session:
            watch = Watch(session)
            device = Device(devices, truth, 0, threading.Event())
            device.random.random = lambda: 1.0  # type: ignore[method-assign]  neither closed early nor interrupted
            for each in (right, wrong):
                device.answer(session, name, each, watch)
        said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [each["ending"] for each in said] == ["finished"] * 2
        assert [each["wrong_tokens"] for each in said] == [0, 1]
        assert said[1]["mistake"]["got"] == right.wanted.tokens


def test_a_session_held_open_is_a_leak(soaked: Made, server: SoakServer) -> None:
    watched = Watched(server.process.pid, server.ops)
    before = watched.settle(0.0, BOUND_SECONDS)
    with open_session(soaked.out / "edge", server.address):
        held = leaks(before, watched.settle(0.0, 3.0, lambda sample: False))
    assert held["leaked_file_descriptors"] == 1
    after = watched.settle(0.0, BOUND_SECONDS, lambda sample: not any(leaks(before, sample).values()))
    assert not any(leaks(before, after).values())
    if server.ops is None:
        pytest.skip("this server has no metrics, so nobody counts its sessions")
    assert held["leaked_sessions"] == held["leaked_connections"] == 1
    assert held["leaked_kv_bytes"]


def test_what_should_be_none_is_named() -> None:
    good: dict[str, Any] = dict.fromkeys(soak_report.NONE_OF, 0) | {
        "server_failures": {HARMLESS: 2},
        "metrics": True,
        "errors": {"ServerFull while opening": 1},
    }
    assert faults(good) == faults(good | {"leaked_sessions": None, "metrics": False}) == []
    assert faults(good | {"errors": {"Unreachable while answering": 2}}) == ["2 Unreachable while answering"]
    assert faults(good | {"leaked_sessions": None}) == ["leaked_sessions not known"]
    assert faults(good | {"leaked_sessions": 1, "server_failures": {"KeyError": 1}}) == [
        "leaked_sessions 1",
        "the server failed with KeyError",
    ]


def test_a_welcome_to_a_forged_session_is_a_surprise(
    soaked: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = Peers(Hostile("127.0.0.1:1", str(soaked.out / "edge"), 1.0, "seed"))

    def surprised(got: str) -> bool:
        async def come(peers: Peers) -> str:
            return got

        monkeypatch.setitem(soak_hostile.KINDS, "forged session", (come, {"fault EXPIRED"}))
        asyncio.run(visit(peers, "forged session"))
        return json.loads(capsys.readouterr().out)["surprise"]

    assert [surprised(got) for got in ("welcome", HELD, "fault EXPIRED", "fault FULL", "ended")] == [True, True, False, False, False]


# Arithmetic


def test_metrics_are_read() -> None:
    text = '# HELP a b\n# TYPE plora_sessions gauge\nplora_sessions 3\nplora_refused_total{code="FULL"} 2\nplora_refused_total{code="QUOTA x"} 1 123\n\n'
    assert read_metrics(text) == {"plora_sessions": 3.0, "plora_refused_total": 3.0}


def test_a_slope_is_not_moved_by_a_burst() -> None:
    minutes = [each / 6 for each in range(60)]
    values = [100.0 + each for each in minutes]
    values[30:40] = [1e6] * 10
    assert slope(minutes, values) == pytest.approx(60.0)
    assert slope([1.0], [2.0]) is None
    samples = [{"minutes": minute, "rss_bytes": 5.0 if minute < 1 else 7.0} for minute in minutes]
    flat = over_time(samples, "rss_bytes", 4.0, 6.0)
    assert flat == {"start": 4.0, "second_sixth_median": 7.0, "last_sixth_median": 7.0, "slope_per_hour": 0.0, "after": 6.0}
    assert over_time([], "rss_bytes", 4.0, 6.0)["slope_per_hour"] is None


def test_samples_are_thinned_evenly() -> None:
    samples = [{"minutes": each} for each in range(361)]
    kept = [each["minutes"] for each in thinned(samples, 121)]
    assert (kept[0], kept[-1], len(kept)) == (0, 360, 121)
    assert {after - before for before, after in zip(kept, kept[1:], strict=False)} == {3}
    assert thinned(samples[:5], 121) == samples[:5]


def test_leaks_of_a_server_without_metrics_are_not_known() -> None:
    before, after = Sample(0, 1, 13, 9), Sample(1, 1, 12, 9)
    assert leaks(before, after) == {
        "leaked_sessions": None, "leaked_connections": None, "leaked_kv_bytes": None, "leaked_file_descriptors": 0
    }  # fmt: skip


# What a soak has found


def test_a_connection_that_is_done_with_holds_no_socket(made: Made) -> None:
    """Also before the garbage collector comes, and while somebody still has the session in hand."""
    with cloud(made.out / "cloud") as (address, _):
        watched, port = psutil.Process(), int(address.rpartition(":")[2])

        def wait_for(connections: int) -> None:
            until = time.monotonic() + BOUND_SECONDS
            while sum(bool(one.raddr) and one.raddr.port == port for one in watched.net_connections("tcp")) != connections:
                assert time.monotonic() < until
                time.sleep(0.01)

        gc.disable()
        held = []
        try:
            for _ in range(3):
                session = open_session(made.out / "edge", address)
                held.append(session)
                tokens = answer(session, [5, 6, 7], 4)
                wait_for(1)
                session.reconnect()
                assert answer(session, [5, 6, 7], 4) == tokens
                assert session._link.reconnections == 1
                wait_for(1)
                session.close()
                wait_for(0)
        finally:
            gc.enable()
