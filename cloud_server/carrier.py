"""One gRPC stream: a connection that carries a session for a while. Sessions outlive it."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from ..protocol.limits import WINDOW
from .access import User
from .allowance import Bucket

INBOX_FRAMES = WINDOW + 4
"""Frames read ahead of the engine: those of a full window, and a cancel and a close behind them. A peer that sends more is not read."""

FRAMES, FRAMES_SECONDS = 4000, 2.0
"""That one connection may send at once, and until it may send as many again: thirty exchanges at 60 tokens/s are 2,000 a second."""


class Gone(Exception):
    """The peer is no longer there."""


class Intake:
    """Bytes of all frames that wait for their sessions. Beyond the budget a connection may have one frame waiting, and is not read until
    it is taken: so every session goes on, and many that send fast take no more memory than this and a frame each. received_bytes,
    sent_bytes: of frames, since the start."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.held_bytes = 0
        self.received_bytes = 0
        self.sent_bytes = 0


class Carrier:
    """inbox: frames that arrived and wait; next_frame: number of the session's next frame to write; due: until when the peer may take to
    greet, or to take what is being written; frames: that it may send."""

    def __init__(self, context: Any, user: User, intake: Intake) -> None:
        self.context = context
        self.user = user
        self.intake = intake
        self.frames = Bucket(FRAMES, FRAMES_SECONDS, time.monotonic())
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self.session: object | None = None
        self.inbox: deque[bytes] = deque()
        self.next_frame = 1
        self.gone = False
        self.due: float | None = None
        self.wake: Callable[[], None] = lambda: None
        self._room = asyncio.Event()
        self._room.set()
        self._void = False
        self._writer: asyncio.Task[Any] | None = None

    async def read(self) -> bytes:
        """The next frame off the wire. Raises Gone."""
        try:
            data = await self.context.read()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise Gone from None
        if not isinstance(data, bytes):
            raise Gone
        self.intake.received_bytes += len(data)
        return data

    async def push(self, data: bytes) -> None:
        """Lets a frame wait for the session; waits itself if too many do, or too much."""
        if self._void:
            return
        self.inbox.append(data)
        self.intake.held_bytes += len(data)
        self.wake()
        while len(self.inbox) >= INBOX_FRAMES or (self.inbox and self.intake.held_bytes > self.intake.budget_bytes):
            self._room.clear()
            await self._room.wait()

    def pop(self) -> bytes:
        self._room.set()
        data = self.inbox.popleft()
        self.intake.held_bytes -= len(data)
        return data

    def discard(self) -> None:
        """What waits is for nobody any more, and neither is what may still come."""
        self._void = True
        while self.inbox:
            self.pop()

    async def breathe(self) -> None:
        """Before the next frame of a peer that sends far more of them than any device would."""
        await self.frames.spend(1)

    async def write(self, data: bytes, seconds: float) -> None:
        """Raises Gone, also if the peer does not take it within `seconds` (Service.watch looks after that: a timer per frame would be
        felt in every exchange)."""
        if self.gone:
            raise Gone
        self.due, self._writer = time.monotonic() + seconds, asyncio.current_task()
        try:
            await self.context.write(data)
            self.intake.sent_bytes += len(data)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise Gone from None
        except asyncio.CancelledError:
            if not self.gone or self._writer is None:
                raise
            if self._writer.uncancel():
                raise  # somebody else stopped us, too
            raise Gone from None  # it was `drop`, and the session goes on
        finally:
            self.due, self._writer = None, None

    def drop(self) -> None:
        """Ends the connection, whatever it is doing. The session is told."""
        self.end()
        if self._writer is not None:
            self._writer.cancel()
        if self.task is not self._writer:
            self.task.cancel()

    def late(self) -> None:
        """`due` is past: whoever greets too late is told so by its handler; whoever takes nothing is dropped."""
        if self._writer is None:
            self.task.cancel()
        else:
            self.drop()

    def end(self) -> None:
        """There is nobody on the other side any more."""
        self.gone = True
        self.wake()
