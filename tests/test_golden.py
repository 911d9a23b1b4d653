"""The golden transcripts replay: the same calls give the same bytes, the same bytes give the same events."""

from __future__ import annotations

import base64
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plora.artifact import DecoderShape, ExchangePlan
from plora.artifact.hashes import PROTOCOL_MAJOR, Contract
from plora.artifact.strict import decode
from plora.protocol import MINOR, CloudSession, DeviceSession, Precision, Terms, tensors, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import Greeting, PingArrived
from plora.protocol.states import SENDERS, State
from plora.protocol.tensors import Floats

from .golden.make_transcripts import DECIMALS, FOLDER, RECORDINGS, write

CHANGED = (
    "the bytes of the wire changed: a client in the field would no longer be understood. If that is meant, raise PROTOCOL_MAJOR "
    "(artifact/hashes.py) or MINOR (protocol/limits.py) and run `python tests/golden/make_transcripts.py`; if not, undo it"
)
RECORDED = sorted(FOLDER.glob("*.jsonl"))
Line = dict[str, Any]


def read(path: Path) -> tuple[Line, list[Line]]:
    header, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return header, lines


class Replay:
    """Fresh machines for one transcript."""

    def __init__(self, header: Line) -> None:
        plan = decode(ExchangePlan, header["plan"], "plan")
        shape = decode(DecoderShape, header["shape"], "shape")
        contract = Contract(header["protocol"]["major"], plan, shape, **header["contract_of"])
        assert contract.hash == header["contract"], "the contract hash is computed otherwise than when this was recorded"
        self.precision = Precision(**header["precision"]) if "precision" in header else uniform(header["dtype"])
        self.device = DeviceSession(plan, shape, header["contract"], self.precision)
        self.cloud = CloudSession(plan, shape, header["contract"])
        self.greeting: Greeting | None = None  # of a device that takes the session up again
        self.again: dict[str, deque[bytes]] = {"device": deque(), "cloud": deque()}  # what each side then sends again
        self.pongs: deque[bytes] = deque()

    def call(self, line: Line) -> bytes:
        """What the sender's machine makes of the call that the recorded frame came from."""
        if "again" in line:
            return self.again[line["sender"]].popleft()
        kind = line["kind"]
        device, cloud, message = self.device, self.cloud, getattr(pb.Frame.FromString(base64.b64decode(line["bytes"])), kind)
        calls: dict[str, Callable[[], bytes]] = {
            "hello": lambda: device.hello_again() if message.session else device.hello(),
            "welcome": lambda: self.welcome(message),
            "entry": lambda: device.entry(
                floats(message.hidden),
                message.exit_rows,
                floats(message.injection) if message.HasField("injection") else None,
                message.position,
            ),
            "compressed": lambda: cloud.compressed(floats(message.tensor), message.step),
            "injections": lambda: device.injections(floats(message.tensor), message.step),
            "exit": lambda: cloud.exit(
                floats(message.hidden) if message.HasField("hidden") else np.zeros((0, cloud.shape.hidden), np.float32),
                message.compute_micros,
            ),
            "truncate": lambda: device.truncate(message.length),
            "cancel": device.cancel,
            "cancelled": cloud.cancelled,
            "close": device.close,
            "closed": cloud.closed,
            "ping": lambda: device.ping(message.id, len(message.padding), message.reply_bytes),
            "pong": self.pongs.popleft,
        }
        return calls[kind]()

    def welcome(self, message: pb.Welcome) -> bytes:
        if self.greeting is not None:
            data, *again = self.cloud.welcome_back(self.greeting)
            self.again["cloud"].extend(again)
            return data
        terms = Terms(
            self.precision,
            message.context_tokens,
            message.step_tokens,
            message.idle_millis,
            message.session,
            message.lease_millis,
            message.window or 1,
        )
        return self.cloud.welcome(terms)

    def deliver(self, line: Line) -> Any:
        """The event that a recorded frame gives, None for the welcome of a session taken up again."""
        data = base64.b64decode(line["bytes"])
        if line["sender"] == "cloud" and line["kind"] == "welcome" and self.greeting is not None:
            self.again["device"].extend(self.device.welcomed_back(data))
            self.greeting = None
            return None
        if line["sender"] == "cloud":
            return self.device.receive(data)
        if line["kind"] == "hello" and line["content"].get("session"):
            event = CloudSession(self.cloud.plan, self.cloud.shape, self.cloud.contract.hex()).receive(data)
            assert isinstance(event, Greeting)
            self.greeting = event
            return event
        event = self.cloud.receive(data)
        if isinstance(event, PingArrived):
            self.pongs.append(event.answer)
        return event

    def run(self, lines: list[Line], same: Callable[[bytes, bytes], bool]) -> None:
        """Calls and deliveries in the recorded order; every call must give what was recorded."""
        for number, line in enumerate(lines):
            assert same(self.call(line), base64.b64decode(line["bytes"])), f"frame {number}: {CHANGED}"
            for arriving in lines[: number + 1]:
                if arriving["arrives_after"] == number:
                    check_event(self.deliver(arriving), arriving)
        assert self.device.state is self.cloud.state is State.OVER
        assert not self.again["device"]
        assert not self.again["cloud"]
        assert not self.pongs


def floats(tensor: pb.Tensor) -> Floats:
    return tensors.decode(tensor, tensors.DTYPES[tensor.dtype], tensor.rows, tensor.columns, "")


