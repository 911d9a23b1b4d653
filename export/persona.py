"""A new persona for an exported basis: its cores alone."""

from __future__ import annotations

from pathlib import Path

from ..artifact.errors import UsageError, WrongPair
from ..artifact.folders import check_new
from ..artifact.manifest import EdgeManifest, read_manifest
from ..artifact.names import CORES
from ..artifact.plan import ExchangePlan
from ..artifact.strict import plain
from ..models.adapter import read_adapter, write_cores


def first_difference(tuned: ExchangePlan, exported: ExchangePlan) -> str:
    """Where two plans part, naming the layer."""
    for name in ("layers", "front_layers", "back_layers"):
        if getattr(tuned, name) != getattr(exported, name):
            return f"{name} {getattr(tuned, name)} here, {getattr(exported, name)} there"
    for what in ("sources", "adapted"):
        ours, theirs = ({each.layer: each for each in getattr(plan, what)} for plan in (tuned, exported))
        for layer in sorted({*ours, *theirs}):
            if ours.get(layer) != theirs.get(layer):
                return f"layer {layer} is {plain(ours.get(layer))} here, {plain(theirs.get(layer))} there"
    raise AssertionError("the plans are equal")


def export_cores(adapter: Path, out: Path, exported: Path | None, replace: bool) -> Path:
    """Writes `out/cores.safetensors`. exported: an export that it must fit. Raises WrongPair if it does not."""
    if not adapter.is_dir():
        raise UsageError(f"--adapter {adapter}: --cores-only takes an adapter folder")
    read = read_adapter(adapter)
    if exported is not None:
        manifest = read_manifest(EdgeManifest, exported / "edge")
        if (plan := manifest.contract.plan) != read.config.plan:
            raise WrongPair(f"{adapter}: it was tuned under another plan than {exported}: {first_difference(read.config.plan, plan)}")
        if manifest.contract.basis != read.config.basis:
            raise WrongPair(
                f"{adapter}: its basis is {read.config.basis[:16]}…, but {exported} was exported with {manifest.contract.basis[:16]}…; "
                "tune with --basis on the adapter that was exported"
            )
    check_new(out / CORES, replace)
    write_cores(read, out / CORES)
    return out / CORES
