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
