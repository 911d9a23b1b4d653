"""The session machine without a network: whole sessions, every entry of the state table, every refusal with its code."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from plora.artifact import AdaptedLayer, DecoderShape, ExchangePlan, Rope, Source, grouped_plan, paper_plan
from plora.artifact.errors import (
    CloudFailed,
    ContextOverflow,
    LocalProtocolError,
    PlanError,
    PloraError,
    ProtocolError,
    Refused,
    RemoteProtocolError,
    ServerFull,
    SessionExpired,
)
from plora.protocol import MAX_FRAME_BYTES, Loopback, Terms, tensors, uniform
from plora.protocol import plora_pb2 as pb
from plora.protocol.events import (
    Aborted,
    CancelAsked,
    CancelDone,
    CloseAsked,
    ClosedDone,
    CompressedArrived,
    Event,
    Greeting,
    Ignored,
    InjectionsArrived,
    Opened,
    StepBegun,
    StepDone,
    Truncated,
)
from plora.protocol.faults import ERRORS, fault_error
from plora.protocol.limits import MAJOR, MAX_DETAIL_CHARACTERS, MAX_PROBE_BYTES, MAX_STEP_TOKENS, WINDOW, step_tokens
from plora.protocol.roles import CloudSession, DeviceSession
from plora.protocol.session import Session
from plora.protocol.states import LIVE, SENDERS, TRANSITIONS, UNNUMBERED, Role, State, mermaid, next_state
from plora.protocol.tensors import Floats

CODES = set(pb.FaultCode.keys())
KINDS = pb.Frame.DESCRIPTOR.oneofs_by_name["kind"].fields
CONTRACT = "c0" * 32
HIDDEN = 8
PLAN = paper_plan(2, 2)
ENTRY_PLAN = ExchangePlan(2, 0, 0, (Source(0, (("shared", 2),), True),), (AdaptedLayer(1, 0, (("q", 3), ("v", 4))),))
TERMS = Terms(uniform("fp32"), 32, 6, 60_000, b"s" * 16, window=WINDOW)
ONE = replace(TERMS, window=1)


def shape_of(hidden: int, layers: int) -> DecoderShape:
    return DecoderShape(hidden, layers, 2, 1, 4, 8, 10, 64, 1e-5, (0,) * layers, Rope((1.0, 0.1), 1.0))


SHAPE = shape_of(HIDDEN, 2)


def values(rows: int, columns: int, seed: int = 0) -> Floats:
    """[rows, columns] float32 that every wire dtype holds exactly."""
    return np.random.default_rng(seed).integers(-64, 64, (rows, columns)).astype(np.float32) / 8


def fresh(plan: ExchangePlan = PLAN, dtype: str = "fp32") -> Loopback:
    return Loopback(plan, shape_of(HIDDEN, plan.layers), CONTRACT, uniform(dtype))


def opened(plan: ExchangePlan = PLAN, dtype: str = "fp32", terms: Terms = TERMS) -> Loopback:
    wire = fresh(plan, dtype)
    assert wire.to_cloud(wire.device.hello()) == Greeting(uniform(dtype), b"", resume=True)
    terms = replace(terms, precision=uniform(dtype))
    assert wire.to_device(wire.cloud.welcome(terms)) == Opened(terms)
    return wire


def run_step(wire: Loopback, tokens: int, exit_rows: int) -> None:
    """One step with an exact check of every tensor on its other side."""
    plan = wire.device.plan
    held = plan.entry_exchange
    hidden = values(tokens, HIDDEN, 1)
    injection = values(tokens, held.injection_columns, 2) if held else None
    length, step = wire.device.length, wire.device.step
    begun = wire.to_cloud(wire.device.entry(hidden, exit_rows, injection))
    assert isinstance(begun, StepBegun)
    assert (begun.step, begun.position, begun.exit_rows) == (step + 1, length, exit_rows)
    assert wire.device.running == wire.cloud.running
    np.testing.assert_array_equal(begun.hidden, hidden)
    if injection is None:
        assert begun.injection is None
    else:
        np.testing.assert_array_equal(begun.injection, injection)
    for exchange in plan.exchanges:
        down, up = values(tokens, exchange.compressed_columns, 3), values(tokens, exchange.injection_columns, 4)
        arrived = wire.to_device(wire.cloud.compressed(down))
        assert isinstance(arrived, CompressedArrived)
        assert (arrived.step, arrived.exchange) == (step + 1, exchange)
        np.testing.assert_array_equal(arrived.values, down)
        answered = wire.to_cloud(wire.device.injections(up))
        assert isinstance(answered, InjectionsArrived)
        assert (answered.step, answered.exchange) == (step + 1, exchange)
        np.testing.assert_array_equal(answered.values, up)
    last = values(exit_rows, HIDDEN, 5)
    done = wire.to_device(wire.cloud.exit(last, compute_micros=step))
    assert isinstance(done, StepDone)
    assert (done.step, done.compute_micros) == (step + 1, step)
    np.testing.assert_array_equal(done.hidden, last)
    assert wire.device.length == wire.cloud.length == length + tokens


def agree(wire: Loopback, state: State, length: int) -> None:
    assert (wire.device.state, wire.device.length) == (wire.cloud.state, wire.cloud.length) == (state, length)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("plan", [PLAN, ENTRY_PLAN, grouped_plan(5, 2, 3, separate=True), ExchangePlan(2, 0, 0, (), ())], ids=str)
def test_a_whole_session(plan: ExchangePlan, dtype: str) -> None:
    wire = opened(plan, dtype)
    run_step(wire, 6, 0)  # a prompt in chunks
    run_step(wire, 3, 1)
    for _ in range(4):
        run_step(wire, 1, 1)
    assert wire.to_cloud(wire.device.truncate(7)) == Truncated(7)
    agree(wire, State.READY, 7)
    run_step(wire, 5, 5)
    assert wire.to_cloud(wire.device.cancel()) == CancelAsked(7, 7)
    assert wire.to_device(wire.cloud.cancelled()) == CancelDone(7)
    agree(wire, State.READY, 7)
    assert wire.to_cloud(wire.device.truncate(0)) == Truncated(0)
    run_step(wire, 2, 2)
    assert wire.to_cloud(wire.device.close()) == CloseAsked()
    assert wire.to_device(wire.cloud.closed()) == ClosedDone()
    agree(wire, State.OVER, 2)
    assert {sender for sender, _ in wire.transcript} == {"device", "cloud"}


class Wire(Loopback):
    """A loopback whose frames wait in two queues, so that they may cross."""

    def __init__(self, plan: ExchangePlan = PLAN, terms: Terms | None = None) -> None:
        """terms: of a session that is open, None for one that is not."""
        super().__init__(plan, shape_of(HIDDEN, plan.layers), CONTRACT)
        self.up: deque[bytes] = deque()
        self.down: deque[bytes] = deque()
        if terms is not None:
            self.to_cloud(self.device.hello())
            self.to_device(self.cloud.welcome(terms))

    def deliver_up(self) -> Event | None:
        """The oldest frame to the cloud; one that is over reads no more."""
        data = self.up.popleft()
        return None if self.cloud.state is State.OVER else self.to_cloud(data)

    def deliver_down(self) -> Event | None:
        data = self.down.popleft()
        return None if self.device.state is State.OVER else self.to_device(data)

    def drain(self) -> None:
        """Delivers everything; the cloud answers a cancel and a close, and does nothing else any more."""
        while self.up or self.down:
            if self.up:
                event = self.deliver_up()
                if isinstance(event, CancelAsked):
                    self.down.append(self.cloud.cancelled())
                elif isinstance(event, CloseAsked):
                    self.down.append(self.cloud.closed())
            if self.down:
                self.deliver_down()


def acts(wire: Wire, tokens: int = 2) -> Iterator[Callable[[], Any]]:
    """What happens from the hello to the end of a first step, one act at a time."""
    yield lambda: wire.up.append(wire.device.hello())
    yield wire.deliver_up
    yield lambda: wire.down.append(wire.cloud.welcome(TERMS))
    yield wire.deliver_down
    yield lambda: wire.up.append(wire.device.entry(values(tokens, HIDDEN), 1))
    yield wire.deliver_up
    for exchange in PLAN.exchanges:
        yield lambda e=exchange: wire.down.append(wire.cloud.compressed(values(tokens, e.compressed_columns)))
        yield wire.deliver_down
        yield lambda e=exchange: wire.up.append(wire.device.injections(values(tokens, e.injection_columns)))
        yield wire.deliver_up
    yield lambda: wire.down.append(wire.cloud.exit(values(1, HIDDEN)))
    yield wire.deliver_down


ALL_ACTS = len(list(acts(Wire())))


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("done", range(5, ALL_ACTS + 1))
def test_cancel_after_every_act_of_a_step(done: int, before: int) -> None:
    wire = Wire()
    for number, act in enumerate(acts(wire)):
        if number == 4 and before:
            run_step(wire, before, 1)
        if number < done:
            act()
    wire.up.append(wire.device.cancel())
    assert wire.device.state is State.CANCELLING
    wire.drain()
    agree(wire, State.READY, before)
    run_step(wire, 4, 1)
    agree(wire, State.READY, before + 4)


@pytest.mark.parametrize("cancelled", [False, True])
@pytest.mark.parametrize("done", range(1, ALL_ACTS + 1))
def test_close_after_every_act(done: int, cancelled: bool) -> None:
    wire = Wire()
    for number, act in enumerate(acts(wire)):
        if number < done:
            act()
    if cancelled and wire.device.step:
        wire.up.append(wire.device.cancel())
    wire.up.append(wire.device.close())
    wire.drain()
    assert (wire.device.state, wire.cloud.state) == (State.OVER, State.OVER)


def test_a_cancel_does_not_bring_truncated_tokens_back() -> None:
    wire = opened()
    run_step(wire, 4, 1)
    run_step(wire, 2, 1)
    assert wire.to_cloud(wire.device.truncate(3)) == Truncated(3)
    assert wire.to_cloud(wire.device.cancel()) == CancelAsked(2, 3)
    assert wire.to_device(wire.cloud.cancelled()) == CancelDone(3)
    agree(wire, State.READY, 3)


def test_cancelling_twice_changes_nothing() -> None:
    wire = opened()
    run_step(wire, 4, 1)
    for _ in range(2):
        assert wire.to_cloud(wire.device.cancel()) == CancelAsked(1, 0)
        assert wire.to_device(wire.cloud.cancelled()) == CancelDone(0)
    agree(wire, State.READY, 0)


# The state table


def at(state: State, exchanged: int = 0, cancelled: bool = False, terms: Terms = TERMS) -> Loopback:
    """Both machines in `state` with nothing in flight; exchanged: exchanges done of the step that runs; cancelled: that step was given up."""
    wire = fresh()
    if state is State.START:
        return wire
    wire.to_cloud(wire.device.hello())
    if state is State.GREETED:
        return wire
    wire.to_device(wire.cloud.welcome(terms))
    if state is State.READY:
        run_step(wire, 1, 1)
        return wire
    wire.to_cloud(wire.device.entry(values(2, HIDDEN), 1))
    for exchange in PLAN.exchanges[:exchanged]:
        wire.to_device(wire.cloud.compressed(values(2, exchange.compressed_columns)))
        wire.to_cloud(wire.device.injections(values(2, exchange.injection_columns)))
    if state is State.COMPUTING:
        return wire
    if state is State.WAITING:
        wire.to_device(wire.cloud.compressed(values(2, 2)))
        return wire
    if state is State.CANCELLING or cancelled:
        wire.to_cloud(wire.device.cancel())
    if state is State.CANCELLING:
        return wire
    wire.to_cloud(wire.device.close())
    if state is State.OVER:
        wire.to_device(wire.cloud.closed())
    return wire


def frame_of(kind: str, wire: Loopback) -> pb.Frame:
    """A frame of `kind` whose content is right for where `wire` stands, if the kind is legal there."""
    machine = wire.cloud
    step, exchange = machine.step, machine.running.exchange
    tokens = machine.running.tokens

    def tensor(rows: int, columns: int) -> pb.Tensor:
        return tensors.encode(values(rows, columns), "fp32", rows, columns, kind)

    frames = {
        "hello": pb.Frame(hello=pb.Hello(major=MAJOR, contract=bytes.fromhex(CONTRACT), dtype=pb.FP32)),
        "welcome": pb.Frame(welcome=pb.Welcome(dtype=pb.FP32, session=b"s" * 16, context_tokens=32, step_tokens=6)),
        "entry": pb.Frame(entry=pb.Entry(step=step + 1, position=machine.end, exit_rows=1, hidden=tensor(2, HIDDEN))),
        "compressed": pb.Frame(compressed=pb.Compressed(step=step, exchange=exchange, tensor=tensor(tokens, 2))),
        "injections": pb.Frame(injections=pb.Injections(step=step, exchange=exchange, tensor=tensor(tokens, 6))),
        "exit": pb.Frame(exit=pb.Exit(step=step, hidden=tensor(1, HIDDEN))),
        "truncate": pb.Frame(truncate=pb.Truncate(length=0)),
        "cancel": pb.Frame(cancel=pb.Cancel(step=step)),
        "cancelled": pb.Frame(cancelled=pb.Cancelled(step=step, length=machine.running.position)),
        "close": pb.Frame(close=pb.Close()),
        "closed": pb.Frame(closed=pb.Closed()),
        "fault": pb.Frame(fault=pb.Fault(code=pb.FULL, detail="try later", retry_after_millis=5)),
        "abort": pb.Frame(abort=pb.Abort(code=pb.BAD_TENSOR)),
        "ping": pb.Frame(ping=pb.Ping(id=7, padding=bytes(3), reply_bytes=5)),
        "pong": pb.Frame(pong=pb.Pong(id=7, padding=bytes(5))),
    }
    assert set(frames) == set(SENDERS) == {field.name for field in KINDS}
    return frames[kind]


def send(kind: str, wire: Loopback) -> bytes:
    """The sender's own call for a frame of `kind`."""
    device, cloud = wire.device, wire.cloud
    calls: dict[str, Callable[[], bytes]] = {
        "hello": device.hello,
        "welcome": lambda: cloud.welcome(TERMS),
        "entry": lambda: device.entry(values(2, HIDDEN), 1),
        "compressed": lambda: cloud.compressed(values(cloud.running.tokens, 2)),
        "injections": lambda: device.injections(values(device.running.tokens, 6)),
        "exit": lambda: cloud.exit(values(1, HIDDEN)),
        "truncate": lambda: device.truncate(0),
        "cancel": device.cancel,
        "cancelled": cloud.cancelled,
        "close": device.close,
        "closed": cloud.closed,
        "fault": lambda: cloud.fault("FULL", "try later", 5),
        "abort": lambda: device.abort("BAD_TENSOR"),
        "ping": lambda: device.ping(7, 3, 5),
        "pong": lambda: cloud._send(pb.Frame(pong=pb.Pong(id=7, padding=bytes(5)))),  # no call of its own: the answer to a ping
    }
    assert set(calls) == set(SENDERS)
    return calls[kind]()


