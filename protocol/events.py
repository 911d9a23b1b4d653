"""What the session machine tells whoever drives it: one event per frame received."""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact.plan import Exchange
from .tensors import Floats


@dataclass(frozen=True)
class Terms:
    """What the handshake settles. dtype: of all wire tensors; context_tokens: that the cloud's cache holds; step_tokens:
    most tokens per step; idle_millis: silence after which the session expires."""

    dtype: str
    context_tokens: int
    step_tokens: int
    idle_millis: int
    session: bytes = b""


@dataclass(frozen=True)
class Greeting:
    """A device asks for a session. session: b"" for a new one."""

    dtype: str
    session: bytes


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
    exchange: Exchange
    values: Floats


@dataclass(frozen=True)
class InjectionsArrived:
    exchange: Exchange
    values: Floats


@dataclass(frozen=True)
class StepDone:
    """hidden: [exit_rows, hidden] float32."""

    hidden: Floats


@dataclass(frozen=True)
class Truncated:
    length: int


@dataclass(frozen=True)
class CancelAsked:
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
    | Ignored
)
