"""The cloud's segments against transformers layer by layer, in chunks, in ragged batches, and over slots used before."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from plora.artifact import AdaptedLayer, ExchangePlan, Source, entry_plan, grouped_plan, paper_plan
from plora.artifact.manifest import CloudManifest, read_manifest
from plora.artifact.names import core_name, down_name
from plora.cloud_server.cache import Pool
from plora.cloud_server.engine import Engine, Piece, Row
from plora.device_runtime import open_session
from plora.export.cloud_build import build_cloud_graph
from plora.export.cloud_graph import CloudGraph
from plora.models.adapter import Adapter, replace_cores
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base, read_base
from plora.models.formula import adapted

from .conftest import FAMILIES, Made, answer, cloud, greedy, injected, make_export, oracle, save_tiny_base, tuned
from .joined import EagerEngine, error, tiny_base, unsplit

TOLERANCE = 2e-5
"""Of the largest value, fp32: products are summed in another order over 3 layers, some 1e-6; a wrong layer gives 1e-1."""
TOKENS = 23
KV_BYTES = 16 << 20
ALL_TARGETS = ("q", "v", "o", "gate", "up", "down")


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Sliding windows beside full attention, groups of two layers, a core on every kind of projection but k, M not square."""
    return make_export(
        tmp_path_factory.mktemp("windowed"), "qwen2-window", lambda layers: grouped_plan(layers, 2, 5, ALL_TARGETS, out_rank=7)
    )


