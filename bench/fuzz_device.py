"""Fuzz target: a device's stepper, link and transport against a cloud that answers late, wrongly or not at all, over streams that
break."""

from __future__ import annotations

import asyncio
import os
import random
from collections import deque
from typing import Any
from unittest import mock

import grpc
import grpc.aio
import numpy as np

from plora.artifact.errors import LocalProtocolError, NotFinite, PloraError, RemoteProtocolError
from plora.device_runtime.link import Link
from plora.device_runtime.stepper import MOST_SESSIONS, Stepper
from plora.device_runtime.transport import Deadlines, Interrupted, Transport
from plora.protocol import CloudSession, DeviceSession, Terms
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import CancelAsked, CloseAsked, Event, Greeting, InjectionsArrived, PingArrived, StepBegun, Truncated
from plora.protocol.limits import MAX_UNRECEIVED_FRAMES
from plora.protocol.states import State
from plora.protocol.tensors import Floats

from .fuzz_frames import CONTEXT_TOKENS, HIDDEN, STEP_TOKENS, Choices, Found, Setting, any_setting, check, spoil, values
from .fuzz_machines import check_machine
from .fuzz_world import Loop, run, world

DEADLINES = Deadlines(connect_seconds=1.0, step_seconds=4.0, close_seconds=0.5, give_up_seconds=2.0)
MOST_ACTS = 12
FEED_SECONDS = MOST_SESSIONS * ((2 + MOST_ACTS) * DEADLINES.step_seconds + 2 * DEADLINES.give_up_seconds)
"""In which a feed is done or given up, whatever the cloud does: so many sessions, each tried for and refilled, every act of the cloud a
sign of progress."""
READ_AHEAD_FRAMES = 64
"""That a device holds which nobody has looked at: more is a cloud that floods it."""
HONEST = 200
"""Of 256: the cloud does what it should."""


