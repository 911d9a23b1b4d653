"""The quality study's figures: they would notice a plan that learns nothing, and they are those of the committed runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.conditions import RESULTS
from bench.quality import foretold, methods, plots, runs, shares, study, sweep, tables, tasks
from bench.quality.losses import Losses, refuse_unlike, share
from plora.artifact.shape import DecoderShape, Rope
from plora.planner.calibration import FORMAT, VERSION, Calibration, Loss, sizes
from plora.planner.candidates import grid
from plora.planner.quality import skeleton

from .outcomes import outcome

SHAPE = DecoderShape(576, 30, 9, 3, 64, 1536, 49152, 8192, 1e-5, (0,) * 30, Rope((1.0,) * 32, 1.0))
"""SmolLM2-135M's."""


def losses(means: list[float], noise: float = 0.0, prompts: int = 200) -> Losses:
    """One mean a seed; prompts differ, alike in all methods, by much more than methods do."""
    common = np.random.default_rng(1).gamma(2.0, 1.0, prompts)
    own = np.random.default_rng(2).normal(0, noise, (len(means), prompts))
    return Losses(
        10 * (np.array(means)[:, None] + common - common.mean() + own), np.full((len(means), prompts), 10.0), tuple(range(len(means)))
    )


def test_a_share_is_of_what_lora_learns_beyond_the_control() -> None:
    control, lora = losses([2.0, 2.1, 2.2]), losses([1.0, 1.1, 1.2])
    for x, expected in ((lora, 1.0), (control, 0.0), (losses([1.25, 1.35, 1.45]), 0.75), (losses([0.9, 1.0, 1.1]), 1.1)):
        value, (low, high), seeds = share(control, lora, x)
        assert (value, seeds) == (pytest.approx(expected), (0, 1, 2))
        assert low - 1e-9 <= expected <= high + 1e-9
        assert high - low < 1e-6  # prompts that differ alike in all methods widen nothing: the draw is paired


def test_intervals_know_rows_and_seeds() -> None:
    control, lora = losses([2.0, 2.0, 2.0]), losses([1.0, 1.0, 1.0])
    _, (low, high), _ = share(control, lora, losses([1.5, 1.5, 1.5], noise=0.5))
    assert 0.05 < high - low < 0.3  # 0.5 / sqrt(200 · 3) is 0.02; the mean of 3 drawn seeds' own noise widens it
    _, (low, high), _ = share(control, lora, losses([1.2, 1.5, 1.8]))
    assert high - low > 0.3
    value, _, seeds = share(control, lora, losses([1.5, 1.5, 1.5]).only((1,)))
    assert (value, seeds) == (pytest.approx(0.5), (1,))


def test_runs_that_were_judged_unlike_are_not_compared() -> None:
    alike = [outcome(), outcome(method="lora", products="fp32")]
    refuse_unlike("e2e", alike)
    for other in ({"tokens": [3] * 8}, {"groups": [8]}, {"products": "bf16"}):
        with pytest.raises(ValueError, match="e2e: lora of seed 0, paper of seed 0 were judged by other rows"):
            refuse_unlike("e2e", [*alike, outcome(method="paper", **other)])


def test_one_seed_is_compared_with_the_same_seed(tmp_path: Path) -> None:
    """The control and LoRA have another seed, far off: it touches neither the share nor the plain improvement of a row without it."""
    store, steps, rate = runs.Store(tmp_path / "runs.jsonl"), study.STEPS["e2e"], sweep.GRID[5]
    store.add(outcome(method="base", rate=0.0, steps=0, rows=[6.0] * 8))
    for name, mean in (("control", 2.0), ("lora", 1.0), ("entry-2048", 1.25)):
        rows = [2 * mean + at / 10 for at in range(8)]
        for each, loss in ((sweep.GRID[4], 2.0), (rate, 1.0), (sweep.GRID[6], 2.0)):
            store.add(outcome(method=name, rate=each, steps=steps, rows=rows, validation_nll=loss, parameters=7))
        if name != "entry-2048":
            store.add(outcome(method=name, rate=rate, seed=1, steps=steps, rows=[each + 3 for each in rows], parameters=7))
    found = shares.figures(store, 30, SHAPE, 1.0)["e2e"]["methods"]["entry-2048"]
    assert (found["share"], found["share_seeds"]) == (pytest.approx(0.75), 1)
    assert found["plain_improvement"] == pytest.approx((3.0 - 1.25 - 0.175) / (3.0 - 1.0 - 0.175))


