"""Writes the golden transcripts: whole sessions, frame by frame, that any implementation of the protocol can be tried on.

    python tests/golden/make_transcripts.py

Run it only when the bytes of the wire are meant to change, and move PROTOCOL_MAJOR (artifact/hashes.py) or MINOR
(protocol/limits.py) with them. docs/protocol.md, "Conformance vectors", says how to read the files. The numbers mean nothing;
they are exact in every wire dtype, so that no platform rounds them differently. minor_1/ holds what minor version 1 recorded,
and is not written any more: devices of that version are still served.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from plora.artifact import DecoderShape, ExchangePlan, Rope, entry_plan, grouped_plan, paper_plan
from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract
from plora.artifact.strict import plain
from plora.protocol import MINOR, CloudSession, Loopback, Precision, Terms, tensors, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import Greeting, PingArrived
from plora.protocol.tensors import DTYPES, Floats

FOLDER = Path(__file__).parent
SESSION = bytes(range(16))
DECIMALS = 4


def numbers(rows: int, columns: int, seed: int, dtype: str) -> Floats:
    """[rows, columns] float32, multiples of 1/64 between -2 and 2. For int8, the largest of each row is 127/64."""
    index = np.arange(rows * columns) + seed * 1009
    values = ((index * 7919 % 257 - 128) / 64).astype(np.float32).reshape(rows, columns)
    if dtype == "int8":
        values = values.clip(-127 / 64, 127 / 64)
        values[:, 0] = 127 / 64
    return values


@dataclass
class Recording:
    """A session over a loopback, written down as it goes. Frames may wait: `arrives_after` is the number of the frame after
    whose sending this one was delivered, its own if it did not wait."""

    contract: Contract
    precision: Precision
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wire = Loopback(self.contract.plan, self.contract.shape, self.contract.hash, self.precision)
        self.seed = 0

    def header(self) -> dict[str, Any]:
        return {
            "protocol": {"major": PROTOCOL_MAJOR, "minor": MINOR},
            "contract": self.contract.hash,
            "contract_of": {"basis": self.contract.basis, "base": self.contract.base, "exit": self.contract.exit},
            "plan": plain(self.contract.plan),
            "shape": plain(self.contract.shape),
            "precision": asdict(self.precision),
        }

    def sent(self, sender: str, data: bytes) -> int:
        """Writes a frame down as lost, until it arrives; returns its number."""
        frame = pb.Frame.FromString(data)
        kind = frame.WhichOneof("kind")
        assert kind is not None
        line: dict[str, Any] = {"sender": sender, "kind": kind, "bytes": base64.b64encode(data).decode()}
        line |= {"content": readable(getattr(frame, kind)), "arrives_after": None, "event": None}
        if frame.received:
            line["received"] = frame.received
        self.lines.append(line)
        return len(self.lines) - 1

    def arrives(self, number: int) -> Any:
        """Delivers a frame; returns the event."""
        line = self.lines[number]
        deliver = self.wire.to_cloud if line["sender"] == "device" else self.wire.to_device
        event = deliver(base64.b64decode(line["bytes"]))
        line |= {"event": type(event).__name__, "arrives_after": len(self.lines) - 1}
        return event

    def device(self, data: bytes) -> Any:
        return self.arrives(self.sent("device", data))

    def cloud(self, data: bytes) -> Any:
        return self.arrives(self.sent("cloud", data))

    def new(self, rows: int, columns: int, dtype: str) -> Floats:
        self.seed += 1
        return numbers(rows, columns, self.seed, dtype)

    # What sessions are made of

    def open(self, step_tokens: int, lease_millis: int = 0, window: int = 1) -> None:
        self.device(self.wire.device.hello())
        self.cloud(self.wire.cloud.welcome(Terms(self.precision, 16, step_tokens, 60_000, SESSION, lease_millis, window)))

    def entry(self, tokens: int, exit_rows: int, position: int | None = None) -> None:
        held = self.contract.plan.entry_exchange
        hidden = self.new(tokens, self.contract.shape.hidden, self.precision.entry)
        injection = self.new(tokens, held.injection_columns, self.precision.injections) if held else None
        self.device(self.wire.device.entry(hidden, exit_rows, injection, position))

    def compressed(self, step: int | None = None) -> bytes:
        machine = self.wire.cloud
        running = next(each for each in machine.steps if step in (None, each.number))
        columns = machine.plan.exchanges[running.exchange].compressed_columns
        return machine.compressed(self.new(running.tokens, columns, self.precision.compressed), step)

    def injections(self, step: int | None = None) -> bytes:
        machine = self.wire.device
        running = next(each for each in machine.steps if step in (None, each.number))
        columns = machine.plan.exchanges[running.exchange].injection_columns
        return machine.injections(self.new(running.tokens, columns, self.precision.injections), step)

    def exit(self, compute_micros: int = 0) -> bytes:
        rows = self.wire.cloud.running.exit_rows
        return self.wire.cloud.exit(self.new(rows, self.contract.shape.hidden, self.precision.exit), compute_micros)

    def exchange(self, step: int | None = None) -> None:
        self.cloud(self.compressed(step))
        self.device(self.injections(step))

    def exchanges(self) -> None:
        for _ in self.contract.plan.exchanges:
            self.exchange()

    def step(self, tokens: int, exit_rows: int, position: int | None = None) -> None:
        self.entry(tokens, exit_rows, position)
        self.exchanges()
        self.cloud(self.exit())

    def ping(self, number: int, padding_bytes: int, reply_bytes: int) -> None:
        event = self.device(self.wire.device.ping(number, padding_bytes, reply_bytes))
        assert isinstance(event, PingArrived)
        self.cloud(event.answer)

    def take_up(self) -> None:
        """The session goes on over another connection: what is lost so far is sent again."""
        lost = {line["bytes"]: number for number, line in enumerate(self.lines) if line["event"] is None}
        greeting = self.sent("device", self.wire.device.hello_again())
        door = CloudSession(self.contract.plan, self.contract.shape, self.contract.hash)
        event = door.receive(base64.b64decode(self.lines[greeting]["bytes"]))
        assert isinstance(event, Greeting)
        self.lines[greeting] |= {"event": "Greeting", "arrives_after": greeting}
        welcome, *from_cloud = self.wire.cloud.welcome_back(event)
        answer = self.sent("cloud", welcome)
        from_device = self.wire.device.welcomed_back(welcome)
        self.lines[answer] |= {"event": "Resumed", "arrives_after": answer}
        again = [
            (self.sent(sender, data), sender) for sender, frames in (("cloud", from_cloud), ("device", from_device)) for data in frames
        ]
        for number, _ in again:
            self.lines[number]["again"] = lost[self.lines[number]["bytes"]]
            self.arrives(number)

    def close(self) -> None:
        self.device(self.wire.device.close())
        self.cloud(self.wire.cloud.closed())

    def text(self) -> str:
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in [self.header(), *self.lines])


def readable(message: Message) -> dict[str, Any]:
    """A message for readers: numbers as they are, identifiers in hex, tensors as rounded rows."""
    content: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if isinstance(value, pb.Tensor):
            rows = tensors.decode(value, DTYPES[value.dtype], value.rows, value.columns, "")
            content[descriptor.name] = rows.astype(float).round(DECIMALS).tolist()
        elif isinstance(value, Message):
            content[descriptor.name] = readable(value)
        else:
            content[descriptor.name] = value.hex() if isinstance(value, bytes) else value
    return content


def contract_of(plan: ExchangePlan) -> Contract:
    shape = DecoderShape(4, plan.layers, 2, 1, 2, 6, 10, 16, 1e-5, (0,) * plan.layers, Rope((1.0,), 1.0))
    return Contract(PROTOCOL_MAJOR, plan, shape, "ba" * 32, "5e" * 32, EXIT_CONVENTION)


def record_paper_plan() -> Recording:
    """A prompt of five tokens in two chunks, two decode steps, good-bye; fp32, one exchange per layer."""
    recording = Recording(contract_of(paper_plan(2, 2)), uniform("fp32"))
    recording.open(step_tokens=3)
    recording.step(3, 0)
    recording.step(2, 1)
    recording.step(1, 1)
    recording.step(1, 1)
    recording.close()
    return recording


def record_cancel_and_truncate() -> Recording:
    """Truncation; cancels that cross a compressed, cross an exit, and come after one; a close that crosses; fp16, grouped."""
    recording = Recording(contract_of(grouped_plan(4, 2, 2, ("q", "v"), 3, separate=True)), uniform("fp16"))
    device, cloud = recording.wire.device, recording.wire.cloud
    recording.open(step_tokens=8)
    recording.step(6, 1)
    recording.device(device.truncate(4))

    recording.entry(2, 2)
    late = recording.sent("cloud", recording.compressed())
    recording.device(device.cancel())
    recording.arrives(late)
    recording.cloud(cloud.cancelled())

    recording.entry(2, 1)
    recording.exchanges()
    late = recording.sent("cloud", recording.exit())
    recording.device(device.cancel())
    recording.arrives(late)
    recording.cloud(cloud.cancelled())

    recording.step(3, 1)
    recording.device(device.cancel())
    recording.cloud(cloud.cancelled())
    recording.device(device.truncate(1))

    recording.entry(1, 1)
    late = recording.sent("cloud", recording.compressed())
    recording.device(device.close())
    recording.arrives(late)
    recording.cloud(cloud.closed())
    return recording


def record_entry_plan() -> Recording:
    """One round trip per token: a shared injection of three values goes with each entry; layers 0 and 3 run on the device, so every
    token's row of the exit is wanted; bf16."""
    recording = Recording(contract_of(entry_plan(4, 1, 2, ("q", "down"), shared_injection=3, back_layers=1)), uniform("bf16"))
    recording.open(step_tokens=8)
    recording.step(4, 4)
    recording.step(1, 1)
    recording.device(recording.wire.device.truncate(4))
    recording.step(1, 1)
    recording.close()
    return recording


