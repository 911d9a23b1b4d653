"""From runs to figures: `python -m bench.quality.shares` writes docs/results/quality.json from quality-runs.jsonl.

share of x = (control - x) / (control - LoRA)        held-out nats per response token; LoRA: r = 16 on q, k, v

share of seven: the same between biases and LoRA on all seven projections, for plans that have as many targets.

What the static-bias control reaches is the format of the answers; the share says how much of LoRA's learning beyond it a plan keeps.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from plora.artifact.console import reports_errors
from plora.artifact.cost import payload
from plora.artifact.plan import ExchangePlan
from plora.artifact.shape import DecoderShape
from plora.planner.machine import layer_values

from ..conditions import write_results
from .losses import Losses, refuse_unlike, share
from .methods import METHODS, Method
from .runs import Store
from .study import ROWS, RUNS, SEVEN, STEPS
from .tasks import DATA, NAMES, Sizes, check_data, gsm8k_test_rows

REFERENCE, CONTROL = "lora", "control"


def figures(store: Store, layers: int, shape: DecoderShape, times: float, gsm8k_test_rows: int = 0) -> dict[str, Any]:
    """By task; a method whose search has not ended is left out. tried: validation loss by learning rate, None where a
    tune diverged. general_text: of the persona's tries that were judged, by method and rate. gsm8k_test_rows: held-out rows at the
    beginning that are of GSM8K's own test set: shares of them alone come with the task's, unless 0."""
    steps = {task: round(STEPS[task] * times) for task in NAMES}
    found: dict[str, Any] = {}
    for task in NAMES:
        results = {name: outcomes for name in ("base", *METHODS) if (outcomes := store.results(task, name, steps[task]))}
        if {CONTROL, REFERENCE, "base"} <= set(results):
            refuse_unlike(task, [each for outcomes in results.values() for each in outcomes])
            found[task] = _of_task(store, task, steps[task], results)
            if task == "gsm8k" and gsm8k_test_rows:
                found[task]["test_set"] = test_set({name: Losses.of(outcomes) for name, outcomes in results.items()}, gsm8k_test_rows)
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


def _of_task(store: Store, task: str, steps: int, results: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """results: outcomes by method, by seed."""
    losses = {name: Losses.of(outcomes) for name, outcomes in results.items()}
    base = losses["base"]
    found: dict[str, Any] = {
        "rows": len(results["base"][0]["rows"]),
        "drawn_groups": base.sums.shape[1],
        "steps": steps,
        "base_nll": base.mean,
        "control_nll": losses[CONTROL].mean,
        "lora_nll": losses[REFERENCE].mean,
        "methods": {},
    }
    for name, outcomes in results.items():
        shown = {"nll": losses[name].mean, "seeds": len(outcomes)}
        if name != "base":
            rate = outcomes[0]["rate"]
            shown |= {"rate": rate, "parameters": outcomes[0]["parameters"], **shares_of(losses, name)}
            shown["diverged_seeds"] = store.diverged(task, name, rate, steps)
            shown["at_grid_edge"] = store.search(task, METHODS[name], steps).at_edge
        if name not in ("base", CONTROL, REFERENCE):
            found |= {f"{name}_share": shown["share"], f"{name}_share_interval": shown["interval"]}
        found["methods"][name] = shown | _said(outcomes)
    return found


def shares_of(losses: dict[str, Losses], name: str) -> dict[str, Any]:
    """Of one method, beside control and LoRA, and where there are both, beside biases and LoRA on all seven projections."""
    base, control, lora, own = (losses[each] for each in ("base", CONTROL, REFERENCE, name))
    value, interval, common = share(control, lora, own)
    found: dict[str, Any] = {"share": value, "interval": interval, "share_seeds": len(common)}
    found["share_by_seed"] = [share(control, lora, own.only((seed,)), draws=1)[0] for seed in common]
    found["plain_improvement"] = (base.mean - own.only(common).mean) / (base.mean - lora.only(common).mean)
    if name not in SEVEN and set(SEVEN) <= set(losses):
        found["share_of_seven"], found["share_of_seven_interval"], _ = share(losses["bias-all"], losses["lora-all"], own)
    return found


def _said(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured beside the loss: answers in words are of the first seed, other text of all."""
    first = outcomes[0]
    found = {measure: first[measure] for measure in ("bleu", "slot_recall", "exact_match", "recall") if measure in first}
    if found:
        found["answers"] = first["answers"]
    if "other_nll" in first:
        found["other_nll"] = float(np.mean([each["other_nll"] for each in outcomes]))
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


@reports_errors
def main() -> None:
    from plora.models.checkpoint import display_name, locate, read_skeleton, read_tokenizer

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
    store = Store(arguments.runs)
    store.refuse_another_base(display_name(base))
    check_data(arguments.data)
    test_rows = gsm8k_test_rows(read_tokenizer(locate(base)), Sizes(), arguments.data)
    found = figures(store, shape.layers, shape, arguments.times, test_rows)
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
