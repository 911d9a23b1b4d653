"""Fuzz target: the service with its room, scheduler and pool, several hostile devices, and one that keeps the rules beside them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from plora.cloud_server.carrier import INBOX_FRAMES
from plora.cloud_server.service import Service
from plora.protocol import Terms
from plora.protocol import plora_pb2 as pb
from plora.protocol.limits import WINDOW
from plora.protocol.session import is_ping

from .fuzz_frames import Choices, Found, Setting, any_setting, check, hello, setting, spoil
from .fuzz_good import (
    BUSY_SECONDS,
    CROWDED,
    HELLO_SECONDS,
    IDLE_SECONDS,
    LEASE_SECONDS,
    ROOMY,
    THINK_SECONDS,
    Good,
    engine_for,
    limits,
    undisturbed,
)
from .fuzz_machines import check_machine
from .fuzz_rules import Rules, good_hello, said_precision
from .fuzz_world import Call, CheapEngine, Loop, Worker, run, world

MOST_FRAMES = 300
"""Of one input."""
SETTLE_SECONDS = 0.8
"""For whatever was said last to be answered: no deadline is as short."""
NO_FAULT_OF_THEIRS = frozenset({"FULL", "QUOTA", "EXPIRED", "STOPPING"})


@dataclass(eq=False)
class Tenant:
    """A hostile device's session, as far as we know. peer: its present connection; past: the rules as they stood once so many of its
    frames were heard; expected: what the cloud says, (kind, step) by number; logged: the bytes of that, as far as they came.

    doomed: it broke a rule, and has to go; unsure: nobody can say; ended: the fault that it was told.
    """

    id: bytes
    rules: Rules
    peer: Peer
    past: dict[int, Rules] = field(default_factory=dict)
    expected: list[tuple[str, int]] = field(default_factory=list)
    logged: list[bytes] = field(default_factory=list)
    doomed: bool = False
    unsure: bool = False
    ended: str = ""

    def say(self, data: bytes) -> None:
        """A frame on the present connection, judged first."""
        rules, verdict = self.rules, self.rules.verdict(data)
        self.peer.call.say(data)
        if self.doomed or self.unsure or self.ended:
            return
        if rules.pending == "over" or verdict is None:
            self.unsure = True
        elif not verdict:
            self.doomed = True
        else:
            if is_ping(data):
                self.unsure |= pb.Frame.FromString(data).received > len(self.logged)  # it is heard at once, the answers may come later
                return
            rules.accept(data)
            while ways := rules.owed():
                self.unsure |= rules.overflows  # unless a ping says in time that some have come
                self.expected.append(ways[0])
                rules.said(*ways[0])
            self.past[rules.heard] = rules.copy()

    def hear(self, data: bytes, frame: pb.Frame) -> None:
        """A numbered frame of the cloud's."""
        number, kind = self.peer.next_frame, frame.WhichOneof("kind")
        self.peer.next_frame += 1
        check(number <= len(self.expected) or self.unsure or self.doomed, f"{kind} that nobody asked for")
        if number <= len(self.logged):
            check(self.logged[number - 1] == data, "what is sent again is what was sent")
            return
        self.logged.append(data)
        if not self.unsure and number <= len(self.expected):
            step = getattr(getattr(frame, kind or ""), "step", 0) if kind in ("compressed", "exit") else 0
            check(self.expected[number - 1] == (kind, step), f"{kind} of step {step}, expected {self.expected[number - 1]}")


@dataclass(eq=False)
class Peer:
    """A hostile connection. asked: its greeting; next_frame: number of the next numbered frame to come; stale: another has taken its
    session; sulked: it did not read for a while; hasty: it said more before it was welcomed."""

    call: Call
    asked: bytes | None = None
    tenant: Tenant | None = None
    next_frame: int = 1
    stale: bool = False
    sulked: bool = False
    hasty: bool = False

    @property
    def intact(self) -> bool:
        return not (self.stale or self.sulked or self.call.broken or (self.call.up and self.call.up[-1] is None))


