"""What the session machine tells whoever drives it: one event per frame received."""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact.plan import Exchange
from .precision import Precision
from .tensors import Floats


@dataclass(frozen=True)
class Terms:
    """What the handshake settles. precision: of the wire's tensors; context_tokens: that the cloud's cache holds; step_tokens:
    most tokens per step; idle_millis: silence after which the session expires; lease_millis: how long it outlives its connection
    (0: not at all, and frames carry no `received`); window: most steps in flight."""

    precision: Precision
    context_tokens: int
    step_tokens: int
    idle_millis: int
    session: bytes = b""
    lease_millis: int = 0
    window: int = 1


@dataclass(frozen=True)
class Greeting:
    """A device asks for a session. session: b"" for a new one, else the one that it wants to go on with, of which it has `received`
    so many numbered frames; resume: it could do so; alone: its steps shall be computed with nobody else's."""

    precision: Precision
    session: bytes
    received: int = 0
    resume: bool = False
    alone: bool = False


@dataclass(frozen=True)
class Opened:
    terms: Terms


@dataclass(frozen=True)
class StepBegun:
    """hidden: [T, hidden] float32; injection: [T, I] or None; position: tokens cached before; exit_rows: wanted back."""

    step: int
    position: int
    exit_rows: int
    hidden: Floats
    injection: Floats | None


@dataclass(frozen=True)
class CompressedArrived:
    step: int
    exchange: Exchange
    values: Floats


@dataclass(frozen=True)
class InjectionsArrived:
    step: int
    exchange: Exchange
    values: Floats


@dataclass(frozen=True)
class StepDone:
    """hidden: [exit_rows, hidden] float32; compute_micros: that the cloud computed, 0 if it does not say."""

    step: int
    hidden: Floats
    compute_micros: int


@dataclass(frozen=True)
class Truncated:
    length: int


@dataclass(frozen=True)
class CancelAsked:
    """The cache shall hold `length` tokens again; steps from `step` on are given up."""

    step: int
    length: int


@dataclass(frozen=True)
class CancelDone:
    length: int


@dataclass(frozen=True)
class CloseAsked:
    pass


@dataclass(frozen=True)
class ClosedDone:
    pass


@dataclass(frozen=True)
class Aborted:
    code: str


@dataclass(frozen=True)
class PingArrived:
    """answer: the frame to send."""

    answer: bytes


@dataclass(frozen=True)
class PongArrived:
    id: int


@dataclass(frozen=True)
class Ignored:
    """A frame that crossed a cancel or a close and is void."""

    kind: str


Event = (
    Greeting
    | Opened
    | StepBegun
    | CompressedArrived
    | InjectionsArrived
    | StepDone
    | Truncated
    | CancelAsked
    | CancelDone
    | CloseAsked
    | ClosedDone
    | Aborted
    | PingArrived
    | PongArrived
    | Ignored
)
