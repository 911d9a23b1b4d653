"""The exchange plans side by side on SmolLM2: each exported, served over loopback and compared with its unsplit model in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plora.artifact.cost import RTTS_MILLIS, tokens_per_second
from plora.models.plan_flags import PlanChoice

from .conditions import RESULTS
from .decode import compare
from .processes import BIN, run

CORE_SIZE = 0.02
"""Standard deviation of the random cores: large enough to change what the model says."""

PLANS = {
    "paper": PlanChoice("paper"),
    "grouped": PlanChoice("grouped", group=6),
    "entry, no front layer": PlanChoice("entry"),
    "entry, each core its own": PlanChoice("entry", front_layers=4),
    "entry": PlanChoice("entry", front_layers=4, shared_injection=2048),
}
"""Rank 64; all seven targets but for the paper's plan, which adapts q, k and v. "entry" is the demo's."""


def make_adapter(base: Any, choice: PlanChoice, folder: Path, core_size: float = CORE_SIZE) -> None:
    """A random basis and random cores: what they hold does not change what they cost."""
    import torch

    from plora.models.adapter import replace_cores, write_adapter
    from plora.models.basis import new_adapter

    adapter = new_adapter(base, choice.plan(base.shape.layers), "random", 1.0, 0)
    generator = torch.Generator().manual_seed(1)
    cores = {name: core_size * torch.randn(core.shape, generator=generator) for name, core in adapter.cores.items()}
    write_adapter(replace_cores(adapter, cores), folder)


def compare_plans(base: str, scratch: Path, rounds: int, names: list[str]) -> dict[str, Any]:
    """Figures of decode.compare by plan. base: an HF folder, which loads fast."""
    from plora.models.checkpoint import read_base

    loaded = read_base(base)
    for name in names:
        make_adapter(loaded, PLANS[name], scratch / name / "adapter")
    layers = loaded.shape.layers
    del loaded
    figures: dict[str, Any] = {}
    for name in names:
        adapter, out = scratch / name / "adapter", scratch / name / "out"
        run(BIN / "plora-export", base, "--adapter", adapter, "--out", out)
        figures[name] = compare(base, adapter, out, rounds)
        figures[name]["edge_bytes"] = sum(path.stat().st_size for path in (out / "edge").iterdir() if path.suffix != ".ort")
        figures[name]["cloud_bytes"] = (out / "cloud" / "cloud.pt").stat().st_size
        millis, plan = figures[name]["split_token_millis"]["median"], PLANS[name].plan(layers)
        figures[name]["predicted_tokens_per_second"] = {f"{rtt:g}": tokens_per_second(plan, rtt, millis) for rtt in RTTS_MILLIS}
        print(f"{name}: {plan_line(figures[name])}", flush=True)
    return figures


def plan_line(figures: dict[str, Any]) -> str:
    socket = figures["socket"]
    return (
        f"split {figures['split_token_millis']['median']:.1f} ms, unsplit {figures['unsplit_token_millis']['median']:.1f} ms, "
        f"{figures['split_over_unsplit']:.2f}; {socket['round_trips_per_token']:.2f} round trips, "
        f"{socket['up_bytes_per_token']:,.0f} B up, {socket['down_bytes_per_token']:,.0f} B down, "
        f"reduction {100 * socket['communication_reduction']:.1f} %, tokens equal: {figures['tokens_equal']}"
    )


def plot_plans(figures: dict[str, Any]) -> Path:
    """Tokens per second over RTT: measured at 0, predicted beyond from what was measured there."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "plora"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0))
    for name, plan in figures.items():
        rates = plan["predicted_tokens_per_second"]
        trips = plan["socket"]["round_trips_per_token"]
        axes.plot([float(rtt) for rtt in rates], list(rates.values()), marker="o", label=f"{name} ({trips:.0f} round trips)")
    axes.set(xlabel="RTT (ms)", ylabel="tokens/s", yscale="log", title="SmolLM2-135M, 2 cores: compute measured, network predicted")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path = RESULTS / "plans.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
