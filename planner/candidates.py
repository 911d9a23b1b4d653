"""The bounded grid of plans that are looked at, and what distinguishes them. All are values of ExchangePlan, made by artifact/plans.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..artifact.errors import PlanError
from ..artifact.plan import TARGETS, ExchangePlan
from ..artifact.plans import QKV, entry_plan, grouped_plan
from ..artifact.shape import DecoderShape, check_fits

FRONT_LAYERS = (0, 2, 4, 8)
"""Of those that leave the cloud more than half of the layers."""
EXCHANGES = (0, 1, 2, 4)
"""Over the network, behind an entry source on the device, which costs none; beside them the paper's arrangement: one per layer."""
SHARED = (0, 2048, 1024, 512, 256, 128)
"""Values of the shared injections of a token, all sources together; 0: each layer and target has its own."""
TARGET_SETS = (TARGETS, QKV)
RANK = 64
RANK_DIVISORS = (1, 2, 4)
SMALLEST_RANK = 4


@dataclass(frozen=True)
class Candidate:
    """own: the paper's arrangement, each layer fed by its own input, one exchange per layer; else an entry source on the device feeds the
    first group of layers, and `exchanges` later sources theirs. shared: values of the injections of a token, 0 for unshared."""

    front_layers: int
    exchanges: int
    own: bool
    targets: tuple[str, ...]
    shared: int
    rank: int

    def plan(self, layers: int) -> ExchangePlan:
        """For a decoder of `layers` layers. Raises PlanError where it cannot be."""
        cloud = layers - self.front_layers
        if self.own:
            return grouped_plan(
                layers, 1, self.rank, self.targets, front_layers=self.front_layers, shared_injection=self.shared // max(1, cloud)
            )
        if not self.exchanges:
            return entry_plan(layers, self.front_layers, self.rank, self.targets, shared_injection=self.shared)
        group = -(-cloud // (self.exchanges + 1))
        part = self.shared // (self.exchanges + 1)
        return grouped_plan(
            layers, group, self.rank, self.targets, None, False, part, front_layers=self.front_layers, entry_on_device=True
        )  # fmt: skip

    @property
    def words(self) -> str:
        """What a person calls it."""
        if self.own:
            kind = "own inputs"
        else:
            kind = "entry" if not self.exchanges else f"entry + {self.exchanges} exchange{'s' if self.exchanges > 1 else ''}"
        targets = "all seven" if self.targets == TARGETS else ",".join(self.targets)
        shared = f"shared {self.shared}" if self.shared else "unshared"
        return f"{kind}, front {self.front_layers}, {targets}, {shared}, rank {self.rank}"


def default_rank(shape: DecoderShape) -> int:
    """RANK, or as much as the decoder's narrowest projection can have."""
    return min(RANK, narrowest(shape))


def narrowest(shape: DecoderShape) -> int:
    """Width of the narrowest projection: no basis has a larger rank."""
    return min(shape.hidden, shape.kv_width, shape.query_width, shape.intermediate)


def ranks(largest: int) -> tuple[int, ...]:
    """Those of the grid, largest first."""
    return tuple(dict.fromkeys(rank for divisor in RANK_DIVISORS if (rank := largest // divisor) >= min(SMALLEST_RANK, largest)))


def own_inputs(rank: int) -> Candidate:
    """The paper's arrangement, on all seven projections; its exchanges are as many as there are layers."""
    return Candidate(0, -1, True, TARGETS, 0, rank)


def grid(shape: DecoderShape, rank: int) -> dict[Candidate, ExchangePlan]:
    """Every candidate that is legal for the decoder, once, with its plan. Raises PlanError for a rank that is too large."""
    if rank > narrowest(shape):
        raise PlanError(f"rank {rank} exceeds {narrowest(shape)}, the width of the narrowest projection; give a smaller --rank")
    found: dict[Candidate, ExchangePlan] = {}
    seen: set[ExchangePlan] = set()
    for candidate in _all(shape, rank):
        try:
            plan = candidate.plan(shape.layers)
            check_fits(plan, shape)
        except PlanError:  # a shared injection of more values than it stands for, say
            continue
        exchanges = len(plan.exchanges)
        if plan in seen or not (candidate.own or exchanges == candidate.exchanges):  # layers that do not make so many groups
            continue
        seen.add(plan)
        found[replace(candidate, exchanges=exchanges)] = plan
    return found


def _all(shape: DecoderShape, rank: int) -> Iterator[Candidate]:
    fronts = [front for front in FRONT_LAYERS if 2 * front < shape.layers]
    for targets in TARGET_SETS:
        for own_rank in ranks(rank):
            yield Candidate(0, -1, True, targets, 0, own_rank)
            for front in fronts:
                for exchanges in EXCHANGES:
                    if exchanges + 1 <= shape.layers - front:
                        for shared in SHARED:
                            yield Candidate(front, exchanges, False, targets, shared, own_rank)
