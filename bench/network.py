"""`make bench-network`: tokens per second and time to first token over real and emulated links, for each plan, with and without drafts,
against the device alone and the cloud alone, in one run with one core for each side.

Core 0 is the device's (and the link's, which works while the device waits), core 1 the cloud's; one thread each. Every answer is greedy and
checked against the unsplit model's with the same adapter: drafts and links may not change a token but where its two best logits are nearly
tied. Rounds go over everything, so that a noisy minute touches all alike.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plora.artifact.errors import ArtifactError, UsageError
from plora.artifact.manifest import CloudManifest, EdgeManifest, read_manifest
from plora.models.plan_flags import PlanChoice

from .conditions import ROOT, write_results
from .link import link_process
from .llama import DeviceOnly
from .network_plot import plot
from .plans import make_adapter
from .processes import BIN, cloud, pin, run
from .profiles import PROFILES, RTT_SWEEP_MILLIS, Profile, rtt_only
from .prompts import PROMPTS, Prompt
from .run import model_path
from .worker import Worker

SCRATCH = ROOT / "out" / "network"
DEVICE_CORE, CLOUD_CORE = 0, 1
NEAR_TIE = 1e-3
"""Of the two best logits (design, part 4): there another batch shape may turn the choice."""
CORE_SIZE = 0.002
"""Standard deviation of the random cores: they change the logits, and the model still does what the prompts ask."""
PLANS = {
    "paper": PlanChoice("paper"),
    "grouped": PlanChoice("grouped", group=6),
    "entry-own": PlanChoice("entry", front_layers=4),
    "entry": PlanChoice("entry", front_layers=4, shared_injection=2048),
}
"""As in bench/plans.py; entry-own: each core its own injection."""
NEW_TOKENS = {"paper": 5, "grouped": 16, "entry-own": 32, "entry": 48}
"""Of an answer: a plan that is slow has a steady pace, and drafts want some text to work on."""
EVERY_PROMPT = ("20", "80")
"""Links for which every plan answers every prompt, grouped and entry with drafts, too. Over the others each answers one short prompt, and
the entry plan, with and without drafts, one that repeats itself as well."""
ONE, REPEATING = "chat", "repeat"
MODES = {"plain": {}, "drafts": {"speculate": True}}


@dataclass(frozen=True, eq=False)
class Cell:
    """One thing to measure: a plan over a link with a prompt, with drafts or without."""

    plan: str
    link: str
    prompt: Prompt
    mode: str

    @property
    def count(self) -> int:
        return min(NEW_TOKENS[self.plan], self.prompt.new_tokens)


def links() -> dict[str, Profile]:
    return {**{f"{millis:g}": rtt_only(millis) for millis in RTT_SWEEP_MILLIS}, **{n: p for n, p in PROFILES.items() if n != "loopback"}}


def cells(plans: list[str]) -> list[Cell]:
    return [
        Cell(plan, link, prompt, mode)
        for link in links()
        for plan in plans
        for prompt in PROMPTS
        for mode in MODES
        if wanted(plan, link, prompt, mode)
    ]


def wanted(plan: str, link: str, prompt: Prompt, mode: str) -> bool:
    """The paper's plan is not measured with drafts: it is what the others are held against."""
    if link in EVERY_PROMPT:
        return mode == "plain" or plan in ("grouped", "entry")
    return prompt.name in (ONE, REPEATING) if plan == "entry" else prompt.name == ONE and mode == "plain"


def make_exports(base: str, plans: list[str]) -> str:
    """out/network/<plan> for each that is not there yet; returns an HF folder of the base, which loads fast."""
    copy = SCRATCH / "base"
    if not copy.is_dir():
        from plora.models.checkpoint import read_base, read_tokenizer

        loaded = read_base(base)
        loaded.model.save_pretrained(copy)
        read_tokenizer(loaded.source).save_pretrained(copy)
    missing = [name for name in plans if not current(SCRATCH / name)]
    if missing:
        from plora.models.checkpoint import read_base

        loaded = read_base(str(copy))
        for name in missing:
            shutil.rmtree(SCRATCH / name, ignore_errors=True)
            make_adapter(loaded, PLANS[name], adapter_of(name), CORE_SIZE)
        del loaded
    for name in missing:
        print(f"exporting {name}", file=sys.stderr, flush=True)
        run(BIN / "plora-export", copy, "--adapter", adapter_of(name), "--out", SCRATCH / name)
    return str(copy)


def current(out: Path) -> bool:
    """Whether there is an export that this plora reads."""
    try:
        read_manifest(CloudManifest, out / "cloud")
        read_manifest(EdgeManifest, out / "edge")
    except ArtifactError:
        return False
    return True


