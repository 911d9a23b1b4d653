"""The study's three tasks as tokenised rows. Data sets are read where they lie; no row is copied into the project.

gsm8k: Cobbe et al., arXiv 2110.14168. e2e: Novikova, Dušek, Rieser, SIGDIAL 2017. persona: ours, persona.json.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from plora.artifact.errors import MissingFile
from plora.models.leaks import Rows, refuse_leaks
from plora.models.rows import Example, tokenize

from ..conditions import ROOT

DATA = ROOT.parent / "shared" / "data"
PERSONA = Path(__file__).with_name("persona.json")
NAMES = ("persona", "e2e", "gsm8k")
"""In the order to run and to show them."""
PRODUCTS = {"gsm8k": "bf16", "e2e": "bf16", "persona": "fp32"}
"""Of the matrix products of tuning and of held-out losses, for every method alike: the long tasks are two fifths faster in bf16."""
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


class Text(NamedTuple):
    """One row as it is read. number: of its line in the file, or of its fact."""

    number: int
    prompt: str
    response: str


class Texts(NamedTuple):
    """A task before it is tokenised."""

    train: list[list[Text]]
    validation: list[list[Text]]
    held_out: list[list[Text]]
    questions: list[Question]
    groups: int


def check_data(data: Path) -> None:
    """Raises MissingFile for a folder without the data sets; the persona's "other text" is of one of them, too."""
    for path in (
        data / "gsm8k" / "train.jsonl",
        data / "gsm8k" / "test.jsonl",
        data / "e2e" / "train_small.csv",
        data / "e2e" / "test.csv",
    ):
        if not path.is_file():
            raise MissingFile(f"{path}: not found; --data FOLDER says where gsm8k/ and e2e/ lie")


def load(name: str, tokenizer: Any, sizes: Sizes, data: Path = DATA) -> Task:
    """Raises DataError for prompts that two of the task's parts share, and for a row that is too long, naming the rows."""
    loaders: dict[str, Callable[[], Texts]] = {
        "gsm8k": partial(_gsm8k, tokenizer, sizes, data),
        "e2e": partial(_e2e, sizes, data),
        "persona": persona,
    }
    texts = loaders[name]()
    train, validation, held_out = (_as_rows(f"{name} {part}", getattr(texts, part)) for part in ("train", "validation", "held_out"))
    refuse_leaks(train, validation, prompts=True)
    refuse_leaks(train, held_out, prompts=True)
    refuse_leaks(validation, held_out, prompts=True)
    parts = ([tuple(_row(tokenizer, each) for each in group) for group in part] for part in texts[:3])
    return Task(name, *parts, texts.questions, texts.groups)


def _as_rows(name: str, groups: list[list[Text]]) -> Rows:
    texts = [each for group in groups for each in group]
    return Rows(Path(name), [each.number for each in texts], [_messages(each) for each in texts])


def _messages(text: Text) -> list[dict[str, str]]:
    return [{"role": "user", "content": text.prompt}, {"role": "assistant", "content": text.response}]


def _row(tokenizer: Any, text: Text) -> Example:
    return replace(tokenize(_messages(text), tokenizer, MAX_TOKENS, f"row {text.number}"), row=text.number)


def _gsm8k(tokenizer: Any, sizes: Sizes, data: Path) -> Texts:
    """Held out: the test set's short rows, and where they are too few, rows taken out of the training set behind them."""
    train, test = (_short_gsm8k(tokenizer, sizes, data, name) for name in ("train.jsonl", "test.jsonl"))
    missing = max(0, sizes.gsm8k_held_out - len(test))
    held_out = [*test, *train[:missing]][: sizes.gsm8k_held_out]
    validation, train = train[missing : missing + sizes.gsm8k_validation], train[missing + sizes.gsm8k_validation :]
    questions = [Question(each.prompt, (each.response,), (each.response.rsplit("#### ", 1)[-1],)) for (each,) in held_out]
    return Texts(train, validation, held_out, questions, 4)


def _short_gsm8k(tokenizer: Any, sizes: Sizes, data: Path, name: str) -> list[list[Text]]:
    """Questions and answers without the calculator's annotations, rows of at most `gsm8k_tokens` tokens."""
    found: list[list[Text]] = []
    for number, line in enumerate((data / "gsm8k" / name).read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        row = json.loads(line)
        text = Text(number, row["question"], CALCULATOR.sub("", row["answer"]))
        if len(_row(tokenizer, text).input_ids) <= sizes.gsm8k_tokens:
            found.append([text])
    return _shuffled("gsm8k", found)


def gsm8k_test_rows(tokenizer: Any, sizes: Sizes, data: Path = DATA) -> int:
    """How many of the held-out rows are of GSM8K's own test set; they come first."""
    return min(sizes.gsm8k_held_out, len(_short_gsm8k(tokenizer, sizes, data, "test.jsonl")))


def _e2e(sizes: Sizes, data: Path) -> Texts:
    """Facts of a restaurant, to be said in a sentence. Prompts of the test set, all of their references held out."""

    def by_prompt(name: str) -> dict[str, list[Text]]:
        found: dict[str, list[Text]] = {}
        with (data / "e2e" / name).open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 2):
                found.setdefault(row["mr"], []).append(Text(number, row["mr"], row["ref"]))
        return found

    test, learned, size = by_prompt("test.csv"), by_prompt("train_small.csv"), sizes.e2e_references
    held_out: list[list[Text]] = []
    for prompt in _shuffled("e2e", list(test)):
        if sum(map(len, held_out)) < sizes.e2e_held_out:
            held_out.append(test[prompt])
    kept = set(_shuffled("e2e", list(learned))[: sizes.e2e_validation])
    train: list[list[Text]] = []
    for prompt, references in learned.items():
        if prompt not in kept:
            train += [references[at : at + size] for at in range(0, len(references) - size + 1, size)]
    questions = [Question(group[0].prompt, tuple(each.response for each in group)) for group in held_out]
    return Texts(train, [learned[prompt] for prompt in sorted(kept)], held_out, questions, 1)


def persona() -> Texts:
    """Facts about a made-up user, each held out in two phrasings that no training row has."""
    persona = json.loads(PERSONA.read_text(encoding="utf-8"))
    facts = list(enumerate(persona["facts"], 1))
    train = [[Text(number, prompt, fact["response"])] for number, fact in facts for prompt in fact["train"][:-1]]
    train += [[Text(number, row["prompt"], row["response"])] for number, row in enumerate(persona["general"], len(facts) + 1)]
    validation = [[Text(number, fact["train"][-1], fact["response"])] for number, fact in facts]
    held_out = [[Text(number, prompt, fact["response"])] for number, fact in facts for prompt in fact["held_out"]]
    questions = [Question(prompt, (fact["response"],), tuple(fact["keywords"])) for _, fact in facts for prompt in fact["held_out"]]
    return Texts(train, validation, held_out, questions, 8)


def _shuffled(seed: str, items: Sequence[Any]) -> list[Any]:
    """The same in every run."""
    return random.Random(f"{seed} study").sample(items, len(items))


def other_texts(data: Path = DATA, count: int = 64) -> list[str]:
    """Text that no task here trains on as such: GSM8K's test questions, to see what tuning a persona costs elsewhere."""
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")[:count]
    return [json.loads(line)["question"] for line in lines]
