"""One stream is one session: reads frames, walks the step, writes frames; releases the slot on every way out."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc.aio

from ..artifact.errors import NotFinite, PloraError, RemoteProtocolError
from ..artifact.plan import Exchange, Segment
from ..artifact.walk import Exit, walk
from ..protocol.events import Aborted, CancelAsked, CloseAsked, Event, Greeting, InjectionsArrived, StepBegun, Terms, Truncated
from ..protocol.limits import SESSION_BYTES
from ..protocol.roles import CloudSession
from ..protocol.states import State
from .engine import Engine, Row

log = logging.getLogger("plora.cloud")

INLINE_WEIGHT_BYTES = 64 << 20
"""Work of up to so many tokens times bytes of weights runs on the event loop itself, about 5 ms here: handing it to a thread and
back costs 0.1 ms, a tenth of what one decode token takes in one layer of SmolLM2. Anything longer would keep others waiting."""

RETRY_AFTER_MILLIS = 1_000
STOPPING = "the server is shutting down; connect to another one, or again later"

WATCH_SECONDS = 0.25
"""How often deadlines are looked at. One watch for all connections: a timer per frame would be felt in every exchange."""


@dataclass(frozen=True)
class Limits:
    """hello_seconds: for a device to greet; idle_seconds: for any later frame; write_seconds: for a peer to take one;
    connections: open streams at the most, greeted or not."""

    hello_seconds: float = 10.0
    idle_seconds: float = 300.0
    write_seconds: float = 30.0
    connections: int = 1024


class Gone(Exception):
    """The peer is no longer there."""


class Service:
    """Serves sessions on one engine. `stop` refuses new ones, lets running steps finish, and ends the rest."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self.engine = engine
        self.limits = limits
        self.stages = walk(engine.plan)
        self.stopping = False
        self.connections: set[Connection] = set()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plora-engine")

    async def exchange(self, _: Any, context: Any) -> None:
        """The gRPC method's handler: one call of it per stream."""
        connection = Connection(self, context)
        self.connections.add(connection)
        try:
            await connection.serve()
        finally:
            self.connections.discard(connection)

    async def watch(self) -> None:
        """Ends connections whose peer is past its deadline; runs as long as the server."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for connection in list(self.connections):
                if connection.due is not None and now > connection.due:
                    connection.task.cancel()

    async def compute(self, work: Callable[..., Any], segment: Segment, rows: list[Row]) -> Any:
        """`work(segment index, rows)`, on the event loop if it is short, else on the engine's thread."""
        tokens = sum(row.count for row in rows)
        if tokens * (segment.stop - segment.first) * self.engine.layer_bytes <= INLINE_WEIGHT_BYTES:
            return work(segment.index, rows)
        future = asyncio.get_running_loop().run_in_executor(self.worker, work, segment.index, rows)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])  # the slot must not be given back while the engine writes into it
            raise

    async def stop(self, grace_seconds: float) -> None:
        """No new sessions; idle ones end now, running steps may finish within the grace."""
        self.stopping = True
        for connection in list(self.connections):
            connection.nudge()
        deadline = asyncio.get_running_loop().time() + grace_seconds
        while self.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for connection in list(self.connections):
            connection.task.cancel()

    def close(self) -> None:
        self.worker.shutdown(wait=True)