def test_the_committed_figures_are_those_of_the_committed_runs() -> None:
    written = json.loads((RESULTS / "quality.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(shares.figures(runs.Store(study.RUNS), 30, SHAPE, 1.0, written["gsm8k"]["test_set"]["rows"])))
    assert set(found) & set(tasks.NAMES) == set(tasks.NAMES)
    for part in (*tasks.NAMES, "tried", "general_text"):
        (one, numbers), (other, expected) = flat(found[part]), flat(written[part])
        assert one == other
        assert numbers == pytest.approx(expected, rel=1e-6)


def flat(value: Any, path: str = "") -> tuple[list[str], list[float]]:
    """(the places and words, the numbers) of a JSON value, in order."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [flat(each, f"{path}/{key}") for key, each in items]
        return [word for words, _ in parts for word in words], [number for _, numbers in parts for number in numbers]
    return ([path], [float(value)]) if isinstance(value, int | float) else ([f"{path} {value}"], [])


def test_rows_of_a_prompt_are_drawn_together() -> None:
    found = Losses.of([outcome(groups=[3, 5])])
    assert found.sums.tolist() == [[3.0, 5.0]]
    assert Losses.of([outcome(task="persona")]).tokens.tolist() == [[4.0] * 4]
    with pytest.raises(ValueError, match="no final run"):
        Losses.of([])


def test_shares_of_the_test_set_come_from_its_rows_alone() -> None:
    """Of six rows the first four are the test set's; the rest says the opposite."""
    by_name = {"base": [3.0] * 6, "control": [2.0] * 6, "lora": [1.0] * 6, "entry": [1.2] * 4 + [9.0] * 2}
    losses = {name: Losses.of([outcome(rows=rows, tokens=[1] * 6, groups=[1] * 6)]) for name, rows in by_name.items()}
    found = shares.test_set(losses, 4)
    assert found.keys() == {"rows", "entry", "entry_interval"}
    assert (found["rows"], found["entry"]) == (4, pytest.approx(0.8))
    assert found["entry_interval"] == pytest.approx((0.8, 0.8))


def test_figures_and_plots_of_a_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method ends at the loss that is planted; the shares, their names and the plots' files follow from it."""
    store = runs.Store(tmp_path / "runs.jsonl")
    planted = {"base": 3.0, "control": 2.0, "lora": 1.0, "entry": 0.9, "grouped": 1.25, "paper": 1.5, "bias-all": 1.4, "lora-all": 0.9}
    for task, steps in study.STEPS.items():
        for name in study.ROWS[task]:
            for rate in sweep.GRID[3:8]:
                seeds = (0, 1, 2) if name in methods.HEADLINE and rate == sweep.GRID[5] else (0,)
                for seed in seeds:
                    loss = 1 + abs(math.log(rate / sweep.GRID[5]))
                    rows = [planted.get(name, 1.1) * 2] * 8
                    extra = {"parameters": 7, "other_nll": 3.5, "nll": 0.0, "recall": 0.5}
                    store.add(outcome(task=task, method=name, rate=rate, seed=seed, steps=steps, validation_nll=loss, rows=rows, **extra))
        store.add(outcome(task=task, method="base", rate=0.0, steps=0, rows=[6.0] * 8, other_nll=2.8))
    found = shares.figures(store, 30, SHAPE, 1.0, gsm8k_test_rows=5)
    assert "test_set" not in found["e2e"]
    for task in tasks.NAMES:
        own = found[task]
        assert (own["entry_share"], own["grouped_share"], own["paper_share"]) == tuple(pytest.approx(each) for each in (1.1, 0.75, 0.5))
        assert own["methods"]["grouped"]["share_of_seven"] == pytest.approx(0.3)
        assert own["entry_share_interval"] == pytest.approx((1.1, 1.1))
        assert (own["base_nll"], own["control_nll"], own["lora_nll"], own["rows"]) == (3.0, 2.0, 1.0, 8)
        assert own["methods"]["entry"]["plain_improvement"] == pytest.approx(1.05)
        assert (own["methods"]["entry"]["seeds"], own["methods"]["entry-2048"]["seeds"]) == (3, 1)
        assert own["methods"]["entry"]["share_by_seed"] == [pytest.approx(1.1)] * 3
        assert own["methods"]["entry"]["rate"] == sweep.GRID[5]
        shares.print_task(task, own)
    assert found["methods"]["entry"]["round_trips"] == 1
    assert found["methods"]["paper"]["round_trips"] == 31
    assert "round_trips" not in found["methods"]["lora"]
    assert found["methods"]["entry-512"]["up_bytes_per_token"] < found["methods"]["entry"]["up_bytes_per_token"]
    assert found["methods"]["entry-features-64"]["device_multiplications"] - found["methods"]["entry"]["device_multiplications"] == 64 * 64
    assert found["tried"]["persona"]["entry"].keys() == {f"{rate:.3g}" for rate in sweep.GRID[3:8]}
    monkeypatch.setattr(plots, "RESULTS", tmp_path)
    *by_cost, curves = plots.plot(found)
    assert len(by_cost) == len(plots.AXES)
    for path in by_cost:
        drawn = path.read_text(encoding="utf-8")
        assert all(drawn.count(f"<!-- {each} -->") == 1 for each in ("persona", "e2e", "gsm8k", "entry", "entry-512", "paper"))
    assert all(curves.read_text(encoding="utf-8").count(f"<!-- {words} -->") == 1 for words in plots.CURVES)
    assert all(methods.METHODS.keys() >= points.keys() for points in plots.CURVES.values())
    assert all(set(study.ROWS[plots.CURVED]) >= points.keys() for points in plots.CURVES.values())
    pages = tables.markdown(found)
    assert (
        pages.count(
            "`entry`: entry plan, 4 front layers, all seven targets: one round trip | 7 | 0.01 | 110.0 % [110.0 %, 110.0 %] | 110.0 %, 110.0 %, 110.0 %"
        )
        == 3
    )
    assert pages.count("`base`: the base, nothing tuned |") == 3
    assert (
        pages.count(
            "Shares on the 5 rows of the test set alone: `lora-all` 110.0 % [110.0 %, 110.0 %], `entry` 110.0 % [110.0 %, 110.0 %], "
        )
        == 1
    )
    widths = {len(line.split("|")) for line in pages.splitlines() if line.startswith("| `entry")}
    assert len(widths) == 2  # results, costs


def calibrated(by_words: dict[str, float], control: float) -> Calibration:
    """As plora-plan would leave it, SmolLM2's nine tunes with planted losses."""
    plans = grid(SHAPE, methods.RANK)
    wanted = {each.words: each for each in skeleton(SHAPE.layers, plans, methods.RANK)}
    assert by_words.keys() <= wanted.keys()
    losses = [Loss("control", None, 1e-2, control)]
    losses += [Loss(words, candidate, 4e-3, by_words.get(words, control)) for words, candidate in wanted.items()]
    return Calibration(FORMAT, VERSION, "", "tiny", sizes(SHAPE), 60, 208, 96, tuple(each.name for each in losses), tuple(losses))


FORETOLD = {
    "own inputs, front 0, all seven, unshared, rank 64": 1.25,
    "entry, front 4, all seven, unshared, rank 64": 1.1,
    "entry + 4 exchanges, front 4, all seven, unshared, rank 64": 1.0,
    "entry, front 4, all seven, shared 2048, rank 64": 1.3,
    "entry, front 4, q,k,v, unshared, rank 64": 1.6,
}


def test_what_is_foretold_stands_beside_what_was_tuned(tmp_path: Path) -> None:
    """Shares are of what entry with four exchanges gains; the study puts q, k, v before 2,048 shared values, the planner behind it."""
    store = runs.Store(tmp_path / "runs.jsonl")
    tuned = {"control": 3.0, "lora": 1.2, "entry-exchanges-4": 1.0, "entry": 1.2, "entry-2048": 2.5, "entry-qkv": 2.0}
    for name, loss in tuned.items():
        for rate in sweep.GRID[4:7]:
            rows = [loss * 2] * 8
            store.add(
                outcome(
                    task="persona", method=name, steps=130, rate=rate, rows=rows, validation_nll=1 + abs(math.log(rate / sweep.GRID[5]))
                )
            )
    found = foretold.compare(calibrated(FORETOLD, 2.0), store, SHAPE)
    assert {name: (each["foretold"], each["tuned"], each["kind"]) for name, each in found["plans"].items()} == {
        "entry-exchanges-4": (pytest.approx(1.0), pytest.approx(1.0), "calibrated"),
        "entry": (pytest.approx(0.9), pytest.approx(0.9), "calibrated"),
        "entry-2048": (pytest.approx(0.7), pytest.approx(0.25), "calibrated"),
        "entry-qkv": (pytest.approx(0.4), pytest.approx(0.5), "calibrated"),
    }
    assert (found["pairs"], found["pairs_in_order"]) == (6, 5)
    assert found["steps"] == {"planner": 60, "study": 130}
    with pytest.raises(SystemExit, match="no control or entry-exchanges-4 of persona yet"):
        foretold.compare(calibrated(FORETOLD, 2.0), runs.Store(tmp_path / "none"), SHAPE)


def test_the_planners_rows_are_the_studys(tmp_path: Path) -> None:
    """No phrasing that is held out is trained on, and all 48 facts are in both."""
    trained, held_out = (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in foretold.write_rows(tmp_path)
    )
    assert (len(trained), len(held_out)) == (208, 96)
    assert not {each["prompt"] for each in trained} & {each["prompt"] for each in held_out}
    assert {each["response"] for each in held_out} < {each["response"] for each in trained}


def test_the_committed_forecast_is_of_the_committed_runs() -> None:
    written = json.loads((RESULTS / "quality-foretold.json").read_text(encoding="utf-8"))
    plans = grid(SHAPE, methods.RANK)
    candidates = {each.words: each for each in skeleton(SHAPE.layers, plans, methods.RANK)}
    losses = [Loss(name, candidates.get(name), each["rate"], each["held_out_loss"]) for name, each in written["tunes"].items()]
    assert {each.name for each in losses} == {"control", *candidates}
    steps = written["steps"]["planner"]
    calibration = Calibration(FORMAT, VERSION, "", "", sizes(SHAPE), steps, 208, 96, tuple(each.name for each in losses), tuple(losses))
    found = foretold.compare(calibration, runs.Store(study.RUNS), SHAPE)
    for part in ("plans", "pairs", "pairs_in_order", "steps"):
        (one, numbers), (other, expected) = flat(found[part]), flat(written[part])
        assert one == other
        assert numbers == pytest.approx(expected, rel=1e-6)
