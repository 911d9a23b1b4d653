"""The formula y = W x + s · B M A u on a frozen base, its merged twin, the basis, and the adapter's files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plora.artifact import ExchangePlan, grouped_plan, paper_plan
from plora.artifact.errors import AdapterError, DamagedFile, ManifestError, MissingFile, UsageError, WrongPair
from plora.artifact.manifest import read_json, write_json
from plora.artifact.names import ADAPTER_CONFIG, BASIS, CORES, core_name, down_name, expand_name, up_name
from plora.artifact.plan import TARGETS
from plora.models.adapter import (
    ADAPTER_VERSION,
    Adapter,
    check_base,
    check_shapes,
    expansion,
    expected_basis,
    hash_basis,
    make_adapter,
    read_adapter,
    replace_cores,
    write_adapter,
)
from plora.models.basis import new_adapter, random_basis
from plora.models.checkpoint import Base, read_base
from plora.models.formula import adapted, merge

from .conftest import Made, oracle, save_tiny_base, tuned

TOLERANCE = 1e-12
"""In fp64, of the largest logit: rounding gives some 1e-15 per product, a wrong core 1e-2."""
IDS = torch.tensor([[5, 17, 200, 3, 3, 42, 299, 8]])


@pytest.fixture
def base(made: Made) -> Base:
    """Grouped-query attention (6 heads, 2 of keys), in fp64: k and v are narrower than q."""
    base = oracle(made)
    base.model.double()
    return base


@torch.no_grad()
def logits(base: Base) -> Tensor:
    return base.model(IDS).logits[0]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


PLANS: dict[str, Callable[[int], ExchangePlan]] = {
    "shared": lambda layers: paper_plan(layers, 6),
    "separate": lambda layers: paper_plan(layers, 6, separate=True),
    "out_rank": lambda layers: paper_plan(layers, 6, out_rank=9),
    "separate-out_rank": lambda layers: paper_plan(layers, 7, ("k", "v"), out_rank=2, separate=True),
    "q alone": lambda layers: paper_plan(layers, 16, ("q",)),
}


@pytest.mark.parametrize("kind", ["random", "svd"])
@pytest.mark.parametrize("plan", PLANS)
def test_formula_equals_merged_weights(plan: str, kind: str, base: Base, made: Made) -> None:
    plain = logits(base)
    adapter = tuned(new_adapter(base, PLANS[plan](base.shape.layers), kind, 0.6, 0), size=0.2)
    adapter = dataclasses.replace(
        adapter, basis={k: v.double() for k, v in adapter.basis.items()}, cores={k: v.double() for k, v in adapter.cores.items()}
    )
    with adapted(base.model, adapter):
        hooked = logits(base)
    assert torch.equal(logits(base), plain)  # the hooks are gone
    merge(base.model, adapter)
    assert error(hooked, logits(base)) < TOLERANCE
    assert error(hooked, plain) > 1e-3
    name = core_name(base.shape.layers - 1, next(iter(adapter.config.plan.columns)).target)  # the control: one core of the last layer
    fresh = oracle(made)
    fresh.model.double()
    with adapted(fresh.model, replace_cores(adapter, {**adapter.cores, name: adapter.cores[name] * 1.01})):
        assert error(logits(fresh), logits(base)) > 1000 * TOLERANCE


def test_cores_of_zero_change_nothing(base: Base) -> None:
    plain = logits(base)
    for plan in (paper_plan(3, 6), grouped_plan(3, 2, 4, ("q", "o", "gate", "up", "down"))):
        with adapted(base.model, new_adapter(base, plan, "random", 1.0, 0)):
            assert torch.equal(logits(base), plain)


def test_formula_of_a_grouped_plan_by_hand(base: Base) -> None:
    """Layer 1 is fed from layer 0's normed input, not from its own: checked on the output of one projection."""
    plan = grouped_plan(3, 2, 5, ("v", "down"), out_rank=4)
    adapter = tuned(new_adapter(base, plan, "random", 0.5, 3))
    layers = base.model.model.layers
    seen: dict[str, Tensor] = {}
    hooks = [layers[0].input_layernorm.register_forward_hook(lambda m, i, out: seen.__setitem__("u", out))]
    projection = layers[1].mlp.down_proj
    hooks.append(projection.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("x", inputs[0])))
    with adapted(base.model, adapter):
        hooks.append(projection.register_forward_hook(lambda m, i, out: seen.__setitem__("y", out)))
        logits(base)
    for hook in hooks:
        hook.remove()
    down, core, up = adapter.basis[down_name(0, "shared")], adapter.cores[core_name(1, "down")], adapter.basis[up_name(1, "down")]
    expected = seen["x"] @ projection.weight.T + 0.5 * seen["u"] @ down.double().T @ core.double().T @ up.double().T
    assert error(seen["y"], expected) < TOLERANCE


