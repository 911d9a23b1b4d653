"""What the cloud can learn of linear cores, and of cores with private features, from what it sees: `make bench-recovery`.

It sees pairs (A u, injection) of public text (GSM8K questions) under the demo's plan, and tries two things: least squares with a bias,
and a student: a network of the cores' own shape, fitted by Adam. Lower bounds: a better attacker finds more.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plora.artifact.errors import PloraError, UsageError
from plora.artifact.names import down_name, shared_core_name
from plora.artifact.plan import SHARED
from plora.models.adapter import Adapter, read_adapter
from plora.models.calibration import WINDOW_TOKENS
from plora.models.checkpoint import Base, read_base, read_tokenizer
from plora.models.formula import Cores, adapted
from plora.models.packing import pack
from plora.models.plan_flags import PlanChoice
from plora.models.rows import Example, read_examples
from plora.models.trainer import Tuned
from plora.models.tune import tune
from plora.models.tune_config import TuneConfig

from .conditions import ROOT, write_results
from .feature_time import device_time
from .run import model_path

DATA = ROOT.parent / "shared" / "data"
QUESTIONS = Path("gsm8k", "train.jsonl")
PERSONA = ROOT / "examples" / "persona"
FRONT_LAYERS, RANK, VALUES = 4, 64, 2048
"""Of the demo's plan: 4 front layers, rank 64, a shared injection of 2,048 values."""
FEATURES = (0, 64, 256)
SEEN_TOKENS = (1_000, 10_000)
HELD_OUT_TOKENS = 1_000
TUNE_STEPS = 40
STUDENT_STEPS, STUDENT_ROWS, STUDENT_RATE = 2_000, 256, 3e-3
"""Adam's steps, pairs per step, and peak rate, which falls to zero along a cosine."""
STUDENT_WIDTHS = (1,)
"""Features of the student, in those of the cores."""
MIXED = 1_000
"""Injections whose mixtures show the directions."""
RIDGE = 1e-6
"""Of the mean square of the student's features, in its last layer's solution."""
ASKED = 10
"""Of the persona's 30 held-out rows, evenly: what is learned of the cores is tried on these."""

Map = Callable[[Tensor], Tensor]
"""Compressed `[..., C]` -> injection `[..., I]`."""


# What the cloud sees


def public_tokens(base: Base, data: Path, count: int) -> list[int]:
    """At least `count` tokens of questions. Raises UsageError if there is no such file."""
    path = data / QUESTIONS
    if not path.is_file():
        raise UsageError(f"{path}: not found; --data takes the folder that holds {QUESTIONS}")
    tokenizer, tokens = read_tokenizer(base.source), list[int]()
    for line in path.read_text(encoding="utf-8").splitlines():
        tokens += tokenizer(json.loads(line)["question"] + "\n", add_special_tokens=False)["input_ids"]
        if len(tokens) >= count:
            break
    return tokens


@torch.no_grad()
def entry_inputs(base: Base, tokens: list[int]) -> Tensor:
    """u of the entry layer `[tokens, hidden]`; position 0 of each window left out, as it is unlike any other."""
    decoder, layers, rows = base.model.model, base.model.model.layers, list[Tensor]()
    hook = layers[FRONT_LAYERS].input_layernorm.register_forward_hook(lambda module, inputs, u: rows.append(u[0, 1:].clone()))
    decoder.layers = layers[: FRONT_LAYERS + 1]  # what lies behind need not run
    try:
        for at in range(0, len(tokens), WINDOW_TOKENS):
            decoder(torch.tensor([tokens[at : at + WINDOW_TOKENS]]), use_cache=False)
    finally:
        decoder.layers = layers
        hook.remove()
    return torch.cat(rows)


@torch.no_grad()
def injection_of(base: Base, adapter: Adapter, compressed: Tensor) -> Tensor:
    """What the device answers, `[T, I]`, by the formula itself."""
    (exchange,) = adapter.config.plan.all_exchanges
    with adapted(base.model, adapter) as cores:
        cores.read[exchange.source, SHARED] = cores.features(exchange.source, compressed) if exchange.features else compressed
        return cores.injection(exchange)


