"""The frozen tensors of all calibrated plans, computed once: A of every layer and B of every projection, as a pca basis has them.

A's rows and B's columns are in order of importance, so those of a smaller rank are the first ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact.names import down_name, expand_name, up_name
from ..artifact.plan import SHARED, TARGETS, ExchangePlan
from ..artifact.plans import paper_plan
from ..models.adapter import Adapter, make_adapter
from ..models.basis import new_adapter, random_expansion
from ..models.checkpoint import Base

KIND = "pca"
"""As plora-tune takes for a plan from a file."""


@dataclass(frozen=True)
class BasisPool:
    """basis: of the paper's arrangement on all seven projections at the largest rank."""

    base: Base
    basis: dict[str, Tensor]
    seed: int

    @classmethod
    def of(cls, base: Base, rank: int, seed: int) -> BasisPool:
        """Raises AdapterError for a rank that the weights or the calibration text do not have."""
        return cls(base, new_adapter(base, paper_plan(base.shape.layers, rank, TARGETS), KIND, 1.0, seed).basis, seed)

    def adapter(self, plan: ExchangePlan) -> Adapter:
        """With cores of zero."""
        found: dict[str, Tensor] = {}
        for source in plan.sources:
            for _, rank in source.ranks:
                found[down_name(source.layer, SHARED)] = self.basis[down_name(source.layer, SHARED)][:rank].contiguous()
        for column in plan.columns:
            name = up_name(column.layer, column.target)
            found[name] = self.basis[name][:, : column.out_rank].contiguous()
        generator = torch.Generator().manual_seed(self.seed)
        for exchange in plan.all_exchanges:
            if exchange.shared:
                found[expand_name(exchange.source)] = random_expansion(exchange, generator)
        return make_adapter(plan, self.base.shape, found, 1.0, KIND, self.seed, self.base.fingerprint, self.base.name)
