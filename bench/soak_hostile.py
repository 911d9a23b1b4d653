"""Who else comes to the cloud of bench/soak.py: peers that lie, stall, flood a little, and vanish, each on a connection of its own.

`python -m bench.soak_hostile '{"address": …}'` (the fields of Hostile) prints one JSON object a line for each until its input ends.
None of them means to bring the cloud down by numbers: so many come a second, and so many at a time at the most.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.device_runtime.transport import PATH
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import MAX_FRAME_BYTES, MAX_PROBE_BYTES, SESSION_BYTES
from plora.protocol.roles import DeviceSession

MOST_AT_A_TIME = 24
HELD_SECONDS = 8.0
"""A peer that says nothing more is there for so long at the most, drawn evenly from 0 on: some leave before the cloud's patience ends,
whose shortest deadlines are shorter."""
BOUND_SECONDS = 40.0
"""For each peer, whatever the cloud does."""
UNREAD_PONGS = 16
"""Of MAX_PROBE_BYTES each, asked for and not read: more than all buffers on the way hold."""
DROPPED = 5
"""Connections that come and go at once."""
STEP_TOKENS = 40
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
UNKNOWN_FIELD = b"\xaa\x06\x05hello"
"""Field 101, five bytes of text."""
HELD = "held"
"""What a peer got that waited for nothing."""
REFUSALS = {"fault FULL", "fault STOPPING"}
"""That any peer may meet when it asks for a session."""


@dataclass(frozen=True)
class Hostile:
    """address: of the cloud itself, host:port; edge: whose contract they know, as anybody with the app does; rate: of peers a second."""

    address: str
    edge: str
    rate: float
    seed: str


class Refused(Exception):
    """The cloud gave no session; how it said so."""


class Peers:
    """Each method is one kind of peer, and returns what it got at last: HELD, "ended", or a frame's kind, a fault with its code."""

    def __init__(self, hostile: Hostile) -> None:
        self.address = hostile.address
        self.contract = read_manifest(EdgeManifest, Path(hostile.edge)).contract
        self.random = random.Random(hostile.seed)

    def machine(self) -> DeviceSession:
        return DeviceSession(self.contract.plan, self.contract.shape, self.contract.hash)

    async def hold(self) -> None:
        await asyncio.sleep(self.random.uniform(0, HELD_SECONDS))

    # Connections

    @asynccontextmanager
    async def socket(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield reader, writer
        finally:
            if self.random.random() < 0.5:  # with RST instead of FIN
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Any]:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        async with grpc.aio.insecure_channel(self.address, options) as channel:
            call = channel.stream_stream(PATH)()
            try:
                yield call
            finally:
                call.cancel()

    async def opened(self, call: Any) -> DeviceSession:
        """A session, honestly begun. Raises Refused."""
        machine = self.machine()
        await call.write(machine.hello())
        frame = await call.read()
        if (got := heard(frame)) != "welcome":
            raise Refused(got)
        machine.receive(frame)
        return machine

    async def answer(self, call: Any, data: bytes) -> str:
        await call.write(data)
        return heard(await call.read())

    def entry(self, machine: DeviceSession, tokens: int = STEP_TOKENS) -> pb.Frame:
        """A legal first one."""
        held = machine.plan.entry_exchange
        injection = None if held is None else np.ones((tokens, held.injection_columns), np.float32)
        hidden = np.ones((tokens, machine.shape.hidden), np.float32)
        return pb.Frame.FromString(machine.entry(hidden, 1, injection))

    # Without our protocol

    async def garbage_on_the_port(self) -> str:
        garbage = (bytes(100), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE + self.random.randbytes(4096), bytes(1 << 16))
        async with self.socket() as (reader, writer):
            writer.write(self.random.choice(garbage))
            with suppress(TimeoutError):
                async with asyncio.timeout(HELD_SECONDS):
                    while await reader.read(1 << 16):
                        pass
        return HELD

    async def half_open(self) -> str:
        """Sends nothing, or just enough to look like one of us."""
        async with self.socket() as (_, writer):
            writer.write(self.random.choice((b"", PREFACE[:10], PREFACE + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))))
            await self.hold()
        return HELD

    async def dropped_at_once(self) -> str:
        for _ in range(DROPPED):
            async with self.socket():
                pass
        async with self.stream() as call:
            await call.write(self.machine().hello())
        return HELD

    # Sessions that lead nowhere

    async def no_hello(self) -> str:
        async with self.stream():
            await self.hold()
        return HELD

    async def hello_and_silence(self) -> str:
        """Gone without a word, as a phone whose battery is empty; its lease runs out."""
        async with self.stream() as call:
            await self.opened(call)
            await self.hold()
        return HELD

    async def hello_and_patience(self) -> str:
        """Until it is sent away, as idle or for others."""
        async with self.stream() as call:
            await self.opened(call)
            return heard(await call.read())

    async def abandoned_step(self) -> str:
        async with self.stream() as call:
            machine = await self.opened(call)
            await call.write(self.entry(machine, STEP_TOKENS).SerializeToString())
            await self.hold()
        return HELD

    async def never_reads(self) -> str:
        async with self.stream() as call:
            machine = await self.opened(call)
            with suppress(TimeoutError):  # our own writes stop once the cloud does not read on
                async with asyncio.timeout(HELD_SECONDS):
                    for number in range(UNREAD_PONGS):
                        await call.write(machine.ping(number, 0, MAX_PROBE_BYTES))
                    await asyncio.sleep(HELD_SECONDS)
        return HELD

    # Lies

    async def garbage_frame(self) -> str:
        machine = self.machine()
        garbage = (b"", self.random.randbytes(500), b"GET / HTTP/1.1\r\n\r\n", machine.hello() + UNKNOWN_FIELD, bytes(MAX_FRAME_BYTES))
        async with self.stream() as call:
            if self.random.random() < 0.5:
                await self.opened(call)
            return await self.answer(call, self.random.choice(garbage))

    async def frame_out_of_turn(self) -> str:
        injections = pb.Frame(injections=pb.Injections(step=1)).SerializeToString()
        cancel = pb.Frame(cancel=pb.Cancel(step=1)).SerializeToString()
        truncate = pb.Frame(truncate=pb.Truncate(length=1)).SerializeToString()
        again = self.machine().hello()
        async with self.stream() as call:
            if self.random.random() < 0.7:
                await self.opened(call)
                return await self.answer(call, self.random.choice((injections, cancel, truncate, again)))
            return await self.answer(call, self.random.choice((injections, pb.Frame(exit=pb.Exit(step=1)).SerializeToString())))

    async def malformed_tensor(self) -> str:
        async with self.stream() as call:
            frame = self.entry(await self.opened(call))
            hidden = frame.entry.hidden
            match self.random.randrange(6):
                case 0:
                    hidden.data = np.full(hidden.rows * hidden.columns, self.random.choice((np.nan, np.inf)), "<f4").tobytes()
                case 1:
                    hidden.rows = 2**32 - 1
                case 2:
                    hidden.columns += 1
                case 3:
                    hidden.data = hidden.data[:-4]
                case 4:
                    hidden.dtype = pb.INT8
                case 5:
                    frame.entry.position = 7
            return await self.answer(call, frame.SerializeToString())

    async def oversized_frame(self) -> str:
        async with self.stream() as call:
            if self.random.random() < 0.5:
                await self.opened(call)
            return await self.answer(call, bytes(MAX_FRAME_BYTES + self.random.randrange(1, 1 << 20)))

    async def forged_session(self) -> str:
        frame = pb.Frame.FromString(self.machine().hello())
        frame.hello.session = os.urandom(SESSION_BYTES)
        async with self.stream() as call:
            return await self.answer(call, frame.SerializeToString())

    async def replayed_session(self) -> str:
        """The id of a session that is over."""
        async with self.stream() as call:
            machine = await self.opened(call)
            again = machine.hello_again()
            await self.answer(call, machine.close())
        async with self.stream() as call:
            return await self.answer(call, again)


