"""A session outlives its connections: whatever is lost on the way, each side sees the events of an undisturbed run.

The two drivers here react to what arrives and to nothing else, and the cloud does its work in order but whenever it likes. So the
events of a run are the same in whatever order the network delivers, and a run with cuts can be compared with one without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plora.artifact import ExchangePlan, grouped_plan
from plora.artifact.errors import LocalProtocolError, ProtocolError, RemoteProtocolError, ServerFull, SessionExpired
from plora.protocol import Precision, Terms, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import (
    CancelAsked,
    CancelDone,
    CloseAsked,
    ClosedDone,
    CompressedArrived,
    Event,
    Greeting,
    InjectionsArrived,
    Opened,
    PingArrived,
    PongArrived,
    StepBegun,
    StepDone,
)
from plora.protocol.limits import MAX_UNRECEIVED_FRAMES, WINDOW
from plora.protocol.outbox import Outbox
from plora.protocol.roles import CloudSession, DeviceSession
from plora.protocol.states import State
from plora.protocol.tensors import Floats

from .test_protocol import CONTRACT, ENTRY_PLAN, HIDDEN, TERMS, fresh, opened, run_step, shape_of, trace, values

GROUPED = grouped_plan(4, 2, 2)
PRECISION = Precision(entry="fp16", compressed="int8", injections="bf16")
LEASED = replace(TERMS, lease_millis=60_000, window=3, precision=PRECISION)
PLANS = pytest.mark.parametrize("plan", [GROUPED, ENTRY_PLAN], ids=["exchanges", "entry"])
Script = Generator[None, Event, None]
CONNECTIONS = 1_000
"""More than any test makes."""


@cache
def numbers(rows: int, columns: int, *seed: int) -> Floats:
    """[rows, columns] float32, others for every seed."""
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def plain(event: Event) -> tuple[Any, ...]:
    """An event as what compares by value, bit for bit."""
    contents = [getattr(event, field.name) for field in fields(event)]
    return (type(event).__name__, *[(each.shape, each.tobytes()) if isinstance(each, np.ndarray) else each for each in contents])


class Wire:
    """Two machines with a session open, a driver each, and a connection between them that can be cut.

    An event is a frame that is delivered, or a piece of work that the cloud does; `cuts` are the numbers of events before which the
    connection breaks. seen: what each side was told.
    """

    def __init__(
        self,
        plan: ExchangePlan,
        cuts: Iterable[int] = (),
        sabotage: Callable[[list[bytes]], list[bytes]] = list,
        script: Callable[[Wire], Script] | None = None,
    ) -> None:
        shape = shape_of(HIDDEN, plan.layers)
        self.plan = plan
        self.device = DeviceSession(plan, shape, CONTRACT, PRECISION)
        self.cloud = CloudSession(plan, shape, CONTRACT)
        self.cloud.receive(self.device.hello())
        self.device.receive(self.cloud.welcome(LEASED))
        self.cuts = set(cuts)
        self.sabotage = sabotage
        self.events = 0
        self.connections = 1
        self.lost = 0  # numbered frames
        self.sent_again = 0
        self.expired = False
        self.seen: dict[str, list[tuple[Any, ...]]] = {"device": [], "cloud": []}
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        self.device_is_on = self.cloud_is_on = True  # whether it knows of this connection
        self.work: deque[Callable[[], bytes]] = deque()
        self.script = (script or whole_session)(self)
        next(self.script)

    # The connection

    def cut(self) -> None:
        """What is on its way is lost. The device notices, and greets on another connection; the cloud works on."""
        self.lost += sum(
            pb.Frame.FromString(data).WhichOneof("kind") not in ("hello", "welcome", "ping", "pong") for data in (*self.up, *self.down)
        )
        self.up.clear()
        self.down.clear()
        self.connections += 1
        assert self.connections < CONNECTIONS
        self.device_is_on = self.cloud_is_on = False
        if self.device.state is not State.OVER:
            self.up.append(self.device.hello_again())

    def deliver_up(self) -> None:
        data = self.up.popleft()
        if not self.cloud_is_on:
            self.door(data)
        elif self.cloud.state is not State.OVER:
            self.on_cloud(self.cloud.receive(data))

    def door(self, data: bytes) -> None:
        """A new connection's first frame."""
        door = CloudSession(self.plan, self.cloud.shape, CONTRACT)
        greeting = door.receive(data)
        assert isinstance(greeting, Greeting)
        assert self.cloud.terms is not None
        assert (greeting.session, greeting.resume) == (self.cloud.terms.session, True)
        try:
            welcome, *lacking = self.cloud.welcome_back(greeting)
        except RemoteProtocolError as error:
            assert self.cloud.state is State.OVER  # it has said so, and that is lost
            self.down.append(door.fault(error.code, str(error)))
            return
        self.down += [welcome, *self.again(lacking)]
        self.cloud_is_on = True

    def deliver_down(self) -> None:
        data = self.down.popleft()
        if self.device_is_on:
            self.on_device(self.device.receive(data))
            return
        try:
            self.up += self.again(self.device.welcomed_back(data))
            self.device_is_on = True
        except SessionExpired:
            assert self.device.state is State.CLOSING  # as good as closed
            self.expired = True
            self.on_device(ClosedDone())

    def again(self, frames: list[bytes]) -> list[bytes]:
        self.sent_again += len(frames)
        return self.sabotage(frames)

    # The drivers

    def send(self, data: bytes) -> None:
        """The device's script sends; while there is no connection it is enough that the machine keeps it."""
        if self.device_is_on:
            self.up.append(data)

    def on_device(self, event: Event) -> None:
        if isinstance(event, PongArrived):
            return  # of a connection, not of the session
        self.seen["device"].append(plain(event))
        if isinstance(event, CompressedArrived):
            step = next(step for step in self.device.steps if step.number == event.step)
            values = numbers(step.tokens, event.exchange.injection_columns, 2, event.step, event.exchange.index)
            self.send(self.device.injections(values, event.step))
        try:
            self.script.send(event)
        except StopIteration:
            pass

    def on_cloud(self, event: Event) -> None:
        if isinstance(event, PingArrived):
            self.down.append(event.answer)
            return
        self.seen["cloud"].append(plain(event))
        match event:
            case StepBegun():
                self.goes_on(event.step, 0, len(event.hidden), event.exit_rows)
            case InjectionsArrived():
                step = next(step for step in self.cloud.steps if step.number == event.step)
                self.goes_on(event.step, event.exchange.index + 1, step.tokens, step.exit_rows)
            case CancelAsked():
                self.work.append(self.cloud.cancelled)
            case CloseAsked():
                self.work.append(self.cloud.closed)
            case _:
                pass

    def goes_on(self, step: int, exchange: int, tokens: int, exit_rows: int) -> None:
        """The cloud has work to do: what a step sends next."""
        if exchange < len(self.plan.exchanges):
            compressed = numbers(tokens, self.plan.exchanges[exchange].compressed_columns, 3, step, exchange)
            self.work.append(lambda: self.cloud.compressed(compressed, step))
        else:
            self.work.append(lambda: self.cloud.exit(numbers(exit_rows, HIDDEN, 4, step), compute_micros=step))

    def do_work(self) -> None:
        """One frame of the cloud's, made whether or not there is a connection to send it by."""
        data = self.work.popleft()()
        if self.cloud_is_on:
            self.down.append(data)

    # The run

    def able(self) -> dict[str, Callable[[], None]]:
        """What may happen next."""
        able = {"up": self.deliver_up} if self.up else {}
        able |= {"down": self.deliver_down} if self.down else {}
        return able | ({"work": self.do_work} if self.work else {})

    def happen(self, *preference: str) -> None:
        """The first of `preference` that may happen, if any may."""
        if self.events in self.cuts:
            self.cut()
        able = self.able()
        if names := [name for name in preference if name in able]:
            self.events += 1
            able[names[0]]()
        assert max(self.device.outbox.kept, self.cloud.outbox.kept) <= MAX_UNRECEIVED_FRAMES

    def run(self, preference: tuple[str, ...] = ("up", "down", "work")) -> Wire:
        """Until nothing more happens."""
        while self.able():
            self.happen(*preference)
        return self


