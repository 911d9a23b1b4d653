"""`make bench-load`: one server under 1 to 128 devices at once: tokens per second of all, time per token and to the first token, by RTT.

The devices are scripted (bench/scripted.py): they replay what real ones would send, so that their model's layers do not run on the cores
that are measured; what they and the link cost there all the same is reported. Each device holds one conversation after another: a prompt
of 32 tokens (every eighth: 160), then 96 tokens. Rounds go over everything, so that a noisy minute touches all alike.

A cell's figures are in out/load/raw.json as soon as it is measured; --report-only makes the report from there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil

from plora.artifact.manifest import EdgeManifest, read_manifest

from .conditions import ROOT, write_results
from .link import link_process
from .load_plot import plot
from .network import SCRATCH as EXPORTS
from .network import adapter_of, make_exports
from .processes import Cloud, cloud
from .profiles import PROFILES, Profile, rtt_only
from .recording import LONG_PROMPT_TOKENS, NEW_TOKENS, SCRATCH, make
from .run import model_path
from .scripted import Load

RAW = SCRATCH / "raw.json"
THREADS = 2
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128)
RTTS = ("0", "20", "80")
ONCE = 16
"""Devices over a link of which one number is measured."""
CEILING_BATCHES = (1, ONCE)
PROFILE_NAMES = ("wifi", "5g", "lte")
CONTEXT_TOKENS = LONG_PROMPT_TOKENS + NEW_TOKENS
WARM_SECONDS, SECONDS = 2.0, 4.0
QUICK_DEVICES, QUICK_SECONDS = (1, 4, 16), 3.0
IDLE = (64, 128, 192, 256)
IDLE_CONTEXT_TOKENS = 2048
"""The server's default: what a session could grow to may take memory before it does."""
IDLE_SHARE = 0.5
"""Of the memory that is free: sessions that would take more are not opened."""
PAIRS = 3
"""Times that the server and the ceilings are measured in turns."""
SETTLE_SECONDS = 5.0
"""From the last idle session's prompt to reading the server's memory."""


@dataclass(frozen=True)
class Cell:
    """One thing to measure. decode_only: each device decodes again and again behind its prompt, as a batch of an unsplit model does."""

    plan: str
    link: str
    devices: int
    decode_only: bool = False


def cells(quick: bool) -> list[Cell]:
    counts = QUICK_DEVICES if quick else DEVICES
    wanted = [Cell("entry", link, count) for link in RTTS for count in counts]
    wanted += [Cell("entry", "0", count, True) for count in (1, ONCE)]
    if not quick:
        wanted += [Cell("entry", name, ONCE) for name in PROFILE_NAMES]
        wanted += [Cell("paper", link, count) for link in ("0", "20") for count in (1, ONCE)]
    return wanted


def profile_of(link: str) -> Profile:
    return PROFILES[link] if link in PROFILES else rtt_only(float(link))


def kv_bytes(plan: str, tokens: int) -> int:
    """That many tokens take in the server's cache."""
    contract = read_manifest(EdgeManifest, EXPORTS / plan / "edge").contract
    return contract.shape.kv_bytes_per_token("fp32", contract.plan.cloud_layers) * tokens


class Raw:
    """out/load/raw.json: all that was measured, written after each cell."""

    def __init__(self, figures: dict[str, Any]) -> None:
        self.figures = figures

    def add(self, name: str, figure: dict[str, Any]) -> None:
        self.figures[name].append(figure)
        self.save()

    def save(self) -> None:
        RAW.parent.mkdir(parents=True, exist_ok=True)
        part = RAW.with_suffix(".part")
        part.write_text(json.dumps(self.figures), encoding="utf-8")
        part.replace(RAW)


