"""A persona's cores, read from their file and laid out for one matrix product per exchange (the entry's is exchange -1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..artifact.errors import DamagedFile, MissingFile, WrongPair
from ..artifact.names import CORES_FORMAT
from ..artifact.plan import ExchangePlan

Floats = NDArray[np.float32]


def read_cores(path: Path, plan: ExchangePlan, basis: str) -> dict[int, Floats]:
    """Exchange index -> its cores as one block matrix [I, C], zero where a core does not read a column.

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
    blocks = zero_cores(plan)
    names = {core.name for core in plan.cores}
    if set(cores) != names:
        odd = sorted(set(cores) ^ names)[0]
        raise DamagedFile(f"{path}: tensor {odd} is {'unknown' if odd in cores else 'missing'}; the plan has {len(names)} cores")
    for exchange in plan.all_exchanges:
        for core in exchange.cores:
            values = cores[core.name]
            if values.shape != (core.out_rank, core.rank) or values.dtype != np.float32 or not np.isfinite(values).all():
                raise DamagedFile(
                    f"{path}: {core.name} is {list(values.shape)} {values.dtype}, expected finite [{core.out_rank}, {core.rank}] float32"
                )
            blocks[exchange.index][core.up_start : core.up_stop, core.down_start : core.down_stop] = values
    return blocks


def zero_cores(plan: ExchangePlan) -> dict[int, Floats]:
    """Cores that change nothing: the base model."""
    return {e.index: np.zeros((e.injection_columns, e.compressed_columns), np.float32) for e in plan.all_exchanges}
