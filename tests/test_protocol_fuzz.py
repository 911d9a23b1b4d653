"""Any interleaving of a device and a cloud that keep the rules, and any bytes from one that does not."""

from __future__ import annotations

import tracemalloc
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from plora.artifact import ExchangePlan
from plora.artifact.errors import LocalProtocolError, PloraError, RemoteProtocolError, ServerFull, SessionExpired
from plora.protocol import MAX_FRAME_BYTES, CloudSession, Terms
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import (
    CancelAsked,
    CancelDone,
    CloseAsked,
    ClosedDone,
    CompressedArrived,
    Event,
    Greeting,
    Ignored,
    InjectionsArrived,
    PingArrived,
    PongArrived,
    StepBegun,
    StepDone,
    Truncated,
)
from plora.protocol.limits import MAX_UNRECEIVED_FRAMES, WINDOW
from plora.protocol.session import Session
from plora.protocol.states import SENDERS, Role, State, next_state
from plora.protocol.tensors import Floats

from .test_protocol import CODES, CONTRACT, ENTRY_PLAN, HIDDEN, PLAN, TERMS, Wire, at, frame_of, sides, trace, values

RUNNING = (State.READY, State.COMPUTING, State.WAITING)
"""Of a session in which steps may go on."""
MOVES = (
    *["entry", "deliver_up", "deliver_down", "answer", "injections"] * 5,
    *["entry", "carry_on", "cut"] * 2,
    "cancel",
    "truncate",
    "ping",
    "end",
)
"""Often what steps are made of, seldom what ends a session."""


@dataclass
class Flight:
    """A step as one side's driver remembers it. ids: its tokens; progress: frames of its exchanges so far, both ways."""

    number: int
    ids: list[int]
    progress: int = 0


def hidden_of(ids: list[int]) -> Floats:
    """[T, hidden] float32 that says whose rows they are."""
    rows = values(len(ids), HIDDEN)
    rows[:, 0] = ids
    return rows


def ids_of(hidden: Floats) -> list[int]:
    return hidden[:, 0].astype(int).tolist()


