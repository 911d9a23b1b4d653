"""`plora-tune`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors
from ..artifact.errors import UsageError
from .plan_flags import PlanChoice, chosen_plan, plan_options


@click.command(context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
@click.argument("base", metavar="BASE")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='JSONL: {"prompt", "response"} or {"messages": […]} a line.',
)
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="Adapter folder to make.")
@plan_options
@click.option(
    "--basis", type=click.Path(path_type=Path), metavar="DIR", help="Keep the basis (and plan) of this adapter: only the cores are new."
)
@click.option(
    "--basis-kind",
    type=click.Choice(["random", "svd", "pca"]),
    help="Where A and B come from. [default: random under the paper's plan, else pca]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Public text for a pca basis. [default: the one that comes with plora]",
)
@click.option("--scale", type=float, metavar="S", help="The adapter's s. [default: 1]")
@click.option("--epochs", default=3.0, show_default=True, metavar="N", help="Passes over the data.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps, instead of --epochs.")
@click.option("--batch-size", default=8, show_default=True, metavar="N", help="Rows per batch, of each process.")
@click.option("--accumulate", default=1, show_default=True, metavar="N", help="Batches per step: as N times the batch, in less memory.")
@click.option(
    "--learning-rate",
    type=float,
    metavar="LR",
    help="Peak rate. [default: by basis: random and svd 1e-2, pca 4e-3; 1e-2 with a shared injection]",
)
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of basis, order and everything else.")
@click.option("--max-tokens", default=512, show_default=True, metavar="N", help="Longest row.")
@click.option("--held-out", type=click.Path(path_type=Path), metavar="FILE", help="Rows to evaluate on, in the same form.")
@click.option("--held-out-share", type=float, metavar="F", help="Instead: this share of --data, chosen by the seed, below 0.5.")
@click.option("--eval-every", type=int, metavar="N", help="Steps between evaluations. [default: 4 times in a run]")
@click.option("--save-every", type=int, metavar="N", help="Steps between checkpoints. [default: 10 times in a run]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu"]), help="auto: an accelerator, if any.")
@click.option("--replace", is_flag=True, help="Replace --out if it exists.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left in OUT.unfinished.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone on standard output.")
@reports_errors
def main(
    base: str,
    data: Path,
    out: Path,
    basis: Path | None,
    basis_kind: str | None,
    scale: float | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Tune PrivateLoRA cores for BASE (a Hugging Face folder, a hub id, or a .gguf file).

    Only the cores are trained, with the loss on responses; A, B and the base stay frozen. The adapter folder holds the public
    basis and the private cores in files of their own. Interrupted, the same command resumes.
    """
    choice = chosen_plan(rest)
    if basis is not None:
        given = {"plan flags": choice, "--basis-kind": basis_kind, "--calibration": rest["calibration"], "--scale": scale}
        if names := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"either plan flags or --basis: {basis} brings its plan, basis and scale; leave out {', '.join(names)}")
    choice = choice or PlanChoice()

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from .report import Console
    from .tune import Interrupted, tune
    from .tune_config import TuneConfig

    kind = basis_kind or ("random" if choice.name == "paper" or basis is not None else "pca")
    plan = choice.plan if basis is None else None
    config = TuneConfig(base, data, out, plan, basis, kind, scale=1.0 if scale is None else scale, **rest)
    report = Console(sys.stderr if as_json else sys.stdout)
    try:
        summary = tune(config, report)
    except Interrupted as interrupted:
        click.echo(str(interrupted), err=True)
        raise
    if not _speaks():
        return
    if as_json:
        click.echo(json.dumps({"out": str(out), **summary}))
    else:
        held_out = f", held-out loss {summary['held_out_loss']:.4f}" if "held_out_loss" in summary else ""
        click.echo(f"{out}: {summary['parameters']:,} parameters tuned in {summary['steps']} steps, {summary['seconds']} s{held_out}")


def _speaks() -> bool:
    """Of the processes of a run, the first speaks. Their group ends here: gloo's threads would else outlive the interpreter, and now and
    then abort the process (pytorch pull request 179291)."""
    from accelerate import PartialState

    processes = PartialState()
    first = processes.is_main_process
    processes.destroy_process_group()
    return first


if __name__ == "__main__":
    main()
