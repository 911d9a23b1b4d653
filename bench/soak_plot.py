"""docs/results/soak.svg from bench/soak.py's figures: the server's memory, sessions and descriptors over minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conditions import RESULTS

LINES = (("rss_bytes", "MB", 1e-6, "tab:blue"), ("sessions", "sessions", 1, "tab:orange"), ("descriptors", "descriptors", 1, "tab:red"))
"""What, its unit, a unit's share of what was measured, and its colour."""


def plot(figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plora"
    from matplotlib import pyplot

    sheet, rows = pyplot.subplots(len(LINES), 1, figsize=(6.5, 5.6), sharex=True)
    for axes, (name, unit, scale, colour) in zip(rows, LINES, strict=True):
        there = [one for one in figures["samples"] if one[name] is not None]
        axes.plot([one["minutes"] for one in there], [scale * one[name] for one in there], color=colour, linewidth=1)
        if name in figures and figures[name]["after"] is not None:
            axes.axhline(scale * figures[name]["after"], color="black", linestyle=":", linewidth=1, label="after all have left")
            axes.legend(fontsize=7, loc="lower right")
        axes.set(ylabel=unit, ylim=(0, None))
        axes.grid(True, alpha=0.3)
    rows[0].set_title(
        f"One cloud: {figures['answers']:,} answers, {figures['cuts']:,} cuts, {figures['hostile_connections']:,} hostile peers"
    )
    rows[-1].set_xlabel("minutes")
    sheet.tight_layout()
    path = folder / "soak.svg"
    sheet.savefig(path, metadata={"Date": None})
    pyplot.close(sheet)
    return path
