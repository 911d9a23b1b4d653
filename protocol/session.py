"""The session machine: frames in, events out; calls in, frames out. No socket, thread, clock or await (sans-I/O).

Both roles (roles.py) share the table in states.py and the checks here. A device calls hello, entry, injections, …, and feeds what
arrives to `receive`; a cloud the other way round. The bytes of a frame are the carrier's business.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError

from ..artifact.errors import LocalProtocolError, RemoteProtocolError
from ..artifact.plan import Exchange, ExchangePlan
from ..artifact.shape import DecoderShape
from . import plora_pb2 as pb
from .events import Event, Ignored, Terms
from .limits import MAX_FRAME_BYTES
from .states import SENDERS, Role, State, next_state


class Session:
    """What both roles share: the state, the counters, and the checks of a step. Errors leave the state as it was, but for
    `receive`: after a RemoteProtocolError only fault() or abort() make sense."""

    def __init__(self, role: Role, plan: ExchangePlan, shape: DecoderShape, contract: str) -> None:
        self.role = role
        self.plan = plan
        self.shape = shape
        self.contract = bytes.fromhex(contract)
        self.state = State.START
        self.terms: Terms | None = None
        self.length = 0  # tokens cached, this step's not included
        self.step = 0
        self.tokens = 0  # of the step that runs
        self.exit_rows = 0
        self.exchange = 0  # the next one of the step that runs
        self.before_step = 0

    # Sending

    def _send(self, frame: pb.Frame) -> bytes:
        kind = frame.WhichOneof("kind")
        self._require(kind)
        data = frame.SerializeToString()
        if len(data) > MAX_FRAME_BYTES:
            raise LocalProtocolError(f"{kind}: {len(data)} bytes, the limit is {MAX_FRAME_BYTES}; send fewer tokens per step")
        after = next_state(self.state, kind)
        assert after is not None  # _require checked it
        self.state = after
        return data

    def _require(self, kind: str) -> None:
        if SENDERS[kind] is not self.role:
            raise LocalProtocolError(f"a {self.role} does not send {kind}")
        if next_state(self.state, kind) is None:
            raise LocalProtocolError(f"{kind} is not legal in state {self.state}")

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
        after = next_state(self.state, kind)
        if after is None:
            raise RemoteProtocolError(f"{kind} is not legal in state {self.state}", "BAD_STATE")
        void = kind in ("compressed", "exit", "cancelled", "welcome") and after is self.state
        event = Ignored(kind) if void else getattr(self, f"_on_{kind}")(getattr(frame, kind))
        self.state = after
        return event

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

    # A step, seen from either side

    def _begin(self, step: int, tokens: int, exit_rows: int) -> None:
        self.step = step
        self.tokens = tokens
        self.exit_rows = exit_rows
        self.exchange = 0
        self.before_step = self.length

    def _finish(self) -> None:
        self.length += self.tokens

    def _truncate(self, length: int) -> None:
        self.length = length
        self.before_step = min(self.before_step, length)  # a later cancel must not bring tokens back

    def _check_entry(self, position: int, tokens: int, exit_rows: int, error: type[Exception]) -> None:
        terms = self._terms()
        if position != self.length:
            raise wrong(error, f"entry at position {position}, but {self.length} tokens are cached", "BAD_STEP")
        if not 1 <= tokens <= terms.step_tokens:
            raise wrong(error, f"entry of {tokens} tokens, expected 1..{terms.step_tokens}", "BAD_STEP")
        if position + tokens > terms.context_tokens:
            raise wrong(error, f"{position} + {tokens} tokens pass the session's context of {terms.context_tokens}", "CONTEXT_FULL")
        if not 0 <= exit_rows <= tokens:
            raise wrong(error, f"exit of {exit_rows} rows wanted from a step of {tokens} tokens", "BAD_STEP")

    def _expected_exchange(self, index: int, error: type[Exception]) -> Exchange:
        if index != self.exchange or index >= len(self.plan.exchanges):
            raise wrong(error, f"exchange {index}, expected {self.exchange} of {len(self.plan.exchanges)}", "BAD_STEP")
        return self.plan.exchanges[index]

    def _terms(self) -> Terms:
        if self.terms is None:
            raise LocalProtocolError("the handshake is not done")
        return self.terms

    def _where(self, what: str) -> str:
        return f"step {self.step}, {what}"


def wrong(error: type[Exception], message: str, code: str) -> Exception:
    return RemoteProtocolError(message, code) if error is RemoteProtocolError else LocalProtocolError(message)
