"""The two roles of the session machine: what each may send, and what it makes of what arrives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..artifact.errors import LocalProtocolError, RemoteProtocolError
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from . import plora_pb2 as pb
from . import tensors
from .events import (
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
    PingArrived,
    PongArrived,
    StepBegun,
    StepDone,
    Terms,
    Truncated,
)
from .faults import fault_error
from .limits import CONTRACT_BYTES, MAJOR, MAX_DETAIL_CHARACTERS, MAX_PROBE_BYTES, MINOR, SESSION_BYTES, WINDOW
from .precision import Precision, say, settle
from .session import Session
from .states import Role, State
from .tensors import Floats

CAPABILITIES = pb.Capabilities(fp16=True, bf16=True, resume=True, int8=True)
CAPABILITIES_1 = pb.Capabilities(fp16=True, bf16=True)
"""To a device of minor 1, which takes a field that it does not know for text."""


class DeviceSession(Session):
    """The device's role."""

    def __init__(
        self,
        plan: ExchangePlan,
        shape: DecoderShape,
        contract: str,
        precision: Precision = Precision(),  # noqa: B008  frozen
        alone: bool = False,
    ) -> None:
        """alone: the cloud shall compute its steps with nobody else's."""
        super().__init__(Role.DEVICE, plan, shape, contract)
        self.precision = precision
        self.alone = alone
        self._cancelling = (0, 0)  # the step given up, and the length that this leaves

    def hello(self) -> bytes:
        """Asks for a new session."""
        return self._send(pb.Frame(hello=self._hello()))

    def hello_again(self) -> bytes:
        """The first frame on another connection of the same session; hand what arrives to `welcomed_back`."""
        if not self.live:
            raise LocalProtocolError(f"a session in state {self.state} cannot be taken up again")
        hello = self._hello()
        hello.session = self._terms().session
        return pb.Frame(hello=hello, received=self.received).SerializeToString()

    def welcomed_back(self, data: bytes) -> list[bytes]:
        """What the cloud answers -> the frames that it lacks, to be sent before any other. The session stands where it stood, whatever
        happens here. Raises the error of a fault (SessionExpired if the cloud does not know the session any more), RemoteProtocolError."""
        frame = self._parse(data)
        kind = frame.WhichOneof("kind")
        if kind == "fault":
            raise fault_error(frame.fault)
        if kind != "welcome":
            raise RemoteProtocolError(f"{kind} on a new connection, expected welcome", "BAD_STATE")
        if self._read_welcome(frame.welcome) != self.terms:
            raise RemoteProtocolError("the terms of a session taken up again are not those of the first time", "BAD_FRAME")
        return self.outbox.after(frame.received)

    def _hello(self) -> pb.Hello:
        hello = pb.Hello(major=MAJOR, minor=MINOR, contract=self.contract, capabilities=CAPABILITIES, alone=self.alone)
        say(self.precision, hello)
        return hello

    def entry(self, hidden: Floats, exit_rows: int, injection: Floats | None = None, position: int | None = None) -> bytes:
        """Begins a step. hidden: [T, hidden] float32; exit_rows: rows of the exit wanted, counted from the last; position: tokens that it
        builds on, None for all; fewer only with no step in flight: the rest is dropped."""
        self._require("entry")
        tokens, number = len(hidden), self.step + 1
        position = self.end if position is None else position
        self._check_entry(position, tokens, exit_rows, LocalProtocolError)
        frame = pb.Frame(entry=pb.Entry(step=number, position=position, exit_rows=exit_rows))
        where = f"step {number}, entry"
        frame.entry.hidden.CopyFrom(tensors.encode(hidden, self.precision.entry, tokens, self.shape.hidden, where))
        held = self.plan.entry_exchange
        if (injection is not None) != (held is not None):
            raise LocalProtocolError(f"step {number}: the plan {'has' if held else 'has no'} injections at the entry")
        if injection is not None and held is not None:
            tensor = tensors.encode(injection, self.precision.injections, tokens, held.injection_columns, f"{where} injection")
            frame.entry.injection.CopyFrom(tensor)
        data = self._send(frame)
        self._begin(number, position, tokens, exit_rows)
        return data

    def injections(self, values: Floats, step: int | None = None) -> bytes:
        """Answers an exchange that arrived. values: [T, I] float32; step: its number, None for the oldest in flight."""
        running = self._running(step, "injections")
        self._require("injections", running)
        exchange = self._check_exchange(running, running.exchange, LocalProtocolError)
        where = f"step {running.number}, injections of exchange {exchange.index}"
        tensor = tensors.encode(values, self.precision.injections, running.tokens, exchange.injection_columns, where)
        data = self._send(pb.Frame(injections=pb.Injections(step=running.number, exchange=exchange.index, tensor=tensor)), running)
        running.exchange += 1
        return data

    def truncate(self, length: int) -> bytes:
        """Keeps the first `length` tokens in the cloud's cache."""
        if not 0 <= length <= self.length:
            raise LocalProtocolError(f"truncate to {length} tokens, but {self.length} are cached")
        if self.outbox.kept >= WINDOW:  # no frame answers a truncate, so nothing acknowledges it either
            raise LocalProtocolError(f"{self.outbox.kept} truncates in a row; ping the cloud, or let the next entry's position say it")
        data = self._send(pb.Frame(truncate=pb.Truncate(length=length)))
        self._roll_back(length)
        return data

    def cancel(self) -> bytes:
        """Gives the steps in flight up, or the last one."""
        number = self.steps[0].number if self.steps else self.step
        length = self._before(number)
        if length is None:
            raise LocalProtocolError("cancel before the first step")
        data = self._send(pb.Frame(cancel=pb.Cancel(step=number)))
        self._cancelling = (number, length)
        return data

    def close(self) -> bytes:
        return self._send(pb.Frame(close=pb.Close()))

    def abort(self, code: str) -> bytes:
        """Ends the session because the cloud broke the protocol."""
        return self._send(pb.Frame(abort=pb.Abort(code=code)))

    def ping(self, number: int, padding_bytes: int = 0, reply_bytes: int = 0) -> bytes:
        """Asks for a pong with that number and so much padding."""
        if not (0 <= number < 2**32 and 0 <= padding_bytes <= MAX_PROBE_BYTES and 0 <= reply_bytes <= MAX_PROBE_BYTES):
            raise LocalProtocolError(
                f"ping {number} of {padding_bytes} bytes for a pong of {reply_bytes}, the most are {2**32 - 1} and {MAX_PROBE_BYTES}"
            )
        return self._send(pb.Frame(ping=pb.Ping(id=number, padding=bytes(padding_bytes), reply_bytes=reply_bytes)))

    def _on_welcome(self, welcome: pb.Welcome) -> Opened | Ignored:
        self.terms = self._read_welcome(welcome)
        return Ignored("welcome") if self.state is State.CLOSING else Opened(self.terms)

    def _read_welcome(self, welcome: pb.Welcome) -> Terms:
        precision = settle(welcome.dtype, welcome.precision if welcome.HasField("precision") else None)
        if precision != self.precision:
            raise RemoteProtocolError(f"welcome with {precision}, asked for {self.precision}", "WRONG_DTYPE")
        if len(welcome.session) != SESSION_BYTES or not welcome.context_tokens or not welcome.step_tokens:
            raise RemoteProtocolError(
                f"welcome with a session id of {len(welcome.session)} bytes, {welcome.context_tokens} context tokens and "
                f"{welcome.step_tokens} tokens per step",
                "BAD_FRAME",
            )
        return Terms(
            self.precision,
            welcome.context_tokens,
            welcome.step_tokens,
            welcome.idle_millis,
            welcome.session,
            welcome.lease_millis,
            min(welcome.window or 1, WINDOW),
        )

    def _on_compressed(self, frame: pb.Compressed) -> CompressedArrived:
        step = self._expected_step(frame.step, "compressed")
        exchange = self._check_exchange(step, frame.exchange, RemoteProtocolError)
        where = f"step {step.number}, compressed of exchange {exchange.index}"
        values = tensors.decode(frame.tensor, self.precision.compressed, step.tokens, exchange.compressed_columns, where)
        return CompressedArrived(step.number, exchange, values)

    def _on_exit(self, frame: pb.Exit) -> StepDone:
        step = self._expected_step(frame.step, "exit", self.steps[:1])
        self._check_exit(step, RemoteProtocolError)
        where = f"step {step.number}, exit"
        if frame.HasField("hidden") != (step.exit_rows > 0):
            raise RemoteProtocolError(
                f"{where}: {'no ' if step.exit_rows else ''}hidden state, expected {step.exit_rows} rows", "BAD_TENSOR"
            )
        hidden = np.zeros((0, self.shape.hidden), np.float32)
        if step.exit_rows:
            hidden = tensors.decode(frame.hidden, self.precision.exit, step.exit_rows, self.shape.hidden, where)
        self._finish()
        return StepDone(step.number, hidden, frame.compute_micros)

    def _on_cancelled(self, frame: pb.Cancelled) -> CancelDone:
        if (frame.step, frame.length) != self._cancelling:
            number, length = self._cancelling
            raise RemoteProtocolError(
                f"cancelled step {frame.step} at length {frame.length}, expected step {number} at {length}", "BAD_STEP"
            )
        self._give_up(*self._cancelling)
        return CancelDone(self.length)

    def _on_closed(self, frame: pb.Closed) -> ClosedDone:
        return ClosedDone()

    def _on_pong(self, frame: pb.Pong) -> PongArrived:
        if len(frame.padding) > MAX_PROBE_BYTES or frame.padding.strip(b"\0"):
            raise RemoteProtocolError(f"a pong of {len(frame.padding)} bytes: zeros, and at most {MAX_PROBE_BYTES}", "BAD_FRAME")
        return PongArrived(frame.id)

    def _on_fault(self, fault: pb.Fault) -> Event:
        self._state = State.OVER
        raise fault_error(fault)


