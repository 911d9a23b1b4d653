"""docs/results/quality-*.svg: the share of LoRA's learning that a plan keeps, over what the plan costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..conditions import RESULTS
from .tasks import NAMES

AXES = {
    "round-trips": ("round_trips", "round trips per token (where plans agree, side by side)", "log"),
    "bytes": ("bytes_per_token", "KB per token, up and down, fp32", "log"),
    "device": ("device_multiplications", "million multiply-accumulates per token on the device", "linear"),
}
BESIDE = 1.12
"""Factor between points that would lie on one another."""


def plot(found: dict[str, Any]) -> list[Path]:
    """One file for each axis, one panel for each task that has runs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    tasks = [task for task in NAMES if task in found]
    methods = [name for name, each in found["methods"].items() if "round_trips" in each]
    paths: list[Path] = []
    for name, (key, words, scale) in AXES.items():
        figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 4), squeeze=False)
        for panel, task in zip(panels[0], tasks, strict=True):
            taken: dict[float, int] = {}
            for number, method in enumerate(methods):
                shown = found[task]["methods"].get(method)
                if shown is None:
                    continue
                at = cost_of(found["methods"][method], key)
                taken[at] = taken.get(at, 0) + 1
                if scale == "log":
                    at *= BESIDE ** (taken[at] - 1)
                value, (low, high) = 100 * shown["share"], shown["interval"]
                spread = [[max(0.0, value - 100 * low)], [max(0.0, 100 * high - value)]]
                panel.errorbar([at], [value], yerr=spread, fmt="o", capsize=3, color=f"C{number}", label=method)
            panel.axhline(100, linewidth=0.8, color="grey")
            if (everything := found[task]["methods"].get("lora-all")) is not None:
                panel.axhline(100 * everything["share"], linewidth=0.8, linestyle=":", color="grey")
            panel.set_title(task)
            panel.set_xlabel(words, fontsize=8)
            panel.set_xscale(scale)
            if scale == "log":
                panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            panel.margins(x=0.15)
        panels[0][0].set_ylabel(
            "share of LoRA's learning beyond the control, %\n(line: LoRA on q, k, v; dotted: on all linear)", fontsize=8
        )
        labels = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        path = RESULTS / f"quality-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        paths.append(path)
    return paths


def cost_of(costs: dict[str, Any], key: str) -> float:
    if key == "bytes_per_token":
        return (costs["up_bytes_per_token"] + costs["down_bytes_per_token"]) / 1000
    return costs[key] / 1e6 if key == "device_multiplications" else costs[key]
