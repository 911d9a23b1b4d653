"""The golden transcripts replay: the same calls give the same bytes, the same bytes give the same events."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plora.artifact import DecoderShape, ExchangePlan
from plora.artifact.hashes import PROTOCOL_MAJOR, Contract
from plora.artifact.strict import decode
from plora.protocol import MINOR, CloudSession, DeviceSession, Terms, tensors
from plora.protocol import plora_pb2 as pb
from plora.protocol.states import State
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
        self.dtype = header["dtype"]
        self.device = DeviceSession(plan, shape, header["contract"], self.dtype)
        self.cloud = CloudSession(plan, shape, header["contract"])

    def call(self, kind: str, data: bytes) -> bytes:
        """What the sender's machine makes of the call that the recorded frame came from."""
        frame = pb.Frame.FromString(data)
        device, cloud, message = self.device, self.cloud, getattr(frame, kind)
        calls: dict[str, Callable[[], bytes]] = {
            "hello": device.hello,
            "welcome": lambda: cloud.welcome(
                Terms(self.dtype, message.context_tokens, message.step_tokens, message.idle_millis, message.session)
            ),
            "entry": lambda: device.entry(
                self.floats(message.hidden), message.exit_rows, self.floats(message.injection) if message.HasField("injection") else None
            ),
            "compressed": lambda: cloud.compressed(self.floats(message.tensor)),
            "injections": lambda: device.injections(self.floats(message.tensor)),
            "exit": lambda: cloud.exit(
                self.floats(message.hidden) if message.HasField("hidden") else np.zeros((0, cloud.shape.hidden), np.float32)
            ),
            "truncate": lambda: device.truncate(message.length),
            "cancel": device.cancel,
            "cancelled": cloud.cancelled,
            "close": device.close,
            "closed": cloud.closed,
        }
        return calls[kind]()

    def floats(self, tensor: pb.Tensor) -> Floats:
        return tensors.decode(tensor, self.dtype, tensor.rows, tensor.columns, "")


def check_event(event: Any, line: Line) -> None:
    assert type(event).__name__ == line["event"]
    content = line["content"]
    for name, shown in (("hidden", content.get("hidden")), ("injection", content.get("injection")), ("values", content.get("tensor"))):
        if hasattr(event, name) and shown is not None:
            np.testing.assert_allclose(getattr(event, name), shown, rtol=0, atol=10**-DECIMALS)
    for name in ("step", "position", "exit_rows", "length"):
        if hasattr(event, name) and name in content:
            assert getattr(event, name) == content[name]


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_replay(path: Path) -> None:
    header, lines = read(path)
    assert header["protocol"] == {"major": PROTOCOL_MAJOR, "minor": MINOR}, "recorded with another version: run make_transcripts.py"
    replay = Replay(header)
    for number, line in enumerate(lines):
        assert replay.call(line["kind"], base64.b64decode(line["bytes"])) == base64.b64decode(line["bytes"]), f"frame {number}: {CHANGED}"
        for arriving in lines[: number + 1]:
            if arriving["arrives_after"] == number:
                receiver = replay.cloud if arriving["sender"] == "device" else replay.device
                check_event(receiver.receive(base64.b64decode(arriving["bytes"])), arriving)
    assert replay.device.state is replay.cloud.state is State.OVER


def test_the_maker_makes_what_was_recorded(tmp_path: Path) -> None:
    assert {path.name for path in RECORDED} == set(RECORDINGS)
    write(tmp_path)
    for path in RECORDED:
        assert (tmp_path / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), f"{path.name}: {CHANGED}"


def test_the_transcripts_show_what_they_are_for() -> None:
    kinds = [{line["kind"] for line in read(path)[1]} for path in RECORDED]
    assert set.union(*kinds) == {field.name for field in pb.Frame.DESCRIPTOR.fields} - {"fault", "abort"}
    _, lines = read(FOLDER / "cancel_and_truncate.jsonl")
    void = [line["kind"] for line in lines if line["event"] == "Ignored"]
    assert void == ["compressed", "exit", "compressed"]
    _, lines = read(FOLDER / "entry_plan.jsonl")
    entries = [line["content"] for line in lines if line["kind"] == "entry"]
    assert [len(content["injection"]) for content in entries] == [len(content["hidden"]) for content in entries] == [4, 1, 1]
    assert {"compressed", "injections"}.isdisjoint(line["kind"] for line in lines)


def test_a_replay_sees_one_changed_bit() -> None:
    header, lines = read(FOLDER / "paper_plan.jsonl")
    replay = Replay(header)
    for line in lines[:2]:
        data = replay.call(line["kind"], base64.b64decode(line["bytes"]))
        (replay.cloud if line["sender"] == "device" else replay.device).receive(data)
    data = bytearray(base64.b64decode(lines[2]["bytes"]))
    data[-2] ^= 1  # in the last value of the entry
    event = replay.cloud.receive(bytes(data))
    with pytest.raises(AssertionError):
        check_event(event, lines[2])
