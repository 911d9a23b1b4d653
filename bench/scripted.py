"""Devices that compute nothing: each replays a recording (bench/recording.py) over a connection of its own, and checks what comes back.

`python -m bench.scripted EDGE RECORDING …` is a process that drives any number of them. It prints `ready`, then answers each line of
input, a JSON object, with one of output: {"run": the fields of Run} with what `run` returns; {"idle": {"address", "devices"}} opens
sessions with a prompt cached each and holds them until {"release": {}}.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import psutil

from plora.artifact.errors import PloraError, ServerFull, Unreachable, UsageError
from plora.artifact.hashes import Contract
from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.device_runtime.transport import OPTIONS, PATH
from plora.protocol.events import ClosedDone, CompressedArrived, Event, Opened, StepDone
from plora.protocol.roles import DeviceSession

from .conditions import ROOT
from .recording import CHUNK_TOKENS, PROMPT_TOKENS, Recording, load

WRONG = 1e-3
"""Error of an exit row, relative to its root mean square, above which it is wrong. Of SmolLM2, chunks against single tokens differ by
under 1e-4, another device's cores (bench/recording.py) make 5e-2, one row of one of 30 exchanges 5e-3. Not relative to the largest value:
that is one dimension's, a hundred times the others, and hides them."""
CONNECT_SECONDS = 10.0
READY_SECONDS = 120.0
"""For all devices to have their first token: 128 prompts at once on two cores take half a minute."""
DRAIN_SECONDS = 30.0
"""For the steps in flight when a run ends; a device that waits for longer is stuck."""
CLOSE_SECONDS = 5.0
RETRY_SECONDS = 0.5
"""After a failure for which the cloud names no time."""
OPENING = 8
"""Idle sessions that are opened at a time."""
GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Run:
    """warm_seconds: from when every device has its first token; seconds: measured after that; think_millis: from an exit to the next entry;
    decode_only: over the recording's end, go back to the prompt's end and not to the start; watch: pids whose CPU time and memory
    are reported, by any name."""

    address: str
    devices: int
    seconds: float
    warm_seconds: float = 2.0
    think_millis: float = 0.0
    decode_only: bool = False
    watch: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.devices < 1 or not 0 < self.seconds < math.inf or not 0 <= self.warm_seconds < math.inf or self.think_millis < 0:
            raise UsageError(f"{self}: expected 1 and more devices, seconds above 0, and no negative time")


