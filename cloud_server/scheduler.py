"""Which rows the engine takes together, and when: continuous batching whose unit is a leg, from one wait for a device to the next.

Whoever stands at the same leg when the engine is free goes as one batch; while one session waits for its phone, the others compute. Single
tokens go first, prompts fill up what room they leave, in pieces. Continuous batching: Orca (OSDI 2022); pieces of prompts beside
decoding: Sarathi-Serve (arXiv 2403.02310).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .engine import Engine, Piece, Row

SHORT_TOKENS = 16
"""Rows of up to so many tokens are decoding (a token, or one with drafts), and go before prompts."""

MOST_SHORT_TOKENS = 256
"""Of decoding rows in one batch: more gain nothing, and each would wait for all."""

PIECE_TOKENS = 128
"""Of a prompt that has the engine to itself: twice as many are no faster per token (docs/load.md)."""

MIXED_TOKENS = 64
"""Of a batch that holds decoding rows and a piece of a prompt: it takes about twice what 16 decoding rows take alone."""

LEAST_PIECE_TOKENS = 16
"""Of a prompt beside decoding rows, however many these are: it is never kept waiting for ever."""

MOST_AWAY_SECONDS = 1.0
"""Of a turnaround that tells of the next: whoever was away for longer was waiting for a person."""

SMOOTHING = 0.25
"""Weight of the last turnaround in what is expected of the next."""


@dataclass(eq=False)
class Pace:
    """How long one session's device is away after each leg, in seconds, and since when it is."""

    expected: dict[int, float] = field(default_factory=dict)
    leg: int = 0
    left_at: float | None = None

    def leave(self, leg: int, now: float) -> None:
        """It has what it needs, and will be back for `leg`."""
        self.leg, self.left_at = leg, now

    def come_back(self, leg: int, now: float) -> None:
        if self.left_at is not None and leg == self.leg and (last := now - self.left_at) <= MOST_AWAY_SECONDS:
            before = self.expected.get(leg)
            self.expected[leg] = last if before is None else before + SMOOTHING * (last - before)
        self.left_at = None

    @property
    def due(self) -> float | None:
        expected = self.expected.get(self.leg)
        return None if self.left_at is None or expected is None else self.left_at + expected


@dataclass(eq=False)
class Waiting:
    """A row at its leg."""

    row: Row
    pace: Pace
    since: float
    done: asyncio.Future[None] = field(repr=False)


@dataclass
class Counters:
    """Since the start. rows: of all batches, prompts' pieces among them; seconds: that the engine worked."""

    batches: int = 0
    rows: int = 0
    largest: int = 0
    seconds: float = 0.0


