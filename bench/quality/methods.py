"""The rows of the study: ways to make the frozen base learn, each with its trainable parameters as a module beside the base."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from plora.artifact.plan import TARGETS, ExchangePlan
from plora.artifact.plans import QKV, entry_plan, grouped_plan, paper_plan
from plora.models.adapter import Adapter, replace_cores
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base
from plora.models.control import StaticBias
from plora.models.formula import Cores
from plora.planner.candidates import Candidate

LORA_RANK = 16
LORA_ALPHA = 32
RANK = 64
FRONT_LAYERS = 4


class Attached(Protocol):
    """Trainable parameters that are hooked into the base; `remove` leaves the base as it was. An nn.Module."""

    parameters: Any
    to: Any

    def remove(self) -> None: ...


class PeftLora(nn.Module):
    """LoRA (arXiv 2106.09685) by peft: B starts at zero, A random, alpha / r = 2, no dropout."""

    def __init__(self, model: Any, targets: tuple[str, ...]) -> None:
        import peft

        super().__init__()
        modules = [f"{target}_proj" for target in targets]
        config = peft.LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules=modules)
        with warnings.catch_warnings():  # peft 0.21 asks transformers 5 by a name that it deprecates
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped: Any = peft.get_peft_model(model, config)
        self._unload = wrapped.unload
        self.weights = nn.ParameterList([weight for weight in model.parameters() if weight.requires_grad])

    def remove(self) -> None:
        self._unload()


class PlanCores(nn.Module):
    """PrivateLoRA's cores under an exchange plan, by the formula that plora-tune trains and plora-export verifies."""

    def __init__(self, base: Base, plan: ExchangePlan, basis_kind: str, seed: int) -> None:
        super().__init__()
        self.cores = Cores(base.model, _start(base, plan, basis_kind, seed), torch.float32)

    def remove(self) -> None:
        self.cores.remove()


_BASES: dict[tuple[ExchangePlan, str, int], Adapter] = {}
"""Of this process: a basis takes as long as some steps, and sweeps want the same one again."""


def _start(base: Base, plan: ExchangePlan, basis_kind: str, seed: int) -> Adapter:
    """Cores of zero on a basis by the seed."""
    key = (plan, basis_kind, seed)
    if key not in _BASES:
        _BASES[key] = new_adapter(base, plan, basis_kind, 1.0, seed, features_seed=seed)
    kept = _BASES[key]
    return replace_cores(kept, {name: core.clone() for name, core in kept.cores.items()})  # tuning changes cores in place


@dataclass(frozen=True)
class Method:
    """attach: from the base and a seed; plan: None if no exchange plan holds it; guess: where the search for a learning rate starts."""

    name: str
    words: str
    guess: float
    attach: Callable[[Base, int], Attached]
    plan: Callable[[int], ExchangePlan] | None = None


def _under(name: str, words: str, plan: Callable[[int], ExchangePlan], basis_kind: str = "pca", guess: float = 3e-3) -> Method:
    return Method(name, words, guess, lambda base, seed: PlanCores(base, plan(base.shape.layers), basis_kind, seed), plan)


def _entry(**changes: Any) -> Callable[[int], ExchangePlan]:
    settings: dict[str, Any] = {"front_layers": FRONT_LAYERS, "rank": RANK, **changes}
    return lambda layers: entry_plan(layers, **settings)


def _paper(layers: int) -> ExchangePlan:
    return paper_plan(layers, RANK)


def _grouped(layers: int) -> ExchangePlan:
    return grouped_plan(layers, 6, RANK, TARGETS)


def _exchanges(count: int) -> Callable[[int], ExchangePlan]:
    return Candidate(FRONT_LAYERS, count, False, TARGETS, 0, RANK).plan


def _own_inputs(layers: int) -> ExchangePlan:
    return paper_plan(layers, RANK, TARGETS)


def _shared(values: int) -> Method:
    words = f"entry plan, shared injection of {values} values"
    return _under(f"entry-{values}", words, _entry(shared_injection=values), guess=1e-2)


def _features(count: int) -> Method:
    return _under(f"entry-features-{count}", f"entry plan, {count} private features (non-linear cores)", _entry(features=count), guess=1e-2)


METHODS = {
    method.name: method
    for method in (
        Method("control", "static bias at q, k, v: LoRA's targets, reading no input", 3e-2, lambda base, seed: StaticBias(base.model, QKV)),
        Method("lora", "LoRA r = 16 on q, k, v (peft)", 1e-2, lambda base, seed: PeftLora(base.model, QKV)),
        Method("lora-all", "LoRA r = 16 on all seven linear targets (peft)", 3e-3, lambda base, seed: PeftLora(base.model, TARGETS)),
        _under("paper", "the paper's plan and random basis: q, k, v, one exchange a layer", _paper, "random", 1e-2),
        _under("grouped", "grouped plan, one exchange for six layers, all seven targets", _grouped),
        _under("entry", "entry plan, 4 front layers, all seven targets: one round trip", _entry(), guess=1e-2),
        _under("entry-exchanges-4", "entry plan and four exchanges, 4 front layers, all seven targets", _exchanges(4)),
        _under("own-inputs", "the paper's arrangement, all seven targets, pca basis: one exchange a layer", _own_inputs),
        _under("entry-qkv", "entry plan, 4 front layers, LoRA's own targets: q, k, v", _entry(targets=QKV), guess=1e-2),
        _shared(2048),
        _shared(512),
        _features(64),
        _under("entry-front-0", "entry plan, no front layers", _entry(front_layers=0)),
        _under("entry-front-8", "entry plan, 8 front layers", _entry(front_layers=8)),
        _under("entry-rank-32", "entry plan, rank 32", _entry(rank=32)),
        _under("entry-rank-128", "entry plan, rank 128", _entry(rank=128)),
        _under("entry-rank-192", "entry plan, rank 192, all that k and v are wide", _entry(rank=192), guess=1e-3),
        Method("bias-all", "static bias at all seven linear targets", 1e-2, lambda base, seed: StaticBias(base.model, TARGETS)),
    )
}
HEADLINE = ("control", "lora", "entry", "grouped", "paper")