def measure(raw: Raw, wanted: list[Cell], rounds: int, seconds: float) -> None:
    with ExitStack() as stack:
        clouds, loads = {}, {}
        for plan in dict.fromkeys(cell.plan for cell in wanted):
            most = max(cell.devices for cell in wanted if cell.plan == plan)
            flags = ("--context", str(CONTEXT_TOKENS))
            recordings = make(EXPORTS / plan, most)
            clouds[plan] = stack.enter_context(cloud(EXPORTS / plan / "cloud", THREADS, kv_bytes(plan, CONTEXT_TOKENS * most), *flags))
            loads[plan] = stack.enter_context(Load(EXPORTS / plan / "edge", recordings))
        for number in range(1, rounds + 1):
            for link in dict.fromkeys(cell.link for cell in wanted):
                for plan in clouds:
                    own = [cell for cell in wanted if (cell.link, cell.plan) == (link, plan)]
                    measure_link(raw, own, number, clouds[plan], loads[plan], seconds)


def measure_link(raw: Raw, own: list[Cell], number: int, server: Cloud, load: Load, seconds: float) -> None:
    """One round's cells of one link and plan."""
    if not own:
        return
    with link_process(server.address, profile_of(own[0].link)) as link:
        for cell in own:
            asked = {"devices": cell.devices, "decode_only": cell.decode_only, "warm_seconds": WARM_SECONDS, "seconds": seconds}
            found = load.ask(run={"address": link.address, "watch": {"cloud": server.pid, "link": link.pid}, **asked})
            raw.add("cells", {**asdict(cell), "round": number, **rounded(found)})
            cpu = ", ".join(f"{name} {spent / found['seconds']:.2f}" for name, spent in found["cpu_seconds"].items())
            print(
                f"round {number}: {cell.plan}, {cell.link}, {cell.devices} devices{', decode only' if cell.decode_only else ''}: "
                f"{found['tokens_per_second']:.1f} tokens/s, {found['wrong']} wrong of {found['judged_rows']}, cores: {cpu}",
                file=sys.stderr,
                flush=True,
            )


def rounded(found: Any) -> Any:
    """Times to 10 us: raw.json is long enough."""
    match found:
        case dict():
            return {name: rounded(value) for name, value in found.items()}
        case list():
            return [round(value, 5) if isinstance(value, float) else rounded(value) for value in found]
        case _:
            return found


def measure_idle(raw: Raw, plan: str, counts: tuple[int, ...]) -> None:
    """The server's memory with so many sessions that hold a prompt each and say nothing."""
    budget = kv_bytes(plan, IDLE_CONTEXT_TOKENS * max(counts))
    with ExitStack() as stack:
        server = stack.enter_context(cloud(EXPORTS / plan / "cloud", THREADS, budget, "--context", str(IDLE_CONTEXT_TOKENS)))
        load = stack.enter_context(Load(EXPORTS / plan / "edge", make(EXPORTS / plan, 1)))
        raw.add("idle", {"plan": plan, "sessions": 0, "rss_bytes": server.rss_bytes, "kv_bytes": 0})
        empty, sessions = server.rss_bytes, 0
        for count in counts:
            each = (server.rss_bytes - empty) / sessions if sessions else 0
            if each * (count - sessions) > IDLE_SHARE * psutil.virtual_memory().available:
                print(f"{count} idle sessions of {each / 1e6:.0f} MB are too many for this machine", file=sys.stderr, flush=True)
                break
            held = load.ask(idle={"address": server.address, "devices": count - sessions})
            sessions = held["sessions"]
            time.sleep(SETTLE_SECONDS)
            figure = {"plan": plan, "sessions": sessions, "rss_bytes": server.rss_bytes, "kv_bytes": kv_bytes(plan, held["cached_tokens"])}
            raw.add("idle", figure)
        load.ask(release={})


def measure_pairs(raw: Raw, plan: str, base: str, rounds: int, seconds: float) -> None:
    """The server with ONCE devices that only decode and the ceilings in turns, since the machine's speed drifts; into raw's `pairs`."""
    raw.figures["pairs"] = []
    for _ in range(rounds):
        measure(raw, [Cell(plan, "0", ONCE, True)], 1, seconds)
        served = raw.figures["cells"].pop()["tokens_per_second"]  # of another time than the other cells
        add_ceiling(raw, plan, base)
        alone = raw.figures["ceiling"][-1]
        raw.add("pairs", {"served": served, **{kind: alone[kind][str(ONCE)] for kind in ("engine", "model")}})


