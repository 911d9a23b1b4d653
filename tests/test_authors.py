"""Checkpoints as the PrivateLoRA authors write them, made here by hand: imported, they compute what the paper's formula says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plora.artifact.errors import AdapterError, DamagedFile, MissingFile
from plora.artifact.names import core_name, down_name, up_name
from plora.device_runtime import open_session
from plora.export.config import ExportConfig
from plora.export.export import export
from plora.models.authors import read_authors_checkpoint
from plora.models.checkpoint import Base, read_base
from plora.models.formula import adapted, merge

from .conftest import Made, answer, cloud, greedy, oracle

RANKS = {(0, "q"): (6, 4), (0, "k"): (5, 5), (0, "v"): (4, 6), (2, "q"): (3, 3), (2, "v"): (8, 2)}
"""(layer, target) -> (columns, rows) of lora_mobile: not square, not for every layer, not for every target."""


def key(layer: int, target: str, part: str) -> str:
    return f"model.layers.{layer}.self_attn.{target}_lora.{part}.weight"


def authors_state(base: Base, dtype: torch.dtype = torch.float32, ranks: dict[tuple[int, str], tuple[int, int]] = RANKS) -> dict[str, Any]:
    """Random A, M and B under the authors' names, base tensors beside them."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Any] = {"model.norm.weight": base.model.model.norm.weight, "model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)}
    for (layer, target), (rank, out_rank) in ranks.items():
        sizes = {
            "lora_A": (rank, base.shape.hidden),
            "lora_mobile": (out_rank, rank),
            "lora_B": (base.shape.out_features(target), out_rank),
        }
        for part, size in sizes.items():
            state[key(layer, target, part)] = (torch.randn(size, generator=generator) / size[1] ** 0.5).to(dtype)
    return state


