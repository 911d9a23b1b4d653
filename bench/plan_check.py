"""`make bench-plan`: what plora-plan foretells of plans, beside what is measured of them over emulated links in the same run.

The planner knows what a person without an export knows: the link's figures as stated, a decoder layer of random weights timed on this
machine, sizes. The measurement is the whole thing: export, cloud and device as processes of their own, one core and one thread each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plora.artifact.plan import TARGETS
from plora.artifact.plans import QKV
from plora.device_runtime.forecast import LinkFigures
from plora.planner.candidates import Candidate
from plora.planner.machine import OVERHEAD_SECONDS, measure
from plora.planner.predict import World, predict
from plora.protocol import read_precision

from .conditions import ROOT, write_results
from .doctor import Figures, errors, measured, medians
from .link import link_process
from .network import CORE_SIZE, current
from .processes import cloud, pin
from .profiles import PROFILES, Profile
from .run import model_path

SCRATCH = ROOT / "out" / "plan"
DEVICE_CORE, CLOUD_CORE = 0, 1
LINKS = ("wifi", "5g", "lte")
PROMPT_TOKENS = 128
WIRE = "fp16"


@dataclass(frozen=True)
class Plan:
    """new_tokens: of the answer that is timed: a plan that is slow has a steady pace."""

    candidate: Candidate
    new_tokens: int


PLANS = {
    "entry": Plan(Candidate(4, 0, False, TARGETS, 2048, 64), 40),
    "entry, front 0, small": Plan(Candidate(0, 0, False, QKV, 128, 16), 40),
    "entry, front 8, unshared": Plan(Candidate(8, 0, False, TARGETS, 0, 64), 40),
    "entry + 4 exchanges": Plan(Candidate(4, 4, False, TARGETS, 2048, 64), 20),
    "own inputs, q,k,v": Plan(Candidate(0, 30, True, QKV, 0, 64), 6),
}


def make_exports(base: str, plans: list[str]) -> None:
    """out/plan/<number> for each that is not there yet: random basis and cores, which cost what tuned ones do; not verified."""
    import torch

    from plora.export.config import ExportConfig
    from plora.export.halves import write_halves
    from plora.models.adapter import replace_cores, write_adapter
    from plora.models.basis import new_adapter
    from plora.models.checkpoint import read_base, read_tokenizer

    missing = [name for name in plans if not current(folder(name))]
    copy = SCRATCH / "base"
    if not missing:
        return
    loaded = read_base(base)
    if not copy.is_dir():
        loaded.model.save_pretrained(copy)
        read_tokenizer(loaded.source).save_pretrained(copy)
    for name in missing:
        print(f"exporting {name}", file=sys.stderr, flush=True)
        adapter = new_adapter(loaded, PLANS[name].candidate.plan(loaded.shape.layers), "random", 1.0, 0)
        generator = torch.Generator().manual_seed(1)
        cores = {core: CORE_SIZE * torch.randn(values.shape, generator=generator) for core, values in adapter.cores.items()}
        own = folder(name)
        write_adapter(replace_cores(adapter, cores), own.with_name(f"{own.name}-adapter"), True)
        own.mkdir(exist_ok=True)
        write_halves(ExportConfig(str(copy), own.with_name(f"{own.name}-adapter"), own), own, lambda stage: None)


def folder(name: str) -> Path:
    return SCRATCH / str(list(PLANS).index(name))


def world(base: str, link: Profile) -> World:
    """As `plora-plan` without --doctor and without stated speeds has it; the base's sizes are read once."""
    from plora.models.checkpoint import read_skeleton

    shape, bare = read_skeleton(base)
    device, behind = (measure(shape, 1, head, lambda line: None) for head in (True, False))
    rtt = link.rtt_millis / 1e3
    figures = LinkFigures(rtt, rtt, rtt, 0.0, 1, (link.up_mbits or 1e3) * 1e6, (link.down_mbits or 1e3) * 1e6)
    return World(shape, bare, figures, device, behind, read_precision(WIRE), "fp32", PROMPT_TOKENS)


def predicted(name: str, own: World) -> Figures:
    plan = PLANS[name].candidate.plan(own.shape.layers)
    figures = predict(plan, own)
    return {
        "tokens_per_second": figures.tokens_per_second,
        "ttft_millis": figures.first_token_millis,
        "megabytes_per_1000_tokens": figures.megabytes_per_1000_tokens,
        "device_megabytes": figures.device_megabytes,
    }


