"""The fuzz targets (bench/fuzz.py) on seeds and their mutations, without atheris; that they notice when a rule is not kept; and what they
have found."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from bench import fuzz, fuzz_device
from bench.fuzz_frames import CONTEXT_TOKENS, STEP_TOKENS, Choices, Found, entry, hello, setting
from bench.fuzz_machines import hear
from bench.fuzz_world import CheapEngine, Loop, run, world
from plora.artifact.errors import RemoteProtocolError, Unreachable
from plora.cloud_server.cache import Pool
from plora.cloud_server.carrier import Carrier
from plora.cloud_server.service import Service
from plora.cloud_server.session import Session as Served
from plora.device_runtime import transport
from plora.protocol import CloudSession, Terms, session, tensors
from plora.protocol import plora_pb2 as pb
from plora.protocol.outbox import Outbox


def inputs(name: str, seed: int = 0) -> Iterator[bytes]:
    """Seeds with some bytes changed, without an end, the same ones every time."""
    generator, seeds = random.Random(seed), fuzz.seeds_of(name)
    while True:
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(6)):
            data[generator.randrange(len(data))] = generator.choice([0, 255, generator.randrange(256)])
        yield bytes(data)


@pytest.mark.parametrize(("name", "messages"), [("codec", 3000), ("handshake", 2500), ("stream", 3000), ("service", 600), ("device", 2000)])
def test_a_target_finds_nothing(name: str, messages: int) -> None:
    target, fed = fuzz.TARGETS[name].load(), 0
    for data in inputs(name):
        fed += target(data)
        if fed >= messages:
            return


def test_the_same_input_is_the_same_run() -> None:
    for name in ("service", "device"):
        target, data = fuzz.TARGETS[name].load(), next(islice(inputs(name), 7, None))
        assert len({target(data) for _ in range(3)}) == 1


# What they would notice


def found(name: str, match: str, most: int = 1500) -> None:
    """The target reports it within so many inputs."""
    target = fuzz.TARGETS[name].load()
    for data in islice(inputs(name, 1), most):
        try:
            target(data)
        except Found as error:
            noticed = str(error)
            break
    else:
        noticed = f"nothing in {most} inputs"
    assert re.search(match, noticed)


@pytest.mark.parametrize("name", ["codec", "stream"])
def test_values_that_are_not_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "all_finite", lambda values: True)
    found(name, "is finite")


def test_a_session_that_is_not_released(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "release", lambda self, session: None)
    found("service", "are left|goes on")


def test_a_forged_id(monkeypatch: pytest.MonkeyPatch) -> None:
    async def take_up(self: Service, carrier: Any, door: Any, greeting: Any) -> Any:
        some = self.sessions.get(greeting.session) or next(iter(self.sessions.values()))
        await some.take_up(carrier, greeting)
        return some

    monkeypatch.setattr(Service, "_take_up", take_up)
    found("service", "never given|cut off")


def test_a_slot_that_is_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "clear", lambda self, slot: None)
    found("service", "left in the cache")


def test_frames_that_are_read_ahead_without_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async def push(self: Carrier, data: bytes) -> None:
        self.inbox.append(data)
        self.wake()

    monkeypatch.setattr(Carrier, "push", push)
    found("service", "read ahead")


def test_a_row_in_somebody_elses_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = CheapEngine.begin
    monkeypatch.setattr(CheapEngine, "begin", lambda self, slot, *rest: begin(self, self.pool.slots - 1, *rest))
    found("service", "INTERNAL|gets what is right|something is left|somebody complained")


def test_a_lease_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Served._leave

    def never_lost(self: Served) -> None:
        leave(self)
        self.lost_at = None

    monkeypatch.setattr(Served, "_leave", never_lost)
    monkeypatch.setattr(Served, "idle_since", float("inf"))
    found("service", "are left")


@pytest.mark.parametrize("name", ["_check_entry", "_check_received"])
def test_a_check_of_the_machine(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.Session, name, lambda *arguments: None)
    found("stream", "had to be refused|within the window|within the context")


def test_bytes_that_are_not_canonical(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(self: session.Session, data: bytes) -> pb.Frame:
        try:
            return pb.Frame.FromString(data)
        except DecodeError:
            raise RemoteProtocolError("no frame") from None

    monkeypatch.setattr(session.Session, "_parse", parse)
    found("stream", "had to be refused")


@pytest.mark.parametrize("name", ["stream", "service"])
def test_frames_that_are_not_sent_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "after", lambda self, count: [])
    found(name, "comes again|taken up|kept waiting|answers are missing|that nobody asked for|received more|, expected")


def test_a_greeting_of_another_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    on_hello = CloudSession._on_hello

    def any_contract(self: CloudSession, greeting: pb.Hello) -> Any:
        greeting.contract = self.contract
        return on_hello(self, greeting)

    monkeypatch.setattr(CloudSession, "_on_hello", any_contract)
    found("handshake", "the door made")


def test_a_device_that_reads_whatever_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "READ_AHEAD_FRAMES", 1 << 20)
    found("device", "lie there unread")


# A crash


def test_a_crash_is_written_and_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stream = fuzz.TARGETS["stream"].load()
    data = next(data for data in inputs("stream") if stream(data) > 3)
    with monkeypatch.context() as broken:
        broken.setattr(session.Session, "_check_received", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError) as caught:
            stream(data)
    assert fuzz.place_of(caught.value) == "ZeroDivisionError at test_fuzz.py:<lambda>: division by zero"
    fuzz.write_crash(tmp_path, "stream", data, caught.value)
    (path,) = [path for path in tmp_path.iterdir() if not path.suffix]
    assert "ZeroDivisionError" in path.with_suffix(".txt").read_text()
    assert fuzz.replay(path) == 0
    assert "nothing is wrong" in capsys.readouterr().out


# What they have found


def test_a_cancel_of_a_step_behind_another_is_refused() -> None:
    """It would count tokens of the one before as cached, which was given up half-way; and the cloud kept that one's row for ever."""
    own = setting(0, 0)
    cloud = CloudSession(own.plan, own.shape, own.hash)
    hear(cloud, hello(own).SerializeToString())
    cloud.welcome(Terms(own.precision, CONTEXT_TOKENS, STEP_TOKENS, 60_000, b"s" * 16, 60_000, 4))
    for frame in (entry(own, 1, 0, 5, 1), entry(own, 2, 5, 5, 1)):
        hear(cloud, frame.SerializeToString())
    refused = hear(cloud, pb.Frame(cancel=pb.Cancel(step=2)).SerializeToString())
    assert isinstance(refused, RemoteProtocolError)
    assert str(refused) == "cancel of step 2, the last one is 2, the oldest in flight 1"