def adapter_of(plan: str) -> Path:
    return SCRATCH / f"{plan}-adapter"


def prompt_ids() -> dict[str, list[int]]:
    from plora.device_runtime.text import Text

    edge = SCRATCH / "entry" / "edge"
    text = Text(edge, read_manifest(EdgeManifest, edge))
    return {prompt.name: text.encode_chat(list(prompt.messages)) for prompt in PROMPTS}


class Sides:
    """All processes: per plan a cloud, a device and an unsplit model; llama.cpp if it can be had; a link at a time."""

    def __init__(self, stack: ExitStack, base: str, plans: list[str]) -> None:
        self.clouds, self.devices, self.unsplit = {}, {}, {}
        for name in plans:
            server = stack.enter_context(cloud(SCRATCH / name / "cloud", 1))
            pin(server.pid, CLOUD_CORE)
            self.clouds[name] = server.address
            self.devices[name] = self._worker(stack, DEVICE_CORE, "split", SCRATCH / name / "edge", server.address, "1")
            self.unsplit[name] = self._worker(stack, CLOUD_CORE, "unsplit", base, adapter_of(name), "1")
        self.llama: DeviceOnly | None = None
        self.llama_missing = ""
        try:
            self.llama = DeviceOnly(Path(model_path()), 1)
            stack.callback(self.llama.close)
            pin(self.llama.process.pid, DEVICE_CORE)
        except UsageError as error:
            self.llama_missing = str(error)
            print(f"without llama.cpp: {error}", file=sys.stderr, flush=True)

    @staticmethod
    def _worker(stack: ExitStack, core: int, *arguments: str | Path) -> Worker:
        worker = Worker(*arguments)
        stack.callback(worker.close)
        pin(worker.process.pid, core)
        return worker


def measure(sides: Sides, wanted: list[Cell], ids: dict[str, list[int]], rounds: int) -> tuple[dict[Cell, list[Any]], dict[str, Any]]:
    """Answers by cell, and those of either side alone by prompt."""
    answers: dict[Cell, list[Any]] = {cell: [] for cell in wanted}
    alone: dict[str, dict[str, list[Any]]] = {"device": {}, **{plan: {} for plan in sides.devices}}
    profiles = links()
    for number in range(1, rounds + 1):
        for prompt in PROMPTS:
            for plan, worker in sides.unsplit.items():
                alone[plan].setdefault(prompt.name, []).append(
                    worker.generate(ids[prompt.name], min(max(NEW_TOKENS.values()), prompt.new_tokens))
                )
            if sides.llama is not None:
                timed = sides.llama.generate(ids[prompt.name], min(max(NEW_TOKENS.values()), prompt.new_tokens))
                alone["device"].setdefault(prompt.name, []).append({"seconds": timed.seconds, "first_seconds": timed.first_seconds})
        for link, profile in profiles.items():
            own = [cell for cell in wanted if cell.link == link]
            with ExitStack() as stack:
                addresses = {plan: stack.enter_context(link_process(sides.clouds[plan], profile)) for plan in {cell.plan for cell in own}}
                for each in addresses.values():
                    pin(each.pid, DEVICE_CORE)
                for cell in own:
                    options = {"cloud": addresses[cell.plan].address, **MODES[cell.mode]}
                    answers[cell].append(sides.devices[cell.plan].generate(ids[cell.prompt.name], cell.count, **options))
            print(f"round {number} of {rounds}: {link}", file=sys.stderr, flush=True)
    return answers, alone


def rate(answers: list[Any]) -> dict[str, float]:
    """Of repeated answers to one prompt: median tokens per second after the first, their spread, median time to first token."""
    rates = [len(answer["seconds"]) / sum(answer["seconds"]) for answer in answers]
    return {
        "tokens_per_second": statistics.median(rates),
        "slowest": min(rates),
        "fastest": max(rates),
        "ttft_seconds": statistics.median(answer["first_seconds"] for answer in answers),
    }


def over_prompts(rates: list[float]) -> float:
    """Tokens per second of an equal number of tokens of each prompt: the harmonic mean."""
    return statistics.harmonic_mean(rates)


def check(cell: Cell, got: list[int], unsplit: dict[str, Any]) -> str:
    """equal; tie: other than the unsplit model's from a token on where its two best logits nearly tie; else wrong."""
    expected = unsplit["tokens"][: len(got)]
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a != b:
            return "tie" if unsplit["gaps"][index] < NEAR_TIE else "wrong"
    return "equal"