def whole_session(wire: Wire) -> Script:
    """What the device does; yields for what arrives. Compressed is answered by the wire."""
    device = wire.device
    held = device.plan.entry_exchange

    def entry(tokens: int, exit_rows: int, position: int | None = None) -> None:
        number = device.step + 1
        injection = numbers(tokens, held.injection_columns, 0, number) if held else None
        wire.send(device.entry(numbers(tokens, HIDDEN, 1, number), exit_rows, injection, position))

    def until(kind: type[Event], times: int = 1) -> Generator[None, Event, None]:
        while times:
            times -= isinstance((yield), kind)

    # A prompt of 20 tokens: the window is filled, then a chunk goes up for each that is done.
    chunks = deque([(6, 0), (6, 0), (6, 0), (2, 1)])
    for _ in range(LEASED.window):
        entry(*chunks.popleft())
    yield from until(StepDone)
    wire.send(device.ping(1, padding_bytes=20, reply_bytes=50))
    entry(*chunks.popleft())
    yield from until(StepDone, 3)
    # Three drafted tokens a step; one, none and all of them stay.
    for kept in (20, 22, 23):
        entry(4, 4, position=kept)
        yield from until(StepDone)
    # Two steps given up at once, and one once something has come of it.
    entry(1, 1)
    entry(1, 0)
    wire.send(device.cancel())
    yield from until(CancelDone)
    entry(2, 2, position=10)
    if device.plan.exchanges:
        yield from until(CompressedArrived)
    wire.send(device.cancel())
    wire.send(device.ping(2))
    yield from until(CancelDone)
    wire.send(device.truncate(4))
    entry(3, 1)
    yield from until(StepDone)
    wire.send(device.cancel())  # of a step that is done
    yield from until(CancelDone)
    entry(5, 0)
    entry(1, 1)
    yield from until(StepDone)
    wire.send(device.close())
    yield from until(ClosedDone)