class Full(fuzz_device.Cloud):
    """Has no room, for weeks."""

    def _answers(self, stream: Any, data: bytes) -> list[bytes]:
        if not self.frames:
            return super()._answers(stream, data)
        return [pb.Frame(fault=pb.Fault(code="FULL", retry_after_millis=2**32 - 1)).SerializeToString()]


def against(
    cloud: type[fuzz_device.Cloud], monkeypatch: pytest.MonkeyPatch, work: Callable[[fuzz_device.App, Loop], Any]
) -> fuzz_device.App:
    """A device whose first greeting is welcomed does `work`; then it is closed."""
    monkeypatch.setattr(fuzz_device, "Cloud", cloud)
    with world() as loop:
        app = fuzz_device.App(loop, Choices(b""), setting(0, 0))
        monkeypatch.setattr("grpc.aio.insecure_channel", app.cloud.connect)

        async def live() -> None:
            await app.stepper.open()
            try:
                await work(app, loop)
            finally:
                await app.stepper.close()
                await asyncio.sleep(1)

        run(loop, live())
    return app


def test_a_cloud_that_names_weeks_is_waited_for_no_longer_than_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def reopen(app: fuzz_device.App, loop: Loop) -> None:
        began = loop.now
        with pytest.raises(Unreachable, match=r"FULL.*tried for 2 s"):
            await app.link.reopen("fuzz")
        assert loop.now - began <= fuzz_device.DEADLINES.give_up_seconds + 0.1

    against(Full, monkeypatch, reopen)


def test_a_connection_that_was_refused_is_closed_before_the_next_one_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def interrupted(app: fuzz_device.App, loop: Loop) -> None:
        reopening = asyncio.create_task(app.link.reopen("fuzz"))
        await asyncio.sleep(fuzz_device.DEADLINES.give_up_seconds / 2)
        reopening.cancel()
        await asyncio.wait([reopening])

    app = against(Full, monkeypatch, interrupted)
    assert len(app.cloud.channels) > 1
    assert all(channel.closed for channel in app.cloud.channels)


def test_a_cloud_that_floods_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    async def flooded(app: fuzz_device.App, loop: Loop) -> None:
        (stream,) = app.cloud.channels[0].streams
        for _ in range(1000):
            stream.deliver(pb.Frame(pong=pb.Pong(id=1)).SerializeToString())
        await asyncio.sleep(0.1)
        assert app.link.transport is not None
        assert len(app.link.transport.frames) == transport.READ_AHEAD_FRAMES
        assert (await app.stepper.feed([1, 2], 1)).shape == (1, 8)  # they are read when somebody waits

    against(fuzz_device.Cloud, monkeypatch, flooded)