class ToyEdge:
    """Stands in for the edge half: numbers that say whose rows they are."""

    def __init__(self, own: Setting) -> None:
        self.plan, self.shape = own.plan, own.shape

    def embed(self, ids: list[int]) -> Floats:
        return values(64, HIDDEN)[ids]

    def inject(self, exchange: Any, compressed: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.repeat(compressed[:, :1] * np.float32(0.5), exchange.injection_columns, 1)

    def entry_injection(self, exchange: Any, hidden: Floats) -> Floats:
        return np.repeat(hidden[:, :1] * np.float32(0.25), exchange.injection_columns, 1)


def ledger(hidden: Floats, injections: list[Floats]) -> Floats:
    """[T] float32: what the cloud caches of each token."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(hidden.sum(1) + sum(each.sum(1) for each in injections), np.float32)


def exit_of(hidden: Floats, cached: Floats) -> Floats:
    """[T, H]; cached: [all tokens so far]."""
    with np.errstate(over="ignore", invalid="ignore"):
        seen = np.cumsum(cached, dtype=np.float32)[len(cached) - len(hidden) :]
        return np.nan_to_num(hidden * np.float32(0.5) + seen[:, None] * np.float32(0.125), posinf=1, neginf=1)


def expected(own: Setting, ids: list[int]) -> Floats:
    """[T, H] exits of a whole conversation."""
    edge: Any = ToyEdge(own)
    hidden = edge.embed(ids)
    injections = [edge.entry_injection(own.plan.entry_exchange, hidden)] if own.plan.entry_exchange else []
    injections += [edge.inject(exchange, compressed_of(hidden, exchange.compressed_columns)) for exchange in own.plan.exchanges]
    return exit_of(hidden, ledger(hidden, injections))


def compressed_of(hidden: Floats, columns: int) -> Floats:
    return np.repeat(hidden[:, :1] - hidden[:, 1:2], columns, 1)


class Kept:
    """A session of the cloud's: its machine, what it cached, its steps."""

    def __init__(self, machine: CloudSession) -> None:
        self.machine = machine
        self.cached = np.zeros(0, np.float32)
        self.steps: dict[int, tuple[Floats, list[Floats]]] = {}

    def answer(self, event: Event) -> bytes | None:
        machine = self.machine
        match event:
            case StepBegun():
                self.steps[event.step] = (event.hidden, [] if event.injection is None else [event.injection])
                return self._go_on(event.step)
            case InjectionsArrived():
                self.steps[event.step][1].append(event.values)
                return self._go_on(event.step)
            case CancelAsked():
                self.steps.clear()
                return machine.cancelled()
            case CloseAsked():
                return machine.closed()
            case PingArrived():
                return event.answer
            case Truncated():
                pass
        return None

    def _go_on(self, number: int) -> bytes:
        machine, (hidden, injections) = self.machine, self.steps[number]
        step = next(step for step in machine.steps if step.number == number)
        if step.exchange < len(machine.plan.exchanges):
            return machine.compressed(compressed_of(hidden, machine.plan.exchanges[step.exchange].compressed_columns), number)
        del self.steps[number]
        self.cached = np.concatenate([self.cached[: step.position], ledger(hidden, injections)])
        return machine.exit(exit_of(hidden, self.cached)[step.tokens - step.exit_rows :], 5)


class Stream:
    """One stream as grpc.aio shows it to the device. mute: nothing comes any more; stuck: nothing goes."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.kept: Kept | None = None
        self.down: deque[bytes] = deque()
        self.mute = self.stuck = self.cancelled = False
        self.end: BaseException | Any = None
        self.waiters: set[asyncio.Future[None]] = set()

    async def _wait(self) -> None:
        waiter = self.cloud.loop.create_future()
        self.waiters.add(waiter)
        try:
            await waiter
        finally:
            self.waiters.discard(waiter)

    def wake(self) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def read(self) -> bytes | Any:
        while True:
            if self.cancelled:
                raise asyncio.CancelledError
            if self.down:
                return self.down.popleft()
            if isinstance(self.end, BaseException):
                raise self.end
            if self.end is not None:
                return self.end
            await self._wait()

    async def write(self, data: bytes) -> None:
        while self.stuck and not self.cancelled and self.end is None:
            await self._wait()
        if self.cancelled:
            raise asyncio.CancelledError
        if self.end is not None:
            raise asyncio.InvalidStateError("the call is over")
        self.cloud.hear(self, data)

    def cancel(self) -> None:
        self.cancelled = True
        self.wake()

    def deliver(self, data: bytes) -> None:
        if self.end is None and not self.mute:
            self.cloud.frames += 1
            self.down.append(data)
            self.wake()

    def finish(self, broken: bool) -> None:
        if self.end is None:
            error = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "fuzz")
            self.end = error if broken else grpc.aio.EOF
            self.wake()


class Channel:
    """What `grpc.aio.insecure_channel` returns: up at once, late, never, or refused."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.streams: list[Stream] = []
        self.closed = False
        self.fate = cloud.choices.byte()
        self.tries = 0

    def get_state(self, try_to_connect: bool) -> grpc.ChannelConnectivity:
        self.tries += 1
        if self.fate >= 250:
            return grpc.ChannelConnectivity.TRANSIENT_FAILURE
        late = self.fate >= 244 or (self.fate >= 230 and self.tries == 1)
        return grpc.ChannelConnectivity.CONNECTING if late else grpc.ChannelConnectivity.READY

    async def wait_for_state_change(self, state: grpc.ChannelConnectivity) -> None:
        await asyncio.sleep(10 if self.fate >= 244 else 0.05)

    def stream_stream(self, path: str) -> Any:
        def call(**_: Any) -> Stream:
            self.streams.append(Stream(self.cloud))
            return self.streams[-1]

        return call

    async def close(self) -> None:
        self.closed = True
        for stream in self.streams:
            stream.cancel()


class Cloud:
    """All that is behind the address. lied: it said something that it should not have; frames: delivered."""

    def __init__(self, loop: Loop, choices: Choices, own: Setting) -> None:
        self.loop, self.choices, self.own = loop, choices, own
        self.sessions: dict[bytes, Kept] = {}
        self.channels: list[Channel] = []
        self.said: list[bytes] = []
        self.lied = False
        self.frames = 0
        which = choices.byte()
        self.lease_millis = 0 if which % 4 == 3 else 60_000
        self.window = 1 + which // 4 % 4
        self.delay = (which // 16) / 200

    def connect(self, address: str, options: Any) -> Channel:
        self.channels.append(Channel(self))
        return self.channels[-1]

    def hear(self, stream: Stream, data: bytes) -> None:
        """One frame of the device's."""
        mood = self.choices.byte()
        try:
            answers = self._answers(stream, data)
        except RemoteProtocolError as error:
            check(self.lied, f"the device breaks the protocol: {error}")
            answers = []
        except LocalProtocolError:
            check(self.lied, "the device says what has no answer")
            answers = []
        for answer in answers:
            self._say(stream, answer, mood)
            mood = 0

    def _answers(self, stream: Stream, data: bytes) -> list[bytes]:
        if stream.kept is not None:
            machine = stream.kept.machine
            if machine.state is State.OVER:
                return []
            answer = stream.kept.answer(machine.receive(data))
            check_machine(machine)
            return [] if answer is None else [answer]
        door = CloudSession(self.own.plan, self.own.shape, self.own.hash)
        greeting = door.receive(data)
        assert isinstance(greeting, Greeting)  # or the device had no session, and gave it up
        if not greeting.session:
            own = self.own.precision
            terms = Terms(own, CONTEXT_TOKENS, STEP_TOKENS, 60_000, os.urandom(16), self.lease_millis, self.window)
            welcome = door.welcome(terms)
            stream.kept = self.sessions[terms.session] = Kept(door)
            return [welcome]
        kept = self.sessions.get(greeting.session)
        if kept is None or not kept.machine.live:
            return [door.fault("EXPIRED", "no such session")]
        for channel in self.channels:
            for other in channel.streams:
                if other.kept is kept:
                    other.mute = True
                    other.kept = None
                    other.finish(False)
        stream.kept = kept
        return kept.machine.welcome_back(greeting)

    def _say(self, stream: Stream, answer: bytes, mood: int) -> None:
        choices = self.choices
        self.said.append(answer)
        if mood < HONEST:
            pass
        elif mood < 222:
            answer = spoil(choices, pb.Frame.FromString(answer), self.said)
            self.lied = True
        elif mood < 232:
            code = ("FULL", "EXPIRED", "STOPPING", "INTERNAL", "QUOTA", "CONTEXT_FULL", "BAD_STEP")[choices.below(7)]
            answer = pb.Frame(fault=pb.Fault(code=code, detail="fuzz", retry_after_millis=choices.number())).SerializeToString()
            self.lied = True
        elif mood < 236:
            stream.finish(True)
        elif mood < 240:
            stream.finish(False)
        elif mood < 244:
            stream.mute = True
        elif mood < 246:
            stream.stuck = True
        elif mood < 252:
            for _ in range(3 if mood < 250 else 200):  # more than was asked for
                more = self.said[choices.byte() % len(self.said)] if choices.below(2) else pb.Frame(pong=pb.Pong(id=1)).SerializeToString()
                self.loop.call_later(self.delay, stream.deliver, more)
            self.lied = True
        else:
            self.loop.call_later(1.5, stream.deliver, answer)
            stream = Stream(self)
            self.lied = True  # what comes late may be overtaken
        self.loop.call_later(self.delay, stream.deliver, answer)


class App:
    """Whoever uses the device: feeds, goes back, interrupts, waits."""

    def __init__(self, loop: Loop, choices: Choices, own: Setting) -> None:
        self.loop, self.choices, self.own = loop, choices, own
        self.cloud = Cloud(loop, choices, own)

        def machine() -> DeviceSession:
            return DeviceSession(own.plan, own.shape, own.hash, own.precision)

        self.link = Link("127.0.0.1:1", DEADLINES, machine, lambda state: None)
        self.link._random = random.Random(0)
        self.stepper = Stepper(ToyEdge(own), self.link)  # type: ignore[arg-type]

    async def live(self) -> int:
        choices = self.choices
        try:
            if await self._within(self.stepper.open(), DEADLINES.step_seconds + DEADLINES.connect_seconds + 1) is not None:
                for _ in range(MOST_ACTS):
                    if choices.left <= 0:
                        break
                    await self._act()
        finally:
            await self._within(self.stepper.close(), 3 * DEADLINES.close_seconds + 1)
        await asyncio.sleep(20)  # what is on its way arrives at nobody
        check(all(channel.closed for channel in self.cloud.channels), "every channel is closed in the end")
        return self.cloud.frames

    async def _within(self, work: Any, seconds: float) -> Any:
        """What comes of it; None after an error that a user can act on."""
        began = self.loop.now
        try:
            return await work
        except Interrupted:
            return None
        except PloraError as error:
            own_fault = isinstance(error, LocalProtocolError) and not isinstance(error, NotFinite)
            check(not own_fault, f"we break the protocol ourselves: {error}")
            return None
        except Exception as error:
            raise Found(f"an error that nobody can act on: {error!r}") from error
        finally:
            if self.loop.now - began > seconds:
                raise Found(f"it takes {self.loop.now - began:.0f} s, expected at most {seconds:g}")

    async def _act(self) -> None:
        choices, stepper = self.choices, self.stepper
        which = choices.byte()
        if which >= 244:
            await asyncio.sleep((0.1, 1, 3, 8)[choices.below(4)])
            return
        history = stepper.history
        position = None if which < 160 else choices.byte() % (len(history) + 1)
        length = len(history) if position is None else position
        count = 1 + choices.byte() % 60 if choices.below(2) else 1
        ids = [(length * 7 + each) % 64 for each in range(min(count, CONTEXT_TOKENS - length))]
        if not ids:
            stepper.keep(0)
            return
        rows = choices.byte() % (len(ids) + 1)
        whole = history[:length] + ids
        interrupt = self.loop.call_later(0.001 + choices.byte() / 100, self.link.interrupt) if which % 16 == 15 else None
        got = await self._within(stepper.feed(ids, rows, position), FEED_SECONDS)
        if interrupt is not None:
            interrupt.cancel()
            await self._within(stepper.cancel(), DEADLINES.close_seconds + 0.1)
        self._check_bounds()
        if got is None:
            return
        check(got.shape == (rows, HIDDEN) and np.isfinite(got).all(), f"rows of {got.shape}, expected {rows}")
        check(stepper.history == whole, "the history is what was fed")
        if not self.cloud.lied and str(self.own.precision) == "fp32" and rows:
            check((got == expected(self.own, whole)[-rows:]).all(), "rows of a cloud that does not lie are right")

    def _check_bounds(self) -> None:
        check_machine(self.link.machine)
        check(self.link.machine.outbox.kept <= MAX_UNRECEIVED_FRAMES, "the outbox is bounded")
        transport = self.link.transport
        if isinstance(transport, Transport):
            check(len(transport.frames) <= READ_AHEAD_FRAMES, f"{len(transport.frames)} frames lie there unread")


def device(data: bytes) -> int:
    """A conversation, whatever the cloud does."""
    choices = Choices(data)
    own = any_setting(choices)
    with mock.patch.object(grpc.aio, "insecure_channel") as connect, world() as loop:
        app = App(loop, choices, own)
        connect.side_effect = app.cloud.connect
        return run(loop, app.live())
