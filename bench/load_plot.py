"""docs/results/load-*.svg from bench/load.py's figures: tokens per second of all sessions, and seconds per token, over sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conditions import RESULTS

COLOURS = {"0": "tab:blue", "20": "tab:orange", "80": "tab:red"}
"""By RTT in ms."""


def plot(figures: dict[str, Any]) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plora"
    from matplotlib import pyplot

    paths = []
    for name, draw in (("load-aggregate", aggregate), ("load-pace", pace)):
        sheet, axes = pyplot.subplots(figsize=(6.5, 4.2))
        draw(axes, figures)
        counts = [int(count) for count in figures["conversations"]["entry"]["0"]]
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("sessions")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7, loc="lower right" if draw is aggregate else "upper left")
        sheet.tight_layout()
        paths.append(RESULTS / f"{name}.svg")
        sheet.savefig(paths[-1], metadata={"Date": None})
        pyplot.close(sheet)
    return paths


def points(figures: dict[str, Any], rtt: str, name: str) -> tuple[list[int], list[float]]:
    """Sessions, and the figure of that name where there is one."""
    there = [(int(count), one[name]) for count, one in figures["conversations"]["entry"].get(rtt, {}).items() if one[name] is not None]
    return [count for count, _ in there], [value for _, value in there]


def aggregate(axes: Any, figures: dict[str, Any]) -> None:
    for rtt, colour in COLOURS.items():
        axes.plot(*points(figures, rtt, "tokens_per_second"), color=colour, marker="o", markersize=3, label=f"RTT {rtt} ms")
    decoding = figures["decode_only"].get("entry", {}).get("0", {})
    rates = [one["tokens_per_second"] for one in decoding.values()]
    axes.plot([int(count) for count in decoding], rates, "x", color=COLOURS["0"], label="RTT 0 ms, decoding only")
    for kind, what, style in (("model", "unsplit model", "k+:"), ("engine", "engine without server and network", "kx:")):
        if alone := figures["ceiling"].get(kind, {}):
            axes.plot([int(batch) for batch in alone], list(alone.values()), style, label=f"{what}, a batch of as many, decoding only")
    axes.set(ylabel="tokens/s of all sessions", ylim=(0, None), title="SmolLM2-135M, entry plan: prompts and answers")


def pace(axes: Any, figures: dict[str, Any]) -> None:
    for rtt, colour in COLOURS.items():
        for percent, style in ((50, "-"), (95, "--")):
            counts, seconds = points(figures, rtt, f"token_seconds_p{percent}")
            millis = [1e3 * value for value in seconds]
            axes.plot(counts, millis, style, color=colour, marker="o", markersize=3, label=f"RTT {rtt} ms, p{percent}")
    axes.set(ylabel="ms per token of one session", yscale="log", title="Time per token")
