"""From runs to figures: `python -m bench.quality.shares` writes docs/results/quality.json from quality-runs.jsonl.

share of x = (control - x) / (control - LoRA)        held-out nats per response token; LoRA: r = 16 on q, k, v

share of seven: the same between biases and LoRA on all seven projections, for plans that have as many targets.

What the static-bias control reaches is the format of the answers; the share says how much of LoRA's learning beyond it a plan keeps.
Intervals: 95 %, percentile bootstrap over held-out prompts (with all their rows) and over seeds, the same draw for every method. Three
seeds are few for that: their part comes out too narrow, so each seed's share is given, too.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plora.artifact.cost import payload
from plora.artifact.plan import ExchangePlan
from plora.artifact.shape import DecoderShape
from plora.planner.machine import layer_values

from ..conditions import write_results
from .methods import METHODS, Method
from .runs import Store
from .study import ROWS, RUNS, SEVEN, STEPS
from .tasks import DATA, NAMES, Sizes, gsm8k_test_rows

DRAWS = 4000
REFERENCE, CONTROL = "lora", "control"
HELD_OUT_PHRASINGS = 2
"""Rows of a persona's fact: they are drawn together, as the references of an E2E prompt are."""


@dataclass(frozen=True)
class Losses:
    """sums: nats, tokens: response tokens, both `[seeds, prompts]`; seeds: their numbers."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.float64]
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, outcomes: list[dict[str, Any]]) -> Losses:
        """Raises ValueError for no outcomes."""
        if not outcomes:
            raise ValueError("no final run")
        rows = [(_by_prompt(each, each["rows"]), _by_prompt(each, each["tokens"])) for each in outcomes]
        return cls(np.array([sums for sums, _ in rows]), np.array([tokens for _, tokens in rows]), tuple(each["seed"] for each in outcomes))

    @property
    def mean(self) -> float:
        """Nats per token, seeds alike."""
        return float((self.sums.sum(1) / self.tokens.sum(1)).mean())

    def only(self, seeds: tuple[int, ...]) -> Losses:
        at = [self.seeds.index(seed) for seed in seeds]
        return Losses(self.sums[at], self.tokens[at], seeds)

    def first(self, prompts: int) -> Losses:
        return Losses(self.sums[:, :prompts], self.tokens[:, :prompts], self.seeds)

    def drawn(self, draws: NDArray[np.float64], picks: NDArray[np.int64]) -> NDArray[np.float64]:
        """Nats per token in every draw, `[D]`. draws: how often each prompt is drawn, `[D, prompts]`; picks: seeds, `[D, seeds]`."""
        by_seed = (draws @ self.sums.T) / (draws @ self.tokens.T)
        return np.take_along_axis(by_seed, picks, 1).mean(1)


def _by_prompt(outcome: dict[str, Any], values: list[float]) -> list[float]:
    sizes = outcome["groups"]
    if outcome["task"] == "persona":
        sizes = [HELD_OUT_PHRASINGS] * (len(values) // HELD_OUT_PHRASINGS)
    ends = np.cumsum(sizes)
    return [float(sum(values[end - size : end])) for size, end in zip(sizes, ends, strict=True)]


def refuse_unlike(task: str, outcomes: list[dict[str, Any]]) -> None:
    """Raises ValueError unless all were judged by the same rows with products alike: losses are compared row by row."""
    kinds = {json.dumps([each["tokens"], each["groups"], each.get("products", "fp32")]): each for each in outcomes}
    if len(kinds) > 1:
        names = ", ".join(f"{each['method']} of seed {each['seed']}" for each in kinds.values())
        raise ValueError(f"{task}: {names} were judged by other rows, or in another precision, than each other; run them again")


def share(control: Losses, lora: Losses, x: Losses, draws: int = DRAWS) -> tuple[float, tuple[float, float], tuple[int, ...]]:
    """(share, its 95 % interval, seeds), over the seeds that all three have."""
    seeds = tuple(seed for seed in x.seeds if seed in control.seeds and seed in lora.seeds)
    control, lora, x = control.only(seeds), lora.only(seeds), x.only(seeds)
    random = np.random.default_rng(0)
    prompts = control.sums.shape[1]
    drawn = random.multinomial(prompts, np.full(prompts, 1 / prompts), draws).astype(np.float64)
    picks = random.integers(0, len(seeds), (draws, len(seeds)))
    c, reference, own = (each.drawn(drawn, picks) for each in (control, lora, x))
    low, high = np.percentile((c - own) / (c - reference), [2.5, 97.5])
    return (control.mean - x.mean) / (control.mean - lora.mean), (float(low), float(high)), seeds


def figures(store: Store, layers: int, shape: DecoderShape, times: float, gsm8k_test_rows: int = 0) -> dict[str, Any]:
    """By task; a method whose search has not ended is left out. tried: validation loss by learning rate, None where a
    tune diverged. general_text: of the persona's tries that were judged, by method and rate. gsm8k_test_rows: held-out rows at the
    beginning that are of GSM8K's own test set: shares of them alone come with the task's, unless 0."""
    found: dict[str, Any] = {}
    steps = {task: round(STEPS[task] * times) for task in NAMES}
    for task in NAMES:
        results = {name: outcomes for name in ("base", *METHODS) if (outcomes := store.results(task, name, steps[task]))}
        losses = {name: Losses.of(outcomes) for name, outcomes in results.items()}
        if not {CONTROL, REFERENCE, "base"} <= set(losses):
            continue
        refuse_unlike(task, [each for outcomes in results.values() for each in outcomes])
        base, control, lora = (losses[name] for name in ("base", CONTROL, REFERENCE))
        of_task: dict[str, Any] = {
            "rows": len(results["base"][0]["rows"]),
            "drawn_groups": base.sums.shape[1],
            "steps": steps[task],
            "base_nll": base.mean,
            "control_nll": control.mean,
            "lora_nll": lora.mean,
            "methods": {},
        }
        for name, own in losses.items():
            outcomes = results[name]
            shown: dict[str, Any] = {"nll": own.mean, "seeds": len(own.seeds)}
            if name != "base":
                value, interval, common = share(control, lora, own)
                shown["share_by_seed"] = [share(control, lora, own.only((seed,)), draws=1)[0] for seed in common]
                shown |= {"share": value, "interval": interval, "share_seeds": len(common), "rate": outcomes[0]["rate"]}
                shown["plain_improvement"] = (base.mean - own.only(common).mean) / (base.mean - lora.only(common).mean)
                shown["diverged_seeds"] = store.diverged(task, name, outcomes[0]["rate"], steps[task])
                if name not in SEVEN and set(SEVEN) <= set(losses):
                    shown["share_of_seven"], shown["share_of_seven_interval"], _ = share(losses["bias-all"], losses["lora-all"], own)
                shown["at_grid_edge"] = store.search(task, METHODS[name], steps[task]).at_edge
                shown["parameters"] = outcomes[0]["parameters"]
                of_task |= {f"{name}_share": value, f"{name}_share_interval": interval} if name not in (CONTROL, REFERENCE) else {}
            for measure in ("bleu", "slot_recall", "exact_match", "recall"):
                if measure in outcomes[0]:
                    shown[measure] = outcomes[0][measure]
                    shown["answers"] = outcomes[0]["answers"]
            if "other_nll" in outcomes[0]:
                shown["other_nll"] = float(np.mean([each["other_nll"] for each in outcomes]))
            of_task["methods"][name] = shown
        if task == "gsm8k" and gsm8k_test_rows:
            of_task["test_set"] = test_set(losses, gsm8k_test_rows)
        found[task] = of_task
    found["general_text"] = {
        name: {
            f"{each['rate']:.3g}": {"nll": each["nll"], "other_nll": each["other_nll"], "recall": each["recall"]}
            for each in store.judged("persona", name, steps["persona"])
        }
        for name in ROWS["persona"]
    }
    found["methods"] = {name: costs(method, layers, shape) for name, method in METHODS.items()}
    found["tried"] = {
        task: {
            name: {
                f"{rate:.3g}": loss if math.isfinite(loss) else None
                for rate, loss in sorted(store.search(task, METHODS[name], steps[task]).tried.items())
            }
            for name in ROWS[task]
        }
        for task in NAMES
    }
    return found


def test_set(losses: dict[str, Losses], rows: int) -> dict[str, Any]:
    """Shares over the first `rows` prompts alone, with their intervals, by method."""
    first = {name: each.first(rows) for name, each in losses.items() if name != "base"}
    found: dict[str, Any] = {"rows": rows}
    for name, own in first.items():
        if name not in (CONTROL, REFERENCE):
            found[name], found[f"{name}_interval"], _ = share(first[CONTROL], first[REFERENCE], own)
    return found


def costs(method: Method, layers: int, shape: DecoderShape) -> dict[str, Any]:
    """What a token costs under the method's plan, fp32 on the wire; nothing but words where no plan holds it."""
    if method.plan is None:
        return {"words": method.words}
    plan = method.plan(layers)
    bytes_ = payload(plan, shape, "fp32")
    return {
        "words": method.words,
        "round_trips": plan.round_trips,
        "device_layers": len(plan.device_layers),
        "up_bytes_per_token": bytes_.up,
        "down_bytes_per_token": bytes_.down,
        "device_multiplications": device_multiplications(plan, shape),
    }


