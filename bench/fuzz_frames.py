"""What the fuzzer says: an input read as choices, small plans, frames that keep the rules, and frames that were spoiled."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor

from plora.artifact.hashes import EXIT_CONVENTION, PROTOCOL_MAJOR, Contract
from plora.artifact.plan import ExchangePlan
from plora.artifact.plans import entry_plan, grouped_plan
from plora.artifact.shape import DecoderShape, Rope
from plora.protocol import Precision, Terms, tensors, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import WINDOW
from plora.protocol.precision import say

HIDDEN = 8
CONTEXT_TOKENS = 160
"""Two and a half blocks of the pool, so that a session has to ask for more, and its last block is cut."""
STEP_TOKENS = 40
"""More than the scheduler takes for decoding (SHORT_TOKENS), so that there are pieces."""
PLANS = (
    grouped_plan(4, 2, 2),
    entry_plan(2, 0, 2),
    grouped_plan(4, 2, 2, entry_on_device=True),
    ExchangePlan(2, 0, 0, (), ()),
)
"""Two exchanges; none, but injections with the entry; both; neither."""
PRECISIONS = (uniform("fp32"), Precision("fp16", "int8", "bf16", "fp32"), uniform("int8"), uniform("fp16"))
NUMBERS = (0, 1, 2, 3, 4, 5, 12, 13, 15, 16, 17, 31, 32, 33, 40, 41, 127, 128, 159, 160, 161, 255, 256, 2**20, 2**20 + 1, 2**31 - 1, 2**31)
"""Where limits and encodings change."""
SPECIALS = [struct.pack("<f", value) for value in (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-45)] + [b"\x00\x7c", b"\x80\x7f", b"\x80"]
"""Values at the edges of a dtype: not finite, largest, smallest in fp32; infinite in fp16 and bf16; -128 in int8."""


class Found(Exception):
    """The code under test has broken a rule."""


def check(kept: object, rule: str) -> None:
    if not kept:
        raise Found(rule)


class Choices:
    """An input, read byte by byte as answers to questions; zeros behind its end. Zero is always the answer of somebody who keeps the
    rules, so that an input of zeros is a plain session and a mutation of it breaks one rule."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def below(self, count: int) -> int:
        return self.byte() % count

    def seldom(self, odds: int = 16) -> bool:
        """One time of `odds`, if the bytes are random."""
        return self.byte() % odds == odds - 1

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, bits: int = 32) -> int:
        """Any that fits, mostly one at which something changes."""
        which = self.byte()
        if which < 2 * len(NUMBERS):
            return NUMBERS[which // 2]
        if which < 192:
            return (1 << bits) - 1 - which % 8
        return int.from_bytes(self.take(bits // 8), "little")


@dataclass(frozen=True)
class Setting:
    """What two halves agree on before they talk. hash: of their contract."""

    plan: ExchangePlan
    shape: DecoderShape
    hash: str
    precision: Precision

    @property
    def exchanges(self) -> int:
        return len(self.plan.exchanges)


@cache
def setting(plan: int, precision: int) -> Setting:
    own = PLANS[plan]
    shape = DecoderShape(HIDDEN, own.layers, 2, 1, 4, 8, 10, CONTEXT_TOKENS, 1e-5, (0,) * own.layers, Rope((1.0, 0.1), 1.0))
    return Setting(own, shape, Contract(PROTOCOL_MAJOR, own, shape, "fuzz", "fuzz", EXIT_CONVENTION).hash, PRECISIONS[precision])


def any_setting(choices: Choices) -> Setting:
    which = choices.byte()
    return setting(which % len(PLANS), which // len(PLANS) % len(PRECISIONS))


def any_terms(choices: Choices, own: Setting) -> Terms:
    which = choices.byte()
    window, lease_millis = WINDOW - which % WINDOW, 0 if which // WINDOW % 4 == 3 else 60_000
    return Terms(own.precision, CONTEXT_TOKENS, STEP_TOKENS, 60_000, b"s" * 16, lease_millis, window)


# Frames of a device that keeps the rules


@cache
def values(rows: int, columns: int, seed: int = 0) -> tensors.Floats:
    """[rows, columns] float32, small, others for every seed."""
    return np.random.default_rng(seed).integers(-64, 64, (rows, columns)).astype(np.float32) / 8


@cache
def tensor(rows: int, columns: int, dtype: str, seed: int = 0) -> pb.Tensor:
    return tensors.encode(values(rows, columns, seed), dtype, rows, columns, "fuzz")


def contract_bytes(own: Setting) -> bytes:
    return bytes.fromhex(own.hash)


def hello(own: Setting, session: bytes = b"", received: int = 0, resume: bool = True, alone: bool = False, minor: int = 3) -> pb.Frame:
    abilities = pb.Capabilities(fp16=True, bf16=True, resume=resume, int8=True)
    greeting = pb.Hello(major=1, minor=minor, contract=contract_bytes(own), capabilities=abilities, session=session, alone=alone)
    say(own.precision, greeting)
    return pb.Frame(hello=greeting, received=received)


def entry(own: Setting, step: int, position: int, tokens: int, exit_rows: int, seed: int = 0) -> pb.Frame:
    made = pb.Entry(step=step, position=position, exit_rows=exit_rows)
    made.hidden.CopyFrom(tensor(tokens, HIDDEN, own.precision.entry, seed))
    if held := own.plan.entry_exchange:
        made.injection.CopyFrom(tensor(tokens, held.injection_columns, own.precision.injections, seed + 1))
    return pb.Frame(entry=made)


def injections(own: Setting, step: int, exchange: int, tokens: int, seed: int = 0) -> pb.Frame:
    made = pb.Injections(step=step, exchange=exchange)
    made.tensor.CopyFrom(tensor(tokens, own.plan.exchanges[exchange].injection_columns, own.precision.injections, seed))
    return pb.Frame(injections=made)


# Frames that were spoiled


def spoil(choices: Choices, frame: pb.Frame, others: list[bytes]) -> bytes:
    """The frame with something changed, on the level of fields or of bytes; or one of `others`, or any bytes."""
    how = choices.byte()
    if how < 160:
        spoiled = pb.Frame.FromString(frame.SerializeToString())
        for _ in range(1 + (how % 8 == 7)):
            spoil_field(choices, spoiled)
        return spoiled.SerializeToString()
    if how < 216:
        return spoil_bytes(choices, frame.SerializeToString(), others)
    if how < 240 and others:
        return others[choices.byte() % len(others)]
    return choices.take(choices.byte())


def spoil_field(choices: Choices, frame: pb.Frame) -> None:
    """Another value in one field, of the frame or of any message in it, set or not."""
    kind = frame.WhichOneof("kind")
    places: list[tuple[Any, FieldDescriptor]] = [(frame, frame.DESCRIPTOR.fields_by_name["received"])]
    messages = [getattr(frame, kind)] if kind else []
    for message in messages:
        for field in message.DESCRIPTOR.fields:
            places.append((message, field))
            if field.message_type is not None and message.HasField(field.name):
                messages.append(getattr(message, field.name))
    message, field = places[choices.byte() % len(places)]
    now = getattr(message, field.name)
    if field.message_type is not None:
        if message.HasField(field.name):
            message.ClearField(field.name)
        else:
            now.SetInParent()
    elif field.enum_type is not None:
        setattr(message, field.name, choices.number(16) % 2**31 if choices.seldom(4) else choices.below(6))
    elif field.type == field.TYPE_BOOL:
        setattr(message, field.name, not now)
    elif field.type == field.TYPE_BYTES:
        setattr(message, field.name, spoil_data(choices, now))
    elif field.type == field.TYPE_STRING:
        setattr(message, field.name, "x" * (choices.number() % 2000))
    else:
        largest = 2 ** (64 if field.type == field.TYPE_UINT64 else 32) - 1
        near = (now + choices.below(7) - 3) % (largest + 1)
        setattr(message, field.name, near if choices.below(4) else min(choices.number(64), largest))


def spoil_data(choices: Choices, data: bytes) -> bytes:
    """Bytes of a tensor, an id or padding: shorter, longer, or with another value in them."""
    how, place = choices.below(6), choices.byte() % max(len(data), 1)
    if how == 0:
        special = SPECIALS[choices.below(len(SPECIALS))]
        place = place // len(special) * len(special)
        return data[:place] + special + data[place + len(special) :]
    if how == 1:
        return data[:place]
    if how == 2:
        return data + choices.take(1 + choices.below(8))
    if how == 3:
        return bytes(choices.number() % 5000)
    if how == 4:
        return b""
    return data[:place] + bytes([choices.byte()]) + data[place + 1 :]


def spoil_bytes(choices: Choices, data: bytes, others: list[bytes]) -> bytes:
    """A bit flipped, a piece cut off, doubled or put in, another frame behind, or a field that nobody knows."""
    how, place = choices.below(6), choices.byte() % max(len(data), 1)
    if how == 0 and data:
        return data[:place] + bytes([data[place] ^ 1 << choices.below(8)]) + data[place + 1 :]
    if how == 1:
        return data[:place]
    if how == 2:
        return data[:place] + data[place : place + 1 + choices.byte()] + data[place:]
    if how == 3 and others:
        return data + others[choices.byte() % len(others)]
    if how == 4:
        return data + b"\xa2\x06" + bytes([4]) + b"text"  # field 100
    return data[:place] + choices.take(1 + choices.below(8)) + data[place:]
