"""`plora-export --dry-run`: every parameter on one side, right bytes, a drawing in the order of the walk, and no weight read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import plora.export.dry_run as drying
import plora.models.adapter as adapters
import plora.models.checkpoint as checkpoints
from plora.artifact import AdaptedLayer, ExchangePlan, Source, entry_plan, grouped_plan, paper_plan, walk
from plora.artifact.cost import payload, prompt_bytes, tokens_per_second, unshared
from plora.artifact.errors import AdapterError, DamagedFile, PlanError, UsageError
from plora.artifact.manifest import write_json
from plora.artifact.names import ADAPTER_CONFIG
from plora.artifact.plan import SHARED, TARGETS
from plora.export.cli import main
from plora.export.drawing import COLUMNS, draw, format_dry_run
from plora.export.dry_run import dry_run
from plora.models.adapter import ADAPTER_FORMAT, ADAPTER_VERSION, AdapterConfig, expected_basis
from plora.models.checkpoint import read_skeleton
from plora.models.plan_flags import PlanChoice
from plora.models.sides import sides

from .conftest import save_tiny_base

LAYERS, HIDDEN, KV_WIDTH, INTERMEDIATE = 8, 48, 16, 80
QKV_WIDTH = HIDDEN + 2 * KV_WIDTH
ALL_WIDTH = QKV_WIDTH + 2 * HIDDEN + 2 * INTERMEDIATE

PLANS: dict[str, ExchangePlan] = {
    "none": ExchangePlan(LAYERS, 0, 0, (), ()),
    "paper": paper_plan(LAYERS, 4),
    "separate": paper_plan(LAYERS, 4, out_rank=3, separate=True),
    "grouped": grouped_plan(LAYERS, 3, (5, 4, 3), TARGETS, front_layers=1),
    "entry": entry_plan(LAYERS, 2, 4),
    "entry, separate": entry_plan(LAYERS, 0, 4, ("q", "up"), separate=True),
    "entry, shared": entry_plan(LAYERS, 1, 4, shared_injection=10, back_layers=2),
    "both kinds": grouped_plan(LAYERS, 3, 4, shared_injection=5, front_layers=1, back_layers=1, entry_on_device=True),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An untied and a tied base of eight layers, as configs without weights or tokenizers."""
    made = {}
    for family in ("llama", "llama-tied"):
        whole = save_tiny_base(tmp_path_factory.mktemp("base"), family, num_hidden_layers=LAYERS)
        made[family] = tmp_path_factory.mktemp("config")
        (made[family] / "config.json").write_bytes((whole / "config.json").read_bytes())
    return made


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["llama"]


def write_config(folder: Path, plan: ExchangePlan) -> Path:
    """An adapter folder with nothing in it but its config."""
    folder.mkdir()
    config = AdapterConfig(ADAPTER_FORMAT, ADAPTER_VERSION, plan, 1.0, "random", 0, "ba" * 32, "5e" * 32, "base")
    write_json(folder / ADAPTER_CONFIG, config)
    return folder


def facts_of(base: Path, plan: ExchangePlan, folder: Path, dtype: str = "fp32", edge_dtype: str = "fp32") -> dict[str, Any]:
    write_json(folder / "plan.json", plan)
    return dry_run(str(base), None, PlanChoice(str(folder / "plan.json")), dtype, edge_dtype, None)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


# Sides


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_every_parameter_is_on_exactly_one_side(family: str, name: str, bases: dict[str, Path]) -> None:
    shape, model = read_skeleton(str(bases[family]))
    plan = PLANS[name]
    cloud, edge = sides(model, plan, shape)
    assert not set(cloud) & set(edge)
    wanted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert ("lm_head.weight" in wanted) == (family == "llama")
    wanted |= {name: rows * columns for name, (rows, columns) in (expected_basis(plan, shape) | plan.trained).items()}
    assert cloud | edge == wanted
    assert set(plan.trained) <= set(edge)
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= set(edge)
    on_edge = {int(each.split(".")[2]) for each in edge if each.startswith("model.layers.")}
    in_cloud = {int(each.split(".")[2]) for each in cloud if each.startswith("model.layers.")}
    assert on_edge == set(plan.device_layers)
    assert in_cloud == set(range(LAYERS)) - on_edge
    held = {each for each in edge if each.startswith("sources.") and each.endswith(".down")}
    assert held == {f"sources.{each.layer}.{name}.down" for each in plan.sources if each.on_device for name, _ in each.ranks}
    for source in plan.sources:
        assert f"model.layers.{source.layer}.input_layernorm.weight" in cloud  # folded into the A, but its layer's all the same
    assert all(each.endswith((".up", ".expand", ".down")) for each in cloud if not each.startswith("model."))


