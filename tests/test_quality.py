"""The quality study: trains as plora-tune does, judges by rows it has not seen, and its figures would notice a plan that learns nothing."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.quality import methods, runs, score, study, sweep, tasks, train
from plora.artifact.errors import DataError, UsageError
from plora.artifact.plan import TARGETS, ExchangePlan
from plora.artifact.plans import QKV, entry_plan, grouped_plan, paper_plan
from plora.models.adapter import read_adapter
from plora.models.checkpoint import Base, read_base, read_tokenizer
from plora.models.control import StaticBias
from plora.models.rows import Example, read_examples
from plora.models.tune import tune
from plora.models.tune_config import TuneConfig

from .conftest import save_tiny_base
from .outcomes import outcome

WORDS = ("red", "blue", "green", "old", "new", "warm", "cold")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, and small files shaped like the data sets. Do not change them."""
    found = tmp_path_factory.mktemp("quality")
    save_tiny_base(found / "base", "llama")
    (found / "gsm8k").mkdir()
    for name, count in (("train", 60), ("test", 12)):
        rows = [
            {"question": f"{name} {n} plus {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n:,}.\n#### {2 * n:,}"}
            for n in range(600, 600 + count)
        ]
        (found / "gsm8k" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (found / "e2e").mkdir()
    for name, first, count in (("train_small", 0, 20), ("test", 50, 6)):
        with (found / "e2e" / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mr", "ref"])
            for n in range(first, first + count):
                writer.writerows([f"name[Inn {n}], food[{word}]", f"Inn {n} is {word}, {k}."] for k, word in enumerate(["red"] * 5))
    return found


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    found = read_base(str(folder / "base"))
    found.model.float().requires_grad_(False)
    return found


SIZES = tasks.Sizes(gsm8k_tokens=400, gsm8k_held_out=20, gsm8k_validation=4, e2e_held_out=12, e2e_validation=3)


@pytest.mark.parametrize("name", tasks.NAMES)
def test_nothing_that_is_judged_was_trained_on(name: str, folder: Path, base: Base) -> None:
    task = tasks.load(name, read_tokenizer(base.source), SIZES, folder)

    def prompts(groups: list[tuple[Example, ...]]) -> set[tuple[int, ...]]:
        found = set()
        for row in (row for group in groups for row in group):
            found.add(tuple(row.input_ids[: next(at for at, label in enumerate(row.labels) if label != -100)]))
        return found

    train, validation, held_out = (prompts(part) for part in (task.train, task.validation, task.held_out))
    assert train
    assert validation
    assert len(held_out) == len(task.questions) if name != "gsm8k" else len(held_out) == 20
    assert not (train & validation or train & held_out or validation & held_out)


def test_parts_that_share_a_prompt_are_refused(folder: Path, base: Base, tmp_path: Path) -> None:
    shutil.copytree(folder / "e2e", tmp_path / "e2e")
    leaked = (tmp_path / "e2e" / "test.csv").read_text().splitlines()[1]
    with (tmp_path / "e2e" / "train_small.csv").open("a") as file:
        file.write("\r\n".join([leaked.upper()] * 4) + "\r\n")
    with pytest.raises(DataError, match=r"e2e (held_out|validation): \d of \d+ held-out prompts are trained on: row \d+ is row 102 of e2e"):
        tasks.load("e2e", read_tokenizer(base.source), replace(SIZES, e2e_held_out=30), tmp_path)


def test_tasks_read_what_the_files_say(folder: Path, base: Base) -> None:
    tokenizer = read_tokenizer(base.source)
    maths = tasks.load("gsm8k", tokenizer, SIZES, folder)
    assert all("<<" not in question.references[0] for question in maths.questions)
    assert {question.keywords[0].replace(",", "") for question in maths.questions[:12]} == {str(2 * n) for n in range(600, 612)}
    assert (len(maths.held_out), len(maths.validation), len(maths.train)) == (20, 4, 60 - 8 - 4)
    assert tasks.gsm8k_test_rows(tokenizer, SIZES, folder) == 12
    dinner = tasks.load("e2e", tokenizer, SIZES, folder)
    assert [len(group) for group in dinner.held_out] == [5, 5, 5]  # the fewest prompts with 12 rows
    assert {len(group) for group in dinner.train} == {4}
    assert len(dinner.train) == 17


def test_a_prompt_is_packed_once_with_all_its_answers(folder: Path, base: Base) -> None:
    task = tasks.load("e2e", read_tokenizer(base.source), SIZES, folder)
    (pack,) = train.packs_of(task.held_out[:1])
    assert len(pack.input_ids) < sum(len(row.input_ids) for row in task.held_out[0]) - 3 * len(task.held_out[0])


def test_training_is_that_of_plora_tune(folder: Path, base: Base, tmp_path: Path) -> None:
    """Same rows, steps, rate and basis: the same cores; with another rate, others; with bf16 products nearly the same."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"what is {n}?", "response": f"it is {n * n}"}) + "\n" for n in range(24)))
    plan = entry_plan(base.shape.layers, 1, 6)
    config = TuneConfig(
        str(folder / "base"), data, tmp_path / "out", lambda layers: plan, basis_kind="pca", steps=6, learning_rate=4e-3, device="cpu"
    )
    tune(config)
    expected = read_adapter(tmp_path / "out").cores
    rows: list[tasks.Group] = [(row,) for row in read_examples(data, read_tokenizer(base.source), 512)]
    task = tasks.Task("gsm8k", rows, [], [], [], 8)

    def cores(rate: float, products: str = "fp32") -> dict[str, torch.Tensor]:
        attached = methods.PlanCores(base, plan, "pca", 0)
        train.train(base.model, attached, base.shape.windows, train.batches(task, 6, 0), rate, products, lambda text: None)
        found = {name: attached.cores.core(name).detach().clone() for name in expected}
        attached.remove()
        return found

    same, other, mixed = cores(4e-3), cores(8e-3), cores(4e-3, "bf16")
    assert max(float((same[name] - core).abs().max()) for name, core in expected.items()) < 1e-5
    assert max(float((other[name] - core).abs().max()) for name, core in expected.items()) > 1e-3
    together, near = (torch.cat([each[name].flatten() for name in expected]) for each in (expected, mixed))
    assert not torch.equal(together, near)
    assert float(torch.nn.functional.cosine_similarity(together, near, dim=0)) > 0.9


def small(plan: ExchangePlan, basis_kind: str = "pca") -> Callable[[Base, int], Any]:
    """A plan of the tiny base's size, attached as the study attaches its own."""
    return lambda base, seed: methods.PlanCores(base, plan, basis_kind, seed)


SMALL = {
    "paper": small(paper_plan(3, 6), "random"),
    "grouped": small(grouped_plan(3, 2, 6, TARGETS)),
    "entry": small(entry_plan(3, 1, 6)),
    "entry-qkv": small(entry_plan(3, 1, 6, QKV)),
    "entry-2048": small(entry_plan(3, 1, 6, shared_injection=24)),
    "entry-features-64": small(entry_plan(3, 1, 6, features=5)),
}
"""By the study's names: those whose plans want more layers than the tiny base has."""


def test_every_method_reads_the_same_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[list[int]]] = []

    def watched(tuned: Any, batches: Any, steps: int, rate: float, told: Any) -> None:
        read.append([each.input_ids.tolist() for packs in batches for each in packs])
        for step in range(steps):
            told(step + 1, 1.0)

    monkeypatch.setattr(train, "short_tune", watched)
    for name, attach in SMALL.items():
        monkeypatch.setitem(methods.METHODS, name, replace(methods.METHODS[name], attach=attach))
    bench = runs.Bench(str(folder / "base"), data=folder, sizes=SIZES)
    for method, rate, seed in (("control", 1e-2, 0), ("lora", 1e-3, 0), *((name, 1e-2, 0) for name in SMALL), ("lora-all", 1e-3, 1)):
        runs.perform(bench, runs.Run("gsm8k", method, rate, seed, 6), print)
    one, *others, other_seed = read
    assert all(each == one for each in others)
    assert one != other_seed
    assert len(one) >= 6


@pytest.mark.parametrize("name", ["control", "lora", "lora-all", "bias-all", *SMALL])
def test_a_method_starts_as_the_base_and_leaves_it_as_it_was(name: str, base: Base) -> None:
    ids = torch.tensor([[5, 9, 11, 3, 8, 2]])
    with torch.no_grad():
        before = base.model(ids).logits
    attached: Any = SMALL.get(name, methods.METHODS[name].attach)(base, 0)
    assert torch.allclose(base.model(ids).logits.detach(), before, atol=1e-5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        assert float((base.model(ids).logits - before).abs().max()) > 1e-2
    attached.remove()
    assert torch.equal(base.model(ids).logits.detach(), before)


def test_the_control_reads_no_input(base: Base) -> None:
    """Its change of a projection is the same whatever goes in; LoRA's is not."""
    projection = base.model.model.layers[1].self_attn.q_proj
    one, other = torch.randn(1, 3, base.shape.hidden), torch.randn(1, 3, base.shape.hidden)
    plain = projection(one), projection(other)
    for attached, same in ((StaticBias(base.model, QKV), True), (methods.PeftLora(base.model, QKV), False)):
        with torch.no_grad():
            for parameter in attached.parameters():
                parameter.add_(0.1)
        wrapped: Any = base.model.model.layers[1].self_attn.q_proj
        changes = [wrapped(given) - before for given, before in zip((one, other), plain, strict=True)]
        assert torch.allclose(*changes, atol=1e-5) is same
        attached.remove()


def test_row_losses_are_those_of_transformers(folder: Path, base: Base) -> None:
    for name in ("e2e", "gsm8k"):
        task = tasks.load(name, read_tokenizer(base.source), SIZES, folder)
        sums, counts = score.row_nlls(base.model, base.shape.windows, task.held_out)
        rows = [row for group in task.held_out for row in group]
        assert len(sums) == len(rows)
        for row, loss, count in zip(rows, sums, counts, strict=True):
            labels = torch.tensor([row.labels])
            with torch.no_grad():
                expected = float(base.model(torch.tensor([row.input_ids]), labels=labels).loss)
            assert count == sum(label != -100 for label in row.labels[1:])
            assert loss / count == pytest.approx(expected, rel=1e-4)


def test_answers_are_judged_by_their_task() -> None:
    maths = [tasks.Question("q", ("so\n#### 1,200",), ("1,200",)), tasks.Question("q", ("#### 7",), ("7",))]
    assert score.judge("gsm8k", maths, ["it is so\n#### 1200", "7"])["exact_match"] == 0.5
    facts = [tasks.Question("q", ("She is Ann Lee.",), ("ann", "lee")), tasks.Question("q", ("Bo.",), ("bo",))]
    assert score.judge("persona", facts, ["Her name is Ann-Lee!", "Bob"])["recall"] == 0.5
    inn = tasks.Question(
        "name[The Inn], food[Fast food], familyFriendly[no]", ("The Inn serves fast food to adults.", "Fast food at The Inn.")
    )
    found = score.judge("e2e", [inn], ["The Inn serves fast food to adults."])
    assert found["slot_recall"] == 1
    assert found["bleu"] == pytest.approx(100)
    assert score.judge("e2e", [inn], ["The Inn is a pub for adults."])["slot_recall"] == 0.5
    assert score.judge("e2e", [inn], ["It is a quiet pub."])["bleu"] < 10


# Learning rates


@pytest.mark.parametrize("best", [sweep.GRID[2], sweep.GRID[5], sweep.GRID[8]])
def test_a_search_ends_with_no_best_at_an_edge(best: float) -> None:
    tries: list[dict[str, Any]] = []
    while (wanted := sweep.Search.of(tries, 3e-3).wanted) is not None:
        nll = math.nan if wanted > 0.5 else 1 + abs(math.log(wanted / best))
        tries.append(outcome(rate=wanted, validation_nll=nll))
        assert len(tries) < len(sweep.GRID)
    search = sweep.Search.of(tries, 3e-3)
    assert search.best == best
    assert search.best_loss == 1
    assert not search.at_edge
    at = sweep.GRID.index(best)
    assert {sweep.GRID[at - 1], sweep.GRID[at + 1]} <= set(search.tried)


@pytest.mark.parametrize("end", [sweep.GRID[0], sweep.GRID[-1]])
def test_a_best_at_the_end_of_the_grid_is_told(end: float) -> None:
    tries: list[dict[str, Any]] = []
    while (wanted := sweep.Search.of(tries, end).wanted) is not None:
        tries.append(outcome(rate=wanted, validation_nll=1 + abs(math.log(wanted / end))))
    assert sweep.Search.of(tries, end).best == end
    assert sweep.Search.of(tries, end).at_edge


def test_a_study_does_what_is_missing_and_ends(tmp_path: Path) -> None:
    """Two runs at a time, one try of a search at a time; the headline's other seeds at the best rate before the other methods, those of
    what tunes all seven projections after them."""
    store, steps = runs.Store(tmp_path / "runs.jsonl"), study.STEPS["e2e"]
    names, order = ["control", "entry", "lora-all", "entry-512"], []
    running: dict[str, runs.Run] = {}
    to_beat: dict[str, float] = {}
    for _ in range(60):
        while len(running) < 2 and (found := study.next_run(store, running, names, ("e2e",), 3, 1.0)) is not None:
            running[found[0].key], to_beat[found[0].key] = found
        if not running:
            break
        assert len({(run.method, run.seed) for run in running.values()}) == len(running)
        run = running.pop(next(iter(running)))
        order.append(run)
        loss = 1 + abs(math.log(run.rate / 1e-2)) if run.rate else 3.0
        judged = {} if loss < to_beat[run.key] else {"rows": None}
        store.add({name: value for name, value in outcome(**asdict(run), validation_nll=loss, **judged).items() if value is not None})
    assert not running
    assert [run.method for run in order].count("base") == 1
    later = [(run.method, run.seed) for run in order if run.seed]
    assert sorted(later) == [(name, seed) for name in ("control", "entry", "lora-all") for seed in (1, 2)]
    assert sorted(later[-2:]) == [("lora-all", 1), ("lora-all", 2)]
    first, last = (next(at for at, run in enumerate(turn) if run.method == "entry-512") for turn in (order, order[::-1]))
    assert order.index(next(run for run in order if run.seed)) < first
    assert len(order) - last <= order.index(next(run for run in order if (run.method, run.seed) == ("lora-all", 1)))
    assert {run.rate for run in order if run.seed} == {1e-2}
    for name, seeds in (("control", 3), ("entry", 3), ("lora-all", 3), ("entry-512", 1)):
        results = store.results("e2e", name, steps)
        assert [each["seed"] for each in results] == list(range(seeds))
        assert all("rows" in each for each in results)  # the best try was judged
    again = runs.Store(tmp_path / "runs.jsonl")
    assert study.next_run(again, {}, names, ("e2e",), 3, 1.0) is None
    assert study.next_run(again, {}, names, ("e2e",), 4, 1.0) is not None


def test_a_store_goes_on_after_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    runs.Store(path).add(outcome(seed=1))
    with path.open("a") as file:
        file.write('{"task": "e2e", "me')
    store = runs.Store(path)
    assert runs.Run("e2e", "entry", 1e-2, 1, 48) in store
    assert runs.Run("e2e", "entry", 1e-2, 2, 48) not in store
    store.add(outcome(seed=2))
    assert runs.Run("e2e", "entry", 1e-2, 2, 48) in runs.Store(path)


def test_a_store_is_of_one_base(tmp_path: Path) -> None:
    store = runs.Store(tmp_path / "runs.jsonl")
    store.add(outcome())
    store.refuse_another_base("tiny")
    with pytest.raises(UsageError, match=r"runs.jsonl: has runs of tiny, not of large; give another --runs FILE"):
        store.refuse_another_base("large")


def test_a_diverged_seed_is_counted_and_not_averaged(tmp_path: Path) -> None:
    store, steps = runs.Store(tmp_path / "runs.jsonl"), 48
    for rate, loss in ((3.2e-3, 2.0), (1e-2, 1.0), (3.2e-2, 2.0)):
        near = min(sweep.GRID, key=lambda each: abs(each - rate))
        store.add(outcome(rate=near, validation_nll=loss))
    bad = {name: value for name, value in outcome(rate=sweep.GRID[5], seed=1, validation_nll=math.nan).items() if name != "rows"}
    store.add(bad)
    assert sweep.GRID[5] == pytest.approx(1e-2)
    assert [each["seed"] for each in store.results("e2e", "entry", steps)] == [0]
    assert store.diverged("e2e", "entry", sweep.GRID[5], steps) == 1


def test_only_a_run_that_is_better_is_judged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the base is as it was, whatever is tuned."""
    bench = runs.Bench(str(folder / "base"), data=folder, sizes=SIZES)
    before = runs.perform(bench, runs.Run("e2e", "base", 0.0, 0, 0), print)
    plan = entry_plan(3, 1, 6)
    method = methods.Method("entry", "", 3e-3, lambda base, seed: methods.PlanCores(base, plan, "pca", seed), lambda layers: plan)
    monkeypatch.setitem(methods.METHODS, "entry", method)
    run = runs.Run("e2e", "entry", 1e-2, 0, 8)
    better = runs.perform(bench, run, print, before["validation_nll"])
    assert better["nll"] < before["nll"]
    assert len(better["rows"]) == len(better["tokens"]) == sum(better["groups"])
    worse = runs.perform(bench, run, print, better["validation_nll"] / 2)
    assert worse["validation_nll"] == pytest.approx(better["validation_nll"])
    assert "rows" not in worse
    after = runs.perform(bench, runs.Run("e2e", "base", 0.0, 0, 0), print)
    assert after["rows"] == before["rows"]


# Shares