def check_event(event: Any, line: Line) -> None:
    assert ("Resumed" if event is None else type(event).__name__) == line["event"]
    content = line["content"]
    for name, shown in (("hidden", content.get("hidden")), ("injection", content.get("injection")), ("values", content.get("tensor"))):
        if hasattr(event, name) and shown is not None:
            np.testing.assert_allclose(getattr(event, name), shown, rtol=0, atol=10**-DECIMALS)
    for name in ("step", "position", "exit_rows", "length", "compute_micros", "id"):
        if hasattr(event, name) and name in content:
            assert getattr(event, name) == content[name]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_replay(path: Path) -> None:
    header, lines = read(path)
    assert header["protocol"] == {"major": PROTOCOL_MAJOR, "minor": MINOR}, "recorded with another version: run make_transcripts.py"
    Replay(header).run(lines, lambda made, recorded: made == recorded)


def as_minor(minor: int, data: bytes) -> bytes:
    """A frame of ours with all that later minors added to the greetings taken away: the device's capabilities, and either side's number."""
    frame = pb.Frame.FromString(data)
    if frame.HasField("hello"):
        frame.hello.minor = minor
        if minor < 2:
            frame.hello.capabilities.CopyFrom(pb.Capabilities(fp16=True, bf16=True))
    elif frame.HasField("welcome"):
        frame.welcome.minor = minor
    return frame.SerializeToString()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("minor_*/*.jsonl")), ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_devices_of_earlier_minors_are_served_as_ever(path: Path) -> None:
    """The cloud hears what such devices sent, and answers as it did, to the byte, but for its number in the welcome. Without a lease our own
    device says nothing new after its hello either."""
    header, lines = read(path)
    minor = int(path.parent.name.removeprefix("minor_"))
    assert header["protocol"] == {"major": PROTOCOL_MAJOR, "minor": minor}
    Replay(header).run(lines, lambda made, recorded: as_minor(minor, made) == recorded)


def test_there_are_devices_of_earlier_minors() -> None:
    first = {"paper_plan.jsonl", "cancel_and_truncate.jsonl", "entry_plan.jsonl"}
    assert {path.name for path in (FOLDER / "minor_1").glob("*.jsonl")} == first
    assert {path.name for path in (FOLDER / "minor_2").glob("*.jsonl")} == first | {"resumed.jsonl"}


def test_the_maker_makes_what_was_recorded(tmp_path: Path) -> None:
    assert {path.name for path in RECORDED} == set(RECORDINGS)
    write(tmp_path)
    for path in RECORDED:
        assert (tmp_path / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"{path.name}: {CHANGED}"


def test_the_transcripts_show_what_they_are_for() -> None:
    kinds = [{line["kind"] for line in read(path)[1]} for path in RECORDED]
    assert set.union(*kinds) == set(SENDERS) - {"fault", "abort"}
    _, lines = read(FOLDER / "cancel_and_truncate.jsonl")
    void = [line["kind"] for line in lines if line["event"] == "Ignored"]
    assert void == ["compressed", "exit", "compressed"]
    _, lines = read(FOLDER / "entry_plan.jsonl")
    entries = [line["content"] for line in lines if line["kind"] == "entry"]
    assert [len(content["injection"]) for content in entries] == [len(content["hidden"]) for content in entries] == [4, 1, 1]
    assert {"compressed", "injections"}.isdisjoint(line["kind"] for line in lines)


def test_the_resumed_transcript_shows_what_it_is_for() -> None:
    header, lines = read(FOLDER / "resumed.jsonl")
    assert set(header["precision"].values()) == {"fp16", "int8", "bf16"}
    lost = [number for number, line in enumerate(lines) if line["arrives_after"] is None]
    assert [(lines[number]["sender"], lines[number]["kind"]) for number in lost] == [("cloud", "compressed"), ("device", "injections")]
    again = [line for line in lines if "again" in line]
    assert [line["again"] for line in again] == lost
    assert [line["bytes"] for line in again] == [lines[number]["bytes"] for number in lost]
    assert [line["event"] for line in lines if line["kind"] in ("hello", "welcome")] == ["Greeting", "Opened", "Greeting", "Resumed"]
    assert [line["kind"] for line in lines if "received" not in line] == ["hello", "welcome", "ping", "pong", "entry", "entry", "entry"]
    entries = [(line["content"].get("position", 0), len(line["content"]["hidden"])) for line in lines if line["kind"] == "entry"]
    assert entries == [(0, 3), (3, 3), (6, 2), (8, 3), (9, 3), (11, 1), (12, 1), (11, 1)]
    steps = [line["content"]["step"] for line in lines if line["kind"] == "compressed" and "again" not in line]
    assert steps[:4] == [1, 2, 1, 2]
    assert [line["content"]["compute_micros"] for line in lines if "compute_micros" in line["content"]] == [1500, 700]
    assert [line["kind"] for line in lines if line["event"] == "Ignored"] == ["compressed"]


def test_a_replay_sees_one_changed_bit() -> None:
    header, lines = read(FOLDER / "paper_plan.jsonl")
    replay = Replay(header)
    for line in lines[:2]:
        data = replay.call(line)
        (replay.cloud if line["sender"] == "device" else replay.device).receive(data)
    data = bytearray(base64.b64decode(lines[2]["bytes"]))
    data[-2] ^= 1  # in the last value of the entry
    event = replay.cloud.receive(bytes(data))
    with pytest.raises(AssertionError):
        check_event(event, lines[2])