def sides(kind: str, wire: Loopback) -> tuple[Session, Session]:
    """(sender, receiver) of a kind."""
    return (wire.device, wire.cloud) if SENDERS[kind] is Role.DEVICE else (wire.cloud, wire.device)


@pytest.mark.parametrize("kind", SENDERS)
@pytest.mark.parametrize("state", State)
def test_every_kind_of_frame_in_every_state(state: State, kind: str) -> None:
    exchanged = 2 if kind == "exit" and state is not State.WAITING else 0
    wire = at(state, exchanged, cancelled=(state, kind) == (State.CLOSING, "cancelled"))
    assert wire.device.state is wire.cloud.state is state
    sender, receiver = sides(kind, wire)
    data = frame_of(kind, wire).SerializeToString()
    after = next_state(state, kind)
    sent, received = sender.outbox.sent, receiver.received

    with pytest.raises(RemoteProtocolError, match=f"{kind} is not for a {sender.role} to receive") as caught:
        sender.receive(data)
    assert caught.value.code == "BAD_STATE"
    assert sender.state is state

    if after is None:
        with pytest.raises(RemoteProtocolError, match=f"{kind} is not legal in state {state}") as caught:
            receiver.receive(data)
        assert caught.value.code == "BAD_STATE"
        with pytest.raises(LocalProtocolError, match=rf"{kind} is not legal in state {state}|handshake|cancel before the first step"):
            send(kind, wire)
        assert sender.state is receiver.state is state
        return

    assert send(kind, wire)
    assert sender.state is after
    if kind == "fault":
        with pytest.raises(ServerFull, match="try later"):
            receiver.receive(data)
    else:
        event = receiver.receive(data)
        assert isinstance(event, Ignored) == (kind in ("compressed", "exit", "cancelled", "welcome") and after is state)
    assert receiver.state is after
    numbered = kind not in UNNUMBERED
    assert (sender.outbox.sent, receiver.received) == (sent + numbered, received + numbered)


