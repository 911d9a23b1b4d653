"""`plora-device doctor` against the truth: what it predicts for plans on links, beside what is measured there in the same run.

    python -m bench.doctor [FOLDER …]

FOLDER: an export of one base with `cloud` and `edge`, by default each below out/network. Every cloud runs; on every link every plan is
predicted from its own cloud and from each of the others', and measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from plora.device_runtime import open_session
from plora.device_runtime.doctor import EdgeReport, examine

from .conditions import ROOT, write_results
from .decode import prompt
from .link import LinkProcess, link_process
from .processes import cloud
from .profiles import PROFILES, Profile

FOLDERS = ROOT / "out" / "network"
STEADY = [one for one in PROFILES.values() if one.cuts is None]
GOAL = 0.15
PROMPT_TOKENS, NEW_TOKENS = 64, 48
PROMPTS = (128, 512)
Figures = dict[str, float]


def predicted(report: EdgeReport) -> Figures:
    own = report.forecast
    return {
        "tokens_per_second": own.tokens_per_second,
        **{f"first_token_{size}_seconds": own.first_token_seconds[size] for size in PROMPTS},
        "up_megabytes_per_1000_tokens": own.up_megabytes_per_1000_tokens,
        "down_megabytes_per_1000_tokens": own.down_megabytes_per_1000_tokens,
    }


def measured(edge: Path, link: LinkProcess, threads: int, wire_dtype: str) -> Figures:
    """Plain greedy decoding behind a short prompt; bytes as they come out of the link; then prompts alone."""
    with open_session(edge, link.address, threads=threads, wire_dtype=wire_dtype) as session:
        session.text.defaults = dataclasses.replace(session.text.defaults, eos_token_ids=())  # always as many tokens as asked for
        list(session.stream(prompt(8), session.sampling(max_tokens=4, temperature=0.0)))
        session.forget()
        pieces = session.stream(prompt(PROMPT_TOKENS), session.sampling(max_tokens=NEW_TOKENS, temperature=0.0))
        next(pieces)
        before = link.counters()
        list(pieces)
        after = link.counters()
        assert session.answer is not None
        found = {
            "tokens_per_second": session.answer.stats.tokens_per_second,
            "up_megabytes_per_1000_tokens": (after.up_bytes - before.up_bytes) / (NEW_TOKENS - 1) / 1e3,
            "down_megabytes_per_1000_tokens": (after.down_bytes - before.down_bytes) / (NEW_TOKENS - 1) / 1e3,
        }
        for size in PROMPTS:
            session.forget()
            list(session.stream(prompt(size), session.sampling(max_tokens=1, temperature=0.0)))
            found[f"first_token_{size}_seconds"] = session.answer.stats.ttft_seconds
    return found


def medians(runs: Sequence[Figures]) -> Figures:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def errors(got: Figures, truth: Figures) -> Figures:
    """Relative: above 0 where more was predicted than measured."""
    return {name: got[name] / truth[name] - 1 for name in got}


def on_link(one: Profile, clouds: dict[str, str], folders: dict[str, Path], rounds: int, threads: int, wire_dtype: str) -> dict[str, Any]:
    """By plan: measured, predicted by the doctor at its own cloud and (predicted_from) at each other's; medians of `rounds` turns."""
    truth: dict[str, list[Figures]] = {name: [] for name in folders}
    guesses: dict[tuple[str, str], list[Figures]] = {(name, at): [] for name in folders for at in folders}
    with ExitStack() as stack:
        links = {name: stack.enter_context(link_process(address, one)) for name, address in clouds.items()}
        for turn in range(rounds):
            for at in folders:
                order = [at, *(name for name in folders if name != at)]
                report = examine([folders[name] / "edge" for name in order], links[at].address, read(wire_dtype), threads)
                for name, edge in zip(order, report.edges, strict=True):
                    guesses[name, at].append(predicted(edge))
                truth[at].append(measured(folders[at] / "edge", links[at], threads, wire_dtype))
                print(f"{one.name}, turn {turn + 1}, {at}: {line(guesses[at, at][-1], truth[at][-1])}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for name in folders:
        own, right = medians(guesses[name, name]), medians(truth[name])
        others = {at: medians(guesses[name, at]) for at in folders if at != name}
        found[name] = {
            "measured": right,
            "predicted": own,
            "error": errors(own, right),
            "predicted_from": others,
            "error_from": {at: errors(guess, right) for at, guess in others.items()},
        }
    return found


def read(wire_dtype: str) -> Any:
    from plora.protocol import read_precision

    return read_precision(wire_dtype)


def line(guess: Figures, truth: Figures) -> str:
    return ", ".join(f"{name} {guess[name]:.3g} / {truth[name]:.3g} ({error:+.0%})" for name, error in errors(guess, truth).items())


def largest(figures: dict[str, Any]) -> dict[str, Any]:
    """The largest errors by figure: at a plan's own cloud, and from another plan's."""
    own = [plan["error"] for plans in figures.values() for plan in plans.values()]
    others = [each for plans in figures.values() for plan in plans.values() for each in plan["error_from"].values()]
    return {
        kind: {name: max((each[name] for each in all_errors), key=abs) for name in all_errors[0]}
        for kind, all_errors in (("error", own), ("error_from", others))
        if all_errors
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help=f"exports [default: each below {FOLDERS.relative_to(ROOT)}]"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of predicting and measuring on each link; medians count")
    parser.add_argument("--threads", type=int, default=1, help="of the device; a cloud has one")
    parser.add_argument("--wire-dtype", default="fp32")
    parser.add_argument(
        "--profiles", nargs="+", choices=[one.name for one in STEADY], metavar="NAME",
        help=f"some of {', '.join(one.name for one in STEADY)}; nothing is written then",
    )  # fmt: skip
    arguments = parser.parse_args()
    found = arguments.folders or sorted(path.parent for path in FOLDERS.glob("*/edge"))
    if not found:
        sys.exit(f"no exports below {FOLDERS}; name some")
    folders = {path.name: path for path in found}
    figures: dict[str, Any] = {}
    with ExitStack() as stack:
        clouds = {name: stack.enter_context(cloud(path / "cloud", 1)).address for name, path in folders.items()}
        for one in STEADY:
            if arguments.profiles and one.name not in arguments.profiles:
                continue
            figures[one.name] = on_link(one, clouds, folders, arguments.rounds, arguments.threads, arguments.wire_dtype)
            for name, plan in figures[one.name].items():
                print(f"{one.name}, {name}: {line(plan['predicted'], plan['measured'])}", flush=True)
                for at, guess in plan["predicted_from"].items():
                    print(f"  from {at}: {line(guess, plan['measured'])}", flush=True)
    worst = largest(figures)
    print("largest errors:", {kind: {name: f"{error:+.0%}" for name, error in each.items()} for kind, each in worst.items()})
    if arguments.profiles:
        return
    conditions = {
        "rounds": arguments.rounds,
        "threads_device": arguments.threads,
        "threads_cloud": 1,
        "wire_dtype": arguments.wire_dtype,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "goal": GOAL,
    }
    print(write_results("doctor", {**conditions, "largest": worst, "profiles": figures}, "python -m bench.doctor"))


if __name__ == "__main__":
    main()
