"""The whole study, one command: `python -m bench.quality.study`. Learning rates first, then every method on every task, then more seeds.

What has been run is kept in docs/results/quality-runs.jsonl and not run again; Ctrl-C loses the runs in progress and no other.
`python -m bench.quality.shares` makes the figures of what there is, at any time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..conditions import RESULTS
from ..run import model_path
from .methods import HEADLINE, METHODS
from .runs import Bench, Run, Store, check_tasks, perform
from .sweep import MIXTURE, SWEEP_STEPS, Search
from .tasks import DATA, NAMES

STEPS = {"gsm8k": 112, "e2e": 96, "persona": 130}
"""At --times 1, which is sized for two cores."""
ANSWERED = {"gsm8k": 40, "e2e": 56, "persona": 96}
"""Questions answered in words by a final run of the first seed."""
RUNS = RESULTS / "quality-runs.jsonl"


def finals(store: Store, methods: list[str], tasks: tuple[str, ...], seeds: int, times: float) -> Iterator[Run]:
    """First every method once, then the headline's other seeds. Methods whose search has not ended are left out."""
    for seed in range(seeds):
        for task in tasks:
            for method in methods if seed == 0 else [each for each in methods if each in HEADLINE]:
                search = Search.of(store, METHODS[method], times)
                if search.best is not None:
                    asked = ANSWERED[task] if seed == 0 and (task != "gsm8k" or method in ("lora", "lora-all", "entry")) else 0
                    yield Run("final", task, method, search.best[task], seed, round(STEPS[task] * times), asked)


def bases(tasks: tuple[str, ...]) -> Iterator[Run]:
    """The base as it is."""
    for task in tasks:
        yield Run("final", task, "base", 0.0, 0, 0, ANSWERED[task])


def next_run(store: Store, begun: set[str], methods: list[str], tasks: tuple[str, ...], seeds: int, times: float) -> Run | None:
    """What to do next; None if nothing can be begun until a run in progress ends, or ever."""
    for method in methods:
        rate = Search.of(store, METHODS[method], times).wanted
        if rate is not None:
            run = Run("sweep", MIXTURE, method, rate, 0, round(SWEEP_STEPS * times))
            if run.key not in begun:
                return run
    for run in [*finals(store, methods, tasks, seeds, times), *bases(tasks)]:
        if run not in store and run.key not in begun:
            return run
    return None


def work(bench: Bench, threads: int, asked: Any, answered: Any) -> None:
    """A process that performs runs until it is told None."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    while (run := asked.get()) is not None:
        answered.put(perform(bench, run, lambda text: None))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder, hub id or GGUF [SmolLM2-135M-Instruct, as installed]")
    parser.add_argument("--device", default="cpu", help="where to tune, as torch names it [cpu]")
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder of gsm8k/ and e2e/ [{DATA.relative_to(DATA.parent.parent)}]")
    parser.add_argument("--methods", default=",".join(METHODS), help="rows of the study, in the order to run them")
    parser.add_argument("--tasks", default=",".join(NAMES))
    parser.add_argument("--seeds", type=int, default=3, help="of the headline rows; the others have one [3]")
    parser.add_argument("--times", type=float, default=1.0, help="so many times the steps: to convergence where a GPU can be had [1]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each on a CPU [2]")
    parser.add_argument("--runs", type=Path, default=RUNS, help="file of what has been run; the committed study unless said")
    arguments = parser.parse_args()
    tasks, methods = tuple(arguments.tasks.split(",")), arguments.methods.split(",")
    check_tasks(tasks)
    if unknown := [name for name in methods if name not in METHODS]:
        parser.error(f"--methods {','.join(unknown)}: expected some of {', '.join(METHODS)}")
    bench = Bench(str(arguments.base or model_path()), arguments.device, arguments.data)
    run_all(bench, Store(arguments.runs), methods, tasks, arguments.seeds, arguments.times, arguments.workers)


def run_all(bench: Bench, store: Store, methods: list[str], tasks: tuple[str, ...], seeds: int, times: float, workers: int) -> None:
    context = multiprocessing.get_context("spawn")
    asked: Any = context.Queue()
    answered: Any = context.Queue()
    pool = [context.Process(target=work, args=(bench, 1, asked, answered), daemon=True) for _ in range(workers)]
    for process in pool:
        process.start()
    begun: set[str] = set()
    running = 0
    try:
        while True:
            while running < workers and (run := next_run(store, begun, methods, tasks, seeds, times)) is not None:
                begun.add(run.key)
                asked.put(run)
                running += 1
            if not running:
                break
            outcome = _next(answered, pool)
            store.add(outcome)
            running -= 1
            shown = {name: outcome[name] for name in ("kind", "task", "method", "rate", "seed", "nll", "seconds")}
            print(" ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in shown.values()), flush=True)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    finally:
        for process in pool:
            process.terminate()
            process.join()


def _next(answered: Any, pool: list[Any]) -> dict[str, Any]:
    """The next outcome; raises SystemExit if a worker died, whose error is on standard error."""
    while True:
        try:
            return answered.get(timeout=5)
        except queue.Empty:
            if any(not process.is_alive() for process in pool):
                sys.exit("a worker died: its error stands above; the same command goes on from here")


if __name__ == "__main__":
    main()
