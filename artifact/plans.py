"""The plans that have names, and plans from a file: all are values of one ExchangePlan (docs/exchange-plans.md)."""

from __future__ import annotations

from pathlib import Path

from .errors import PlanError
from .manifest import read_json
from .plan import SHARED, TARGETS, AdaptedLayer, ExchangePlan, Source
from .strict import decode

QKV = ("q", "k", "v")


def paper_plan(
    layers: int, rank: int | tuple[int, ...], targets: tuple[str, ...] = QKV, out_rank: int | None = None, separate: bool = False
) -> ExchangePlan:
    """The paper's plan: every layer is adapted from its own input, one exchange per layer (arXiv 2311.14030, 3.2)."""
    return grouped_plan(layers, 1, rank, targets, out_rank, separate)


def entry_plan(
    layers: int,
    front_layers: int,
    rank: int | tuple[int, ...],
    targets: tuple[str, ...] = TARGETS,
    out_rank: int | None = None,
    separate: bool = False,
    shared_injection: int = 0,
    back_layers: int = 0,
    features: int = 0,
) -> ExchangePlan:
    """One round trip per token: every cloud layer is fed by the first one's input, which the device already holds."""
    cloud = layers - front_layers - back_layers
    shape = (rank, targets, out_rank, separate, shared_injection)
    return grouped_plan(layers, max(1, cloud), *shape, front_layers, back_layers, entry_on_device=True, features=features)


def grouped_plan(
    layers: int,
    group: int,
    rank: int | tuple[int, ...],
    targets: tuple[str, ...] = QKV,
    out_rank: int | None = None,
    separate: bool = False,
    shared_injection: int = 0,
    front_layers: int = 0,
    back_layers: int = 0,
    entry_on_device: bool = False,
    features: int = 0,
) -> ExchangePlan:
    """One source per `group` of the cloud's layers: the group's first layer.

    rank: of every source, or one per source; out_rank: None for the rank; entry_on_device: the first source is the device's, and
    costs no exchange; features: private ones of every source. Raises PlanError.
    """
    if group < 1:
        raise PlanError(f"group of {group} layers, expected at least 1")
    unknown = [target for target in targets if target not in TARGETS]
    if unknown or len(set(targets)) != len(targets) or not targets:
        raise PlanError(f"targets {list(targets)}, expected some of {list(TARGETS)}, each once")
    if front_layers < 0 or back_layers < 0 or front_layers + back_layers >= layers:
        return ExchangePlan(layers, front_layers, back_layers, (), ())  # which refuses them, with the numbers
    ordered = [target for target in TARGETS if target in targets]
    cloud = range(front_layers, layers - back_layers)
    firsts = cloud[::group]
    ranks = (rank,) * len(firsts) if isinstance(rank, int) else rank * len(firsts) if len(rank) == 1 else rank
    if len(ranks) != len(firsts):
        raise PlanError(f"{len(ranks)} ranks for {len(firsts)} sources (layers {', '.join(map(str, firsts))}); give one, or one each")
    names = ordered if separate else [SHARED]
    sources = tuple(
        Source(first, tuple((name, own) for name in names), entry_on_device and first == front_layers, shared_injection, features)
        for first, own in zip(firsts, ranks, strict=True)
    )
    adapted: list[AdaptedLayer] = []
    for first, own in zip(firsts, ranks, strict=True):
        for layer in range(first, min(first + group, cloud.stop)):
            adapted.append(AdaptedLayer(layer, first, tuple((target, own if out_rank is None else out_rank) for target in ordered)))
    return ExchangePlan(layers, front_layers, back_layers, sources, tuple(adapted))


def read_plan(path: Path) -> ExchangePlan:
    """A plan of your own, as JSON with the keys of ExchangePlan. Raises MissingFile, DamagedFile, ManifestError, PlanError."""
    return decode(ExchangePlan, read_json(path), str(path))