def test_bytes_are_those_of_each_parts_dtype(base: Path, tmp_path: Path) -> None:
    plan = PLANS["entry, shared"]
    facts = facts_of(base, plan, tmp_path, dtype="bf16", edge_dtype="fp16")
    edge, cloud = facts["edge"], facts["cloud"]
    assert edge["parts"]["A"] == {"values": 4 * HIDDEN, "bytes": 4 * 4 * HIDDEN}
    assert edge["parts"]["cores"] == {"values": 10 * 4, "bytes": 4 * 10 * 4}
    assert edge["parts"]["embedding"] == edge["parts"]["head"] == {"values": 300 * HIDDEN, "bytes": 2 * 300 * HIDDEN}
    layer = HIDDEN * (QKV_WIDTH + HIDDEN + 3 * INTERMEDIATE + 2)
    assert edge["parts"]["decoder layers"] == {"values": 3 * layer, "bytes": 2 * 3 * layer}
    assert cloud["parts"]["decoder layers"] == {"values": 5 * layer, "bytes": 2 * 5 * layer}
    assert cloud["parts"]["P"]["values"] == 2 * 5 * 7 * 4
    assert "A" not in cloud["parts"]
    for half in (edge, cloud):
        assert half["bytes"] == sum(part["bytes"] for part in half["parts"].values())
        assert half["total"] == sum(part["values"] for part in half["parts"].values()) == sum(half["parameters"].values())
    assert facts["kv_cache_bytes_per_token"] == 5 * 2 * KV_WIDTH * 2
    assert facts["device_kv_cache_bytes_per_token"] == 3 * 2 * KV_WIDTH * 4  # fp32 whatever the tables are


# Cost


def test_payload_of_the_papers_plan(base: Path) -> None:
    shape = read_skeleton(str(base))[0]
    cost = payload(PLANS["paper"], shape, "fp16")
    assert (cost.entry_up, cost.exit_down) == (2 * HIDDEN, 2 * HIDDEN)
    assert (cost.low_rank_up, cost.low_rank_down) == (2 * 8 * 3 * 4, 2 * 8 * 4)
    assert (cost.full_rank_up, cost.full_rank_down) == (2 * 8 * QKV_WIDTH, 2 * 8 * HIDDEN)
    assert cost.communication_reduction == 1 - (12 + 4) / (QKV_WIDTH + HIDDEN)
    assert prompt_bytes(PLANS["paper"], shape, "fp16", 10) == (10 * cost.up, 10 * cost.low_rank_down + cost.exit_down)
    separate = payload(PLANS["separate"], shape, "fp32")
    assert (separate.low_rank_up, separate.low_rank_down) == (4 * 8 * 3 * 3, 4 * 8 * 3 * 4)
    assert separate.full_rank_down == 4 * 8 * HIDDEN  # u once, for all three


def test_payload_of_an_entry_plan_has_nothing_to_send_down(base: Path) -> None:
    shape = read_skeleton(str(base))[0]
    cost = payload(PLANS["entry"], shape, "fp32")
    assert (cost.low_rank_down, cost.full_rank_down, cost.down) == (0, 0, cost.exit_down)
    assert cost.low_rank_up == 4 * 6 * 7 * 4
    assert cost.full_rank_up == 4 * 6 * ALL_WIDTH
    assert cost.communication_reduction == 1 - 7 * 4 / ALL_WIDTH
    assert payload(PLANS["none"], shape, "fp32").communication_reduction == 0.0


def test_payload_of_a_shared_injection(base: Path) -> None:
    shape = read_skeleton(str(base))[0]
    plan = PLANS["entry, shared"]
    shared, own = payload(plan, shape, "fp32"), payload(unshared(plan), shape, "fp32")
    assert (shared.low_rank_up, own.low_rank_up) == (4 * 10, 4 * 5 * 7 * 4)
    assert dataclasses.replace(shared, low_rank_up=own.low_rank_up) == own  # full rank, entry and exit are the same
    assert shared.communication_reduction > own.communication_reduction
    assert unshared(PLANS["entry"]) == PLANS["entry"]
    both = payload(PLANS["both kinds"], shape, "fp32")  # sources 1 (the device's), 4
    assert (both.low_rank_up, both.low_rank_down, both.full_rank_down) == (4 * 10, 4 * 4, 4 * HIDDEN)