@torch.no_grad()
def by_hand(base: Base, state: dict[str, Any], ids: list[int]) -> Tensor:
    """Logits of the model with y = W x + B (M (A x)) written out in each projection: nothing of ours is used."""

    class Adapted(nn.Module):
        def __init__(self, inner: nn.Module, layer: int, target: str) -> None:
            super().__init__()
            self.inner = inner
            self.parts = [state[key(layer, target, part)].float() for part in ("lora_A", "lora_mobile", "lora_B")]

        def forward(self, x: Tensor) -> Tensor:
            down, core, up = self.parts
            return self.inner(x) + x @ down.T @ core.T @ up.T

    for layer, target in RANKS:
        attention = base.model.model.layers[layer].self_attn
        setattr(attention, f"{target}_proj", Adapted(getattr(attention, f"{target}_proj"), layer, target))
    return base.model(torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "state_dict"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_imported_formula_equals_the_papers_by_hand(dtype: torch.dtype, wrapped: bool, made: Made, tmp_path: Path) -> None:
    base, ids = oracle(made), list(range(20, 40))
    state = authors_state(base, dtype)
    torch.save({"state_dict": state} if wrapped else state, tmp_path / "plora.bin")
    adapter = read_authors_checkpoint(tmp_path / "plora.bin", base.shape)
    assert adapter.config.scale == 1.0
    assert adapter.config.basis_kind == "imported"
    assert [layer.layer for layer in adapter.config.plan.adapted] == [0, 2]
    for (layer, target), (rank, out_rank) in RANKS.items():
        assert adapter.cores[core_name(layer, target)].shape == (out_rank, rank)
        assert torch.equal(adapter.basis[down_name(layer, target)], state[key(layer, target, "lora_A")].float())
        assert torch.equal(adapter.basis[up_name(layer, target)], state[key(layer, target, "lora_B")].float())
    with torch.no_grad(), adapted(base.model, adapter):
        got = base.model(torch.tensor([ids])).logits[0]
    plain = base.model(torch.tensor([ids])).logits[0]
    expected = by_hand(base, state, ids)
    scale = expected.abs().max()
    assert (got - expected).abs().max() < 1e-5 * scale  # fp32, the same products in the same order
    assert (plain - expected).abs().max() > 1e-2 * scale  # the control: the adapter matters


def test_an_imported_checkpoint_answers_over_the_wire(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    path = tmp_path / "plora.bin"
    torch.save(authors_state(base, torch.float16), path)
    export(ExportConfig(str(made.base), path, tmp_path / "out"), lambda stage: None)
    plain = oracle(made)
    merge(base.model, read_authors_checkpoint(path, base.shape))
    with cloud(tmp_path / "out" / "cloud") as (address, _), open_session(tmp_path / "out" / "edge", address) as session:
        ids = session.text.encode_raw("the quick brown fox")
        assert answer(session, ids, 48) == greedy(base, ids, 48) != greedy(plain, ids, 48)
        assert session.answer is not None
        assert session.answer.stats.round_trips_per_token == 3  # layers 0 and 2, and entry to exit


def test_keys_may_have_a_prefix_and_no_suffix(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    state = authors_state(base)
    renamed = {f"base_model.{name}".removesuffix(".weight") if "lora" in name else name: tensor for name, tensor in state.items()}
    torch.save(state, tmp_path / "a.bin")
    torch.save(renamed, tmp_path / "b.bin")
    first, second = (read_authors_checkpoint(tmp_path / name, base.shape) for name in ("a.bin", "b.bin"))
    assert first.config.basis == second.config.basis
    assert all(torch.equal(first.cores[name], second.cores[name]) for name in first.cores)


# Refusals


class Payload:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_refused_and_does_not_run(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    state = authors_state(base)
    torch.save({**state, "extra": Payload(tmp_path / "ran")}, tmp_path / "evil.bin")
    with pytest.raises(DamagedFile, match="not a torch file of tensors"):
        read_authors_checkpoint(tmp_path / "evil.bin", base.shape)
    assert not (tmp_path / "ran").exists()
    loading = "import sys, torch; torch.load(sys.argv[1], weights_only=False)"  # the control: read without care, it runs
    subprocess.run([sys.executable, "-W", "ignore", "-c", loading, str(tmp_path / "evil.bin")], check=True, timeout=60)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", ["lora_A", "lora_mobile", "lora_B"])
def test_a_missing_part_is_named(part: str, made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    state = authors_state(base)
    del state[key(2, "v", part)]
    torch.save(state, tmp_path / "plora.bin")
    with pytest.raises(AdapterError, match=f"layer 2, target v: {part} is missing"):
        read_authors_checkpoint(tmp_path / "plora.bin", base.shape)


def changed(state: dict[str, Any], name: str, tensor: Any) -> dict[str, Any]:
    return {**state, name: tensor}


def test_what_does_not_fit_is_named(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    state = authors_state(base)
    hidden, q_out = base.shape.hidden, base.shape.query_width
    bad_value = state[key(0, "q", "lora_mobile")].clone()
    bad_value[0, 0] = float("nan")
    cases: list[tuple[Any, str]] = [
        (changed(state, "model.layers.0.mlp.gate_lora.lora_A.weight", torch.zeros(4, hidden)), "adapter on gate"),
        (changed(state, "model.layers.0.self_attn.o_lora.lora_A.weight", torch.zeros(4, hidden)), "adapter on o"),
        (changed(state, key(0, "q", "lora_A"), torch.zeros(6, hidden + 1)), r"sources\.0\.q\.down has shape"),
        (changed(state, key(0, "q", "lora_B"), torch.zeros(q_out - 1, 4)), r"layers\.0\.q\.up has shape"),
        (changed(state, key(0, "q", "lora_mobile"), torch.zeros(6, 4)), r"layers\.0\.q\.core has shape \[6, 4\], expected \[4, 6\]"),
        (changed(state, key(0, "q", "lora_mobile"), torch.zeros(6)), "expected two dimensions"),
        (changed(state, key(0, "q", "lora_mobile"), bad_value), "not finite"),
        (authors_state(base, ranks={(3, "q"): (4, 4)}), r"adapts layer 3, but the base has layers 0\.\.2"),
        ({"model.norm.weight": torch.zeros(3)}, "no key like"),
        ([torch.zeros(3)], "holds a list"),
    ]
    for content, complaint in cases:
        torch.save(content, tmp_path / "plora.bin")
        with pytest.raises(AdapterError, match=complaint):
            read_authors_checkpoint(tmp_path / "plora.bin", base.shape)
    torch.save(state, tmp_path / "plora.bin")
    read_authors_checkpoint(tmp_path / "plora.bin", base.shape)  # the control


def test_files_that_are_none(made: Made, tmp_path: Path) -> None:
    shape = read_base(str(made.base)).shape
    with pytest.raises(MissingFile, match="not found"):
        read_authors_checkpoint(tmp_path / "none.bin", shape)
    torch.save({"x": torch.zeros(1000)}, tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    for content in (b"", b"hello", whole[: len(whole) // 2], b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(50)):
        (tmp_path / "plora.bin").write_bytes(content)
        with pytest.raises((DamagedFile, AdapterError)):
            read_authors_checkpoint(tmp_path / "plora.bin", shape)
