"""The order of one step, in one place: device, cloud, verification and cost model all walk these stages.

front layers? -> entry -> (segment | exchange)* -> exit -> back layers?
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .plan import Exchange, ExchangePlan, Segment


@dataclass(frozen=True)
class FrontLayers:
    """Device: decoder layers 0 <= layer < stop."""

    stop: int


@dataclass(frozen=True)
class Entry:
    """Device to cloud: the hidden state `[T, hidden]`, with injections `[T, I]` if the entry layer is a source."""

    exchange: Exchange | None


@dataclass(frozen=True)
class Exit:
    """Cloud to device: the residual stream `[rows, hidden]` before the final norm or the back layers."""


@dataclass(frozen=True)
class BackLayers:
    """Device: decoder layers first <= layer < stop."""

    first: int
    stop: int


Stage = FrontLayers | Entry | Segment | Exchange | Exit | BackLayers


@lru_cache(maxsize=64)
def walk(plan: ExchangePlan) -> tuple[Stage, ...]:
    """The stages of one step of `plan`, in order."""
    stages: list[Stage] = []
    if plan.front_layers:
        stages.append(FrontLayers(plan.front_layers))
    stages.append(Entry(plan.entry_exchange))
    for segment in plan.segments:
        if segment.exchange is not None:
            stages.append(plan.exchanges[segment.exchange])
        stages.append(segment)
    stages.append(Exit())
    if plan.back_layers:
        stages.append(BackLayers(plan.layers - plan.back_layers, plan.layers))
    return tuple(stages)


@dataclass(frozen=True)
class Leg:
    """What the cloud does between two waits for the device: a segment's layers, if there are any yet, then the down-projection of
    `exchange` with the input norm of the segment that it opens, or with None the exit."""

    segment: Segment | None
    exchange: Exchange | None
    opens: Segment | None


@lru_cache(maxsize=64)
def legs(plan: ExchangePlan) -> tuple[Leg, ...]:
    """The cloud's share of a step of `plan`, in order: one leg per round trip, the entry's first."""
    found: list[Leg] = []
    segment: Segment | None = None
    for stage in walk(plan):
        if isinstance(stage, Exchange):
            opens = next(each for each in plan.segments if each.exchange == stage.index)
            found.append(Leg(segment, stage, opens))
        elif isinstance(stage, Segment):
            segment = stage
        elif isinstance(stage, Exit):
            found.append(Leg(segment, None, None))
    return tuple(found)
