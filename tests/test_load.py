"""The scripted devices of bench/: they replay what the halves say in process, a right cloud answers them so, and a wrong row is seen."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import recording as recorded
from bench.load import interpolated, percentile
from bench.recording import Recording, make
from bench.scripted import WRONG, Load, Run, ScriptedDevice, hold, run
from plora.artifact.errors import UsageError
from plora.artifact.hashes import Contract
from plora.artifact.manifest import EdgeManifest, read_manifest

from .conftest import Made, cloud

WAIT_SECONDS = 60.0
NEW_TOKENS = 6
EXACT = WRONG / 10
"""Chunks against single tokens, relative to the row's root mean square: 1e-6 here."""


@pytest.fixture(scope="module")
def paths(made: Made, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make(made.out, 3, tmp_path_factory.mktemp("recordings"), NEW_TOKENS, core_size=0.5)


@pytest.fixture(scope="module")
def recordings(paths: list[Path]) -> list[Recording]:
    return [recorded.load(path) for path in paths]


def contract_of(made: Made) -> Contract:
    return read_manifest(EdgeManifest, made.out / "edge").contract


def replay(made: Made, recordings: list[Recording], address: str, **options: Any) -> dict[str, Any]:
    asked = Run(address, len(recordings), seconds=0.5, warm_seconds=0.0, **options)

    async def bounded() -> dict[str, Any]:
        async with asyncio.timeout(WAIT_SECONDS):
            return await run(contract_of(made), recordings, asked)

    return asyncio.run(bounded())


def altered(recording: Recording, row: int) -> Recording:
    """Its injections of the first exchange are others at one row."""
    values = recording.injections[0].copy()
    values[row] += 1
    return dataclasses.replace(recording, injections={**recording.injections, 0: values})


def test_a_recording_comes_back_from_its_file(paths: list[Path], made: Made) -> None:
    before = [path.stat().st_mtime_ns for path in paths]
    one = recorded.load(paths[0])
    assert one.tokens == one.prompt_tokens + NEW_TOKENS == len(one.exit)
    assert sorted(one.injections) == [exchange.index for exchange in contract_of(made).plan.exchanges]
    assert make(made.out, 3, paths[0].parent, NEW_TOKENS, core_size=0.5) == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.parametrize("decode_only", [False, True])
def test_devices_of_one_cloud_get_what_was_recorded(made: Made, recordings: list[Recording], served: str, decode_only: bool) -> None:
    report = replay(made, recordings, served, decode_only=decode_only)
    assert report["errors"] == {}
    assert report["devices_ready"] == 3
    assert report["judged_rows"] >= 3
    assert report["wrong"] == 0
    assert report["largest_error"] < EXACT


@pytest.mark.parametrize("row", ["in the prompt", "decoded"])
def test_one_other_injection_is_seen(made: Made, recordings: list[Recording], served: str, row: str) -> None:
    prompt = recordings[0].prompt_tokens

    async def conversation(recording: Recording) -> ScriptedDevice:
        device = ScriptedDevice(contract_of(made), recording)
        async with asyncio.timeout(WAIT_SECONDS):
            await device.open(served)
            await device.feed(0, prompt)
            for position in range(prompt, recording.tokens):
                await device.feed(position, position + 1)
            await device.close()
        return device

    right = asyncio.run(conversation(recordings[0]))
    assert (right.wrong, right.largest_error < EXACT) == (0, True)
    wrong = asyncio.run(conversation(altered(recordings[0], prompt - 1 if row == "in the prompt" else recordings[0].tokens - 1)))
    assert wrong.wrong >= 1
    assert wrong.largest_error > WRONG


def test_cores_of_another_device_are_seen(made: Made, recordings: list[Recording], served: str) -> None:
    swapped = dataclasses.replace(recordings[0], injections=recordings[1].injections)
    assert replay(made, [swapped], served)["wrong"] > 0


def test_a_full_cloud_is_counted_and_tried_again(made: Made, recordings: list[Recording]) -> None:
    contract = contract_of(made)

    async def squeezed(address: str) -> ScriptedDevice:
        async with asyncio.timeout(WAIT_SECONDS):
            (first,) = await hold(contract, recordings[:1], address, 1)
            device = ScriptedDevice(contract, recordings[1])
            life = asyncio.create_task(device.live(Run(address, 1, seconds=1.0)))
            while not device.errors:
                await asyncio.sleep(0.01)
            await first.close()
            while not device.first_seconds:
                await asyncio.sleep(0.01)
            device.stopping = True
            await life
        return device

    with cloud(made.out / "cloud", "--sessions", "1", "--quiet-seconds", "3") as (address, _):
        device = asyncio.run(squeezed(address))
    assert set(device.errors) == {"ServerFull"}
    assert device.wrong == 0


def test_the_process_runs_holds_and_lets_go(made: Made, paths: list[Path], served: str) -> None:
    with Load(made.out / "edge", paths[:1]) as load:
        report = load.ask(run={"address": served, "devices": 2, "seconds": 0.2, "warm_seconds": 0.0, "watch": {"self": load.process.pid}})
        assert (report["wrong"], report["errors"]) == (0, {})
        assert set(report["cpu_seconds"]) == {"load", "self"}
        held = load.ask(idle={"address": served, "devices": 2})
        assert (held["sessions"], held["cached_tokens"]) == (2, 2 * 32)
        assert load.ask(release={}) == {"sessions": 0}
        with pytest.raises(RuntimeError, match="no command"):
            load.ask(sleep={})
    assert load.process.returncode == 0


def test_a_run_of_no_device_or_no_time_is_refused() -> None:
    for fields in ({"devices": 0, "seconds": 1.0}, {"devices": 1, "seconds": 0.0}, {"devices": 1, "seconds": 1.0, "think_millis": -1.0}):
        with pytest.raises(UsageError):
            Run("127.0.0.1:1", **fields)  # type: ignore[arg-type]


def test_the_number_of_sessions_that_hide_a_round_trip() -> None:
    assert interpolated({1: 0.5, 2: 0.8, 4: 1.0}, 0.9) == pytest.approx(3.0)
    assert interpolated({1: 0.95, 2: 1.0}, 0.9) == 1
    assert interpolated({1: 0.5, 128: 0.89}, 0.9) is None


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(np.arange(101.0)), 95) == pytest.approx(95.0)
