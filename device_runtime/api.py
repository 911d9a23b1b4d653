"""The device's Python API, and the generate loop: everything that a person's text goes through on the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..artifact.errors import ContextOverflow, PloraError, UsageError
from ..protocol import DeviceSession, Precision, Terms, read_precision
from .access import Access
from .drafts import Draft, Drafter, require_vocabulary
from .edge import Edge
from .link import Link
from .runner import Runner
from .sampling import Sampler, Sampling, choose_sampling
from .speculation import DraftLength, verify
from .stepper import Stepper
from .text import Stream, Text
from .transport import Deadlines, Transport

T = TypeVar("T")
Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Piece:
    """One token: its id, and the text that became certain with it (often "", at the end possibly more than one word)."""

    token_id: int
    text: str


@dataclass(frozen=True)
class Stats:
    """Of one answer. ttft_seconds: from the call to the first token; tokens_per_second: of the tokens after it; bytes: frames, without
    gRPC's framing; cached_tokens: prompt tokens that the cloud still had; …_per_token and what follows: of the tokens after the first.
    steps: that they took; drafted, accepted: tokens that speculation guessed, and guessed right; cloud_seconds: that the cloud computed,
    as it says; reconnections: since the answer was asked for."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    ttft_seconds: float
    tokens_per_second: float
    bytes_up: int
    bytes_down: int
    bytes_up_per_token: float
    bytes_down_per_token: float
    round_trips_per_token: float
    steps: int
    drafted_tokens: int
    accepted_tokens: int
    cloud_seconds: float
    reconnections: int


