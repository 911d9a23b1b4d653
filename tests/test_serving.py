"""A real server process: parity, many sessions, admission, expiry, the end, vanishing peers and hostile ones."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from plora.artifact.errors import MissingFile, RefusedContract, ServerFull, Unreachable, UsageError
from plora.artifact.manifest import MANIFEST, EdgeManifest, read_manifest, write_json
from plora.cloud_server.config import Door, Limits, ServerConfig
from plora.cloud_server.engine import Engine
from plora.cloud_server.quota import Quota
from plora.cloud_server.serve import serve
from plora.device_runtime import PrivateSession, open_session
from plora.device_runtime.edge import Edge
from plora.device_runtime.stepper import CHUNK_TOKENS
from plora.device_runtime.text import Text
from plora.device_runtime.transport import Deadlines
from plora.models.checkpoint import Base
from plora.models.formula import adapted, merge
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import CompressedArrived, Opened, StepDone
from plora.protocol.limits import MAX_FRAME_BYTES, METHOD, SERVICE, device_frame_bytes
from plora.protocol.roles import DeviceSession

from .conftest import Made, answer, cloud, command, greedy, make_export, oracle

CONTEXT = 1024
SESSION_BYTES = 2 * 16 * 3 * 4 * CONTEXT
"""KV cache of one session: keys and values of 2 heads of 8 in 3 layers, fp32."""
BOUND_SECONDS = 30
"""Of every wait: far more than any takes, far less than a hang."""
ATTEMPTS = 2000
"""Of polling for a slot: each is a connection of its own, a few milliseconds."""
IMPATIENT = Deadlines(give_up_seconds=0.3)
"""Of a device whose cloud will not come back."""
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A model with room for prompts of more than one step."""
    return make_export(tmp_path_factory.mktemp("long"), max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def long_merged(long: Made) -> Base:
    base = oracle(long)
    merge(base.model, long.adapter)
    return base


@pytest.fixture(scope="module")
def single(long: Made) -> Iterator[str]:
    """A cloud with room for one session, without leases: whoever does not release it locks everyone out."""
    with cloud(long.out / "cloud", "--context", str(CONTEXT), "--sessions", "1", "--lease-seconds", "0") as (address, _):
        yield address


def admitted(edge: Path, address: str) -> PrivateSession:
    """A session as soon as there is room. Fails after ATTEMPTS refusals."""
    for _ in range(ATTEMPTS):
        try:
            return open_session(edge, address)
        except ServerFull:
            pass
    pytest.fail(f"no slot was released within {ATTEMPTS} attempts")


# Parity


def test_prompts_longer_than_a_step_go_in_chunks(long: Made, long_merged: Base, single: str) -> None:
    with admitted(long.out / "edge", single) as session:
        ids = np.random.default_rng(0).integers(2, 300, 600).tolist()
        assert answer(session, ids, 16) == greedy(long_merged, ids, 16)
        assert session.answer is not None
        steps = session._stepper.counters.steps
        assert steps == -(-len(ids) // CHUNK_TOKENS) + len(session.answer.token_ids) - 1


def test_concurrent_sessions_get_the_same_tokens_as_alone(made: Made, merged: Base, served: str) -> None:
    prompts = [PROMPT, "pack my box with five", "hello", "a lighthouse keeper writes down the weather every morning", "what is"]

    def talk(prompt: str) -> tuple[list[int], list[int]]:
        with open_session(made.out / "edge", served) as session:
            ids = session.text.encode_raw(prompt)
            return ids, answer(session, ids, 48)

    with ThreadPoolExecutor(len(prompts)) as pool:
        for ids, tokens in pool.map(talk, prompts, timeout=BOUND_SECONDS):
            assert tokens == greedy(merged, ids, 48)


# Admission and expiry


def test_a_full_server_says_so_with_numbers_and_admits_again(long: Made) -> None:
    edge = long.out / "edge"
    with (
        cloud(
            long.out / "cloud",
            "--context",
            str(CONTEXT),
            "--kv-bytes",
            str(2 * SESSION_BYTES + 1),
            "--sessions",
            "2",
            "--lease-seconds",
            "0",
        ) as (
            address,
            _,
        ),
        ExitStack() as stack,
    ):
        first, second = (open_session(edge, address) for _ in range(2))
        stack.callback(first.close)
        with pytest.raises(
            ServerFull, match=rf"2 of 2 sessions hold {2 * SESSION_BYTES // 16:,} of {2 * SESSION_BYTES:,} bytes of KV cache; try again"
        ) as refusal:
            open_session(edge, address)
        assert 29_000 < refusal.value.retry_after_millis <= 30_000  # both are quiet, and may be sent away then
        assert len(answer(first, [5, 6, 7], 8)) > 0  # those inside are not disturbed
        second.close()  # says good-bye
        third = admitted(edge, address)
        with pytest.raises(ServerFull):
            open_session(edge, address)
        third._run(third._link.close())  # is cut off
        admitted(edge, address).close()
        third._runner.close()


def test_a_silent_session_expires_and_its_slot_is_free(long: Made, long_merged: Base) -> None:
    edge = long.out / "edge"
    with cloud(long.out / "cloud", "--context", str(CONTEXT), "--sessions", "2", "--idle-seconds", "0.4") as (
        address,
        _,
    ):
        session = open_session(edge, address)
        assert session.terms.idle_millis == 400

        async def wait_for_fault() -> pb.Frame:
            """A second silent session, opened later: when it has expired, so has the first."""
            async with raw(address) as call:
                machine = machine_of(long)
                await call.write(machine.hello())
                await call.read()
                frame = pb.Frame.FromString(await call.read())
                assert await call.read() is grpc.aio.EOF
                return frame

        fault = asyncio.run(wait_for_fault()).fault
        assert fault.code == pb.EXPIRED
        assert "no frame for 0.4 s" in fault.detail
        expired = session.terms.session
        assert answer(session, [5, 6, 7], 4) == greedy(long_merged, [5, 6, 7], 4)  # another session, and nobody notices
        assert session.terms.session != expired
        session.close()
        with admitted(edge, address), admitted(edge, address):
            pass


def test_a_session_that_stalls_half_way_expires_and_the_others_do_not_notice(long: Made, long_merged: Base) -> None:
    """It has begun a step and never answers the exchange; another one generates meanwhile."""
    with (
        cloud(long.out / "cloud", "--context", str(CONTEXT), "--sessions", "2", "--idle-seconds", "1.5") as (address, _),
        open_session(long.out / "edge", address) as session,
    ):

        async def stall() -> pb.Fault:
            async with raw(address) as call:
                machine = machine_of(long)
                await call.write(machine.hello())
                assert isinstance(machine.receive(await call.read()), Opened)
                await call.write(machine.entry(np.ones((3, machine.shape.hidden), np.float32), 1))
                assert isinstance(machine.receive(await call.read()), CompressedArrived)
                return pb.Frame.FromString(await call.read()).fault

        with ThreadPoolExecutor(1) as pool:
            stalled = pool.submit(asyncio.run, stall())
            while not stalled.done():
                assert answer(session, [5, 6, 7], 8) == greedy(long_merged, [5, 6, 7], 8)
        assert stalled.result().code == pb.EXPIRED
        with open_session(long.out / "edge", address):  # its room is free
            pass


def test_wrong_halves_are_refused_by_contract(made: Made, served: str, tmp_path: Path) -> None:
    edge = Path(shutil.copytree(made.out / "edge", tmp_path / "edge"))
    manifest = read_manifest(EdgeManifest, edge)
    contract = dataclasses.replace(manifest.contract, base="0" * 64)
    write_json(edge / MANIFEST, dataclasses.replace(manifest, contract=contract, contract_hash=contract.hash))
    with pytest.raises(RefusedContract, match="WRONG_CONTRACT"):
        open_session(edge, served)
    open_session(made.out / "edge", served).close()


def test_nobody_there_is_unreachable_with_its_exit_code(made: Made) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else can take the port, and nobody answers
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unreachable, match="is plora-cloud running there"):
            open_session(made.out / "edge", address)
        arguments = ["generate", "hello", "--edge", str(made.out / "edge"), "--cloud", address]
        result = subprocess.run([command("plora-device"), *arguments], capture_output=True, text=True, timeout=BOUND_SECONDS)
    assert result.returncode == Unreachable.exit_code == 9
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {address}: ")
    assert result.stderr.count("\n") == 1


# The end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_while_idle(number: signal.Signals, made: Made) -> None:
    with cloud(made.out / "cloud") as (address, process):
        session = open_session(made.out / "edge", address, deadlines=IMPATIENT)
        process.send_signal(number)
        assert process.wait(BOUND_SECONDS) == 0
        with pytest.raises(Unreachable, match="shutting down.*tried for 0.3 s"):
            answer(session, [5, 6, 7], 4)
        session.close()
        with pytest.raises(Unreachable):
            open_session(made.out / "edge", address)


def test_told_to_stop_while_generating(long: Made) -> None:
    """Every step that was answered is whole; then the server says that it stops, and ends with 0."""
    with (
        cloud(long.out / "cloud", "--context", str(CONTEXT)) as (address, process),
        open_session(long.out / "edge", address, deadlines=IMPATIENT) as session,
    ):
        sampling = session.sampling(temperature=1.0, seed=3, max_tokens=CONTEXT)
        pieces = 0
        with pytest.raises(Unreachable, match="shutting down"):
            for prompt in range(2, 200):  # an answer may end by itself: then another one begins
                for _ in session.stream([prompt, 5, 6], sampling):
                    pieces += 1
                    if pieces == 5:
                        process.send_signal(signal.SIGTERM)
        assert pieces >= 5
        assert process.wait(BOUND_SECONDS) == 0


# Raw streams


def machine_of(made: Made) -> DeviceSession:
    contract = read_manifest(EdgeManifest, made.out / "edge").contract
    return DeviceSession(contract.plan, contract.shape, contract.hash)


@asynccontextmanager
async def raw(address: str) -> AsyncIterator[Any]:
    """A stream without our device: bytes in, bytes out. Everything in the block must end within BOUND_SECONDS."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
    async with asyncio.timeout(BOUND_SECONDS), grpc.aio.insecure_channel(address, options) as channel:
        call = channel.stream_stream(f"/{SERVICE}/{METHOD}")()
        try:
            yield call
        finally:
            call.cancel()


MOMENTS = ("connected", "said hello", "welcomed", "sent an entry", "got compressed", "sent injections", "sent a cancel", "said close")


async def vanish(address: str, made: Made, moment: str) -> None:
    """A well-behaved device up to `moment`; then its connection is gone."""
    machine = machine_of(made)
    plan, shape = machine.plan, machine.shape
    async with raw(address) as call:

        async def script() -> AsyncIterator[str]:
            yield "connected"
            await call.write(machine.hello())
            yield "said hello"
            assert isinstance(machine.receive(await call.read()), Opened)
            yield "welcomed"
            await call.write(machine.entry(np.ones((200, shape.hidden), np.float32), 200))
            yield "sent an entry"
            for exchange in plan.exchanges:
                assert isinstance(machine.receive(await call.read()), CompressedArrived)
                yield "got compressed"
                await call.write(machine.injections(np.zeros((200, exchange.injection_columns), np.float32)))
                yield "sent injections"
            assert isinstance(machine.receive(await call.read()), StepDone)
            await call.write(machine.cancel())
            yield "sent a cancel"
            await call.write(machine.close())
            yield "said close"

        reached = script()
        try:
            async for now in reached:
                if now == moment:
                    return
        finally:
            await reached.aclose()
        raise AssertionError(f"the script never came to {moment}")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_peer_that_vanishes_releases_its_slot(moment: str, long: Made, long_merged: Base, single: str) -> None:
    with admitted(long.out / "edge", single), pytest.raises(ServerFull):
        open_session(long.out / "edge", single)  # the control: there is one slot, and it is seen to be taken
    asyncio.run(vanish(single, long, moment))
    with admitted(long.out / "edge", single) as session:
        ids = session.text.encode_raw(PROMPT)
        assert answer(session, ids, 8) == greedy(long_merged, ids, 8)


def test_ctrl_c_ends_a_generation_and_releases_the_session(long: Made, long_merged: Base, single: str) -> None:
    admitted(long.out / "edge", single).close()
    prompts = [
        text
        for text in (PROMPT, "pack my box", "hello world", "what is the capital", "weather")
        if len(_greedy_raw(long, long_merged, text)) == 400
    ]
    assert prompts, "no prompt of these keeps the model talking"
    flags = ["--edge", str(long.out / "edge"), "--cloud", single, "--raw", "--temperature", "0", "--max-tokens", "1000"]
    for _ in range(ATTEMPTS):  # the slot that the line above gave back may not be free yet
        process = subprocess.Popen(
            [command("plora-device"), "generate", prompts[0], *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        first = process.stdout.read(1)
        if first:
            break
        process.communicate(timeout=BOUND_SECONDS)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=BOUND_SECONDS)
    assert process.returncode == 130, errors
    assert errors == b"interrupted\n"
    assert len(first + output) < len(_greedy_text(long, long_merged, prompts[0]).encode())
    admitted(long.out / "edge", single).close()


def _greedy_raw(made: Made, base: Base, prompt: str) -> list[int]:
    text = Text(made.out / "edge", read_manifest(EdgeManifest, made.out / "edge"))
    return greedy(base, text.encode_raw(prompt), 400)


def _greedy_text(made: Made, base: Base, prompt: str) -> str:
    return Text(made.out / "edge", read_manifest(EdgeManifest, made.out / "edge")).decode(_greedy_raw(made, base, prompt))


# Health


def test_standard_health_service_answers(served: str) -> None:
    with grpc.insecure_channel(served) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=BOUND_SECONDS)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Check(health_pb2.HealthCheckRequest(service="another"), timeout=BOUND_SECONDS)
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


# Hostile peers


def entry(machine: DeviceSession, tokens: int = 2, **changes: Any) -> pb.Frame:
    """A legal first entry, then changed."""
    hidden = np.ones((tokens, machine.shape.hidden), "<f4")
    tensor = pb.Tensor(dtype=pb.FP32, rows=tokens, columns=machine.shape.hidden, data=hidden.tobytes())
    frame = pb.Frame(entry=pb.Entry(step=1, position=0, exit_rows=1, hidden=tensor))
    for name, value in changes.items():
        holder = frame.entry if name in ("step", "position", "exit_rows") else frame.entry.hidden
        setattr(holder, name, value)
    return frame


def not_finite(machine: DeviceSession, value: float) -> bytes:
    hidden = np.ones((2, machine.shape.hidden), "<f4")
    hidden[1, -1] = value
    return entry(machine, data=hidden.tobytes()).SerializeToString()


def hello(machine: DeviceSession, **changes: Any) -> bytes:
    frame = pb.Frame.FromString(machine_copy(machine).hello())
    for name, value in changes.items():
        setattr(frame.hello, name, value)
    return frame.SerializeToString()


def machine_copy(machine: DeviceSession) -> DeviceSession:
    return DeviceSession(machine.plan, machine.shape, machine.contract.hex())


UNKNOWN_FIELD = b"\xaa\x06\x05hello"
"""Field 101, five bytes of text: room for a message that the schema does not know."""

# What a hostile device says, as the first thing or after a good hello, and the fault code it gets.
FIRST: dict[str, tuple[Callable[[DeviceSession], bytes], int]] = {
    "random bytes": (lambda m: random.Random(1).randbytes(500), pb.BAD_FRAME),
    "nothing": (lambda m: b"", pb.BAD_FRAME),
    "text": (lambda m: b"GET / HTTP/1.1\r\n\r\n", pb.BAD_FRAME),
    "unknown field": (lambda m: hello(m) + UNKNOWN_FIELD, pb.BAD_FRAME),
    "entry before hello": (lambda m: entry(m).SerializeToString(), pb.BAD_STATE),
    "a frame of the cloud": (lambda m: pb.Frame(exit=pb.Exit(step=1)).SerializeToString(), pb.BAD_STATE),
    "close before hello": (lambda m: pb.Frame(close=pb.Close()).SerializeToString(), pb.BAD_STATE),
    "another major": (lambda m: hello(m, major=99), pb.WRONG_VERSION),
    "another contract": (lambda m: hello(m, contract=bytes(32)), pb.WRONG_CONTRACT),
    "a contract of 5 bytes": (lambda m: hello(m, contract=b"short"), pb.BAD_FRAME),
    "no dtype": (lambda m: hello(m, dtype=0), pb.WRONG_DTYPE),
    "somebody's session": (lambda m: hello(m, session=bytes(16)), pb.EXPIRED),
    "zeros up to the limit": (lambda m: bytes(device_frame_bytes(m.plan, m.shape)), pb.BAD_FRAME),
}
LATER: dict[str, tuple[Callable[[DeviceSession], bytes], int]] = {
    "a second hello": (hello, pb.BAD_STATE),
    "injections that nobody asked for": (lambda m: pb.Frame(injections=pb.Injections(step=1)).SerializeToString(), pb.BAD_STATE),
    "NaN": (lambda m: not_finite(m, float("nan")), pb.BAD_TENSOR),
    "infinity": (lambda m: not_finite(m, float("-inf")), pb.BAD_TENSOR),
    "2³² - 1 rows": (lambda m: entry(m, rows=2**32 - 1).SerializeToString(), pb.BAD_STEP),
    "2³² - 1 columns": (lambda m: entry(m, columns=2**32 - 1).SerializeToString(), pb.BAD_TENSOR),
    "more rows than bytes": (lambda m: entry(m, rows=3).SerializeToString(), pb.BAD_TENSOR),
    "no rows": (lambda m: entry(m, rows=0, data=b"").SerializeToString(), pb.BAD_STEP),
    "another dtype": (lambda m: entry(m, dtype=pb.FP16).SerializeToString(), pb.BAD_TENSOR),
    "an unknown dtype": (lambda m: entry(m, dtype=77).SerializeToString(), pb.BAD_TENSOR),
    "step 0": (lambda m: entry(m, step=0).SerializeToString(), pb.BAD_STEP),
    "a position in the future": (lambda m: entry(m, position=7).SerializeToString(), pb.BAD_STEP),
    "more exit rows than tokens": (lambda m: entry(m, exit_rows=3).SerializeToString(), pb.BAD_STEP),
    "an unknown field in a tensor": (lambda m: with_unknown_field(m).SerializeToString(), pb.BAD_FRAME),
    "injections at the entry": (lambda m: with_injection(m).SerializeToString(), pb.BAD_TENSOR),
    "a truncate of what is not there": (lambda m: pb.Frame(truncate=pb.Truncate(length=1)).SerializeToString(), pb.BAD_STEP),
    "a cancel of nothing": (lambda m: pb.Frame(cancel=pb.Cancel(step=1)).SerializeToString(), pb.BAD_STEP),
}


def with_injection(machine: DeviceSession) -> pb.Frame:
    frame = entry(machine)
    frame.entry.injection.CopyFrom(frame.entry.hidden)
    return frame


def with_unknown_field(machine: DeviceSession) -> pb.Frame:
    frame = entry(machine)
    frame.entry.hidden.MergeFromString(UNKNOWN_FIELD)
    assert UNKNOWN_FIELD in frame.SerializeToString()
    return frame


async def attack(address: str, machine: DeviceSession, data: bytes, greeted: bool) -> pb.Frame:
    """Sends it, returns the fault; the stream must end after it."""
    async with raw(address) as call:
        if greeted:
            await call.write(hello(machine))
            assert pb.Frame.FromString(await call.read()).WhichOneof("kind") == "welcome"
        await call.write(data)
        frame = pb.Frame.FromString(await call.read())
        assert await call.read() is grpc.aio.EOF
        return frame


def test_hostile_frames_get_the_right_fault_and_disturb_nobody(made: Made, merged: Base, served: str) -> None:
    """One session talks on through all of it."""
    machine = machine_of(made)
    with open_session(made.out / "edge", served) as session:
        ids = session.text.encode_raw(PROMPT)
        expected = greedy(merged, ids, 12)
        for greeted, attacks in ((False, FIRST), (True, LATER)):
            for name, (make, code) in attacks.items():
                frame = asyncio.run(attack(served, machine, make(machine), greeted))
                assert frame.WhichOneof("kind") == "fault", name
                assert pb.FaultCode.Name(frame.fault.code) == pb.FaultCode.Name(code), f"{name}: {frame.fault.detail}"
                assert frame.fault.detail, name
                assert answer(session, ids, 12) == expected, name


def test_a_hostile_injection_at_the_entry_is_refused_by_name(layered: Made) -> None:
    """Where the plan wants one. Another session talks on through all of it; and a good one is taken, which is the control."""
    machine = machine_of(layered)
    held = machine.plan.entry_exchange
    assert held is not None
    columns = held.injection_columns

    def frame(rows: int = 2, columns: int = columns, value: float = 1.0, dtype: int = pb.FP32, data: bytes | None = None) -> pb.Frame:
        made = entry(machine)
        values = np.full((rows, columns), value, "<f4")
        made.entry.injection.CopyFrom(pb.Tensor(dtype=dtype, rows=rows, columns=columns, data=values.tobytes() if data is None else data))  # type: ignore[arg-type]
        return made

    attacks = {
        "missing": (entry(machine), "the plan has injections at the entry"),
        "empty": (frame(0, 0), rf"shape \[0, 0\], expected \[2, {columns}\]"),
        "too wide": (frame(columns=columns + 1), rf"shape \[2, {columns + 1}\], expected \[2, {columns}\]"),
        "too narrow": (frame(columns=columns - 1), rf"shape \[2, {columns - 1}\]"),
        "for fewer tokens": (frame(rows=1), rf"shape \[1, {columns}\], expected \[2, {columns}\]"),
        "fewer bytes than it says": (frame(data=bytes(4)), f"4 bytes, expected {8 * columns}"),
        "2³² - 1 columns": (frame(columns=0, data=b""), "shape"),
        "NaN": (frame(value=float("nan")), "not finite"),
        "infinity": (frame(value=float("inf")), "not finite"),
        "another dtype": (frame(dtype=pb.FP16), "dtype fp16, expected fp32"),
    }
    attacks["2³² - 1 columns"][0].entry.injection.columns = 2**32 - 1
    base = oracle(layered)
    with adapted(base.model, layered.adapter):
        expected = greedy(base, [5, 6, 7], 12)
    with cloud(layered.out / "cloud") as (address, _), open_session(layered.out / "edge", address) as session:
        for name, (attacking, detail) in attacks.items():
            told = asyncio.run(attack(address, machine, attacking.SerializeToString(), greeted=True))
            assert (told.WhichOneof("kind"), told.fault.code) == ("fault", pb.BAD_TENSOR), name
            assert re.search(f"step 1, entry.*{detail}", told.fault.detail), f"{name}: {told.fault.detail}"
            assert answer(session, [5, 6, 7], 12) == expected, name

        async def good() -> pb.Frame:
            async with raw(address) as call:
                await call.write(hello(machine))
                await call.read()
                await call.write(frame().SerializeToString())
                return pb.Frame.FromString(await call.read())

        assert asyncio.run(good()).WhichOneof("kind") == "exit"


def test_a_message_over_the_limit_ends_its_own_stream_only(made: Made, merged: Base, served: str) -> None:
    async def send() -> grpc.StatusCode:
        async with raw(served) as call:
            await call.write(bytes(MAX_FRAME_BYTES + 1))
            try:
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
            return await call.code()

    assert asyncio.run(send()) is grpc.StatusCode.RESOURCE_EXHAUSTED
    with open_session(made.out / "edge", served) as session:
        assert answer(session, [5, 6, 7], 12) == greedy(merged, [5, 6, 7], 12)


def test_wrong_injections_in_the_middle_of_a_step(made: Made, served: str) -> None:
    """Right step, wrong exchange; right exchange, wrong width; and a cancel of a step that is not running."""

    async def middle(data: bytes) -> int:
        machine = machine_of(made)
        async with raw(served) as call:
            await call.write(machine.hello())
            machine.receive(await call.read())
            await call.write(machine.entry(np.ones((2, machine.shape.hidden), np.float32), 1))
            machine.receive(await call.read())
            await call.write(data)
            frame = pb.Frame.FromString(await call.read())
            assert await call.read() is grpc.aio.EOF
            return frame.fault.code

    columns = machine_of(made).plan.exchanges[0].injection_columns

    def injections(**changes: int) -> bytes:
        sizes = {"step": 1, "exchange": 0, "rows": 2, "columns": columns, **changes}
        data = bytes(4 * sizes["rows"] * sizes["columns"])
        tensor = pb.Tensor(dtype=pb.FP32, rows=sizes["rows"], columns=sizes["columns"], data=data)
        return pb.Frame(injections=pb.Injections(step=sizes["step"], exchange=sizes["exchange"], tensor=tensor)).SerializeToString()

    assert asyncio.run(middle(injections(exchange=1))) == pb.BAD_STEP
    assert asyncio.run(middle(injections(step=2))) == pb.BAD_STEP
    assert asyncio.run(middle(injections(columns=columns - 1))) == pb.BAD_TENSOR
    assert asyncio.run(middle(injections(rows=1))) == pb.BAD_TENSOR
    assert asyncio.run(middle(pb.Frame(cancel=pb.Cancel(step=9)).SerializeToString())) == pb.BAD_STEP


def test_plain_garbage_on_the_port(made: Made, merged: Base, served: str) -> None:
    host, port = served.split(":")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    with ExitStack() as stack:
        for garbage in (
            b"",
            b"\0" * 100,
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            preface[:10],
            preface + random.Random(2).randbytes(4096),
            bytes(1 << 16),
        ):
            peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=BOUND_SECONDS))
            try:
                peer.sendall(garbage)
            except OSError:
                pass  # the server has hung up already
        with open_session(made.out / "edge", served) as session:  # while all of them are still connected
            assert answer(session, [5, 6, 7], 12) == greedy(merged, [5, 6, 7], 12)


# Flags


def test_flags_that_cannot_be_honoured(made: Made, tmp_path: Path) -> None:
    for listen in ("7070", "127.0.0.1:", ":7070", "127.0.0.1:70000", "127.0.0.1:x"):
        with pytest.raises(UsageError, match="expected HOST:PORT"):
            Door(listen)
    for bad in ({"kv_bytes": 0}, {"threads": -1}, {"grace_seconds": -1.0}, {"drain_seconds": float("inf")}, {"context_tokens": 0}):
        with pytest.raises(UsageError, match="expected"):
            ServerConfig(tmp_path, **bad)  # type: ignore[arg-type]
    for wrong in ({"idle_seconds": 0}, {"connections": 0}, {"inbox_bytes": -1}, {"quota": Quota(tokens_per_day=-1)}):
        with pytest.raises(UsageError, match="expected"):
            Limits(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"a KV budget of 1,000 bytes holds no session: one of 256 tokens takes 98,304"):
        Engine(made.out / "cloud", 1000)
    with pytest.raises(UsageError, match=r"--context 257, expected 1\.\.256"):
        Engine(made.out / "cloud", 1 << 20, 257)
    with pytest.raises(MissingFile, match="is .* the folder that you meant"):
        Engine(tmp_path, 1 << 20)


def test_a_taken_port_is_refused(made: Made) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        config = ServerConfig(made.out / "cloud", 1 << 20, door=Door(f"127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(UsageError, match="cannot listen there"):
            asyncio.run(serve(config, lambda address, ops, engine: pytest.fail("it listens")))


def test_the_edge_half_is_not_served(made: Made) -> None:
    """One line and an exit code, not a traceback."""
    result = subprocess.run(
        [command("plora-cloud"), "serve", str(made.out / "edge")], capture_output=True, text=True, timeout=BOUND_SECONDS
    )
    assert result.returncode == 3
    assert "got 'plora-edge', expected 'plora-cloud'" in result.stderr
    assert result.stderr.count("\n") == 1
    assert Edge(made.out / "edge").plan == Engine(made.out / "cloud", 1 << 20).plan
