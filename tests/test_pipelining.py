"""Several steps in flight, entries that roll the cache back, pings, and devices of another minor version."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from plora.artifact import ExchangePlan
from plora.artifact.errors import LocalProtocolError
from plora.protocol import Loopback
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import (
    CancelAsked,
    CancelDone,
    CloseAsked,
    ClosedDone,
    Greeting,
    Ignored,
    Opened,
    PingArrived,
    PongArrived,
    StepBegun,
)
from plora.protocol.limits import MAJOR, MAX_PROBE_BYTES, MINOR, WINDOW
from plora.protocol.roles import CloudSession
from plora.protocol.session import is_ping
from plora.protocol.states import LIVE, SENDERS, State

from .test_protocol import (
    CONTRACT,
    ENTRY_PLAN,
    HIDDEN,
    ONE,
    PLAN,
    TERMS,
    Wire,
    agree,
    at,
    frame_of,
    fresh,
    opened,
    refused,
    run_step,
    tensor_of,
    trace,
    values,
)

# Several steps in flight


def pipelined(wire: Wire) -> Iterator[Callable[[], Any]]:
    """Acts of three steps of 1, 2 and 3 tokens behind one another, as far apart as their order allows, then as close."""

    def entry(tokens: int) -> Callable[[], Any]:
        return lambda: wire.up.append(wire.device.entry(values(tokens, HIDDEN), 1))

    def compressed(step: int) -> Callable[[], Any]:
        return lambda: wire.down.append(wire.cloud.compressed(values(step, 2), step))

    def injections(step: int) -> Callable[[], Any]:
        return lambda: wire.up.append(wire.device.injections(values(step, 6), step))

    def leave() -> None:
        wire.down.append(wire.cloud.exit(values(1, HIDDEN)))

    up, down = wire.deliver_up, wire.deliver_down
    yield from (entry(1), entry(2), up, up, entry(3), up)
    yield from (compressed(1), compressed(2), compressed(3), down, injections(1), up, compressed(1), down, down, down)
    yield from (injections(1), injections(2), up, up, leave, down, compressed(2), down)
    yield from (injections(3), injections(2), up, compressed(3), up, leave, down, down, injections(3), up, leave, down)


PIPELINED_ACTS = len(list(pipelined(Wire())))


def pipeline(done: int) -> Wire:
    wire = Wire(terms=TERMS)
    for act in list(pipelined(wire))[:done]:
        act()
    return wire


def test_steps_behind_one_another() -> None:
    wire = pipeline(PIPELINED_ACTS)
    agree(wire, State.READY, 6)
    assert wire.device.steps == wire.cloud.steps == []
    run_step(wire, 4, 1)


@pytest.mark.parametrize("done", range(1, PIPELINED_ACTS + 1))
def test_cancel_and_close_after_every_act_of_several_steps(done: int) -> None:
    """The oldest step that the device has in flight goes, and all behind it; what the cloud had finished of them goes too."""
    wire = pipeline(done)
    length = wire.device.length if wire.device.steps else wire.device._done[-1][1]
    wire.up.append(wire.device.cancel())
    wire.drain()
    agree(wire, State.READY, length)
    assert wire.device.steps == wire.cloud.steps == []
    run_step(wire, 4, 1)

    wire = pipeline(done)
    wire.up.append(wire.device.close())
    wire.drain()
    assert (wire.device.state, wire.cloud.state) == (State.OVER, State.OVER)


def two_steps(exchanged: int = 0) -> Loopback:
    """Two steps of 2 tokens in flight; of the first, so many exchanges are done."""
    wire = at(State.COMPUTING, exchanged)
    wire.to_cloud(wire.device.entry(values(2, HIDDEN), 1))
    return wire


def test_the_window() -> None:
    wire = at(State.COMPUTING)
    for flying in range(1, WINDOW):
        assert len(wire.device.steps) == len(wire.cloud.steps) == flying
        wire.to_cloud(wire.device.entry(values(1, HIDDEN), 1))
        assert wire.device.end == wire.cloud.end == 2 + flying
    with pytest.raises(LocalProtocolError, match="an entry while 4 steps are in flight, the most are 4"):
        wire.device.entry(values(1, HIDDEN), 1)
    entry = pb.Entry(step=5, position=5, hidden=tensor_of(1, HIDDEN))
    refused(wire.cloud, pb.Frame(entry=entry), "BAD_STEP", "an entry while 4 steps are in flight, the most are 4")
    alone = opened(terms=ONE)
    alone.to_cloud(alone.device.entry(values(1, HIDDEN), 0))
    with pytest.raises(LocalProtocolError, match="an entry while 1 steps are in flight, the most are 1"):
        alone.device.entry(values(1, HIDDEN), 1)
    refused(alone.cloud, pb.Frame(entry=pb.Entry(step=2, position=1, hidden=tensor_of(1, HIDDEN))), "BAD_STEP", "the most are 1")


def test_a_cloud_that_allows_more_than_we_keep_track_of() -> None:
    wire = fresh()
    wire.to_cloud(wire.device.hello())
    welcome = frame_of("welcome", wire)
    welcome.welcome.window, welcome.welcome.idle_millis = 1000, TERMS.idle_millis
    assert wire.device.receive(welcome.SerializeToString()) == Opened(TERMS)  # WINDOW of them
    welcome.welcome.window = 0
    wire = at(State.GREETED)
    assert wire.device.receive(welcome.SerializeToString()) == Opened(ONE)


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_a_step_behind_another_begins_where_that_one_ends(position: int) -> None:
    wire = at(State.COMPUTING)  # two tokens
    wire.to_cloud(wire.device.entry(values(2, HIDDEN), 1))
    with pytest.raises(LocalProtocolError, match=f"entry at position {position}, but 4 tokens are in flight or cached"):
        wire.device.entry(values(1, HIDDEN), 1, position=position)
    entry = pb.Entry(step=3, position=position, hidden=tensor_of(1, HIDDEN))
    refused(wire.cloud, pb.Frame(entry=entry), "BAD_STEP", f"entry at position {position}, but 4 tokens are in flight or cached")


def test_no_step_overtakes_another() -> None:
    overtakes = "exchange 0 of step 2 overtakes step 1"
    early = pb.Frame(compressed=pb.Compressed(step=2, tensor=tensor_of(2, 2)))
    with pytest.raises(LocalProtocolError, match=overtakes):
        two_steps().cloud.compressed(values(2, 2), 2)
    refused(two_steps().device, early, "BAD_STEP", overtakes)

    def both_waiting() -> Loopback:
        wire = two_steps()
        for step in (1, 2):
            wire.to_device(wire.cloud.compressed(values(2, 2), step))
        return wire

    with pytest.raises(LocalProtocolError, match=overtakes):
        both_waiting().device.injections(values(2, 6), 2)
    injections = pb.Frame(injections=pb.Injections(step=2, tensor=tensor_of(2, 6)))
    refused(both_waiting().cloud, injections, "BAD_STEP", overtakes)
    wire = both_waiting()
    for step in (1, 2):
        wire.to_cloud(wire.device.injections(values(2, 6), step))
    with pytest.raises(LocalProtocolError, match="exchange 1 of step 2 overtakes step 1"):
        wire.cloud.compressed(values(2, 2), 2)
    exit_ = pb.Frame(exit=pb.Exit(step=2, hidden=tensor_of(1, HIDDEN)))
    refused(wire.device, exit_, "BAD_STEP", "exit of step 2, expected 1")


def test_each_step_has_a_state_of_its_own() -> None:
    wire = two_steps()
    wire.to_device(wire.cloud.compressed(values(2, 2)))
    assert [step.state for step in wire.device.steps] == [step.state for step in wire.cloud.steps] == [State.WAITING, State.COMPUTING]
    assert wire.device.state is wire.cloud.state is State.WAITING
    with pytest.raises(LocalProtocolError, match="injections is not legal in state computing"):
        wire.device.injections(values(2, 6), 2)
    with pytest.raises(LocalProtocolError, match="compressed is not legal in state waiting"):
        wire.cloud.compressed(values(2, 2))
    with pytest.raises(LocalProtocolError, match="compressed of step 3, which is not in flight"):
        wire.cloud.compressed(values(2, 2), 3)
    again = pb.Frame(compressed=pb.Compressed(step=1, tensor=tensor_of(2, 2)))
    refused(wire.device, again, "BAD_STATE", "compressed is not legal in state waiting")
    not_asked = pb.Frame(injections=pb.Injections(step=2, tensor=tensor_of(2, 6)))
    refused(wire.cloud, not_asked, "BAD_STATE", "injections is not legal in state computing")
    with pytest.raises(LocalProtocolError, match="truncate is not legal in state computing"):
        two_steps().device.truncate(0)


# Rolling back


@pytest.mark.parametrize("plan", [PLAN, ENTRY_PLAN], ids=["exchanges", "entry"])
@pytest.mark.parametrize("position", range(6))
def test_an_entry_rolls_the_cache_back(position: int, plan: ExchangePlan) -> None:
    wire = opened(plan)
    run_step(wire, 5, 1)
    injection = values(2, 7) if plan is ENTRY_PLAN else None
    begun = wire.to_cloud(wire.device.entry(values(2, HIDDEN), 1, injection, position=position))
    assert isinstance(begun, StepBegun)
    assert begun.position == position
    assert wire.device.length == wire.cloud.length == position
    assert wire.device.end == wire.cloud.end == position + 2
    assert wire.to_cloud(wire.device.cancel()) == CancelAsked(2, position)  # the rest stays dropped
    assert wire.to_device(wire.cloud.cancelled()) == CancelDone(position)
    run_step(wire, 1, 1)
    agree(wire, State.READY, position + 1)


def test_speculation_costs_no_message() -> None:
    """Five rounds of three drafted tokens of which one stays: an entry and an exit each, and nothing else."""
    wire = opened(ENTRY_PLAN)
    run_step(wire, 6, 1)
    frames = len(wire.transcript)
    for kept in range(6, 16, 2):
        begun = wire.to_cloud(wire.device.entry(values(4, HIDDEN), 4, values(4, 7), position=kept))
        assert isinstance(begun, StepBegun)
        wire.to_device(wire.cloud.exit(values(4, HIDDEN)))
        agree(wire, State.READY, kept + 4)
    assert len(wire.transcript) - frames == 2 * 5


def test_a_cancel_that_crosses_the_exit_of_a_step_that_rolled_back() -> None:
    wire = opened(ENTRY_PLAN)
    run_step(wire, 6, 1)
    wire.to_cloud(wire.device.entry(values(2, HIDDEN), 0, values(2, 7), position=3))
    crossing = wire.cloud.exit(values(0, HIDDEN))
    assert wire.cloud.length == 5
    assert wire.to_cloud(wire.device.cancel()) == CancelAsked(2, 3)
    assert wire.to_device(crossing) == Ignored("exit")
    assert wire.to_device(wire.cloud.cancelled()) == CancelDone(3)
    agree(wire, State.READY, 3)


def test_a_cancel_names_one_of_the_last_steps() -> None:
    wire = opened()
    for _ in range(2 * WINDOW + 1):
        run_step(wire, 1, 1)
    cancel = pb.Frame(cancel=pb.Cancel(step=1))
    refused(wire.cloud, cancel, "BAD_STEP", "cancel of step 1, the last one is 9")


@pytest.mark.parametrize("arrived", range(WINDOW + 1))
def test_a_cancel_that_crosses_a_whole_window_of_exits(arrived: int) -> None:
    wire = Wire(ENTRY_PLAN, TERMS)
    for tokens in (1, 2, 3, 4):
        wire.to_cloud(wire.device.entry(values(tokens, HIDDEN), 1, values(tokens, 7)))
    wire.down.extend(wire.cloud.exit(values(1, HIDDEN)) for _ in range(WINDOW))
    for _ in range(arrived):
        wire.deliver_down()
    wire.up.append(wire.device.cancel())
    wire.drain()
    agree(wire, State.READY, [0, 1, 3, 6, 6][arrived])  # between steps, the last one goes
    run_step(wire, 2, 1)


@pytest.mark.parametrize("finished", range(4))
def test_what_a_cancel_may_name_after_a_cancel(finished: int) -> None:
    """The step given up, or the last one; not what lay between, whether the cloud had finished it or not."""

    def given_up() -> CloudSession:
        wire = opened(ENTRY_PLAN)
        for _ in range(3):
            wire.to_cloud(wire.device.entry(values(1, HIDDEN), 1, values(1, 7)))
        for _ in range(finished):
            wire.cloud.exit(values(1, HIDDEN))
        wire.to_cloud(wire.device.cancel())
        wire.cloud.cancelled()
        return wire.cloud

    for number in (1, 3):
        assert given_up().receive(pb.Frame(cancel=pb.Cancel(step=number)).SerializeToString()) == CancelAsked(number, 0)
    refused(given_up(), pb.Frame(cancel=pb.Cancel(step=2)), "BAD_STEP", "cancel of step 2, the last one is 3")


# Pings


@pytest.mark.parametrize("state", LIVE)
def test_a_ping_disturbs_nothing(state: State) -> None:
    wire = at(state)
    before = trace(wire.device), trace(wire.cloud)
    for number, padding, reply in ((0, 0, 0), (2**32 - 1, 1000, MAX_PROBE_BYTES), (5, MAX_PROBE_BYTES, 7)):
        arrived = wire.to_cloud(wire.device.ping(number, padding, reply))
        assert isinstance(arrived, PingArrived)
        pong = pb.Frame.FromString(arrived.answer).pong
        assert (pong.id, pong.padding) == (number, bytes(reply))
        assert wire.to_device(arrived.answer) == PongArrived(number)
    assert (trace(wire.device), trace(wire.cloud)) == before


def test_a_ping_is_known_by_its_first_byte() -> None:
    """So that a carrier may let it overtake what waits for the engine."""
    for wire in (at(State.READY), leased()):
        for kind in SENDERS:
            frame = frame_of(kind, wire)
            frame.received = 3
            assert is_ping(frame.SerializeToString()) == (kind == "ping")
        assert is_ping(wire.device.ping(0))
        assert not is_ping(b"")


# Versions


def leased() -> Loopback:
    return opened(terms=replace(TERMS, lease_millis=5_000))


def greeted_by(minor: int, **capabilities: bool) -> CloudSession:
    cloud = fresh().cloud
    hello = pb.Hello(
        major=MAJOR, minor=minor, contract=bytes.fromhex(CONTRACT), capabilities=pb.Capabilities(**capabilities), dtype=pb.FP32
    )
    assert isinstance(cloud.receive(pb.Frame(hello=hello).SerializeToString()), Greeting)
    return cloud


def test_a_device_of_minor_1_hears_only_what_it_knows() -> None:
    """It takes any other field for a place to hide text, and refuses it."""
    cloud = greeted_by(1, fp16=True, bf16=True)
    asked = replace(TERMS, lease_millis=5_000, window=WINDOW)
    said = pb.Frame.FromString(cloud.welcome(asked))
    assert cloud.terms == replace(TERMS, lease_millis=0, window=1)
    assert not said.received
    assert {field.number for field, _ in said.welcome.ListFields()} == {1, 2, 3, 4, 5, 6, 7}
    assert {field.number for field, _ in said.welcome.capabilities.ListFields()} == {1, 2}
    for number in (1, 2):
        entry = pb.Entry(step=number, position=number - 1, exit_rows=1, hidden=tensor_of(1, HIDDEN))
        cloud.receive(pb.Frame(entry=entry).SerializeToString())
        for exchange in (0, 1):
            frame = pb.Frame.FromString(cloud.compressed(values(1, 2)))
            assert {field.number for field, _ in frame.ListFields()} == {4}
            injections = pb.Injections(step=number, exchange=exchange, tensor=tensor_of(1, 6))
            cloud.receive(pb.Frame(injections=injections).SerializeToString())
        frame = pb.Frame.FromString(cloud.exit(values(1, HIDDEN), compute_micros=77))
        assert {field.number for field, _ in frame.exit.ListFields()} == {1, 2}


def test_a_device_that_cannot_resume_gets_no_lease() -> None:
    cloud = greeted_by(MINOR, fp16=True)
    cloud.welcome(replace(TERMS, lease_millis=5_000))
    assert cloud.terms == TERMS
    cloud = greeted_by(MINOR, resume=True)
    cloud.welcome(replace(TERMS, lease_millis=5_000))
    assert cloud.terms == replace(TERMS, lease_millis=5_000)


def test_a_later_minor_is_served_too() -> None:
    assert greeted_by(MINOR + 1, resume=True).welcome(TERMS)


def test_a_close_that_crosses_the_welcome_of_a_leased_session() -> None:
    """The device then hears counts under terms that it took note of while closing."""
    wire = fresh()
    hello, close = wire.device.hello(), wire.device.close()
    assert not wire.device.live  # there is nothing yet to go on with
    wire.to_cloud(hello)
    welcome = wire.cloud.welcome(replace(TERMS, lease_millis=5_000))
    assert wire.to_device(welcome) == Ignored("welcome")
    assert wire.device.live
    assert wire.device.outbox.after(0) == [close]  # a lost one can be sent again
    assert wire.to_cloud(close) == CloseAsked()
    assert wire.to_device(wire.cloud.closed()) == ClosedDone()
