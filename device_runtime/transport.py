"""Frames over gRPC: one bidirectional stream. The only file of the device that knows the carrier."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import grpc
import grpc.aio

from ..artifact.errors import AccessDenied, PloraError, Unreachable, Untrusted, printable
from ..protocol.limits import MAX_FRAME_BYTES, MAX_UNRECEIVED_FRAMES, METHOD, SERVICE
from .access import Access, why_untrusted

PATH = f"/{SERVICE}/{METHOD}"
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Deadlines:
    """connect_seconds: until the channel is up, the first time; step_seconds: for the handshake, and between two signs of progress after
    it: a frame of ours that found its way, an answer to one (a chunk of a prompt takes seconds on a slow cloud or uplink), not for the
    prompt as a whole; close_seconds: for saying good-bye; give_up_seconds: to try for a link that broke."""

    connect_seconds: float = 10.0
    step_seconds: float = 120.0
    close_seconds: float = 2.0
    give_up_seconds: float = 60.0


READ_AHEAD_FRAMES = MAX_UNRECEIVED_FRAMES + 4
"""Frames held for whoever receives: all that a cloud may have on its way, and a few pongs. One that says more is not read meanwhile."""
REFUSAL_SECONDS = 2.0
"""For the cloud to refuse a call: it does so at once, or not at all."""


class Ended(NamedTuple):
    """How a call ended: gRPC's status, None if it did not."""

    code: grpc.StatusCode | None
    details: str | None


class Interrupted(Exception):
    """Somebody pressed Ctrl-C while we waited for a frame."""


class Transport:
    """One connection: sends and receives frame bytes. heard_at: when the last one came, by time.monotonic.

    One task reads all the time, READ_AHEAD_FRAMES ahead: a write on a stream that the cloud has ended would discard what grpc has not
    read yet, and that is the fault which says why. And a read that is cancelled ends the whole call, so whoever waits is woken instead.
    """

    def __init__(self, address: str, deadlines: Deadlines, access: Access = Access()) -> None:  # noqa: B008  frozen
        self.address = address
        self.deadlines = deadlines
        self.access = access
        self.heard_at = time.monotonic()
        self.frames: deque[bytes] = deque()
        self.ended: PloraError | None = None
        self.interrupted = False
        self.waiter: asyncio.Future[None] | None = None
        self.reader: asyncio.Task[None] | None = None
        self.sending = asyncio.Lock()
        self.room = asyncio.Event()
        self.channel: grpc.aio.Channel | None = None
        self.call: grpc.aio.StreamStreamCall | None = None

    async def connect(self, seconds: float | None = None) -> None:
        """Raises Unreachable if nothing answers at the address within `seconds`, or connect_seconds; Untrusted if it is not our cloud."""
        seconds = self.deadlines.connect_seconds if seconds is None else seconds
        try:
            async with asyncio.timeout(seconds):
                self.channel = await self.access.channel(self.address, OPTIONS)
                await self._ready()
        except TimeoutError:
            raise Unreachable(f"{self.address}: no answer within {seconds:g} s; is plora-cloud running there?") from None
        self.call = self.channel.stream_stream(PATH)(metadata=self.access.metadata)
        self.reader = asyncio.create_task(self._read())

    async def _ready(self) -> None:
        assert self.channel is not None  # connect made it
        state = self.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                if self.access.secures(self.address) and (why := why_untrusted((await self._refusal()).details or "")) is not None:
                    raise Untrusted(f"{self.address}: {why}")
                raise Unreachable(f"{self.address}: connection refused or name unknown; is plora-cloud running there?{self._hint}")
            await self.channel.wait_for_state_change(state)
            state = self.channel.get_state(try_to_connect=True)

    @property
    def _hint(self) -> str:
        """What else may be the reason for a connection that says nothing."""
        if not self.access.secures(self.address):
            return " If it has TLS, --ca or --pin says how to know it."
        return "" if self.access.client_cert else " It may want a certificate of yours (--client-cert)."

    async def _refusal(self) -> Ended:
        """What the cloud, or the way to it, says to a call that says nothing: only a call is told why a channel failed, and one that has
        written is not told at all if the cloud ended it before (grpc/grpc issue 36066)."""
        assert self.channel is not None  # connect made it
        call = self.channel.stream_stream(PATH)(metadata=self.access.metadata, timeout=REFUSAL_SECONDS)
        try:
            await call.read()
        except grpc.aio.AioRpcError as error:
            return Ended(error.code(), error.details())
        finally:
            call.cancel()
        return Ended(None, None)

    async def _read(self) -> None:
        assert self.call is not None  # connect made it
        try:
            while isinstance(data := await self.call.read(), bytes):
                self.frames.append(data)
                self.heard_at = time.monotonic()
                self._wake()
                if len(self.frames) >= READ_AHEAD_FRAMES and self.ended is None:
                    self.room.clear()
                    await self.room.wait()
            self.fail("the cloud ended the stream without a word")
        except grpc.aio.AioRpcError as error:
            status = Ended(error.code(), error.details())
            if status.code is grpc.StatusCode.INTERNAL and (known := await self._refusal()).code is grpc.StatusCode.UNAUTHENTICATED:
                status = known
            if status.code is grpc.StatusCode.UNAUTHENTICATED:
                self.ended = AccessDenied(f"{self.address}: {printable(status.details or '')}; give one with --token-file or PLORA_TOKEN")
            self.fail(f"connection lost ({error.code().name}: {printable(error.details() or '')}){self._hint}")
        except asyncio.CancelledError:  # so grpc tells of a call that we have ended ourselves
            self.fail("the connection was closed")

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def interrupt(self) -> None:
        """Makes `receive` raise Interrupted, now or when it is next called."""
        self.interrupted = True
        self._wake()

    def fail(self, why: str) -> None:
        """The connection is over: whoever waits to send or to receive learns it."""
        self.ended = self.ended or Unreachable(f"{self.address}: {why}")
        if self.call is not None:
            self.call.cancel()
        self.room.set()  # the reader learns it, too
        self._wake()

    async def send(self, data: bytes) -> None:
        """Without effect on a connection that has ended. Waits for as long as the way is blocked; whoever is cancelled meanwhile ends the
        connection, since its frame is missing on it."""
        try:
            async with self.sending:  # grpc ends a call in which two write at a time
                if self.ended is None and self.call is not None:
                    await self.call.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the cloud may have said why before it closed: the next receive tells
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                self.fail("a frame was not sent")
                raise
            # else it was the call that was cancelled

    async def receive(self) -> bytes:
        """The next frame. Raises Interrupted, or Unreachable if the stream ended. Whoever calls sets the deadline."""
        while not self.interrupted:
            if self.frames:
                self.room.set()
                return self.frames.popleft()
            if self.ended is not None:
                raise self.ended
            self.waiter = asyncio.get_running_loop().create_future()
            await self.waiter
        self.interrupted = False
        raise Interrupted

    async def close(self) -> None:
        """Safe to call in any state, and twice."""
        if self.reader is not None:
            self.fail("the connection was closed")
            await asyncio.wait([self.reader])
        if self.channel is not None:
            await self.channel.close()
        self.call = None  # while there is one, the socket stays open, whatever the channel was told