def test_back_layers_need_every_row_of_a_prompt(base: Path) -> None:
    shape = read_skeleton(str(base))[0]
    for plan, rows in ((entry_plan(LAYERS, 1, 4), 1), (entry_plan(LAYERS, 1, 4, back_layers=1), 100)):
        up, down = prompt_bytes(plan, shape, "fp32", 100)
        assert down == 4 * rows * HIDDEN
        assert up == 100 * payload(plan, shape, "fp32").up
        assert payload(plan, shape, "fp32").exit_down == 4 * HIDDEN  # of a generated token one row, in any plan


def test_round_trips_are_the_wall(base: Path, tmp_path: Path) -> None:
    assert tokens_per_second(paper_plan(32, 1), 20.0, 25.0) == pytest.approx(1000 / (33 * 20 + 25))
    assert tokens_per_second(entry_plan(32, 0, 1), 20.0, 25.0) == pytest.approx(1000 / 45)
    facts = dry_run(str(base), None, PlanChoice("entry", (4,)), "fp32", "fp32", 25.0)
    assert (facts["compute_millis"], facts["compute_is_assumed"]) == (25.0, False)
    assert facts["tokens_per_second"] == {"0": 40.0, "5": 33.33, "10": 28.57, "20": 22.22, "40": 15.38, "80": 9.52}


def test_the_assumed_compute_reads_every_weight_but_the_looked_up_table(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drying, "BYTES_PER_SECOND", 1e6)
    for family, tables in (("llama", 1), ("llama-tied", 0)):
        facts = facts_of(bases[family], PLANS["entry"], tmp_path)
        read = facts["cloud"]["bytes"] + facts["edge"]["bytes"] - tables * 4 * 300 * HIDDEN
        assert facts["compute_millis"] == pytest.approx(read / 1e3, abs=0.006)
        assert facts["compute_is_assumed"]


# Facts and drawing


@pytest.mark.parametrize("name", PLANS)
def test_stages_are_the_walks(name: str, base: Path, tmp_path: Path) -> None:
    plan = PLANS[name]
    facts = json.loads(json.dumps(facts_of(base, plan, tmp_path)))
    stages = facts["plan"]["stages"]
    kinds = {"FrontLayers": "front_layers", "BackLayers": "back_layers"}
    names = [type(stage).__name__ for stage in walk(plan)]
    assert [stage["kind"] for stage in stages] == [kinds.get(name, name.lower()) for name in names]
    assert facts["plan"]["round_trips_per_token"] == facts["plan"]["exchanges"] + 1
    wire = facts["wire_bytes_per_token"]["fp16"]
    injected = [stage for stage in stages if stage["kind"] == "exchange"] + [stages[names.index("Entry")]["injection"] or {}]
    assert sum(stage.get("bytes_up", {}).get("fp16", 0) for stage in injected) == wire["low_rank_up"]
    assert sum(stage.get("bytes_down", {}).get("fp16", 0) for stage in injected) == wire["low_rank_down"]
    fed = {
        (layer, target)
        for stage in injected
        for each in stage.get("feeds", ())
        for layer in range(each["first"], each["stop"])
        for target in each["targets"]
    }
    assert fed == {(column.layer, column.target) for column in plan.columns}
    assert (facts["wire_bytes_per_token_unshared"] is None) == ("shared" not in name and name != "both kinds")
    assert max(map(len, format_dry_run({**facts, "base": "b"}).splitlines())) <= COLUMNS


def drawn(base: Path, plan: ExchangePlan, folder: Path) -> list[tuple[str, str, str]]:
    """The three lanes of each line below the heads; of lines across all lanes, ("", "", text)."""
    lines = draw(facts_of(base, plan, folder)["plan"]["stages"])[2:]
    cells = [tuple(cell.strip() for cell in line.split("│")) for line in lines]
    return [(cell[0], cell[1], cell[2]) if len(cell) == 3 else ("", "", cell[0]) for cell in cells]


def test_the_drawing_of_an_entry_plan(base: Path, tmp_path: Path) -> None:
    """Every line of it: what the device has before anything is sent, two tensors up, one down."""
    lines = [(left, wire.strip("─◀▶ "), right) for left, wire, right in drawn(base, PLANS["entry, shared"], tmp_path)]
    assert lines == [
        ("token embeddings", "", ""),
        ("layer 0", "", ""),
        ("A [4, 48], norm of layer 1", "", ""),
        ("folded in", "", ""),
        ("", "entry [48] 192 B", ""),
        ("1 core [10, 4]", "injection [10] 40 B", "P expands it to 140"),
        ("", "", "feeds layers 1..5: q, k, v, o, gate, up,"),
        ("", "", "down"),
        ("", "", "layers 1..5, fed by the entry"),
        ("", "exit [48] 192 B", "every token's row, for the back layers"),
        ("layers 6..7", "", ""),
        ("final norm, head, sampling", "", ""),
    ]
    arrows = [wire for _, wire, _ in drawn(base, PLANS["entry, shared"], tmp_path) if wire]
    assert [(wire[0], wire[-1]) for wire in arrows] == [("─", "▶"), ("─", "▶"), ("◀", "─")]


