"""The scheduler by itself, on an engine that computes nothing: who goes with whom, in which order, and who is waited for."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from plora.cloud_server.engine import Piece, Row
from plora.cloud_server.scheduler import (
    LEAST_PIECE_TOKENS,
    MIXED_TOKENS,
    MOST_SHORT_TOKENS,
    PIECE_TOKENS,
    SHORT_TOKENS,
    Pace,
    Scheduler,
)

BOUND_SECONDS = 30


@dataclass
class Fake:
    """An engine that computes nothing and notes what it was asked for: (leg, [(row, tokens)])."""

    stages: int = 1
    merge_seconds: list[float] = field(default_factory=list)
    asked: list[tuple[int, list[tuple[str, int]]]] = field(default_factory=list)
    broken: bool = False

    def __post_init__(self) -> None:
        self.legs = [SimpleNamespace(segment=SimpleNamespace(first=0, stop=1), exchange=None) for _ in range(self.stages)]
        self.merge_seconds = self.merge_seconds or [0.0] * self.stages

    def go(self, index: int, pieces: list[Piece]) -> None:
        self.asked.append((index, [(piece.row.name, piece.count) for piece in pieces]))  # type: ignore[attr-defined]
        if self.broken:
            raise RuntimeError("broken")
        for piece in pieces:
            piece.row.done += piece.count
            if not piece.row.left:
                piece.row.leg, piece.row.done = index + 1, 0


def row(name: str, tokens: int) -> Row:
    made = Row(0, 0, torch.zeros(tokens, 1), {})
    made.name = name  # type: ignore[attr-defined]
    return made


def together(engine: Fake, *rows: Row, alone: tuple[str, ...] = ()) -> None:
    """All ask for the engine in the same moment."""

    for each in rows:
        each.alone = each.name in alone  # type: ignore[attr-defined]

    async def ask() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        async with asyncio.timeout(BOUND_SECONDS):
            await asyncio.gather(*(scheduler.go(each, Pace()) for each in rows))  # type: ignore[attr-defined]
        assert not any(scheduler.waiting)

    asyncio.run(ask())


def test_prompts_fill_up_what_decoding_leaves() -> None:
    engine = Fake()
    together(engine, row("prompt", 128), row("a", 1), row("b", 5), row("second prompt", 100))
    assert engine.asked[0] == (0, [("a", 1), ("b", 5), ("prompt", MIXED_TOKENS - 6)])
    assert engine.asked[1] == (0, [("prompt", 128 - MIXED_TOKENS + 6), ("second prompt", PIECE_TOKENS - (128 - MIXED_TOKENS + 6))])
    done = {
        name: sum(tokens for _, pieces in engine.asked for who, tokens in pieces if who == name) for name in ("prompt", "second prompt")
    }
    assert done == {"prompt": 128, "second prompt": 100}


def test_a_prompt_moves_on_however_many_decode() -> None:
    engine = Fake()
    together(engine, *(row(f"{i}", SHORT_TOKENS) for i in range(20)), row("prompt", 40))
    assert len(engine.asked[0][1]) == MOST_SHORT_TOKENS // SHORT_TOKENS + 1
    assert engine.asked[0][1][-1] == ("prompt", LEAST_PIECE_TOKENS)


def test_who_asks_to_be_alone_is() -> None:
    engine = Fake()
    together(engine, row("a", 1), row("hermit", 8), row("b", 1), row("c", 200), alone=("hermit",))
    assert [pieces for _, pieces in engine.asked if any(name == "hermit" for name, _ in pieces)] == [[("hermit", 8)]]
    assert {"a", "b"} <= {name for name, _ in engine.asked[0][1]}


def test_the_leg_where_somebody_waits_longest_comes_first() -> None:
    engine = Fake(stages=3)
    late, early = row("late", 1), row("early", 1)
    late.leg, early.leg = 0, 2
    together(engine, early, late)
    assert [index for index, _ in engine.asked] == [2, 0]


def test_what_is_done_ahead_is_of_one_leg_and_once() -> None:
    """Devices that come back at any time: no row twice, none of another leg or of one who wants to be alone, and none is kept."""
    engine = Fake(stages=4)
    asked: list[list[Row]] = []
    random = np.random.default_rng(0)

    async def device(scheduler: Scheduler, number: int) -> None:
        pace = Pace()
        for _ in range(20):
            each = row(str(number), 1)
            each.alone = number == 0
            for leg in range(4):
                await scheduler.go(each, pace)
                if leg < 3:
                    scheduler.meanwhile(each, pace)
                for _ in range(int(random.integers(0, 4))):
                    await asyncio.sleep(0)
        scheduler.forget(pace)

    async def all_of_them() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        async with asyncio.timeout(BOUND_SECONDS):
            await asyncio.gather(*(device(scheduler, number) for number in range(6)))
        assert not scheduler._idle_work

    legs_seen: list[set[int]] = []
    engine.ahead = lambda rows: (asked.append(list(rows)), legs_seen.append({each.leg for each in rows}))  # type: ignore[attr-defined]
    asyncio.run(all_of_them())
    assert asked
    assert all(len(legs) == 1 for legs in legs_seen)
    for rows in asked:
        assert len(rows) == len(set(map(id, rows)))
        assert len(rows) == 1 or not any(each.alone for each in rows)


def test_a_long_prompt_lets_other_legs_go_between_its_pieces() -> None:
    engine = Fake(stages=2)
    prompt, other = row("prompt", 3 * PIECE_TOKENS), row("other", 1)
    other.leg = 1
    together(engine, prompt, other)
    assert [pieces[0][0] for _, pieces in engine.asked] == ["prompt", "other", "prompt", "prompt"]


def test_an_error_ends_those_it_belongs_to_and_no_others() -> None:
    engine = Fake(stages=2)
    victim, neighbour = row("victim", 1), row("neighbour", 1)
    neighbour.leg = 1

    async def ask() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        engine.broken = True
        with pytest.raises(RuntimeError, match="broken"):
            await scheduler.go(victim, Pace())
        engine.broken = False
        await scheduler.go(neighbour, Pace())
        assert not any(scheduler.waiting)

    asyncio.run(ask())


def test_who_is_cancelled_while_waiting_is_not_computed() -> None:
    engine = Fake(merge_seconds=[10.0])

    async def ask() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        task = asyncio.create_task(scheduler.go(row("gone", 1), Pace()))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await scheduler.go(row("here", 1), Pace())

    asyncio.run(ask())
    assert [pieces for _, pieces in engine.asked] == [[("here", 1)]]


def lingering(returns_after: float, merge_seconds: float, patience: float) -> list[list[str]]:
    """Two devices have stepped together twice; then one asks at once, the other `returns_after` (None: never). The batches since."""
    engine = Fake(merge_seconds=[merge_seconds])

    async def ask() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        first, second = Pace(), Pace()

        async def step(name: str, pace: Pace) -> None:
            each = row(name, 1)
            await scheduler.go(each, pace)

        await asyncio.gather(step("first", first), step("second", second))
        second.expected[0] = returns_after
        first.expected[0] = 1000.0
        engine.asked.clear()
        one = asyncio.create_task(step("first", first))
        await asyncio.sleep(0)
        if patience:
            await asyncio.sleep(patience)
        await asyncio.wait_for(asyncio.gather(one, step("second", second)), BOUND_SECONDS)

    asyncio.run(ask())
    return [[name for name, _ in pieces] for _, pieces in engine.asked]


def test_a_batch_waits_for_a_device_that_is_due() -> None:
    """A minute would be saved: the other needs far less to come back."""
    assert lingering(returns_after=0.01, merge_seconds=60.0, patience=0.02) == [["first", "second"]]


def test_a_batch_does_not_wait_for_one_that_is_far_away() -> None:
    assert lingering(returns_after=61, merge_seconds=60.0, patience=0.02) == [["first"], ["second"]]


def test_a_batch_does_not_wait_for_longer_than_it_saves() -> None:
    """One that was due and never came is not waited for again."""
    engine = Fake(merge_seconds=[0.02])

    async def ask() -> None:
        scheduler = Scheduler(engine, ThreadPoolExecutor(1))  # type: ignore[arg-type]
        gone, here = Pace(), Pace()
        await asyncio.gather(scheduler.go(row("gone", 1), gone), scheduler.go(row("here", 1), here))
        gone.expected[0] = 0.005
        for _ in range(3):
            await asyncio.wait_for(scheduler.go(row("here", 1), here), BOUND_SECONDS)
        await asyncio.sleep(0.05)
        before = asyncio.get_running_loop().time()
        assert scheduler._linger(0, scheduler_choice(here), before) <= before  # overdue by now

    def scheduler_choice(pace: Pace) -> Any:
        waiting = SimpleNamespace(row=row("here", 1), since=asyncio.get_running_loop().time())
        return [(waiting, Piece(row("here", 1), 1))]

    asyncio.run(ask())
    assert [[name for name, _ in pieces] for _, pieces in engine.asked[1:]] == [["here"]] * 3
