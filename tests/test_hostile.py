"""Peers that mean no good, over the wire and one level above it: what they send is bounded, and the others keep their tokens."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest

from plora.artifact.errors import ServerFull
from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.cloud_server.access import User
from plora.cloud_server.carrier import FRAMES, INBOX_FRAMES, Carrier, Intake
from plora.device_runtime import open_session
from plora.device_runtime.transport import PATH
from plora.models.checkpoint import Base
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import MAX_PROBE_BYTES
from plora.protocol.roles import DeviceSession

from .conftest import Made, answer, cloud, greedy
from .test_operations import figures, with_ops

IDS = [5, 6, 7]
BOUND_SECONDS = 30
ATTEMPTS = 3000
PEERS = 150
MEBIBYTE = 1 << 20


def machine_of(made: Made) -> DeviceSession:
    contract = read_manifest(EdgeManifest, made.out / "edge").contract
    return DeviceSession(contract.plan, contract.shape, contract.hash)


# What waits


def carriers(budget_bytes: int, count: int) -> list[Carrier]:
    intake = Intake(budget_bytes)
    return [Carrier(None, User("host:"), intake) for _ in range(count)]


async def blocks(push: Any) -> asyncio.Task[None]:
    """A push that has not ended once everything else has happened."""
    task = asyncio.ensure_future(push)
    for _ in range(5):
        await asyncio.sleep(0)
    assert not task.done()
    return task


def test_frames_that_wait_are_bounded_in_number_and_in_bytes() -> None:
    async def script() -> None:
        one, two = carriers(100, 2)
        for _ in range(INBOX_FRAMES - 1):
            await one.push(bytes(10))
        full = await blocks(one.push(bytes(10)))  # it is one too many, whatever its size
        one.pop()
        await full
        assert one.intake.held_bytes == 10 * (INBOX_FRAMES - 1)
        greedy_peer = await blocks(two.push(bytes(90)))  # over the budget: its one frame waits, and it is not read
        assert one.intake.held_bytes == 160
        assert len(two.pop()) == 90  # every session has its next frame, whatever others send
        await greedy_peer
        two.discard()
        one.discard()
        assert one.intake.held_bytes == 0
        await one.push(bytes(1000))  # for nobody
        assert (one.intake.held_bytes, len(one.inbox)) == (0, 0)

    asyncio.run(script())


def test_far_more_frames_than_any_device_sends_are_slowed_down() -> None:
    async def script() -> None:
        (one,) = carriers(0, 1)
        for _ in range(FRAMES):
            await one.breathe()  # at once
        one.frames.take(FRAMES, time.monotonic())
        assert (await blocks(one.breathe())).cancel()

    asyncio.run(script())


# Over the wire


def wait_until(true: Callable[[], bool], failure: str) -> None:
    """Asks ATTEMPTS times."""
    if not any(true() for _ in range(ATTEMPTS)):
        pytest.fail(failure)


def rss(pid: int) -> int:
    return psutil.Process(pid).memory_info().rss


def test_a_flood_that_never_greets_takes_little_and_disturbs_nobody(made: Made, merged: Base) -> None:
    """Bare TCP connections, HTTP/2 without calls, and calls without a hello, while a session talks on."""
    wanted = greedy(merged, IDS, 40)
    with with_ops(made) as (address, ops, process), open_session(made.out / "edge", address) as session:
        host, port = address.split(":")
        answer(session, IDS, 40)
        before = rss(process.pid)

        async def flood() -> None:
            channels = [grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(PEERS)]
            calls = [channel.stream_stream(PATH)() for channel in channels]
            for call in calls:
                await call.wait_for_connection()
            wait_until(lambda: figures(ops)["plora_connections"] > PEERS, "they did not get in")
            assert await asyncio.to_thread(answer, session, IDS, 40) == wanted
            for call in calls:
                call.cancel()
            for channel in channels:
                await channel.close()

        with ExitStack() as stack:
            for number in range(PEERS):
                peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=BOUND_SECONDS))
                if number % 2:
                    peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            asyncio.run(flood())
            assert rss(process.pid) - before < 2 * PEERS * 128 * 1024
        assert answer(session, IDS, 40) == wanted
        wait_until(lambda: figures(ops)["plora_connections"] == 1, "connections of peers that left are still counted")


def test_no_more_connections_than_allowed(made: Made) -> None:
    edge = made.out / "edge"
    with cloud(made.out / "cloud", "--connections", "3") as (address, _), ExitStack() as stack:
        sessions = [stack.enter_context(open_session(edge, address)) for _ in range(3)]
        with pytest.raises(ServerFull, match="3 connections are open, the most that are served") as caught:
            open_session(edge, address)
        assert caught.value.retry_after_millis > 0
        first = answer(sessions[0], IDS, 4)
        sessions.pop().close()
        for _ in range(ATTEMPTS):
            try:
                with open_session(edge, address) as again:
                    assert answer(again, IDS, 4) == first
                    break
            except ServerFull:
                pass
        else:
            pytest.fail("nobody is let in any more")


def test_a_message_that_unpacks_to_a_gigabyte_is_never_unpacked(made: Made, merged: Base) -> None:
    with cloud(made.out / "cloud") as (address, process), open_session(made.out / "edge", address) as session:
        answer(session, IDS, 8)
        before = rss(process.pid)
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), timeout=BOUND_SECONDS) as peer:
            bomb = packed(1024 * MEBIBYTE)
            assert len(bomb) < 2 * MEBIBYTE
            try:
                peer.sendall(bomb_frames(bomb))
                while peer.recv(65536):
                    pass
            except OSError:
                pass  # hung up
        assert rss(process.pid) - before < 64 * MEBIBYTE
        assert answer(session, IDS, 8) == greedy(merged, IDS, 8)


def packed(size: int) -> bytes:
    """That many zeros in gzip form."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(MEBIBYTE)) for _ in range(size // MEBIBYTE)) + packer.flush()


