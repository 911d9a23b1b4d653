"""What the cloud can read under each plan, by simple attacks with public means: `make bench-privacy`. Lower bounds, all of them.

The attacker has the base model, and text of its own (the first 70 % of plora's calibration text); it is tried on the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plora.models.calibration import DEFAULT_TEXT, WINDOW_TOKENS
from plora.models.checkpoint import Base, read_base, read_tokenizer

from .conditions import write_results
from .run import model_path

FRONT_LAYERS = (0, 1, 2, 4, 8)
BACK_LAYERS = (0, 1, 2, 4, 8)
TRAIN_SHARE = 0.7
RIDGE = 1e-2
"""Of the mean squared value of the inputs."""
RANK = 64


@torch.no_grad()
def hidden_states(base: Base, tokens: list[int]) -> list[Tensor]:
    """The residual stream before each layer, and after the last, `[tokens, hidden]` each; position 0 of each window left out."""
    parts: list[list[Tensor]] = [[] for _ in range(base.shape.layers + 1)]
    places = (*base.model.model.layers, base.model.model.norm)
    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, part=part: part.append(inputs[0][0, 1:].clone()))
        for module, part in zip(places, parts, strict=True)
    ]
    for at in range(0, len(tokens), WINDOW_TOKENS):
        base.model.model(torch.tensor([tokens[at : at + WINDOW_TOKENS]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(part) for part in parts]


def without_firsts(tokens: list[int]) -> Tensor:
    return torch.tensor([token for at, token in enumerate(tokens) if at % WINDOW_TOKENS])


def nearest_rows(guess: Tensor, table: Tensor) -> Tensor:
    """Index of the table row with the largest cosine, `[T]`."""
    normal = torch.nn.functional.normalize
    return (normal(guess, dim=-1) @ normal(table, dim=-1).T).argmax(-1)


def ridge(inputs: Tensor, targets: Tensor) -> Tensor:
    """Linear map `[in, out]` by ridge regression."""
    x, y = inputs.double(), targets.double()
    gram = x.T @ x
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype), x.T @ y).float()


def read_entry(states: list[Tensor], tokens: Tensor, table: Tensor) -> dict[str, Any]:
    """Share of tokens read from the entry, by the nearest table row, and by the nearest row to what a linear map makes of it."""
    cut = int(TRAIN_SHARE * len(tokens))
    found = {}
    for layers in FRONT_LAYERS:
        train, test = states[layers][:cut], states[layers][cut:]
        mapped = test @ ridge(train, table[tokens[:cut]])
        found[str(layers)] = {
            "nearest_row": float((nearest_rows(test, table) == tokens[cut:]).float().mean()),
            "linear_map": float((nearest_rows(mapped, table) == tokens[cut:]).float().mean()),
        }
    return found


def read_exit(base: Base, states: list[Tensor]) -> dict[str, float]:
    """How often the public head, applied to the exit, gives the token that the whole model ranks first."""
    head = lambda hidden: base.model.lm_head(base.model.model.norm(hidden)).argmax(-1)  # noqa: E731
    with torch.no_grad():
        true = head(states[-1])
        return {str(layers): float((head(states[len(states) - 1 - layers]) == true).float().mean()) for layers in BACK_LAYERS}


def solve_cores(states: list[Tensor]) -> dict[str, Any]:
    """Largest error of a core, relative to its largest value, by least squares from A u and M A u of so many tokens."""
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(RANK, states[4].shape[1], generator=generator) / states[4].shape[1] ** 0.5
    core = torch.randn(RANK, RANK, generator=generator) * 0.1
    compressed = torch.nn.functional.normalize(states[4], dim=-1) * states[4].shape[1] ** 0.5 @ down.T
    injection = compressed @ core.T
    errors: dict[str, Any] = {}
    for wire, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        for count in (RANK, 2 * RANK, 10 * RANK):
            seen, answered = compressed[:count].to(dtype).double(), injection[:count].to(dtype).double()
            solved = torch.linalg.lstsq(seen, answered).solution.T
            errors.setdefault(wire, {})[str(count)] = float((solved - core.double()).abs().max() / core.abs().max())
    return errors


def main() -> None:
    base = read_base(model_path())
    tokens = read_tokenizer(base.source)(DEFAULT_TEXT.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    states = hidden_states(base, tokens)
    known = without_firsts(tokens)
    figures = {
        "tokens": {"attacker": int(TRAIN_SHARE * len(known)), "tried_on": len(known) - int(TRAIN_SHARE * len(known))},
        "tokens_read_from_entry_by_front_layers": read_entry(states, known, base.model.model.embed_tokens.weight.detach()),
        "answers_read_from_exit_by_back_layers": read_exit(base, states),
        "core_error_by_wire_and_tokens": solve_cores(states),
    }
    for name, figure in figures.items():
        print(name, figure)
    print(write_results("privacy", figures, "make bench-privacy"))


if __name__ == "__main__":
    main()