@dataclass(frozen=True)
class Answer:
    """text: without special tokens and stop text; token_ids: the new tokens as transformers' generate() appends them, the end
    token included; finish_reason: "stop" (end token), "stop_text" or "length"."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PrivateSession:
    """A session with the cloud. Use it from one thread; close it, or use it as a context manager.

    It blocks, on an event loop of its own: where one is running already (a coroutine, a Jupyter cell) use it from another thread.
    """

    def __init__(
        self,
        edge: Edge,
        cloud: str,
        precision: Precision = Precision(),  # noqa: B008  frozen
        deadlines: Deadlines | None = None,
        *,
        drafter: Drafter | None = None,
        bucket: int | None = None,
        on_state: Callable[[str], None] = lambda state: None,
        access: Access = Access(),  # noqa: B008  frozen
    ) -> None:
        if drafter is not None:
            require_vocabulary(drafter, edge.shape.vocabulary)
        if bucket is not None and bucket < 1:
            raise UsageError(f"steps of {bucket} tokens, expected at least 1")
        self.edge = edge
        self.text = Text(edge.folder, edge.manifest)
        self.drafter = drafter
        self._length = DraftLength()

        def machine() -> DeviceSession:
            return DeviceSession(edge.plan, edge.shape, edge.contract.hash, precision, alone=bucket is not None)

        self._link = Link(cloud, deadlines or Deadlines(), machine, on_state, partial(Transport, access=access))
        self._stepper = Stepper(edge, self._link, bucket)
        self._runner = Runner(self._link.interrupt)
        self._closed = False
        self.answer: Answer | None = None
        try:
            self._run(self._stepper.open())
            if bucket is not None and not bucket <= min(self.terms.step_tokens, self._stepper.context_tokens):
                raise UsageError(f"steps of {bucket} tokens, but the cloud takes {self.terms.step_tokens} at most; choose fewer")
        except BaseException:
            self._run(self._stepper.close())
            self._runner.close()
            raise

    @property
    def terms(self) -> Terms:
        """Of the present session with the cloud."""
        return self._stepper.terms

    @property
    def state(self) -> str:
        """connected, reconnecting or replaying (link.py)."""
        return self._link.state

    def reconnect(self) -> None:
        """For an app that is told that the network changed: the connection is given up now, or at the next call if nobody waits for an
        answer, and not when it is found silent. From any thread; of no effect on a session that is closed."""
        with suppress(RuntimeError):  # the loop is closed
            self._runner.loop.call_soon_threadsafe(self._leave_connection)

    def _leave_connection(self) -> None:
        if self._link.transport is not None:
            self._link.transport.fail("the app says that the network changed")

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def sampling(self, **flags: object) -> Sampling:
        """Flags (fields of Sampling; None: not given) over the artifact's generation config over the defaults. Raises UsageError."""
        return choose_sampling(flags, asdict(self.text.defaults))

    def stream_chat(self, messages: list[dict[str, str]], sampling: Sampling | None = None) -> Iterator[Piece]:
        """Streams the answer to a conversation; tokens that the cloud has cached from earlier turns are not sent again."""
        return self.stream(self.text.encode_chat(messages), sampling)

    def stream_raw(self, prompt: str, sampling: Sampling | None = None) -> Iterator[Piece]:
        """Streams the continuation of `prompt` as it is, no template."""
        return self.stream(self.text.encode_raw(prompt), sampling)

    def stream(self, prompt: list[int], sampling: Sampling | None = None) -> Iterator[Piece]:
        """Streams the tokens that follow `prompt` (token ids); `self.answer` holds the whole afterwards.

        Closing the iterator early, or Ctrl-C, cancels the running step and keeps the session usable.
        Raises ContextOverflow before anything is sent if the prompt does not fit.
        """
        sampling = sampling or self.sampling()
        context = self._stepper.context_tokens
        if not 1 <= len(prompt) < context:
            raise ContextOverflow(
                f"a prompt of {len(prompt)} tokens, expected 1..{context - 1} (the model's context is {self.edge.shape.context_tokens}, "
                f"the cloud gave this session {self.terms.context_tokens})"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.edge.shape.vocabulary:
            raise UsageError(
                f"token ids {min(prompt)} to {max(prompt)}, expected 0 to {self.edge.shape.vocabulary - 1}: "
                "the tokenizer knows tokens that the model has no embedding for"
            )
        return self._generate(prompt, sampling, min(sampling.max_tokens, context - len(prompt)))

    def _generate(self, prompt: list[int], sampling: Sampling, max_tokens: int) -> Iterator[Piece]:
        clock = _Clock(self)
        sampler, stream = Sampler(sampling), Stream(self.text, sampling.stop)
        self.answer = None
        new: list[int] = []
        try:
            kept, logits = self._prefill(prompt)
            chosen = deque([sampler.choose(logits, prompt)])
            clock.first_token()
            reason = None
            while reason is None:
                if not chosen:
                    chosen.extend(self._step(prompt + new, sampler, max_tokens - len(new), clock))
                token = chosen.popleft()
                new.append(token)
                clock.token()
                piece = ""
                if token in self.text.defaults.eos_token_ids:
                    reason = "stop"
                else:
                    piece = stream.push(token)
                    reason = "stop_text" if stream.stopped else "length" if len(new) == max_tokens else None
                yield Piece(token, piece if reason is None else piece + stream.finish())
        except KeyboardInterrupt:
            self._run(self._stepper.cancel())
            raise
        finally:
            self._stepper.keep(len(prompt) + len(new))  # drafts behind the last token are of no use
        self.answer = Answer(stream.whole, prompt, new, reason, clock.stats(prompt, kept, new))

    def _prefill(self, prompt: list[int]) -> tuple[int, Logits]:
        """Sends what the cloud has not cached. Returns (tokens kept, logits [V] after the last)."""
        cached, kept = self._stepper.history, 0
        while kept < min(len(cached), len(prompt) - 1) and cached[kept] == prompt[kept]:
            kept += 1
        return kept, self._logits(prompt[kept:], 1, kept)[-1]

    def _step(self, tokens: list[int], sampler: Sampler, wanted: int, clock: _Clock) -> list[int]:
        """At least one token to follow `tokens`, of which the cloud has all but the last; one round trip and the plan's exchanges."""
        began = time.perf_counter()
        cached = len(tokens) - 1
        draft = Draft()
        if self.drafter is not None:
            room = min(wanted - 1, self._stepper.context_tokens - len(tokens), self.terms.step_tokens - 1)
            count = min(self._length.choose(self.drafter.match(tokens)), room)
            draft = self.drafter.propose(tokens, count, sampler.sampling) if count > 0 else Draft(matched=self.drafter.match(tokens))
        logits = self._logits([tokens[-1], *draft.ids], len(draft.ids) + 1, cached)
        verdict = verify(sampler, logits, tokens, draft)
        self._stepper.keep(cached + 1 + verdict.accepted)
        if self.drafter is not None:
            self._length.observe(len(draft.ids), verdict.accepted, draft.matched, time.perf_counter() - began)
        clock.step(len(draft.ids), verdict.accepted)
        return verdict.tokens

    def _logits(self, ids: list[int], rows: int, position: int) -> Logits:
        """Feeds `ids` behind the first `position` tokens; logits [rows, V] after the last of them."""
        residual = self._run(self._stepper.feed(ids, rows, position))
        if self._stepper.bucket is None:
            return self.edge.logits(residual)
        return np.concatenate([self.edge.logits(row[None]) for row in residual])  # one shape, one result

    def forget(self) -> None:
        """Makes nothing of the cloud's cache of this session be used: the next prompt is sent whole."""
        self._stepper.keep(0)

    def close(self) -> None:
        """Releases the session in the cloud; safe to call twice."""
        if not self._closed:
            self._closed = True
            self._run(self._stepper.close())
            self._runner.close()

    def __enter__(self) -> PrivateSession:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class _Clock:
    """Measures one answer."""

    def __init__(self, session: PrivateSession) -> None:
        self.session = session
        self.began = self.last = time.perf_counter()
        self.before = self.at_first = self._counts()
        self.reconnections = session._link.reconnections
        self.steps = self.drafted = self.accepted = self.cloud_micros = 0

    def _counts(self) -> tuple[int, int, int]:
        link = self.session._link
        return link.bytes_up, link.bytes_down, self.session._stepper.counters.round_trips

    def first_token(self) -> None:
        self.first, self.at_first = time.perf_counter(), self._counts()

    def token(self) -> None:
        self.last = time.perf_counter()

    def step(self, drafted: int, accepted: int) -> None:
        self.steps += 1
        self.drafted += drafted
        self.accepted += accepted
        self.cloud_micros += self.session._stepper.cloud_micros

    def stats(self, prompt: list[int], kept: int, new: list[int]) -> Stats:
        now = self._counts()
        up, down, trips = (after - before for after, before in zip(now, self.at_first, strict=True))
        later = max(len(new) - 1, 1)
        return Stats(
            prompt_tokens=len(prompt),
            cached_tokens=kept,
            new_tokens=len(new),
            ttft_seconds=self.first - self.began,
            tokens_per_second=(len(new) - 1) / (self.last - self.first) if len(new) > 1 else 0.0,
            bytes_up=now[0] - self.before[0],
            bytes_down=now[1] - self.before[1],
            bytes_up_per_token=up / later,
            bytes_down_per_token=down / later,
            round_trips_per_token=trips / later,
            steps=self.steps,
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
            cloud_seconds=self.cloud_micros / 1e6,
            reconnections=self.session._link.reconnections - self.reconnections,
        )


def open_session(
    edge: str | Path,
    cloud: str,
    *,
    cores: str | Path | None = None,
    base_only: bool = False,
    graphs: str = "onnx",
    threads: int = 1,
    wire_dtype: str = "fp32",
    deadlines: Deadlines | None = None,
    drafter: Drafter | None = None,
    bucket: int | None = None,
    on_state: Callable[[str], None] = lambda state: None,
    access: Access = Access(),  # noqa: B008  frozen
) -> PrivateSession:
    """Opens the edge half at `edge` and a session with the cloud at `cloud` (host:port).

    cores: another persona's file; base_only: no persona; graphs: "onnx" or "ort"; threads: of the head's product and the device's layers;
    wire_dtype: of all tensors, or by kind ("entry=fp16,injections=int8", protocol/precision.py); drafter: several tokens per step, without
    loss (drafts.py); bucket: every step padded to so many tokens, for answers that are equal bit for bit; on_state: told when the link
    breaks and comes back (link.py); access: TLS, pins and the access token (access.py).
    Raises ArtifactError, UsageError, Refused, Unreachable and their children.
    """
    opened = Edge(Path(edge), Path(cores) if cores is not None else None, base_only, graphs, threads)
    precision = read_precision(wire_dtype)
    return PrivateSession(opened, cloud, precision, deadlines, drafter=drafter, bucket=bucket, on_state=on_state, access=access)


__all__ = ["Answer", "Piece", "PloraError", "PrivateSession", "Stats", "open_session"]