class House:
    """One service, and everybody who talks to it in one input."""

    def __init__(self, loop: Loop, choices: Choices, own: Setting, engine: CheapEngine, mode: int) -> None:
        self.loop, self.choices, self.own, self.engine, self.mode = loop, choices, own, engine, mode
        delays = [(choices.byte() % 64) / 10_000 for _ in range(2)]
        worker = Worker(loop, lambda: delays[loop.turns % 2])
        self.service = Service(engine, limits(mode, engine.pool.block_bytes), worker)  # type: ignore[arg-type]
        self.peers: list[Peer] = []
        self.tenants: list[Tenant] = []
        self.said: list[bytes] = []
        self.good = Good(loop, self.service, own, mode == ROOMY, undisturbed(own))
        self.frames = 0

    # Moves

    async def act(self) -> None:
        choices = self.choices
        which = choices.byte()
        open_peers = [peer for peer in self.peers if not peer.call.over and not peer.stale]
        living = [tenant for tenant in self.tenants if not tenant.ended and not tenant.peer.call.over]
        if which >= 250 and open_peers:
            open_peers[choices.byte() % len(open_peers)].call.hang_up()
        elif which >= 244 and open_peers:
            open_peers[choices.byte() % len(open_peers)].call.say(None)
        elif which >= 238 and open_peers:
            peer = open_peers[choices.byte() % len(open_peers)]
            peer.sulked = True
            peer.call.take(not peer.call.taking)
        elif which >= 206 and self.tenants:
            self._greet_again(self.tenants[choices.byte() % len(self.tenants)])
        elif which >= 188 and len(open_peers) < (10 if self.mode == CROWDED else 5):
            self._greet(choices.seldom(4))
        elif which >= 182:
            await self.wait((0.02, 0.3, 1.1, 2.2)[choices.below(4)])
        elif which >= 178 and open_peers:
            for _ in range(20):
                self._say(open_peers[choices.byte() % len(open_peers)], spoil(choices, pb.Frame(ping=pb.Ping(id=1)), self.said))
        elif living:
            tenant = living[choices.byte() % len(living)]
            frame = tenant.rules.move(choices, len(tenant.logged))
            self._say(tenant.peer, spoil(choices, frame, self.said) if choices.seldom(24) else frame.SerializeToString())
        elif len(open_peers) < 5:
            self._greet(False)

    async def wait(self, seconds: float) -> None:
        self.good.pause_seconds = THINK_SECONDS
        await asyncio.sleep(seconds)
        self.good.pause_seconds = BUSY_SECONDS

    def _say(self, peer: Peer, data: bytes) -> None:
        self.frames += 1
        self.said.append(data)
        if peer.tenant is not None and not peer.stale:
            peer.tenant.say(data)
        else:
            peer.hasty |= peer.asked is not None
            peer.asked = peer.asked if peer.asked is not None else data
            peer.call.say(data)

    def _connect(self) -> Peer:
        self.peers.append(Peer(Call(self.loop, f"10.0.0.{2 + self.choices.byte() % 2}", self.service.exchange)))
        return self.peers[-1]

    def _greet(self, odd: bool) -> None:
        peer, choices = self._connect(), self.choices
        if odd and choices.seldom(4):
            return  # silent
        own = setting(0, choices.below(4)) if odd else self.own
        frame = hello(self.own, b"", 0, choices.byte() % 4 != 3, choices.byte() % 4 == 3, 3 - choices.byte() % 8 % 3)
        if own.precision != self.own.precision:
            frame = spoil_precision(frame, own)
        self._say(peer, spoil(choices, frame, self.said) if odd else frame.SerializeToString())

    def _greet_again(self, tenant: Tenant) -> None:
        """With its own id, one that is forged, or other numbers. What the old connection still says is not read."""
        choices, peer = self.choices, self._connect()
        frame = hello(self.own, tenant.id, len(tenant.logged))
        if tenant.rules.own.precision != self.own.precision:
            frame = spoil_precision(frame, tenant.rules.own)
        how = choices.byte()
        if how >= 192:
            frame.hello.session = bytes([tenant.id[0] ^ 1]) + tenant.id[1:]
        elif how >= 160:
            frame.received = choices.number(64) % 2**63
        self._say(peer, spoil(choices, frame, self.said) if 128 <= how < 160 else frame.SerializeToString())

    # What the cloud says

    def listen(self) -> None:
        for peer in self.peers:
            while peer.call.frames and peer.call.taking:
                data = peer.call.frames.popleft()
                if not peer.stale:
                    self._hear(peer, data, pb.Frame.FromString(data))

    def _hear(self, peer: Peer, data: bytes, frame: pb.Frame) -> None:
        kind = frame.WhichOneof("kind")
        if kind == "fault":
            code = pb.FaultCode.Name(frame.fault.code)
            check(code != "INTERNAL", f"something broke in the cloud: {frame.fault.detail}")
            if peer.tenant is not None:
                tenant, peer.tenant.ended = peer.tenant, code
                check(tenant.doomed or tenant.unsure or code in NO_FAULT_OF_THEIRS, f"who kept the rules is refused: {frame.fault.detail}")
            elif peer.asked is not None and good_hello(self.own, peer.asked) and not pb.Frame.FromString(peer.asked).hello.session:
                check(code in NO_FAULT_OF_THEIRS, f"a plain greeting is refused: {frame.fault.detail}")
        elif kind == "welcome":
            self._welcome(peer, frame)
        elif kind != "pong":
            check(peer.tenant is not None and kind in ("compressed", "exit", "cancelled", "closed"), f"{kind} to who has no session")
            assert peer.tenant is not None
            peer.tenant.hear(data, frame)

    def _welcome(self, peer: Peer, frame: pb.Frame) -> None:
        welcome = frame.welcome
        check(peer.asked is not None and peer.tenant is None and good_hello(self.own, peer.asked), "a welcome to who did not greet well")
        assert peer.asked is not None
        asked = pb.Frame.FromString(peer.asked)
        precision = said_precision(welcome)
        assert precision is not None  # as in the hello
        known = [tenant for tenant in self.tenants if tenant.id == welcome.session]
        if not asked.hello.session:
            check(not known and len(welcome.session) == 16, "a new session has a new id")
            terms = Terms(
                precision, welcome.context_tokens, welcome.step_tokens, 0, welcome.session, welcome.lease_millis, welcome.window or 1
            )
            own = Setting(self.own.plan, self.own.shape, self.own.hash, precision)
            peer.tenant = Tenant(welcome.session, Rules(own, terms), peer)
            peer.tenant.past[0] = peer.tenant.rules.copy()
            peer.tenant.unsure = peer.hasty
            self.tenants.append(peer.tenant)
            return
        check(welcome.session == asked.hello.session and known, "a welcome to a session that the device was never given")
        tenant = known[0]
        check(not tenant.ended and tenant.rules.leased, "a session that is over is taken up again")
        check(precision == tenant.rules.own.precision, "a session is taken up again with other dtypes")
        tenant.peer.stale = True
        peer.tenant, tenant.peer = tenant, peer
        peer.next_frame = asked.received + 1
        check(asked.received <= len(tenant.expected) or tenant.unsure, "a session is taken up by one who received more than was sent")
        if frame.received in tenant.past:  # what it has not heard is lost, broken rules too
            tenant.rules = tenant.past[frame.received].copy()
            tenant.rules.acknowledged = max(tenant.rules.acknowledged, asked.received)
            tenant.doomed = False
            del tenant.expected[tenant.rules.sent :]
            tenant.past = {heard: rules for heard, rules in tenant.past.items() if heard <= frame.received}
        elif not tenant.unsure:
            raise Found(f"the cloud says that it has {frame.received} frames, of {max(tenant.past)}")
        tenant.unsure |= peer.hasty or asked.received > len(tenant.logged)  # the latter: it said that it has what never came

    # What must hold

    def check_bounds(self) -> None:
        """At any time, whatever was said."""
        service = self.service
        for carrier in service.carriers:
            check(len(carrier.inbox) <= INBOX_FRAMES, f"{len(carrier.inbox)} frames read ahead")
        for session in service.sessions.values():
            check_machine(session.machine)
            check(len(session.steps) <= WINDOW, f"{len(session.steps)} steps of one session kept")
        pool = self.engine.pool
        check(len(service.sessions) <= pool.slots and 0 <= pool.free_blocks <= pool.blocks, "the pool counts right")

    async def settle(self) -> None:
        """Those who broke a rule are gone, those who did not are there and have their answers."""
        for peer in self.peers:
            peer.call.take(True)
        await self.wait(SETTLE_SECONDS)
        self.listen()
        for tenant in self.tenants:
            if tenant.unsure or not tenant.peer.intact:
                continue
            there = tenant.id in self.service.sessions
            if tenant.doomed or tenant.rules.pending == "over":
                check(not there, "a session that broke the rules, or was closed, goes on")
            elif not tenant.ended:
                check(there, "a session is gone without a word")
                check(len(tenant.logged) == len(tenant.expected), f"answers are missing: {tenant.expected[len(tenant.logged) :]}")

    async def end(self) -> None:
        """However they leave, nothing stays."""
        service, pool = self.service, self.engine.pool
        how = self.choices.below(4)
        for peer in self.peers:
            if how == 1:
                peer.call.hang_up()
            elif how == 2:
                peer.call.say(None)
        if how == 3:
            await service.stop(0.3)
        await asyncio.sleep(IDLE_SECONDS + LEASE_SECONDS + HELLO_SECONDS + 1.5)
        self.listen()
        check(not service.sessions, f"{len(service.sessions)} sessions are left")
        check(not service.carriers, f"{len(service.carriers)} connections are left")
        check(pool.free_blocks == pool.blocks and pool.free_slots == pool.slots, f"{pool.blocks - pool.free_blocks} blocks are held")
        check(not any(cache.any() for cache in self.engine.cache), "something is left in the cache")
        check(not any(service.scheduler.waiting), "rows wait for nobody")