class Connection:
    """One stream and its session."""

    def __init__(self, service: Service, context: Any) -> None:
        self.service = service
        self.context = context
        contract = service.engine.contract
        self.machine = CloudSession(contract.plan, contract.shape, contract.hash)
        self.slot: int | None = None
        self.task: asyncio.Task[Any] = asyncio.current_task()  # type: ignore[assignment]
        self.due: float | None = None  # until when the peer may take to send a frame, or to take one
        self.reading = False

    async def serve(self) -> None:
        """Until the session is over, whoever ends it. Never raises for what a peer does."""
        try:
            if len(self.service.connections) > self.service.limits.connections:
                await self.fault("FULL", f"{self.service.limits.connections} connections are open, the most that are served")
                return
            event: Event | None = None
            while self.machine.state is not State.OVER:
                if self.service.stopping and self.machine.state in (State.START, State.GREETED, State.READY):
                    await self.fault("STOPPING", STOPPING)
                    break
                event = await self.handle(event or await self.receive())
        except RemoteProtocolError as error:
            log.info("session refused: %s", error.code)
            await self.fault(error.code, str(error))
        except Gone:
            pass
        except asyncio.CancelledError:
            if self.due is not None and time.monotonic() > self.due:
                await self.expire()
            elif self.service.stopping:
                await self.fault("STOPPING", STOPPING)
            else:
                raise
        except NotFinite as error:
            await self.fault("BAD_TENSOR", f"what the device sent makes values that are not finite: {error}")
        except PloraError as error:
            log.error("session failed: %s", type(error).__name__)
            await self.fault("INTERNAL", f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever it was, the session ends by name and the others go on
            log.exception("session failed")
            await self.fault("INTERNAL", type(error).__name__)
        finally:
            self.release()

    def release(self) -> None:
        """Gives the slot back, zeroed by the engine's thread: a long session's slot can take a while."""
        if self.slot is not None:
            self.service.worker.submit(self.service.engine.pool.give_back, self.slot)
            self.slot = None

    def nudge(self) -> None:
        """Wakes a connection that waits for a device between steps, so that it sees that the server stops."""
        if self.reading and self.machine.state in (State.START, State.GREETED, State.READY):
            self.task.cancel()

    async def handle(self, event: Event) -> Event | None:
        """One event; returns the next one if it was read already."""
        match event:
            case Greeting():
                await self.open(event)
            case StepBegun():
                return await self.step(event)
            case CancelAsked():
                await self.write(self.machine.cancelled())
            case CloseAsked():
                await self.write(self.machine.closed())
            case Aborted(code):
                log.info("a device gave up: %s", code)
            case Truncated():
                pass
            case _:
                raise AssertionError(f"the machine let {event} through")
        return None

    async def open(self, greeting: Greeting) -> None:
        """Admission: a KV slot, before any work."""
        pool = self.service.engine.pool
        slot = pool.take()
        if slot is None:
            used = pool.slots * pool.slot_bytes
            await self.fault("FULL", f"all {pool.slots} sessions ({used:,} bytes of KV cache) are taken; try again", RETRY_AFTER_MILLIS)
            return
        self.slot = slot
        engine = self.service.engine
        await self.write(
            self.machine.welcome(
                Terms(
                    greeting.dtype,
                    pool.context_tokens,
                    engine.step_tokens,
                    int(self.service.limits.idle_seconds * 1000),
                    os.urandom(SESSION_BYTES),
                )
            )
        )

    async def step(self, begun: StepBegun) -> Event | None:
        """Walks one step. Returns the event that ended it early (cancel, close, abort), else None."""
        engine, compute, stages = self.service.engine, self.service.compute, self.service.stages
        assert self.slot is not None
        row = engine.begin(self.slot, begun.position, begun.hidden, begun.injection)
        for stage, following in zip(stages, (*stages[1:], None), strict=True):
            if isinstance(stage, Exchange):
                assert isinstance(following, Segment)  # an exchange starts a segment
                (compressed,) = await compute(engine.open, following, [row])
                await self.write(self.machine.compressed(compressed))
                await compute(engine.ahead, following, [row])
                event = await self.receive()
                if not isinstance(event, InjectionsArrived):
                    return event
                engine.inject(row, stage.index, event.values)
            elif isinstance(stage, Segment):
                await compute(engine.run if stage.exchange is not None else engine.through, stage, [row])
            elif isinstance(stage, Exit):
                await self.write(self.machine.exit(engine.exit(row, begun.exit_rows)))
        return None

    async def receive(self) -> Event:
        limits = self.service.limits
        self.due = time.monotonic() + (limits.hello_seconds if self.machine.state is State.START else limits.idle_seconds)
        self.reading = True
        try:
            data = await self.context.read()
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise Gone from None
        finally:
            self.reading = False
        self.due = None
        if not isinstance(data, bytes):
            raise Gone
        return self.machine.receive(data)

    async def write(self, data: bytes) -> None:
        self.due = time.monotonic() + self.service.limits.write_seconds
        try:
            await self.context.write(data)
        except (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError):
            raise Gone from None
        self.due = None

    async def expire(self) -> None:
        """Says that the session is gone; to a peer that takes nothing, for a moment only."""
        limits = self.service.limits
        what = f"no frame for {limits.hello_seconds if self.machine.state is State.START else limits.idle_seconds:g} s"
        log.info("session expired: %s", what)
        try:
            async with asyncio.timeout(1.0):
                await self.fault("EXPIRED", f"{what}, the most that is allowed here; begin a new session")
        except TimeoutError:
            pass

    async def fault(self, code: str, detail: str, retry_after_millis: int = 0) -> None:
        """Says why the session is over, if anyone is still there to hear it."""
        if self.machine.state is State.OVER:
            return
        try:
            await self.write(self.machine.fault(code, detail, retry_after_millis))
        except Gone:
            pass