def bomb_frames(message: bytes) -> bytes:
    """HTTP/2: a call of our method with one compressed gRPC message, as much of it as the first window takes, by hand: the client
    library would have to hold what it packs."""

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body

    def field(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    headers = b"".join(
        field(name, value)
        for name, value in (
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", PATH.encode()),
            (b":authority", b"x"),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"grpc-encoding", b"gzip"),
        )
    )
    data = (b"\1" + struct.pack(">I", len(message)) + message)[:65535]
    body = b"".join(frame(0, 0, 1, data[at : at + 16384]) for at in range(0, len(data), 16384))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers) + body


def test_a_small_bomb_is_refused_by_name(made: Made) -> None:
    """The same through the client library, at a size that it can hold."""

    async def script(address: str) -> grpc.aio.AioRpcError:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options, compression=grpc.Compression.Gzip) as channel:
            call = channel.stream_stream(PATH)(timeout=BOUND_SECONDS)
            await call.write(bytes(64 * MEBIBYTE))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            return caught.value

    with cloud(made.out / "cloud") as (address, process):
        before = rss(process.pid)
        assert asyncio.run(script(address)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert rss(process.pid) - before < 32 * MEBIBYTE


def test_a_peer_that_asks_for_megabytes_and_reads_none(made: Made, merged: Base) -> None:
    """Neither what it asks for nor what it sends piles up, and its room is free once it has gone."""
    with with_ops(made, "--lease-seconds", "0") as (address, ops, process), open_session(made.out / "edge", address) as session:
        wanted = answer(session, IDS, 12)
        before = rss(process.pid)

        async def never_read() -> None:
            machine = machine_of(made)
            async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                call = channel.stream_stream(PATH)()
                await call.write(machine.hello())
                machine.receive(await call.read())
                sent = 0
                try:
                    async with asyncio.timeout(5):
                        for number in range(500):
                            await call.write(machine.ping(number, 0, MAX_PROBE_BYTES))
                            sent += 1
                except TimeoutError:
                    pass
                assert sent > 10
                assert figures(ops)["plora_sessions"] == 2
                assert rss(process.pid) - before < 64 * MEBIBYTE
                assert await asyncio.to_thread(answer, session, IDS, 12) == wanted == greedy(merged, IDS, 12)
                call.cancel()

        asyncio.run(never_read())
        wait_until(lambda: figures(ops)["plora_sessions"] == 1, "its session was not released")


def test_a_guessed_session_id_and_a_replayed_hello(made: Made) -> None:
    """A guess hears that there is no such session, and a hello once heard only ever begins a session of its own."""
    machine = machine_of(made)
    hello = machine.hello()
    guess = pb.Frame.FromString(hello)
    guess.hello.session = bytes(range(16))

    async def first_answer(address: str, data: bytes) -> pb.Frame:
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            call = channel.stream_stream(PATH)(timeout=BOUND_SECONDS)
            await call.write(data)
            frame = pb.Frame.FromString(await call.read())
            call.cancel()
            return frame

    with with_ops(made) as (address, ops, _):
        refused = asyncio.run(first_answer(address, guess.SerializeToString(deterministic=True)))
        assert refused.fault.code == pb.EXPIRED
        assert figures(ops)["plora_sessions_opened_total"] == 0
        ids = {asyncio.run(first_answer(address, hello)).welcome.session for _ in range(8)}
        assert len(ids) == 8
