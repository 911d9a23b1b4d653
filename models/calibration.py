"""What u looks like on a little public text: the covariances from which a PCA basis is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.errors import AdapterError, DataError, MissingFile
from .checkpoint import Base, read_tokenizer

DEFAULT_TEXT = Path(__file__).with_name("calibration.txt")
"""Written for plora: everyday English about nobody in particular."""
TOKENS = 2048
"""Used at the most: as many as the prototype had from which this basis comes (docs/tuning.md)."""
WINDOW_TOKENS = 256
TOKENS_PER_RANK = 4
"""Fewer observations than this per direction, and the trailing directions are noise."""
SMALLEST_VARIANCE = 1e-8
"""Of a direction, relative to the largest: below it lies rounding, which whitening would blow up."""


def covariances(base: Base, layers: list[int], rank: int, path: Path | None) -> dict[int, Tensor]:
    """Covariance `[hidden, hidden]` float64 of u, the output of the input RMSNorm of each of `layers`, over the text.

    Position 0 of each window is left out: attention sinks make it unlike any other. Raises MissingFile, DataError.
    """
    path = path or DEFAULT_TEXT
    tokens = _tokens(base, path)
    windows = [tokens[at : at + WINDOW_TOKENS] for at in range(0, len(tokens), WINDOW_TOKENS)]
    seen = sum(len(window) - 1 for window in windows)
    if seen < TOKENS_PER_RANK * rank:
        raise DataError(
            f"{path}: {len(tokens)} tokens of calibration text, a basis of rank {rank} needs at least "
            f"{TOKENS_PER_RANK * rank + len(windows)}; add text or lower the rank"
        )
    moments = {layer: _Moments(base.shape.hidden) for layer in layers}
    decoder, all_layers = base.model.model, base.model.model.layers
    hooks = [all_layers[layer].input_layernorm.register_forward_hook(moments[layer].hook) for layer in moments]
    decoder.layers = all_layers[: max(layers) + 1]  # what lies behind the last source need not run
    try:
        with torch.inference_mode():
            for window in windows:
                decoder(torch.tensor([window]), use_cache=False)
    finally:
        decoder.layers = all_layers
        for hook in hooks:
            hook.remove()
    return {layer: each.covariance() for layer, each in moments.items()}


def _tokens(base: Base, path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found; --calibration takes a text file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    tokens = read_tokenizer(base.source)(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [token for token in tokens if token < base.shape.vocabulary][:TOKENS]


class _Moments:
    """Sums of u and u uᵀ."""

    def __init__(self, hidden: int) -> None:
        self.count = 0
        self.sum = torch.zeros(hidden, dtype=torch.float64)
        self.squares = torch.zeros(hidden, hidden, dtype=torch.float64)

    def hook(self, module: Any, inputs: Any, u: Tensor) -> None:
        rows = u[0, 1:].double().cpu()
        self.count += len(rows)
        self.sum += rows.sum(0)
        self.squares += rows.T @ rows

    def covariance(self) -> Tensor:
        mean = self.sum / self.count
        return self.squares / self.count - torch.outer(mean, mean)


def whitened_directions(covariance: Tensor, rank: int, where: str) -> Tensor:
    """Λ^-1/2 Eᵀ `[rank, hidden]` float32 of the `rank` largest eigenvalues.

    Raises AdapterError if u does not vary in so many directions.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:rank], vectors.flip(-1)[:, :rank]
    found = int((values > SMALLEST_VARIANCE * values[0]).sum())
    if found < rank:
        raise AdapterError(f"{where}: on the calibration text u varies in {found} directions only, rank {rank} asked for; use other text")
    return (vectors / values.sqrt()).T.float().contiguous()
