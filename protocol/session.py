"""The session machine: frames in, events out; calls in, frames out. No socket, thread, clock or await (sans-I/O).

Both roles (roles.py) share the table in states.py and the checks here. A device calls hello, entry, injections, …, and feeds what
arrives to `receive`; a cloud the other way round. The bytes of a frame are the carrier's business.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from ..artifact.errors import LocalProtocolError, RemoteProtocolError
from ..artifact.plan import Exchange, ExchangePlan
from ..artifact.shape import DecoderShape
from . import plora_pb2 as pb
from .events import Event, Ignored, Terms
from .limits import MAX_FRAME_BYTES, WINDOW
from .outbox import Outbox
from .states import LIVE, SENDERS, STEP_FRAMES, UNNUMBERED, Role, State, next_state

PING_BEGINS = bytes([pb.Frame.PING_FIELD_NUMBER << 3 | 2])


def is_ping(data: bytes) -> bool:
    """Whether a frame in canonical form is a ping, which may be answered while others wait their turn."""
    return data.startswith(PING_BEGINS)


@dataclass
class Step:
    """A step in flight: tokens `position <= index < position + tokens`; exchange: the next one."""

    number: int
    position: int
    tokens: int
    exit_rows: int
    exchange: int = 0
    state: State = State.COMPUTING

    @property
    def end(self) -> int:
        return self.position + self.tokens

    @property
    def progress(self) -> int:
        """Frames of its exchanges so far, both ways."""
        return 2 * self.exchange + (self.state is State.WAITING)


class Session:
    """What both roles share: the state, the counters, and the checks of a step. Errors leave the state as it was, but for
    `receive`: after a RemoteProtocolError only fault() or abort() make sense.

    length: tokens cached, those of steps in flight not included; step: number of the last step that began; steps: in flight, oldest
    first; outbox: numbered frames that the peer has not said it received, received: numbered frames from the peer.
    """

    def __init__(self, role: Role, plan: ExchangePlan, shape: DecoderShape, contract: str) -> None:
        self.role = role
        self.plan = plan
        self.shape = shape
        self.contract = bytes.fromhex(contract)
        self.terms: Terms | None = None
        self.length = 0
        self.step = 0
        self.steps: list[Step] = []
        self.outbox = Outbox()
        self.received = 0
        self._state = State.START
        self._done: deque[tuple[int, int]] = deque(maxlen=2 * WINDOW)  # (number, position) of steps that a cancel may still name

    @property
    def state(self) -> State:
        """Of the session; while steps are in flight, of the oldest."""
        return self.steps[0].state if self._state is State.READY and self.steps else self._state

    @property
    def live(self) -> bool:
        """Whether the session is open, and may be taken up on another connection."""
        return self.terms is not None and self.state in LIVE

    @property
    def running(self) -> Step:
        """The oldest step in flight; with none, one of no tokens."""
        return self.steps[0] if self.steps else Step(self.step, self.length, 0, 0)

    @property
    def end(self) -> int:
        """Tokens cached once all steps in flight are done."""
        return self.steps[-1].end if self.steps else self.length

    # Sending

    def _send(self, frame: pb.Frame, step: Step | None = None) -> bytes:
        """The bytes of a frame of the session, its state moved on. step: that it names."""
        kind = frame.WhichOneof("kind")
        after = self._require(kind, step)
        if self.terms is not None and self.terms.lease_millis:
            frame.received = self.received
        data = frame.SerializeToString()
        if len(data) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"{kind}: {len(data)} bytes, the limit is {MAX_FRAME_BYTES}; send fewer tokens per step")
        if kind not in UNNUMBERED:  # a close may come before the terms, and be needed under them
            self.outbox.add(data if self.terms is None or self.terms.lease_millis else None)
        self._move(kind, step, after)
        return data

    def _require(self, kind: str, step: Step | None = None) -> State:
        if SENDERS[kind] is not self.role:
            raise LocalProtocolError(f"a {self.role} does not send {kind}")
        after = next_state(self._state_for(kind, step), kind)
        if after is None:
            raise LocalProtocolError(f"{kind} is not legal in state {self._state_for(kind, step)}")
        return after

    def _state_for(self, kind: str, step: Step | None) -> State:
        """The state that decides whether a frame is legal."""
        return step.state if step is not None and kind in STEP_FRAMES and self._state is State.READY else self.state

    def _move(self, kind: str, step: Step | None, after: State) -> None:
        if step is not None and kind in ("compressed", "injections"):  # a step that a cancel crosses goes on, too
            step.state = State.WAITING if kind == "compressed" else State.COMPUTING
        if self._state is not State.READY or not self.steps:
            if kind != "entry":  # `_begin` says what an entry does
                self._state = after
        elif kind in ("cancel", "close", "fault", "abort"):
            self._state = after

    # Receiving

    def receive(self, data: bytes) -> Event:
        """One frame's bytes -> one event. Raises RemoteProtocolError with the fault code that fits; a device raises the
        error of a cloud's fault (protocol/faults.py)."""
        frame = self._parse(data)
        kind = frame.WhichOneof("kind")
        if kind is None:
            raise RemoteProtocolError("a frame without a kind", "BAD_FRAME")
        if SENDERS[kind] is self.role:
            raise RemoteProtocolError(f"{kind} is not for a {self.role} to receive", "BAD_STATE")
        message = getattr(frame, kind)
        step = self._named(message.step) if kind in STEP_FRAMES else None
        state = self._state_for(kind, step)
        after = next_state(state, kind)
        if after is None:
            raise RemoteProtocolError(f"{kind} is not legal in state {state}", "BAD_STATE")
        self._check_received(frame)
        void = after is state and kind in ("compressed", "exit", "cancelled")
        event = Ignored(kind) if void else getattr(self, f"_on_{kind}")(message)
        self._move(kind, step, after)
        if kind not in UNNUMBERED:
            self.received += 1
        self.outbox.received(frame.received)
        return event

    def _check_received(self, frame: pb.Frame) -> None:
        most = self.outbox.sent if self.terms is not None and self.terms.lease_millis else 0
        if frame.received > most:
            raise RemoteProtocolError(f"a peer that received {frame.received} numbered frames of {most}", "BAD_FRAME")

    def _parse(self, data: bytes) -> pb.Frame:
        if len(data) > MAX_FRAME_BYTES:
            raise RemoteProtocolError(f"a frame of {len(data)} bytes, the limit is {MAX_FRAME_BYTES}", "BAD_FRAME")
        try:
            frame = pb.Frame.FromString(data)
        except DecodeError:
            raise RemoteProtocolError(f"{len(data)} bytes that are not a frame", "BAD_FRAME") from None
        # Unknown fields, overlong numbers and fields said twice would be places for text, so only the canonical form will do.
        # Equal sizes are not enough: an enum of -1 may come in 5 bytes and go in 10, which leaves room for a field of 5.
        frame.DiscardUnknownFields()
        if frame.SerializeToString(deterministic=True) != data:
            raise RemoteProtocolError(
                f"a frame of {len(data)} bytes that is not the canonical form of what it says ({frame.ByteSize()} bytes)", "BAD_FRAME"
            )
        return frame

    # Steps, seen from either side

    def _named(self, number: int) -> Step | None:
        """The step in flight of that number, else the oldest."""
        return next((step for step in self.steps if step.number == number), self.steps[0] if self.steps else None)

    def _expected_step(self, number: int, what: str, among: list[Step] | None = None) -> Step:
        """The step in flight that a peer's frame names. Raises RemoteProtocolError."""
        for step in self.steps if among is None else among:
            if step.number == number:
                return step
        raise RemoteProtocolError(f"{what} of step {number}, expected {self.steps[0].number}", "BAD_STEP")

    def _running(self, number: int | None, what: str) -> Step:
        """The step in flight that a call of ours names; None for the oldest."""
        for step in self.steps:
            if number in (None, step.number):
                return step
        if not self.steps:
            self._require(what)
        raise LocalProtocolError(f"{what} of step {number or self.step}, which is not in flight")

    def _begin(self, number: int, position: int, tokens: int, exit_rows: int) -> None:
        if not self.steps:
            self._roll_back(position)
        self.step = number
        self.steps.append(Step(number, position, tokens, exit_rows))

    def _finish(self) -> None:
        step = self.steps.pop(0)
        self.length = step.end
        self._done.append((step.number, step.position))

    def _roll_back(self, length: int) -> None:
        self.length = length
        # A later cancel must not bring tokens back.
        self._done = deque(((number, min(position, length)) for number, position in self._done), self._done.maxlen)

    def _before(self, number: int) -> int | None:
        """Tokens that the cache holds once step `number` and all after it are given up; None for a step long done or never begun, and for
        one behind another in flight: what that one cached would be counted, and is not there."""
        own = [(step.number, step.position) for step in self.steps[:1]]
        return dict((*self._done, *own)).get(number)

    def _give_up(self, number: int, length: int) -> None:
        """Steps from `number` on are as if they had not begun."""
        self.steps.clear()
        self._roll_back(length)
        self._done.append((number, length))
        self._done = deque((pair for pair in self._done if pair[0] <= number), self._done.maxlen)
        self._done.append((self.step, length))

    def _check_entry(self, position: int, tokens: int, exit_rows: int, error: type[Exception]) -> None:
        terms = self._terms()
        if len(self.steps) >= terms.window:
            raise wrong(error, f"an entry while {len(self.steps)} steps are in flight, the most are {terms.window}", "BAD_STEP")
        if not 0 <= position <= self.end or (self.steps and position != self.end):
            what = f"{self.end} tokens are in flight or cached" if self.steps else f"{self.length} tokens are cached"
            raise wrong(error, f"entry at position {position}, but {what}", "BAD_STEP")
        if not 1 <= tokens <= terms.step_tokens:
            raise wrong(error, f"entry of {tokens} tokens, expected 1..{terms.step_tokens}", "BAD_STEP")
        if position + tokens > terms.context_tokens:
            raise wrong(error, f"{position} + {tokens} tokens pass the session's context of {terms.context_tokens}", "CONTEXT_FULL")
        if not 0 <= exit_rows <= tokens:
            raise wrong(error, f"exit of {exit_rows} rows wanted from a step of {tokens} tokens", "BAD_STEP")

    def _check_exchange(self, step: Step, index: int, error: type[Exception]) -> Exchange:
        """The exchange `index` if it is the step's next, and the step before is not overtaken by it."""
        if index != step.exchange or index >= len(self.plan.exchanges):
            raise wrong(error, f"exchange {index}, expected {step.exchange} of {len(self.plan.exchanges)}", "BAD_STEP")
        place = self.steps.index(step)
        if place and step.progress >= self.steps[place - 1].progress:
            raise wrong(error, f"exchange {index} of step {step.number} overtakes step {step.number - 1}", "BAD_STEP")
        return self.plan.exchanges[index]

    def _check_exit(self, step: Step, error: type[Exception]) -> None:
        if step.exchange != len(self.plan.exchanges):
            raise wrong(error, f"exit after {step.exchange} of {len(self.plan.exchanges)} exchanges", "BAD_STEP")

    def _terms(self) -> Terms:
        if self.terms is None:
            raise LocalProtocolError("the handshake is not done")
        return self.terms


def wrong(error: type[Exception], message: str, code: str) -> Exception:
    return RemoteProtocolError(message, code) if error is RemoteProtocolError else LocalProtocolError(message)
