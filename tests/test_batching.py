"""Many sessions on one engine: who is batched with whom, and that nobody sees anything of it."""

from __future__ import annotations

import asyncio
import copy
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.cloud_server.engine import Engine, Piece
from plora.device_runtime.edge import Edge
from plora.models.adapter import Adapter
from plora.models.basis import new_adapter

from .conftest import Made, tuned
from .joined import VOCABULARY, EagerEngine, Talk, service_of, tiny_base, unsplit, write_edge_half
from .strategies import Act, legal_plans, sessions

TOLERANCE = 1e-4
"""Of the tensor's largest value, fp32, at most six layers, in batches of any shape: rounding gives some 1e-6."""
BOUND_SECONDS = 30
PLANS = {
    "paper": paper_plan(3, 5, separate=True),
    "grouped": grouped_plan(4, 2, 6, shared_injection=9),
    "entry": entry_plan(4, 1, 6, shared_injection=7, back_layers=1),
}


@dataclass
class Parts:
    """A model in parts: engine and edge half, and what to hold them against."""

    adapter: Adapter
    base: Any
    engine: EagerEngine
    edge: Edge


def parts(plan: ExchangePlan, folder: Path, seed: int = 0, slots: int = 8) -> Parts:
    base = tiny_base("llama", seed, num_hidden_layers=plan.layers)
    adapter = tuned(new_adapter(base, plan, "random", 0.7, seed), seed)
    edge = Edge(write_edge_half(folder / "edge", base, adapter))
    return Parts(adapter, base, EagerEngine(copy.deepcopy(base), adapter, slots), edge)


# Whole sessions, at the same time


async def converse(made: Parts, service: Any, acts: list[Act], seed: int, alone: bool = False) -> Talk:
    random = np.random.default_rng(seed)
    talk = Talk(made.edge, service, alone=alone)
    await talk.stepper.open()
    for act in acts:
        await talk.act(act, random.integers(0, VOCABULARY, act.tokens).tolist())
    await talk.close()
    return talk


async def emptied(service: Any) -> None:
    """Until what the last session had is free again."""
    while service.engine.pool.free_slots < service.engine.pool.slots:
        await asyncio.sleep(0.001)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(legal_plans(min_layers=2, max_layers=5), st.lists(sessions(), min_size=2, max_size=4), st.integers(0, 2**31))
def test_sessions_side_by_side_equal_the_unsplit_model(plan: ExchangePlan, together: list[list[Act]], seed: int) -> None:
    """Any legal plan; sessions of other lengths that begin, cut off, go back and end beside each other."""
    with tempfile.TemporaryDirectory() as folder:
        made = parts(plan, Path(folder), seed)
        with service_of(made.engine) as service:

            async def all_of_them() -> list[Talk]:
                async with asyncio.timeout(BOUND_SECONDS):
                    talks = await asyncio.gather(*(converse(made, service, acts, seed + i) for i, acts in enumerate(together)))
                    await emptied(service)
                    return talks

            talks = asyncio.run(all_of_them())
        for talk in talks:
            for name, tensor in unsplit(made.base, made.adapter, talk.ids).crossing(made.adapter).items():
                assert talk.error(name, tensor) < TOLERANCE, name
    assert made.engine.pool.free_slots == made.engine.pool.slots
    assert made.engine.pool.free_blocks == made.engine.pool.blocks


@pytest.mark.parametrize("plan", PLANS)
def test_sessions_are_in_fact_batched(plan: str, tmp_path: Path) -> None:
    """Six devices, ten tokens each: most legs take several of them, and what each gets is its own."""
    made = parts(PLANS[plan], tmp_path)
    acts = [Act(tokens=1, exit_rows=1, keep=1000, interrupted_after=None) for _ in range(10)]
    with service_of(made.engine) as service:

        async def all_of_them() -> list[Talk]:
            async with asyncio.timeout(BOUND_SECONDS):
                return await asyncio.gather(*(converse(made, service, acts, i) for i in range(6)))

        talks = asyncio.run(all_of_them())
        counters = service.scheduler.counters
    assert counters.rows == 6 * 10 * len(made.engine.legs)
    assert counters.largest == 6
    assert counters.batches < counters.rows / 2
    expected = [unsplit(made.base, made.adapter, talk.ids).crossing(made.adapter)["exit"] for talk in talks]
    for talk, own in zip(talks, expected, strict=True):
        assert talk.error("exit", own) < TOLERANCE
    assert talks[0].error("exit", expected[1]) > 100 * TOLERANCE  # the control: a neighbour's would be seen


def test_who_asks_for_it_is_computed_as_if_there_were_nobody_else(tmp_path: Path) -> None:
    """Bit for bit, with neighbours and without: what `--deterministic` promises."""
    made = parts(PLANS["grouped"], tmp_path)
    acts = [Act(tokens=8, exit_rows=8, keep=1000, interrupted_after=None) for _ in range(6)]

    def beside(neighbours: int) -> tuple[Talk, int]:
        with service_of(made.engine) as service:

            async def all_of_them() -> list[Talk]:
                async with asyncio.timeout(BOUND_SECONDS):
                    others = [converse(made, service, acts, 1 + i) for i in range(neighbours)]
                    return await asyncio.gather(converse(made, service, acts, 0, alone=True), *others)

            return asyncio.run(all_of_them())[0], service.scheduler.counters.largest

    (by_itself, one), (in_company, most) = beside(0), beside(5)
    assert (one, most) == (1, 5)  # the others were batched, with each other
    assert by_itself.ids == in_company.ids
    for name, rows in by_itself.rows.items():
        assert (rows == in_company.rows[name]).all(), name