class Sessions(RuleBasedStateMachine):
    """A device and a cloud that keep the rules, and a network that delivers whenever it likes, in order, and breaks now and then.

    The model is what two drivers would remember, and knows nothing of the machines: the tokens that each believes to be cached, the steps
    in flight, how far each has come. Every token is another number, and the rows of entry and exit carry it, so that a lost, doubled or
    misplaced step shows. There is one rule, not one per move, since hypothesis runs most machines without some of their rules, and a
    session would be stuck; it makes several moves, since most runs are short; a move that cannot be made now does nothing, or is seen to
    be refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()
        self.begin(PLAN, 1, 0)

    @initialize(
        plan=st.sampled_from([PLAN, ENTRY_PLAN, ExchangePlan(2, 0, 0, (), ())]),
        window=st.integers(1, WINDOW),
        lease_millis=st.sampled_from([60_000, 60_000, 0]),
    )
    def begin(self, plan: ExchangePlan, window: int, lease_millis: int) -> None:
        self.wire = Wire(plan)
        self.terms = replace(TERMS, window=window, lease_millis=lease_millis)
        self.mine: list[int] = []  # tokens of finished steps, as the device knows them
        self.flying: list[Flight] = []
        self.undo = 0  # where the last step began: a cancel between steps goes back to there
        self.theirs: list[int] = []  # the same in the cloud
        self.their_flying: list[Flight] = []
        self.owed: deque[Event] = deque()  # cancels and closes that the cloud has not answered
        self.pings: deque[int] = deque()
        self.token = 0
        self.wire.up.append(self.wire.device.hello())

    @rule(
        names=st.lists(st.sampled_from(MOVES), min_size=1, max_size=12), number=st.integers(0, 11), rows=st.integers(0, TERMS.step_tokens)
    )
    def moves(self, names: list[str], number: int, rows: int) -> None:
        for place, name in enumerate(names):
            self.move(name, (number + 5 * place) % 12, rows)
            self.they_agree_once_nothing_is_in_flight()
            self.the_machines_count_as_the_model_does()
            self.little_is_kept()

    def move(self, name: str, number: int, rows: int) -> None:
        if self.wire.device.state is self.wire.cloud.state is State.OVER and not self.wire.up and not self.wire.down:
            self.begin(self.wire.device.plan, self.terms.window, self.terms.lease_millis)
        match name:
            case "entry":
                self.entry(1 + number % TERMS.step_tokens, rows, number)
            case "truncate" | "answer" | "injections" | "end" | "ping" | "cut":
                getattr(self, name)(number)
            case _:
                getattr(self, name)()

    def refused(self, machine: Session, call: Any) -> None:
        """The call is refused, and leaves no trace."""
        before = trace(machine)
        with pytest.raises(LocalProtocolError):
            call()
        assert trace(machine) == before

    # The device's moves

    def entry(self, tokens: int, exit_rows: int, back: int) -> None:
        device = self.wire.device
        if device.state not in RUNNING:
            return
        end = len(self.mine) + sum(len(flight.ids) for flight in self.flying)
        position = end if self.flying else max(0, end - back // 3)
        tokens = min(tokens, TERMS.context_tokens - position)
        if not tokens:
            return
        ids = list(range(self.token, self.token + tokens))
        held = device.plan.entry_exchange
        injection = values(tokens, held.injection_columns) if held else None

        def send(position: int | None) -> bytes:
            return device.entry(hidden_of(ids), min(exit_rows, tokens), injection, position)

        if len(self.flying) == self.terms.window:
            self.refused(device, lambda: send(position))
            return
        self.refused(device, lambda: send(end + 1))
        if self.flying:
            self.refused(device, lambda: send(end - 1))
        self.wire.up.append(send(None if position == end else position))
        self.token += tokens
        del self.mine[position:]
        self.undo = position
        self.flying.append(Flight(device.step, ids))

    def injections(self, which: int) -> None:
        device = self.wire.device
        if device.state not in RUNNING or not self.flying:
            return
        place = which % len(self.flying)
        flight = self.flying[place]

        def send() -> bytes:
            columns = device.plan.exchanges[flight.progress // 2].injection_columns
            return device.injections(values(len(flight.ids), columns), flight.number)

        if flight.progress % 2 == 0:
            self.refused(device, lambda: device.injections(values(1, 1), flight.number))
        elif place and flight.progress >= self.flying[place - 1].progress:
            self.refused(device, send)
        else:
            self.wire.up.append(send())
            flight.progress += 1

    def truncate(self, fewer: int) -> None:
        device = self.wire.device
        length = max(0, len(self.mine) - fewer)
        if device.state is State.READY and device.outbox.kept < WINDOW:
            del self.mine[length:]
            self.undo = min(self.undo, length)
            self.wire.up.append(device.truncate(length))
        else:
            self.refused(device, lambda: device.truncate(length))

    def cancel(self) -> None:
        device = self.wire.device
        if not device.step or not next_state(device.state, "cancel"):
            self.refused(device, device.cancel)
            return
        self.wire.up.append(device.cancel())
        if self.flying:
            self.flying.clear()
            self.undo = len(self.mine)
        del self.mine[self.undo :]

    def ping(self, number: int) -> None:
        if self.wire.device.live:
            self.wire.up.append(self.wire.device.ping(number, number**2, number**3))
            self.pings.append(number)

    def end(self, which: int) -> None:
        """Close, abort or fault."""
        device, cloud = self.wire.device, self.wire.cloud
        if which < 4 and next_state(device.state, "close"):
            self.wire.up.append(device.close())
        elif which == 4 and next_state(device.state, "abort"):
            self.wire.up.append(device.abort("BAD_STEP"))
        elif which == 5 and next_state(cloud.state, "fault"):
            self.wire.down.append(cloud.fault("FULL", "no room"))

    # The cloud's moves

    def answer(self, which: int) -> None:
        cloud, columns = self.wire.cloud, [exchange.compressed_columns for exchange in self.wire.cloud.plan.exchanges]
        if cloud.state is State.GREETED:
            self.wire.down.append(cloud.welcome(self.terms))
        elif cloud.state is State.OVER:
            return
        elif self.owed and which % 3:
            self.pay()
        elif self.their_flying:
            place = which % len(self.their_flying)
            flight = self.their_flying[place]
            exchange, waits = divmod(flight.progress, 2)
            overtakes = place > 0 and flight.progress >= self.their_flying[place - 1].progress

            def compressed() -> bytes:
                return cloud.compressed(values(len(flight.ids), columns[exchange]), flight.number)

            if waits:
                if cloud.state in RUNNING:
                    self.refused(cloud, lambda: cloud.compressed(values(1, 1), flight.number))
            elif exchange < len(columns) and overtakes:
                self.refused(cloud, compressed)
            elif exchange < len(columns):
                self.wire.down.append(compressed())
                flight.progress += 1
            elif place == 0:
                rows = cloud.running.exit_rows
                self.wire.down.append(cloud.exit(hidden_of(flight.ids[len(flight.ids) - rows :]), rows))
                self.theirs += self.their_flying.pop(0).ids

    def pay(self) -> None:
        """The cloud answers the oldest cancel or close."""
        cloud, owed = self.wire.cloud, self.owed.popleft()
        if isinstance(owed, CancelAsked):
            self.wire.down.append(cloud.cancelled())
            self.their_flying.clear()
            del self.theirs[owed.length :]
        else:
            self.wire.down.append(cloud.closed())

    # The network's moves

    def deliver_up(self) -> None:
        if not self.wire.up:
            return
        match event := self.wire.deliver_up():
            case Ignored():
                raise AssertionError("only the cloud's frames can be void")
            case StepBegun():
                if not self.their_flying:
                    del self.theirs[event.position :]
                assert event.position == len(self.theirs) + sum(len(flight.ids) for flight in self.their_flying)
                self.their_flying.append(Flight(event.step, ids_of(event.hidden)))
            case InjectionsArrived():
                (flight,) = [flight for flight in self.their_flying if flight.number == event.step]
                assert divmod(flight.progress, 2) == (event.exchange.index, 1)
                flight.progress += 1
            case Truncated():
                del self.theirs[event.length :]
            case CancelAsked() | CloseAsked():
                self.owed.append(event)
            case PingArrived():
                self.wire.down.append(event.answer)
            case _:
                pass

    def deliver_down(self) -> None:
        if not self.wire.down:
            return
        before = self.wire.device.state
        try:
            event = self.wire.deliver_down()
        except ServerFull:
            assert self.wire.device.state is State.OVER
            return
        after = self.wire.device.state
        match event:
            case CompressedArrived():
                (flight,) = [flight for flight in self.flying if flight.number == event.step]
                assert divmod(flight.progress, 2) == (event.exchange.index, 0)
                flight.progress += 1
            case StepDone():
                flight = self.flying.pop(0)
                assert flight.number == event.step
                assert ids_of(event.hidden) == flight.ids[len(flight.ids) - event.compute_micros :]  # they say the rows
                self.mine += flight.ids
            case PongArrived():
                assert event.id == self.pings.popleft()
            case _:
                pass
        assert isinstance(event, Ignored) <= (before in (State.CANCELLING, State.CLOSING))
        assert isinstance(event, CancelDone) == (before is State.CANCELLING and after is State.READY)
        assert isinstance(event, ClosedDone) == (before is State.CLOSING and after is State.OVER)

    def cut(self, which: int) -> None:
        """The connection breaks with all that is on its way, and the session goes on over another, if it may."""
        device, cloud = self.wire.device, self.wire.cloud
        if which and not (device.live and self.terms.lease_millis):
            return  # that it ends is soon seen
        self.wire.up.clear()
        self.wire.down.clear()
        self.pings.clear()
        if device.live and self.terms.lease_millis:
            door = CloudSession(device.plan, device.shape, CONTRACT)
            greeting = door.receive(device.hello_again())
            assert isinstance(greeting, Greeting)
            if cloud.state is not State.OVER:
                welcome, *lacking = cloud.welcome_back(greeting)
                self.wire.up.extend(device.welcomed_back(welcome))
                self.wire.down.extend(lacking)
                return
            with pytest.raises(RemoteProtocolError, match="no such session") as caught:
                cloud.welcome_back(greeting)
            with pytest.raises(SessionExpired):
                device.welcomed_back(door.fault(caught.value.code, str(caught.value)))
        if device.state is not State.OVER:
            device.abort("INTERNAL")
        if cloud.state is not State.OVER:
            cloud.fault("EXPIRED", "the connection is lost")

    def carry_on(self) -> None:
        """Until nobody has a plain move left."""
        while True:
            before = (trace(self.wire.device), trace(self.wire.cloud), len(self.wire.up), len(self.wire.down))
            self.deliver_up()
            self.deliver_down()
            self.they_agree_once_nothing_is_in_flight()
            self.answer(1 if self.owed else 0)
            self.injections(0)
            if (trace(self.wire.device), trace(self.wire.cloud), len(self.wire.up), len(self.wire.down)) == before:
                return

    @invariant()
    def they_agree_once_nothing_is_in_flight(self) -> None:
        device, cloud = self.wire.device, self.wire.cloud
        if self.wire.up or self.wire.down:
            return
        assert device.state is cloud.state
        if device.state is not State.OVER:
            assert (device.step, device.terms) == (cloud.step, cloud.terms)
            assert (device.received, cloud.received) == (cloud.outbox.sent, device.outbox.sent)
        if device.state in RUNNING:
            assert (device.length, device.steps) == (cloud.length, cloud.steps)
            assert (self.mine, self.flying) == (self.theirs, self.their_flying)

    @invariant()
    def the_machines_count_as_the_model_does(self) -> None:
        device, cloud = self.wire.device, self.wire.cloud
        if device.state in RUNNING:
            assert device.length == len(self.mine)
            assert [(step.number, step.tokens, step.progress) for step in device.steps] == [
                (flight.number, len(flight.ids), flight.progress) for flight in self.flying
            ]
        if cloud.state in RUNNING:
            assert cloud.length == len(self.theirs)
            assert [(step.number, step.progress) for step in cloud.steps] == [
                (flight.number, flight.progress) for flight in self.their_flying
            ]

    @invariant()
    def little_is_kept(self) -> None:
        for machine in (self.wire.device, self.wire.cloud):
            assert machine.outbox.kept <= (MAX_UNRECEIVED_FRAMES if self.terms.lease_millis else 1)  # 1: a close before the terms
            if machine.outbox.kept == 0:
                assert machine.outbox.kept_bytes == 0

    def teardown(self) -> None:
        """Whatever is in flight arrives, and then they agree."""
        while self.wire.up or self.wire.down:
            self.deliver_up()
            self.deliver_down()
        self.they_agree_once_nothing_is_in_flight()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


# Hostile bytes


LEASE = replace(TERMS, lease_millis=60_000)
TERMS_OR_LEASE = st.sampled_from([TERMS, LEASE])


def hear(machine: Session, data: bytes) -> Event | None:
    """What a machine makes of bytes: an event, or a refusal that it can answer, and never another error."""
    try:
        return machine.receive(data)
    except RemoteProtocolError as error:
        answerable = error.code in CODES and bool(str(error))
    except PloraError:  # a fault
        answerable = machine.role is Role.DEVICE and machine.state is State.OVER
    assert answerable
    return None


@cache
def frames() -> tuple[bytes, ...]:
    """A good frame of every kind."""
    wire = at(State.COMPUTING)
    return tuple(frame_of(kind, wire).SerializeToString() for kind in SENDERS)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(State), TERMS_OR_LEASE, st.booleans(), st.binary(max_size=200))
@example(State.START, TERMS, True, b"")
def test_random_bytes(state: State, terms: Terms, cloud: bool, data: bytes) -> None:
    wire = at(state, terms=terms)
    hear(wire.cloud if cloud else wire.device, data)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A good frame with bits flipped, cut, doubled, or joined with another."""
    data = bytearray(draw(st.sampled_from(frames())))
    for kind in draw(st.lists(st.sampled_from(["flip", "cut", "double", "join", "insert"]), min_size=1, max_size=4)):
        at_byte = draw(st.integers(0, max(len(data) - 1, 0)))
        if kind == "flip" and data:
            data[at_byte] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at_byte:]
        elif kind == "double":
            data[at_byte:at_byte] = data[at_byte : at_byte + draw(st.integers(1, 40))]
        elif kind == "join":
            data += draw(st.sampled_from(frames()))
        elif kind == "insert":
            data[at_byte:at_byte] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(State), TERMS_OR_LEASE, st.booleans(), mutated())