def test_the_table_has_no_dead_end_and_no_way_back_from_over() -> None:
    reached = {State.START}
    while more := {after for (state, _), after in TRANSITIONS.items() if state in reached} - reached:
        reached |= more
    assert reached == set(State)
    assert not [key for key in TRANSITIONS if key[0] is State.OVER]
    for state in set(State) - {State.OVER}:
        assert TRANSITIONS[state, "fault"] is TRANSITIONS[state, "abort"] is State.OVER
    assert set(LIVE) == set(State) - {State.START, State.GREETED, State.OVER}
    assert {state for state, kind in TRANSITIONS if kind in ("ping", "pong")} == set(LIVE)
    assert all(TRANSITIONS[state, "ping"] is TRANSITIONS[state, "pong"] is state for state in LIVE)


def test_the_diagram_draws_the_whole_table() -> None:
    drawn = mermaid()
    shown = {(state, kind): after for (state, kind), after in TRANSITIONS.items() if kind not in ("fault", "abort", "ping", "pong")}
    for (state, kind), after in shown.items():
        assert f"    {state} --> {after}: {SENDERS[kind]} {kind}" in drawn.splitlines()
    assert len(drawn.splitlines()) == len(shown) + 3


@pytest.mark.parametrize("kind", SENDERS)
def test_a_role_does_not_send_the_others_frames(kind: str) -> None:
    wire = at(State.READY)
    _, receiver = sides(kind, wire)
    with pytest.raises(LocalProtocolError, match=f"a {receiver.role} does not send {kind}"):
        receiver._send(frame_of(kind, wire))  # no public call of that role leads here


