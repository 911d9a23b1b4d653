"""The prompts that figures are taken with: five kinds of work, from free text to text that says the prompt again. All written here.

Drafts by look-up (device-side n-gram speculation) live on repetition: `lookup_share` says how much of an answer they would have had right.
`python -m bench.prompts` prints that for SmolLM2, greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LOOKUP_TOKENS = 3
"""Length of the suffix that is looked up."""


@dataclass(frozen=True)
class Prompt:
    """messages: a chat, for the device's own template; repeats: whether the answer should say much of the prompt again."""

    name: str
    messages: tuple[dict[str, str], ...]
    repeats: bool
    new_tokens: int


PASSAGE = """\
The ferry between Marrow Point and the island of Skelling has run since 1921. It leaves the mainland four times a day in summer and twice \
a day in winter, and the crossing takes thirty-five minutes when the sea is calm. Before the ferry came, islanders rowed across in open \
boats, and the mail could be late by two weeks in a bad season. The first ferry was a coal steamer called the Agnes Hale, which carried \
forty passengers and six cows. She was replaced in 1954 by a diesel boat with room for eight cars, and many older people on the island \
still say that the cows were better company. Today about three hundred people live on Skelling all year. Most of them fish, keep sheep, or \
look after the visitors who come for the seabird cliffs on the western side. The island has one school with eleven pupils, one shop, and \
one doctor who visits on Tuesdays. In 2019 the county council proposed to end the winter sailings because they lost money. The islanders \
answered with a count of their own: every winter crossing carried at least one person who had to see a dentist, a bank, or a hospital. The \
council kept the sailings, raised the summer fare by one pound, and ordered a smaller electric boat for the quiet months. It is due to \
arrive next spring, and the children of the school have been asked to choose its name."""

CODE = '''\
def load_settings(path):
    """Reads settings from a text file, one `name = value` a line."""
    settings = {}
    with open(path) as f:
        for number, line in enumerate(f, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if "=" not in line:
                raise ValueError(f"{path}, line {number}: no '=' in {line!r}")
            name, value = line.split("=", 1)
            settings[name.strip()] = value.strip()
    return settings'''

ITEMS = """\
1. Two loaves of brown bread
2. A bag of red onions
3. Six large eggs
4. One bottle of olive oil
5. Fresh basil and thyme
6. Half a kilo of flour
7. Three tins of tomatoes
8. A block of hard cheese
9. Lemons, if they are cheap
10. Soap for the kitchen
11. Candles and matches
12. A new broom"""


def _ask(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


COPY_CODE = "Copy this function, word for word, with the variable `settings` renamed to `options`"

PROMPTS = (
    Prompt("chat", _ask("Why does bread go stale faster in the fridge than on the table?"), False, 96),
    Prompt("story", _ask("Write a short story about a clockmaker who finds a letter inside an old clock."), False, 128),
    Prompt("summary", _ask(f"Copy the key sentences of this text, word for word:\n\n{PASSAGE}"), True, 112),
    Prompt("code", _ask(f"{COPY_CODE}:\n\n```python\n{CODE}\n```"), True, 120),
    Prompt("repeat", _ask(f"Repeat the following text exactly:\n\n{ITEMS}"), True, 88),
)


def lookup_share(prompt: Sequence[int], answer: Sequence[int], suffix: int = LOOKUP_TOKENS) -> float:
    """Share of the answer's tokens that followed the latest earlier place, in prompt or answer, of the `suffix` tokens before them."""
    if not answer:
        raise ValueError("an answer of 0 tokens, expected at least 1")
    tokens = [*prompt, *answer]
    seen: dict[tuple[int, ...], int] = {}  # suffix -> what followed it last
    right = 0
    for at in range(suffix, len(tokens)):
        before = tuple(tokens[at - suffix : at])
        right += at >= len(prompt) and seen.get(before) == tokens[at]
        seen[before] = tokens[at]
    return right / len(answer)


def longest_copy(prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of the answer's longest stretch that stands in the prompt as it is."""
    best, row = 0, [0] * (len(prompt) + 1)
    for token in answer:
        row = [0, *(row[at] + 1 if token == other else 0 for at, other in enumerate(prompt))]
        best = max(best, *row)
    return best


def main() -> None:
    import torch

    from plora.models.checkpoint import read_base, read_tokenizer

    from .run import model_path

    base = read_base(model_path())
    tokenizer = read_tokenizer(base.source)
    print("prompt   tokens  new  end token at  guessed by look-up  longest copy of the prompt")
    for prompt in PROMPTS:
        ids = tokenizer.apply_chat_template(list(prompt.messages), add_generation_prompt=True, return_dict=False)
        with torch.inference_mode():
            options = {"max_new_tokens": prompt.new_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            answer = base.model.generate(torch.tensor([ids]), **options)[0].tolist()[len(ids) :]
        end = answer.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in answer else "-"
        share, copied = lookup_share(ids, answer), longest_copy(ids, answer)
        print(f"{prompt.name:<8} {len(ids):>6} {len(answer):>4} {end:>13} {100 * share:>17.0f}% {copied:>27}", flush=True)


if __name__ == "__main__":
    main()
