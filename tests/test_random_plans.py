"""Any legal plan, on any small decoder, through any session: both halves together equal the unsplit model, tensor by tensor."""

from __future__ import annotations

import asyncio
import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plora.artifact import ExchangePlan
from plora.artifact.names import core_name
from plora.cloud_server.engine import Engine
from plora.device_runtime.edge import Edge
from plora.models.adapter import Adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base

from .conftest import make_export, oracle, tuned
from .joined import VOCABULARY, EagerEngine, Talk, perturbed, service_of, tiny_base, unsplit, write_edge_half
from .strategies import Act, legal_plans, sessions, tiny_models

TOLERANCE = 1e-4
"""Of the tensor's largest value (of LEAST_SCALE, if that is more), fp32, at most six layers: rounding gives some 1e-6."""
PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # explaining takes minutes
KV_BYTES = 16 << 20
FAST = settings(max_examples=150, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.too_slow])
WHOLE = settings(max_examples=5, deadline=None, derandomize=True, phases=PHASES[:3])


def talk(edge: Edge, engine: Engine, acts: list[Act], seed: int, vocabulary: int) -> Talk:
    """The session, whose person says random tokens."""
    random = np.random.default_rng(seed)

    async def whole() -> Talk:
        session = Talk(edge, service, "fp32")
        await session.stepper.open()
        for act in acts:
            await session.act(act, random.integers(0, vocabulary, act.tokens).tolist())
        await session.close()
        return session

    with service_of(engine) as service:
        return asyncio.run(whole())


def check(session: Talk, base: Base, adapter: Adapter, data: st.DataObject) -> None:
    """Equal to the unsplit model; and not to one with another core, wherever in the plan that core is."""
    plan = adapter.config.plan
    expected = unsplit(base, adapter, session.ids).crossing(adapter)
    assert set(session.rows) == set(expected)
    for name, tensor in expected.items():
        assert session.error(name, tensor) < TOLERANCE, name
    if not adapter.cores:
        return
    few = {name for exchange in plan.all_exchanges if exchange.features < 4 for name in exchange.trained} - {
        core.name for core in plan.cores
    }
    name = data.draw(st.sampled_from(sorted(set(adapter.cores) - few)), label="the wrong core")  # so few features may all be asleep
    wrong = unsplit(base, perturbed(adapter, name), session.ids).crossing(adapter)
    exchange = next(exchange for exchange in plan.all_exchanges if name in exchange.trained)
    assert session.error(f"injection.{exchange.index}", wrong[f"injection.{exchange.index}"]) > 10 * TOLERANCE
    # So few values may be next to zero by chance; and the attention of few tokens may hardly heed q and k.
    out_rank = next((core.out_rank for core in exchange.cores if core.name == name), exchange.injection_columns)
    wide = out_rank * np.isfinite(session.rows["residual"]).all(1).sum() >= 4
    own = [column for column in exchange.columns if core_name(column.layer, column.target) == name]
    if wide and {column.target for column in own or exchange.columns} - {"q", "k"}:
        assert session.error("residual", wrong["residual"]) > 10 * TOLERANCE


@FAST
@given(legal_plans(min_layers=2, max_layers=6), sessions(), st.data())
def test_halves_equal_the_unsplit_model(plan: ExchangePlan, acts: list[Act], data: st.DataObject) -> None:
    model = data.draw(tiny_models(plan.layers), label="model")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    base = tiny_base(model.family, seed, **model.overrides)
    adapter = tuned(new_adapter(base, plan, "random", data.draw(st.sampled_from([0.5, 1.0])), seed), seed)
    with tempfile.TemporaryDirectory() as folder:
        edge = Edge(write_edge_half(Path(folder), base, adapter))
        engine = EagerEngine(replace(base, model=copy.deepcopy(base.model)), adapter)
        check(talk(edge, engine, acts, seed, VOCABULARY), base, adapter, data)


@WHOLE
@given(legal_plans(min_layers=4, max_layers=5).filter(lambda plan: len(plan.sources) > 1), sessions(), st.data())
def test_exported_halves_equal_the_unsplit_model(plan: ExchangePlan, acts: list[Act], data: st.DataObject) -> None:
    """The same from files: scripted, converted, verified by the exporter, read by the runtimes."""
    model = data.draw(tiny_models(plan.layers), label="model")
    with tempfile.TemporaryDirectory() as folder:
        made = make_export(Path(folder), model.family, lambda layers: plan, **model.overrides)
        edge = Edge(made.out / "edge", graphs=data.draw(st.sampled_from(["onnx", "ort"]), label="graphs"))
        check(talk(edge, Engine(made.out / "cloud", KV_BYTES), acts, 0, 300), oracle(made), made.adapter, data)