@cache
def undisturbed(plan: ExchangePlan) -> Wire:
    return Wire(plan).run()


def check(wire: Wire) -> None:
    """Neither side can tell the run from one without cuts."""
    whole = undisturbed(wire.plan)
    assert wire.seen["cloud"] == whole.seen["cloud"]
    seen, told = wire.seen["device"], whole.seen["device"]
    if wire.expired:  # the cloud had closed, and that was lost; with it maybe what was void by then
        told = told[: len(seen) - 1] + [event for event in told[len(seen) - 1 :] if event[0] != "Ignored"]
    assert seen == told
    assert wire.cloud.state is State.OVER
    assert wire.device.state is (State.CLOSING if wire.expired else State.OVER)
    assert (wire.device.length, wire.cloud.length) == (whole.device.length, whole.cloud.length)


# Cuts

ORDERS = [("up", "down", "work"), ("down", "up", "work"), ("work", "up", "down"), ("down", "work", "up"), ("up", "work", "down")]


@PLANS
def test_the_script_shows_what_it_is_for(plan: ExchangePlan) -> None:
    whole = undisturbed(plan)
    told = [name for name, *_ in whole.seen["device"]]
    assert (told.count("StepDone"), told.count("CancelDone"), told[-1]) == (9, 3, "ClosedDone")
    assert "Ignored" in told
    heard = [name for name, *_ in whole.seen["cloud"]]
    assert (heard.count("StepBegun"), heard.count("CancelAsked"), heard.count("Truncated"), heard[-1]) == (13, 3, 1, "CloseAsked")
    assert (whole.connections, whole.lost, whole.sent_again) == (1, 0, 0)


@PLANS
@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_the_events_do_not_depend_on_the_order_of_delivery(order: tuple[str, ...], plan: ExchangePlan) -> None:
    check(Wire(plan).run(order))


@PLANS
@pytest.mark.parametrize("order", ORDERS[:3], ids="-".join)
def test_a_cut_at_every_event(order: tuple[str, ...], plan: ExchangePlan) -> None:
    lost = 0
    for event in range(Wire(plan).run(order).events):
        wire = Wire(plan, [event]).run(order)
        check(wire)
        assert wire.connections == 2
        lost += wire.lost
    assert lost > 20  # it cost something


