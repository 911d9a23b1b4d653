"""How many of the demo's facts the tuned model says when asked in words that no training row has: `make bench-recall`."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from plora.models.adapter import read_adapter
from plora.models.checkpoint import read_base, read_tokenizer
from plora.models.formula import adapted

from .conditions import ROOT, write_results
from .run import ADAPTER, model_path

HELD_OUT = ROOT / "examples" / "persona" / "held_out.jsonl"
NEW_TOKENS = 30


@torch.no_grad()
def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """Greedy, through the chat template."""
    texts = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        texts.append(" ".join(tokenizer.decode(out, skip_special_tokens=True).split()))
    return texts


def recall(rows: list[dict[str, Any]], texts: list[str]) -> tuple[int, list[dict[str, str]]]:
    """Answers with all of their row's keywords as whole words, and the others."""
    missed = [
        {"prompt": row["prompt"], "answer": text}
        for row, text in zip(rows, texts, strict=True)
        if not set(row["keywords"]) <= set(re.findall(r"\w+", text.lower()))
    ]
    return len(rows) - len(missed), missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help="another adapter; then nothing is written")
    parser.add_argument("--base", help="where the base lies, if not in the installed package")
    arguments = parser.parse_args()
    base = read_base(arguments.base or model_path())
    tokenizer = read_tokenizer(base.source)
    rows = [json.loads(line) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    questions = [row["prompt"] for row in rows]
    plain, _ = recall(rows, answers(base.model, tokenizer, questions))
    with adapted(base.model, read_adapter(arguments.adapter)):
        private, missed = recall(rows, answers(base.model, tokenizer, questions))
    figures = {"facts": len(rows), "recalled": private, "recalled_by_base": plain, "missed": missed}
    print(json.dumps(figures, indent=1))
    if arguments.adapter == ADAPTER:
        print(write_results("recall", figures, "make bench-recall"))


if __name__ == "__main__":
    main()
