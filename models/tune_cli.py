"""`plora-tune`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors
from ..artifact.plan import TARGETS, grouped_plan


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
@click.option(
    "--basis", type=click.Path(path_type=Path), metavar="DIR", help="Keep the basis (and plan) of this adapter: only the cores are new."
)
@click.option("--rank", default=64, show_default=True, metavar="R", help="Rank of every down-projection A.")
@click.option("--out-rank", type=int, metavar="R", help="Rows of every core M. [default: --rank]")
@click.option("--targets", default="q,k,v", show_default=True, metavar="LIST", help=f"Projections to adapt, of {','.join(TARGETS)}.")
@click.option("--group", default=1, show_default=True, metavar="N", help="Layers that one exchange serves; 1 is the paper's plan.")
@click.option("--separate", is_flag=True, help="One A per target, as in the authors' checkpoints. [default: one A per source]")
@click.option("--basis-kind", default="random", show_default=True, type=click.Choice(["random", "svd"]), help="Where A and B come from.")
@click.option("--scale", default=1.0, show_default=True, metavar="S", help="The adapter's s.")
@click.option("--epochs", default=3.0, show_default=True, metavar="N", help="Passes over the data.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps, instead of --epochs.")
@click.option("--batch-size", default=8, show_default=True, metavar="N", help="Rows per step.")
@click.option("--learning-rate", type=float, metavar="LR", help="Peak rate. [default: by basis, 1e-2]")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of basis, order and everything else.")
@click.option("--max-tokens", default=512, show_default=True, metavar="N", help="Longest row.")
@click.option("--held-out", type=click.Path(path_type=Path), metavar="FILE", help="Rows for the loss that is reported at the end.")
@click.option("--replace", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
@reports_errors
def main(
    base: str,
    data: Path,
    out: Path,
    basis: Path | None,
    rank: int,
    out_rank: int | None,
    targets: str,
    group: int,
    separate: bool,
    as_json: bool,
    **rest: Any,
) -> None:
    """Tune PrivateLoRA cores for BASE (a Hugging Face folder, a hub id, or a .gguf file).

    Only the cores are trained, with the loss on responses; A, B and the base stay frozen. The adapter folder holds the public
    basis and the private cores in files of their own.
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from .tune import TuneConfig, tune

    names = tuple(name.strip() for name in targets.split(","))
    plan = None if basis else partial(grouped_plan, group=group, rank=rank, targets=names, out_rank=out_rank, separate=separate)

    def say(record: dict[str, Any]) -> None:
        click.echo(
            f"step {record['step']}/{record['of']}: loss {record['loss']:.4f}, learning rate {record['learning_rate']:.2e}", err=True
        )

    summary = tune(TuneConfig(base, data, out, plan, basis, **rest), say)
    if as_json:
        click.echo(json.dumps({"out": str(out), **summary}))
    else:
        held_out = f", held-out loss {summary['held_out_loss']:.4f}" if "held_out_loss" in summary else ""
        click.echo(f"{out}: {summary['parameters']:,} parameters tuned in {summary['steps']} steps, {summary['seconds']} s{held_out}")
