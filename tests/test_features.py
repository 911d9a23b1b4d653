"""Private features, the non-linear part of cores: by hand, over the wire, exported, tuned; and what was made without them stays as it is."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.feature_time import device_time
from bench.recovery import least_squares, relative_error, student
from plora.artifact import AdaptedLayer, ExchangePlan, Source, entry_plan, grouped_plan
from plora.artifact.edge_layout import graph_names
from plora.artifact.errors import AdapterError, DamagedFile, ManifestError, PlanError, VerificationError
from plora.artifact.hashes import record_files
from plora.artifact.manifest import MANIFEST, read_json, write_json
from plora.artifact.names import CORES, core_name, down_name, features_bias_name, features_weight_name, up_name
from plora.artifact.plans import QKV
from plora.artifact.shape import check_fits
from plora.artifact.strict import OMITTED_AT_DEFAULT, canonical_json, decode, plain
from plora.device_runtime.cores import read_cores as read_device_cores
from plora.device_runtime.edge import Edge
from plora.device_runtime.knobs import without_exchanges
from plora.export.drawing import format_dry_run
from plora.export.dry_run import dry_run
from plora.export.persona import export_cores
from plora.export.verify import verify
from plora.models.adapter import Adapter, read_adapter, replace_cores, write_adapter, write_cores
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base
from plora.models.features import features_of, start_features
from plora.models.formula import adapted, merge
from plora.models.plan_flags import PlanChoice
from plora.models.tune import Interrupted, tune

from .conftest import make_export, tuned
from .joined import EagerEngine, Talk, perturbed, service_of, tiny_base, unsplit, write_edge_half
from .strategies import Act
from .test_random_plans import TOLERANCE
from .test_tune import Interrupt, config, records
from .test_tune import work as work  # a fixture

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
PLANS: dict[str, ExchangePlan] = {
    "entry": entry_plan(4, 1, 6, features=9),
    "entry, shared": entry_plan(4, 1, 6, shared_injection=12, back_layers=1, features=5),
    "grouped": grouped_plan(4, 2, 6, ("q", "o", "down"), features=6),
    "paper": grouped_plan(4, 1, 6, features=3),
}
MIXED = ExchangePlan(
    4, 0, 0,
    (Source(0, (("shared", 6),), on_device=True, features=7), Source(1, (("q", 4), ("v", 5))), Source(2, (("shared", 6),), features=10)),
    (AdaptedLayer(0, 0, (("o", 6),)), AdaptedLayer(1, 1, (("q", 4), ("v", 6))), AdaptedLayer(3, 2, (("down", 3), ))),
)  # fmt: skip
"""Sources with features and without."""


# The formula


def test_the_formula_by_hand() -> None:
    """One target of the last layer: the hooked model's output less the base's is s · B M silu(F A u + f)."""
    base = tiny_base("llama", num_hidden_layers=3)
    plan = ExchangePlan(3, 0, 0, (Source(1, (("shared", 6),), features=9),), (AdaptedLayer(2, 1, (("down", 5),)),))
    adapter = tuned(new_adapter(base, plan, "random", 0.7, 0))
    cores, basis = adapter.cores, adapter.basis
    layers, seen = base.model.model.layers, {}
    hooks = [
        layers[1].input_layernorm.register_forward_hook(lambda module, inputs, output: seen.update(u=output[0])),
        layers[2].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.update(y=output[0])),
    ]
    with torch.no_grad():
        base.model(torch.tensor([IDS]))
        plain_output = seen["y"]
        seen_u = seen["u"]
        with adapted(base.model, adapter):
            hook = layers[2].mlp.down_proj.register_forward_hook(lambda module, inputs, output: seen.update(adapted=output[0]))
            base.model(torch.tensor([IDS]))
    for each in (*hooks, hook):
        each.remove()
    z = seen_u @ basis[down_name(1, "shared")].T @ cores[features_weight_name(1)].T + cores[features_bias_name(1)]
    phi = z / (1 + torch.exp(-z))
    expected = 0.7 * phi @ cores[core_name(2, "down")].T @ basis[up_name(2, "down")].T
    assert torch.allclose(seen["adapted"] - plain_output, expected, atol=1e-5 * float(expected.abs().max()))
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("name", PLANS)
def test_zero_cores_change_nothing_whatever_the_features(name: str) -> None:
    base = tiny_base("llama", num_hidden_layers=4)
    adapter = new_adapter(base, PLANS[name], "random", 1.0, 0)
    weights = [core for name, core in adapter.cores.items() if name.endswith("features.weight")]
    assert weights
    assert all(weight.abs().max() > 0 for weight in weights)
    with torch.no_grad():
        logits = base.model(torch.tensor([IDS])).logits[0]
    assert torch.equal(unsplit(base, adapter, IDS).logits, logits)


def test_features_cannot_be_merged() -> None:
    base = tiny_base("llama", num_hidden_layers=4)
    with pytest.raises(AdapterError, match="source 0 has 3 private features, which are not linear: cannot be merged"):
        merge(base.model, tuned(new_adapter(base, PLANS["paper"], "random", 1.0, 0)))


# Start values


def test_where_features_start_is_not_told_by_the_public_seed() -> None:
    plan = PLANS["entry"]
    base = tiny_base("llama", num_hidden_layers=4)
    one, two = (new_adapter(base, plan, "random", 1.0, 0) for _ in range(2))
    name = features_weight_name(1)
    assert one.config == two.config
    assert not torch.equal(one.cores[name], two.cores[name])
    seeded = [new_adapter(base, plan, "random", 1.0, 0, features_seed=5).cores[name] for _ in range(2)]
    assert torch.equal(*seeded)


def test_features_start_at_unit_scale() -> None:
    started = start_features(entry_plan(30, 4, 64, features=256), 0)
    weight, bias = started[features_weight_name(4)], started[features_bias_name(4)]
    assert weight.shape == (256, 64)
    assert float(weight.std()) == pytest.approx(64**-0.5, rel=0.02)
    assert not bias.any()


# Tuning


CHOICES = {
    "entry": PlanChoice("entry", (6,), front_layers=1, core_features=5),
    "shared": PlanChoice("entry", (6,), front_layers=1, shared_injection=12, core_features=9),
    "grouped": PlanChoice("grouped", (6,), group=2, core_features=6),
}


@pytest.mark.parametrize("name", CHOICES)
def test_tuning_moves_features_and_the_loss_falls(name: str, work: Path, tmp_path: Path) -> None:
    tune(config(work, tmp_path / "out", plan=CHOICES[name].plan, steps=16, held_out_share=0.2, features_seed=3))
    losses = [record["held_out_loss"] for record in records(tmp_path / "out") if "held_out_loss" in record]
    assert losses[-1] < losses[0] - 0.05
    adapter = read_adapter(tmp_path / "out")
    plan = adapter.config.plan
    started = start_features(plan, 3)
    assert started
    for each, start in started.items():
        assert float((adapter.cores[each] - start).abs().max()) > 1e-3, each
    assert all(adapter.cores[core.name].abs().max() > 0 for core in plan.cores)


def test_a_resumed_run_ends_bit_for_bit(work: Path, tmp_path: Path) -> None:
    """Whatever the seed: the start is saved. Uninterrupted from the same start gives the same cores; from another, others."""
    plan = CHOICES["entry"].plan
    tune(config(work, tmp_path / "whole", plan=plan, features_seed=3))
    with pytest.raises(Interrupted):
        tune(config(work, tmp_path / "cut", plan=plan, features_seed=3), Interrupt(7))
    tune(config(work, tmp_path / "cut", plan=plan, features_seed=3))
    whole, cut = (read_adapter(tmp_path / name).cores for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    tune(config(work, tmp_path / "other", plan=plan))
    assert not torch.equal(whole[features_weight_name(1)], read_adapter(tmp_path / "other").cores[features_weight_name(1)])


def test_a_run_from_the_systems_entropy_resumes_from_its_saved_start(work: Path, tmp_path: Path) -> None:
    plan, out = CHOICES["entry"].plan, tmp_path / "cut"
    with pytest.raises(Interrupted):
        tune(config(work, out, plan=plan), Interrupt(7))
    start = read_adapter(tmp_path / "cut.unfinished" / "start")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "cut.unfinished", tmp_path / "copy.unfinished")
    shutil.rmtree(tmp_path / "copy.unfinished" / "checkpoint-6")
    tune(config(work, out, plan=plan))
    tune(config(work, copy, plan=plan))  # from the first step
    resumed, anew = read_adapter(out).cores, read_adapter(copy).cores
    assert all(torch.equal(resumed[name], anew[name]) for name in start.cores)
    assert float((resumed[features_weight_name(1)] - start.cores[features_weight_name(1)]).abs().max()) > 1e-3


def test_another_persona_starts_from_features_of_its_own(work: Path, tmp_path: Path) -> None:
    """On the same basis: a start that personas shared would be known to each of them."""
    plan = CHOICES["entry"].plan
    tune(config(work, tmp_path / "one", plan=plan, steps=1))
    tune(config(work, tmp_path / "two", plan=None, basis=tmp_path / "one", steps=1))
    one, two = (read_adapter(tmp_path / name) for name in ("one", "two"))
    assert one.config.basis == two.config.basis
    name = features_weight_name(1)
    assert float((one.cores[name] - two.cores[name]).abs().max()) > 0.1


# Files and hashes


def test_a_plan_without_features_is_written_as_before() -> None:
    plan = entry_plan(4, 1, 6)
    assert "features" not in json.dumps(plain(plan))
    assert decode(ExchangePlan, plain(plan), "plan") == plan
    assert decode(ExchangePlan, {**plain(plan), "sources": [{**plain(plan)["sources"][0], "features": 0}]}, "plan") == plan


@pytest.mark.parametrize("plan", [*PLANS.values(), MIXED])
def test_a_plan_with_features_is_read_as_written(plan: ExchangePlan) -> None:
    text = canonical_json(plan)
    assert b'"features":' in text
    assert decode(ExchangePlan, json.loads(text), "plan") == plan


def test_the_demos_adapter_and_its_hash_stay_valid() -> None:
    adapter = read_adapter(Path(__file__).parent.parent / "examples" / "persona" / "adapter")
    assert adapter.config.basis.startswith("c85c7b022d85b038")


def test_a_field_without_the_mark_is_never_left_out() -> None:
    @dataclasses.dataclass(frozen=True)
    class Two:
        plain: int = 0
        marked: int = dataclasses.field(default=0, metadata=OMITTED_AT_DEFAULT)

    assert (canonical_json(Two()), canonical_json(Two(0, 3))) == (b'{"plain":0}', b'{"marked":3,"plain":0}')


@pytest.mark.parametrize("value", [True, 1.0, "4", None])
def test_a_mistyped_number_of_features_is_refused(value: Any) -> None:
    text = plain(PLANS["paper"])
    text["sources"][0]["features"] = value
    with pytest.raises(ManifestError, match=r"plan\.sources\[0\]\.features: got .*, expected int"):
        decode(ExchangePlan, text, "plan")


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: entry_plan(4, 1, 6, features=-2), "source 1: -2 features with down-projections"),
        (lambda: entry_plan(4, 1, 6, separate=True, features=8), "8 features with down-projections .* expected 0, or 1 and more with one"),
        (
            lambda: check_fits(entry_plan(4, 1, 6, features=81), tiny_base("llama", num_hidden_layers=4).shape),
            "source 1: 81 features exceed the intermediate size 80",
        ),
    ],
)
def test_plans_that_are_not_legal_are_refused(make: Any, match: str) -> None:
    with pytest.raises(PlanError, match=match):
        make()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({features_weight_name(1): None}, r"tensor sources\.1\.features\.weight is missing, expected shape \[9, 6\]"),
        ({features_bias_name(1): torch.zeros(8)}, r"sources\.1\.features\.bias has shape \[8\], expected \[9\]"),
        ({features_bias_name(1): torch.full((9,), float("nan"))}, "not finite"),
        ({features_bias_name(2): torch.zeros(9)}, r"unknown tensor sources\.2\.features\.bias"),
    ],
)
def test_damaged_features_are_refused_by_name(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    adapter = tuned(new_adapter(tiny_base("llama", num_hidden_layers=4), PLANS["entry"], "random", 1.0, 0))
    cores = {name: core for name, core in (adapter.cores | change).items() if core is not None}
    write_adapter(replace_cores(adapter, cores), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=match):
        read_adapter(tmp_path / "adapter")


# Both halves


def check(base: Base, adapter: Adapter, edge: Edge) -> None:
    """Split over the wire = unsplit, tensor by tensor; with any one private tensor wrong (the control) it is not."""
    plan = adapter.config.plan
    engine = EagerEngine(dataclasses.replace(base, model=copy.deepcopy(base.model)), adapter)

    async def talk() -> Talk:
        session = Talk(edge, service)
        await session.stepper.open()
        await session.act(Act(1000, len(IDS), len(IDS), None), IDS)
        await session.act(Act(1000, 1, 1, None), [7])
        await session.close()
        return session

    with service_of(engine) as service:
        session = asyncio.run(talk())
    for name, tensor in unsplit(base, adapter, session.ids).crossing(adapter).items():
        assert session.error(name, tensor) < TOLERANCE, name
    for name in plan.trained:
        wrong = unsplit(base, perturbed(adapter, name), session.ids).crossing(adapter)
        assert session.error("residual", wrong["residual"]) > 10 * TOLERANCE, name


@pytest.mark.parametrize("name", [*PLANS, "mixed"])
def test_split_is_unsplit(name: str, tmp_path: Path) -> None:
    plan = {**PLANS, "mixed": MIXED}[name]
    base = tiny_base("llama", num_hidden_layers=4, head_dim=16)
    adapter = tuned(new_adapter(base, plan, "random", 1.0, 0))
    folder = write_edge_half(tmp_path, base, adapter, ort=name == "mixed")
    for graphs in ("onnx", "ort") if name == "mixed" else ("onnx",):
        check(base, adapter, Edge(folder, graphs=graphs))


@pytest.mark.parametrize(
    ("plan", "graphs"),
    [
        (PLANS["entry"], {"entry_features"}),
        (PLANS["grouped"], {"cores_features"}),
        (MIXED, {"cores", "cores_features", "entry_features"}),
        (entry_plan(4, 1, 6), {"entry"}),
    ],
)
def test_only_the_graphs_that_the_plan_needs(plan: ExchangePlan, graphs: set[str]) -> None:
    shape = tiny_base("llama", num_hidden_layers=4).shape
    assert {name for name in graph_names(plan, shape) if name.startswith(("cores", "entry"))} == graphs


@pytest.mark.parametrize("name", ["entry", "grouped"])
def test_without_cores_the_device_injects_nothing(name: str, tmp_path: Path) -> None:
    base = tiny_base("llama", num_hidden_layers=4, head_dim=16)
    edge = Edge(write_edge_half(tmp_path, base, tuned(new_adapter(base, PLANS[name], "random", 1.0, 0))), base_only=True)
    rows = np.ones((3, base.shape.hidden), np.float32)
    for exchange in edge.plan.exchanges:
        assert not edge.inject(exchange, rows[:, : exchange.compressed_columns]).any()
    if edge.plan.entry_exchange:
        assert not edge.entry_injection(edge.plan.entry_exchange, rows).any()


def test_an_export_is_verified_and_takes_other_personas(tmp_path: Path) -> None:
    """By the exporter: from files, in both graph formats, with other cores and features as its control; then cores alone."""
    made = make_export(tmp_path, plan=lambda layers: entry_plan(layers, 1, 6, features=7))
    other = tuned(made.adapter, seed=3)
    write_adapter(other, tmp_path / "other")
    cores = export_cores(tmp_path / "other", tmp_path / "cores", made.out, False)
    one, two = Edge(made.out / "edge"), Edge(made.out / "edge", cores)
    exchange = one.plan.entry_exchange
    assert exchange is not None
    hidden = np.random.default_rng(0).standard_normal((3, one.shape.hidden)).astype(np.float32)
    assert np.abs(one.entry_injection(exchange, hidden) - two.entry_injection(exchange, hidden)).max() > 0.1


def test_verification_notices_a_wrong_feature(tmp_path: Path) -> None:
    made = make_export(tmp_path, plan=lambda layers: entry_plan(layers, 1, 6, features=7))
    path = made.out / "edge" / CORES
    write_cores(perturbed(made.adapter, features_bias_name(1)), path)
    manifest = read_json(made.out / "edge" / MANIFEST)
    manifest["files"][CORES] = plain(record_files(path.parent, [CORES])[CORES])
    write_json(made.out / "edge" / MANIFEST, manifest)
    with pytest.raises(VerificationError, match=r"injection\.-1 differs from the unsplit model"):
        verify(made.out)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({features_weight_name(1): None}, r"tensor sources\.1\.features\.weight is missing; the plan has 23 tensors"),
        (
            {features_weight_name(1): torch.zeros(9, 5)},
            r"sources\.1\.features\.weight is \[9, 5\] float32, expected finite \[9, 6\] float32",
        ),
        ({features_bias_name(1): torch.full((9,), float("inf"))}, r"features\.bias is \[9\] float32, expected finite \[9\]"),
        ({features_bias_name(2): torch.zeros(9)}, r"sources\.2\.features\.bias is unknown"),
    ],
)
def test_the_device_refuses_damaged_features_by_name(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    plan = PLANS["entry"]
    adapter = tuned(new_adapter(tiny_base("llama", num_hidden_layers=4), plan, "random", 1.0, 0))
    cores = {name: core for name, core in (adapter.cores | change).items() if core is not None}
    write_cores(replace_cores(adapter, cores), tmp_path / CORES)
    with pytest.raises(DamagedFile, match=match):
        read_device_cores(tmp_path / CORES, plan, adapter.config.basis)


def test_an_older_reader_refuses_features_by_name() -> None:
    """One whose Source lacks the field: it says which key it does not know."""

    @dataclasses.dataclass(frozen=True)
    class OldSource:
        layer: int
        ranks: tuple[tuple[str, int], ...]
        on_device: bool = False
        shared_injection: int = 0

    with pytest.raises(ManifestError, match=r"source\.features: unknown key; .* Was it made by a newer plora\?"):
        decode(OldSource, plain(PLANS["entry"].sources[0]), "source")
    assert decode(OldSource, plain(entry_plan(4, 1, 6).sources[0]), "source")


def test_a_dry_run_draws_features_on_the_device(work: Path) -> None:
    choice = PlanChoice("entry", (6,), front_layers=1, shared_injection=9, core_features=7)
    facts = dry_run(str(work / "base"), None, choice, "fp32", "fp32", None)
    assert facts["edge"]["parts"]["features"]["values"] == 7 * 6 + 7
    assert facts["edge"]["parts"]["cores"]["values"] == 9 * 7
    drawing = format_dry_run(facts)
    assert "7 private features" in drawing
    assert "1 core [9, 7]" in drawing
    without = format_dry_run(dry_run(str(work / "base"), None, dataclasses.replace(choice, core_features=0), "fp32", "fp32", None))
    assert "feature" not in without


def test_the_doctors_advice_keeps_features() -> None:
    assert without_exchanges(grouped_plan(4, 2, 6, features=5)) == entry_plan(4, 0, 6, QKV, features=5)


# bench/recovery.py, bench/feature_time.py


def test_least_squares_reads_a_linear_core_and_not_features() -> None:
    seen, core = torch.randn(200, 6), torch.randn(20, 6)
    fitted, matrix = least_squares(seen[:100], seen[:100] @ core.T)
    assert relative_error(matrix, core) < 1e-5
    assert relative_error(fitted(seen[100:]), seen[100:] @ core.T) < 1e-5
    bent = features_of(seen, torch.randn(9, 6), torch.zeros(9)) @ torch.randn(20, 9).T
    fitted, _ = least_squares(seen[:100], bent[:100])
    assert relative_error(fitted(seen[100:]), bent[100:]) > 0.1


def test_a_student_learns_features_that_least_squares_cannot() -> None:
    generator = torch.Generator().manual_seed(1)
    seen, weight, core = (torch.randn(size, generator=generator) for size in ((900, 6), (5, 6), (20, 5)))
    bent = features_of(seen, weight, torch.zeros(5)) @ core.T
    fitted, _ = least_squares(seen[:800], bent[:800])
    learned = student(seen[:800], bent[:800], 5, 10, 400)
    errors = [relative_error(found(seen[800:]), bent[800:]) for found in (fitted, learned)]
    assert errors[1] < 0.7 * errors[0]


def test_device_time_is_of_every_graph() -> None:
    figures = device_time(tiny_base("llama").shape, 6, 20, (0, 9))
    assert set(figures) == {f"{name}, {rows} rows" for name in ("cores", "entry") for rows in (1, 64)}
    assert all(each["0"]["over_linear"] == 1 and each["9"]["micros"] > 0 for each in figures.values())