def report(answers: dict[Cell, list[Any]], alone: dict[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {"plans": {}, "tokens": {"equal": 0, "tie": 0, "wrong": 0}}
    for cell, own in answers.items():
        entry = {**rate(own), "new_tokens": cell.count}
        stats = [answer["stats"] for answer in own]
        for name in ("bytes_up_per_token", "bytes_down_per_token", "round_trips_per_token", "drafted_tokens", "accepted_tokens"):
            entry[name] = statistics.median(one[name] for one in stats)
        figures["plans"].setdefault(cell.plan, {}).setdefault(cell.mode, {}).setdefault(cell.link, {})[cell.prompt.name] = entry
        for answer in own:
            figures["tokens"][check(cell, answer["tokens"], alone[cell.plan][cell.prompt.name][0])] += 1
    figures["cloud_only"] = {plan: {name: rate(own) for name, own in alone[plan].items()} for plan in figures["plans"]}
    figures["device_only"] = {name: rate(own) for name, own in alone["device"].items()}
    return figures


def headline(figures: dict[str, Any]) -> dict[str, Any]:
    """The ratios, over all prompts (or those that repeat themselves); the best lossless configuration is one for all of them."""

    def speed(plan: str, mode: str, link: str, names: list[str]) -> float:
        return over_prompts([figures["plans"][plan][mode][link][name]["tokens_per_second"] for name in names])

    every, repeating = [prompt.name for prompt in PROMPTS], [prompt.name for prompt in PROMPTS if prompt.repeats]
    configurations = [(plan, mode) for plan, modes in figures["plans"].items() for mode in modes if plan != "paper"]
    found: dict[str, Any] = {}
    for link in ("20", "80"):
        best = max(configurations, key=lambda each: speed(*each, link, every))
        found[f"best_at_{link}ms"] = " with ".join(best)
        found[f"best_over_paper_{link}ms"] = speed(*best, link, every) / speed("paper", "plain", link, every)
    plan, mode = max(configurations, key=lambda each: speed(*each, "20", every))
    alone = figures["cloud_only"][plan]
    merged = figures["cloud_only"]["paper"]
    for name, names in (("best", every), ("repeating", repeating)):
        own = speed(plan, "drafts" if name == "repeating" else mode, "20", names)
        found[f"{name}_over_cloud_only_20ms"] = own / over_prompts([alone[one]["tokens_per_second"] for one in names])
        found[f"{name}_over_merged_cloud_only_20ms"] = own / over_prompts([merged[one]["tokens_per_second"] for one in names])
    found["plain_over_cloud_only_20ms"] = speed(plan, "plain", "20", every) / over_prompts(
        [alone[one]["tokens_per_second"] for one in every]
    )
    if figures["device_only"]:
        short = [ONE, REPEATING]
        device = over_prompts([figures["device_only"][one]["tokens_per_second"] for one in short])
        found["best_over_device_only_5g"] = speed(plan, mode, "5g", short) / device
    return found


def table(figures: dict[str, Any]) -> str:
    """Tokens per second by link: of the short prompt plain, and of the repeating one with drafts where that was measured."""
    columns = [(plan, "plain", ONE) for plan in figures["plans"]] + [("entry", "plain", REPEATING), ("entry", "drafts", REPEATING)]
    columns = [column for column in columns if column[0] in figures["plans"]]
    lines = ["| link | " + " | ".join(", ".join(column) for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for link in links():
        rates = [figures["plans"][plan][mode][link][name]["tokens_per_second"] for plan, mode, name in columns]
        lines.append(f"| {link} | " + " | ".join(f"{each:.1f}" for each in rates) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed over networks, by plan.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--plans", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="PLAN", help="some; nothing is written then"
    )
    parser.add_argument("--export-only", action="store_true", help="make out/network/<plan> and stop")
    arguments = parser.parse_args()
    base = make_exports(model_path(), arguments.plans)
    if arguments.export_only:
        return
    with ExitStack() as stack:
        sides = Sides(stack, base, arguments.plans)
        answers, alone = measure(sides, cells(arguments.plans), prompt_ids(), arguments.rounds)
        missing = sides.llama_missing
    figures = report(answers, alone)
    (SCRATCH / "figures.json").write_text(json.dumps(figures), encoding="utf-8")  # half an hour's work, whatever comes next
    print(table(figures))
    print(figures["tokens"])
    if arguments.plans != list(PLANS):
        return
    figures = {**headline(figures), "rounds": arguments.rounds, "device_only_missing": missing, **figures}
    for name in ("cuts", "cuts_with_wrong_tokens"):
        figures[name] = cut_figures().get(name)
    print({name: value for name, value in figures.items() if not isinstance(value, dict)})
    print(write_results("network", figures, "make bench-network"), plot(figures))


def cut_figures() -> dict[str, Any]:
    """What bench/cuts.py found last, on its own conditions (docs/results/cuts.json)."""
    path = ROOT / "docs" / "results" / "cuts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"{error.cmd[0]}: {error.stderr}")