def spoil_precision(frame: pb.Frame, own: Setting) -> pb.Frame:
    """The greeting with the dtypes of another setting."""
    other = hello(own)
    frame.hello.dtype = other.hello.dtype
    frame.hello.ClearField("precision")
    if other.hello.HasField("precision"):
        frame.hello.precision.CopyFrom(other.hello.precision)
    return frame


async def scene(loop: Loop, choices: Choices, own: Setting, engine: CheapEngine, mode: int) -> int:
    house = House(loop, choices, own, engine, mode)
    good = house.good
    watch = asyncio.create_task(house.service.watch())
    living = asyncio.create_task(good.live())
    while good.unopened and not living.done():
        await asyncio.sleep(0.001)
    while choices.left > 0 and house.frames < MOST_FRAMES and not living.done():
        await house.act()
        for _ in range(1 + choices.below(8)):
            await asyncio.sleep(0)
        if choices.byte() % 2 == 0:
            await asyncio.sleep(0.007)
        house.listen()
        house.check_bounds()
    await asyncio.wait([living], timeout=0.001)
    if not living.done():
        await house.settle()
    good.stopping = True
    await living
    await house.end()
    watch.cancel()
    await asyncio.wait([watch])
    return house.frames


def service(data: bytes) -> int:
    """Whole connections, several at a time, to the real service."""
    choices = Choices(data)
    own, mode = any_setting(choices), choices.byte() % 3
    undisturbed(own)
    engine = engine_for(own, mode)
    with world() as loop:
        return run(loop, scene(loop, choices, own, engine, mode))