class ScriptedDevice:
    """One device. first_seconds, token_seconds: (when it came, by time.perf_counter; seconds since its entry) of each prompt's first
    token, and of each later token; prompts: (when, tokens)."""

    def __init__(self, contract: Contract, recording: Recording, index: int = 0) -> None:
        self.contract = contract
        self.recording = recording
        self.index = index
        self.row_sizes = np.sqrt(np.mean(np.square(recording.exit), axis=1)).tolist()
        self.first_seconds: list[tuple[float, float]] = []
        self.token_seconds: list[tuple[float, float]] = []
        self.prompts: list[tuple[float, int]] = []
        self.errors: Counter[str] = Counter()
        self.largest_error = 0.0
        self.wrong = 0
        self.stopping = False
        self.channel: grpc.aio.Channel | None = None

    # The connection

    async def open(self, address: str) -> None:
        """Raises Refused's children, Unreachable, AioRpcError."""
        self.machine = DeviceSession(self.contract.plan, self.contract.shape, self.contract.hash)
        self.channel = grpc.aio.insecure_channel(address, OPTIONS)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self.channel.channel_ready()
        except TimeoutError:
            raise Unreachable(f"{address}: no answer within {CONNECT_SECONDS:g} s") from None
        self.call = self.channel.stream_stream(PATH)()
        await self.call.write(self.machine.hello())
        if not isinstance(await self._receive(), Opened):
            raise Unreachable(f"{address}: no welcome")

    async def _receive(self) -> Event:
        data = await self.call.read()
        if not isinstance(data, bytes):
            raise Unreachable("the cloud ended the stream without a word")
        return self.machine.receive(data)

    async def close(self) -> None:
        """In any state: says good-bye if the cloud still listens, so that the session's slot is free at once."""
        if self.channel is None:
            return
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                if self.machine.live:
                    await self.call.write(self.machine.close())
                    while not isinstance(await self._receive(), ClosedDone):
                        pass
        except (TimeoutError, PloraError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        await self.channel.close()
        self.channel = None

    # Steps

    async def feed(self, first: int, stop: int) -> None:
        """Rows first <= row < stop of the recording, in steps of up to CHUNK_TOKENS, several in flight; the last row's exit is judged."""
        machine, recording = self.machine, self.recording
        assert machine.terms is not None  # `open` came first
        window, most = machine.terms.window, min(CHUNK_TOKENS, machine.terms.step_tokens)
        entry, injections, held = recording.entry, recording.injections, machine.plan.entry_exchange
        flying: dict[int, slice] = {}
        while first < stop or flying:
            while first < stop and len(flying) < window:
                rows = slice(first, min(first + most, stop))
                injection = injections[-1][rows] if held is not None else None
                await self.call.write(machine.entry(entry[rows], int(rows.stop == stop), injection, first))
                flying[machine.step] = rows
                first = rows.stop
            event = await self._receive()
            if isinstance(event, CompressedArrived):
                injection = injections[event.exchange.index][flying[event.step]]
                await self.call.write(machine.injections(injection, event.step))
            elif isinstance(event, StepDone):
                del flying[event.step]
                if len(event.hidden):
                    self._judge(event.hidden[-1], stop - 1)

    def _judge(self, hidden: np.ndarray, row: int) -> None:
        """hidden: [H], the exit of `row`."""
        error = float(np.abs(hidden - self.recording.exit[row]).max()) / self.row_sizes[row]
        self.largest_error = max(self.largest_error, error)
        self.wrong += error > WRONG

    # Conversations

    async def converse(self, think_seconds: float = 0.0, decode_only: bool = False) -> None:
        """The recording again and again until `stopping`; the first time not to its end, so that devices which begin together
        do not go on together."""
        prompt, tokens = self.recording.prompt_tokens, self.recording.tokens
        stop = tokens if decode_only else prompt + 1 + int((tokens - prompt - 1) * (self.index * GOLDEN % 1))
        position = 0
        while not self.stopping:
            if position < prompt:
                began = time.perf_counter()
                await self.feed(0, prompt)
                now = time.perf_counter()
                self.first_seconds.append((now, now - began))
                self.prompts.append((now, prompt))
                position = prompt
            elif position < stop:
                began = time.perf_counter()
                await self.feed(position, position + 1)
                now = time.perf_counter()
                self.token_seconds.append((now, now - began))
                position += 1
            else:
                position, stop = prompt if decode_only else 0, tokens
                continue
            if think_seconds:
                await asyncio.sleep(think_seconds)

    async def live(self, run: Run) -> None:
        """Converses until `stopping`, in another session when one fails."""
        while not self.stopping:
            pause = 0.0
            try:
                await self.open(run.address)
                await self.converse(run.think_millis / 1e3, run.decode_only)
            except ServerFull as error:
                self.errors["ServerFull"] += 1
                pause = error.retry_after_millis / 1e3 or RETRY_SECONDS
            except (PloraError, grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                self.errors[name_of(error)] += 1
                pause = RETRY_SECONDS
            finally:
                await self.close()
            if not self.stopping:
                await asyncio.sleep(pause)


def name_of(error: Exception) -> str:
    return error.code().name if isinstance(error, grpc.aio.AioRpcError) else type(error).__name__


async def run(contract: Contract, recordings: Sequence[Recording], asked: Run) -> dict[str, Any]:
    """One run; its figures, where those of tokens and CPU are of the measured window alone, and errors and judged rows of it all."""
    devices = [ScriptedDevice(contract, recordings[index % len(recordings)], index) for index in range(asked.devices)]
    lives = [asyncio.create_task(device.live(asked)) for device in devices]
    deadline = time.monotonic() + READY_SECONDS
    while not all(device.first_seconds for device in devices) and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    await asyncio.sleep(asked.warm_seconds)
    began, cpu_before = time.perf_counter(), cpu_seconds(asked.watch)
    await asyncio.sleep(asked.seconds)
    ended, cpu_after = time.perf_counter(), cpu_seconds(asked.watch)
    rss = {name: psutil.Process(pid).memory_info().rss for name, pid in asked.watch.items()}
    for device in devices:
        device.stopping = True
    _, stuck = await asyncio.wait(lives, timeout=DRAIN_SECONDS)
    for life in stuck:
        life.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    failed = [error for life in lives if not life.cancelled() and (error := life.exception())]
    if failed:
        raise failed[0]  # a mistake of ours: those of others are counted

    def within(pairs: list[tuple[float, float]]) -> list[float]:
        return [value for at, value in pairs if began < at <= ended]

    by_device = [
        {
            "opening_seconds": device.first_seconds[0][1] if device.first_seconds else None,
            "first_seconds": within(device.first_seconds),
            "token_seconds": within(device.token_seconds),
        }
        for device in devices
    ]
    tokens = sum(len(each["first_seconds"]) + len(each["token_seconds"]) for each in by_device)
    return {
        "devices": len(devices),
        "devices_ready": sum(bool(device.first_seconds) for device in devices),
        "seconds": ended - began,
        "tokens": tokens,
        "tokens_per_second": tokens / (ended - began),
        "prompt_tokens": int(sum(sum(within(device.prompts)) for device in devices)),
        "by_device": by_device,
        "judged_rows": sum(len(device.first_seconds) + len(device.token_seconds) for device in devices),
        "wrong": sum(device.wrong for device in devices),
        "largest_error": max(device.largest_error for device in devices),
        "errors": dict(sum((device.errors for device in devices), Counter({"Stuck": len(stuck)} if stuck else {}))),
        "cpu_seconds": {name: cpu_after[name] - cpu_before[name] for name in cpu_after},
        "rss_bytes": rss,
    }


def cpu_seconds(watch: dict[str, int]) -> dict[str, float]:
    """User and system, all threads, since each process began; `load` is this one."""
    times = {name: psutil.Process(pid).cpu_times() for name, pid in watch.items()}
    return {"load": time.process_time(), **{name: each.user + each.system for name, each in times.items()}}


async def hold(contract: Contract, recordings: Sequence[Recording], address: str, count: int) -> list[ScriptedDevice]:
    """So many open sessions with the first PROMPT_TOKENS rows of a recording cached each. Raises what `ScriptedDevice.open` raises."""
    devices = [ScriptedDevice(contract, recordings[index % len(recordings)], index) for index in range(count)]
    for at in range(0, count, OPENING):
        await asyncio.gather(*(device.open(address) for device in devices[at : at + OPENING]))
        await asyncio.gather(*(device.feed(0, min(PROMPT_TOKENS, device.recording.tokens)) for device in devices[at : at + OPENING]))
    return devices


async def answer(
    contract: Contract, recordings: Sequence[Recording], request: dict[str, Any], held: list[ScriptedDevice]
) -> dict[str, Any]:
    """Does what one line of input says. held: idle sessions, which the call changes."""
    match request:
        case {"run": fields}:
            return await run(contract, recordings, Run(**fields))
        case {"idle": {"address": address, "devices": count}}:
            held += await hold(contract, recordings, address, count)
            return {"sessions": len(held), "cached_tokens": sum(device.machine.length for device in held)}
        case {"release": {}}:
            await asyncio.gather(*(device.close() for device in held))
            held.clear()
            return {"sessions": 0}
        case _:
            raise UsageError(f"no command {request!r}: there are run, idle, release")


async def answers(contract: Contract, recordings: Sequence[Recording]) -> None:
    held: list[ScriptedDevice] = []
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            reply = await answer(contract, recordings, json.loads(line), held)
        except (PloraError, grpc.aio.AioRpcError) as error:
            reply = {"error": f"{name_of(error)}: {error}"}
        print(json.dumps(reply), flush=True)


class Load:
    """The parent's handle of such a process."""

    def __init__(self, edge: Path, recordings: Sequence[Path]) -> None:
        command = [sys.executable, "-m", "bench.scripted", edge, *recordings]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        if self._line() != "ready":
            raise RuntimeError("the scripted devices did not start")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError with the process's own words."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        if not (line := self._line()):
            raise RuntimeError(f"the scripted devices ended with {self.process.wait(CLOSE_SECONDS)}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(f"scripted devices: {reply['error']}")
        return reply

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def main() -> None:
    edge, *paths = sys.argv[1:]
    contract = read_manifest(EdgeManifest, Path(edge)).contract
    recordings = [load(Path(path)) for path in paths]
    gc.freeze()
    print("ready", flush=True)
    asyncio.run(answers(contract, recordings))


if __name__ == "__main__":
    main()
