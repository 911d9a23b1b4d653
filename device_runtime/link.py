"""A session's frames over one connection after another: heartbeats, reconnection, and what was on its way sent again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ..artifact.errors import PloraError, QuotaReached, RemoteProtocolError, ServerFull, ServerStopping, SessionExpired, Unreachable
from ..protocol.events import Event, Opened, PongArrived, Terms
from ..protocol.roles import DeviceSession
from .pace import BEAT_SECONDS, QUIET_SECONDS, RoundTrip, pause_seconds
from .transport import Deadlines, Interrupted, Transport

T = TypeVar("T")
MOST_ATTEMPTS = 16
"""Connections tried at a time: one that was begun in a dead spot may never answer, so new ones are begun beside it, and the oldest is
given up. It takes two round trips to come about, and a network that has changed may have ten times the delay of the one before."""
GREETING_SECONDS = 0.5
"""For a cloud to welcome a session back, beyond what a ping is given: it may be starting a step."""
CONNECTED, RECONNECTING, REPLAYING = "connected", "reconnecting", "replaying"
"""What `on_state` is told."""


class Link:
    """Drives one machine's connections. Not for two tasks at a time. bytes_up, bytes_down: of frames, without gRPC's own framing."""

    def __init__(
        self,
        address: str,
        deadlines: Deadlines,
        new_machine: Callable[[], DeviceSession],
        on_state: Callable[[str], None],
        carrier: Callable[[str, Deadlines], Transport] = Transport,
    ) -> None:
        """carrier: makes a connection, not open yet; `partial(Transport, access=…)` for a cloud that asks who one is."""
        self.address = address
        self.deadlines = deadlines
        self.on_state = on_state
        self.carrier = carrier
        self.new_machine = new_machine
        self.machine = new_machine()
        self.transport: Transport | None = None
        self.round_trip = RoundTrip()
        self.bytes_up = 0
        self.bytes_down = 0
        self.reconnections = 0
        self.pings = 0
        self.state = CONNECTED
        self.interrupted = False
        self._random = random.Random()
        self._waiting_since: float | None = None
        self._pings: dict[int, float] = {}
        self._ping = 0
        self._alarms = 0
        self._suspected_at = 0.0
        self._beating: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._rescue: asyncio.Task[Transport] | None = None
        self._discarding: set[asyncio.Task[None]] = set()
        self._opening: asyncio.Task[object] | None = None
        self._trying: asyncio.Task[object] | None = None
        self._distrust: PloraError | None = None  # of an attempt that met somebody else than our cloud, or a file of ours that is gone

    # Opening

    async def open(self) -> Terms:
        """A first session: one attempt, so that a wrong address is known at once. Raises Unreachable, Refused's children."""
        transport = self.carrier(self.address, self.deadlines)
        self._opening = asyncio.current_task()
        try:
            await transport.connect()
            return await self._begin(transport, self.deadlines.step_seconds)
        except TimeoutError:
            await transport.close()
            raise Unreachable(f"{self.address}: connected, but no welcome within {self.deadlines.step_seconds:g} s") from None
        except BaseException:
            await transport.close()
            raise
        finally:
            self._opening = None

    async def reopen(self, why: str) -> Terms:
        """Another session in place of one that is lost, and why it is; tries until give_up_seconds."""
        await self._leave()
        terms = await self._persist(self._begin, f"{self.address}: {why}", time.monotonic())
        self.reconnections += 1
        return terms

    async def _begin(self, transport: Transport, seconds: float) -> Terms:
        began = time.monotonic()
        machine = self.new_machine()
        hello = machine.hello()
        self.bytes_up += len(hello)
        async with asyncio.timeout(seconds):
            await transport.send(hello)
            event = self._read(machine, await transport.receive())
        assert isinstance(event, Opened)  # the machine lets nothing else through
        self.round_trip.observe(time.monotonic() - began)
        self.machine, self.transport = machine, transport
        self._start()
        return event.terms

    @property
    def lost(self) -> bool:
        """Whether the connection is known to have ended."""
        return self.transport is None or self.transport.ended is not None

    # Frames

    async def send(self, data: bytes) -> None:
        """On a broken link a numbered frame waits in the machine's outbox, and goes once there is a connection."""
        assert self.transport is not None
        self.bytes_up += len(data)
        self._waiting_since = time.monotonic()  # a link that fell silent takes no more than its buffers hold
        try:
            await self.transport.send(data)
        finally:
            self._waiting_since = None

    async def receive(self) -> Event:
        """The session's next event, over this connection or a later one. Raises Interrupted; Unreachable once given up; SessionExpired
        if the session is lost and must be begun anew; other errors of a fault; RemoteProtocolError after having told the cloud."""
        assert self.transport is not None
        try:
            while True:
                self._waiting_since = time.monotonic()
                try:
                    data = await self.transport.receive()
                except Unreachable as error:
                    await self._reconnect(error)
                    continue
                try:
                    event = self._read(self.machine, data)
                except RemoteProtocolError as error:
                    await self.send(self.machine.abort(error.code))
                    raise RemoteProtocolError(f"the cloud broke the protocol: {error}", error.code) from None
                if isinstance(event, PongArrived):
                    self._on_pong(event)
                    continue
                self._alarms = 0
                return event
        finally:
            self._waiting_since = None

    def _read(self, machine: DeviceSession, data: bytes) -> Event:
        self.bytes_down += len(data)
        return machine.receive(data)

    def interrupt(self) -> None:
        """Makes `receive` raise Interrupted, now or when it is next called. Cancels `open`: there is no session yet to be kept."""
        if self._opening is not None:
            self._opening.cancel()
        elif self._trying is not None:
            self.interrupted = True
            self._trying.cancel()
        elif self.transport is not None:
            self.transport.interrupt()

    # Heartbeats

    def _start(self) -> None:
        self._pings.clear()
        self.say(CONNECTED)
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())

    async def _beat(self) -> None:
        """While the cloud owes us a frame: asks whether it is there, and tries for another connection if it does not say so."""
        while True:
            if self._rescue is None or self._rescue.done():
                await asyncio.sleep(BEAT_SECONDS)
            else:
                await asyncio.wait([self._rescue], timeout=BEAT_SECONDS)
            waiting, transport, machine = self._waiting_since, self.transport, self.machine
            leased = machine.live and machine.terms is not None and machine.terms.lease_millis > 0
            if waiting is None or transport is None or self._trying is not None or not leased:
                continue
            now = time.monotonic()
            heard = max(waiting, transport.heard_at)
            if self._rescue is not None:
                if transport.heard_at > self._suspected_at:  # it was only slow
                    self._drop_rescue()
                    self._alarms += 1
                    self.say(CONNECTED)
                elif self._rescue.done():
                    self._alarms += 1  # it may have been slow, no more: then the next one is given longer
                    transport.fail("no answer, while a new connection has one")
                elif now - self._suspected_at > self.deadlines.give_up_seconds:
                    transport.fail("no answer")
            elif now - heard > QUIET_SECONDS:
                oldest = min(self._pings.values(), default=None)
                if oldest is None:
                    self._ask(transport, machine)
                elif now - max(oldest, heard) > self.round_trip.patience_seconds(machine.outbox.kept_bytes, self._alarms):
                    self._suspected_at = now
                    self.say(RECONNECTING)
                    self._rescue = asyncio.create_task(self._first_ready(now))

    def _ask(self, transport: Transport, machine: DeviceSession) -> None:
        """Sends a ping; `receive` notes when its pong comes. It may have to wait behind a frame for which there is no way."""
        self._ping = (self._ping + 1) % 2**32
        self.pings += 1
        self._pings[self._ping] = time.monotonic()
        frame = machine.ping(self._ping)
        self.bytes_up += len(frame)
        self._asking = asyncio.create_task(transport.send(frame))

    def _on_pong(self, pong: PongArrived) -> None:
        sent = self._pings.pop(pong.id, None)
        if sent is not None:
            self.round_trip.observe(time.monotonic() - sent)

    def _drop_rescue(self) -> None:
        """What may come of it is not wanted any more."""
        if self._rescue is not None:
            task = asyncio.create_task(_discard(self._rescue))
            self._discarding.add(task)
            task.add_done_callback(self._discarding.discard)
            self._rescue = None

    # Reconnection

    async def _reconnect(self, error: Unreachable) -> None:
        """Takes the session up over another connection. Raises SessionExpired if it is lost, Unreachable once given up."""
        machine = self.machine
        assert self.transport is not None
        await self.transport.close()
        terms = machine.terms
        if not machine.live or terms is None:
            raise error
        if not terms.lease_millis:
            raise SessionExpired(f"{error}; this cloud keeps no session without its connection")
        began = time.monotonic() if self._rescue is None else self._suspected_at
        lacking = await self._persist(self._go_on, str(error), began)
        self.reconnections += 1
        for frame in lacking:  # only now: it may take long, and is watched over as any other sending
            await self.send(frame)

    async def _go_on(self, transport: Transport, seconds: float) -> list[bytes]:
        """The frames that the cloud lacks."""
        began = time.monotonic()
        hello = self.machine.hello_again()
        self.bytes_up += len(hello)
        async with asyncio.timeout(seconds):
            await transport.send(hello)
            data = await transport.receive()
        self.bytes_down += len(data)
        lacking = self.machine.welcomed_back(data)
        self.round_trip.observe(time.monotonic() - began)
        self.transport = transport
        self._start()
        return lacking

    async def _persist(self, greet: Callable[[Transport, float], Awaitable[T]], why: str, began: float) -> T:
        """Connects and greets until it works. A cloud that is full or stopping is asked again, too. Raises Unreachable once given up,
        give_up_seconds after `began`."""
        if self.transport is not None and self.transport.interrupted:  # nobody reads this connection any more
            self.transport.interrupted = False
            raise Interrupted
        self.say(RECONNECTING)
        self._distrust = None
        self._trying = asyncio.current_task()
        unanswered = 0
        try:
            while True:
                left = began + self.deadlines.give_up_seconds - time.monotonic()
                try:
                    async with asyncio.timeout(left):
                        transport = await self._next_connection(began)
                except TimeoutError:
                    kind, why = (Unreachable, why) if self._distrust is None else (type(self._distrust), str(self._distrust))
                    raise kind(f"{why}; tried for {self.deadlines.give_up_seconds:g} s to go on") from None
                pause = 0.0
                try:
                    return await greet(transport, GREETING_SECONDS + self.round_trip.patience_seconds(0, unanswered))
                except (Unreachable, TimeoutError):
                    unanswered += 1
                except (ServerFull, ServerStopping, QuotaReached) as refusal:
                    why, pause = str(refusal), self._pause_seconds(began) + refusal.retry_after_millis / 4000
                except BaseException:
                    await transport.close()
                    raise
                await transport.close()
                left = began + self.deadlines.give_up_seconds - time.monotonic()
                await asyncio.sleep(max(0.0, min(pause, left)))  # the cloud may name any time: we do not wait beyond our own
        except asyncio.CancelledError:
            if self.interrupted and self._trying is not None:
                self.interrupted = False
                self._trying.uncancel()
                raise Interrupted from None
            raise
        finally:
            self._trying = None
            self._drop_rescue()

    async def _next_connection(self, began: float) -> Transport:
        self._rescue = self._rescue or asyncio.create_task(self._first_ready(began))
        await asyncio.wait([self._rescue])  # if we are cancelled, `_drop_rescue` sees to it
        rescue, self._rescue = self._rescue, None
        return rescue.result()

    async def _first_ready(self, began: float) -> Transport:
        """The first connection that comes about, of several begun one after another."""
        attempts: dict[asyncio.Task[None], Transport] = {}
        try:
            while True:
                transport = self.carrier(self.address, self.deadlines)
                attempts[asyncio.create_task(transport.connect(self.deadlines.give_up_seconds))] = transport
                if len(attempts) > MOST_ATTEMPTS:
                    await _forget(*next(iter(attempts.items())))
                    del attempts[next(iter(attempts))]
                until = time.monotonic() + self._pause_seconds(began)
                while attempts and (left := until - time.monotonic()) > 0:
                    done, _ = await asyncio.wait(attempts, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        transport = attempts.pop(task)
                        if (error := task.exception()) is None:
                            return transport
                        if isinstance(error, PloraError) and type(error) is not Unreachable:
                            self._distrust = error
                        await transport.close()
                if not attempts and (left := until - time.monotonic()) > 0:
                    await asyncio.sleep(left)
        finally:
            for task, transport in attempts.items():
                await _forget(task, transport)

    def _pause_seconds(self, began: float) -> float:
        return pause_seconds(time.monotonic() - began, self.round_trip.smoothed, self._random)

    def say(self, state: str) -> None:
        if state != self.state:
            self.state = state
            self.on_state(state)

    # The end

    async def _leave(self) -> None:
        self._drop_rescue()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait([self._beating])
            self._beating = None
        if self.transport is not None:
            await self.transport.close()
        if ending := self._discarding | ({self._asking} if self._asking is not None else set()):
            await asyncio.wait(ending)

    async def close(self) -> None:
        """Ends whatever connection there is. Safe to call in any state, and twice."""
        await self._leave()


async def _forget(task: asyncio.Task[None], transport: Transport) -> None:
    """Ends an attempt to connect."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # has been seen
    await transport.close()


async def _discard(rescue: asyncio.Task[Transport]) -> None:
    rescue.cancel()
    await asyncio.wait([rescue])
    if not rescue.cancelled():
        await rescue.result().close()
