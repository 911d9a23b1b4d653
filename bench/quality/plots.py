"""docs/results/quality-*.svg: the share of LoRA's learning that a plan keeps, over what the plan costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..conditions import RESULTS
from .tasks import NAMES

AXES = {
    "round-trips": ("round_trips", "round trips per token"),
    "bytes": ("bytes_per_token", "bytes per token, up and down, fp32"),
    "device": ("device_multiplications", "multiply-accumulates per token on the device, millions"),
}


def plot(found: dict[str, Any]) -> list[Path]:
    """One file for each axis, one panel for each task that has runs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    tasks = [task for task in NAMES if task in found]
    paths: list[Path] = []
    for name, (key, words) in AXES.items():
        figure, panels = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.6), sharey=True, squeeze=False)
        for panel, task in zip(panels[0], tasks, strict=True):
            for method, costs in found["methods"].items():
                shown = found[task]["methods"].get(method)
                if shown is None or "round_trips" not in costs:
                    continue
                at = cost_of(costs, key)
                value, (low, high) = 100 * shown["share"], shown["interval"]
                spread = [[max(0.0, value - 100 * low)], [max(0.0, 100 * high - value)]]
                panel.errorbar([at], [value], yerr=spread, fmt="o", capsize=3)
                panel.annotate(method, (at, value), textcoords="offset points", xytext=(6, 4), fontsize=8)
            panel.axhline(100, linewidth=0.8, color="grey")
            if (everything := found[task]["methods"].get("lora-all")) is not None:
                panel.axhline(100 * everything["share"], linewidth=0.8, linestyle=":", color="grey")
            panel.set_title(task)
            panel.set_xlabel(words, fontsize=8)
            panel.set_xscale("log")
        panels[0][0].set_ylabel("share of LoRA's learning\nbeyond the control, %")
        figure.tight_layout()
        path = RESULTS / f"quality-{name}.svg"
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
        paths.append(path)
    return paths


def cost_of(costs: dict[str, Any], key: str) -> float:
    if key == "bytes_per_token":
        return costs["up_bytes_per_token"] + costs["down_bytes_per_token"]
    return costs[key] / 1e6 if key == "device_multiplications" else costs[key]
