"""What a run is judged by, on held-out rows: negative log-likelihood row by row, and answers in words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from plora.artifact.errors import UsageError
from plora.models.packing import pack
from plora.models.rows import IGNORED, Example

from .tasks import Question
from .train import PACK_TOKENS

ANSWER_TOKENS = {"gsm8k": 110, "e2e": 50, "persona": 24}
BATCH = 32
SLOT = re.compile(r"(\w[\w ]*)\[([^\]]*)\]")
SPOKEN_SLOTS = ("name", "near", "food", "area", "eatType", "priceRange", "customer rating")
"""Whose values are said as they are written; familyFriendly[no] is not."""


@torch.no_grad()
def row_nlls(model: Any, windows: tuple[int, ...], groups: Sequence[Sequence[Example]]) -> tuple[list[float], list[int]]:
    """(negative log-likelihood in nats, response tokens) of every row, in order. Raises UsageError for a base that mixes windows."""
    if len(set(windows)) > 1:
        raise UsageError(f"windows {sorted(set(windows))}: the study takes bases whose layers all attend alike")
    rows = [row for group in groups for row in group]
    sums, counts = [0.0] * len(rows), [0] * len(rows)
    device = next(model.parameters()).device
    for part in _together(groups):
        begun = 0
        for each in pack([rows[at] for at in part], PACK_TOKENS):
            each = each.to(device)
            hidden = model.model(
                input_ids=each.input_ids[None], attention_mask=each.mask(windows[0]), position_ids=each.positions[None], use_cache=False
            ).last_hidden_state[0]
            losses = nn.functional.cross_entropy(model.lm_head(hidden[each.at]).float(), each.next_ids, reduction="none")
            for loss, row in zip(losses.tolist(), each.row[each.at].tolist(), strict=True):
                sums[part[begun + row]] += loss
                counts[part[begun + row]] += 1
            begun += int(each.row.max()) + 1
    return sums, counts


def _together(groups: Sequence[Sequence[Example]]) -> list[list[int]]:
    """Numbers of the rows that are packed together: a group's; or, of single rows, those of like length."""
    if all(len(group) == 1 for group in groups):
        order = sorted(range(len(groups)), key=lambda at: len(groups[at][0].input_ids))
        return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
    ends = list(itertools.accumulate(len(group) for group in groups))
    return [list(range(end - len(group), end)) for group, end in zip(groups, ends, strict=True)]


def text_rows(tokenizer: Any, texts: Sequence[str]) -> list[tuple[Example, ...]]:
    """Plain text, every token but the first predicted."""
    rows: list[tuple[Example, ...]] = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append((Example(ids, [IGNORED, *ids[1:]]),))
    return rows


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: Sequence[Question], new_tokens: int) -> list[str]:
    """Greedy, through the chat template, in batches padded on the left."""
    device = next(model.parameters()).device
    texts: list[str] = []
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    for at in range(0, len(questions), BATCH):
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": each.prompt}], add_generation_prompt=True, tokenize=False)
            for each in questions[at : at + BATCH]
        ]
        batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt").to(device)
        out = model.generate(**batch, max_new_tokens=new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts += [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, batch["input_ids"].shape[1] :]]
    return texts


def judge(task: str, questions: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """The task's measures of answers, each from 0 to 1, BLEU from 0 to 100."""
    pairs = list(zip(questions, texts, strict=True))
    if task == "gsm8k":
        return {"exact_match": sum(_final(text) == each.keywords[0].replace(",", "") for each, text in pairs) / len(pairs)}
    if task == "persona":
        return {"recall": sum(set(each.keywords) <= set(re.findall(r"\w+", text.lower())) for each, text in pairs) / len(pairs)}
    found = [value.lower() in text.lower() for each, text in pairs for value in spoken_values(each.prompt)]
    return {"bleu": _bleu([each.references for each in questions], texts), "slot_recall": sum(found) / len(found)}


def _final(text: str) -> str:
    """The number after "####", as GSM8K's answers give it."""
    found = re.findall(r"####\s*\$?(-?[\d,.]*\d)", text)
    return found[-1].replace(",", "") if found else ""


def spoken_values(prompt: str) -> list[str]:
    """The values of an E2E meaning representation that a sentence should hold word for word."""
    return [value for slot, value in SLOT.findall(prompt) if slot in SPOKEN_SLOTS]


def _bleu(references: Sequence[Sequence[str]], texts: Sequence[str]) -> float:
    """Corpus BLEU (sacrebleu's defaults) against all references of each prompt."""
    import sacrebleu

    most = max(len(each) for each in references)
    streams = [[each[at] if at < len(each) else None for each in references] for at in range(most)]
    return sacrebleu.corpus_bleu(list(texts), streams).score  # pyright: ignore[reportArgumentType]  None: this prompt has fewer