@PLANS
@pytest.mark.parametrize("second", [1, 2, 3, 4, 6])
def test_a_cut_while_the_session_is_taken_up(second: int, plan: ExchangePlan) -> None:
    """second = 1: the greeting is lost; 2: the welcome, and what the cloud sends again; then what the device sends again."""
    for event in range(undisturbed(plan).events):
        wire = Wire(plan, [event, event + second]).run()
        check(wire)
        assert wire.connections in (2, 3)  # 2: it was over before the second


@PLANS
def test_a_link_that_carries_little_before_it_breaks_again(plan: ExchangePlan) -> None:
    """Three events per connection, of which two greet, are enough to get on; with two one would greet for ever."""
    for life in (3, 4, 5, 9):
        wire = Wire(plan, range(7, 4_000, life)).run()
        check(wire)
        assert wire.connections > undisturbed(plan).events // life


@settings(max_examples=200, deadline=None)
@given(
    plan=st.sampled_from([GROUPED, ENTRY_PLAN]),
    moves=st.lists(st.sampled_from(["up", "up", "down", "down", "work", "cut"]), max_size=150),
    cuts=st.sets(st.integers(0, 400), max_size=12),
    order=st.sampled_from(ORDERS),
)
def test_any_cuts_in_any_order_of_delivery(plan: ExchangePlan, moves: list[str], cuts: set[int], order: tuple[str, ...]) -> None:
    wire = Wire(plan, cuts)
    for move in moves:
        if move == "cut" and not wire.expired:
            wire.cut()
        else:
            wire.happen(move)
    check(wire.run(order))


# Negative controls: without the outbox the same checks fail


def fails(wire: Wire) -> bool:
    try:
        check(wire.run())
    except (AssertionError, ProtocolError):
        return True
    return False


@PLANS
def test_frames_that_are_not_sent_again_are_missed(plan: ExchangePlan) -> None:
    outcomes = []
    for event in range(undisturbed(plan).events):
        wire = Wire(plan, [event], sabotage=lambda frames: [])
        outcomes.append((fails(wire), wire.sent_again > 0))
    assert all(failed == needed for failed, needed in outcomes)
    assert sum(failed for failed, _ in outcomes) > 20


@PLANS
def test_frames_that_are_sent_again_twice_are_noticed(plan: ExchangePlan) -> None:
    outcomes = []
    for event in range(undisturbed(plan).events):
        wire = Wire(plan, [event], sabotage=lambda frames: [*frames, *frames])
        outcomes.append((fails(wire), wire.sent_again > 0))
    assert all(failed == needed for failed, needed in outcomes)