@pytest.mark.parametrize(("layers", "targets"), [(2, ("q",)), (1, ("q", "o")), (1, ("gate",))])
def test_merge_refuses_what_no_weight_can_hold(layers: int, targets: tuple[str, ...], base: Base) -> None:
    adapter = tuned(new_adapter(base, grouped_plan(3, layers, 4, targets), "random", 1.0, 0))
    with pytest.raises(AdapterError, match="cannot be merged into a weight"):
        merge(base.model, adapter)


# Basis


def test_a_seed_gives_the_same_basis_and_another_seed_another(base: Base) -> None:
    plan = paper_plan(3, 6)
    first, second, other = (random_basis(plan, base.shape, seed) for seed in (4, 4, 5))
    assert hash_basis(plan, 1.0, first) == hash_basis(plan, 1.0, second)
    hashes = {hash_basis(plan, 1.0, first), hash_basis(plan, 1.0, other), hash_basis(plan, 0.5, first)}
    assert len(hashes) == 3  # seed and scale are part of it
    assert list(first) == list(expected_basis(plan, base.shape))
    generator = torch.Generator().manual_seed(4)  # by its definition, so that it stays the same on every machine and release
    assert torch.equal(first[down_name(0, "shared")], torch.randn((6, 48), generator=generator) / 48**0.5)


def test_svd_basis_is_the_best_of_its_rank(made: Made) -> None:
    base = oracle(made)
    basis = new_adapter(base, paper_plan(3, 6, separate=True), "svd", 1.0, 0).basis
    weight = base.model.model.layers[1].self_attn.q_proj.weight
    u, s, vt = torch.linalg.svd(weight)
    up, down = basis[up_name(1, "q")], basis[down_name(1, "q")]
    rounding = 2e-3  # a basis is rounded to 16 bits when it is made
    assert torch.allclose(up @ down, u[:, :6] @ torch.diag(s[:6]) @ vt[:6], atol=rounding)
    assert torch.allclose(down @ down.T, torch.eye(6), atol=rounding)
    assert not torch.allclose(up @ down, u[:, 1:7] @ torch.diag(s[1:7]) @ vt[1:7], atol=10 * rounding)  # the control


