"""The two roles of the session machine: what each may send, and what it makes of what arrives."""

from __future__ import annotations

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
    InjectionsArrived,
    Opened,
    StepBegun,
    StepDone,
    Terms,
    Truncated,
)
from .faults import fault_error
from .limits import CONTRACT_BYTES, MAJOR, MAX_DETAIL_CHARACTERS, MINOR, SESSION_BYTES
from .session import Session
from .states import Role, State
from .tensors import Floats


class DeviceSession(Session):
    """The device's role."""

    def __init__(self, plan: ExchangePlan, shape: DecoderShape, contract: str, dtype: str = "fp32") -> None:
        super().__init__(Role.DEVICE, plan, shape, contract)
        if dtype not in tensors.CODES:
            raise LocalProtocolError(f"wire dtype {dtype}, expected one of {', '.join(tensors.CODES)}")
        self.dtype = dtype

    def hello(self) -> bytes:
        return self._send(
            pb.Frame(
                hello=pb.Hello(
                    major=MAJOR,
                    minor=MINOR,
                    contract=self.contract,
                    capabilities=pb.Capabilities(fp16=True, bf16=True),
                    dtype=tensors.CODES[self.dtype],
                )
            )
        )

    def entry(self, hidden: Floats, exit_rows: int, injection: Floats | None = None) -> bytes:
        """Begins a step. hidden: [T, hidden] float32; exit_rows: rows of the exit wanted, counted from the last."""
        self._require("entry")
        tokens = len(hidden)
        self._check_entry(self.length, tokens, exit_rows, LocalProtocolError)
        frame = pb.Frame(entry=pb.Entry(step=self.step + 1, position=self.length, exit_rows=exit_rows))
        frame.entry.hidden.CopyFrom(tensors.encode(hidden, self.dtype, tokens, self.shape.hidden, f"step {self.step + 1}, entry"))
        held = self.plan.entry_exchange
        if (injection is not None) != (held is not None):
            raise LocalProtocolError(f"step {self.step + 1}: the plan {'has' if held else 'has no'} injections at the entry")
        if injection is not None and held is not None:
            frame.entry.injection.CopyFrom(tensors.encode(injection, self.dtype, tokens, held.injection_columns, "entry injection"))
        data = self._send(frame)
        self._begin(self.step + 1, tokens, exit_rows)
        return data

    def injections(self, values: Floats) -> bytes:
        """Answers the exchange that arrived last. values: [T, I] float32."""
        self._require("injections")
        exchange = self._expected_exchange(self.exchange, LocalProtocolError)
        where = self._where(f"injections of exchange {exchange.index}")
        tensor = tensors.encode(values, self.dtype, self.tokens, exchange.injection_columns, where)
        data = self._send(pb.Frame(injections=pb.Injections(step=self.step, exchange=exchange.index, tensor=tensor)))
        self.exchange += 1
        return data

    def truncate(self, length: int) -> bytes:
        """Keeps the first `length` tokens in the cloud's cache."""
        if not 0 <= length <= self.length:
            raise LocalProtocolError(f"truncate to {length} tokens, but {self.length} are cached")
        data = self._send(pb.Frame(truncate=pb.Truncate(length=length)))
        self._truncate(length)
        return data

    def cancel(self) -> bytes:
        """Gives the running or last step up."""
        if self.step == 0:
            raise LocalProtocolError("cancel before the first step")
        return self._send(pb.Frame(cancel=pb.Cancel(step=self.step)))

    def close(self) -> bytes:
        return self._send(pb.Frame(close=pb.Close()))

    def abort(self, code: str) -> bytes:
        """Ends the session because the cloud broke the protocol."""
        return self._send(pb.Frame(abort=pb.Abort(code=code)))

    def _on_welcome(self, welcome: pb.Welcome) -> Opened:
        dtype = tensors.DTYPES.get(welcome.dtype, f"code {welcome.dtype}")
        if dtype != self.dtype:
            raise RemoteProtocolError(f"welcome with dtype {dtype}, asked for {self.dtype}", "WRONG_DTYPE")
        if len(welcome.session) != SESSION_BYTES or not welcome.context_tokens or not welcome.step_tokens:
            raise RemoteProtocolError(
                f"welcome with a session id of {len(welcome.session)} bytes, {welcome.context_tokens} context tokens and "
                f"{welcome.step_tokens} tokens per step",
                "BAD_FRAME",
            )
        self.terms = Terms(dtype, welcome.context_tokens, welcome.step_tokens, welcome.idle_millis, welcome.session)
        return Opened(self.terms)

    def _on_compressed(self, frame: pb.Compressed) -> CompressedArrived:
        if frame.step != self.step:
            raise RemoteProtocolError(f"compressed of step {frame.step}, expected {self.step}", "BAD_STEP")
        exchange = self._expected_exchange(frame.exchange, RemoteProtocolError)
        where = self._where(f"compressed of exchange {exchange.index}")
        return CompressedArrived(
            exchange, tensors.decode(frame.tensor, self._terms().dtype, self.tokens, exchange.compressed_columns, where)
        )

    def _on_exit(self, frame: pb.Exit) -> StepDone:
        if frame.step != self.step:
            raise RemoteProtocolError(f"exit of step {frame.step}, expected {self.step}", "BAD_STEP")
        if self.exchange != len(self.plan.exchanges):
            raise RemoteProtocolError(f"exit after {self.exchange} of {len(self.plan.exchanges)} exchanges", "BAD_STEP")
        hidden = optional_rows(frame, "hidden", self._terms().dtype, self.exit_rows, self.shape.hidden, self._where("exit"))
        self._finish()
        return StepDone(hidden)

    def _on_cancelled(self, frame: pb.Cancelled) -> CancelDone:
        if frame.step != self.step or frame.length != self.before_step:
            raise RemoteProtocolError(
                f"cancelled step {frame.step} at length {frame.length}, expected step {self.step} at {self.before_step}", "BAD_STEP"
            )
        self.length = self.before_step
        return CancelDone(self.length)

    def _on_closed(self, frame: pb.Closed) -> ClosedDone:
        return ClosedDone()

    def _on_fault(self, fault: pb.Fault) -> Event:
        self.state = State.OVER
        raise fault_error(fault)