def test_mutated_frames(state: State, terms: Terms, cloud: bool, data: bytes) -> None:
    wire = at(state, terms=terms)
    machine = wire.cloud if cloud else wire.device
    before = trace(machine)
    if hear(machine, data) is None and machine.state is not State.OVER:
        assert trace(machine) == before  # what was refused left no trace


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(State), TERMS_OR_LEASE, st.sampled_from(sorted(SENDERS)), st.data())
def test_any_numbers_in_a_frame(state: State, terms: Terms, kind: str, data: st.DataObject) -> None:
    """Well-formed frames whose every number is arbitrary."""
    wire = at(state, terms=terms)
    frame = frame_of(kind, wire)
    frame.received = data.draw(st.one_of(st.integers(0, 5), st.integers(0, 2**64 - 1)))
    message = getattr(frame, kind)
    for field in message.DESCRIPTOR.fields:
        target = getattr(message, field.name)
        if isinstance(target, pb.Tensor):
            target.dtype = data.draw(st.integers(-(2**31), 2**31 - 1))  # type: ignore[assignment]
            target.rows, target.columns = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1))
        elif field.enum_type is not None:
            setattr(message, field.name, data.draw(st.integers(-(2**31), 2**31 - 1)))
        elif isinstance(target, int) and not isinstance(target, bool):
            setattr(message, field.name, data.draw(st.integers(0, 2 ** (64 if field.type == field.TYPE_UINT64 else 32) - 1)))
    machine = sides(kind, wire)[1]
    before = trace(machine)
    if hear(machine, frame.SerializeToString()) is None and machine.state is not State.OVER:
        assert trace(machine) == before


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(State), mutated())
def test_anything_on_a_new_connection(state: State, data: bytes) -> None:
    """Whatever comes in place of a welcome leaves the device's session as it was."""
    machine = at(state, terms=LEASE).device
    before = trace(machine)
    for again in (data, bytes(40), b""):
        with suppress(PloraError):
            machine.welcomed_back(again)
    assert trace(machine)[:-2] == before[:-2]  # what is kept may be less: the peer has it