def test_exchanges_alike_are_drawn_once(base: Path, tmp_path: Path) -> None:
    lines = drawn(base, PLANS["paper"], tmp_path)
    assert sum("compressed" in wire for _, wire, _ in lines) == 1
    titles = [text for _, _, text in lines if text.startswith("┌")]
    assert [title.strip("┌─ ") for title in titles] == ["x 8: layers 0..7; exchange by exchange, i = 0, 1, …, 7"]
    assert ("", "", "layer i") in lines
    assert ("3 cores [4, 4]", "── injection [12] 48 B ─▶", "feeds layer i: q, k, v") in lines


def test_exchanges_that_differ_are_drawn_apart(base: Path, tmp_path: Path) -> None:
    lines = drawn(base, PLANS["grouped"], tmp_path)  # a rank of its own for each source
    assert [wire.strip("◀─ ") for _, wire, _ in lines if "compressed" in wire] == [
        f"compressed [{rank}] {4 * rank} B" for rank in (5, 4, 3)
    ]
    assert [text for _, _, text in lines if "fed by" in text] == [
        "layers 1..3, fed by exchange 0", "layers 4..6, fed by exchange 1", "layer 7, fed by exchange 2"
    ]  # fmt: skip
    lines = drawn(base, grouped_plan(LAYERS, 4, (5, 4), out_rank=3), tmp_path)  # injections alike, ranks not
    assert not [text for _, _, text in lines if text.startswith("┌")]
    lines = drawn(base, grouped_plan(LAYERS, 3, 4), tmp_path)  # two groups of 3, then one of 2
    assert [text.strip("┌─ ") for _, _, text in lines if text.startswith("┌")] == ["x 2: layers 0..5; exchange by exchange, i = 0, 3"]
    assert ("", "", "layers i..i+2") in lines
    assert ("", "", "layers 6..7, fed by exchange 2") in lines


def test_a_plan_of_ones_own_is_drawn_as_it_is(base: Path, tmp_path: Path) -> None:
    """Layers fed across a segment's bounds, targets that differ by layer, and down-projections of several ranks."""
    sources = (Source(0, ((SHARED, 2),), True), Source(4, (("q", 3), ("k", 3), ("v", 5))))
    qkv = (("q", 1), ("k", 1), ("v", 1))
    adapted = (
        AdaptedLayer(1, 0, (("down", 2),)), AdaptedLayer(2, 0, (("down", 2),)), AdaptedLayer(3, 0, (("q", 4),)),
        AdaptedLayer(4, 4, qkv), AdaptedLayer(6, 0, (("q", 4),)),
    )  # fmt: skip
    lines = drawn(base, ExchangePlan(LAYERS, 0, 0, sources, adapted), tmp_path)
    assert [text for left, _, text in lines if text.startswith(("feeds", "layers"))] == [
        "feeds layers 1..2: down",
        "feeds layer 3: q",
        "feeds layer 6: q",
        "layers 0..3, fed by the entry",
        "feeds layer 4: q, k, v",
        "layers 4..7, fed by the entry, exchange 0",
    ]
    device, cloud = (" ".join(line[lane] for line in lines if line[lane]) for lane in (0, 2))
    assert "A [3, 48] of q k, [5, 48] of v on layer 4's normed input feeds layer 4" in cloud
    assert "A [2, 48], norm of layer 0 folded in 2 cores [2, 2], 2 cores [4, 2]" in device


