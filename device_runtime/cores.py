"""A persona's cores, read from their file and laid out for one matrix product per exchange (the entry's is exchange -1).

Beside them lie, of sources with private features, F and f: `Private` is what an exchange's graph takes of the person's, by input name.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..artifact.errors import DamagedFile, MissingFile, WrongPair
from ..artifact.names import CORES_FORMAT, features_bias_name, features_weight_name
from ..artifact.plan import Exchange, ExchangePlan

Floats = NDArray[np.float32]
Private = dict[str, Floats]
"""cores: the exchange's cores as one block matrix [I, N], zero where a core does not read a column; features [N, C] and features_bias [N]
if it has features; N is C if not."""


def read_cores(path: Path, plan: ExchangePlan, basis: str) -> dict[int, Private]:
    """Exchange index -> its graph's private inputs.

    Raises MissingFile, DamagedFile, or WrongPair for the cores of another basis.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            cores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found; pass the cores.safetensors of a persona") from None
    except (SafetensorError, OSError, TypeError) as error:
        raise DamagedFile(f"{path}: not a readable safetensors file: {error}") from None
    if metadata.get("format") != CORES_FORMAT:
        raise DamagedFile(f"{path}: format {metadata.get('format')!r}, expected {CORES_FORMAT!r}: is it a cores file?")
    if metadata.get("basis") != basis:
        raise WrongPair(
            f"{path}: cores for basis {str(metadata.get('basis'))[:16]}…, but the edge half has {basis[:16]}…; "
            "export them with plora-export --cores-only from an adapter on this basis"
        )
    expected = plan.trained
    if set(cores) != set(expected):
        odd = sorted(set(cores) ^ set(expected))[0]
        raise DamagedFile(f"{path}: tensor {odd} is {'unknown' if odd in cores else 'missing'}; the plan has {len(expected)} tensors")
    for name, size in expected.items():
        values = cores[name]
        if values.shape != size or values.dtype != np.float32 or not np.isfinite(values).all():
            raise DamagedFile(f"{path}: {name} is {list(values.shape)} {values.dtype}, expected finite {list(size)} float32")
    laid_out = zero_cores(plan)
    for exchange in plan.all_exchanges:
        private = laid_out[exchange.index]
        for core in exchange.cores:
            private["cores"][core.up_start : core.up_stop, core.down_start : core.down_stop] = cores[core.name]
        if exchange.features:
            private["features"] = cores[features_weight_name(exchange.source)]
            private["features_bias"] = cores[features_bias_name(exchange.source)]
    return laid_out


def zero_cores(plan: ExchangePlan) -> dict[int, Private]:
    """Cores that change nothing: the base model."""
    return {exchange.index: _zeros(exchange) for exchange in plan.all_exchanges}


def _zeros(exchange: Exchange) -> Private:
    rows, columns, features = exchange.injection_columns, exchange.compressed_columns, exchange.features
    private = {"cores": np.zeros((rows, exchange.feature_columns), np.float32)}
    if features:
        private |= {"features": np.zeros((features, columns), np.float32), "features_bias": np.zeros(features, np.float32)}
    return private