def truth(name: str, address: str, link: Profile) -> Figures:
    edge = folder(name) / "edge"
    with link_process(address, link) as between:
        pin(between.pid, DEVICE_CORE)
        found = measured(edge, between, 1, WIRE, PLANS[name].new_tokens, (PROMPT_TOKENS,))
    files = sum(path.stat().st_size for path in edge.iterdir() if path.suffix != ".ort" and path.name != "tokenizer.json")
    return {
        "tokens_per_second": found["tokens_per_second"],
        "ttft_millis": 1e3 * found[f"first_token_{PROMPT_TOKENS}_seconds"],
        "megabytes_per_1000_tokens": found["up_megabytes_per_1000_tokens"] + found["down_megabytes_per_1000_tokens"],
        "device_megabytes": files / 1e6,
    }


def check(names: list[str], links: list[str], rounds: int) -> dict[str, Any]:
    """By link and plan: predicted, measured and the relative error, medians of `rounds` turns."""
    base = str(SCRATCH / "base")
    found: dict[str, Any] = {}
    os.sched_setaffinity(0, {DEVICE_CORE})
    with ExitStack() as stack:
        servers = {name: stack.enter_context(cloud(folder(name) / "cloud", 1)) for name in names}
        for server in servers.values():
            pin(server.pid, CLOUD_CORE)
        for link in links:
            guesses: dict[str, list[Figures]] = {name: [] for name in names}
            truths: dict[str, list[Figures]] = {name: [] for name in names}
            for _ in range(rounds):
                own = world(base, PROFILES[link])
                for name in names:
                    guesses[name].append(predicted(name, own))
                    truths[name].append(truth(name, servers[name].address, PROFILES[link]))
            found[link] = {}
            for name in names:
                guess, right = medians(guesses[name]), medians(truths[name])
                found[link][name] = {"predicted": guess, "measured": right, "error": errors(guess, right)}
                print(f"{link}, {name}: {words(found[link][name])}", flush=True)
    return found


def words(own: dict[str, Figures]) -> str:
    return ", ".join(
        f"{figure} {own['predicted'][figure]:.3g} / {right:.3g} ({own['error'][figure]:+.0%})" for figure, right in own["measured"].items()
    )


def largest(figures: dict[str, Any]) -> Figures:
    """The largest errors, by figure."""
    each = [plan["error"] for plans in figures.values() for plan in plans.values()]
    return {name: max((errors[name] for errors in each), key=abs) for name in each[0]}


def typical(figures: dict[str, Any]) -> Figures:
    """Medians of the errors' sizes, by figure."""
    each = [plan["error"] for plans in figures.values() for plan in plans.values()]
    return {name: statistics.median(abs(errors[name]) for errors in each) for name in each[0]}


def table(figures: dict[str, Any]) -> str:
    """Markdown: predicted / measured (error)."""
    names = list(next(iter(next(iter(figures.values())).values()))["measured"])
    lines = [f"| link | plan | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for link, plans in figures.items():
        for plan, own in plans.items():
            cells = [f"{own['predicted'][name]:.3g} / {own['measured'][name]:.3g} ({own['error'][name]:+.0%})" for name in names]
            lines.append(f"| {link} | {plan} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plan_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="turns of predicting and measuring on each link; medians count")
    parser.add_argument(
        "--plans", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="PLAN", help="some; nothing is written then"
    )
    parser.add_argument("--links", nargs="+", choices=list(PROFILES), default=list(LINKS), metavar="NAME", help="likewise")
    arguments = parser.parse_args()
    make_exports(model_path(), arguments.plans)
    figures = check(arguments.plans, arguments.links, arguments.rounds)
    print(table(figures))
    print("largest errors:", ", ".join(f"{name} {error:+.0%}" for name, error in largest(figures).items()))
    print("typical errors:", ", ".join(f"{name} {error:.0%}" for name, error in typical(figures).items()))
    if arguments.plans != list(PLANS) or tuple(arguments.links) != LINKS:
        return
    conditions = {
        "model": "SmolLM2-135M-Instruct",
        "rounds": arguments.rounds,
        "wire_dtype": WIRE,
        "prompt_tokens": PROMPT_TOKENS,
        "threads_device": 1,
        "threads_cloud": 1,
        "overhead_millis_per_round_trip": 1e3 * OVERHEAD_SECONDS,
        "links": {name: asdict(PROFILES[name]) for name in LINKS},
        "plans": {name: plan.candidate.words for name, plan in PLANS.items()},
    }
    figures = {**conditions, "largest": largest(figures), "typical": typical(figures), "profiles": figures}
    print(write_results("plan", figures, "make bench-plan"))


if __name__ == "__main__":
    main()
