"""What a cloud must accept from a device and what it must refuse, written a second time, from docs/protocol.md and not from the code.

Whoever fuzzes with nothing but "it must not crash" does not see a check that is missing. Here every frame has a verdict before it is fed,
and the machine must come to the same one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from google.protobuf.message import DecodeError

from plora.protocol import MAX_FRAME_BYTES, Precision, Terms
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import MAX_PROBE_BYTES, MAX_UNRECEIVED_FRAMES

from .fuzz_frames import HIDDEN, Choices, Setting, contract_bytes, entry, injections

NAMES = {1: "fp32", 2: "fp16", 3: "bf16", 4: "int8"}
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}
FROM_DEVICE = ("hello", "entry", "injections", "truncate", "cancel", "close", "abort", "ping")
NUMBERED = ("entry", "injections", "truncate", "cancel", "close")


def read(data: bytes) -> pb.Frame | None:
    """A frame in canonical form and of legal size, else None."""
    if len(data) > MAX_FRAME_BYTES:
        return None
    try:
        frame = pb.Frame.FromString(data)
    except DecodeError:
        return None
    frame.DiscardUnknownFields()
    return frame if frame.SerializeToString(deterministic=True) == data and frame.WhichOneof("kind") else None


def good_tensor(tensor: pb.Tensor, dtype: str, rows: int, columns: int) -> bool:
    if NAMES.get(tensor.dtype) != dtype or (tensor.rows, tensor.columns) != (rows, columns):
        return False
    if len(tensor.data) != rows * columns * BYTES[dtype] or len(tensor.scales) != (4 * rows if dtype == "int8" else 0):
        return False
    if dtype == "int8":
        scales = np.frombuffer(tensor.scales, "<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            return (
                not np.signbit(scales[scales != 0]).any()
                and bool(np.isfinite(scales * np.float32(127)).all())
                and b"\x80" not in tensor.data
            )
    if dtype == "bf16":
        return bool(((np.frombuffer(tensor.data, "<u2") & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(np.frombuffer(tensor.data, "<f4" if dtype == "fp32" else "<f2")).all())


def said_precision(message: pb.Hello | pb.Welcome) -> Precision | None:
    """What a greeting's dtypes mean; None if they mean nothing."""
    if message.HasField("precision"):
        four = [message.precision.entry, message.precision.compressed, message.precision.injections, message.precision.exit]
        if message.dtype or len(set(four)) == 1:
            return None
    else:
        four = [message.dtype] * 4
    return Precision(*(NAMES[code] for code in four)) if all(code in NAMES for code in four) else None


def good_hello(own: Setting, data: bytes) -> bool:
    """Whether the door must let a new connection's first frame in."""
    frame = read(data)
    if frame is None or frame.WhichOneof("kind") != "hello":
        return False
    greeting = frame.hello
    return (
        greeting.major == 1
        and greeting.contract == contract_bytes(own)
        and len(greeting.session) in (0, 16)
        and said_precision(greeting) is not None
        and (bool(greeting.session) or frame.received == 0)
    )


@dataclass
class Flight:
    """A step in flight. progress: frames of its exchanges so far, both ways."""

    number: int
    position: int
    tokens: int
    exit_rows: int
    progress: int = 0

    @property
    def end(self) -> int:
        return self.position + self.tokens