def device_multiplications(plan: ExchangePlan, shape: DecoderShape) -> int:
    """Multiply-accumulates of one token on the device: its layers' projections, an entry's A, features, cores, head; not attention."""
    cores = sum((core.down_stop - core.down_start) * (core.up_stop - core.up_start) for core in plan.cores)
    cores += sum(exchange.features * exchange.compressed_columns for exchange in plan.all_exchanges)
    entry = plan.entry_exchange.compressed_columns * shape.hidden if plan.entry_exchange else 0
    return len(plan.device_layers) * layer_values(shape) + cores + entry + shape.vocabulary * shape.hidden


def main() -> None:
    from plora.models.checkpoint import locate, read_skeleton, read_tokenizer

    from ..run import model_path
    from .plots import plot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="the base of the runs [SmolLM2-135M-Instruct, as installed]")
    parser.add_argument("--runs", type=Path, default=RUNS)
    parser.add_argument("--data", type=Path, default=DATA, help="of the runs, to count the rows of GSM8K's own test set")
    parser.add_argument("--times", type=float, default=1.0, help="of the study whose sweep is shown [1]")
    arguments = parser.parse_args()
    base = str(arguments.base or model_path())
    shape, _ = read_skeleton(base)
    test_rows = gsm8k_test_rows(read_tokenizer(locate(base)), Sizes(), arguments.data)
    found = figures(Store(arguments.runs), shape.layers, shape, arguments.times, test_rows)
    for task in NAMES:
        if task in found:
            print_task(task, found[task])
    if not any(task in found for task in NAMES):
        raise SystemExit(f"{arguments.runs}: no task has base, control and LoRA yet; python -m bench.quality.study goes on with it")
    if arguments.runs == RUNS:
        times = "" if arguments.times == 1 else f" --times {arguments.times:g}"
        print(write_results("quality", found, f"python -m bench.quality.study{times} && python -m bench.quality.shares{times}"))
        for path in plot(found):
            print(path)


def print_task(task: str, found: dict[str, Any]) -> None:
    print(f"{task}: {found['rows']} held-out rows, {found['steps']} steps")
    for name, each in found["methods"].items():
        low, high = each.get("interval", (0, 0))
        share_words = (
            f"share {100 * each['share']:6.1f} % [{100 * low:.1f}, {100 * high:.1f}], {each['share_seeds']} seeds"
            if "share" in each
            else ""
        )
        rest = " ".join(
            f"{key} {each[key]:.3g}" for key in ("rate", "bleu", "slot_recall", "exact_match", "recall", "other_nll") if key in each
        )
        print(f"  {name:12} nll {each['nll']:.4f} {share_words} {rest}")


if __name__ == "__main__":
    main()
