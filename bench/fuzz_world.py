"""A world in which a service or a device's link runs by the input alone: time that passes when nobody has anything to do, an engine that
computes cheap numbers when its turn comes, and streams in memory. So the same input gives the same run, and a lease costs no minute."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc.aio
import numpy as np

from plora.artifact.walk import legs
from plora.cloud_server.cache import Pool
from plora.cloud_server.engine import Piece, Row
from plora.protocol.tensors import Floats

from .fuzz_frames import CONTEXT_TOKENS, STEP_TOKENS, Found, Setting, check

MOST_TURNS = 50_000
"""Of the event loop for one input: more is a loop without an end."""


class Loop(asyncio.BaseEventLoop):
    """An event loop whose time stands still while there is anything to do, and jumps to the next timer when there is not."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.turns = 0
        self.complaints: list[str] = []
        self._selector = self
        self._clock_resolution = 1e-6
        self.set_exception_handler(lambda loop, context: self.complaints.append(f"{context['message']}: {context.get('exception')!r}"))

    def time(self) -> float:
        return self.now

    def select(self, timeout: float | None) -> list[Any]:
        self.turns += 1
        if timeout is None:
            raise Found("everybody waits for somebody else")
        if self.turns > MOST_TURNS:
            raise Found("the event loop does not come to rest")
        self.now += timeout
        return []

    def close(self) -> None:
        self._selector = None
        super().close()

    def _process_events(self, events: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class Complaints(logging.Handler):
    """Errors that the code under test logs: whatever a peer does, it has none."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage() + (f": {record.exc_info[1]!r}" if record.exc_info else ""))


@contextmanager
def world() -> Iterator[Loop]:
    """A loop, whose time is everybody's. Raises Found if a task is left over or somebody complained."""
    loop, complaints, log = Loop(), Complaints(), logging.getLogger("plora")
    log.addHandler(complaints)
    propagates, log.propagate = log.propagate, False
    try:
        with mock.patch.object(time, "monotonic", loop.time), mock.patch.object(time, "perf_counter", loop.time):
            asyncio.set_event_loop(loop)
            yield loop
            left = [task.get_coro() for task in asyncio.all_tasks(loop)]
            check(not left, f"tasks are left over: {[getattr(each, '__qualname__', each) for each in left]}")
        check(not complaints.heard and not loop.complaints, f"somebody complained: {complaints.heard + loop.complaints}")
    finally:
        log.removeHandler(complaints)
        log.propagate = propagates
        abandon(loop)
        asyncio.set_event_loop(None)


def abandon(loop: Loop) -> None:
    """Whatever still runs, after a finding, is ended quietly."""
    loop.turns = 0
    for task in asyncio.all_tasks(loop):
        task.cancel()
    for _ in range(20):
        loop.call_soon(loop.stop)
        try:
            loop.run_forever()
        except Exception:
            break
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


def run(loop: Loop, work: Coroutine[Any, Any, Any]) -> Any:
    return loop.run_until_complete(work)


# The cloud's engine


class Worker(Executor):
    """The engine's thread, without one: jobs one after another, each `seconds()` after it could begin."""

    def __init__(self, loop: Loop, seconds: Callable[[], float]) -> None:
        self.loop = loop
        self.seconds = seconds
        self.jobs: deque[tuple[Callable[..., Any], tuple[Any, ...], Future[Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        done: Future[Any] = Future()
        self.jobs.append((fn, args, done))
        if len(self.jobs) == 1:
            self.loop.call_later(self.seconds(), self._work)
        return done

    def _work(self) -> None:
        fn, args, done = self.jobs[0]
        try:
            done.set_result(fn(*args))
        except Exception as error:
            done.set_exception(error)
        self.jobs.popleft()
        if self.jobs:
            self.loop.call_later(self.seconds(), self._work)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        pass


class CheapEngine:
    """Stands in for the engine: legs, rows and pieces are the real ones, and so is the pool. What it computes for a token depends on all
    tokens before it in its session, on all injections, and on nothing else; so that a token lost, doubled, misplaced or read from
    somebody else's slot shows in every row behind it."""

    def __init__(self, own: Setting, slots: int, blocks: int) -> None:
        self.contract = SimpleNamespace(plan=own.plan, shape=own.shape, hash=own.hash)
        layers = own.plan.cloud_layers
        token_bytes = own.shape.kv_bytes_per_token("fp32", layers)
        self.pool = Pool(own.shape, layers, CONTEXT_TOKENS, blocks * 64 * token_bytes, "fp32", slots)
        self.step_tokens = STEP_TOKENS
        self.legs = legs(own.plan)
        self.merge_seconds = [0.002] * len(self.legs)
        self.cache = [keys.numpy() for keys in self.pool.keys]  # [slots, kv_heads, tokens, head_dim] each

    def begin(self, slot: int, length: int, hidden: Floats, injection: Floats | None, exit_rows: int = 1, alone: bool = False) -> Row:
        injections: dict[int, Any] = {} if injection is None else {-1: injection}
        return Row(slot, length, hidden, injections, exit_rows, alone)  # type: ignore[arg-type]

    def inject(self, row: Row, exchange: int, values: Floats) -> None:
        row.injections[exchange] = values  # type: ignore[assignment]

    def go(self, index: int, pieces: list[Piece]) -> None:
        leg = self.legs[index]
        for piece in pieces:
            row: Any = piece.row
            if row.leg != index or not 0 < piece.count <= row.left:
                raise Found(f"a piece of {piece.count} of {row.left} tokens at leg {row.leg}, asked for at {index}")
            if leg.segment is not None:
                row.parts.append(self._segment(leg.segment, row, slice(row.done, row.done + piece.count)))
            row.done += piece.count
            if row.left:
                continue
            if row.parts:
                row.hidden, row.parts = np.concatenate(row.parts), []
            if leg.exchange is None:
                row.result = row.hidden[row.count - row.exit_rows :]
            else:
                row.result = np.repeat(row.hidden[:, :1] + row.hidden[:, 1:2], leg.exchange.compressed_columns, 1)
            row.leg, row.done = index + 1, 0

    def _segment(self, segment: Any, row: Any, tokens: slice) -> Floats:
        """[T, H] behind the segment for some tokens of a row; they are cached."""
        first, stop = row.length + tokens.start, row.length + tokens.stop
        if stop > self.pool.blocks_of(row.slot) * self.pool.block_tokens:
            raise Found(f"{stop} tokens in a slot of {self.pool.blocks_of(row.slot)} blocks")
        with np.errstate(over="ignore", invalid="ignore"):  # as in a product of huge numbers
            own = row.hidden[tokens].sum(1)
            for exchange in segment.inputs:
                own = own + row.injections[exchange][tokens].sum(1)
            cache = self.cache[segment.index][row.slot, 0, :, 0]
            cache[first:stop] = own
            seen = np.cumsum(cache[:stop], dtype=np.float32)[first:stop]
            return (row.hidden[tokens] * np.float32(0.5) + seen[:, None] * np.float32(0.125)).astype(np.float32)

    def ahead(self, rows: list[Row]) -> None:
        if len({row.leg for row in rows}) != 1:
            raise Found("rows of several legs ahead at a time")


# Streams


class Call:
    """One stream of the service, as grpc.aio shows it to the handler; and its other end. taking: whether the peer reads; frames: what it
    has been told and not looked at; broken: the peer is gone."""

    def __init__(self, loop: Loop, host: str, handler: Callable[[Any, Any], Coroutine[Any, Any, None]]) -> None:
        self.loop = loop
        self.host = host
        self.up: deque[bytes | None] = deque()
        self.frames: deque[bytes] = deque()
        self.taking = True
        self.broken = False
        self.listener: asyncio.Future[None] | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self.task = loop.create_task(handler(None, self))
        self.task.add_done_callback(self._ended)

    # As the handler sees it

    def auth_context(self) -> dict[str, Any]:
        return {}

    def peer(self) -> str:
        return f"ipv4:{self.host}:4711"

    async def read(self) -> bytes | Any:
        while not self.up:
            if self._reader is not None:
                raise Found("two read one stream")
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        if self.up[0] is None:
            return grpc.aio.EOF
        return self.up.popleft()

    async def write(self, data: bytes) -> None:
        if self._writers and not self.taking:
            raise Found("two write one stream")
        while not self.taking and not self.broken and not self.task.done():
            self._writers.append(self.loop.create_future())
            try:
                await self._writers[-1]
            finally:
                self._writers.pop()
        if self.broken or self.task.done():
            raise grpc.aio.InternalError("the stream is over")
        self.frames.append(data)
        self._tell()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """The handler returned: nothing more can be written, and the peer reads the end."""
        self._wake()
        self._tell()
        if not task.cancelled() and task.exception() is not None:
            self.loop.complaints.append(f"a handler failed: {task.exception()!r}")

    def _wake(self) -> None:
        for waiter in (*self._writers, self._reader):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    # As the peer sees it

    def _tell(self) -> None:
        if self.listener is not None and not self.listener.done():
            self.listener.set_result(None)

    async def next(self) -> bytes | None:
        """The next frame; None once the stream is over."""
        while not self.frames and not self.over:
            self.listener = self.loop.create_future()
            await self.listener
        return self.frames.popleft() if self.frames else None

    @property
    def over(self) -> bool:
        return self.broken or self.task.done()

    def say(self, data: bytes | None) -> None:
        """A frame, or with None that there will be no more."""
        self.up.append(data)
        self._wake()

    def take(self, taking: bool) -> None:
        self.taking = taking
        self._wake()

    def hang_up(self) -> None:
        """The connection breaks: grpc cancels the handler."""
        self.broken = True
        self.up.append(None)
        self._wake()
        self.task.cancel()
