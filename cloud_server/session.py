"""One session: its machine, its slot of the KV cache, its steps in flight. It outlives the connections that carry it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from ..artifact.errors import NotFinite, PloraError, RemoteProtocolError
from ..protocol.events import Aborted, CancelAsked, CloseAsked, Event, Greeting, InjectionsArrived, PingArrived, StepBegun, Truncated
from ..protocol.roles import CloudSession
from ..protocol.states import State
from .allowance import Bucket
from .carrier import Carrier, Gone
from .engine import Row
from .logs import event, session_name
from .quota import Refusal
from .scheduler import SHORT_TOKENS, Pace

if TYPE_CHECKING:
    from .service import Service

log = logging.getLogger("plora.cloud")

PONG_BYTES, PONG_SECONDS = 32 << 20, 8.0
"""Of pongs that one session may have at once, and until it may have as many again: the doctor's probes take a quarter of them."""

STOPPING = "the server is shutting down; connect to another one, or again later"


class Session:
    """Runs as a task of its own: a connection that breaks must not stop a step half-way. Whoever has the session id may go on with it
    over another connection, for as long as its lease runs (`lost_at` says since when it has none)."""

    def __init__(self, service: Service, machine: CloudSession, slot: int, carrier: Carrier, alone: bool = False) -> None:
        self.service = service
        self.machine = machine
        self.slot = slot
        self.owner = carrier.user
        self.user = carrier.user.name
        self.name = session_name(machine.terms.session) if machine.terms is not None else ""
        self.over, self.why = "closed", ""
        self.tokens = 0
        self.alone = alone
        self.pace = Pace()
        self.steps: dict[int, Row] = {}
        self._began: dict[int, float] = {}
        self._pongs = Bucket(PONG_BYTES, PONG_SECONDS, time.monotonic())
        self.carrier: Carrier | None = carrier
        self.lost_at: float | None = None
        self.heard_at = self.acted_at = time.monotonic()  # any frame, and any but a ping
        self.computing = False
        self._writing = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None
        self._ending: tuple[str, str] | None = None
        carrier.wake = self._wake
        carrier.session = self
        self.task = asyncio.create_task(self._run())

    @property
    def leased(self) -> bool:
        return self.machine.terms is not None and self.machine.terms.lease_millis > 0

    @property
    def quiet_at(self) -> float | None:
        """Since when it waits for its device; None while it works."""
        return None if self.computing or (self.carrier is not None and self.carrier.inbox) else self.acted_at

    @property
    def idle_since(self) -> float:
        """Pings keep a session between steps, but not one that owes us an answer."""
        return self.heard_at if self.machine.state is State.READY else self.acted_at

    # Connections

    async def greet(self, carrier: Carrier, welcome: bytes) -> None:
        """The first frame of all. Raises Gone."""
        async with self._writing:  # a server that stops in this moment has something to say, too
            await carrier.write(welcome, self.service.limits.write_seconds)

    async def take_up(self, carrier: Carrier, greeting: Greeting) -> None:
        """Goes on over another connection: what the device lacks is sent again. Raises RemoteProtocolError, and then nothing changed."""
        welcome, *lacking = self.machine.welcome_back(greeting)
        self._leave()  # its frames are void: the device sends again what we have not received
        carrier.next_frame = self.machine.outbox.sent + 1 - len(lacking)
        carrier.wake = self._wake
        carrier.session = self
        event(log, logging.INFO, "session taken up again", session=self.name, frames_sent_again=len(lacking))
        async with self._writing:
            self._leave()  # one that came in between
            if not self.machine.live:
                raise RemoteProtocolError("no such session; begin a new one", "EXPIRED")
            self.owner = carrier.user  # the same one, maybe with a newer token
            self.heard_at = self.acted_at = time.monotonic()
            self.lost_at = None
            self.carrier = carrier
            try:
                await carrier.write(welcome, self.service.limits.write_seconds)
            except Gone:
                carrier.end()
        await self._flush()
        self._wake()

    def _leave(self) -> None:
        """Ends the connection that there is, if any; its lease runs from now on."""
        carrier, self.carrier = self.carrier, None
        if carrier is not None:
            carrier.drop()
            carrier.discard()
            self.lost_at = time.monotonic()

    async def ping(self, data: bytes) -> None:
        """Answers at once, whatever the engine does."""
        try:
            arrived = self.machine.receive(data)
        except RemoteProtocolError as error:
            self.end(error.code, str(error))
            return
        if isinstance(arrived, PingArrived):
            await self._pongs.spend(len(arrived.answer))  # a ping of 20 bytes may ask for a megabyte
            await self._say(arrived.answer)

    async def _say(self, data: bytes) -> None:
        """A frame that belongs to this connection alone."""
        async with self._writing:
            if (carrier := self.carrier) is not None:
                try:
                    await carrier.write(data, self.service.limits.write_seconds)
                except Gone:
                    carrier.end()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _receive(self) -> bytes:
        """The next frame, over this connection or a later one. Raises Gone if there will be none."""
        while True:
            if self.carrier is not None and self.carrier.inbox:
                return self.carrier.pop()
            if self.carrier is not None and self.carrier.gone:
                if not self.leased:
                    raise Gone
                self.carrier, self.lost_at = None, time.monotonic()
                event(log, logging.INFO, "connection lost, the session waits", session=self.name)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
            self._waiter = None

    async def _write(self, data: bytes) -> None:
        """Sends the frame that the machine has just made, or keeps it for the next connection."""
        if self.leased:
            await self._flush()
        else:
            await self._say(data)

    async def _flush(self) -> None:
        """All numbered frames that this connection has not carried yet, in order."""
        async with self._writing:
            while (carrier := self.carrier) is not None and (frame := self.machine.outbox.frame(carrier.next_frame)) is not None:
                try:
                    await carrier.write(frame, self.service.limits.write_seconds)
                except Gone:
                    carrier.end()
                    return
                carrier.next_frame += 1

    # Life

    async def _run(self) -> None:
        """Until the session is over, whoever ends it. Never raises for what a peer does."""
        try:
            while self.machine.state is not State.OVER:
                await self._handle(self.machine.receive(await self._receive()))
        except RemoteProtocolError as error:
            await self._fault(error.code, str(error), error.retry_after_millis if isinstance(error, Refusal) else 0)
        except Gone:
            self.over = "lost"
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            await self._fault(*self._ending)
        except NotFinite as error:
            await self._fault("BAD_TENSOR", f"what the device sent makes values that are not finite: {error}")
        except PloraError as error:
            event(log, logging.ERROR, "session failed", session=self.name, error=type(error).__name__)
            await self._fault("INTERNAL", f"{type(error).__name__}: {error}")
        except Exception as error:  # whatever it was, the session ends by name and the others go on
            log.exception("session failed", extra={"fields": {"session": self.name}})
            await self._fault("INTERNAL", type(error).__name__)
        finally:
            self.service.release(self)
            if self.carrier is not None:
                self.carrier.end()
                self.carrier.discard()
                self.carrier.task.cancel()  # its handler reads no more

    def end(self, code: str, detail: str) -> None:
        """Ends the session from outside, by name; a step that runs is not waited for."""
        if self._ending is None:
            self._ending, self.why = (code, detail), detail
            asyncio.get_running_loop().call_soon(self.task.cancel)  # behind its first step: it has to release what it holds

    def nudge(self) -> None:
        """The server stops: a session that waits for its device between steps ends now."""
        if self.machine.state is State.READY and not self.computing:
            self.end("STOPPING", STOPPING)

    async def _fault(self, code: str, detail: str, retry_after_millis: int = 0) -> None:
        """Says why the session is over, if anyone is still there to hear it, and for a moment only."""
        self.over = code
        if self.machine.state is State.OVER:
            return
        frame = self.machine.fault(code, detail, retry_after_millis)
        try:
            async with asyncio.timeout(1.0):
                await self._say(frame)
        except TimeoutError:
            pass

    # Steps

    async def _handle(self, arrived: Event) -> None:
        engine = self.service.engine
        match arrived:
            case StepBegun():
                self.computing = True  # or at least about to
                self._began[arrived.step] = time.monotonic()
                await self.service.allowances.compute(self.user, len(arrived.hidden))
                await self.service.room.grow(self, arrived.position + len(arrived.hidden))
                row = engine.begin(self.slot, arrived.position, arrived.hidden, arrived.injection, arrived.exit_rows, self.alone)
                self.steps[arrived.step] = row
                await self._advance(arrived.step)
            case InjectionsArrived():
                engine.inject(self.steps[arrived.step], arrived.exchange.index, arrived.values)
                await self._advance(arrived.step)
            case CancelAsked():
                self.service.scheduler.forget(self.pace)
                self.steps = {number: row for number, row in self.steps.items() if number < arrived.step}
                self._began = {number: began for number, began in self._began.items() if number < arrived.step}
                await self._write(self.machine.cancelled())
            case CloseAsked():
                await self._write(self.machine.closed())
            case Aborted(code):
                self.over = f"device: {code}"
            case Truncated():
                pass
            case _:
                raise AssertionError(f"the machine let {arrived} through")

    async def _advance(self, number: int) -> None:
        """Walks a step on to where it needs the device again."""
        row = self.steps[number]
        leg = self.service.engine.legs[row.leg]
        began, metrics = time.monotonic(), self.service.metrics
        self.computing = True
        try:
            await self.service.scheduler.go(row, self.pace)
        finally:
            self.computing = False
            self.heard_at = self.acted_at = time.monotonic()  # the device could not know more
        assert row.result is not None  # it went the whole leg
        if leg.exchange is not None:
            await self._write(self.machine.compressed(row.result, number))
            self.service.scheduler.meanwhile(row, self.pace)
        else:
            del self.steps[number]
            await self._write(self.machine.exit(row.result, int(row.seconds * 1e6)))
            seconds = time.monotonic() - self._began.pop(number, began)
            metrics.step_seconds.observe(seconds)
            self.service.on_step(seconds, row.count, row.seconds, self.name)
            metrics.tokens.labels("decode" if row.count <= SHORT_TOKENS else "prompt").inc(row.count)
            self.tokens += row.count
        metrics.exchange_seconds.observe(time.monotonic() - began)
