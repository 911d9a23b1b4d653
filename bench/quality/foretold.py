"""What plora-plan foretells of quality, beside full tunes: `python -m bench.quality.foretold` writes docs/results/quality-foretold.json.

plora-plan calibrates on the persona's rows as it does for anyone: short tunes at its default rates, the rest interpolated. Beside them
stand the study's runs of the same plans, longer, at the best of their rates. Both as a share of what the entry plan with four exchanges
gains over the static biases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plora.artifact.console import reports_errors
from plora.artifact.shape import DecoderShape
from plora.models.checkpoint import display_name, read_skeleton
from plora.models.report import Console
from plora.planner.calibration import Calibration, CalibrationConfig, calibrate
from plora.planner.candidates import Candidate, grid
from plora.planner.quality import Interpolation, skeleton

from ..conditions import ROOT, write_results
from ..run import model_path
from .losses import Losses
from .methods import METHODS, RANK
from .runs import Store
from .shares import CONTROL
from .study import ROWS, RUNS, STEPS
from .tasks import Text, persona

SCRATCH = ROOT / "out" / "quality"
TASK = "persona"
CALIBRATION_STEPS = 60
UNIT = "entry-exchanges-4"
OTHER_BASIS = "paper"
"""Its basis is random, in the study; the planner's are pca."""


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder, hub id or GGUF [SmolLM2-135M-Instruct, as installed]")
    parser.add_argument("--steps", type=int, default=CALIBRATION_STEPS, help=f"of each of the planner's tunes [{CALIBRATION_STEPS}]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="the study's")
    arguments = parser.parse_args()
    base = str(arguments.base or model_path())
    shape, _ = read_skeleton(base)
    if UNIT not in candidates_of(shape):
        parser.error(f"--base {base}: {shape.layers} layers do not make the groups of {UNIT}, which all is measured by")
    store = Store(arguments.runs)
    store.refuse_another_base(display_name(base))
    plans = grid(shape, RANK)
    tuned = {each: plans[each] for each in skeleton(shape.layers, plans, RANK)}
    SCRATCH.mkdir(parents=True, exist_ok=True)
    data, held_out = write_rows(SCRATCH)
    config = CalibrationConfig(data, held_out, steps=arguments.steps)
    calibration = calibrate(base, config, tuned, RANK, SCRATCH / "persona.calibration.json", Console(sys.stderr))
    found = compare(calibration, store, shape)
    print(json.dumps(found, indent=1))
    if arguments.runs == RUNS and arguments.steps == CALIBRATION_STEPS:
        print(write_results("quality-foretold", found, "python -m bench.quality.foretold"))


def write_rows(folder: Path) -> tuple[Path, Path]:
    """The persona as a user would have it: (what is trained on, what is held out), JSONL. The phrasings that the study picks rates by are
    trained on: the planner picks none."""
    texts = persona()
    paths = folder / "persona.jsonl", folder / "persona-held-out.jsonl"
    for path, groups in zip(paths, ([*texts.train, *texts.validation], texts.held_out), strict=True):
        path.write_text("".join(_line(text) for group in groups for text in group), encoding="utf-8")
    return paths


def _line(text: Text) -> str:
    return json.dumps({"prompt": text.prompt, "response": text.response}) + "\n"


def compare(calibration: Calibration, store: Store, shape: DecoderShape) -> dict[str, Any]:
    """tunes: the planner's, held-out loss by name; plans: by the study's name, both shares and how the planner came to its own; pairs,
    pairs_in_order: of plans, and those that both put in one order. Raises SystemExit where the study lacks what all is measured by."""
    assert calibration.control is not None  # calibrate made it
    planner = Interpolation(shape.layers, calibration.control, calibration.by_candidate)
    steps = STEPS[TASK]
    losses = {name: Losses.of(runs[:1]).mean for name in ROWS[TASK] if (runs := store.results(TASK, name, steps))}
    if missing := {CONTROL, UNIT} - set(losses):
        sys.exit(f"{store.path}: no {' or '.join(sorted(missing))} of {TASK} yet; python -m bench.quality.study goes on with it")
    candidates = candidates_of(shape)
    unit = planner.quality(candidates[UNIT]).share
    plans: dict[str, Any] = {}
    for name, candidate in candidates.items():
        if name in losses:
            foretold = planner.quality(candidate)
            plans[name] = {
                "foretold": foretold.share / unit,
                "kind": foretold.origin,
                "tuned": (losses[CONTROL] - losses[name]) / (losses[CONTROL] - losses[UNIT]),
            }
    pairs = list(itertools.combinations(plans, 2))
    return {
        "steps": {"planner": calibration.steps, "study": steps},
        "tunes": {each.name: {"rate": each.learning_rate, "held_out_loss": each.held_out_loss} for each in calibration.losses},
        "plans": plans,
        "pairs": len(pairs),
        "pairs_in_order": sum(in_order(plans, pair) for pair in pairs),
    }


def in_order(plans: Mapping[str, Mapping[str, float]], pair: tuple[str, str]) -> bool:
    """Whether both say the same of two plans."""
    one, other = (plans[name] for name in pair)
    return (one["foretold"] - other["foretold"]) * (one["tuned"] - other["tuned"]) > 0


def candidates_of(shape: DecoderShape) -> dict[str, Candidate]:
    """The planner's candidates that are methods of the study, by the method's name."""
    by_plan = {plan: candidate for candidate, plan in grid(shape, RANK).items()}
    plans = {name: method.plan(shape.layers) for name, method in METHODS.items() if method.plan is not None and name != OTHER_BASIS}
    return {name: by_plan[plan] for name, plan in plans.items() if plan in by_plan}


if __name__ == "__main__":
    main()
