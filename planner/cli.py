"""`plora-plan`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors
from ..artifact.errors import NeedsUnmet, UsageError

FILE = click.Path(path_type=Path)


@click.command(context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
@click.argument("base", metavar="BASE")
@click.option("--rtt-ms", type=float, metavar="MS", help="Round-trip time of the link. Required, as the rates are, unless --doctor has it.")
@click.option("--up-mbit", type=float, metavar="R", help="From device to cloud, 10^6 bits per second.")
@click.option("--down-mbit", type=float, metavar="R", help="From cloud to device.")
@click.option(
    "--device-ms-per-layer",
    "device_layer",
    metavar="MS",
    help="Of one decoder layer and one token on the device; or by rows of a step, as in 1:1.5,64:9. [default: measured on this machine]",
)
@click.option("--cloud-ms-per-layer", "cloud_layer", metavar="MS", help="The same in the cloud. [default: measured on this machine]")
@click.option("--device-threads", default=1, show_default=True, metavar="N", help="Where the device's layers are measured here.")
@click.option("--cloud-threads", default=1, show_default=True, metavar="N", help="Where the cloud's are.")
@click.option("--doctor", type=FILE, metavar="FILE", help="What `plora-device doctor --json` printed: says what the flags above do not.")
@click.option("--wire", default="fp32", show_default=True, metavar="DTYPE", help="As --wire-dtype of plora-device.")
@click.option(
    "--edge-dtype", default="fp32", show_default=True, type=click.Choice(["fp32", "fp16"]), help="Of the device's tables and layers."
)
@click.option("--prompt-tokens", default=128, show_default=True, metavar="N", help="Of the prompt whose first token is predicted.")
@click.option("--rank", type=int, metavar="R", help="Largest rank to look at; a half and a quarter of it, too. [default: 64, or less]")
@click.option("--device-mb", "device_megabytes", type=float, metavar="MB", help="Need: at most so much on the device (10^6 bytes).")
@click.option("--quality", type=float, metavar="Q", help="Need: at least this share of the reference's improvement; wants --data.")
@click.option("--min-tokens-per-second", "tokens_per_second", type=float, metavar="X", help="Need: at least so fast.")
@click.option(
    "--max-ttft-ms", "first_token_millis", type=float, metavar="MS", help="Need: first token of the prompt after at most so long."
)
@click.option(
    "--max-mb-per-1000-tokens", "megabytes_per_1000_tokens", type=float, metavar="MB", help="Need: at most so much up and down together."
)
@click.option("--data", type=FILE, metavar="FILE", help="Rows as for plora-tune: calibrates quality by short tunes, kept beside --out.")
@click.option("--held-out", type=FILE, metavar="FILE", help="Rows to judge by, none of whose prompts is in --data.")
@click.option("--held-out-share", default=0.2, show_default=True, metavar="F", help="Instead: this share of --data, chosen by the seed.")
@click.option("--calibration-steps", default=40, show_default=True, metavar="N", help="Of each short tune.")
@click.option("--batch-size", default=8, show_default=True, metavar="N", help="Rows of a step.")
@click.option("--max-tokens", default=512, show_default=True, metavar="N", help="Longest row.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Of the calibration.")
@click.option("--quality-from", type=FILE, metavar="FILE", help="Instead of --data: OUT.calibration.json of an earlier run.")
@click.option(
    "--choose",
    metavar="N|WORD",
    help="A number of the table, or fastest, best (quality), smallest (device MB), leanest (MB on the link). "
    "[default: fastest, where --quality is asked for; else best]",
)
@click.option("--out", type=FILE, metavar="FILE", help="Where to write the chosen plan, for --plan of plora-tune and plora-export.")
@click.option("--replace", is_flag=True, help="Replace --out if it exists.")
@click.option("--all", "everything", is_flag=True, help="List plans of the front that miss a need, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object alone on standard output.")
@reports_errors
def main(
    base: str,
    rtt_ms: float | None,
    up_mbit: float | None,
    down_mbit: float | None,
    device_layer: str | None,
    cloud_layer: str | None,
    device_threads: int,
    cloud_threads: int,
    doctor: Path | None,
    wire: str,
    edge_dtype: str,
    prompt_tokens: int,
    rank: int | None,
    device_megabytes: float | None,
    quality: float | None,
    tokens_per_second: float | None,
    first_token_millis: float | None,
    megabytes_per_1000_tokens: float | None,
    data: Path | None,
    held_out: Path | None,
    held_out_share: float,
    calibration_steps: int,
    batch_size: int,
    max_tokens: int,
    seed: int,
    quality_from: Path | None,
    choose: str | None,
    out: Path | None,
    replace: bool,
    everything: bool,
    as_json: bool,
) -> None:
    """Propose exchange plans for BASE (a Hugging Face folder, a hub id, or a .gguf file) that meet your needs.

    Predicts tokens/s, time to the first token, bytes and the device's memory of some hundred plans from the link and the speed of both
    sides, and with --data their quality from short tunes of a few; lists those that no other beats in everything, and writes the one
    chosen. Ends with exit code 11 if no plan meets every need, saying which need binds. Interrupted, the same command goes on.
    """
    if held_out is not None and data is None:
        raise UsageError(f"--held-out {held_out} goes with --data FILE, to tune on")

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from ..models.report import Console
    from .calibration import CalibrationConfig
    from .config import Link, PlanConfig
    from .needs import Needs, explain
    from .planning import plan_for
    from .table import as_dict, tables

    calibration = None
    if data is not None:
        calibration = CalibrationConfig(data, held_out, held_out_share, calibration_steps, batch_size, max_tokens, seed)
    needs = Needs(device_megabytes, quality, tokens_per_second, first_token_millis, megabytes_per_1000_tokens)
    link = Link(rtt_ms, up_mbit, down_mbit)
    speeds = (device_layer, cloud_layer, device_threads, cloud_threads, doctor)
    config = PlanConfig(base, link, needs, *speeds, wire, edge_dtype, prompt_tokens, rank, calibration, quality_from, choose, out, replace)
    planned = plan_for(config, Console(sys.stderr))
    if as_json:
        click.echo(json.dumps(as_dict(planned, config)))
    elif planned.chosen is not None or everything:
        click.echo(tables(planned, config, everything))
    if planned.unmet is not None:
        raise NeedsUnmet(explain(planned.unmet, needs))


if __name__ == "__main__":
    main()