@torch.no_grad()
def split(graph: Any, base: Base, adapter: Adapter, entry: Tensor, chunks: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Runs a CloudGraph, eager or scripted, over entry [T, H] in chunks: hidden after each segment, compressed of each exchange."""
    plan, shape = adapter.config.plan, base.shape
    size = (1, shape.kv_heads, len(entry), shape.head_dim)
    keys, values = ([torch.zeros(size) for _ in range(plan.cloud_layers)] for _ in range(2))
    segments = list(graph.segments.children())
    hidden_parts: list[list[Tensor]] = [[] for _ in plan.segments]
    compressed_parts: list[list[Tensor]] = [[] for _ in plan.exchanges]
    length = 0
    for chunk in entry.split(chunks):
        hidden = chunk
        rest = ([0], [length], [len(chunk)])
        tables = graph.tables(*rest, hidden)
        held = plan.entry_exchange
        injections = {} if held is None else {-1: injected(adapter, held, entry_compressed(base, adapter, hidden))}
        for segment in plan.segments:
            call, own = segments[segment.index], plan.cache_of(segment)
            cache = (keys[own], values[own])
            if segment.exchange is None:
                hidden = call.through(hidden, [injections[exchange] for exchange in segment.inputs], tables, *rest, *cache)
            else:
                u, compressed = call.open(hidden)
                compressed_parts[segment.exchange].append(compressed)
                injections[segment.exchange] = injected(adapter, plan.exchanges[segment.exchange], compressed)
                hidden = call(hidden, call.ahead(u), [injections[exchange] for exchange in segment.inputs], tables, *rest, *cache)
            hidden_parts[segment.index].append(hidden)
        length += len(chunk)
    return [torch.cat(parts) for parts in hidden_parts], [torch.cat(parts) for parts in compressed_parts]


def entry_compressed(base: Base, adapter: Adapter, hidden: Tensor) -> Tensor:
    """A u of the entry source, by the base's own norm: hidden [..., H] -> [..., C]."""
    source = adapter.config.plan.source(adapter.config.plan.front_layers)
    down = torch.cat([adapter.basis[down_name(source.layer, name)] for name, _ in source.ranks])
    return base.model.model.layers[source.layer].input_layernorm(hidden) @ down.T


def fresh_graph(folder: Path, adapter: Adapter) -> CloudGraph:
    """The eager graph, from a base of its own: building takes it apart."""
    base = read_base(str(folder))
    return build_cloud_graph(base.model, base.shape, adapter)


def probe(vocabulary: int, count: int = TOKENS, seed: int = 3) -> list[int]:
    return torch.randint(0, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_against_unsplit(graph: Any, base: Base, adapter: Adapter, chunks: list[int]) -> None:
    plan = adapter.config.plan
    expected = unsplit(base, adapter, probe(base.shape.vocabulary, sum(chunks)))
    hidden, compressed = split(graph, base, adapter, expected.hidden[plan.front_layers], chunks)
    for segment in plan.segments:
        assert error(hidden[segment.index], expected.hidden[segment.stop]) < TOLERANCE
    for exchange in plan.exchanges:
        assert error(compressed[exchange.index], expected.compressed[exchange.index]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_layers_equal_transformers(family: str, tmp_path: Path) -> None:
    base = read_base(str(save_tiny_base(tmp_path, family)))
    adapter = tuned(new_adapter(base, paper_plan(base.shape.layers, 6, separate=True), "random", 0.7, 0))
    check_against_unsplit(fresh_graph(tmp_path, adapter), base, adapter, [TOKENS])


PLANS: dict[str, Callable[[], ExchangePlan]] = {
    "entry": lambda: entry_plan(4, 0, 5, out_rank=4),
    "entry-front-back-shared": lambda: entry_plan(5, 1, 6, shared_injection=7, back_layers=1),
    "grouped-shared": lambda: grouped_plan(4, 3, 6, shared_injection=9),
    "entry-and-exchanges": lambda: ExchangePlan(
        7, 1, 1,
        (Source(1, (("q", 3), ("down", 4)), True), Source(2, (("shared", 5),), False, 6), Source(4, (("shared", 2),))),
        (
            AdaptedLayer(1, 1, (("q", 3), ("down", 2))), AdaptedLayer(2, 2, (("k", 4), ("up", 3))), AdaptedLayer(3, 1, (("down", 5),)),
            AdaptedLayer(4, 4, (("v", 4), ("o", 3))), AdaptedLayer(5, 2, (("v", 2), ("gate", 3))),
        ),
    ),
}  # fmt: skip


def tiny(name: str) -> tuple[Base, Adapter]:
    """A model in memory with a plan of PLANS, tuned."""
    plan = PLANS[name]()
    base = tiny_base("mistral-window", num_hidden_layers=plan.layers)
    return base, tuned(new_adapter(base, plan, "random", 0.7, 0))


@pytest.mark.parametrize("chunks", [[TOKENS], [5, 1, 1, TOKENS - 7]], ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_plans_with_an_entry_source_or_shared_injections_equal_transformers(name: str, chunks: list[int]) -> None:
    base, adapter = tiny(name)
    graph = build_cloud_graph(copy.deepcopy(base.model), base.shape, adapter)
    check_against_unsplit(graph, base, adapter, chunks)


@pytest.mark.parametrize("chunks", [[TOKENS], [1] * TOKENS, [5, 1, 1, TOKENS - 7], [16, 7]], ids=str)
def test_prefill_in_chunks_equals_one_pass(chunks: list[int], windowed: Made) -> None:
    check_against_unsplit(fresh_graph(windowed.base, windowed.adapter), oracle(windowed), windowed.adapter, chunks)


@pytest.mark.parametrize("name", ["made", "windowed"])
def test_scripted_file_equals_eager_and_transformers(name: str, request: pytest.FixtureRequest) -> None:
    made: Made = request.getfixturevalue(name)
    base = oracle(made)
    scripted = Engine(made.out / "cloud", KV_BYTES).graph
    eager = fresh_graph(made.base, made.adapter)
    check_against_unsplit(scripted, base, made.adapter, [9, 1, 13])
    entry = unsplit(base, made.adapter, probe(base.shape.vocabulary)).hidden[made.adapter.config.plan.front_layers]
    for a, b in zip(
        split(scripted, base, made.adapter, entry, [TOKENS])[0], split(eager, base, made.adapter, entry, [TOKENS])[0], strict=True
    ):
        assert error(a, b) < TOLERANCE


def test_a_perturbed_core_or_a_forgotten_injection_is_seen(made: Made) -> None:
    """The negative control: the comparison above notices one wrong core of nine."""
    base = oracle(made)
    expected = unsplit(base, made.adapter, probe(base.shape.vocabulary))
    wrong = dict(made.adapter.cores)
    wrong[core_name(1, "k")] = wrong[core_name(1, "k")] * 1.1
    hidden, _ = split(fresh_graph(made.base, made.adapter), base, replace_cores(made.adapter, wrong), expected.hidden[0], [TOKENS])
    assert error(hidden[0], expected.hidden[1]) < TOLERANCE  # before the wrong core
    assert error(hidden[1], expected.hidden[2]) > 10 * TOLERANCE


# Batches


@dataclass
class Talk:
    """One session on an engine: what it is fed, and the exit that came back. injection: the entry's, of all its tokens."""

    entry: Tensor
    slot: int
    injection: Tensor | None = None
    done: int = 0
    exits: list[Tensor] = field(default_factory=list)

    @property
    def exit(self) -> Tensor:
        return torch.cat(self.exits)


@torch.no_grad()
def engine_step(engine: Engine, adapter: Adapter, batch: list[tuple[Talk, int]], piece: int = 1000) -> None:
    """One step of several sessions, each with its own count of new tokens, in pieces of at most `piece`."""
    rows: list[Row] = []
    for talk, count in batch:
        new = slice(talk.done, talk.done + count)
        injection = None if talk.injection is None else talk.injection[new].numpy()
        assert engine.pool.reserve(talk.slot, talk.done + count)
        rows.append(engine.begin(talk.slot, talk.done, talk.entry[new].numpy(), injection, count))
    for index, leg in enumerate(engine.legs):
        while left := [Piece(row, min(row.left, piece)) for row in rows if row.leg == index]:
            engine.go(index, left)
        if leg.exchange is not None:
            engine.ahead(rows[1:] or rows)  # the first one's is done with the rest
            for row in rows:
                assert row.result is not None
                engine.inject(row, leg.exchange.index, injected(adapter, leg.exchange, torch.from_numpy(row.result)).numpy())
    for (talk, count), row in zip(batch, rows, strict=True):
        assert row.result is not None
        talk.exits.append(torch.from_numpy(row.result).clone())
        talk.done += count


def new_talk(engine: Engine, entry: Tensor, injection: Tensor | None = None) -> Talk:
    slot = engine.pool.take()
    assert slot is not None
    return Talk(entry, slot, injection)


def alone(engine: Engine, adapter: Adapter, entry: Tensor, injection: Tensor | None = None) -> Tensor:
    """The exit of one session with nobody beside it, in one step."""
    talk = new_talk(engine, entry, injection)
    engine_step(engine, adapter, [(talk, len(entry))])
    engine.pool.give_back(talk.slot)
    return talk.exit


@dataclass
class Batched:
    """An engine, and what devices send to it: table [V, H] and injection table [V, I] stand for entries of any content."""

    engine: Engine
    adapter: Adapter
    table: Tensor
    injections: Tensor | None = None


@pytest.fixture
def batched(request: pytest.FixtureRequest) -> Batched:
    """By name: an export, or a plan of PLANS on a model that is neither compiled nor written."""
    if request.param in PLANS:
        base, adapter = tiny(request.param)
        table = base.model.model.embed_tokens.weight
        held = adapter.config.plan.entry_exchange
        injections = injected(adapter, held, entry_compressed(base, adapter, table)) if held else None
        return Batched(EagerEngine(base, adapter, slots=8), adapter, table, injections)
    made: Made = request.getfixturevalue(request.param)
    return Batched(Engine(made.out / "cloud", KV_BYTES), made.adapter, oracle(made).model.model.embed_tokens.weight.detach())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("batched", ["made", "windowed", *PLANS], indirect=True)
def test_ragged_batches_equal_single_rows(batched: Batched, seed: int) -> None:
    """2 to 5 sessions per step with other lengths, counts and slots; some end and their slots pass to newcomers."""
    engine, adapter, table = batched.engine, batched.adapter, batched.table
    generator = torch.Generator().manual_seed(seed)

    def pick(first: int, last: int) -> int:
        return int(torch.randint(first, last + 1, (1,), generator=generator))

    said = [torch.tensor(probe(len(table), pick(1, 24), seed=100 * seed + i)) for i in range(9)]
    sent = [(table[ids], None if batched.injections is None else batched.injections[ids]) for ids in said]
    waiting = list(enumerate(sent))
    running: dict[int, Talk] = {}
    finished: dict[int, Tensor] = {}
    widths = set()
    for _ in range(200):
        while waiting and len(running) < 5:
            index, own = waiting.pop(0)
            running[index] = new_talk(engine, *own)
        if not running:
            break
        names = sorted(running)
        chosen = [names[i] for i in torch.randperm(len(names), generator=generator)[: pick(min(2, len(names)), len(names))]]
        widths.add(len(chosen))
        engine_step(engine, adapter, [(running[i], min(pick(1, 6), len(running[i].entry) - running[i].done)) for i in chosen])
        for i in chosen:
            if running[i].done == len(running[i].entry):
                finished[i] = running[i].exit
                engine.pool.give_back(running.pop(i).slot)
    assert sorted(finished) == list(range(9))
    assert {2, 5} <= widths
    for i, own in enumerate(sent):
        assert error(finished[i], alone(engine, adapter, *own)) < TOLERANCE
    if batched.injections is not None:  # the control: whose injection is whose matters
        swapped = [alone(engine, adapter, sent[i][0], sent[i][1].flip(0) + 1) for i in range(9)]
        assert all(error(finished[i], swapped[i]) > 10 * TOLERANCE for i in range(9))


def test_truncated_tokens_are_overwritten(windowed: Made) -> None:
    """Ten tokens, back to six, four others: as if the first four had never been; alone and beside a longer neighbour."""
    table = oracle(windowed).model.model.embed_tokens.weight.detach()
    engine = Engine(windowed.out / "cloud", KV_BYTES)
    first, second = table[probe(len(table), 10, 1)], table[probe(len(table), 10, 2)]
    entry = torch.cat([first[:6], second[:4]])
    expected = alone(engine, windowed.adapter, entry)
    for neighbours in (0, 1):
        talk = new_talk(engine, first)
        engine_step(engine, windowed.adapter, [(talk, 10)])
        beside = [(new_talk(engine, second), 10)] * neighbours
        talk.entry, talk.done = entry, 6
        engine_step(engine, windowed.adapter, [(talk, 4), *beside])
        assert error(talk.exits[-1], expected[6:]) < TOLERANCE
        assert error(talk.exits[-1], alone(engine, windowed.adapter, first)[6:]) > 10 * TOLERANCE  # the control


def test_a_slot_comes_back_as_zeros(made: Made) -> None:
    """Nothing of a session is left for the next one, and nothing of a neighbour's is read."""
    table = oracle(made).model.model.embed_tokens.weight.detach()
    short, long = table[probe(len(table), 3, 1)], table[probe(len(table), 12, 2)]
    engine = Engine(made.out / "cloud", KV_BYTES)
    expected = alone(engine, made.adapter, short)

    def poisoned() -> Talk:
        talk = new_talk(engine, long)
        engine_step(engine, made.adapter, [(talk, 12)])
        for tensors in (engine.pool.keys, engine.pool.values):
            for tensor in tensors:
                tensor[talk.slot, :, :12] = float("nan")
        return talk

    victim = poisoned()
    engine.pool.give_back(victim.slot)
    for tensor in (*engine.pool.keys, *engine.pool.values):
        assert not tensor[victim.slot].any()
    talk, neighbour = new_talk(engine, short), new_talk(engine, long)
    assert talk.slot == victim.slot  # the slot just given back
    engine_step(engine, made.adapter, [(talk, 3), (neighbour, 12)])
    assert error(talk.exit, expected) < TOLERANCE

    dirty = Talk(short, poisoned().slot)  # not given back: what a row has not written itself it does not read
    engine_step(engine, made.adapter, [(dirty, 3), (new_talk(engine, long), 12)])
    assert error(dirty.exit, expected) < TOLERANCE
    dirty.entry = torch.cat([short, short])
    for tensor in engine.pool.values:
        tensor[dirty.slot, :, 1] = float("nan")
    engine_step(engine, made.adapter, [(dirty, 3), (new_talk(engine, long), 12)])
    assert dirty.exits[-1].isnan().all()  # the control: what it has written, it does


def test_pool_zeroes_all_that_was_touched_though_truncated_since(made: Made) -> None:
    shape = oracle(made).shape
    pool = Pool(shape, shape.layers, 100, 4 << 20, "fp32")
    slot = pool.take()
    assert slot is not None
    for length in (70, 4):  # a truncate does not unwrite
        assert pool.reserve(slot, length)
    for tensor in (*pool.keys, *pool.values):
        tensor[slot, :, :70] = float("nan")
        tensor[slot + 1, :, :70] = 7.0
    pool.give_back(slot)
    assert pool.take() == slot  # it can be had again
    for tensor in (*pool.keys, *pool.values):
        assert not tensor[slot].any()
        assert (tensor[slot + 1, :, :70] == 7.0).all()  # and its neighbour's is untouched


def test_grouped_plan_of_all_targets_over_the_wire(windowed: Made) -> None:
    """No weight can hold these adapters, so the oracle is the formula hooked into transformers."""
    base = oracle(windowed)
    plan = windowed.adapter.config.plan
    assert plan.round_trips == 3
    assert base.shape.layers == 3
    with cloud(windowed.out / "cloud") as (address, _), open_session(windowed.out / "edge", address) as session:
        for prompt in ("the quick brown fox", "a lighthouse keeper writes down the weather"):
            ids = session.text.encode_raw(prompt)
            with adapted(base.model, windowed.adapter):
                expected = greedy(base, ids, 48)
            assert answer(session, ids, 48) == expected
            assert expected != greedy(base, ids, 48)  # the control: the cores matter
        assert session.answer is not None
        assert session.answer.stats.round_trips_per_token == plan.round_trips


@pytest.mark.parametrize(("dtype", "edge_dtype"), [("fp16", "fp16"), ("bf16", "fp32")])
def test_sixteen_bit_exports_of_an_entry_plan_verify(dtype: str, edge_dtype: str, tmp_path: Path) -> None:
    """Device layers, folded norm and a shared injection's places in 16 bits, compared tensor by tensor."""
    plan = lambda layers: entry_plan(layers, 1, 6, shared_injection=10, back_layers=1)  # noqa: E731
    made = make_export(tmp_path, plan=plan, dtype=dtype, edge_dtype=edge_dtype, head_dim=16)
    report = json.loads((made.out / "verification" / "report.json").read_text())
    assert {"entry", "injection.-1", "exit", "residual"} < set(report["errors"])
    assert 0 < max(report["errors"].values()) <= report["tolerance"]
    assert report["other_cores_moved"] > report["other_cores_error"] > 0


@pytest.mark.parametrize(("dtype", "edge_dtype", "kl_nats"), [("fp16", "fp16", 2e-4), ("bf16", "fp32", 1e-2)])
def test_sixteen_bit_exports_verify_and_say_how_close(dtype: str, edge_dtype: str, kl_nats: float, tmp_path: Path) -> None:
    """kl_nats: ten times what 10 and 7 bits of mantissa gave here."""
    made = make_export(tmp_path, dtype=dtype, edge_dtype=edge_dtype)
    report = json.loads((made.out / "verification" / "report.json").read_text())
    assert (report["dtype"], report["edge_dtype"]) == (dtype, edge_dtype)
    assert 0 < report["kl_nats"] < kl_nats
    assert report["top1_agrees"] is True
    assert max(report["errors"].values()) <= report["tolerance"]
    assert read_manifest(CloudManifest, made.out / "cloud").dtype == dtype
    engine = Engine(made.out / "cloud", KV_BYTES)
    weights = [weight for segment in engine.graph.segments.children() for weight in (segment.down, segment.first.qkv.weight)]
    assert {weight.dtype for weight in weights} == {engine.dtype} == {engine.pool.keys[0].dtype}