LONGEST = 2**32 - 1


def claims(kind: str) -> tuple[Session, bytes]:
    """A frame whose tensor claims 64 EiB and holds 4 bytes, and the machine that hears it."""
    state = {"entry": State.READY, "injections": State.WAITING}.get(kind, State.COMPUTING)
    wire = at(state, 2 if kind == "exit" else 0)
    if kind == "entry":
        wire.cloud.terms = replace(TERMS, context_tokens=LONGEST, step_tokens=LONGEST)
    frame = frame_of(kind, wire)
    field = "tensor" if kind in ("compressed", "injections") else "hidden"
    getattr(getattr(frame, kind), field).CopyFrom(pb.Tensor(dtype=pb.FP32, rows=LONGEST - 1, columns=LONGEST, data=b"\0" * 4))
    return sides(kind, wire)[1], frame.SerializeToString()


@pytest.mark.parametrize("kind", ["entry", "compressed", "injections", "exit"])
def test_no_memory_for_a_claimed_size(kind: str) -> None:
    machine, data = claims(kind)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError) as caught:
            machine.receive(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.code in ("BAD_TENSOR", "BAD_STEP")
    assert peak < 1 << 20


def test_the_memory_check_sees_numpy() -> None:
    """Otherwise the test above would prove nothing."""
    tracemalloc.start()
    try:
        np.zeros(1 << 20, np.float32)
        assert tracemalloc.get_traced_memory()[1] > 1 << 20
    finally:
        tracemalloc.stop()


def test_bytes_of_the_largest_frame_are_refused_without_a_copy_of_them() -> None:
    data = bytes(MAX_FRAME_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError, match="the limit is"):
            at(State.READY).cloud.receive(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
