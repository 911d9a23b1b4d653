"""The door and the house: who comes in on a stream, which session it carries, and when its time is over."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from ..artifact.errors import RemoteProtocolError
from ..artifact.memory import give_back
from ..protocol.events import Greeting, Terms
from ..protocol.limits import SESSION_BYTES, WINDOW
from ..protocol.roles import CloudSession
from ..protocol.session import is_ping
from ..protocol.states import State
from .carrier import Carrier, Gone
from .engine import Engine
from .room import Quota, Refusal, Room
from .scheduler import Scheduler, engine_thread
from .session import STOPPING, Session

log = logging.getLogger("plora.cloud")

WATCH_SECONDS = 0.25
"""How often deadlines are looked at. One watch for all connections: a timer per frame would be felt in every exchange."""

TRIM_SECONDS = 2.0
"""How often the allocator is asked to give freed memory back to the system, if there was work: prompts come in frames of a megabyte, and
holes of that size would stay."""


@dataclass(frozen=True)
class Limits:
    """hello_seconds: for a device to greet; idle_seconds: for any later frame; write_seconds: for a peer to take one; lease_seconds:
    how long a session outlives its connection, 0 for not at all; quiet_seconds: after which a session that has nothing to do may be sent
    away for others, if there is no room; connections: open streams at the most, greeted or not; quota: of each user."""

    hello_seconds: float = 10.0
    idle_seconds: float = 300.0
    write_seconds: float = 30.0
    lease_seconds: float = 60.0
    quiet_seconds: float = 30.0
    connections: int = 2048
    quota: Quota = field(default_factory=Quota)


class Service:
    """Serves sessions on one engine, which computes on `worker`'s thread (`engine_thread`). `stop` refuses new ones, lets running steps
    finish, and ends the rest."""

    def __init__(self, engine: Engine, limits: Limits, worker: Executor | None = None) -> None:
        self.engine = engine
        self.limits = limits
        self.stopping = False
        self.carriers: set[Carrier] = set()
        self.sessions: dict[bytes, Session] = {}
        self.worker = engine_thread() if worker is None else worker
        self.scheduler = Scheduler(engine, self.worker)
        self.room = Room(engine.pool, limits.quota, limits.lease_seconds, limits.quiet_seconds, self.worker)

    async def exchange(self, _: Any, context: Any) -> None:
        """The gRPC method's handler: one call of it per stream. It reads; what the session has to say it writes itself."""
        carrier = Carrier(context)
        self.carriers.add(carrier)
        try:
            session = await self._admit(carrier)
            while session is not None and not carrier.gone:
                data = await carrier.read()
                session.heard_at = time.monotonic()
                if is_ping(data):
                    await session.ping(data)
                else:
                    session.acted_at = session.heard_at
                    await carrier.push(data)
                del data  # a prompt's frame would stay for as long as its device is silent
        except Gone:
            pass
        except asyncio.CancelledError:
            if not carrier.gone and not self.stopping:
                raise  # the peer has ended the call
        finally:
            carrier.end()
            self.carriers.discard(carrier)

    # The door

    async def _admit(self, carrier: Carrier) -> Session | None:
        """The session that this connection carries from now on; None for a peer that was refused, or left."""
        contract = self.engine.contract
        door = CloudSession(contract.plan, contract.shape, contract.hash)
        try:
            if len(self.carriers) > self.limits.connections:
                return await self._refuse(
                    carrier, door, "FULL", f"{self.limits.connections} connections are open, the most that are served"
                )
            if self.stopping:
                return await self._refuse(carrier, door, "STOPPING", STOPPING)
            carrier.due = time.monotonic() + self.limits.hello_seconds
            greeting = door.receive(await carrier.read())
            carrier.due = None
            if not isinstance(greeting, Greeting):  # it gave up before it began
                return None
            return await (self._take_up if greeting.session else self._open)(carrier, door, greeting)
        except RemoteProtocolError as error:
            log.info("connection refused: %s", error.code)
            return await self._refuse(carrier, door, error.code, str(error), error.retry_after_millis if isinstance(error, Refusal) else 0)
        except asyncio.CancelledError:
            if carrier.due is None or time.monotonic() < carrier.due:
                if self.stopping:
                    return await self._refuse(carrier, door, "STOPPING", STOPPING)
                raise
            return await self._refuse(carrier, door, "EXPIRED", f"no frame for {self.limits.hello_seconds:g} s; begin a new session")

    async def _open(self, carrier: Carrier, door: CloudSession, greeting: Greeting) -> Session | None:
        """Admission: a KV slot, before any work."""
        slot = await self.room.admit(carrier.user)
        terms = Terms(
            greeting.precision,
            self.engine.pool.context_tokens,
            self.engine.step_tokens,
            int(self.limits.idle_seconds * 1000),
            os.urandom(SESSION_BYTES),
            int(self.limits.lease_seconds * 1000) if greeting.resume else 0,
            WINDOW if greeting.resume else 1,
        )
        welcome = door.welcome(terms)
        session = self.sessions[terms.session] = Session(self, door, slot, carrier, greeting.alone)
        self.room.enter(session)
        try:
            await session.greet(carrier, welcome)
        except BaseException:
            session.end("INTERNAL", "the welcome was not taken")  # nobody knows its id
            raise
        return session

    async def _take_up(self, carrier: Carrier, door: CloudSession, greeting: Greeting) -> Session | None:
        session = self.sessions.get(greeting.session)
        if session is None:  # never was, or is over: whoever guesses ids learns nothing
            return await self._refuse(carrier, door, "EXPIRED", "no such session; begin a new one")
        await session.take_up(carrier, greeting)
        return session

    async def _refuse(self, carrier: Carrier, door: CloudSession, code: str, detail: str, retry_after_millis: int = 0) -> None:
        if door.state is State.OVER:
            return
        try:
            await carrier.write(door.fault(code, detail, retry_after_millis), 1.0)
        except Gone:
            pass

    # The house

    def release(self, session: Session) -> None:
        """It is over: nobody waits for its device any more, and others may have its room."""
        terms = session.machine.terms
        if terms is not None and self.sessions.pop(terms.session, None) is not None:
            self.scheduler.forget(session.pace)
            self.room.leave(session)

    async def watch(self) -> None:
        """Ends what is past its time; runs as long as the server."""
        trimmed_at, trimmed_batches = time.monotonic(), 0
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if now - trimmed_at > TRIM_SECONDS and self.scheduler.counters.batches > trimmed_batches:
                trimmed_at, trimmed_batches = now, self.scheduler.counters.batches
                self.worker.submit(give_back)
            for carrier in list(self.carriers):
                if carrier.due is not None and now > carrier.due:
                    carrier.late()
            for session in list(self.sessions.values()):
                if session.lost_at is not None and now - session.lost_at > self.limits.lease_seconds:
                    session.end("EXPIRED", f"no connection for {self.limits.lease_seconds:g} s, its lease; begin a new session")
                elif not session.computing and now - session.idle_since > self.limits.idle_seconds:
                    what = f"no frame for {self.limits.idle_seconds:g} s, the most that is allowed here; begin a new session"
                    session.end("EXPIRED", what)

    async def stop(self, grace_seconds: float) -> None:
        """No new sessions; idle ones end now, running steps may finish within the grace."""
        self.stopping = True
        for session in list(self.sessions.values()):
            if session.lost_at is not None:
                session.end("STOPPING", STOPPING)
            else:
                session.nudge()
        deadline = asyncio.get_running_loop().time() + grace_seconds
        while self.sessions and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        for session in list(self.sessions.values()):
            session.end("STOPPING", STOPPING)
        for carrier in list(self.carriers):
            if not carrier.gone:  # else its handler is on its way out, behind a last word
                carrier.task.cancel()
        if tasks := [*(session.task for session in self.sessions.values()), *(carrier.task for carrier in self.carriers)]:
            await asyncio.wait(tasks, timeout=1.0)

    def close(self) -> None:
        self.worker.shutdown(wait=True)