class CloudSession(Session):
    """The cloud's role."""

    def __init__(self, plan: ExchangePlan, shape: DecoderShape, contract: str) -> None:
        super().__init__(Role.CLOUD, plan, shape, contract)

    def welcome(self, terms: Terms) -> bytes:
        """Opens the session on `terms` (whose dtype is the one that the device asked for)."""
        data = self._send(
            pb.Frame(
                welcome=pb.Welcome(
                    minor=MINOR,
                    capabilities=pb.Capabilities(fp16=True, bf16=True),
                    dtype=tensors.CODES[terms.dtype],
                    session=terms.session,
                    context_tokens=terms.context_tokens,
                    step_tokens=terms.step_tokens,
                    idle_millis=terms.idle_millis,
                )
            )
        )
        self.terms = terms
        return data

    def compressed(self, values: Floats) -> bytes:
        """The next exchange's values [T, C] float32."""
        self._require("compressed")
        exchange = self._expected_exchange(self.exchange, LocalProtocolError)
        where = self._where(f"compressed of exchange {exchange.index}")
        tensor = tensors.encode(values, self._terms().dtype, self.tokens, exchange.compressed_columns, where)
        return self._send(pb.Frame(compressed=pb.Compressed(step=self.step, exchange=exchange.index, tensor=tensor)))

    def exit(self, hidden: Floats) -> bytes:
        """The last `exit_rows` rows of the exit [exit_rows, hidden] float32: the step is done."""
        self._require("exit")
        tensor = tensors.encode(hidden, self._terms().dtype, self.exit_rows, self.shape.hidden, self._where("exit"))
        frame = pb.Frame(exit=pb.Exit(step=self.step))
        if self.exit_rows:
            frame.exit.hidden.CopyFrom(tensor)
        data = self._send(frame)
        self._finish()
        return data

    def cancelled(self) -> bytes:
        """The cache is as before the step again."""
        data = self._send(pb.Frame(cancelled=pb.Cancelled(step=self.step, length=self.before_step)))
        self.length = self.before_step
        return data

    def closed(self) -> bytes:
        return self._send(pb.Frame(closed=pb.Closed()))

    def fault(self, code: str, detail: str, retry_after_millis: int = 0) -> bytes:
        """Ends the session, or refuses to open it."""
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
        dtype = tensors.DTYPES.get(hello.dtype)
        if dtype is None:
            raise RemoteProtocolError(f"wire dtype code {hello.dtype}; supported: {', '.join(tensors.CODES)}", "WRONG_DTYPE")
        if hello.session:
            raise RemoteProtocolError("resuming a session is not supported; begin a new one", "EXPIRED")
        return Greeting(dtype, hello.session)

    def _on_entry(self, entry: pb.Entry) -> StepBegun:
        if entry.step != self.step + 1:
            raise RemoteProtocolError(f"entry of step {entry.step}, expected {self.step + 1}", "BAD_STEP")
        tokens = entry.hidden.rows
        self._check_entry(entry.position, tokens, entry.exit_rows, RemoteProtocolError)
        dtype = self._terms().dtype
        where = f"step {entry.step}, entry"
        hidden = tensors.decode(entry.hidden, dtype, tokens, self.shape.hidden, where)
        held = self.plan.entry_exchange
        if entry.HasField("injection") != (held is not None):
            raise RemoteProtocolError(f"{where}: the plan {'has' if held else 'has no'} injections at the entry", "BAD_TENSOR")
        injection = tensors.decode(entry.injection, dtype, tokens, held.injection_columns, f"{where} injection") if held else None
        self._begin(entry.step, tokens, entry.exit_rows)
        return StepBegun(entry.step, entry.position, entry.exit_rows, hidden, injection)

    def _on_injections(self, frame: pb.Injections) -> InjectionsArrived:
        if frame.step != self.step:
            raise RemoteProtocolError(f"injections of step {frame.step}, expected {self.step}", "BAD_STEP")
        exchange = self._expected_exchange(frame.exchange, RemoteProtocolError)
        where = self._where(f"injections of exchange {exchange.index}")
        values = tensors.decode(frame.tensor, self._terms().dtype, self.tokens, exchange.injection_columns, where)
        self.exchange += 1
        return InjectionsArrived(exchange, values)

    def _on_truncate(self, frame: pb.Truncate) -> Truncated:
        if frame.length > self.length:
            raise RemoteProtocolError(f"truncate to {frame.length} tokens, but {self.length} are cached", "BAD_STEP")
        self._truncate(frame.length)
        return Truncated(frame.length)

    def _on_cancel(self, frame: pb.Cancel) -> CancelAsked:
        if frame.step != self.step or self.step == 0:
            raise RemoteProtocolError(f"cancel of step {frame.step}, the last one is {self.step}", "BAD_STEP")
        return CancelAsked(self.before_step)

    def _on_close(self, frame: pb.Close) -> CloseAsked:
        return CloseAsked()

    def _on_abort(self, frame: pb.Abort) -> Aborted:
        known = frame.code in pb.FaultCode.values()
        return Aborted(pb.FaultCode.Name(frame.code) if known else f"code {frame.code}")


def optional_rows(frame: pb.Exit, field: str, dtype: str, rows: int, columns: int, where: str) -> Floats:
    """The exit's rows; absent if none were asked for."""
    if frame.HasField("hidden") != (rows > 0):
        raise RemoteProtocolError(f"{where}: {'no ' if rows else ''}hidden state, expected {rows} rows", "BAD_TENSOR")
    if not rows:
        return tensors.decode(pb.Tensor(dtype=tensors.CODES[dtype], rows=0, columns=columns), dtype, 0, columns, where)
    return tensors.decode(frame.hidden, dtype, rows, columns, where)
