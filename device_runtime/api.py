"""The device's Python API, and the generate loop: everything that a person's text goes through on the device."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ..artifact.errors import ContextOverflow, PloraError, UsageError
from .edge import Edge
from .runner import Runner
from .sampling import Sampler, Sampling, choose_sampling
from .stepper import Stepper
from .text import Stream, Text
from .transport import Deadlines, Transport

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """One token: its id, and the text that became certain with it (often "", at the end possibly more than one word)."""

    token_id: int
    text: str


@dataclass(frozen=True)
class Stats:
    """Of one answer. ttft_seconds: from the call to the first token; tokens_per_second: of the tokens after it;
    bytes: frames, without gRPC's framing; cached_tokens: prompt tokens that the cloud still had."""

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
    """A session with the cloud. Use it from one thread; close it, or use it as a context manager."""

    def __init__(self, edge: Edge, cloud: str, wire_dtype: str = "fp32", deadlines: Deadlines | None = None) -> None:
        self.edge = edge
        self.text = Text(edge.folder, edge.manifest)
        self._transport = Transport(cloud, deadlines or Deadlines())
        self._stepper = Stepper(edge, self._transport, wire_dtype)
        self._runner = Runner(self._interrupt)
        self._closed = False
        self._connected = False
        self._cached: list[int] = []  # tokens whose keys and values the cloud holds
        self.answer: Answer | None = None
        try:
            self._run(self._transport.connect())
            self._connected = True
            self.terms = self._run(self._stepper.open())
        except BaseException:
            self._run(self._transport.close())
            self._runner.close()
            raise

    def _interrupt(self) -> None:
        """Ctrl-C: wakes whoever waits for a frame; nobody does before there is a connection."""
        if self._connected:
            self._transport.interrupt()
        elif self._runner.task is not None:
            self._runner.task.cancel()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def sampling(self, **flags: object) -> Sampling:
        """Flags (None: not given) over the artifact's generation config over the defaults."""
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
        context = min(self.terms.context_tokens, self.edge.shape.context_tokens)
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
        reason = "length"
        try:
            kept, logits = self._prefill(prompt)
            while True:
                token = sampler.choose(logits, prompt + new)
                new.append(token)
                clock.token()
                if token in self.text.defaults.eos_token_ids:
                    reason = "stop"
                    yield Piece(token, stream.finish())
                    break
                piece = stream.push(token)
                last = stream.stopped or len(new) == max_tokens
                if last:
                    reason = "stop_text" if stream.stopped else "length"
                    yield Piece(token, piece + stream.finish())
                    break
                yield Piece(token, piece)
                logits = self._feed([token])
        except KeyboardInterrupt:
            self._run(self._stepper.cancel())
            raise
        self.answer = Answer(stream.whole, prompt, new, reason, clock.stats(prompt, kept, new))

    def _prefill(self, prompt: list[int]) -> tuple[int, Any]:
        """Sends what the cloud has not cached, in chunks. Returns (tokens kept, logits [V] after the last)."""
        kept = 0
        while kept < min(len(self._cached), len(prompt) - 1) and self._cached[kept] == prompt[kept]:
            kept += 1
        if kept < self._stepper.machine.length:  # more than `_cached` if Ctrl-C came as a step ended
            self._run(self._stepper.truncate(kept))
            del self._cached[kept:]
        rest = prompt[kept:]
        size = self.terms.step_tokens
        while len(rest) > size:
            self._feed(rest[:size], wanted=False)
            rest = rest[size:]
        return kept, self._feed(rest)

    def _feed(self, ids: list[int], wanted: bool = True) -> Any:
        """One step; logits [V] after its last token if wanted."""
        exit_rows = self._run(self._stepper.step(ids, 1 if wanted else 0))
        self._cached += ids
        return self.edge.logits(exit_rows)[-1] if wanted else None

    def forget(self) -> None:
        """Empties the cloud's cache of this session, so that the next prompt is sent whole."""
        self._run(self._stepper.truncate(0))
        self._cached.clear()

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
        self.began = time.perf_counter()
        self.before = self._counts()
        self.first: tuple[float, tuple[int, int, int, int]] | None = None

    def _counts(self) -> tuple[int, int, int, int]:
        transport, counters = self.session._transport, self.session._stepper.counters
        return transport.bytes_up, transport.bytes_down, counters.round_trips, counters.steps

    def token(self) -> None:
        if self.first is None:
            self.first = (time.perf_counter(), self._counts())
        self.last = time.perf_counter()

    def stats(self, prompt: list[int], kept: int, new: list[int]) -> Stats:
        assert self.first is not None  # an answer has a token
        now = self._counts()
        first_at, at_first = self.first
        up, down, trips, steps = (after - before for after, before in zip(now, at_first, strict=True))
        per_step = 1 / steps if steps else 0.0
        return Stats(
            prompt_tokens=len(prompt),
            cached_tokens=kept,
            new_tokens=len(new),
            ttft_seconds=first_at - self.began,
            tokens_per_second=(len(new) - 1) / (self.last - first_at) if len(new) > 1 else 0.0,
            bytes_up=now[0] - self.before[0],
            bytes_down=now[1] - self.before[1],
            bytes_up_per_token=up * per_step,
            bytes_down_per_token=down * per_step,
            round_trips_per_token=trips * per_step,
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
) -> PrivateSession:
    """Opens the edge half at `edge` and a session with the cloud at `cloud` (host:port).

    cores: another persona's file; base_only: no persona; graphs: "onnx" or "ort"; threads: of the head's product and the device's layers.
    Raises ArtifactError, Refused, Unreachable and their children.
    """
    opened = Edge(Path(edge), Path(cores) if cores is not None else None, base_only, graphs, threads)
    return PrivateSession(opened, cloud, wire_dtype, deadlines)


__all__ = ["Answer", "Piece", "PloraError", "PrivateSession", "Stats", "open_session"]