class Scheduler:
    """Drives one engine from one event loop. All of its work is done by `worker`, one batch at a time. on_batch: told of each: rows,
    seconds."""

    def __init__(self, engine: Engine, worker: Executor, on_batch: Callable[[int, float], None] = lambda rows, seconds: None) -> None:
        self.engine = engine
        self.worker = worker
        self.on_batch = on_batch
        self.counters = Counters()
        self.waiting: list[deque[Waiting]] = [deque() for _ in engine.legs]
        self._away: set[Pace] = set()
        self._idle_work: dict[Row, Pace] = {}
        self._busy = False
        self._free_since = 0.0
        self._last_seconds = [0.0] * len(engine.legs)
        self._lingering: dict[int, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._kicked = False

    async def go(self, row: Row, pace: Pace) -> None:
        """Takes a row through its next leg, together with others unless it is `alone`; its `result` is then what the device needs. If
        cancelled, the engine may go on with a batch that the row is in."""
        now = time.monotonic()
        pace.come_back(row.leg, now)
        self._away.discard(pace)
        self._idle_work.pop(row, None)
        waiting = Waiting(row, pace, now, asyncio.get_running_loop().create_future())
        self.waiting[row.leg].append(waiting)
        self._kick_soon()
        await waiting.done

    def meanwhile(self, row: Row, pace: Pace) -> None:
        """The row's device is on its way: what of its next leg needs no injection may be done now, if there is nothing better to do."""
        self._idle_work[row] = pace
        self._kick_soon()

    def forget(self, pace: Pace) -> None:
        """It will not come back, or not with a row that it left."""
        self._away.discard(pace)
        pace.left_at = None
        self._idle_work = {row: own for row, own in self._idle_work.items() if own is not pace}

    def _kick_soon(self) -> None:
        """After those who have something to send or to queue: they come first in the event loop."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._kick)

    def _kick(self) -> None:
        self._kicked = False
        if self._busy:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        later: list[float] = []
        for index in self._legs_by_age():
            chosen = self._choose(index)
            until = self._linger(index, chosen, now)
            if until <= now:
                self._start(index, chosen)
                return
            later.append(until)
        if later:
            self._timer = asyncio.get_running_loop().call_later(min(later) - now, self._kick)
        self._work_ahead()

    # Which

    def _legs_by_age(self) -> list[int]:
        """Where somebody waits, the longest wait first."""
        oldest: dict[int, float] = {}
        for index, queue in enumerate(self.waiting):
            if any(waiting.done.done() for waiting in queue):  # their sessions are over
                queue = self.waiting[index] = deque(waiting for waiting in queue if not waiting.done.done())
            if queue:
                oldest[index] = min(waiting.since for waiting in queue)
        return sorted(oldest, key=oldest.__getitem__)

    def _choose(self, index: int) -> list[tuple[Waiting, Piece]]:
        """Of those at a leg, in the order in which they came; they stay in the queue until they are through."""
        queue = self.waiting[index]
        if queue[0].row.alone:
            return [(queue[0], Piece(queue[0].row, min(queue[0].row.left, PIECE_TOKENS)))]
        if self.engine.legs[index].segment is None:  # hardly any work, and none by pieces
            return [(waiting, Piece(waiting.row, waiting.row.left)) for waiting in queue if not waiting.row.alone]
        chosen: list[tuple[Waiting, Piece]] = []
        tokens = 0
        for waiting in queue:
            left = waiting.row.left
            if left <= SHORT_TOKENS and not waiting.row.alone and tokens + left <= MOST_SHORT_TOKENS:
                chosen.append((waiting, Piece(waiting.row, left)))
                tokens += left
        room = max(LEAST_PIECE_TOKENS, MIXED_TOKENS - tokens) if chosen else PIECE_TOKENS
        for waiting in queue:
            left = waiting.row.left
            if left > SHORT_TOKENS and not waiting.row.alone and room > 0:
                chosen.append((waiting, Piece(waiting.row, min(left, room))))
                room -= min(left, room)
        return chosen

    def _linger(self, index: int, chosen: list[tuple[Waiting, Piece]], now: float) -> float:
        """Until when to wait for devices that are due; before `now` if for none.

        Those that will be back before this batch could be done would have a batch of their own right after it. Waiting for them is worth
        what two batches take more than one, so all of them must be due within that.
        """
        if chosen[0][0].row.alone or any(piece.count > SHORT_TOKENS for _, piece in chosen):
            return 0.0
        worth = self.engine.merge_seconds[index]
        began = self._lingering.setdefault(index, max(self._free_since, min(waiting.since for waiting, _ in chosen)))
        latest = began + worth
        if latest <= now:
            return 0.0
        done = now + max(self._last_seconds[index], worth)
        due = [pace.due for pace in self._away if pace.leg == index]
        next_batch = [each for each in due if each is not None and now - worth <= each <= done]
        return latest if next_batch and max(next_batch) <= latest else 0.0

    # Work

    def _start(self, index: int, chosen: list[tuple[Waiting, Piece]]) -> None:
        pieces = [piece for _, piece in chosen]
        self._lingering.pop(index, None)
        self.counters.batches += 1
        self.counters.rows += len(pieces)
        self.counters.largest = max(self.counters.largest, len(pieces))
        self._run(lambda: self.engine.go(index, pieces), lambda *end: self._deliver(index, chosen, *end))

    def _deliver(self, index: int, chosen: list[tuple[Waiting, Piece]], error: BaseException | None, seconds: float) -> None:
        now = time.monotonic()
        self._last_seconds[index] = seconds
        self.on_batch(len(chosen), seconds)
        through = set()
        for waiting, _ in chosen:
            waiting.row.seconds += seconds
            if waiting.done.done():  # cancelled
                through.add(waiting)
            elif error is not None:
                waiting.done.set_exception(error)
                through.add(waiting)
            elif waiting.row.leg != index:
                waiting.pace.leave(waiting.row.leg % len(self.waiting), now)
                if not waiting.row.alone:
                    self._away.add(waiting.pace)
                waiting.done.set_result(None)
                through.add(waiting)
            else:
                waiting.since = now  # who waits elsewhere may be first
        self.waiting[index] = deque(waiting for waiting in self.waiting[index] if waiting not in through)

    def _work_ahead(self) -> None:
        first = next(iter(self._idle_work), None)
        if first is None:
            return
        together = [row for row in self._idle_work if row.leg == first.leg and not (row.alone or first.alone)] or [first]
        for row in together:
            del self._idle_work[row]
        self._run(lambda: self.engine.ahead(together), lambda error, seconds: None)

    def _run(self, work: Callable[[], Any], end: Callable[[BaseException | None, float], None]) -> None:
        """Has the engine do `work`, and then calls `end` with the error, if any, and the seconds that it took."""
        self._busy = True
        loop = asyncio.get_running_loop()
        self.worker.submit(lambda: loop.call_soon_threadsafe(self._finish, _timed(work), end))

    def _finish(self, outcome: tuple[BaseException | None, float], end: Callable[[BaseException | None, float], None]) -> None:
        self._busy, self._free_since = False, time.monotonic()
        self.counters.seconds += outcome[1]
        try:
            end(*outcome)
        finally:
            self._kick_soon()


def engine_thread() -> ThreadPoolExecutor:
    """The one thread that computes, however little: a second one would have OpenMP threads of its own, and on as many cores as one set
    needs both become a fifth slower (docs/load.md)."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="plora-engine")


def _timed(work: Callable[[], Any]) -> tuple[BaseException | None, float]:
    began = time.perf_counter()
    try:
        work()
    except BaseException as error:  # of whatever kind: its rows' sessions end by name, and the others go on
        return error, time.perf_counter() - began
    return None, time.perf_counter() - began