def record_resumed() -> Recording:
    """A lease, a dtype for each kind, three chunks of a prompt in flight; the connection breaks with a frame on its way in either
    direction, and the session goes on over another; then drafted tokens of which some are rejected, two steps given up at once, pings."""
    recording = Recording(contract_of(grouped_plan(4, 2, 2, ("q", "v"))), Precision("fp16", "int8", "int8", "bf16"))
    device, cloud = recording.wire.device, recording.wire.cloud
    recording.open(step_tokens=3, lease_millis=30_000, window=3)
    recording.ping(1, 4, 8)
    for exit_rows, tokens in ((0, 3), (0, 3), (1, 2)):
        recording.entry(tokens, exit_rows)
    recording.exchange(1)
    recording.exchange(2)
    recording.cloud(recording.compressed(1))
    recording.sent("cloud", recording.compressed(2))
    recording.sent("device", recording.injections(1))

    recording.take_up()
    recording.device(recording.injections(2))
    recording.cloud(recording.exit(compute_micros=1500))
    recording.exchange(3)
    recording.cloud(recording.exit(compute_micros=700))
    recording.exchange(3)
    recording.ping(2, 0, 0)
    recording.cloud(recording.exit())

    recording.step(3, 3)  # one token and two drafted ones
    recording.step(3, 3, position=9)  # which were rejected
    recording.entry(1, 1, position=11)
    recording.entry(1, 1)
    recording.cloud(recording.compressed())
    late = recording.sent("cloud", recording.compressed(7))
    recording.device(device.cancel())
    recording.arrives(late)
    recording.cloud(cloud.cancelled())
    recording.step(1, 1)
    recording.close()
    return recording


RECORDINGS = {
    "paper_plan.jsonl": record_paper_plan,
    "cancel_and_truncate.jsonl": record_cancel_and_truncate,
    "entry_plan.jsonl": record_entry_plan,
    "resumed.jsonl": record_resumed,
}


def write(folder: Path) -> None:
    for name, record in RECORDINGS.items():
        (folder / name).write_text(record().text(), encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
