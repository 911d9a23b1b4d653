"""`plora-device doctor` against the truth: what it predicts for plans on links, beside what is measured there in the same run.

    python -m bench.doctor [FOLDER …]

FOLDER: an export of one base with `cloud` and `edge`, by default each below out/network. On every link without cuts every plan is
measured, and predicted at its own cloud and at that of the plan before it.
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
from plora.protocol import read_precision

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


def measured(
    edge: Path, link: LinkProcess, threads: int, wire_dtype: str, new_tokens: int = NEW_TOKENS, prompts: Sequence[int] = PROMPTS
) -> Figures:
    """Plain greedy decoding behind a short prompt; bytes as they come out of the link; then prompts alone."""
    with open_session(edge, link.address, threads=threads, wire_dtype=wire_dtype) as session:
        session.text.defaults = dataclasses.replace(session.text.defaults, eos_token_ids=())  # always as many tokens as asked for
        list(session.stream(prompt(8), session.sampling(max_tokens=4, temperature=0.0)))
        session.forget()
        pieces = session.stream(prompt(PROMPT_TOKENS), session.sampling(max_tokens=new_tokens, temperature=0.0))
        next(pieces)
        before = link.counters()
        list(pieces)
        after = link.counters()
        assert session.answer is not None
        found = {
            "tokens_per_second": session.answer.stats.tokens_per_second,
            "up_megabytes_per_1000_tokens": (after.up_bytes - before.up_bytes) / (new_tokens - 1) / 1e3,
            "down_megabytes_per_1000_tokens": (after.down_bytes - before.down_bytes) / (new_tokens - 1) / 1e3,
        }
        for size in prompts:
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
    """By plan: measured; predicted at its own cloud; predicted_there: at that of plan `predicted_at`. Medians of `rounds` turns."""
    truth: dict[str, list[Figures]] = {name: [] for name in folders}
    names = list(folders)
    following = dict(zip(names, names[1:] + names[:1], strict=True))
    own: dict[str, list[Figures]] = {name: [] for name in folders}
    from_before: dict[str, list[Figures]] = {name: [] for name in folders}
    with ExitStack() as stack:
        links = {name: stack.enter_context(link_process(address, one)) for name, address in clouds.items()}
        for turn in range(rounds):
            for at in folders:
                edges = [folders[name] / "edge" for name in dict.fromkeys((at, following[at]))]
                report = examine(edges, links[at].address, read_precision(wire_dtype), threads)
                own[at].append(predicted(report.edges[0]))
                from_before[following[at]].append(predicted(report.edges[-1]))
                truth[at].append(measured(folders[at] / "edge", links[at], threads, wire_dtype))
                print(f"{one.name}, turn {turn + 1}, {at}: {line(own[at][-1], truth[at][-1])}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {}
    for at, name in sorted(following.items(), key=lambda pair: names.index(pair[1])):
        right, guess, other = medians(truth[name]), medians(own[name]), medians(from_before[name])
        found[name] = {"measured": right, "predicted": guess, "error": errors(guess, right)}
        if name != at:
            found[name] |= {"predicted_at": at, "predicted_there": other, "error_there": errors(other, right)}
    return found


def line(guess: Figures, truth: Figures) -> str:
    return ", ".join(f"{name} {guess[name]:.3g} / {truth[name]:.3g} ({error:+.0%})" for name, error in errors(guess, truth).items())


def largest(figures: dict[str, Any]) -> dict[str, Figures]:
    """The largest errors by figure, of plans predicted at their own cloud (error) and at another's (error_there)."""
    found: dict[str, Figures] = {}
    for kind in ("error", "error_there"):
        all_errors = [plan[kind] for plans in figures.values() for plan in plans.values() if kind in plan]
        if all_errors:
            found[kind] = {name: max((each[name] for each in all_errors), key=abs) for name in all_errors[0]}
    return found


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
                if "predicted_at" in plan:
                    print(f"  at {plan['predicted_at']}: {line(plan['predicted_there'], plan['measured'])}", flush=True)
    worst = largest(figures)
    for kind, each in worst.items():
        print(f"largest {kind}: {', '.join(f'{name} {error:+.0%}' for name, error in each.items())}")
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