UNKNOWN_CODE = "unknown code"
"""What an abort with any other number says: enums of proto3 are open, and the server counts sessions by what ended them."""


class CloudSession(Session):
    """The cloud's role."""

    def __init__(self, plan: ExchangePlan, shape: DecoderShape, contract: str) -> None:
        super().__init__(Role.CLOUD, plan, shape, contract)
        self._minor = 0  # the device's
        self._resumes = False
        self._cancelling: tuple[int, int] | None = None  # the step that the device gave up, and the length that this leaves

    def welcome(self, terms: Terms) -> bytes:
        """Opens the session on `terms`, whose precision is the one that the device asked for. `self.terms` is what of them holds: a device
        that cannot resume gets no lease, and one of minor 1 one step in flight, since it knows no field that says otherwise."""
        if not 1 <= terms.window <= WINDOW:
            raise LocalProtocolError(f"a window of {terms.window} steps, expected 1..{WINDOW}")
        if self._minor < 2:
            terms = replace(terms, lease_millis=0, window=1)
        elif not self._resumes:
            terms = replace(terms, lease_millis=0)
        data = self._send(pb.Frame(welcome=self._welcome(terms)))
        self.terms = terms
        return data

    def welcome_back(self, greeting: Greeting) -> list[bytes]:
        """A device takes the session up on another connection: the welcome, and the frames that it lacks. Raises RemoteProtocolError."""
        terms = self._terms()
        if not self.live or not terms.lease_millis:
            raise RemoteProtocolError("no such session; begin a new one", "EXPIRED")
        if greeting.precision != terms.precision:
            raise RemoteProtocolError(f"a session of wire dtype {terms.precision}, taken up with {greeting.precision}", "WRONG_DTYPE")
        lacking = self.outbox.after(greeting.received)
        return [pb.Frame(welcome=self._welcome(terms), received=self.received).SerializeToString(), *lacking]

    def _welcome(self, terms: Terms) -> pb.Welcome:
        welcome = pb.Welcome(
            minor=MINOR,
            capabilities=CAPABILITIES if self._minor >= 2 else CAPABILITIES_1,
            session=terms.session,
            context_tokens=terms.context_tokens,
            step_tokens=terms.step_tokens,
            idle_millis=terms.idle_millis,
            lease_millis=terms.lease_millis,
            window=terms.window if terms.window > 1 else 0,
        )
        say(terms.precision, welcome)
        return welcome

    def compressed(self, values: Floats, step: int | None = None) -> bytes:
        """The next exchange's values [T, C] float32. step: its number, None for the oldest in flight."""
        running = self._running(step, "compressed")
        self._require("compressed", running)
        exchange = self._check_exchange(running, running.exchange, LocalProtocolError)
        where = f"step {running.number}, compressed of exchange {exchange.index}"
        tensor = tensors.encode(values, self._terms().precision.compressed, running.tokens, exchange.compressed_columns, where)
        return self._send(pb.Frame(compressed=pb.Compressed(step=running.number, exchange=exchange.index, tensor=tensor)), running)

    def exit(self, hidden: Floats, compute_micros: int = 0) -> bytes:
        """The last `exit_rows` rows of the exit [exit_rows, hidden] float32: the oldest step is done."""
        running = self._running(None, "exit")
        self._require("exit", running)
        self._check_exit(running, LocalProtocolError)
        where = f"step {running.number}, exit"
        tensor = tensors.encode(hidden, self._terms().precision.exit, running.exit_rows, self.shape.hidden, where)
        micros = min(compute_micros, 2**32 - 1) if self._minor >= 2 else 0
        frame = pb.Frame(exit=pb.Exit(step=running.number, compute_micros=micros))
        if running.exit_rows:
            frame.exit.hidden.CopyFrom(tensor)
        data = self._send(frame, running)
        self._finish()
        return data

    def cancelled(self) -> bytes:
        """The cache is as before the step again."""
        self._require("cancelled")
        if self._cancelling is None:
            raise LocalProtocolError("cancelled, but no cancel was asked for")
        number, length = self._cancelling
        data = self._send(pb.Frame(cancelled=pb.Cancelled(step=number, length=length)))
        self._give_up(number, length)
        self._cancelling = None
        return data

    def closed(self) -> bytes:
        return self._send(pb.Frame(closed=pb.Closed()))

    def fault(self, code: str, detail: str, retry_after_millis: int = 0) -> bytes:
        """Ends the session, or refuses to open it."""
        if code == "QUOTA" and self._minor < 3:
            code = "FULL"
        fault = pb.Fault(code=code, detail=detail[:MAX_DETAIL_CHARACTERS], retry_after_millis=retry_after_millis)
        return self._send(pb.Frame(fault=fault))

    def _on_hello(self, hello: pb.Hello) -> Greeting:
        if hello.major != MAJOR:
            raise RemoteProtocolError(f"protocol major {hello.major}, this cloud speaks {MAJOR}", "WRONG_VERSION")
        if len(hello.contract) != CONTRACT_BYTES or len(hello.session) not in (0, SESSION_BYTES):
            raise RemoteProtocolError(
                f"hello with a contract of {len(hello.contract)} bytes and a session id of {len(hello.session)}, expected "
                f"{CONTRACT_BYTES} and 0 or {SESSION_BYTES}",
                "BAD_FRAME",
            )
        if hello.contract != self.contract:
            raise RemoteProtocolError(
                f"the device's edge half has contract {hello.contract.hex()[:16]}…, this cloud half {self.contract.hex()[:16]}…; "
                "use the two halves of one export",
                "WRONG_CONTRACT",
            )
        precision = settle(hello.dtype, hello.precision if hello.HasField("precision") else None)
        if isinstance(precision, str):
            raise RemoteProtocolError(precision, "WRONG_DTYPE")
        self._minor, self._resumes = hello.minor, hello.capabilities.resume
        return Greeting(precision, hello.session, self._greeted, hello.capabilities.resume, hello.alone)

    def _check_received(self, frame: pb.Frame) -> None:
        self._greeted = frame.received
        if not frame.hello.session:  # whoever takes a session up says how far it got; `welcome_back` checks it
            super()._check_received(frame)

    def _on_entry(self, entry: pb.Entry) -> StepBegun:
        if entry.step != self.step + 1:
            raise RemoteProtocolError(f"entry of step {entry.step}, expected {self.step + 1}", "BAD_STEP")
        tokens = entry.hidden.rows
        self._check_entry(entry.position, tokens, entry.exit_rows, RemoteProtocolError)
        precision = self._terms().precision
        where = f"step {entry.step}, entry"
        hidden = tensors.decode(entry.hidden, precision.entry, tokens, self.shape.hidden, where)
        held = self.plan.entry_exchange
        if entry.HasField("injection") != (held is not None):
            raise RemoteProtocolError(f"{where}: the plan {'has' if held else 'has no'} injections at the entry", "BAD_TENSOR")
        injection = None
        if held:
            injection = tensors.decode(entry.injection, precision.injections, tokens, held.injection_columns, f"{where} injection")
        self._begin(entry.step, entry.position, tokens, entry.exit_rows)
        return StepBegun(entry.step, entry.position, entry.exit_rows, hidden, injection)

    def _on_injections(self, frame: pb.Injections) -> InjectionsArrived:
        step = self._expected_step(frame.step, "injections")
        exchange = self._check_exchange(step, frame.exchange, RemoteProtocolError)
        where = f"step {step.number}, injections of exchange {exchange.index}"
        values = tensors.decode(frame.tensor, self._terms().precision.injections, step.tokens, exchange.injection_columns, where)
        step.exchange += 1
        return InjectionsArrived(step.number, exchange, values)

    def _on_truncate(self, frame: pb.Truncate) -> Truncated:
        if frame.length > self.length:
            raise RemoteProtocolError(f"truncate to {frame.length} tokens, but {self.length} are cached", "BAD_STEP")
        self._roll_back(frame.length)
        return Truncated(frame.length)

    def _on_cancel(self, frame: pb.Cancel) -> CancelAsked:
        length = self._before(frame.step)
        if length is None:
            oldest = f", the oldest in flight {self.steps[0].number}" if self.steps else ""
            raise RemoteProtocolError(f"cancel of step {frame.step}, the last one is {self.step}{oldest}", "BAD_STEP")
        self._cancelling = (frame.step, length)
        return CancelAsked(frame.step, length)

    def _on_close(self, frame: pb.Close) -> CloseAsked:
        return CloseAsked()

    def _on_abort(self, frame: pb.Abort) -> Aborted:
        known = frame.code in pb.FaultCode.values()
        return Aborted(pb.FaultCode.Name(frame.code) if known else UNKNOWN_CODE)

    def _on_ping(self, frame: pb.Ping) -> PingArrived:
        if frame.reply_bytes > MAX_PROBE_BYTES or len(frame.padding) > MAX_PROBE_BYTES or frame.padding.strip(b"\0"):
            raise RemoteProtocolError(
                f"a ping of {len(frame.padding)} bytes for a pong of {frame.reply_bytes}: zeros, and at most {MAX_PROBE_BYTES}", "BAD_FRAME"
            )
        return PingArrived(self._send(pb.Frame(pong=pb.Pong(id=frame.id, padding=bytes(frame.reply_bytes)))))
