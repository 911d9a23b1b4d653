"""Frames over gRPC: one bidirectional stream. The only file of the device that knows the carrier."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import grpc
import grpc.aio

from ..artifact.errors import Unreachable
from ..protocol.limits import MAX_FRAME_BYTES, METHOD, SERVICE

PATH = f"/{SERVICE}/{METHOD}"
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Deadlines:
    """connect_seconds: until the channel is up; step_seconds: for the handshake, and for one whole step (a prefill chunk on a
    slow cloud takes seconds); close_seconds: for saying good-bye."""

    connect_seconds: float = 10.0
    step_seconds: float = 120.0
    close_seconds: float = 2.0


class Transport:
    """Sends and receives frame bytes; counts them (`bytes_up`, `bytes_down`, without gRPC's own framing)."""

    def __init__(self, address: str, deadlines: Deadlines) -> None:
        self.address = address
        self.deadlines = deadlines
        self.bytes_up = 0
        self.bytes_down = 0
        self.writing: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Raises Unreachable if nothing answers at the address within connect_seconds."""
        self.channel = grpc.aio.insecure_channel(self.address, OPTIONS)
        try:
            async with asyncio.timeout(self.deadlines.connect_seconds):
                await self._ready()
        except TimeoutError:
            await self.channel.close()
            raise Unreachable(
                f"{self.address}: no answer within {self.deadlines.connect_seconds:g} s; is plora-cloud running there?"
            ) from None
        self.call = self.channel.stream_stream(PATH)()
        self._read_ahead()

    def _read_ahead(self) -> None:
        """Begins to read the next frame before anything is written: a write on a stream that the cloud has ended discards what
        grpc has not read yet, and that is the fault which says why."""
        self.reading = asyncio.ensure_future(self.call.read())

    async def _ready(self) -> None:
        state = self.channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                await self.channel.close()
                raise Unreachable(f"{self.address}: connection refused or name unknown; is plora-cloud running there?")
            await self.channel.wait_for_state_change(state)
            state = self.channel.get_state(try_to_connect=True)

    async def send(self, data: bytes) -> None:
        self.bytes_up += len(data)
        if self.writing is not None and not self.writing.done():  # left behind by a Ctrl-C: grpc takes one write at a time
            await asyncio.wait([self.writing])
        self.writing = asyncio.ensure_future(self._write(data))
        await asyncio.shield(self.writing)  # a write or read that is cancelled ends the whole call

    async def _write(self, data: bytes) -> None:
        try:
            await self.call.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # the cloud may have said why before it closed: the next receive tells

    async def receive(self) -> bytes:
        """The next frame. Raises Unreachable if the stream ended. Whoever calls sets the deadline."""
        try:
            data = await asyncio.shield(self.reading)
        except grpc.aio.AioRpcError as error:
            raise Unreachable(f"{self.address}: connection lost ({error.code().name}: {error.details()})") from None
        if not isinstance(data, bytes):
            raise Unreachable(f"{self.address}: the cloud ended the stream without a word")
        self.bytes_down += len(data)
        self._read_ahead()
        return data

    async def close(self) -> None:
        self.call.cancel()
        await asyncio.wait([self.reading, *([self.writing] if self.writing else [])])
        if not self.reading.cancelled():
            self.reading.exception()  # seen: nothing is left to say
        await self.channel.close()
