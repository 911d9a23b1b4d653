"""Writes the golden transcripts: whole sessions, frame by frame, that any implementation of the protocol can be tried on.

    python tests/golden/make_transcripts.py

Run it only when the bytes of the wire are meant to change, and move PROTOCOL_MAJOR (artifact/hashes.py) or MINOR
(protocol/limits.py) with them. docs/protocol.md, "Conformance vectors", says how to read the files. The numbers mean nothing;
they are exact in every wire dtype, so that no platform rounds them differently.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import Message

from plora.artifact import DecoderShape, ExchangePlan, Rope, entry_plan, grouped_plan, paper_plan
from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract
from plora.artifact.strict import plain
from plora.protocol import MINOR, Loopback, Terms, tensors
from plora.protocol import plora_pb2 as pb
from plora.protocol.tensors import Floats

FOLDER = Path(__file__).parent
SESSION = bytes(range(16))
DECIMALS = 4


def numbers(rows: int, columns: int, seed: int) -> Floats:
    """[rows, columns] float32, multiples of 1/64 between -2 and 2."""
    index = np.arange(rows * columns) + seed * 1009
    return ((index * 7919 % 257 - 128) / 64).astype(np.float32).reshape(rows, columns)


@dataclass
class Recording:
    """A session over a loopback, written down as it goes. Frames may wait: `arrives_after` is the number of the frame after
    whose sending this one was delivered, its own if it did not wait."""

    contract: Contract
    dtype: str
    lines: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.wire = Loopback(self.contract.plan, self.contract.shape, self.contract.hash, self.dtype)
        self.seed = 0

    def header(self) -> dict[str, Any]:
        return {
            "protocol": {"major": PROTOCOL_MAJOR, "minor": MINOR},
            "contract": self.contract.hash,
            "contract_of": {"basis": self.contract.basis, "base": self.contract.base, "exit": self.contract.exit},
            "plan": plain(self.contract.plan),
            "shape": plain(self.contract.shape),
            "dtype": self.dtype,
        }

    def sent(self, sender: str, data: bytes) -> int:
        """Writes a frame down; returns its number."""
        kind = pb.Frame.FromString(data).WhichOneof("kind")
        assert kind is not None
        content = readable(getattr(pb.Frame.FromString(data), kind), self.dtype)
        self.lines.append({"sender": sender, "kind": kind, "bytes": base64.b64encode(data).decode(), "content": content})
        return len(self.lines) - 1

    def arrives(self, number: int) -> None:
        """Delivers a frame."""
        line = self.lines[number]
        deliver = self.wire.to_cloud if line["sender"] == "device" else self.wire.to_device
        line["event"] = type(deliver(base64.b64decode(line["bytes"]))).__name__
        line["arrives_after"] = len(self.lines) - 1

    def device(self, data: bytes) -> None:
        self.arrives(self.sent("device", data))

    def cloud(self, data: bytes) -> None:
        self.arrives(self.sent("cloud", data))

    def new(self, rows: int, columns: int) -> Floats:
        self.seed += 1
        return numbers(rows, columns, self.seed)

    # What sessions are made of

    def open(self, step_tokens: int) -> None:
        self.device(self.wire.device.hello())
        self.cloud(self.wire.cloud.welcome(Terms(self.dtype, 16, step_tokens, 60_000, SESSION)))

    def entry(self, tokens: int, exit_rows: int) -> None:
        held = self.contract.plan.entry_exchange
        hidden = self.new(tokens, self.contract.shape.hidden)
        injection = self.new(tokens, held.injection_columns) if held else None
        self.device(self.wire.device.entry(hidden, exit_rows, injection))

    def compressed(self) -> bytes:
        machine = self.wire.cloud
        return machine.compressed(self.new(machine.tokens, machine.plan.exchanges[machine.exchange].compressed_columns))

    def injections(self) -> bytes:
        machine = self.wire.device
        return machine.injections(self.new(machine.tokens, machine.plan.exchanges[machine.exchange].injection_columns))

    def exit(self) -> bytes:
        return self.wire.cloud.exit(self.new(self.wire.cloud.exit_rows, self.contract.shape.hidden))

    def exchanges(self) -> None:
        for _ in self.contract.plan.exchanges:
            self.cloud(self.compressed())
            self.device(self.injections())

    def step(self, tokens: int, exit_rows: int) -> None:
        self.entry(tokens, exit_rows)
        self.exchanges()
        self.cloud(self.exit())

    def close(self) -> None:
        self.device(self.wire.device.close())
        self.cloud(self.wire.cloud.closed())

    def text(self) -> str:
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in [self.header(), *self.lines])


def readable(message: Message, dtype: str) -> dict[str, Any]:
    """A message for readers: numbers as they are, identifiers in hex, tensors as rounded rows."""
    content: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if isinstance(value, pb.Tensor):
            content[descriptor.name] = tensors.decode(value, dtype, value.rows, value.columns, "").astype(float).round(DECIMALS).tolist()
        elif isinstance(value, Message):
            content[descriptor.name] = readable(value, dtype)
        else:
            content[descriptor.name] = value.hex() if isinstance(value, bytes) else value
    return content


def contract_of(plan: ExchangePlan) -> Contract:
    shape = DecoderShape(4, plan.layers, 2, 1, 2, 6, 10, 16, 1e-5, (0,) * plan.layers, Rope((1.0,), 1.0))
    return Contract(PROTOCOL_MAJOR, plan, shape, "ba" * 32, "5e" * 32, EXIT_CONVENTION)


def record_paper_plan() -> Recording:
    """A prompt of five tokens in two chunks, two decode steps, good-bye; fp32, one exchange per layer."""
    recording = Recording(contract_of(paper_plan(2, 2)), "fp32")
    recording.open(step_tokens=3)
    recording.step(3, 0)
    recording.step(2, 1)
    recording.step(1, 1)
    recording.step(1, 1)
    recording.close()
    return recording


def record_cancel_and_truncate() -> Recording:
    """Truncation; cancels that cross a compressed, cross an exit, and come after one; a close that crosses; fp16, grouped."""
    recording = Recording(contract_of(grouped_plan(4, 2, 2, ("q", "v"), 3, separate=True)), "fp16")
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
    recording = Recording(contract_of(entry_plan(4, 1, 2, ("q", "down"), shared_injection=3, back_layers=1)), "bf16")
    recording.open(step_tokens=8)
    recording.step(4, 4)
    recording.step(1, 1)
    recording.device(recording.wire.device.truncate(4))
    recording.step(1, 1)
    recording.close()
    return recording


RECORDINGS = {
    "paper_plan.jsonl": record_paper_plan,
    "cancel_and_truncate.jsonl": record_cancel_and_truncate,
    "entry_plan.jsonl": record_entry_plan,
}


def write(folder: Path) -> None:
    for name, record in RECORDINGS.items():
        (folder / name).write_text(record().text(), encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER)
