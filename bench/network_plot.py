"""docs/results/network.svg: tokens per second and time to first token over RTT, and bytes per token, from bench/network.py's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .conditions import RESULTS
from .profiles import RTT_SWEEP_MILLIS

COLOURS = {"paper": "tab:red", "grouped": "tab:orange", "entry-own": "tab:green", "entry": "tab:blue"}
PROMPT_OF = {"plain": "chat", "drafts": "repeat"}
"""Which prompt a mode is drawn with: drafts shine where text repeats, and are nothing where it does not."""


def plot(figures: dict[str, Any]) -> Path:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plora"
    from matplotlib import pyplot

    sheet, (speed, first, size) = pyplot.subplots(1, 3, figsize=(14, 4.2))
    for plan, modes in figures["plans"].items():
        for mode, by_link in modes.items():
            name = PROMPT_OF[mode]
            if not all(name in by_link.get(f"{rtt:g}", {}) for rtt in RTT_SWEEP_MILLIS):
                continue  # measured at some RTTs only
            line = {"color": COLOURS[plan], "linestyle": "-" if mode == "plain" else "--", "marker": "o", "markersize": 3}
            label = plan if mode == "plain" else f"{plan}, drafts, text that repeats"
            points = [by_link[f"{rtt:g}"][name] for rtt in RTT_SWEEP_MILLIS]
            speed.plot(RTT_SWEEP_MILLIS, [point["tokens_per_second"] for point in points], label=label, **line)
            if mode == "plain":
                first.plot(RTT_SWEEP_MILLIS, [point["ttft_seconds"] for point in points], label=label, **line)
    for name, style in (("cloud_only", ":"), ("device_only", "-.")):
        own = figures[name].get("entry", {}) if name == "cloud_only" else figures[name]
        if own:
            label = "cloud alone, no network" if name == "cloud_only" else "device alone, llama.cpp Q4_1"
            speed.axhline(own["chat"]["tokens_per_second"], color="black", linestyle=style, linewidth=1, label=label)
            first.axhline(own["chat"]["ttft_seconds"], color="black", linestyle=style, linewidth=1, label=label)
    plans = list(figures["plans"])
    plain = [figures["plans"][plan]["plain"]["0"]["chat"] for plan in plans]
    places = range(len(plans))
    size.bar([place - 0.2 for place in places], [each["bytes_up_per_token"] for each in plain], 0.4, label="up")
    size.bar([place + 0.2 for place in places], [each["bytes_down_per_token"] for each in plain], 0.4, label="down")
    size.set(xticks=list(places), xticklabels=plans, yscale="log", ylabel="bytes per token, fp32", title="On the wire")
    speed.set(xlabel="RTT (ms)", ylabel="tokens/s", yscale="log", title="SmolLM2-135M, one core for each side")
    first.set(xlabel="RTT (ms)", ylabel="s", yscale="log", title="Time to first token, a prompt of 45 tokens")
    for axes in (speed, first, size):
        axes.grid(True, which="both", alpha=0.3)
        axes.legend(fontsize=7)
    sheet.tight_layout()
    path = RESULTS / "network.svg"
    sheet.savefig(path, metadata={"Date": None})
    pyplot.close(sheet)
    return path
