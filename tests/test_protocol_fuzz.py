"""Any interleaving of a device and a cloud that keep the rules, and any bytes from one that does not."""

from __future__ import annotations

import tracemalloc
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from plora.artifact import ExchangePlan
from plora.artifact.errors import PloraError, RemoteProtocolError, ServerFull
from plora.protocol import MAX_FRAME_BYTES, Terms
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import CancelAsked, CancelDone, CloseAsked, ClosedDone, Event, Ignored
from plora.protocol.session import Session
from plora.protocol.states import SENDERS, Role, State, next_state

from .test_protocol import CODES, ENTRY_PLAN, HIDDEN, PLAN, TERMS, Wire, at, frame_of, sides, values

CLOUD_TURN = (State.GREETED, State.COMPUTING)
MOVES = (*["deliver_up", "deliver_down", "answer", "injections", "carry_on", "entry"] * 4, *["truncate", "cancel"] * 3, "end")
"""Often what a step is made of, seldom what ends a session."""


class Sessions(RuleBasedStateMachine):
    """A device and a cloud that keep the rules, and a network that delivers whenever it likes, in order.

    The model is what a driver would remember: the tokens that each step left behind, on the device's side alone. There is
    one rule, not one per move, since hypothesis runs most machines without some of their rules, and a session would be stuck;
    a move that cannot be made now does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wire = Wire()
        self.done = 0  # tokens of finished steps
        self.running = 0  # of the step that runs
        self.undo = 0  # length that a cancel goes back to

    @initialize(plan=st.sampled_from([PLAN, ENTRY_PLAN, ExchangePlan(2, 0, 0, (), ())]))
    def begin(self, plan: ExchangePlan) -> None:
        self.wire = Wire(plan)
        self.wire.up.append(self.wire.device.hello())

    @rule(name=st.sampled_from(MOVES), number=st.integers(0, 11), rows=st.integers(0, TERMS.step_tokens))
    def move(self, name: str, number: int, rows: int) -> None:
        match name:
            case "entry":
                self.entry(1 + number % TERMS.step_tokens, rows)
            case "truncate":
                self.truncate(number)
            case "end":
                self.end(number)
            case _:
                getattr(self, name)()

    # The device's moves

    def entry(self, tokens: int, exit_rows: int) -> None:
        device = self.wire.device
        tokens = min(tokens, TERMS.context_tokens - device.length)
        if device.state is not State.READY or not tokens:
            return
        held = device.plan.entry_exchange
        injection = values(tokens, held.injection_columns) if held else None
        self.undo, self.running = device.length, tokens
        self.wire.up.append(device.entry(values(tokens, HIDDEN), min(exit_rows, tokens), injection))

    def injections(self) -> None:
        device = self.wire.device
        if device.state is State.WAITING:
            self.wire.up.append(device.injections(values(device.tokens, device.plan.exchanges[device.exchange].injection_columns)))

    def truncate(self, fewer: int) -> None:
        device = self.wire.device
        if device.state is State.READY:
            length = max(0, device.length - fewer)
            self.done, self.undo = length, min(self.undo, length)
            self.wire.up.append(device.truncate(length))

    def cancel(self) -> None:
        device = self.wire.device
        if device.step and next_state(device.state, "cancel"):
            self.done = self.undo
            self.wire.up.append(device.cancel())

    def end(self, which: int) -> None:
        """Close, abort or fault; once all is over, another session."""
        device, cloud = self.wire.device, self.wire.cloud
        if which < 2 and next_state(device.state, "close"):
            self.wire.up.append(device.close())
        elif which == 2 and next_state(device.state, "abort"):
            self.wire.up.append(device.abort("BAD_STEP"))
        elif which == 3 and next_state(cloud.state, "fault"):
            self.wire.down.append(cloud.fault("FULL", "no room"))
        elif device.state is cloud.state is State.OVER and not self.wire.up and not self.wire.down:
            self.done = self.running = self.undo = 0
            self.begin(device.plan)

    # The cloud's moves

    def answer(self) -> None:
        cloud = self.wire.cloud
        if cloud.state is State.GREETED:
            self.wire.down.append(cloud.welcome(TERMS))
        elif cloud.state is State.COMPUTING and cloud.exchange < len(cloud.plan.exchanges):
            columns = cloud.plan.exchanges[cloud.exchange].compressed_columns
            self.wire.down.append(cloud.compressed(values(cloud.tokens, columns)))
        elif cloud.state is State.COMPUTING:
            self.wire.down.append(cloud.exit(values(cloud.exit_rows, HIDDEN)))

    # The network's moves

    def deliver_up(self) -> None:
        if not self.wire.up:
            return
        event = self.wire.deliver_up()
        assert not isinstance(event, Ignored)  # only the cloud's frames can be void
        if isinstance(event, CancelAsked):
            self.wire.down.append(self.wire.cloud.cancelled())
        elif isinstance(event, CloseAsked):
            self.wire.down.append(self.wire.cloud.closed())

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
        if before is State.COMPUTING and after is State.READY:
            self.done += self.running
        assert isinstance(event, Ignored) <= (before in (State.CANCELLING, State.CLOSING))
        assert isinstance(event, CancelDone) == (before is State.CANCELLING and after is State.READY)
        assert isinstance(event, ClosedDone) == (before is State.CLOSING and after is State.OVER)

    def carry_on(self) -> None:
        """Until nobody has a plain move left."""
        while self.wire.up or self.wire.down or self.wire.device.state is State.WAITING or self.wire.cloud.state in CLOUD_TURN:
            self.deliver_up()
            self.deliver_down()
            self.they_agree_once_nothing_is_in_flight()
            self.answer()
            self.injections()

    @invariant()
    def they_agree_once_nothing_is_in_flight(self) -> None:
        device, cloud = self.wire.device, self.wire.cloud
        if self.wire.up or self.wire.down:
            return
        assert device.state is cloud.state
        if device.state is not State.OVER:
            assert (device.step, device.length, device.terms) == (cloud.step, cloud.length, cloud.terms)
        if device.state in (State.COMPUTING, State.WAITING):
            assert (device.tokens, device.exchange, device.exit_rows) == (cloud.tokens, cloud.exchange, cloud.exit_rows)

    @invariant()
    def the_device_counts_as_the_model_does(self) -> None:
        if self.wire.device.state in (State.READY, State.COMPUTING, State.WAITING):
            assert self.wire.device.length == self.done

    def teardown(self) -> None:
        """Whatever is in flight arrives, and then they agree."""
        while self.wire.up or self.wire.down:
            self.deliver_up()
            self.deliver_down()
        self.they_agree_once_nothing_is_in_flight()


TestSessions = Sessions.TestCase
TestSessions.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


# Hostile bytes


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
@given(st.sampled_from(State), st.booleans(), st.binary(max_size=200))
@example(State.START, True, b"")
def test_random_bytes(state: State, cloud: bool, data: bytes) -> None:
    wire = at(state)
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
@given(st.sampled_from(State), st.booleans(), mutated())
def test_mutated_frames(state: State, cloud: bool, data: bytes) -> None:
    wire = at(state)
    machine = wire.cloud if cloud else wire.device
    before = (machine.state, machine.length)
    if hear(machine, data) is None and machine.state is not State.OVER:
        assert (machine.state, machine.length) == before  # what was refused left no trace


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(State), st.sampled_from(sorted(SENDERS)), st.data())
def test_any_numbers_in_a_frame(state: State, kind: str, data: st.DataObject) -> None:
    """Well-formed frames whose every number is arbitrary."""
    wire = at(state)
    frame = frame_of(kind, wire)
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
    hear(sides(kind, wire)[1], frame.SerializeToString())


LONGEST = 2**32 - 1


def claims(kind: str) -> tuple[Session, bytes]:
    """A frame whose tensor claims 64 EiB and holds 4 bytes, and the machine that hears it."""
    state = {"entry": State.READY, "injections": State.WAITING}.get(kind, State.COMPUTING)
    wire = at(state, 2 if kind == "exit" else 0)
    if kind == "entry":
        wire.cloud.terms = Terms("fp32", LONGEST, LONGEST, 1, b"s" * 16)
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