# Isolation


def exits_beside(engine: Engine, own: np.ndarray, other: np.ndarray, injections: tuple[np.ndarray, np.ndarray], tokens: list[int]) -> Any:
    """The first row's exits over several steps, with a second row beside it; the engine's pool is as before."""
    slots = [engine.pool.take(), engine.pool.take()]
    exits, done = [], 0
    for count in tokens:
        rows = []
        for slot, entry, injection in zip(slots, (own, other), injections, strict=True):
            assert slot is not None
            assert engine.pool.reserve(slot, done + count)
            held = injection[done : done + count] if engine.plan.entry_exchange else None
            rows.append(engine.begin(slot, done, entry[done : done + count], held, count))
        for index, leg in enumerate(engine.legs):
            engine.go(index, [Piece(row, row.count) for row in rows])
            if leg.exchange is not None:
                for row, injection in zip(rows, injections, strict=True):
                    columns = leg.exchange.injection_columns
                    engine.inject(row, leg.exchange.index, np.ascontiguousarray(injection[done : done + count, :columns]))
        assert rows[0].result is not None
        exits.append(rows[0].result.copy())
        done += count
    for slot in slots:
        assert slot is not None
        engine.pool.give_back(slot)
    return np.concatenate(exits)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("hostile", [np.nan, np.inf, 3e38])
def test_no_value_of_a_neighbour_reaches_a_session(plan: str, hostile: float, tmp_path: Path) -> None:
    """Bit for bit the same, whatever the neighbour in the batch computes: other numbers, infinities, NaN."""
    engine = parts(PLANS[plan], tmp_path).engine
    random = np.random.default_rng(0)
    hidden, columns = engine.shape.hidden, max(exchange.injection_columns for exchange in engine.plan.all_exchanges)

    def draw(width: int) -> np.ndarray:
        return random.standard_normal((12, width)).astype(np.float32)

    own, mine, theirs = draw(hidden), draw(columns), draw(columns)
    tokens = [5, 1, 1, 4, 1]
    expected = exits_beside(engine, own, draw(hidden), (mine, theirs), tokens)
    assert np.isfinite(expected).all()
    bad = np.full((12, hidden), hostile, np.float32)
    assert (exits_beside(engine, own, bad, (mine, np.full_like(theirs, hostile)), tokens) == expected).all()
    # In the slots that held all that.
    assert (exits_beside(engine, own, draw(hidden), (mine, theirs), tokens) == expected).all()
    own[0, 0] += 1e-3  # the control: its own values do
    assert (exits_beside(engine, own, draw(hidden), (mine, theirs), tokens) != expected).any()


def test_a_prompt_in_pieces_equals_one_in_a_step(made: Made) -> None:
    """On the compiled graph, every piece with a token of a neighbour beside it."""
    engine = Engine(made.out / "cloud", 16 << 20)
    random = np.random.default_rng(0)
    entry = random.standard_normal((20, engine.shape.hidden)).astype(np.float32)
    injections = [random.standard_normal((20, each.injection_columns)).astype(np.float32) for each in engine.plan.exchanges]

    def whole(pieces: int) -> Any:
        slot, neighbour = engine.pool.take(), engine.pool.take()
        assert slot is not None
        assert neighbour is not None
        row, position = engine.begin(slot, 0, entry, None, 20), 0
        for index, leg in enumerate(engine.legs):
            while row.leg == index:
                beside = engine.begin(neighbour, position, entry[:1], None)
                beside.leg, position = row.leg, 0
                beside.u, beside.injections = (
                    torch.ones(1, engine.shape.hidden),
                    {e.index: torch.ones(1, 64)[:, : e.injection_columns] for e in engine.plan.exchanges},
                )
                engine.go(index, [Piece(row, min(pieces, row.left)), Piece(beside, 1)])
            if leg.exchange is not None:
                engine.inject(row, leg.exchange.index, injections[leg.exchange.index])
        for each in (slot, neighbour):
            engine.pool.give_back(each)
        assert row.result is not None
        return row.result

    expected = whole(20)
    for pieces in (1, 3, 7, 19):
        assert np.abs(whole(pieces) - expected).max() < TOLERANCE * np.abs(expected).max()


def test_a_thousand_personas_leave_nothing_behind(tmp_path: Path) -> None:
    """Each has other cores, so other injections; the server has the same objects after the thousandth as after the hundredth."""
    made = parts(PLANS["entry"], tmp_path, slots=2)
    acts = [Act(tokens=2, exit_rows=1, keep=1000, interrupted_after=None)]
    blocks = {index: private["cores"].copy() for index, private in made.edge._private.items()}
    alive = []
    with service_of(made.engine) as service:

        async def all_of_them() -> None:
            async with asyncio.timeout(10 * BOUND_SECONDS):
                for persona in range(1000):
                    for index, value in blocks.items():
                        made.edge._private[index]["cores"] = value * np.float32(1 + persona / 1000)
                    await converse(made, service, acts, 0)
                    if persona in (99, 999):
                        await emptied(service)
                        gc.collect()
                        alive.append(len(gc.get_objects()))

        asyncio.run(all_of_them())
        assert not service.sessions
        assert not service.room.guests
        assert not service.scheduler._away
        assert not any(service.scheduler.waiting)
        assert not service.scheduler._idle_work
    assert made.engine.pool.free_blocks == made.engine.pool.blocks
    assert alive[1] - alive[0] < 200  # not one object per persona