# Content that is refused


def trace(machine: Session) -> tuple[Any, ...]:
    """All that a frame may change; what is refused changes nothing of it."""
    steps = [replace(step) for step in machine.steps]
    return (
        machine.state,
        machine.length,
        machine.step,
        steps,
        machine.received,
        machine.outbox.sent,
        machine.outbox.kept_bytes,
        machine.terms,
    )


def refused(machine: Session, frame: pb.Frame | bytes, code: str, message: str) -> None:
    before = trace(machine)
    with pytest.raises(RemoteProtocolError, match=message) as caught:
        machine.receive(frame if isinstance(frame, bytes) else frame.SerializeToString())
    assert caught.value.code == code
    assert code in CODES
    assert trace(machine) == before
    answer = machine.fault(code, str(caught.value)) if isinstance(machine, CloudSession) else machine.abort(code)  # type: ignore[attr-defined]
    assert pb.Frame.FromString(answer).WhichOneof("kind") in ("fault", "abort")
    assert machine.state is State.OVER


Change = Callable[[Any], object]


def put(**fields: Any) -> Change:
    """Sets fields of a frame's message; a message field by its parts."""

    def change(message: Any) -> None:
        for name, value in fields.items():
            if isinstance(value, pb.Tensor):
                getattr(message, name).CopyFrom(value)
            else:
                setattr(message, name, value)

    return change


def tensor_of(rows: int, columns: int, dtype: int = pb.FP32, size: int | None = None, fill: float = 1.0) -> pb.Tensor:
    data = np.full(rows * columns, fill, "<f4").tobytes()
    return pb.Tensor(dtype=dtype, rows=rows, columns=columns, data=data[:size] if size is not None else data)  # type: ignore[arg-type]


