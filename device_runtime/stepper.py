"""Steps over a link: front layers, entry, exchanges, exit, back layers. The device's half of the walk, for one conversation.

What the cloud has cached is known here by its tokens (`history`), so that a session that is lost is begun anew and refilled, and
nobody above notices but by the time it takes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from ..artifact.errors import ContextOverflow, PloraError, ServerStopping, SessionExpired, Unreachable
from ..artifact.plan import Exchange
from ..artifact.walk import BackLayers, Entry, FrontLayers, walk
from ..protocol.events import CancelDone, ClosedDone, CompressedArrived, StepDone, Terms
from ..protocol.roles import DeviceSession
from ..protocol.states import State
from .chunks import CHUNK_TOKENS, Chunk, aligned_chunks, chunks
from .cores import Floats
from .edge import Edge
from .layers import DeviceLayers
from .link import CONNECTED, RECONNECTING, REPLAYING, Link
from .transport import Interrupted

MOST_SESSIONS = 8
"""Sessions begun for one feed, one after another, before we believe that the cloud loses every one."""


@dataclass
class Counters:
    """Since the session began. steps: sent as a whole; round_trips: times that the device waited for the cloud; replayed_tokens: sent
    again to another session."""

    steps: int = 0
    tokens: int = 0
    round_trips: int = 0
    replayed_tokens: int = 0


class Stepper:
    """Drives one session's machine over one link. Not for two tasks at a time.

    bucket: None, or every step has exactly so many tokens, from a multiple of it: then each token is computed by the same kernels on the
    same shapes whatever came before, and is equal bit for bit (docs/networks.md).
    """

    def __init__(self, edge: Edge, link: Link, bucket: int | None = None) -> None:
        self.edge = edge
        self.link = link
        self.bucket = bucket
        stages = walk(edge.plan)
        self.front = next((stage for stage in stages if isinstance(stage, FrontLayers)), None)
        self.back = next((stage for stage in stages if isinstance(stage, BackLayers)), None)
        self.entry = next(stage for stage in stages if isinstance(stage, Entry))
        self.counters = Counters()
        self.history: list[int] = []
        self.cloud_micros = 0
        self._patience: asyncio.Timeout | None = None  # of what runs now
        self._layers: dict[FrontLayers | BackLayers, DeviceLayers] = {}
        self._room = self.edge.shape.context_tokens  # of the device's own layers

    @property
    def machine(self) -> DeviceSession:
        return self.link.machine

    @property
    def terms(self) -> Terms:
        assert self.machine.terms is not None  # `open` came first
        return self.machine.terms

    @property
    def context_tokens(self) -> int:
        """Most tokens of the conversation."""
        context = min(self.terms.context_tokens, self._room)
        return context if self.bucket is None else context // self.bucket * self.bucket

    async def open(self) -> Terms:
        """Handshake. Raises Refused's children, Unreachable."""
        terms = await self.link.open()
        self._room = min(terms.context_tokens, self.edge.shape.context_tokens)
        for stage in (self.front, self.back):
            if stage is not None:
                first = stage.first if isinstance(stage, BackLayers) else 0
                self._layers[stage] = self.edge.device_layers(first, stage.stop, self._room)
        return terms

    # Steps

    async def feed(self, ids: list[int], exit_rows: int, position: int | None = None) -> Floats:
        """Feeds T tokens that follow the first `position` of the history (all of it, if None; the rest is forgotten). Returns the last
        `exit_rows` rows of what the final norm reads, [exit_rows, hidden] float32. In steps of at most CHUNK_TOKENS, several in flight.

        A session that is lost is begun anew, and the history sent again. Raises Unreachable once given up, which is step_seconds after
        the last progress however long all of it takes, and errors of faults.
        """
        if position is not None:
            self.keep(position)
        fixed = list(self.history)
        # It may have ended between feeds, or in the middle of one.
        lost = None if self.machine.state in (State.READY, State.CANCELLING) else "the session was given up"
        for _ in range(MOST_SESSIONS):
            try:
                if lost is not None:
                    await self._begin_anew(fixed, lost)
                async with self._deadline():
                    await self._settle()
                    return await self._feed(fixed[len(self.history) :] + ids, exit_rows)
            except (SessionExpired, ServerStopping) as error:
                lost = str(error)
        raise Unreachable(f"{self.link.address}: {MOST_SESSIONS} sessions were lost one after another; given up")

    async def _begin_anew(self, tokens: list[int], why: str) -> None:
        """Another session with `tokens` cached."""
        self.history = []
        await self.link.reopen(why)
        if tokens:
            self.link.say(REPLAYING)
            self.counters.replayed_tokens += len(tokens)
            async with self._deadline():
                await self._feed(tokens, 0)
            self.link.say(CONNECTED)

    async def _feed(self, ids: list[int], exit_rows: int) -> Floats:
        fixed = len(self.history)
        tokens = self.history + ids
        if len(tokens) > self.context_tokens:  # of this session, which may be another one, with another cloud
            raise ContextOverflow(
                f"{len(tokens)} tokens, but the session that took the conversation over has room for {self.context_tokens}; "
                "begin another one"
            )
        wanted = len(tokens) - exit_rows  # of this token's row and all after it
        if self.bucket is None:
            todo = deque(chunks(fixed, tokens, wanted, min(CHUNK_TOKENS, self.terms.step_tokens), bool(self.back)))
        else:
            todo = deque(aligned_chunks(fixed, tokens, wanted, self.bucket, bool(self.back)))
        flying: deque[Chunk] = deque()
        rows: list[Floats] = []
        while todo or flying:
            while todo and len(flying) < self.terms.window:
                flying.append(todo.popleft())
                await self._begin(flying[-1])
                self._progressed()
            event = await self.link.receive()
            self.counters.round_trips += 1
            if isinstance(event, CompressedArrived):
                injection = self.edge.inject(event.exchange, event.values)
                await self.link.send(self.machine.injections(injection, event.step))
            elif isinstance(event, StepDone):
                rows.append(self._end(flying.popleft(), event, tokens))
            self._progressed()
        return np.concatenate(rows)[-exit_rows:] if exit_rows else np.zeros((0, self.edge.shape.hidden), np.float32)

    async def _begin(self, chunk: Chunk) -> None:
        hidden = self.edge.embed(chunk.ids)
        if self.front is not None:
            hidden = self._layers[self.front].run(hidden, chunk.position)
        exchange: Exchange | None = self.entry.exchange
        injection = self.edge.entry_injection(exchange, hidden) if exchange else None
        await self.link.send(self.machine.entry(hidden, chunk.exit_rows, injection, chunk.position))

    def _end(self, chunk: Chunk, done: StepDone, tokens: list[int]) -> Floats:
        """What of the chunk's exit was wanted, behind the back layers."""
        hidden = done.hidden
        if self.back is not None:
            hidden = self._layers[self.back].run(hidden, chunk.position)
        self.history = tokens[: min(chunk.stop, len(tokens))]
        self.counters.steps += 1
        self.counters.tokens += len(chunk.ids)
        self.cloud_micros = done.compute_micros
        return hidden[: len(hidden) - chunk.padding][-chunk.wanted :] if chunk.wanted else hidden[:0]

    def keep(self, length: int) -> None:
        """Only the first `length` tokens are of use: the next feed drops the rest on the way."""
        del self.history[length:]

    # Ends

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Raises Unreachable once step_seconds have gone by since it began or, if that was later, since the last `_progressed`."""
        seconds = self.link.deadlines.step_seconds
        try:
            async with asyncio.timeout(seconds) as self._patience:
                yield
        except TimeoutError:
            step = self.machine.running.number
            raise Unreachable(f"{self.link.address}: no answer to step {step} within {seconds:g} s; given up") from None
        finally:
            self._patience = None

    def _progressed(self) -> None:
        """A frame of ours found its way, or the cloud answered one: what is still to come has all of step_seconds again."""
        assert self._patience is not None  # within `_deadline`
        self._patience.reschedule(asyncio.get_running_loop().time() + self.link.deadlines.step_seconds)

    async def cancel(self) -> None:
        """After an interrupted feed: the cloud's cache is as before the steps in flight. Does nothing between steps.

        Waits for the cloud to confirm it, but for no longer than close_seconds, and not on a broken link: the next feed sees to it then.
        """
        transport = self.link.transport
        if transport is not None:
            transport.interrupted = False
        if transport is None or self.machine.state not in (State.COMPUTING, State.WAITING):
            return
        frame = self.machine.cancel()
        if self.link.state == RECONNECTING:
            transport.fail("interrupted, and it did not answer")
        if self.link.lost:
            return  # it lies in the outbox
        try:
            async with asyncio.timeout(self.link.deadlines.close_seconds):
                await self.link.send(frame)
                await self._settle()
        except (TimeoutError, Unreachable, SessionExpired, ServerStopping):
            pass

    async def _settle(self) -> None:
        """A step that was given up is over."""
        while self.machine.state is State.CANCELLING:
            if isinstance(await self.link.receive(), CancelDone):
                self.keep(self.machine.length)

    async def close(self) -> None:
        """Says good-bye if there is still somebody to say it to; never raises."""
        try:
            if self.machine.state not in (State.START, State.OVER) and not self.link.lost:
                async with asyncio.timeout(self.link.deadlines.close_seconds):
                    await self.link.send(self.machine.close())
                    while not isinstance(await self.link.receive(), ClosedDone):
                        pass
        except (PloraError, TimeoutError, Interrupted):
            pass
        finally:
            await self.link.close()
