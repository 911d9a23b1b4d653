"""What may be sent when: one table, (state, frame) -> state, for both roles. docs/protocol.md draws it from here.

The sender of each kind of frame is fixed, so the table needs no direction: a machine may send a frame if it plays that
frame's sender and the table has an entry for the state; what it receives is checked against the same entry.
"""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    DEVICE = "device"
    CLOUD = "cloud"


class State(StrEnum):
    START = "start"  # nothing was said
    GREETED = "greeted"  # the device said hello
    READY = "ready"  # the session is open, no step runs
    COMPUTING = "computing"  # a step runs, the cloud's turn; of several, the oldest
    WAITING = "waiting"  # a step runs, the cloud waits for injections
    CANCELLING = "cancelling"  # the device gave a step up, the cloud has not said so yet
    CLOSING = "closing"  # the device said close
    OVER = "over"  # closed, or faulted


SENDERS: dict[str, Role] = {
    "hello": Role.DEVICE,
    "welcome": Role.CLOUD,
    "entry": Role.DEVICE,
    "compressed": Role.CLOUD,
    "injections": Role.DEVICE,
    "exit": Role.CLOUD,
    "truncate": Role.DEVICE,
    "cancel": Role.DEVICE,
    "cancelled": Role.CLOUD,
    "close": Role.DEVICE,
    "closed": Role.CLOUD,
    "fault": Role.CLOUD,
    "abort": Role.DEVICE,
    "ping": Role.DEVICE,
    "pong": Role.CLOUD,
}

STEP_FRAMES = frozenset({"compressed", "injections", "exit"})
"""Frames that name a step: the state that counts is that step's."""
UNNUMBERED = frozenset({"hello", "welcome", "ping", "pong", "fault", "abort"})
"""Frames that belong to a connection. All others belong to the session, are numbered, and are sent again on its next connection."""

S = State
LIVE = (S.READY, S.COMPUTING, S.WAITING, S.CANCELLING, S.CLOSING)
"""A session is open, and may be taken up on another connection: that greeting is no frame of the session (roles.py)."""
TRANSITIONS: dict[tuple[State, str], State] = {
    (S.START, "hello"): S.GREETED,
    (S.GREETED, "welcome"): S.READY,
    (S.READY, "entry"): S.COMPUTING,
    (S.COMPUTING, "compressed"): S.WAITING,
    (S.WAITING, "injections"): S.COMPUTING,
    (S.COMPUTING, "exit"): S.READY,
    (S.READY, "truncate"): S.READY,
    # Further steps may begin behind the running one, up to the window; each then has a state of its own, and none overtakes another.
    (S.COMPUTING, "entry"): S.COMPUTING,
    (S.WAITING, "entry"): S.WAITING,
    # A cancel crosses what the cloud sent before it arrived: on the device those frames come while it is cancelling,
    # on the cloud the cancel comes one state later than it was sent.
    (S.READY, "cancel"): S.CANCELLING,
    (S.COMPUTING, "cancel"): S.CANCELLING,
    (S.WAITING, "cancel"): S.CANCELLING,
    (S.CANCELLING, "compressed"): S.CANCELLING,
    (S.CANCELLING, "exit"): S.CANCELLING,
    (S.CANCELLING, "cancelled"): S.READY,
    # A close crosses them too; the device takes no notice of what still comes.
    (S.GREETED, "close"): S.CLOSING,
    (S.READY, "close"): S.CLOSING,
    (S.COMPUTING, "close"): S.CLOSING,
    (S.WAITING, "close"): S.CLOSING,
    (S.CANCELLING, "close"): S.CLOSING,
    (S.CLOSING, "welcome"): S.CLOSING,
    (S.CLOSING, "compressed"): S.CLOSING,
    (S.CLOSING, "exit"): S.CLOSING,
    (S.CLOSING, "cancelled"): S.CLOSING,
    (S.CLOSING, "closed"): S.OVER,
    # Is anybody there? Without effect.
    **{(state, kind): state for state in LIVE for kind in ("ping", "pong")},
    # Either side may end it at any time.
    **{(state, "fault"): S.OVER for state in State if state is not S.OVER},
    **{(state, "abort"): S.OVER for state in State if state is not S.OVER},
}


def next_state(state: State, kind: str) -> State | None:
    """The state after a frame of `kind`, or None if it is not legal now."""
    return TRANSITIONS.get((state, kind))


def mermaid() -> str:
    """The table as a Mermaid state diagram; an arrow says who sends what. Faults and aborts, legal anywhere, and pings and pongs, legal
    in an open session and without effect, are left out."""
    lines = ["stateDiagram-v2", "    [*] --> start"]
    for (state, kind), after in TRANSITIONS.items():
        if kind not in ("fault", "abort", "ping", "pong"):
            lines.append(f"    {state} --> {after}: {SENDERS[kind]} {kind}")
    return "\n".join([*lines, "    over --> [*]"])
