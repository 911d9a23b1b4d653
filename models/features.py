"""Private features: the non-linear part of a source's cores, on the device.

    φ = silu(F A u + f)          F `[n, C]`, f `[n]`: trained, private
    injection = M φ              instead of M A u

Where F starts is as private as where it ends: who knew it would know the features of a short tuning. So it comes from the system's
entropy, never from the basis' seed, which is public.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..artifact.names import features_bias_name, features_weight_name
from ..artifact.plan import ExchangePlan


def start_features(plan: ExchangePlan, seed: int | None = None) -> dict[str, Tensor]:
    """F normal with variance 1/C, f zero, by name: compressed values of unit size give features of unit size. M is zero, so they change
    nothing yet. seed: for tests and studies alone; None draws from the system's entropy (torch's generator keeps 32 bits of that)."""
    random = np.random.default_rng(seed)
    started: dict[str, Tensor] = {}
    for exchange in plan.all_exchanges:
        if exchange.features:
            size = (exchange.features, exchange.compressed_columns)
            weight = random.standard_normal(size) / exchange.compressed_columns**0.5
            started[features_weight_name(exchange.source)] = torch.from_numpy(weight.astype(np.float32))
            started[features_bias_name(exchange.source)] = torch.zeros(exchange.features)
    return started


def features_of(compressed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """φ: `[…, C]` -> `[…, n]`."""
    return nn.functional.silu(nn.functional.linear(compressed, weight, bias))