def add_ceiling(raw: Raw, plan: str, base: str) -> None:
    """Tokens per second of batches that only decode, in a process of their own: of the server's engine alone, and of the unsplit model."""
    command = [sys.executable, "-m", "bench.ceiling", EXPORTS / plan, *map(str, CEILING_BATCHES), "--threads", str(THREADS)]
    command += ["--base", base, "--adapter", adapter_of(plan)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    raw.add("ceiling", {"plan": plan, **json.loads(ended.stdout)})


# The report


def percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if len(values) else None


def median(values: list[float | None]) -> float | None:
    """Of those that there are."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One cell: medians over its rounds, of percentiles, too; sums of what was judged and what failed."""

    def pooled(one: dict[str, Any], name: str) -> list[float]:
        return [value for device in one["by_device"] for value in device[name]]

    rates = [one["tokens_per_second"] for one in rounds]
    found: dict[str, Any] = {"tokens_per_second": statistics.median(rates), "slowest": min(rates), "fastest": max(rates)}
    for percent in (50, 95, 99):
        found[f"token_seconds_p{percent}"] = median([percentile(pooled(one, "token_seconds"), percent) for one in rounds])
    for percent in (50, 95):
        found[f"ttft_seconds_p{percent}"] = median([percentile(pooled(one, "first_seconds"), percent) for one in rounds])
        opening = [[device["opening_seconds"] for device in one["by_device"] if device["opening_seconds"] is not None] for one in rounds]
        found[f"opening_ttft_seconds_p{percent}"] = median([percentile(each, percent) for each in opening])
    found["ttft_samples"] = sum(len(pooled(one, "first_seconds")) for one in rounds)
    found["prompt_tokens_per_second"] = statistics.median(one["prompt_tokens"] / one["seconds"] for one in rounds)
    for name in ("cloud", "link", "load"):
        found[f"{name}_cores"] = statistics.median(one["cpu_seconds"][name] / one["seconds"] for one in rounds)
    found["cloud_rss_bytes"] = statistics.median(one["rss_bytes"]["cloud"] for one in rounds)
    found["devices_ready"] = min(one["devices_ready"] for one in rounds)
    found["judged_rows"], found["wrong_rows"] = sum(one["judged_rows"] for one in rounds), sum(one["wrong"] for one in rounds)
    found["largest_error"] = max(one["largest_error"] for one in rounds)
    found["errors"] = {name: sum(one["errors"].get(name, 0) for one in rounds) for one in rounds for name in one["errors"]}
    return found


def interpolated(ratios: dict[int, float], wanted: float) -> float | None:
    """The smallest number of sessions at which the ratio is `wanted`, on a line between those measured; None if it never is."""
    below: tuple[int, float] | None = None
    for count, ratio in sorted(ratios.items()):
        if ratio >= wanted:
            return count if below is None else below[0] + (count - below[0]) * (wanted - below[1]) / (ratio - below[1])
        below = count, ratio
    return None


def report(raw: dict[str, Any]) -> dict[str, Any]:
    grouped: dict[Cell, list[dict[str, Any]]] = {}
    for one in raw["cells"]:
        grouped.setdefault(Cell(one["plan"], one["link"], one["devices"], one["decode_only"]), []).append(one)
    figures: dict[str, Any] = {"conversations": {}, "decode_only": {}}
    for cell, rounds in grouped.items():
        part = figures["decode_only" if cell.decode_only else "conversations"]
        part.setdefault(cell.plan, {}).setdefault(cell.link, {})[str(cell.devices)] = summary(rounds)
    figures["idle"] = raw["idle"]
    figures["pairs"] = raw.get("pairs", [])
    figures["ceiling"] = raw["ceiling"][-1] if raw["ceiling"] else {}
    return {**headline(figures), "rounds": max(len(rounds) for rounds in grouped.values()), "seconds": raw["seconds"], **figures}


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """Of the entry plan; what was not measured is None."""
    entry = figures["conversations"]["entry"]

    def rates(link: str) -> dict[int, float]:
        return {int(count): one["tokens_per_second"] for count, one in entry[link].items()}

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    near = rates("0")
    found: dict[str, Any] = {"aggregate_16_over_1": ratio(near.get(ONCE), near.get(1))}
    decoding = {int(count): one["tokens_per_second"] for count, one in figures["decode_only"].get("entry", {}).get("0", {}).items()}
    found["decode_only_16_over_1"] = ratio(decoding.get(ONCE), decoding.get(1))
    for name, kind in (("aggregate_16_over_unsplit_batch_16", "model"), ("aggregate_16_over_engine_batch_16", "engine")):
        found[name] = median([pair["served"] / pair[kind] for pair in figures["pairs"]])
    for link in RTTS[1:]:
        found[f"sessions_hiding_{link}ms"] = interpolated({count: rate / near[count] for count, rate in rates(link).items()}, 0.9)
    found["idle_session_bytes"] = idle_session_bytes(figures["idle"])
    summaries = [
        one for kind in ("conversations", "decode_only") for plan in figures[kind].values() for c in plan.values() for one in c.values()
    ]
    found["judged_rows"], found["wrong_rows"] = sum(one["judged_rows"] for one in summaries), sum(one["wrong_rows"] for one in summaries)
    found["largest_error"] = max(one["largest_error"] for one in summaries)
    return found


def idle_session_bytes(idle: list[dict[str, Any]]) -> dict[str, float]:
    """What a session takes besides its cached keys and values: from none to each number measured, and between the last two."""
    found = {}
    pairs = [(idle[0], each) for each in idle[1:]] + ([(idle[-2], idle[-1])] if len(idle) > 2 else [])
    for before, after in pairs:
        more = after["rss_bytes"] - before["rss_bytes"] - (after["kv_bytes"] - before["kv_bytes"])
        found[f"{before['sessions']}_to_{after['sessions']}"] = more / (after["sessions"] - before["sessions"])
    return found


def table(figures: dict[str, Any]) -> str:
    lines = [
        "| plan | link | devices | tokens/s | per token p50, p95 (ms) | first p50 (ms) | cloud, load cores | wrong |",
        "|---" * 8 + "|",
    ]
    for kind in ("conversations", "decode_only"):
        for plan, by_link in figures[kind].items():
            name = plan if kind == "conversations" else f"{plan}, decode only"
            for link, by_count in by_link.items():
                for count, one in by_count.items():
                    middle, tail, first = (millis(one[key]) for key in ("token_seconds_p50", "token_seconds_p95", "ttft_seconds_p50"))
                    cores = f"{one['cloud_cores']:.2f}, {one['load_cores']:.2f}"
                    rate = f"{one['tokens_per_second']:.1f}"
                    lines.append(f"| {name} | {link} | {count} | {rate} | {middle}, {tail} | {first} | {cores} | {one['wrong_rows']} |")
    return "\n".join(lines)


def millis(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="One server under many devices.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="few devices, short windows, one round; docs/results is not written")
    parser.add_argument("--report-only", action="store_true", help=f"from {RAW.name} of the last run")
    parser.add_argument("--pairs-only", action="store_true", help="the server and the ceilings in turns once more; the rest as it was")
    arguments = parser.parse_args()
    if not (arguments.report_only or arguments.pairs_only):
        wanted = cells(arguments.quick)
        base = make_exports(model_path(), list(dict.fromkeys(cell.plan for cell in wanted)))
        seconds = QUICK_SECONDS if arguments.quick else SECONDS
        raw = Raw({"quick": arguments.quick, "seconds": seconds, "cells": [], "idle": [], "ceiling": []})
        measure(raw, wanted, 1 if arguments.quick else arguments.rounds, seconds)
        measure_idle(raw, "entry", IDLE[:2] if arguments.quick else IDLE)
        measure_pairs(raw, "entry", base, PAIRS, seconds)
    if arguments.pairs_only:
        raw = Raw(json.loads(RAW.read_text(encoding="utf-8")))
        measure_pairs(raw, "entry", make_exports(model_path(), ["entry"]), PAIRS, SECONDS)
    saved = json.loads(RAW.read_text(encoding="utf-8"))
    figures = report(saved)
    print(table(figures))
    print({name: value for name, value in figures.items() if name not in ("conversations", "decode_only", "idle")})
    if not saved["quick"]:
        print(write_results("load", figures, "make bench-load"), plot(figures))


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]}: {error.stderr}")