@dataclass
class Rules:
    """One session. length: tokens cached; step: the last that began; positions: where each step began, or less if a rollback went
    further; heard, sent: the cloud's numbered frames; acknowledged: what the device said of the latter; pending: cancel, close or over;
    cancelled: the step that the last cancel named."""

    own: Setting
    terms: Terms
    length: int = 0
    step: int = 0
    flying: list[Flight] = field(default_factory=list)
    positions: dict[int, int] = field(default_factory=dict)
    heard: int = 0
    sent: int = 0
    acknowledged: int = 0
    pending: str = ""
    cancelled: int = 0

    def copy(self) -> Rules:
        return replace(self, flying=[replace(flight) for flight in self.flying], positions=dict(self.positions))

    @property
    def leased(self) -> bool:
        return self.terms.lease_millis > 0

    @property
    def end(self) -> int:
        return self.flying[-1].end if self.flying else self.length

    # What a device says

    def verdict(self, data: bytes) -> bool | None:
        """Whether the cloud must accept a frame on an open session; None if it may do either."""
        frame = read(data)
        if frame is None or self.pending == "over":
            return False
        kind = frame.WhichOneof("kind")
        if kind == "hello" or kind not in FROM_DEVICE or frame.received > (self.sent if self.leased else 0):
            return False
        return getattr(self, f"_{kind}")(getattr(frame, kind))

    def _entry(self, said: pb.Entry) -> bool:
        tokens, held, precision = said.hidden.rows, self.own.plan.entry_exchange, self.own.precision
        return (
            not self.pending
            and said.step == self.step + 1
            and len(self.flying) < self.terms.window
            and (said.position == self.end if self.flying else said.position <= self.length)
            and 1 <= tokens <= self.terms.step_tokens
            and said.position + tokens <= self.terms.context_tokens
            and said.exit_rows <= tokens
            and good_tensor(said.hidden, precision.entry, tokens, HIDDEN)
            and said.HasField("injection") == (held is not None)
            and (held is None or good_tensor(said.injection, precision.injections, tokens, held.injection_columns))
        )

    def _injections(self, said: pb.Injections) -> bool:
        place = next((place for place, flight in enumerate(self.flying) if flight.number == said.step), None)
        if self.pending or place is None:
            return False
        flight = self.flying[place]
        exchange, waits = divmod(flight.progress, 2)
        if not waits or said.exchange != exchange or not self.may_go(place):
            return False
        return good_tensor(said.tensor, self.own.precision.injections, flight.tokens, self.own.plan.exchanges[exchange].injection_columns)

    def _truncate(self, said: pb.Truncate) -> bool:
        return not self.pending and not self.flying and said.length <= self.length

    def _cancel(self, said: pb.Cancel) -> bool | None:
        if self.pending or not 1 <= said.step <= self.step:
            return False
        oldest = self.flying[0].number if self.flying else self.step
        return said.step == oldest or (None if said.step < oldest else False)  # it may have crossed exits: some are remembered

    def _close(self, said: pb.Close) -> bool:
        return self.pending != "close"

    def _abort(self, said: pb.Abort) -> bool:
        return True

    def _ping(self, said: pb.Ping) -> bool:
        return said.reply_bytes <= MAX_PROBE_BYTES and len(said.padding) <= MAX_PROBE_BYTES and not said.padding.strip(b"\0")

    def accept(self, data: bytes) -> str:
        """The cloud has accepted the frame. Returns its kind."""
        frame = pb.Frame.FromString(data)
        kind = frame.WhichOneof("kind")
        assert kind is not None  # it was read before
        match kind:
            case "entry":
                said = frame.entry
                if not self.flying:
                    self._roll_back(said.position)
                self.step += 1
                self.positions[self.step] = said.position
                self.flying.append(Flight(self.step, said.position, said.hidden.rows, said.exit_rows))
            case "injections":
                self.flight(frame.injections.step).progress += 1
            case "truncate":
                self._roll_back(frame.truncate.length)
            case "cancel":
                self.pending, self.cancelled = "cancel", frame.cancel.step
            case "close":
                self.pending = "close"
            case "abort":
                self.pending = "over"
        self.heard += kind in NUMBERED
        self.acknowledged = max(self.acknowledged, frame.received)
        return kind

    def flight(self, number: int) -> Flight:
        return next(flight for flight in self.flying if flight.number == number)

    def _roll_back(self, length: int) -> None:
        self.length = length
        self.positions = {number: min(position, length) for number, position in self.positions.items()}

    # What the cloud says

    def may_go(self, place: int) -> bool:
        """Whether the step at `place` overtakes nobody with its next frame."""
        return place == 0 or self.flying[place].progress < self.flying[place - 1].progress

    def owed(self) -> list[tuple[str, int]]:
        """What the cloud may say now: (kind, step)."""
        if self.pending:
            return [] if self.pending == "over" else [("closed" if self.pending == "close" else "cancelled", 0)]
        last = 2 * self.own.exchanges
        ways = [("exit", flight.number) for flight in self.flying[:1] if flight.progress == last]
        for place, flight in enumerate(self.flying):
            if flight.progress < last and flight.progress % 2 == 0 and self.may_go(place):
                ways.append(("compressed", flight.number))
        return ways

    @property
    def overflows(self) -> bool:
        """Whether the device has left so much unacknowledged that the cloud may say nothing more."""
        return self.leased and self.sent - self.acknowledged >= MAX_UNRECEIVED_FRAMES

    def said(self, kind: str, step: int) -> None:
        """The cloud has said it."""
        self.sent += 1
        match kind:
            case "compressed":
                self.flight(step).progress += 1
            case "exit":
                self.length = self.flying.pop(0).end
            case "cancelled":
                self.flying.clear()
                self._roll_back(self.positions[self.cancelled])
                self.positions = {number: min(position, self.length) for number, position in self.positions.items()}
                self.pending = ""
            case "closed":
                self.pending = "over"

    # A device that keeps them

    def move(self, choices: Choices, received: int) -> pb.Frame:
        """A frame that is legal now, if any is; received: numbered frames of the cloud's that the device has."""
        which, waiting = choices.byte(), self._waiting()
        end = self.end
        room = min(self.terms.step_tokens, self.terms.context_tokens - end)
        if which >= 248:
            frame = pb.Frame(close=pb.Close()) if which >= 252 else pb.Frame(abort=pb.Abort(code="INTERNAL"))
        elif which >= 232:
            frame = pb.Frame(ping=pb.Ping(id=choices.number(), reply_bytes=2**20 if choices.seldom(64) else choices.byte()))
        elif which >= 208 and self.step and not self.pending:
            frame = pb.Frame(cancel=pb.Cancel(step=self.flying[0].number if self.flying else self.step))
        elif which >= 192 and not self.flying and not self.pending:
            frame = pb.Frame(truncate=pb.Truncate(length=choices.byte() % (self.length + 1)))
        elif waiting and (which < 96 or len(self.flying) == self.terms.window or not room):
            flight = waiting[choices.below(len(waiting))]
            frame = injections(self.own, flight.number, flight.progress // 2, flight.tokens, choices.below(4))
        elif len(self.flying) < self.terms.window and (room > 0 or not self.flying):
            position = end if self.flying or (which < 160 and room > 0) else choices.byte() % (end + 1) % self.terms.context_tokens
            most = min(self.terms.step_tokens, self.terms.context_tokens - position)
            tokens = 1 + choices.byte() % most if choices.below(2) else 1
            frame = entry(self.own, self.step + 1, position, tokens, choices.byte() % (tokens + 1), choices.below(4))
        else:
            frame = pb.Frame(ping=pb.Ping(id=1))
        frame.received = received if self.leased else 0
        return frame

    def _waiting(self) -> list[Flight]:
        """Steps whose injections may be sent now."""
        return [] if self.pending else [flight for place, flight in enumerate(self.flying) if flight.progress % 2 and self.may_go(place)]
