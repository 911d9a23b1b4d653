"""The study's three tasks as tokenised rows. Data sets are read where they lie; no row is copied into the project.

gsm8k: Cobbe et al., arXiv 2110.14168. e2e: Novikova, Dušek, Rieser, SIGDIAL 2017. persona: ours, persona.json.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from plora.models.rows import Example, tokenize

from ..conditions import ROOT

DATA = ROOT.parent / "shared" / "data"
PERSONA = Path(__file__).with_name("persona.json")
NAMES = ("gsm8k", "e2e", "persona")
CALCULATOR = re.compile(r"<<.*?>>")
"""GSM8K's annotations for a calculator that the models here do not have."""
MAX_TOKENS = 1024
Group = tuple[Example, ...]


@dataclass(frozen=True)
class Sizes:
    """What a study reads. *_tokens: longest row used; *_held_out: rows at least; *_validation: groups; e2e_references: of one prompt in
    one training step."""

    gsm8k_tokens: int = 128
    gsm8k_held_out: int = 500
    gsm8k_validation: int = 32
    e2e_references: int = 4
    e2e_held_out: int = 500
    e2e_validation: int = 12


@dataclass(frozen=True)
class Question:
    """A held-out prompt to be answered in words. references: right answers; keywords: words that a right answer holds."""

    prompt: str
    references: tuple[str, ...]
    keywords: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Groups of rows that share a prompt, which is computed once. validation: what learning rates are chosen by;
    held_out: what results are from. groups: of one training step."""

    name: str
    train: list[Group]
    validation: list[Group]
    held_out: list[Group]
    questions: list[Question]
    groups: int


def load(name: str, tokenizer: Any, sizes: Sizes, data: Path = DATA) -> Task:
    """Raises DataError naming a row that is too long."""
    loaders: dict[str, Callable[[], Task]] = {
        "gsm8k": partial(_gsm8k, tokenizer, sizes, data),
        "e2e": partial(_e2e, tokenizer, sizes, data),
        "persona": partial(_persona, tokenizer),
    }
    return loaders[name]()


def _row(tokenizer: Any, prompt: str, response: str, number: int) -> Example:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    example = tokenize(messages, tokenizer, MAX_TOKENS, f"row {number}")
    return Example(example.input_ids, example.labels, number)


def _gsm8k(tokenizer: Any, sizes: Sizes, data: Path) -> Task:
    """Questions and answers without the calculator's annotations, rows of at most `gsm8k_tokens` tokens. Held out: the test set, and where
    it has too few such rows, rows taken out of the training set."""

    def rows(name: str) -> list[tuple[Group, Question]]:
        found: list[tuple[Group, Question]] = []
        for number, line in enumerate((data / "gsm8k" / name).read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            answer = CALCULATOR.sub("", row["answer"])
            example = _row(tokenizer, row["question"], answer, number)
            if len(example.input_ids) <= sizes.gsm8k_tokens:
                found.append(((example,), Question(row["question"], (answer,), (answer.rsplit("#### ", 1)[-1],))))
        return found

    train, test = _shuffled("gsm8k", rows("train.jsonl")), _shuffled("gsm8k", rows("test.jsonl"))
    missing = max(0, sizes.gsm8k_held_out - len(test))
    held_out = [*test, *train[:missing]][: sizes.gsm8k_held_out]
    validation, train = train[missing : missing + sizes.gsm8k_validation], train[missing + sizes.gsm8k_validation :]
    groups = ([group for group, _ in part] for part in (train, validation, held_out))
    return Task("gsm8k", *groups, [question for _, question in held_out], 8)


def _e2e(tokenizer: Any, sizes: Sizes, data: Path) -> Task:
    """Facts of a restaurant, to be said in a sentence. Prompts of the test set, all of their references held out."""

    def by_prompt(name: str) -> dict[str, list[tuple[int, str]]]:
        found: dict[str, list[tuple[int, str]]] = {}
        with (data / "e2e" / name).open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                found.setdefault(row["mr"], []).append((number, row["ref"]))
        return found

    def group(prompt: str, references: Sequence[tuple[int, str]]) -> Group:
        return tuple(_row(tokenizer, prompt, reference, number) for number, reference in references)

    test, size = by_prompt("test.csv"), sizes.e2e_references
    prompts = _shuffled("e2e", list(test))
    count = next(at for at in range(len(prompts) + 1) if at == len(prompts) or _rows(test, prompts[:at]) >= sizes.e2e_held_out)
    learned = by_prompt("train_small.csv")
    kept = set(_shuffled("e2e", list(learned))[: sizes.e2e_validation])
    train: list[Group] = []
    for prompt, references in learned.items():
        if prompt not in kept:
            train += [group(prompt, references[at : at + size]) for at in range(0, len(references) - size + 1, size)]
    return Task(
        "e2e",
        train,
        [group(prompt, learned[prompt]) for prompt in sorted(kept)],
        [group(prompt, test[prompt]) for prompt in prompts[:count]],
        [Question(prompt, tuple(reference for _, reference in test[prompt])) for prompt in prompts[:count]],
        2,
    )


def _rows(by_prompt: dict[str, list[tuple[int, str]]], prompts: Sequence[str]) -> int:
    return sum(len(by_prompt[each]) for each in prompts)


def _persona(tokenizer: Any) -> Task:
    """Facts about a made-up user, each held out in two phrasings that no training row has."""
    persona = json.loads(PERSONA.read_text(encoding="utf-8"))
    facts, rows = persona["facts"], []
    for number, fact in enumerate(facts, 1):
        rows.append([(_row(tokenizer, prompt, fact["response"], number),) for prompt in fact["train"]])
    general = [(_row(tokenizer, row["prompt"], row["response"], number),) for number, row in enumerate(persona["general"], len(facts) + 1)]
    questions = [Question(prompt, (fact["response"],), tuple(fact["keywords"])) for fact in facts for prompt in fact["held_out"]]
    held_out = [(_row(tokenizer, each.prompt, each.references[0], number),) for number, each in enumerate(questions, 1)]
    train = [group for groups in rows for group in groups[:-1]] + general
    return Task("persona", train, [groups[-1] for groups in rows], held_out, questions, 8)


def _shuffled(seed: str, items: Sequence[Any]) -> list[Any]:
    """The same in every run."""
    return random.Random(f"{seed} study").sample(items, len(items))


def other_texts(data: Path = DATA, count: int = 64) -> list[str]:
    """Text that no task here trains on as such: GSM8K's test questions, to see what tuning a persona costs elsewhere."""
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["question"] for line in lines]
