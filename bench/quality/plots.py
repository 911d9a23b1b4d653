"""docs/results/quality-*.svg: the share of LoRA's learning that a plan keeps, over its cost, and over what was tried to keep more."""

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
CURVED = "gsm8k"
CURVES = {
    "front layers on the device": {"entry-front-0": 0, "entry": 4, "entry-front-8": 8},
    "rank": {"entry-rank-32": 32, "entry": 64, "entry-rank-128": 128, "entry-rank-192": 192},
    "exchanges per token": {"entry": 0, "entry-exchanges-4": 4, "own-inputs": 30},
}
"""What may bring the entry plan nearer to LoRA, by method. own-inputs has no front layers, as every layer is fed by its own input."""
SHARE_WORDS = "share of LoRA's learning beyond the control, %\n(line: LoRA on q, k, v; dotted: on all linear)"


def plot(found: dict[str, Any]) -> list[Path]:
    """A file for each axis, with a panel for each task that has runs; and one of the curves, if their task has runs."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plora"
    import matplotlib.pyplot as plt
    import matplotlib.ticker

    tasks = [task for task in NAMES if task in found]
    methods = [name for name, each in found["methods"].items() if "round_trips" in each]
    paths: list[Path] = []
    for name, (key, words, scale) in AXES.items():
        figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 4.4), squeeze=False)
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
                marks = {"color": f"C{number % 10}", "fmt": "o" if number < 10 else "s", "label": method}
                panel.errorbar([at], [100 * shown["share"]], yerr=_spread([shown]), capsize=3, **marks)
            _yardsticks(panel, found[task])
            panel.set_title(task)
            panel.set_xlabel(words, fontsize=8)
            panel.set_xscale(scale)
            if scale == "log":
                panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
                panel.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
                panel.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            panel.margins(x=0.15)
        panels[0][0].set_ylabel(SHARE_WORDS, fontsize=8)
        labels = {label: handle for panel in panels[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(labels.values(), labels.keys(), loc="lower center", ncols=7, fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.1, 1, 1))
        paths.append(_saved(figure, name))
    if CURVED in found:
        figure, panels = plt.subplots(1, len(CURVES), figsize=(4 * len(CURVES), 3.6), sharey=True)
        for panel, (words, points) in zip(panels, CURVES.items(), strict=True):
            shown = {at: found[CURVED]["methods"][method] for method, at in points.items() if method in found[CURVED]["methods"]}
            values = [100 * each["share"] for each in shown.values()]
            panel.errorbar(list(shown), values, yerr=_spread(list(shown.values())), fmt="o-", capsize=3)
            _yardsticks(panel, found[CURVED])
            ticks = list(points.values())
            panel.set_xticks(ticks)
            panel.set_xlim(ticks[0] - (beyond := 0.1 * (ticks[-1] - ticks[0])), ticks[-1] + beyond)
            panel.set_xlabel(words, fontsize=8)
        panels[0].set_ylabel(SHARE_WORDS, fontsize=8)
        figure.suptitle(f"{CURVED}: the entry plan, and one thing changed", fontsize=10)
        figure.tight_layout()
        paths.append(_saved(figure, "curves"))
    return paths


def _spread(shown: list[dict[str, Any]]) -> list[list[float]]:
    """Error bars in percent, `[2, points]`."""
    low = [max(0.0, 100 * (each["share"] - each["interval"][0])) for each in shown]
    high = [max(0.0, 100 * (each["interval"][1] - each["share"])) for each in shown]
    return [low, high]


def _yardsticks(panel: Any, of_task: dict[str, Any]) -> None:
    panel.axhline(100, linewidth=0.8, color="grey")
    if (everything := of_task["methods"].get("lora-all")) is not None:
        panel.axhline(100 * everything["share"], linewidth=0.8, linestyle=":", color="grey")


def _saved(figure: Any, name: str) -> Path:
    import matplotlib.pyplot as plt

    path = RESULTS / f"quality-{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def cost_of(costs: dict[str, Any], key: str) -> float:
    if key == "bytes_per_token":
        return (costs["up_bytes_per_token"] + costs["down_bytes_per_token"]) / 1000
    return costs[key] / 1e6 if key == "device_multiplications" else costs[key]