BAD_TENSORS: dict[str, tuple[Callable[[int, int], pb.Tensor], str]] = {
    "other dtype": (lambda r, c: tensor_of(r, c, pb.FP16), "dtype fp16, expected fp32"),
    "no dtype": (lambda r, c: tensor_of(r, c, pb.DTYPE_UNSPECIFIED), "dtype code 0, expected fp32"),
    "unknown dtype": (lambda r, c: tensor_of(r, c, 77), "dtype code 77, expected fp32"),
    "a column too many": (lambda r, c: tensor_of(r, c + 1), r"shape \[\d, \d\], expected"),
    "a column too few": (lambda r, c: tensor_of(r, c - 1), r"shape \[\d, \d\], expected"),
    "short data": (lambda r, c: tensor_of(r, c, size=r * c * 4 - 1), r"\d+ bytes, expected \d+"),
    "no data": (lambda r, c: tensor_of(r, c, size=0), r"0 bytes, expected \d+"),
    "long data": (lambda r, c: pb.Tensor(dtype=pb.FP32, rows=r, columns=c, data=b"\0" * (r * c * 4 + 4)), "bytes, expected"),
    "NaN": (lambda r, c: tensor_of(r, c, fill=float("nan")), "not finite"),
    "infinity": (lambda r, c: tensor_of(r, c, fill=float("-inf")), "not finite"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.parametrize(
    ("kind", "field", "rows", "columns"),
    [("entry", "hidden", 2, HIDDEN), ("compressed", "tensor", 2, 2), ("injections", "tensor", 2, 6), ("exit", "hidden", 1, HIDDEN)],
)
def test_bad_tensors_are_refused(kind: str, field: str, rows: int, columns: int, name: str) -> None:
    make, message = BAD_TENSORS[name]
    wire = before(kind)
    frame = frame_of(kind, wire)
    getattr(getattr(frame, kind), field).CopyFrom(make(rows, columns))
    refused(sides(kind, wire)[1], frame, "BAD_TENSOR", message)


def before(kind: str) -> Loopback:
    """Where `kind` is the frame to come."""
    state = {
        "entry": State.READY,
        "injections": State.WAITING,
        "cancelled": State.CANCELLING,
        "hello": State.START,
        "welcome": State.GREETED,
        "truncate": State.READY,
    }
    return at(state.get(kind, State.COMPUTING), 2 if kind == "exit" else 0)


BAD_CONTENT: dict[str, tuple[str, Change, str, str]] = {
    "another major": ("hello", put(major=MAJOR + 1), "WRONG_VERSION", f"protocol major {MAJOR + 1}, this cloud speaks {MAJOR}"),
    "another contract": ("hello", put(contract=b"\1" * 32), "WRONG_CONTRACT", r"has contract 0101010101010101…, this cloud half c0c0"),
    "short contract": ("hello", put(contract=b"\1" * 31), "BAD_FRAME", "contract of 31 bytes"),
    "no contract": ("hello", put(contract=b""), "BAD_FRAME", "contract of 0 bytes"),
    "short session": ("hello", put(session=b"\1" * 15), "BAD_FRAME", "a session id of 15"),
    "unknown wire dtype": ("hello", put(dtype=9), "WRONG_DTYPE", "wire dtype code 9; supported: fp32, fp16, bf16, int8"),
    "no wire dtype": ("hello", put(dtype=0), "WRONG_DTYPE", "wire dtype code 0"),
    "welcome in another dtype": ("welcome", put(dtype=pb.BF16), "WRONG_DTYPE", "welcome with bf16, asked for fp32"),
    "welcome without a session": ("welcome", put(session=b""), "BAD_FRAME", "a session id of 0 bytes"),
    "welcome without context": ("welcome", put(context_tokens=0), "BAD_FRAME", "0 context tokens"),
    "welcome without steps": ("welcome", put(step_tokens=0), "BAD_FRAME", "0 tokens per step"),
    "step again": ("entry", put(step=1), "BAD_STEP", "entry of step 1, expected 2"),
    "step ahead": ("entry", put(step=3), "BAD_STEP", "entry of step 3, expected 2"),
    "position ahead": ("entry", put(position=2), "BAD_STEP", "entry at position 2, but 1 tokens are cached"),
    "no rows": ("entry", put(hidden=tensor_of(0, HIDDEN)), "BAD_STEP", r"entry of 0 tokens, expected 1\.\.6"),
    "too many rows": ("entry", put(hidden=tensor_of(7, HIDDEN)), "BAD_STEP", r"entry of 7 tokens, expected 1\.\.6"),
    "no tensor": ("entry", lambda entry: entry.ClearField("hidden"), "BAD_STEP", "entry of 0 tokens"),
    "more rows back than sent": ("entry", put(exit_rows=3), "BAD_STEP", "exit of 3 rows wanted from a step of 2 tokens"),
    "injection that the plan lacks": ("entry", put(injection=tensor_of(2, 7)), "BAD_TENSOR", "the plan has no injections at the entry"),
    "compressed of another step": ("compressed", put(step=2), "BAD_STEP", "compressed of step 2, expected 1"),
    "compressed of a later exchange": ("compressed", put(exchange=1), "BAD_STEP", "exchange 1, expected 0 of 2"),
    "compressed of no exchange": ("compressed", put(exchange=2**32 - 1), "BAD_STEP", "exchange 4294967295, expected 0 of 2"),
    "compressed with other rows": ("compressed", put(tensor=tensor_of(1, 2)), "BAD_TENSOR", r"compressed of exchange 0: shape \[1, 2\]"),
    "injections of another step": ("injections", put(step=0), "BAD_STEP", "injections of step 0, expected 1"),
    "injections of another exchange": ("injections", put(exchange=1), "BAD_STEP", "exchange 1, expected 0 of 2"),
    "injections with other rows": ("injections", put(tensor=tensor_of(3, 6)), "BAD_TENSOR", r"shape \[3, 6\], expected \[2, 6\]"),
    "exit of another step": ("exit", put(step=2), "BAD_STEP", "exit of step 2, expected 1"),
    "exit with other rows": ("exit", put(hidden=tensor_of(2, HIDDEN)), "BAD_TENSOR", r"step 1, exit: shape \[2, 8\], expected \[1, 8\]"),
    "exit without rows": ("exit", lambda exit_: exit_.ClearField("hidden"), "BAD_TENSOR", "no hidden state, expected 1 rows"),
    "truncate beyond the cache": ("truncate", put(length=2), "BAD_STEP", "truncate to 2 tokens, but 1 are cached"),
    "cancel of another step": ("cancel", put(step=2), "BAD_STEP", "cancel of step 2, the last one is 1"),
    "cancelled of another step": ("cancelled", put(step=2), "BAD_STEP", "cancelled step 2 at length 0, expected step 1 at 0"),
    "ping with text": ("ping", put(padding=b"my diary"), "BAD_FRAME", f"a ping of 8 bytes for a pong of 5: zeros, and at most {MAX_PROBE_BYTES}"),
    "ping with a bit": ("ping", put(padding=bytes(4095) + b"\1"), "BAD_FRAME", "a ping of 4096 bytes"),
    "ping too long": ("ping", put(padding=bytes(MAX_PROBE_BYTES + 1)), "BAD_FRAME", f"a ping of {MAX_PROBE_BYTES + 1} bytes"),
    "ping for a long pong": ("ping", put(reply_bytes=MAX_PROBE_BYTES + 1), "BAD_FRAME", f"a ping of 3 bytes for a pong of {MAX_PROBE_BYTES + 1}"),
    "pong with text": ("pong", put(padding=b"my diary"), "BAD_FRAME", f"a pong of 8 bytes: zeros, and at most {MAX_PROBE_BYTES}"),
    "pong too long": ("pong", put(padding=bytes(MAX_PROBE_BYTES + 1)), "BAD_FRAME", f"a pong of {MAX_PROBE_BYTES + 1} bytes"),
    "cancelled at another length": ("cancelled", put(length=1), "BAD_STEP", "cancelled step 1 at length 1, expected step 1 at 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONTENT)
def test_bad_content_is_refused_with_its_code(name: str) -> None:
    kind, change, code, message = BAD_CONTENT[name]
    wire = before(kind)
    frame = frame_of(kind, wire)
    change(getattr(frame, kind))
    refused(sides(kind, wire)[1], frame, code, message)


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in BAD_CONTENT.values()}))
def test_the_content_that_the_bad_ones_vary_is_accepted(kind: str) -> None:
    wire = before(kind)
    assert sides(kind, wire)[1].receive(frame_of(kind, wire).SerializeToString())


def test_other_places_of_a_step() -> None:
    refused(
        at(State.COMPUTING, 0).device,
        pb.Frame(exit=pb.Exit(step=1, hidden=tensor_of(1, HIDDEN))),
        "BAD_STEP",
        "exit after 0 of 2 exchanges",
    )
    extra = pb.Frame(compressed=pb.Compressed(step=1, exchange=2, tensor=tensor_of(2, 2)))
    refused(at(State.COMPUTING, 2).device, extra, "BAD_STEP", "exchange 2, expected 2 of 2")
    first = opened()
    refused(first.cloud, pb.Frame(cancel=pb.Cancel(step=0)), "BAD_STEP", "cancel of step 0")

    full = opened()
    for tokens in (6, 6, 6, 6, 6):
        run_step(full, tokens, 0)
    frame = pb.Frame(entry=pb.Entry(step=6, position=30, hidden=tensor_of(3, HIDDEN)))
    refused(full.cloud, frame, "CONTEXT_FULL", r"30 \+ 3 tokens pass the session's context of 32")

    silent = opened()
    silent.to_cloud(silent.device.entry(values(1, HIDDEN), 0))
    for exchange in PLAN.exchanges:
        silent.to_device(silent.cloud.compressed(values(1, exchange.compressed_columns)))
        silent.to_cloud(silent.device.injections(values(1, exchange.injection_columns)))
    refused(silent.device, pb.Frame(exit=pb.Exit(step=1, hidden=tensor_of(1, HIDDEN))), "BAD_TENSOR", "exit: hidden state, expected 0 rows")


def test_an_entry_source_needs_its_injection() -> None:
    wire = opened(ENTRY_PLAN)
    entry = pb.Frame(entry=pb.Entry(step=1, hidden=tensor_of(2, HIDDEN)))
    refused(wire.cloud, entry, "BAD_TENSOR", "step 1, entry: the plan has injections at the entry")
    entry.entry.injection.CopyFrom(tensor_of(3, 7))
    refused(opened(ENTRY_PLAN).cloud, entry, "BAD_TENSOR", r"entry injection: shape \[3, 7\], expected \[2, 7\]")
    entry.entry.injection.CopyFrom(tensor_of(2, 7))
    assert isinstance(opened(ENTRY_PLAN).cloud.receive(entry.SerializeToString()), StepBegun)
    for injection in (None, values(3, 7), values(2, 6)):
        with pytest.raises(LocalProtocolError):
            opened(ENTRY_PLAN).device.entry(values(2, HIDDEN), 1, injection)


def test_what_a_machine_refuses_to_send() -> None:
    wire = at(State.READY)
    device, cloud = wire.device, wire.cloud
    not_finite = values(2, HIDDEN)
    not_finite[1, 3] = np.nan
    for call in (
        lambda: device.entry(values(2, HIDDEN + 1), 1),
        lambda: device.entry(values(2, HIDDEN).astype(np.float64), 1),  # type: ignore[arg-type]
        lambda: device.entry(values(2, HIDDEN)[0], 1),
        lambda: device.entry(not_finite, 1),
        lambda: device.entry(values(0, HIDDEN), 0),
        lambda: device.entry(values(7, HIDDEN), 1),
        lambda: device.entry(values(2, HIDDEN), 3),
        lambda: device.entry(values(2, HIDDEN), -1),
        lambda: device.entry(values(2, HIDDEN), 1, values(2, 7)),
        lambda: device.entry(values(2, HIDDEN), 1, position=2),
        lambda: device.entry(values(2, HIDDEN), 1, position=-1),
        lambda: device.ping(-1),
        lambda: device.ping(2**32),
        lambda: device.ping(1, -1),
        lambda: device.ping(1, 0, -1),
        lambda: device.ping(1, MAX_PROBE_BYTES + 1),
        lambda: device.ping(1, 0, MAX_PROBE_BYTES + 1),
        lambda: device.truncate(2),
        lambda: device.truncate(-1),
        lambda: cloud.compressed(values(1, 2)),
        at(State.CLOSING).cloud.cancelled,
        lambda: at(State.COMPUTING, 1).cloud.exit(values(1, HIDDEN)),
        opened().device.cancel,
        lambda: at(State.WAITING).device.injections(values(1, 6)),
        lambda: at(State.WAITING).device.injections(values(2, 5)),
        lambda: at(State.COMPUTING).cloud.compressed(values(1, 2)),
        lambda: at(State.COMPUTING).cloud.compressed(values(2, 3)),
        lambda: at(State.COMPUTING, 2).cloud.compressed(values(2, 2)),
        lambda: at(State.COMPUTING, 2).cloud.exit(values(2, HIDDEN)),
        lambda: at(State.GREETED).cloud.welcome(replace(TERMS, window=0)),
        lambda: at(State.GREETED).cloud.welcome(replace(TERMS, window=WINDOW + 1)),
    ):
        with pytest.raises(LocalProtocolError):
            call()
    agree(wire, State.READY, 1)
    run_step(wire, 2, 1)  # nothing of it left a trace


# Frames as bytes


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field."""
    tag = number << 3 | 2
    return (bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])) + bytes([len(data)]) + data


RECEIVED = bytes([16 << 3 & 127 | 128, 1])
"""Tag of Frame.received."""
SECRET = b"my diary"
HELLO = frame_of("hello", fresh()).SerializeToString()
NOT_CANONICAL: dict[str, bytes] = {
    "unknown field of the frame": HELLO + field(17, SECRET),
    "a count of nothing": HELLO + RECEIVED + b"\0",
    "a count before its frame": RECEIVED + b"\1" + HELLO,
    "an overlong count": HELLO + RECEIVED + b"\x81\x00",
    "unknown field of the message": field(1, HELLO[2:] + field(15, SECRET)),
    "unknown number": field(1, HELLO[2:] + b"\x78\x05"),
    "the same message twice": HELLO + HELLO,
    "another kind before it": field(10, b"") + HELLO,
    "a field twice": field(1, field(3, SECRET) + HELLO[2:]),
    "a default said aloud": field(1, HELLO[2:] + field(6, b"")),
    "an overlong number": field(1, b"\x08\x81\x00" + HELLO[4:]),
    "a truth value of 7 bits": field(1, HELLO[2:] + field(4, b"\x08\x7f")),
}


def test_the_bytes_that_the_others_vary_are_accepted() -> None:
    assert HELLO[:4] == bytes([1 << 3 | 2, len(HELLO) - 2, 1 << 3, MAJOR])
    assert fresh().cloud.receive(HELLO) == Greeting(uniform("fp32"), b"")
    counted = pb.Frame(hello=pb.Hello(), received=1).SerializeToString()
    assert counted == b"\x0a\x00" + RECEIVED + b"\1"


@pytest.mark.parametrize("name", NOT_CANONICAL)
def test_no_place_for_text_in_a_frame(name: str) -> None:
    pb.Frame.FromString(NOT_CANONICAL[name])  # protobuf has nothing against it
    refused(fresh().cloud, NOT_CANONICAL[name], "BAD_FRAME", "not the canonical form|without a kind")


def test_a_growing_enum_leaves_no_room_for_text() -> None:
    """An enum of -1 in 5 bytes is written in 10: by size alone, 5 bytes of unknown field would pass."""
    data = field(13, b"\x08\xff\xff\xff\xff\x0f") + field(17, b"ab")
    parsed = pb.Frame.FromString(data)
    parsed.DiscardUnknownFields()
    assert parsed.ByteSize() == len(data)
    refused(fresh().cloud, data, "BAD_FRAME", "not the canonical form")


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05\x08", b"hello there", HELLO[:-1]], ids=["tag", "cut", "text", "short"])
def test_bytes_that_are_no_frame(data: bytes) -> None:
    refused(fresh().cloud, data, "BAD_FRAME", "bytes that are not a frame")


def test_a_frame_without_a_kind() -> None:
    refused(fresh().cloud, b"", "BAD_FRAME", "without a kind")
    refused(fresh().device, b"", "BAD_FRAME", "without a kind")


def test_a_frame_over_the_limit_is_neither_read_nor_sent() -> None:
    refused(
        opened().cloud,
        b"\0" * (MAX_FRAME_BYTES + 1),
        "BAD_FRAME",
        f"a frame of {MAX_FRAME_BYTES + 1} bytes, the limit is {MAX_FRAME_BYTES}",
    )
    refused(opened().device, b"\0" * (MAX_FRAME_BYTES + 1), "BAD_FRAME", "the limit is")
    wire = Loopback(PLAN, shape_of(8192, 2), CONTRACT)
    wire.to_cloud(wire.device.hello())
    wire.to_device(wire.cloud.welcome(replace(TERMS, context_tokens=512, step_tokens=512)))
    with pytest.raises(LocalProtocolError, match=r"entry: \d+ bytes, the limit is 4194304; send fewer tokens per step"):
        wire.device.entry(np.zeros((200, 8192), np.float32), 1)
    agree(wire, State.READY, 0)
    assert isinstance(wire.to_cloud(wire.device.entry(np.zeros((100, 8192), np.float32), 1)), StepBegun)


# Faults


def test_every_fault_code_has_one_error() -> None:
    assert set(ERRORS) == CODES
    for name, kind in ERRORS.items():
        assert issubclass(kind, PloraError)
        assert not issubclass(kind, ProtocolError)
        wire = at(State.READY)
        with pytest.raises(kind, match=rf"the cloud refused \({name}\): because") as caught:
            wire.to_device(wire.cloud.fault(name, "because", 250))
        assert type(caught.value) is kind
        assert getattr(caught.value, "retry_after_millis", 250) == 250
        assert isinstance(caught.value, Refused) or kind is ContextOverflow
        assert (wire.device.state, wire.cloud.state) == (State.OVER, State.OVER)


def test_a_fault_code_from_the_future() -> None:
    error = fault_error(pb.Fault(code=99))  # type: ignore[arg-type]
    assert type(error) is CloudFailed
    assert str(error) == "the cloud refused (code 99): no detail"
    assert type(fault_error(pb.Fault(code=-1))) is CloudFailed  # type: ignore[arg-type]
    assert type(fault_error(pb.Fault(code=pb.EXPIRED))) is SessionExpired


def test_the_detail_is_bounded() -> None:
    frame = pb.Frame.FromString(at(State.READY).cloud.fault("INTERNAL", "x" * 10_000))
    assert len(frame.fault.detail) == MAX_DETAIL_CHARACTERS


def test_an_abort_tells_why() -> None:
    wire = at(State.COMPUTING)
    assert wire.to_cloud(wire.device.abort("BAD_TENSOR")) == Aborted("BAD_TENSOR")
    agree(wire, State.OVER, 0)


@pytest.mark.parametrize("code", [-(2**31), -1, max(pb.FaultCode.values()) + 1, 4711, 2**31 - 1])
def test_aborts_with_numbers_that_nobody_knows_are_all_alike(code: int) -> None:
    """The server counts sessions by what ended them: a peer must not make up names for that."""
    abort = pb.Frame(abort=pb.Abort(code=code)).SerializeToString()  # type: ignore[arg-type]
    assert at(State.READY).cloud.receive(abort) == Aborted("unknown code")


# Limits


@st.composite
def widths(draw: st.DrawFn) -> tuple[ExchangePlan, DecoderShape]:
    layers = draw(st.integers(1, 3))
    rank, out_rank = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    targets = draw(st.sampled_from([("q",), ("q", "k", "v"), ("q", "k", "v", "o", "gate", "up", "down")]))
    plan = grouped_plan(layers, draw(st.integers(1, 3)), rank, targets, out_rank, draw(st.booleans()))
    if draw(st.booleans()):
        plan = ExchangePlan(layers, 0, 0, (Source(0, plan.sources[0].ranks, True), *plan.sources[1:]), plan.adapted)
    return plan, shape_of(draw(st.integers(1, 20_000)), layers)


@settings(max_examples=15, deadline=None)
@given(widths())
def test_no_frame_of_a_step_passes_the_limit(drawn: tuple[ExchangePlan, DecoderShape]) -> None:
    plan, shape = drawn
    tokens = step_tokens(plan, shape)
    assert 1 <= tokens <= MAX_STEP_TOKENS
    wire = Loopback(plan, shape, CONTRACT)
    wire.to_cloud(wire.device.hello())
    wire.to_device(wire.cloud.welcome(replace(TERMS, context_tokens=2**32 - 1, step_tokens=tokens, lease_millis=2**32 - 1)))
    wire.device.length = wire.cloud.length = 2**32 - 1 - tokens  # the longest numbers
    wire.device.step = wire.cloud.step = 2**64 - 2
    for machine in (wire.device, wire.cloud):
        machine.received = machine.outbox.sent = machine.outbox._received = 2**64 - 2**10

    def zeros(columns: int) -> Floats:
        return np.zeros((tokens, columns), np.float32)

    held = plan.entry_exchange
    wire.to_cloud(wire.device.entry(zeros(shape.hidden), tokens, zeros(held.injection_columns) if held else None))
    for exchange in plan.exchanges:
        wire.to_device(wire.cloud.compressed(zeros(exchange.compressed_columns)))
        wire.to_cloud(wire.device.injections(zeros(exchange.injection_columns)))
    wire.to_device(wire.cloud.exit(zeros(shape.hidden), 2**40))
    largest = max(len(data) for _, data in wire.transcript)
    assert largest <= MAX_FRAME_BYTES
    assert tokens == MAX_STEP_TOKENS or largest * (tokens + 1) / tokens > MAX_FRAME_BYTES - 1024  # and no shorter than need be


def test_a_token_that_fits_no_frame() -> None:
    assert step_tokens(PLAN, shape_of(MAX_FRAME_BYTES // 4 - 64, 2)) == 1
    with pytest.raises(PlanError, match="one token takes 4194304 bytes in the plan's widest frame, the limit is 4194304; lower the ranks"):
        step_tokens(PLAN, shape_of(MAX_FRAME_BYTES // 4, 2))


# Tensors

FLOATS = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)


def there_and_back(array: Floats, dtype: str) -> Floats:
    rows, columns = array.shape
    return tensors.decode(tensors.encode(array, dtype, rows, columns, "here"), dtype, rows, columns, "there")


@settings(max_examples=200, deadline=None)
@given(FLOATS)
def test_rounding_is_that_of_numpy_and_torch(array: Floats) -> None:
    np.testing.assert_array_equal(there_and_back(array, "fp32"), array)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16).astype(np.float32)
    for dtype, expected in (("fp16", half), ("bf16", torch.from_numpy(array.copy()).bfloat16().float().numpy())):
        if np.isfinite(expected).all():
            np.testing.assert_array_equal(there_and_back(array, dtype), expected)
        else:
            with pytest.raises(LocalProtocolError, match=f"not finite in {dtype}"):
                there_and_back(array, dtype)


def test_bytes_are_little_endian_and_row_major() -> None:
    array = np.array([[1.0, -2.0], [0.5, 3.0]], np.float32)
    assert tensors.encode(array, "fp32", 2, 2, "").data == bytes.fromhex("0000803f 000000c0 0000003f 00004040")
    assert tensors.encode(array, "fp16", 2, 2, "").data == bytes.fromhex("003c 00c0 0038 0042")
    assert tensors.encode(array, "bf16", 2, 2, "").data == bytes.fromhex("803f 00c0 003f 4040")
    assert tensors.encode(np.asfortranarray(array), "fp32", 2, 2, "").data == tensors.encode(array, "fp32", 2, 2, "").data
    for dtype in ("fp16", "bf16"):
        assert tensors.encode(np.asfortranarray(array), dtype, 2, 2, "").data == tensors.encode(array, dtype, 2, 2, "").data


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [("fp32", 3.4e38, float("inf")), ("fp16", 65519.0, 65520.0), ("bf16", 3.389e38, 3.4e38), ("bf16", 1.0, float("nan"))],
)
def test_the_largest_values(dtype: str, good: float, bad: float) -> None:
    assert np.isfinite(there_and_back(np.array([[good]], np.float32), dtype)).all()
    with pytest.raises(LocalProtocolError, match=f"here: values that are not finite in {dtype}"):
        there_and_back(np.array([[bad]], np.float32), dtype)


@pytest.mark.parametrize(("dtype", "code"), [("fp16", pb.FP16), ("bf16", pb.BF16)])
@pytest.mark.parametrize("bits", [0x7C00, 0x7E00, 0x7D00, 0xFC00, 0x7F80, 0x7FC0, 0x7F81, 0xFF80])
def test_half_precision_that_is_not_finite(bits: int, dtype: str, code: int) -> None:
    as_float = torch.tensor([bits if bits < 0x8000 else bits - 0x10000], dtype=torch.int16).view(
        {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    )
    tensor = pb.Tensor(dtype=code, rows=1, columns=1, data=bits.to_bytes(2, "little"))  # type: ignore[arg-type]
    if torch.isfinite(as_float).item():
        assert tensors.decode(tensor, dtype, 1, 1, "x").item() == as_float.item()
    else:
        with pytest.raises(RemoteProtocolError, match="x: values that are not finite"):
            tensors.decode(tensor, dtype, 1, 1, "x")


# The schema


def offenders(message: Descriptor, path: str) -> list[str]:
    """Fields below `message` that could hold text or a list of integers."""
    found = []
    for each in message.fields:
        here = f"{path}.{each.name}"
        allowed = f"{message.name}.{each.name}" in ("Tensor.data", "Tensor.scales", "Hello.contract", "Hello.session", "Ping.padding")
        holds_text = each.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_GROUP, FieldDescriptor.TYPE_BYTES)
        if each.is_repeated or (holds_text and not allowed):
            found.append(here)
        elif each.message_type is not None:
            found += offenders(each.message_type, here)
    return found


def test_what_a_device_sends_has_no_field_for_text() -> None:
    """Ping.padding is allowed since it must be zeros ("ping with text", above), scales since they are floats that the shape counts."""
    for kind in KINDS:
        if SENDERS[kind.name] is Role.DEVICE:
            assert offenders(kind.message_type, kind.name) == []
    (beside,) = set(pb.Frame.DESCRIPTOR.fields) - set(KINDS)
    assert (beside.name, beside.type, beside.is_repeated) == ("received", FieldDescriptor.TYPE_UINT64, False)


def test_the_walk_over_the_schema_finds_what_it_looks_for() -> None:
    assert offenders(pb.Fault.DESCRIPTOR, "fault") == ["fault.detail"]
    assert offenders(pb.Welcome.DESCRIPTOR, "welcome") == ["welcome.session"]
    assert offenders(pb.Pong.DESCRIPTOR, "pong") == ["pong.padding"]
    assert "frame.fault.detail" in offenders(pb.Frame.DESCRIPTOR, "frame")


def test_kinds_and_enums_are_named_alike_everywhere() -> None:
    assert {code: name.lower() for name, code in pb.Dtype.items() if code} == tensors.DTYPES
    assert {name: code for code, name in tensors.DTYPES.items()} == tensors.CODES
    assert set(tensors.VALUE_BYTES) == set(tensors.CODES)
    assert not UNNUMBERED - set(SENDERS)
    for kind, sender in SENDERS.items():
        receiver = CloudSession if sender is Role.DEVICE else DeviceSession
        assert hasattr(receiver, f"_on_{kind}"), kind