ENDS = {"ended"}
KINDS: dict[str, tuple[Callable[[Peers], Awaitable[str]], set[str]]] = {
    "garbage on the port": (Peers.garbage_on_the_port, {HELD}),
    "half-open connection": (Peers.half_open, {HELD}),
    "dropped at once": (Peers.dropped_at_once, {HELD}),
    "no hello": (Peers.no_hello, {HELD}),
    "hello and silence": (Peers.hello_and_silence, {HELD}),
    "hello and patience": (Peers.hello_and_patience, {"fault EXPIRED"}),
    "abandoned step": (Peers.abandoned_step, {HELD}),
    "never reads": (Peers.never_reads, {HELD}),
    "garbage frame": (Peers.garbage_frame, {"fault BAD_FRAME"}),
    "frame out of turn": (Peers.frame_out_of_turn, {"fault BAD_STATE", "fault BAD_STEP"}),
    "malformed tensor": (Peers.malformed_tensor, {"fault BAD_TENSOR", "fault BAD_STEP"}),
    "oversized frame": (Peers.oversized_frame, ENDS),
    "forged session": (Peers.forged_session, {"fault EXPIRED"}),
    "replayed session": (Peers.replayed_session, {"fault EXPIRED"}),
}
"""Each kind with what it may get. Who sees its connection end without a word came in a moment of too much, and that is no harm."""


def heard(data: Any) -> str:
    if not isinstance(data, bytes):
        return "ended"
    frame = pb.Frame.FromString(data)
    kind = frame.WhichOneof("kind") or "nothing"
    return f"fault {pb.FaultCode.Name(frame.fault.code)}" if kind == "fault" else kind


async def visit(peers: Peers, kind: str) -> None:
    """One peer. A surprise is an answer that its kind should never get, such as a welcome to a forged session."""
    come, expected = KINDS[kind]
    try:
        async with asyncio.timeout(BOUND_SECONDS):
            got = await come(peers)
    except Refused as refused:
        got = str(refused)
    except TimeoutError:
        got = "nothing in time"
    except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError, OSError):
        got = "ended"
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        got = "ended"  # it was the call that was cancelled
    print(json.dumps({"kind": kind, "got": got, "surprise": got not in expected | ENDS | REFUSALS}), flush=True)


async def come_and_go(hostile: Hostile) -> None:
    peers = Peers(hostile)
    here: set[asyncio.Task[None]] = set()
    loop = asyncio.get_running_loop()
    end = loop.run_in_executor(None, sys.stdin.read)
    while not end.done():
        await asyncio.wait([end], timeout=peers.random.uniform(0, 2 / hostile.rate))
        if len(here) < MOST_AT_A_TIME and not end.done():
            task = loop.create_task(visit(peers, peers.random.choice(list(KINDS))))
            here.add(task)
            task.add_done_callback(here.discard)
    for task in here:
        task.cancel()
    results = await asyncio.gather(*here, return_exceptions=True)
    for error in results:
        if isinstance(error, Exception):
            raise error


def main() -> None:
    asyncio.run(come_and_go(Hostile(**json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
