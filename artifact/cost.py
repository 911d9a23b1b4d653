"""What one token costs under a plan: bytes each way, round trips, and what that allows over a link (design, part 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .errors import UsageError
from .plan import ExchangePlan
from .shape import DTYPE_BYTES, DecoderShape

RTTS_MILLIS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)
KINDS = ("entry", "compressed", "injections", "exit")
"""Of wire tensors."""
WIRE_BYTES = {**DTYPE_BYTES, "int8": 1}
"""Bytes per value on the wire."""
SCALE_BYTES = 4
"""Of an int8 tensor, for each token: one float32."""
Wire = str | Mapping[str, str]
"""One dtype for all tensors, or a dtype by kind; kinds not named are fp32."""


@dataclass(frozen=True)
class Payload:
    """Tensor bytes of one token, without any framing. up: device to cloud; down: cloud to device.

    low_rank: compressed and injections, the entry's included; full_rank: what the same plan of targets would exchange without A, B
    and P, at the same precision: u down once per source in the cloud (an entry source's u is the device's own) as compressed are,
    each target's change up at its full width as injections are, one tensor per exchange. int8: scales included.
    """

    entry_up: int
    exit_down: int
    low_rank_up: int
    low_rank_down: int
    full_rank_up: int
    full_rank_down: int

    @property
    def up(self) -> int:
        return self.entry_up + self.low_rank_up

    @property
    def down(self) -> int:
        return self.exit_down + self.low_rank_down

    @property
    def communication_reduction(self) -> float:
        """1 - low-rank bytes / full-rank bytes, entry and exit left out on both sides (design, part 4)."""
        full = self.full_rank_up + self.full_rank_down
        return 1 - (self.low_rank_up + self.low_rank_down) / full if full else 0.0


def payload(plan: ExchangePlan, shape: DecoderShape, wire: Wire) -> Payload:
    """Bytes per generated token of `plan` with wire tensors of `wire`: one row of each tensor, one exit row. Raises UsageError."""
    dtypes = by_kind(wire)
    up = [exchange.injection_columns for exchange in plan.all_exchanges]
    down = [exchange.compressed_columns for exchange in plan.exchanges]
    full_up = [sum(shape.out_features(column.target) for column in exchange.columns) for exchange in plan.all_exchanges]
    return Payload(
        entry_up=row_bytes(dtypes["entry"], shape.hidden),
        exit_down=row_bytes(dtypes["exit"], shape.hidden),
        low_rank_up=row_bytes(dtypes["injections"], *up),
        low_rank_down=row_bytes(dtypes["compressed"], *down),
        full_rank_up=row_bytes(dtypes["injections"], *full_up),
        full_rank_down=len(plan.exchanges) * row_bytes(dtypes["compressed"], shape.hidden),
    )


def by_kind(wire: Wire) -> dict[str, str]:
    """The dtype of every kind. Raises UsageError for a kind or dtype that does not exist."""
    named = dict.fromkeys(KINDS, wire) if isinstance(wire, str) else wire
    for kind, dtype in named.items():
        if kind not in KINDS:
            raise UsageError(f"wire dtype for {kind!r}: the kinds are {', '.join(KINDS)}")
        if dtype not in WIRE_BYTES:
            raise UsageError(f"wire dtype {dtype!r} for {kind}, expected one of {', '.join(WIRE_BYTES)}")
    return {kind: named.get(kind, "fp32") for kind in KINDS}


def row_bytes(dtype: str, *columns: int) -> int:
    """One token's bytes in tensors of so many columns."""
    return sum(columns) * WIRE_BYTES[dtype] + (len(columns) * SCALE_BYTES if dtype == "int8" else 0)


def prompt_bytes(plan: ExchangePlan, shape: DecoderShape, wire: Wire, tokens: int) -> tuple[int, int]:
    """(up, down) of a prompt of `tokens` tokens. Of the exit only the last row comes back, `[1, hidden]`, unless the device has back
    layers, whose KV cache needs every token's: `[tokens, hidden]`."""
    one = payload(plan, shape, wire)
    exit_rows = tokens if plan.back_layers else 1
    return tokens * one.up, tokens * one.low_rank_down + exit_rows * one.exit_down


def unshared(plan: ExchangePlan) -> ExchangePlan:
    """The same plan with a core of its own for each layer and target: what a shared injection saves is the difference."""
    return replace(plan, sources=tuple(replace(source, shared_injection=0) for source in plan.sources))


def tokens_per_second(plan: ExchangePlan, rtt_millis: float, compute_millis: float) -> float:
    """1 / (round trips · RTT + compute): the wall that round trips are; bandwidth comes on top. compute_millis: above 0."""
    return 1000.0 / (plan.round_trips * rtt_millis + compute_millis)
