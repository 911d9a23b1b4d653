"""The static-bias control: what tuning reaches without reading its input at any projection.

    y_t = W_t x_t + b_t        b_t `[out]` trained, from zero

BitFit (arXiv 2106.10199) at projections of every layer. Against it a plan shows what it learns beyond a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .formula import target_projection


class StaticBias(nn.Module):
    """Hooked into a transformers model, as Cores is; `remove` leaves the model as it was."""

    def __init__(self, model: Any, targets: tuple[str, ...]) -> None:
        super().__init__()
        device = next(model.parameters()).device
        self.vectors = nn.ParameterDict()
        self.handles: list[Any] = []
        for index, layer in enumerate(model.model.layers):
            for target in targets:
                projection: Any = target_projection(layer, target)
                vector = nn.Parameter(torch.zeros(projection.out_features, device=device))
                self.vectors[f"{index}_{target}"] = vector
                self.handles.append(projection.register_forward_hook(self._add(vector)))

    @staticmethod
    def _add(vector: Tensor) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            return output + vector

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
