"""Checkpoints stored in 16 bits, as most are published: the record is made in fp32 all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plora.artifact import paper_plan
from plora.export.config import ExportConfig
from plora.export.export import export
from plora.models.adapter import write_adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import read_base

from .conftest import save_tiny_base, tuned


@pytest.mark.parametrize(("family", "stored", "dtype"), [("llama", torch.bfloat16, "fp32"), ("qwen2", torch.float16, "bf16")])
def test_a_16_bit_checkpoint_is_exported_and_verified(family: str, stored: torch.dtype, dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "base", family, dtype=stored)
    base = read_base(str(folder))
    assert base.model.dtype == stored
    write_adapter(tuned(new_adapter(base, paper_plan(base.shape.layers, 5), "random", 1.0, 0)), tmp_path / "adapter")
    report = export(ExportConfig(str(folder), tmp_path / "adapter", tmp_path / "out", dtype), lambda stage: None)
    assert report == json.loads((tmp_path / "out" / "verification" / "report.json").read_text())
    assert max(report["errors"].values()) <= report["tolerance"]
    if dtype == "fp32":
        assert report["tolerance"] == 1e-4
        assert report["greedy_equal"] == report["greedy_tokens"] == 4
    assert (tmp_path / "out" / "verification" / "reference.safetensors").stat().st_mode & 0o077 == 0
