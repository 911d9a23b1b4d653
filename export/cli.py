"""`plora-export`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors
from ..artifact.errors import UsageError
from ..models.plan_flags import chosen_plan, plan_options


class DefaultCommand(click.Group):
    """`plora-export BASE …` is `plora-export export BASE …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["export", *args]
        return super().parse_args(ctx, args)


@click.group(cls=DefaultCommand, context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
def main() -> None:
    """Split a PrivateLoRA model into a cloud half and an edge half.

    `plora-export BASE --adapter DIR --out DIR` is short for `plora-export export …`.
    """


@main.command()
@click.argument("base", metavar="BASE")
@click.option(
    "--adapter",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A folder from plora-tune, or a checkpoint file of the PrivateLoRA authors. Required, unless a dry run gets a plan.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder to make: cloud/, edge/, verification/. Required unless --dry-run."
)
@click.option(
    "--dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16", "fp16"]), help="Of the cloud's weights and KV cache."
)
@click.option(
    "--edge-dtype",
    default="fp32",
    show_default=True,
    type=click.Choice(["fp32", "fp16"]),
    help="Of the embedding and head tables and the device's layers.",
)
@click.option("--cores-only", is_flag=True, help="Write only cores.safetensors into --out: a new persona for an exported basis.")
@click.option("--exported", type=click.Path(path_type=Path), metavar="DIR", help="With --cores-only: check that the cores fit this export.")
@click.option("--dry-run", is_flag=True, help="Draw the plan, say what would be where and what a token would cost; write nothing.")
@click.option("--compute-ms", type=float, metavar="MS", help="With --dry-run: compute per token for the prediction. [default: estimated]")
@click.option("--replace", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
@plan_options
@reports_errors
def export(
    base: str,
    adapter: Path | None,
    out: Path | None,
    dtype: str,
    edge_dtype: str,
    cores_only: bool,
    exported: Path | None,
    dry_run: bool,
    compute_ms: float | None,
    replace: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Export BASE (a Hugging Face folder, a hub id, or a .gguf file) with an adapter.

    Both halves are verified against the unsplit model before DIR appears; if anything fails, nothing is left behind. The flags of a
    plan, from --plan on, are for --dry-run without an adapter; an export has its adapter's plan.
    """
    choice = chosen_plan(flags)
    if dry_run:
        from .drawing import format_dry_run
        from .dry_run import dry_run as describe

        facts = describe(base, adapter, choice, dtype, edge_dtype, compute_ms)
        click.echo(json.dumps(facts) if as_json else format_dry_run(facts))
        return
    if adapter is None:
        raise UsageError("--adapter PATH is required (or --dry-run with a plan)")
    if choice is not None:
        raise UsageError("an export has its adapter's plan; leave out --plan and its flags, or pass --dry-run instead of --adapter")
    if out is None:
        raise UsageError("--out DIR is required (or pass --dry-run)")
    if cores_only:
        from .persona import export_cores

        written = export_cores(adapter, out, exported, replace)
        click.echo(json.dumps({"cores": str(written)}) if as_json else f"{written}: pass it to plora-device as --cores")
        return
    from .config import STAGES, ExportConfig
    from .export import export as run

    with Progress(STAGES) as progress:
        report = run(ExportConfig(base, adapter, out, dtype, edge_dtype, replace), progress.stage)
    click.echo(json.dumps({"out": str(out), "verification": report}) if as_json else f"{out}: {summary(report)}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
@reports_errors
def verify(folder: Path, as_json: bool) -> None:
    """Check an export in DIR: every hash, and both halves against the record of the unsplit model."""
    from ..artifact.strict import plain
    from .verify import verify as run

    report = plain(run(folder))
    click.echo(json.dumps(report) if as_json else f"{folder}: {summary(report)}")


def summary(report: dict[str, object]) -> str:
    errors = report["errors"]
    assert isinstance(errors, dict)
    name, worst = max(errors.items(), key=lambda item: item[1])
    line = (
        f"verified: {len(errors)} tensors, worst {name} at {worst:.1e} (allowed {report['tolerance']:.0e}); "
        f"{report['greedy_equal']} of {report['greedy_tokens']} greedy tokens equal"
    )
    if report["dtype"] != "fp32" or report["edge_dtype"] != "fp32":
        line += f"; KL {report['kl_nats']:.1e} nats against fp32"
    return line


class Progress:
    """A bar on a terminal, plain lines otherwise; on standard error."""

    def __init__(self, stages: tuple[str, ...]) -> None:
        self.stages = stages
        self.done = 0
        self.began = time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=len(stages), bar_format="{l_bar}{bar:24}| {n_fmt}/{total_fmt} {desc} [{elapsed}]", file=sys.stderr)

    def stage(self, name: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(name)
            self.bar.update(self.done - self.bar.n)
        else:
            print(f"[{self.done + 1}/{len(self.stages)}] {name} ({time.monotonic() - self.began:.1f} s)", file=sys.stderr, flush=True)
        self.done += 1

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            if kind is None:
                self.bar.update(len(self.stages) - self.bar.n)
            self.bar.close()
