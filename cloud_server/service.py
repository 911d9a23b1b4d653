"""The door and the house: who comes in on a stream, which session it carries, and when its time is over."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from concurrent.futures import Executor
from typing import Any

import grpc

from ..artifact.errors import RemoteProtocolError
from ..artifact.memory import give_back
from ..protocol.events import Greeting, Terms
from ..protocol.limits import SESSION_BYTES, WINDOW
from ..protocol.roles import CloudSession
from ..protocol.session import is_ping
from ..protocol.states import State
from .access import Denied, Guard
from .allowance import Allowances
from .carrier import Carrier, Gone, Intake
from .config import Limits
from .engine import Engine
from .logs import event
from .metrics import Metrics
from .quota import Refusal
from .room import Room
from .scheduler import Scheduler, engine_thread
from .session import STOPPING, Session
from .tracing import step_spans

log = logging.getLogger("plora.cloud")

WATCH_SECONDS = 0.25
"""How often deadlines are looked at. One watch for all connections: a timer per frame would be felt in every exchange."""

LAST_WORD_SECONDS = 2.0
"""For sessions that are told to move to have told their devices: each gives its own a second."""

REFRESH_SECONDS = 2.0
"""How often the token file is looked at."""

PAUSE_SECONDS = 2.0
"""Of a device between two steps of one answer, at most: one that is quiet for longer has its answer, and may be told to move."""

DENIED_HOSTS = 1000
"""Whose calls without a token are told apart."""

FULL_MILLIS = 5000
"""After which somebody may have left: nobody knows."""

TRIM_SECONDS = 2.0
"""How often the allocator is asked to give freed memory back to the system while anybody is there: prompts come in frames of a megabyte,
and holes of that size would stay; those who send frames that are refused leave them, too."""


class Service:
    """Serves sessions on one engine, which computes on `worker`'s thread (`engine_thread`). `stop` refuses new ones, lets running steps
    finish, and ends the rest."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        worker: Executor | None = None,
        *,
        guard: Guard | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.engine = engine
        self.limits = limits
        self.guard = Guard(None, limits.quota) if guard is None else guard
        self.metrics = Metrics() if metrics is None else metrics
        self.metrics.watch(self._figures)
        self.on_step = step_spans()
        self.allowances = Allowances(self.guard.quota_of)
        self.intake = Intake(limits.inbox_bytes)
        self.ready = False
        self.stopping = False
        self.carriers: set[Carrier] = set()
        self.sessions: dict[bytes, Session] = {}
        self.worker = engine_thread() if worker is None else worker
        self.scheduler = Scheduler(engine, self.worker, self.metrics.batch)
        self.room = Room(engine.pool, self.guard.quota_of, limits.lease_seconds, limits.quiet_seconds, self.worker)
        self._denied: Counter[str] = Counter()  # calls turned away that the log has not told of, by host

    async def exchange(self, _: Any, context: Any) -> None:
        """The gRPC method's handler: one call of it per stream. It reads; what the session has to say it writes itself."""
        try:
            user = self.guard.user_of(context)
        except Denied as error:  # the gatekeeper has let it pass, and the file has changed since
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
            return
        carrier = Carrier(context, user, self.intake)
        self.carriers.add(carrier)
        try:
            session = await self._admit(carrier)
            while session is not None and not carrier.gone:
                data = await carrier.read()
                await carrier.breathe()
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
                raise Refusal(f"{self.limits.connections} connections are open, the most that are served", "FULL", FULL_MILLIS)
            self._check_connections(carrier)
            if self.stopping:
                return await self._refuse(carrier, door, "STOPPING", STOPPING)
            carrier.due = time.monotonic() + self.limits.hello_seconds
            greeting = door.receive(await carrier.read())
            carrier.due = None
            if not isinstance(greeting, Greeting):  # it gave up before it began
                return None
            return await (self._take_up if greeting.session else self._open)(carrier, door, greeting)
        except RemoteProtocolError as error:
            event(log, logging.INFO, "connection refused", code=error.code, user=carrier.user.name)
            return await self._refuse(carrier, door, error.code, str(error), error.retry_after_millis if isinstance(error, Refusal) else 0)
        except asyncio.CancelledError:
            if carrier.due is None or time.monotonic() < carrier.due:
                if self.stopping:
                    return await self._refuse(carrier, door, "STOPPING", STOPPING)
                raise
            return await self._refuse(carrier, door, "EXPIRED", f"no frame for {self.limits.hello_seconds:g} s; begin a new session")

    def _check_connections(self, carrier: Carrier) -> None:
        """Whether this user may have another connection. Raises Refusal."""
        user = carrier.user.name
        most = self.guard.quota_of(user).connections
        if most and sum(each.user.name == user for each in self.carriers) > most:
            raise Refusal(
                f"{most} connections of this user are open, the most that are allowed; close one, or try again", "QUOTA", FULL_MILLIS
            )
        self.allowances.connect(user)

    async def _open(self, carrier: Carrier, door: CloudSession, greeting: Greeting) -> Session | None:
        """Admission: a KV slot, before any work."""
        slot = await self.room.admit(carrier.user.name)
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
        self.metrics.sessions_opened.inc()
        event(log, logging.INFO, "session opened", session=session.name, user=session.user, resumes=greeting.resume)
        try:
            await session.greet(carrier, welcome)
        except BaseException:
            session.end("INTERNAL", "the welcome was not taken")  # nobody knows its id
            raise
        return session

    async def _take_up(self, carrier: Carrier, door: CloudSession, greeting: Greeting) -> Session | None:
        session = self.sessions.get(greeting.session)
        if session is None or (session.owner.known and session.owner.name != carrier.user.name):
            # Never was, is over, or is somebody else's: whoever guesses ids, or has got hold of one, learns nothing.
            return await self._refuse(carrier, door, "EXPIRED", "no such session; begin a new one")
        await session.take_up(carrier, greeting)
        self.metrics.resumed.inc()
        return session

    async def _refuse(self, carrier: Carrier, door: CloudSession, code: str, detail: str, retry_after_millis: int = 0) -> None:
        if door.state is State.OVER:
            return
        self.metrics.refused.labels(code).inc()
        try:
            await carrier.write(door.fault(code, detail, retry_after_millis), 1.0)
        except Gone:
            pass

    def on_denied(self, peer: str) -> None:
        """A call was turned away for want of a token. The log tells of that now and then, not of each: they may be many."""
        self.metrics.denied.inc()
        host = peer.rpartition(":")[0]
        self._denied[host if host in self._denied or len(self._denied) < DENIED_HOSTS else "others"] += 1

    # The house

    def _figures(self) -> dict[str, tuple[str, float]]:
        """For the metrics, read on another thread: nothing here is walked through."""
        pool = self.engine.pool
        return {
            "plora_ready": ("Whether new sessions are welcome.", self.ready),
            "plora_sessions": ("Open sessions, those without a connection included.", len(self.sessions)),
            "plora_sessions_most": ("Sessions that there is room for.", pool.slots),
            "plora_connections": ("Open streams, those that have not greeted included.", len(self.carriers)),
            "plora_queue_rows": ("Steps that wait for the engine.", sum(map(len, self.scheduler.waiting))),
            "plora_kv_bytes_used": ("KV cache in use, in whole blocks.", pool.held_bytes),
            "plora_kv_bytes_budget": ("KV cache that may be used.", pool.blocks * pool.block_bytes),
            "plora_inbox_bytes": ("Frames that wait for their sessions.", self.intake.held_bytes),
            "plora_received_bytes_total": ("Frames from devices, without gRPC's framing.", self.intake.received_bytes),
            "plora_sent_bytes_total": ("Frames to devices, without gRPC's framing.", self.intake.sent_bytes),
            "plora_engine_seconds_total": ("That the engine worked.", self.scheduler.counters.seconds),
            "plora_evicted_total": ("Sessions sent away to make room.", self.room.evicted),
        }

    def release(self, session: Session) -> None:
        """It is over: nobody waits for its device any more, and others may have its room."""
        terms = session.machine.terms
        if terms is not None and self.sessions.pop(terms.session, None) is not None:
            self.scheduler.forget(session.pace)
            self.room.leave(session)
            self.metrics.sessions_ended.labels(session.over).inc()
            fields = {"session": session.name, "user": session.user, "code": session.over, "why": session.why, "tokens": session.tokens}
            event(log, logging.INFO, "session over", **fields)

    async def watch(self) -> None:
        """Ends what is past its time; runs as long as the server."""
        trimmed_at = refreshed_at = time.monotonic()
        busy = False
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if now - refreshed_at > REFRESH_SECONDS:
                refreshed_at = now
                self._refresh()
            if now - trimmed_at > TRIM_SECONDS and (self.carriers or busy):
                trimmed_at, busy = now, bool(self.carriers)
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

    def _refresh(self) -> None:
        """Takes over a changed token file, and ends what its users may not have any more."""
        self._tell_denied()
        self.guard.refresh()
        for session in list(self.sessions.values()):
            if not self.guard.stands(session.owner):
                session.end("EXPIRED", "the access token is not valid any more")
        for carrier in list(self.carriers):
            if not self.guard.stands(carrier.user) and carrier.session is None:
                carrier.drop()

    def _tell_denied(self) -> None:
        if self._denied:
            most = dict(self._denied.most_common(3))
            event(log, logging.WARNING, "calls without a valid access token", calls=self._denied.total(), most_from=most)
            self._denied.clear()

    async def stop(self, grace_seconds: float, now: asyncio.Event | None = None) -> None:
        """No new sessions. Those that wait for their devices for more than a moment, and those without a connection, are told to move; the
        others may go on with their answers for the grace, and are then told, too. now: once it is set, the grace is over."""
        self.stopping = True
        clock = time.monotonic
        deadline = clock() + grace_seconds
        while self.sessions and clock() < deadline and not (now is not None and now.is_set()):
            for session in list(self.sessions.values()):
                if session.lost_at is not None:
                    session.end("STOPPING", STOPPING)
                elif session.quiet_at is not None and clock() - session.quiet_at > PAUSE_SECONDS:
                    session.nudge()
            await asyncio.sleep(0.02)
        for session in list(self.sessions.values()):
            session.end("STOPPING", STOPPING)
        if telling := [session.task for session in self.sessions.values()]:
            await asyncio.wait(telling, timeout=LAST_WORD_SECONDS)
        for carrier in list(self.carriers):
            if not carrier.gone:  # else its handler is on its way out, behind a last word
                carrier.task.cancel()
        if leaving := [carrier.task for carrier in self.carriers]:
            await asyncio.wait(leaving, timeout=1.0)

    def close(self) -> None:
        self._tell_denied()
        self.worker.shutdown(wait=True)
