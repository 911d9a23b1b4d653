"""Greedy output over the wire equals transformers running merged weights: every family, head layout and basis."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from plora.artifact import paper_plan
from plora.device_runtime import open_session
from plora.models.formula import merge

from .conftest import FAMILIES, cloud, make_export, oracle

TOKENS = 64
PROMPTS = ("the quick brown fox", "what is the capital of", "naïve café 12345, a lighthouse keeper writes down the weather every")


@pytest.mark.parametrize(("separate", "kind"), [(False, "random"), (True, "svd")], ids=["shared-random", "separate-svd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_merged_weights(family: str, separate: bool, kind: str, tmp_path: Path) -> None:
    made = make_export(tmp_path, family, lambda layers: paper_plan(layers, 5, separate=separate), kind, verified=not separate)
    base = oracle(made)
    merge(base.model, made.adapter)
    with cloud(made.out / "cloud") as (address, _), open_session(made.out / "edge", address) as session:
        sampling = session.sampling(max_tokens=TOKENS, temperature=0.0)
        for prompt in PROMPTS:
            ids = session.text.encode_raw(prompt)
            list(session.stream(ids, sampling))
            assert session.answer is not None
            with torch.no_grad():
                expected = base.model.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0].tolist()
            assert ids + session.answer.token_ids == expected