def test_tables_say_the_facts(base: Path, tmp_path: Path) -> None:
    facts = facts_of(base, PLANS["entry, shared"], tmp_path)
    text = format_dry_run(facts)
    wire, without = facts["wire_bytes_per_token"], facts["wire_bytes_per_token_unshared"]
    rows = {" ".join(line.split()) for line in text.splitlines()}
    columns = (wire["fp32"], wire["fp16"], without["fp32"], without["fp16"])
    for label, key in (("up", "up"), ("injections", "low_rank_up"), ("prompt of 512 tokens, down", "prompt_down")):
        assert f"{label} {' '.join(f'{column[key]:,}' for column in columns)}" in rows
    assert f"KV cache, bytes per token {3 * 128:,} {5 * 128:,}" in rows
    assert "8 layers: 1 front layer, 1 cloud segment, 2 back layers; 0 exchanges, 1 round trip per token" in rows
    reductions = [f"{100 * column['communication_reduction']:.1f} %" for column in columns]
    assert f"communication reduction {' '.join(reductions)}" in rows
    plain = format_dry_run(facts_of(base, PLANS["entry"], tmp_path))
    assert "unshared" in text
    assert "unshared" not in plain


# The command


def test_a_dry_run_reads_no_weights(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are none to read; and nothing that reads them is called."""

    def forbidden(*_: object, **__: object) -> None:
        pytest.fail("weights were read")

    for owner, name in ((checkpoints, "read_base"), (adapters, "read_adapter"), (adapters, "read_tensors"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    folder = write_config(tmp_path / "adapter", PLANS["both kinds"])
    result = run(str(base), "--adapter", str(folder), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    write_json(tmp_path / "plan.json", PLANS["both kinds"])
    assert facts == json.loads(run(str(base), "--plan", str(tmp_path / "plan.json"), "--dry-run", "--json").stdout)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adapter", ADAPTER_CONFIG, "plan.json"]


def test_a_dry_run_draws_the_plan_of_flags(base: Path) -> None:
    words = ["--plan", "entry", "--front-layers", "2", "--rank", "4", "--compute-ms", "10"]
    result = run(str(base), *words, "--dry-run")
    assert result.exit_code == 0, result.output
    expected = dry_run(str(base), None, PlanChoice("entry", (4,), front_layers=2), "fp32", "fp32", 10.0)
    assert result.stdout == format_dry_run(expected) + "\n"
    paper = dry_run(str(base), None, PlanChoice("paper", (4,)), "fp32", "fp32", 10.0)
    assert format_dry_run(paper) != format_dry_run(expected)


def test_an_adapter_or_a_plan_and_not_both(base: Path, tmp_path: Path) -> None:
    for adapter, choice, got in ((None, None, "neither"), (tmp_path, PlanChoice(), "both")):
        with pytest.raises(UsageError, match=f"of an adapter .* or of flags .*; got {got}"):
            dry_run(str(base), adapter, choice, "fp32", "fp32", None)
    result = run(str(base), "--adapter", str(tmp_path), "--rank", "8", "--dry-run")
    assert result.exit_code == UsageError.exit_code
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "out"], "--adapter PATH is required (or --dry-run with a plan)"),
        (["--out", "out", "--rank", "8"], "--adapter PATH is required (or --dry-run with a plan)"),
        (["--out", "out", "--adapter", "a", "--rank", "8"], "an export has its adapter's plan; leave out --plan and its flags"),
        (["--dry-run", "--plan", "entry", "--group", "2"], "--group 2 goes with --plan grouped, not entry"),
        (["--dry-run", "--rank", "8", "--compute-ms", "0"], "--compute-ms 0: expected a time above 0"),
        (["--dry-run", "--rank", "8", "--compute-ms", "nan"], "--compute-ms nan: expected a time above 0"),
    ],
)
def test_flags_that_are_refused(words: list[str], message: str, base: Path) -> None:
    result = run(str(base), *words)
    assert result.exit_code == UsageError.exit_code
    assert message in result.stderr


def test_plans_that_do_not_fit_the_base_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the plan is for 9 layers, the model has 8"):
        facts_of(base, paper_plan(9, 4), tmp_path)
    with pytest.raises(PlanError, match="source 0, down-projection shared: rank 49 exceeds the hidden size 48"):
        dry_run(str(base), None, PlanChoice(ranks=(49,)), "fp32", "fp32", None)
    folder = write_config(tmp_path / "adapter", paper_plan(7, 4))
    with pytest.raises(PlanError, match="the plan is for 7 layers"):
        dry_run(str(base), folder, None, "fp32", "fp32", None)
    (folder / ADAPTER_CONFIG).write_text((folder / ADAPTER_CONFIG).read_text().replace(f'"version": {ADAPTER_VERSION}', '"version": 1'))
    with pytest.raises(AdapterError, match="expected plora-adapter 2; tune it again"):
        dry_run(str(base), folder, None, "fp32", "fp32", None)
    (folder / ADAPTER_CONFIG).write_text("{")
    with pytest.raises(DamagedFile, match="not valid JSON"):
        dry_run(str(base), folder, None, "fp32", "fp32", None)