def test_a_basis_is_rounded_once_and_kept_in_half_the_bytes(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    adapter = new_adapter(base, grouped_plan(3, 2, 6, ("q", "o"), shared_injection=9), "svd", 1.0, 0)
    write_adapter(adapter, tmp_path / "adapter")
    assert all(torch.equal(tensor.half().float(), tensor) for tensor in adapter.basis.values())
    assert (tmp_path / "adapter" / BASIS).stat().st_size < 2 * sum(tensor.numel() for tensor in adapter.basis.values()) + 4096
    read = read_adapter(tmp_path / "adapter")
    assert all(torch.equal(read.basis[name], tensor) for name, tensor in adapter.basis.items())


def test_every_value_of_a_shared_injection_is_read_equally_often(made: Made) -> None:
    plan = grouped_plan(3, 3, 6, ("q", "o"), shared_injection=9)
    adapter = new_adapter(oracle(made), plan, "random", 1.0, 0)
    (exchange,) = plan.exchanges
    places, signs = expansion(adapter.basis, exchange)
    assert len(places) == exchange.up_columns == 36
    assert torch.equal(places.bincount(minlength=9), torch.full((9,), 4))
    assert set(signs.tolist()) == {-1.0, 1.0}


@pytest.mark.parametrize("values", [2050, 2052, 4096])
def test_places_beyond_what_16_bits_count_are_kept(values: int, tmp_path: Path) -> None:
    """fp16 counts to 2,048 without gaps."""
    base = read_base(str(save_tiny_base(tmp_path / "base", "llama", num_hidden_layers=36)))
    plan = grouped_plan(36, 36, 6, TARGETS, out_rank=20, shared_injection=values)
    write_adapter(new_adapter(base, plan, "random", 1.0, 0), tmp_path / "adapter")
    (exchange,) = plan.exchanges
    places, _ = expansion(read_adapter(tmp_path / "adapter").basis, exchange)
    counts = places.bincount(minlength=values)
    assert len(counts) == values
    assert counts.max() - counts.min() == 1


def test_an_unknown_basis_kind_is_refused(made: Made, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.adapter_folder, copy)
    write_json(copy / ADAPTER_CONFIG, {**read_json(copy / ADAPTER_CONFIG), "basis_kind": "fourier"})
    with pytest.raises(AdapterError, match="basis_kind 'fourier', expected one of random, svd, pca, imported"):
        read_adapter(copy)


@pytest.mark.parametrize("place", [9.0, -1.0, 2.5])
def test_a_place_that_is_none_is_refused(place: float, made: Made) -> None:
    base = oracle(made)
    adapter = new_adapter(base, grouped_plan(3, 3, 6, ("q", "o"), shared_injection=9), "random", 1.0, 0)
    basis = {name: tensor.clone() for name, tensor in adapter.basis.items()}
    basis[expand_name(0)][0, 5] = place
    kept = adapter.config
    with pytest.raises(AdapterError, match=r"sources\.0\.expand names values .* expected whole numbers from 0 to 8"):
        make_adapter(kept.plan, base.shape, basis, 1.0, "random", 0, kept.base, kept.base_name)


def test_svd_refuses_what_it_cannot_make(made: Made) -> None:
    base = oracle(made)
    with pytest.raises(AdapterError, match=r"rank 17 exceeds 16"):  # k and v are 16 wide
        new_adapter(base, paper_plan(3, 17, separate=True), "svd", 1.0, 0)
    with pytest.raises(AdapterError, match="no SVD for a down-projection of o"):
        new_adapter(base, paper_plan(3, 4, ("q", "o"), separate=True), "svd", 1.0, 0)
    with pytest.raises(AdapterError, match="supported: random, svd"):
        new_adapter(base, paper_plan(3, 4), "fourier", 1.0, 0)


# Files


def test_files_round_trip(made: Made, tmp_path: Path) -> None:
    write_adapter(made.adapter, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert read.config == made.adapter.config
    for mine, theirs in ((made.adapter.basis, read.basis), (made.adapter.cores, read.cores)):
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == sorted([ADAPTER_CONFIG, BASIS, CORES])
    with pytest.raises(UsageError, match="already exists"):
        write_adapter(made.adapter, tmp_path / "adapter")


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    write_adapter(made.adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_cores_of_another_basis_are_refused(folder: Path, made: Made, tmp_path: Path) -> None:
    write_adapter(new_adapter(oracle(made), made.adapter.config.plan, "random", 1.0, seed=1), tmp_path / "other")
    (folder / CORES).write_bytes((tmp_path / "other" / CORES).read_bytes())
    with pytest.raises(WrongPair, match="cores for basis"):
        read_adapter(folder)


def test_a_damaged_basis_is_noticed(folder: Path) -> None:
    tensors = load_file(folder / BASIS)
    name = next(iter(tensors))
    tensors[name][0, 0] += 1e-3
    save_file(tensors, folder / BASIS)
    with pytest.raises(DamagedFile, match=f"basis hash is .* {ADAPTER_CONFIG} says"):
        read_adapter(folder)
    (folder / BASIS).write_bytes(b"basis")
    with pytest.raises(DamagedFile, match="not a readable safetensors file"):
        read_adapter(folder)


def test_each_missing_file_is_named(folder: Path) -> None:
    for name in (CORES, BASIS, ADAPTER_CONFIG):
        (folder / name).unlink()
        with pytest.raises(MissingFile, match=name):
            read_adapter(folder)


def test_a_config_of_another_kind_is_refused(folder: Path) -> None:
    path = folder / ADAPTER_CONFIG
    config = json.loads(path.read_text())
    for change, kind in (
        ({"version": ADAPTER_VERSION + 1}, AdapterError),
        ({"scale": "1"}, ManifestError),
        ({"surprise": 1}, ManifestError),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(kind, match=next(iter(change)) if kind is ManifestError else f"expected plora-adapter {ADAPTER_VERSION}"):
            read_adapter(folder)


def test_each_wrong_tensor_is_named(made: Made, folder: Path) -> None:
    adapter = made.adapter
    name = core_name(1, "k")
    shape = list(adapter.config.plan.trained[name])
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({**adapter.cores, "layers.7.q.core": torch.zeros(6, 6)}, "unknown tensor layers.7.q.core"),
        ({key: value for key, value in adapter.cores.items() if key != name}, f"tensor {name} is missing"),
        ({**adapter.cores, name: torch.zeros(5, 6)}, rf"{name} has shape \[5, 6\], expected \[{shape[0]}, {shape[1]}\]"),
        ({**adapter.cores, name: torch.full((6, 6), float("nan"))}, f"{name} has values that are not finite"),
        ({**adapter.cores, name: torch.full((6, 6), float("inf"))}, "not finite"),
    ]
    metadata = {"format": "plora-cores-1", "basis": adapter.config.basis}
    for cores, complaint in cases:
        with pytest.raises(AdapterError, match=complaint):
            check_shapes(cores, adapter.config.plan.trained, "cores")
        save_file(cores, folder / CORES, metadata)
        with pytest.raises(AdapterError, match=complaint):
            read_adapter(folder)
    save_file(adapter.cores, folder / CORES, metadata)
    read_adapter(folder)  # the control
    basis = {key: value[:-1] for key, value in adapter.basis.items()}
    with pytest.raises(AdapterError, match=r"basis: tensor sources\.0\.shared\.down has shape"):
        make_adapter(adapter.config.plan, oracle(made).shape, basis, 1.0, "random", 0, "", "")


# Fingerprint


def test_fingerprint_is_of_the_values_alone(made: Made, tmp_path: Path) -> None:
    base = oracle(made)
    save_tiny_base(tmp_path / "twice", "llama")
    base.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert {read_base(str(tmp_path / name)).fingerprint for name in ("twice", "sharded")} == {base.fingerprint}
    base.model.model.layers[2].mlp.up_proj.weight.data[3, 4] += 1e-6
    base.model.save_pretrained(tmp_path / "edited")
    assert read_base(str(tmp_path / "edited")).fingerprint != base.fingerprint


def test_an_adapter_knows_its_base(made: Made) -> None:
    base, adapter = oracle(made), made.adapter
    check_base(adapter, base.fingerprint, base.name)
    with pytest.raises(WrongPair, match="pass the base that it was tuned on"):
        check_base(adapter, "0" * 64, "another")
    imported = Adapter(dataclasses.replace(adapter.config, base=""), adapter.basis, adapter.cores)
    check_base(imported, "0" * 64, "another")  # imported checkpoints do not say
