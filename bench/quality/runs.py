"""Runs: what is tuned, and what came of it, one JSON object a line, so that a study may be stopped, continued and enlarged."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from plora.artifact.errors import UsageError
from plora.models.checkpoint import Base, display_name, read_base, read_tokenizer

from .methods import METHODS, Method
from .score import ANSWER_TOKENS, answers, judge, row_nlls, text_rows
from .sweep import Search
from .tasks import DATA, NAMES, PRODUCTS, Sizes, Task, load, other_texts
from .train import batches, mixed, train

TASK_GUESS = {"gsm8k": 10**-0.5, "e2e": 1.0, "persona": 1.0}
"""Times a method's guess: where a search begins."""


@dataclass(frozen=True)
class Run:
    """One tuning run. answers: held-out questions answered in words, 0 for none."""

    task: str
    method: str
    rate: float
    seed: int
    steps: int
    answers: int = 0

    @property
    def key(self) -> str:
        return json.dumps(asdict(replace(self, answers=0)), sort_keys=True)


@dataclass(frozen=True)
class Bench:
    """Where runs happen. data: folder of the data sets."""

    base: str
    device: str = "cpu"
    data: Path = DATA
    sizes: Sizes = field(default_factory=Sizes)


@cache
def _opened(bench: Bench) -> tuple[Base, Any]:
    base = read_base(bench.base)
    base.model.float().requires_grad_(False)
    return base, read_tokenizer(base.source)


@cache
def _task(bench: Bench, name: str) -> Task:
    return load(name, _opened(bench)[1], bench.sizes, bench.data)


def perform(bench: Bench, run: Run, tell: Callable[[str], None], beat: float = math.inf) -> dict[str, Any]:
    """Tunes and judges. The base is as before afterwards. method "base": nothing is tuned. beat: a validation loss; a run that does not
    get below it is not judged by held-out rows, for nothing will be said of it."""
    base, _ = _opened(bench)
    torch.manual_seed(run.seed)
    began = time.monotonic()
    products = PRODUCTS[run.task]
    outcome: dict[str, Any] = {"base": display_name(bench.base), **asdict(run), "products": products}
    attached = None if run.method == "base" else METHODS[run.method].attach(base, run.seed)
    try:
        base.model.to(bench.device)
        if attached is not None:
            attached.to(bench.device)
            outcome["parameters"] = sum(each.numel() for each in attached.parameters() if each.requires_grad)
            steps = batches(_task(bench, run.task), run.steps, run.seed)
            outcome["train_loss"] = train(base.model, attached, base.shape.windows, steps, run.rate, products, tell)
        outcome |= _judged(bench, run, beat)
    finally:
        if attached is not None:
            attached.remove()
        base.model.to("cpu").requires_grad_(False)
    outcome["seconds"] = round(time.monotonic() - began, 1)
    return outcome


def _judged(bench: Bench, run: Run, beat: float) -> dict[str, Any]:
    base, tokenizer = _opened(bench)
    task, model, windows = _task(bench, run.task), base.model.eval(), base.shape.windows
    with mixed(model, PRODUCTS[run.task]):
        validation = _mean(*row_nlls(model, windows, task.validation))
        if not validation < beat:
            return {"validation_nll": validation}
        sums, counts = row_nlls(model, windows, task.held_out)
    found: dict[str, Any] = {"validation_nll": validation, "nll": _mean(sums, counts)}
    if run.task == "persona":
        found["other_nll"] = _mean(*row_nlls(model, windows, text_rows(tokenizer, other_texts(bench.data))))
    if run.answers:
        questions = task.questions[: run.answers]
        found |= judge(run.task, questions, answers(model, tokenizer, questions, ANSWER_TOKENS[run.task]))
    return found | {"rows": [round(each, 4) for each in sums], "tokens": counts, "groups": [len(group) for group in task.held_out]}


def _mean(sums: list[float], counts: list[int]) -> float:
    return sum(sums) / sum(counts)


class Store:
    """The outcomes so far, in a file that grows by lines. A line that a crash cut short is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                outcome = json.loads(line)
            except json.JSONDecodeError:
                continue
            self.outcomes[key_of(outcome)] = outcome

    def refuse_another_base(self, name: str) -> None:
        """Raises UsageError if a run here is of a base with another name: the figures of two must not be mixed."""
        if others := sorted({each["base"] for each in self.outcomes.values()} - {name}):
            raise UsageError(f"{self.path}: has runs of {', '.join(others)}, not of {name}; give another --runs FILE")

    def __contains__(self, run: Run) -> bool:
        return run.key in self.outcomes

    def add(self, outcome: dict[str, Any]) -> None:
        self.outcomes[key_of(outcome)] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" * cut + json.dumps(outcome) + "\n")

    def search(self, task: str, method: Method, steps: int) -> Search:
        """As far as it has come."""
        return Search.of(self._tries(task, method.name, steps), method.guess * TASK_GUESS[task])

    def _tries(self, task: str, method: str, steps: int) -> list[dict[str, Any]]:
        wanted = (task, method, 0, steps)
        return [each for each in self.outcomes.values() if (each["task"], each["method"], each["seed"], each["steps"]) == wanted]

    def results(self, task: str, method: str, steps: int) -> list[dict[str, Any]]:
        """By seed, at the best rate, once the search for it has ended; of "base", its only one. Without those that diverged."""
        if method == "base":
            rate, steps = 0.0, 0
        else:
            search = self.search(task, METHODS[method], steps)
            if search.wanted is not None or search.best is None:
                return []
            rate = search.best
        return sorted((each for each in self._at(task, method, rate, steps) if "rows" in each), key=lambda each: each["seed"])

    def judged(self, task: str, method: str, steps: int) -> list[dict[str, Any]]:
        """Tries of the first seed that were judged by held-out rows: each was the best when it was made. By rate."""
        return sorted((each for each in self._tries(task, method, steps) if "rows" in each), key=lambda each: each["rate"])

    def diverged(self, task: str, method: str, rate: float, steps: int) -> int:
        """Seeds whose loss at this rate was no number."""
        return sum("rows" not in each for each in self._at(task, method, rate, steps))

    def _at(self, task: str, method: str, rate: float, steps: int) -> list[dict[str, Any]]:
        wanted = (task, method, rate, steps)
        return [each for each in self.outcomes.values() if (each["task"], each["method"], each["rate"], each["steps"]) == wanted]


def key_of(outcome: dict[str, Any]) -> str:
    return Run(**{name: outcome[name] for name in ("task", "method", "rate", "seed", "steps")}).key


def check_tasks(names: tuple[str, ...]) -> None:
    if unknown := [name for name in names if name not in NAMES]:
        raise SystemExit(f"--tasks {','.join(unknown)}: expected some of {', '.join(NAMES)}")
