"""The whole study, one command: `python -m bench.quality.study`. Every method on every task at the best of its
learning rates; the other seeds of the headline and of a few more.

What has been run is kept in docs/results/quality-runs.jsonl and not run again; Ctrl-C loses the runs in progress and no other.
`python -m bench.quality.shares` makes the figures of what there is, at any time.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import queue
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plora.artifact.console import reports_errors
from plora.models.checkpoint import display_name

from ..conditions import RESULTS
from ..run import model_path
from .methods import HEADLINE, METHODS
from .runs import Bench, Run, Store, check_tasks, key_of, perform
from .tasks import DATA, NAMES, check_data

STEPS = {"gsm8k": 24, "e2e": 48, "persona": 130}
"""At --times 1, which is sized for two cores."""
ANSWERED = {"gsm8k": 40, "e2e": 56, "persona": 96}
"""Questions answered in words by runs of the first seed."""
SPEAKERS = ("base", "lora", "entry")
"""Methods whose answers to GSM8K are read: the base is hardly able to give any, so they tell little."""
SEVEN = ("lora-all", "bias-all")
"""What tunes all seven projections without a plan: the yardsticks of plans that have as many targets."""
LATER = (*SEVEN, "entry-rank-128")
"""Rows beside the headline that have its seeds, too; the last came nearest to LoRA on GSM8K."""
GSM8K_CURVES = ("entry-front-0", "entry-front-8", "entry-rank-32", "entry-rank-128", "entry-rank-192")
"""Front layers and ranks where one round trip falls short of LoRA."""
ROWS = {
    "persona": (*HEADLINE, *SEVEN, "entry-exchanges-4", "entry-qkv", "entry-2048", "entry-features-64", "entry-512"),
    "e2e": (*HEADLINE, *SEVEN, "entry-exchanges-4", "entry-qkv", "entry-2048", "entry-512"),
    "gsm8k": (*HEADLINE, *SEVEN, "entry-exchanges-4", "own-inputs", "entry-qkv", "entry-2048", *GSM8K_CURVES),
}
"""The methods of each task."""
RUNS = RESULTS / "quality-runs.jsonl"


def asked(task: str, method: str) -> int:
    """Questions that a run of the first seed answers in words."""
    return ANSWERED[task] if task != "gsm8k" or method in SPEAKERS else 0


def wanted_runs(store: Store, methods: list[str], tasks: tuple[str, ...], seeds: int, times: float) -> Iterator[tuple[Run, float]]:
    """What can be done now, in order, each with the validation loss to beat: the bases; of the headline the next try of every search, then
    the other seeds; the searches of the other methods, and the other seeds of some."""
    for task in tasks:
        yield Run(task, "base", 0.0, 0, 0, asked(task, "base")), math.inf
    steps = {task: round(STEPS[task] * times) for task in tasks}
    headline = [each for each in methods if each in HEADLINE]
    yield from _searches(store, headline, steps)
    yield from _other_seeds(store, headline, steps, seeds)
    yield from _searches(store, [each for each in methods if each not in HEADLINE], steps)
    yield from _other_seeds(store, [each for each in methods if each in LATER], steps, seeds)


def _other_seeds(store: Store, methods: list[str], steps: dict[str, int], seeds: int) -> Iterator[tuple[Run, float]]:
    """At the rate that the first seed's search found."""
    for seed in range(1, seeds):
        for task, method in itertools.product(steps, methods):
            for first in store.results(task, method, steps[task])[:1]:
                yield Run(task, method, first["rate"], seed, steps[task]), math.inf


def _searches(store: Store, methods: list[str], steps: dict[str, int]) -> Iterator[tuple[Run, float]]:
    for task, method in itertools.product(steps, methods):
        if method in ROWS[task]:
            search = store.search(task, METHODS[method], steps[task])
            if search.wanted is not None:
                yield Run(task, method, search.wanted, 0, steps[task], asked(task, method)), search.best_loss


def next_run(store: Store, running: dict[str, Run], *study: Any) -> tuple[Run, float] | None:
    """None if nothing can be begun until a run in progress ends, or ever. A search makes one try at a time."""
    searching = {(run.task, run.method) for run in running.values() if run.seed == 0}
    for run, beat in wanted_runs(store, *study):
        if run not in store and run.key not in running and (run.seed or (run.task, run.method) not in searching):
            return run, beat
    return None


def work(bench: Bench, threads: int, todo: Any, done: Any) -> None:
    """A process that performs runs until it is told None."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while (task := todo.get()) is not None:
        run, beat = task
        done.put(perform(bench, run, lambda text: None, beat))


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder, hub id or GGUF [SmolLM2-135M-Instruct, as installed]")
    parser.add_argument("--device", default="cpu", help="where to tune, as torch names it [cpu]")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of gsm8k/ and e2e/ [{DATA.relative_to(DATA.parent.parent)}]")
    parser.add_argument("--methods", default=",".join(METHODS), help="rows of the study, in the order to run them")
    parser.add_argument("--tasks", default=",".join(NAMES))
    parser.add_argument("--seeds", type=int, default=3, help=f"of the headline rows, {', '.join(LATER)}; the others have one [3]")
    parser.add_argument("--times", type=float, default=1.0, help="so many times the steps: to convergence where a GPU can be had [1]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each on a CPU [2]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file of what has been run; the committed study unless said")
    arguments = parser.parse_args()
    tasks, methods = tuple(arguments.tasks.split(",")), arguments.methods.split(",")
    check_tasks(tasks)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods {','.join(unknown)}: expected some of {', '.join(METHODS)}")
    bench = Bench(str(arguments.base or model_path()), arguments.device, arguments.data)
    store = Store(arguments.runs)
    store.refuse_another_base(display_name(bench.base))
    check_data(arguments.data)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell has us ignore it
    run_all(bench, store, methods, tasks, arguments.seeds, arguments.times, arguments.workers)


def run_all(bench: Bench, store: Store, methods: list[str], tasks: tuple[str, ...], seeds: int, times: float, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    todo: Any = context.Queue()
    done: Any = context.Queue()
    pool = [context.Process(target=work, args=(bench, 1, todo, done), daemon=True) for _ in range(workers)]
    for process in pool:
        process.start()
    running: dict[str, Run] = {}
    try:
        while True:
            while len(running) < workers and (found := next_run(store, running, methods, tasks, seeds, times)) is not None:
                running[found[0].key] = found[0]
                todo.put(found)
            if not running:
                break
            outcome = _next(done, pool)
            store.add(outcome)
            del running[key_of(outcome)]
            shown = [outcome[name] for name in ("task", "method", "rate", "seed", "validation_nll", "seconds")] + [outcome.get("nll", "")]
            print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown), flush=True)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    finally:
        for process in pool:
            process.terminate()
            process.join()


def _next(done: Any, pool: list[Any]) -> dict[str, Any]:
    """The next outcome; raises SystemExit if a worker died, whose error is on standard error."""
    while True:
        try:
            return done.get(timeout=5)
        except queue.Empty:
            if any(not process.is_alive() for process in pool):
                sys.exit("a worker died: its error stands above; the same command goes on from here")


if __name__ == "__main__":
    main()