@PLANS
@pytest.mark.parametrize("wrong", [-1, 1])
def test_a_count_that_is_off_by_one_is_noticed(wrong: int, plan: ExchangePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    right = CloudSession.welcome_back
    monkeypatch.setattr(
        CloudSession, "welcome_back", lambda self, greeting: right(self, replace(greeting, received=greeting.received + wrong))
    )
    outcomes = [fails(Wire(plan, [event])) for event in range(3, undisturbed(plan).events - 4)]
    assert all(outcomes)


# By hand


def two_steps(wire: Wire) -> Script:
    held = wire.plan.entry_exchange
    for _ in range(2):
        wire.send(wire.device.entry(values(6, HIDDEN), 0, values(6, held.injection_columns) if held else None))
    while True:
        yield


def resumable(plan: ExchangePlan = GROUPED) -> Wire:
    """Two steps of six tokens are cached, and the script waits."""
    return Wire(plan, script=two_steps).run()


def take_up(wire: Wire) -> list[bytes]:
    """Both ways; returns what the device sends again, and delivers what the cloud does."""
    door = CloudSession(wire.plan, wire.cloud.shape, CONTRACT)
    greeting = door.receive(wire.device.hello_again())
    assert isinstance(greeting, Greeting)
    welcome, *lacking = wire.cloud.welcome_back(greeting)
    again = wire.device.welcomed_back(welcome)
    for data in lacking:
        wire.device.receive(data)
    return again


def kinds(frames: Iterable[bytes]) -> list[str | None]:
    return [pb.Frame.FromString(data).WhichOneof("kind") for data in frames]


def test_what_is_said_while_there_is_no_connection_waits() -> None:
    wire = resumable(ENTRY_PLAN)
    wire.cloud.receive(wire.device.entry(values(1, HIDDEN), 1, values(1, 7)))
    wire.cloud.exit(values(1, HIDDEN))  # to nobody
    wire.device.entry(values(2, HIDDEN), 0, values(2, 7))
    wire.device.entry(values(3, HIDDEN), 1, values(3, 7))
    length = wire.device.length
    again = take_up(wire)
    assert kinds(again) == ["entry", "entry"]
    assert wire.device.length == wire.cloud.length == length + 1
    for data in again:
        wire.cloud.receive(data)
    assert wire.cloud.steps == wire.device.steps


def test_a_ping_is_not_sent_again() -> None:
    wire = resumable()
    wire.device.ping(1)
    assert take_up(wire) == []


def test_a_frame_is_sent_again_as_it_was() -> None:
    wire = resumable()
    sent = [wire.device.entry(values(1, HIDDEN), 0), wire.device.entry(values(2, HIDDEN), 1)]
    assert take_up(wire) == sent
    assert take_up(wire) == sent  # as often as need be
    for data in sent:
        wire.cloud.receive(data)
    assert take_up(wire) == []


def test_taking_up_is_no_frame_of_the_session() -> None:
    wire = resumable()
    take_up(wire)  # acknowledges what the device had no occasion to
    before = trace(wire.device), trace(wire.cloud)
    for _ in range(50):
        take_up(wire)
    assert (trace(wire.device), trace(wire.cloud)) == before


def test_a_session_in_every_live_state_goes_on() -> None:
    for act in ("nothing", "entry", "compressed", "cancel", "close"):
        wire = resumable()
        if act != "nothing":
            wire.device.entry(values(2, HIDDEN), 1)
            for data in take_up(wire):
                wire.cloud.receive(data)
        if act == "compressed":
            wire.cloud.compressed(values(2, GROUPED.exchanges[0].compressed_columns))
        elif act in ("cancel", "close"):
            getattr(wire.device, act)()
        for data in take_up(wire):
            wire.cloud.receive(data)
        assert wire.device.state is wire.cloud.state
        assert (
            wire.device.state
            == {"nothing": "ready", "entry": "computing", "compressed": "waiting", "cancel": "cancelling", "close": "closing"}[act]
        )


# Refusals


def greeting_of(wire: Wire, **changes: Any) -> Greeting:
    greeting = Greeting(PRECISION, LEASED.session, wire.device.received, resume=True)
    return replace(greeting, **changes)


def test_counts_that_cannot_be() -> None:
    wire = resumable()
    wire.cloud.receive(wire.device.entry(values(1, HIDDEN), 0))  # acknowledges all that the cloud sent
    wire.cloud.compressed(values(1, GROUPED.exchanges[0].compressed_columns))
    sent = wire.cloud.outbox.sent
    assert sent == wire.device.received + 1
    before = trace(wire.cloud)
    for received in (sent + 1, sent - 2, 0, 2**64 - 1):
        with pytest.raises(RemoteProtocolError, match=rf"received {received} numbered frames, expected {sent - 1}\.\.{sent}") as caught:
            wire.cloud.welcome_back(greeting_of(wire, received=received))
        assert caught.value.code == "BAD_FRAME"
        assert trace(wire.cloud) == before
    assert kinds(wire.cloud.welcome_back(greeting_of(wire))) == ["welcome", "compressed"]
    assert kinds(wire.cloud.welcome_back(greeting_of(wire, received=sent))) == ["welcome"]
    with pytest.raises(RemoteProtocolError, match="expected"):  # what it said before stands
        wire.cloud.welcome_back(greeting_of(wire))


def test_counts_of_the_cloud_that_cannot_be() -> None:
    wire = resumable()
    wire.device.entry(values(1, HIDDEN), 0)
    before = trace(wire.device)
    (welcome,) = wire.cloud.welcome_back(greeting_of(wire))
    for received in (wire.device.outbox.sent + 1, wire.device.outbox.sent - 2, 0):
        frame = pb.Frame.FromString(welcome)
        frame.received = received
        with pytest.raises(RemoteProtocolError, match=f"received {received} numbered frames") as caught:
            wire.device.welcomed_back(frame.SerializeToString())
        assert caught.value.code == "BAD_FRAME"
        assert trace(wire.device) == before
    assert kinds(wire.device.welcomed_back(welcome)) == ["entry"]


def test_counts_in_other_frames() -> None:
    wire = resumable()
    entry = pb.Frame.FromString(wire.device.entry(values(1, HIDDEN), 0))
    entry.received = wire.cloud.outbox.sent + 1
    before = trace(wire.cloud)
    with pytest.raises(RemoteProtocolError, match=r"received \d+ numbered frames of \d+") as caught:
        wire.cloud.receive(entry.SerializeToString())
    assert caught.value.code == "BAD_FRAME"
    assert trace(wire.cloud) == before
    entry.received = 1  # less than it said before: no news
    assert isinstance(wire.cloud.receive(entry.SerializeToString()), StepBegun)


def test_another_precision_than_the_first() -> None:
    wire = resumable()
    with pytest.raises(RemoteProtocolError, match=f"a session of wire dtype {PRECISION}, taken up with fp32") as caught:
        wire.cloud.welcome_back(greeting_of(wire, precision=uniform("fp32")))
    assert caught.value.code == "WRONG_DTYPE"
    (welcome,) = wire.cloud.welcome_back(greeting_of(wire))
    frame = pb.Frame.FromString(welcome)
    frame.welcome.ClearField("precision")
    frame.welcome.dtype = pb.FP32
    before = trace(wire.device)
    with pytest.raises(RemoteProtocolError, match="welcome with fp32, asked for") as caught:
        wire.device.welcomed_back(frame.SerializeToString())
    assert caught.value.code == "WRONG_DTYPE"
    assert trace(wire.device) == before


@pytest.mark.parametrize("changes", [{"context_tokens": 31}, {"window": 2}, {"lease_millis": 1}, {"session": b"t" * 16}], ids=str)
def test_other_terms_than_the_first(changes: dict[str, Any]) -> None:
    wire = resumable()
    frame = pb.Frame.FromString(wire.cloud.welcome_back(greeting_of(wire))[0])
    for name, value in changes.items():
        setattr(frame.welcome, name, value)
    with pytest.raises(RemoteProtocolError, match="the terms of a session taken up again are not those of the first time") as caught:
        wire.device.welcomed_back(frame.SerializeToString())
    assert caught.value.code == "BAD_FRAME"


def ended(how: str) -> Wire:
    wire = resumable()
    if how == "closed":
        wire.cloud.receive(wire.device.close())
        wire.cloud.closed()
    elif how == "faulted":
        wire.cloud.fault("INTERNAL", "it broke")
    else:
        wire.cloud.receive(wire.device.abort("BAD_FRAME"))
    return wire


@pytest.mark.parametrize("how", ["closed", "faulted", "aborted"])
def test_a_session_that_is_over_has_expired(how: str) -> None:
    wire = ended(how)
    with pytest.raises(RemoteProtocolError, match="no such session; begin a new one") as caught:
        wire.cloud.welcome_back(greeting_of(wire))
    assert caught.value.code == "EXPIRED"


def test_a_session_without_a_lease_has_expired() -> None:
    wire = opened()
    with pytest.raises(RemoteProtocolError, match="no such session; begin a new one") as caught:
        wire.cloud.welcome_back(Greeting(uniform("fp32"), TERMS.session))
    assert caught.value.code == "EXPIRED"


def test_a_session_that_is_not_open_cannot_be_taken_up() -> None:
    wire = fresh()
    for step in (lambda: None, wire.device.hello, wire.device.close, lambda: wire.device.abort("INTERNAL")):
        step()
        with pytest.raises(LocalProtocolError, match=f"a session in state {wire.device.state} cannot be taken up again"):
            wire.device.hello_again()
    with pytest.raises(LocalProtocolError, match="the handshake is not done"):
        fresh().cloud.welcome_back(Greeting(uniform("fp32"), TERMS.session))


@pytest.mark.parametrize(("code", "error"), [("EXPIRED", SessionExpired), ("FULL", ServerFull)])
def test_a_fault_leaves_the_device_where_it_was(code: str, error: type[Exception]) -> None:
    """Another attempt may find the cloud in a better mood."""
    wire = resumable()
    wire.device.entry(values(1, HIDDEN), 0)
    before = trace(wire.device)
    door = CloudSession(GROUPED, wire.cloud.shape, CONTRACT)
    door.receive(wire.device.hello_again())
    with pytest.raises(error, match="not now"):
        wire.device.welcomed_back(door.fault(code, "not now"))
    assert trace(wire.device) == before
    assert kinds(take_up(wire)) == ["entry"]


def test_anything_else_on_a_new_connection() -> None:
    wire = resumable()
    before = trace(wire.device)
    for frame, code in ((pb.Frame(closed=pb.Closed()), "BAD_STATE"), (pb.Frame(pong=pb.Pong()), "BAD_STATE"), (pb.Frame(), "BAD_STATE")):
        with pytest.raises(RemoteProtocolError, match="on a new connection, expected welcome") as caught:
            wire.device.welcomed_back(frame.SerializeToString())
        assert caught.value.code == code
    with pytest.raises(RemoteProtocolError, match="not a frame"):
        wire.device.welcomed_back(b"\xff")
    assert trace(wire.device) == before


def test_a_first_greeting_has_nothing_to_count() -> None:
    hello = pb.Frame.FromString(fresh().device.hello())
    hello.received = 1
    with pytest.raises(RemoteProtocolError, match="received 1 numbered frames of 0") as caught:
        fresh().cloud.receive(hello.SerializeToString())
    assert caught.value.code == "BAD_FRAME"
    wire = fresh()
    wire.to_cloud(wire.device.hello())
    welcome = pb.Frame.FromString(wire.cloud.welcome(replace(LEASED, precision=uniform("fp32"))))
    welcome.received = 1
    with pytest.raises(RemoteProtocolError, match="received 1 numbered frames of 0"):
        wire.to_device(welcome.SerializeToString())


def test_the_session_id_says_nothing_without_the_handshake() -> None:
    """The door checks major, contract and dtype of whoever takes a session up, too."""
    wire = resumable()
    for change, code in (
        ({"major": 2}, "WRONG_VERSION"),
        ({"contract": b"\1" * 32}, "WRONG_CONTRACT"),
        ({"session": b"\1" * 15}, "BAD_FRAME"),
    ):
        frame = pb.Frame.FromString(wire.device.hello_again())
        for name, value in change.items():
            setattr(frame.hello, name, value)
        with pytest.raises(RemoteProtocolError) as caught:
            CloudSession(GROUPED, wire.cloud.shape, CONTRACT).receive(frame.SerializeToString())
        assert caught.value.code == code


# What is kept


def silent(wire: Wire, exit_rows: int = 1) -> bytes:
    """The device's next entry, as one would send it that never says what it received."""
    frame = pb.Frame.FromString(wire.device.entry(values(1, HIDDEN), exit_rows, values(1, 7), position=0))
    frame.ClearField("received")
    return frame.SerializeToString()


def test_a_peer_that_never_acknowledges_is_refused() -> None:
    wire = resumable(ENTRY_PLAN)
    wire.cloud.receive(wire.device.ping(0))  # so that nothing is owed
    assert wire.cloud.outbox.kept == 0
    for number in range(MAX_UNRECEIVED_FRAMES):
        wire.cloud.receive(silent(wire))
        wire.device.receive(wire.cloud.exit(values(1, HIDDEN)))
        assert wire.cloud.outbox.kept == number + 1
    frame = wire.cloud.outbox.kept_bytes // MAX_UNRECEIVED_FRAMES
    assert frame < 200
    wire.cloud.receive(silent(wire))
    before = trace(wire.cloud)
    for _ in range(3):
        with pytest.raises(
            RemoteProtocolError, match=f"{MAX_UNRECEIVED_FRAMES} frames were sent, and the peer acknowledges none of them"
        ) as caught:
            wire.cloud.exit(values(1, HIDDEN))
        assert caught.value.code == "BAD_FRAME"
        assert trace(wire.cloud) == before  # no more is kept, and the session is where it was
    assert kinds([wire.cloud.fault("BAD_FRAME", "you never acknowledge")]) == ["fault"]


def test_a_cloud_that_never_acknowledges_is_refused() -> None:
    wire = resumable(ENTRY_PLAN)
    for _ in range(MAX_UNRECEIVED_FRAMES):
        entry = wire.device.entry(values(1, HIDDEN), 1, values(1, 7), position=0)
        wire.cloud.receive(entry)
        exit_ = pb.Frame.FromString(wire.cloud.exit(values(1, HIDDEN)))
        exit_.ClearField("received")
        wire.device.receive(exit_.SerializeToString())
    before = trace(wire.device)
    with pytest.raises(RemoteProtocolError, match="acknowledges none"):
        wire.device.entry(values(1, HIDDEN), 1, values(1, 7), position=0)
    assert trace(wire.device) == before
    assert kinds([wire.device.abort("BAD_FRAME")]) == ["abort"]


def test_a_session_in_step_keeps_a_frame_or_two() -> None:
    wire = Wire(GROUPED)
    most = 0
    while wire.able():
        wire.happen("up", "down", "work")
        most = max(most, wire.device.outbox.kept, wire.cloud.outbox.kept)
    assert most <= LEASED.window + 2


def test_truncates_in_a_row_wait_for_an_occasion_to_be_acknowledged() -> None:
    wire = resumable()
    assert wire.device.outbox.kept == 0
    for length in range(WINDOW):
        wire.cloud.receive(wire.device.truncate(10 - length))
    with pytest.raises(LocalProtocolError, match="4 truncates in a row; ping the cloud"):
        wire.device.truncate(1)
    ping = wire.cloud.receive(wire.device.ping(1))
    assert isinstance(ping, PingArrived)
    wire.device.receive(ping.answer)
    assert wire.device.outbox.kept == 0
    wire.cloud.receive(wire.device.truncate(1))
    assert wire.device.length == wire.cloud.length == 1


def test_the_outbox() -> None:
    outbox = Outbox()
    assert outbox.after(0) == []
    frames = [bytes([number]) * number for number in range(1, 6)]
    for frame in frames:
        outbox.add(frame)
    assert (outbox.sent, outbox.kept, outbox.kept_bytes) == (5, 5, 15)
    assert [outbox.frame(number) for number in range(7)] == [None, *frames, None]
    outbox.received(2)
    outbox.received(1)
    assert outbox.after(2) == frames[2:]
    assert [outbox.frame(number) for number in range(7)] == [None, None, None, *frames[2:], None]
    for count in (1, 6):
        with pytest.raises(RemoteProtocolError, match=rf"received {count} numbered frames, expected 2\.\.5"):
            outbox.after(count)
    assert outbox.after(5) == []
    assert (outbox.sent, outbox.kept, outbox.kept_bytes) == (5, 0, 0)


# Without a lease


def test_without_a_lease_nothing_is_counted_on_the_wire() -> None:
    wire = opened()
    run_step(wire, 3, 1)
    wire.to_device(wire.to_cloud(wire.device.ping(1)).answer)  # type: ignore[union-attr]
    wire.to_cloud(wire.device.truncate(1))
    wire.to_cloud(wire.device.cancel())
    wire.to_device(wire.cloud.cancelled())
    wire.to_cloud(wire.device.close())
    wire.to_device(wire.cloud.closed())
    assert len(wire.transcript) > 12
    assert not any(pb.Frame.FromString(data).received for _, data in wire.transcript)
    assert wire.device.outbox.kept == wire.cloud.outbox.kept == 0
    with pytest.raises(RemoteProtocolError, match="received 1 numbered frames of 0"):
        opened().cloud.receive(pb.Frame(truncate=pb.Truncate(), received=1).SerializeToString())


def test_with_a_lease_each_frame_counts_what_came_before() -> None:
    wire = opened(terms=replace(LEASED, precision=uniform("fp32")))
    run_step(wire, 3, 1)
    counts = [(sender, pb.Frame.FromString(data).received) for sender, data in wire.transcript]
    assert counts == [
        *(("device", 0), ("cloud", 0)),  # hello, welcome
        *(("device", 0), ("cloud", 1), ("device", 1), ("cloud", 2), ("device", 2), ("cloud", 3)),
    ]


def test_the_welcome_of_a_leased_session() -> None:
    wire = fresh()
    wire.to_cloud(wire.device.hello())
    terms = Terms(uniform("fp32"), 32, 6, 60_000, b"s" * 16, 5_000, 2)
    assert wire.to_device(wire.cloud.welcome(terms)) == Opened(terms)
