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

INBOX_FRAMES = WINDOW + 4
"""Frames read ahead of the engine: those of a full window, and a cancel and a close behind them. A peer that sends more is not read."""


class Gone(Exception):
    """The peer is no longer there."""


def user_of(context: Any) -> str:
    """Whom a connection's quota counts for: the host that it comes from, for as long as devices have no names of their own."""
    peer: str = context.peer() if hasattr(context, "peer") else ""
    return peer.rpartition(":")[0]


class Carrier:
    """user: see user_of; inbox: frames that arrived and wait; next_frame: number of the session's next frame to write; due: until when
    the peer may take to greet, or to take what is being written."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.user = user_of(context)
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self.inbox: deque[bytes] = deque()
        self.next_frame = 1
        self.gone = False
        self.due: float | None = None
        self.wake: Callable[[], None] = lambda: None
        self._room = asyncio.Event()
        self._room.set()
        self._writer: asyncio.Task[Any] | None = None

    async def read(self) -> bytes:
        """The next frame off the wire. Raises Gone."""
        try:
            data = await self.context.read()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise Gone from None
        if not isinstance(data, bytes):
            raise Gone
        return data

    async def push(self, data: bytes) -> None:
        """Lets a frame wait for the session; waits itself if too many do."""
        self.inbox.append(data)
        self.wake()
        if len(self.inbox) >= INBOX_FRAMES:
            self._room.clear()
            await self._room.wait()

    def pop(self) -> bytes:
        self._room.set()
        return self.inbox.popleft()

    async def write(self, data: bytes, seconds: float) -> None:
        """Raises Gone, also if the peer does not take it within `seconds` (Service.watch looks after that: a timer per frame would be
        felt in every exchange)."""
        if self.gone:
            raise Gone
        self.due, self._writer = time.monotonic() + seconds, asyncio.current_task()
        try:
            await self.context.write(data)
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