# The attacks


def least_squares(seen: Tensor, answered: Tensor) -> tuple[Map, Tensor]:
    """(the fitted map, its matrix `[I, C]`), with a bias."""
    ones = torch.ones(len(seen), 1, dtype=torch.float64)
    solved = torch.linalg.lstsq(torch.cat([seen.double(), ones], 1), answered.double()).solution
    matrix, bias = solved[:-1].T.float(), solved[-1].float()
    return lambda compressed: functional.linear(compressed, matrix, bias), matrix


def student(seen: Tensor, answered: Tensor, rank: int, width: int, steps: int) -> Map:
    """Fits silu(F c + f) Mᵀ of `width` features. Injections of `rank` features lie in so many directions, which any mixtures of them show:
    what is fitted are their coordinates there, the same loss for less work. M is solved for at the end."""
    generator = torch.Generator().manual_seed(0)
    mixed = answered[:MIXED].double().T @ torch.randn(len(answered[:MIXED]), rank, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(mixed).Q.float()
    size = float((answered @ directions).square().mean().sqrt())
    wanted = answered @ directions / size
    weight = (torch.randn(width, seen.shape[1], generator=generator) / seen.shape[1] ** 0.5).requires_grad_()
    bias = torch.zeros(width, requires_grad=True)
    last = torch.zeros(rank, width, requires_grad=True)
    adam = torch.optim.Adam([weight, bias, last], STUDENT_RATE)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        rows = torch.randint(0, len(seen), (STUDENT_ROWS,), generator=generator)
        loss = functional.mse_loss(functional.silu(functional.linear(seen[rows], weight, bias)) @ last.T, wanted[rows])
        adam.zero_grad()
        loss.backward()
        adam.step()
        falling.step()
    with torch.no_grad():
        features = functional.silu(functional.linear(seen, weight, bias)).double()
        gram = features.T @ features
        gram += RIDGE * gram.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        core = size * directions @ torch.linalg.solve(gram, features.T @ wanted.double()).T.float()
    return lambda compressed: functional.silu(functional.linear(compressed, weight.detach(), bias.detach())) @ core.T


# What it is worth


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((got - expected).norm() / expected.norm())


@torch.no_grad()
def says(base: Base, adapter: Adapter, rows: list[Example], stolen: Map | None = None) -> dict[str, float]:
    """Loss and token accuracy of the persona's held-out rows with the device's cores, or with what was learned of them."""
    with adapted(base.model, adapter) as cores:
        if stolen is not None:
            replace_injection(cores, stolen)
        model = Tuned(base.model, cores, base.shape.windows).eval()
        packs = pack(rows)
        out, tokens = model(packs), sum(len(each.at) for each in packs)
    return {"loss": float(out["loss"]) / tokens, "accuracy": float(out["right"]) / tokens}


def replace_injection(cores: Cores, stolen: Map) -> None:
    """The cloud computes what the device would have returned."""
    cores.injection = lambda exchange: stolen(cores.compressed[exchange.source, SHARED])  # type: ignore[method-assign]


def attack(base: Base, adapter: Adapter, compressed: Tensor, rows: list[Example], steps: int) -> dict[str, Any]:
    """Both attacks on one persona, after so many tokens; relative errors on tokens not seen."""
    (exchange,) = adapter.config.plan.all_exchanges
    injection = injection_of(base, adapter, compressed)
    tried, expected = compressed[-HELD_OUT_TOKENS:], injection[-HELD_OUT_TOKENS:]
    figures: dict[str, Any] = {
        "parameters": sum(tensor.numel() for tensor in adapter.cores.values()),
        "persona": says(base, adapter, rows),
        "error_of_the_mean": relative_error(injection[:-HELD_OUT_TOKENS].mean(0).expand_as(expected), expected),
    }
    for count in SEEN_TOKENS:
        seen, answered = compressed[:count], injection[:count]
        fitted, matrix = least_squares(seen, answered)
        found: dict[str, Any] = {"least_squares": relative_error(fitted(tried), expected)}
        maps = {"least_squares": fitted}
        if exchange.features:
            for width in STUDENT_WIDTHS:
                began, name = time.monotonic(), f"student_{width}x"
                maps[name] = student(seen, answered, exchange.features, width * exchange.features, steps)
                found[name] = relative_error(maps[name](tried), expected)
                found[f"{name}_seconds"] = round(time.monotonic() - began, 1)
        else:
            found["core"] = relative_error(matrix, adapter.cores[shared_core_name(exchange.source)])
        if count == SEEN_TOKENS[-1]:
            found["persona_with"] = {name: says(base, adapter, rows, stolen) for name, stolen in maps.items()}
        figures[f"after_{count}_tokens"] = found
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with gsm8k/train.jsonl")
    parser.add_argument("--steps", type=int, default=TUNE_STEPS, help="of tuning; other than the default, nothing is written")
    parser.add_argument("--student-steps", type=int, default=STUDENT_STEPS, help="of the student; as above")
    parser.add_argument("--base", help="where the base lies, if not in the installed package")
    parser.add_argument(
        "--adapters", type=Path, help="keeps the tuned adapters there, by features, and takes those that are there; as above"
    )
    arguments = parser.parse_args()
    try:
        base = arguments.base or model_path()
        figures = measure(base, arguments.data, arguments.steps, arguments.student_steps, arguments.adapters)
    except PloraError as error:
        sys.exit(str(error))
    print(json.dumps(figures, indent=1))
    if (arguments.steps, arguments.student_steps, arguments.adapters) == (TUNE_STEPS, STUDENT_STEPS, None):
        print(write_results("recovery", figures, "make bench-recovery"))


def measure(path: str, data: Path, steps: int, student_steps: int, adapters: Path | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    base = read_base(path)
    count = SEEN_TOKENS[-1] + HELD_OUT_TOKENS
    u = entry_inputs(base, public_tokens(base, data, count + count // WINDOW_TOKENS + 1))[:count]
    rows = read_examples(PERSONA / "held_out.jsonl", read_tokenizer(base.source), 512)
    rows = rows[:: len(rows) // ASKED]
    figures: dict[str, Any] = {"seen_tokens": SEEN_TOKENS, "held_out_tokens": HELD_OUT_TOKENS, "tune_steps": steps}
    figures["student"] = {"steps": student_steps, "pairs_per_step": STUDENT_ROWS, "peak_rate": STUDENT_RATE}
    figures["device_micros"] = device_time(base.shape, RANK, VALUES, FEATURES)
    print(json.dumps(figures), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for features in FEATURES:
            folder = (adapters or Path(scratch)) / str(features)
            if not folder.exists():
                tune_persona(path, folder, features, steps)
            adapter = read_adapter(folder)
            if not features:
                figures["persona_without_cores"] = says(base, adapter, rows, lambda seen: torch.zeros(*seen.shape[:-1], VALUES))
            compressed = u @ adapter.basis[down_name(FRONT_LAYERS, SHARED)].T
            figures[f"{features} features" if features else "linear"] = found = attack(base, adapter, compressed, rows, student_steps)
            print(features, json.dumps(found), flush=True)
    return figures


def tune_persona(base: str, out: Path, features: int, steps: int) -> None:
    """The demo's persona on the demo's plan, in a few steps."""
    choice = PlanChoice("entry", (RANK,), front_layers=FRONT_LAYERS, shared_injection=VALUES, core_features=features)
    tune(TuneConfig(base, PERSONA / "rows.jsonl", out, choice.plan, basis_kind="pca", steps=steps, device="cpu", features_seed=0))


if __name__ == "__main__":
    main()
