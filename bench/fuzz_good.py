"""The one device that keeps the rules, in a house full of others: whatever these do, it is told what it is told when it is alone."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any

from plora.cloud_server.config import Limits
from plora.cloud_server.quota import Quota
from plora.cloud_server.service import Service
from plora.protocol import DeviceSession
from plora.protocol.events import ClosedDone, CompressedArrived, Event, Opened, PongArrived, StepDone

from .fuzz_frames import HIDDEN, Found, Setting, check, values
from .fuzz_world import Call, CheapEngine, Loop, Worker, run, world

LEASE_SECONDS, IDLE_SECONDS, HELLO_SECONDS, WRITE_SECONDS, QUIET_SECONDS = 2.0, 4.0, 1.0, 1.0, 1.0
BUSY_SECONDS, THINK_SECONDS = 0.02, 0.4
"""Between its acts, while others do things and while they wait: it is never quiet for long enough to be sent away (QUIET_SECONDS)."""
CROWDED, RATIONED, ROOMY = range(3)
"""More devices than slots; a quota for each user, and hardly more blocks than they may have together; room for all."""


def limits(mode: int, block_bytes: int) -> Limits:
    quota = Quota(3, 4 * block_bytes) if mode == RATIONED else Quota()
    return Limits(HELLO_SECONDS, IDLE_SECONDS, WRITE_SECONDS, LEASE_SECONDS, QUIET_SECONDS, 8, quota=quota)


def engine_for(own: Setting, mode: int) -> CheapEngine:
    slots, blocks = {CROWDED: (4, 12), RATIONED: (14, 14), ROOMY: (12, 36)}[mode]
    return CheapEngine(own, slots, blocks)


Act = tuple[Any, ...]
SCRIPT: tuple[Act, ...] = (
    ("feed", 0, (20, 1)),
    ("feed", 20, (1, 1)),
    ("cut",),
    ("feed", 21, (30, 0), (30, 0), (2, 2)),
    ("ping",),
    ("feed", 80, (1, 1), (1, 1)),
    ("cancel", 82, 5),
    ("feed", 82, (3, 3)),
    ("cut",),
    ("truncate", 50),
    ("feed", 50, (40, 0), (40, 1), (17, 17)),
    ("feed", 140, (1, 1)),
)
"""feed: position, and (tokens, exit rows) of steps that go one behind the other; cancel: of a step of so many tokens that has just
begun."""


class Good:
    """A device that keeps the rules, over and over in one session. Raises Found if it is refused, kept waiting, or told another thing than
    when it is alone (`expected`, None to learn it)."""

    def __init__(self, loop: Loop, service: Service, own: Setting, cuts: bool, expected: list[bytes] | None) -> None:
        self.loop, self.service, self.own, self.cuts = loop, service, own, cuts
        self.expected = expected
        self.machine = DeviceSession(own.plan, own.shape, own.hash, own.precision)
        self.told: list[bytes] = []
        self.rounds = 0
        self.stopping = False
        self.unopened = True
        self.pause_seconds = BUSY_SECONDS

    async def live(self) -> None:
        async with asyncio.timeout(600):
            self._connect()
            self.call.say(self.machine.hello())
            check(isinstance(await self._event(), Opened), "who keeps the rules is let in")
            self.unopened = False
            while not self.stopping:
                self.told.clear()
                self.first = self.machine.step
                await self._round()
                self.rounds += 1
            self.call.say(self.machine.close())
            check(isinstance(await self._event(), ClosedDone), "a close is answered")
            check(await self.call.next() is None, "and the stream is ended")

    async def _round(self) -> None:
        for act in SCRIPT:
            await getattr(self, f"_{act[0]}")(*act[1:])
            check(self.expected is None or self.told == self.expected[: len(self.told)], "who keeps the rules gets what is right")
            if self.stopping and self.expected is not None:
                return
            await asyncio.sleep(self.pause_seconds)

    def _connect(self) -> None:
        self.call = Call(self.loop, "10.0.0.1", self.service.exchange)

    async def _event(self) -> Event:
        try:
            async with asyncio.timeout(20):
                data = await self.call.next()
        except TimeoutError:
            raise Found("who keeps the rules is kept waiting") from None
        if data is None:
            raise Found("who keeps the rules is cut off")
        try:
            return self.machine.receive(data)
        except Exception as error:
            raise Found(f"who keeps the rules is refused: {error}") from None

    def _entry(self, position: int, tokens: int, exit_rows: int) -> None:
        held = self.own.plan.entry_exchange
        injection = values(tokens, held.injection_columns, position) if held else None
        self.call.say(self.machine.entry(values(tokens, HIDDEN, position), exit_rows, injection, position))

    async def _feed(self, position: int, *steps: tuple[int, int]) -> None:
        left = len(steps)
        todo = list(steps)
        window = 2 if self.machine.terms is not None and self.machine.terms.window > 1 else 1
        while left:
            while todo and len(self.machine.steps) < window:
                self._entry(position, *todo[0])
                position += todo.pop(0)[0]
            event = await self._event()
            if isinstance(event, CompressedArrived):
                self._note(event.step, event.exchange.index, event.values)
                injection = values(len(event.values), event.exchange.injection_columns, (event.step - self.first) % 3)
                self.call.say(self.machine.injections(injection, event.step))
            elif isinstance(event, StepDone):
                self._note(event.step, -1, event.hidden)
                left -= 1

    def _note(self, step: int, exchange: int, got: Any) -> None:
        self.told.append(bytes([step - self.first, exchange % 256]) + got.tobytes())

    async def _cancel(self, position: int, tokens: int) -> None:
        self._entry(position, tokens, 1)
        self.call.say(self.machine.cancel())
        while self.machine.state == "cancelling":
            await self._event()
        check(self.machine.length == position, "a cancel leaves what was there")

    async def _truncate(self, length: int) -> None:
        self.call.say(self.machine.truncate(length))

    async def _ping(self) -> None:
        self.call.say(self.machine.ping(7, 3, 5))
        check(isinstance(await self._event(), PongArrived), "a ping is answered")

    async def _cut(self) -> None:
        """Another connection; the old one is noticed to be gone, or not."""
        if not self.cuts or self.machine.terms is None or not self.machine.terms.lease_millis:
            return
        if self.rounds % 2:
            self.call.hang_up()
        self._connect()
        self.call.say(self.machine.hello_again())
        async with asyncio.timeout(20):
            data = await self.call.next()
        check(data is not None, "who keeps the rules is taken up again")
        assert data is not None
        try:
            for frame in self.machine.welcomed_back(data):
                self.call.say(frame)
        except Exception as error:
            raise Found(f"who keeps the rules is not taken up again: {error}") from None


@cache
def undisturbed(own: Setting) -> list[bytes]:
    """What the one that keeps the rules is told in one round, alone in the house."""

    async def alone(loop: Loop) -> list[bytes]:
        service = Service(engine_for(own, ROOMY), limits(ROOMY, 0), Worker(loop, lambda: 0.0))  # type: ignore[arg-type]
        good = Good(loop, service, own, False, None)
        living = asyncio.create_task(good.live())
        await asyncio.sleep(BUSY_SECONDS)
        good.stopping = True
        await living
        await asyncio.sleep(0.1)
        return good.told

    with world() as loop:
        return run(loop, alone(loop))
