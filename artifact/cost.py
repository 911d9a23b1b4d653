"""What one token costs under a plan: bytes each way, round trips, and what that allows over a link (design, part 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .plan import ExchangePlan
from .shape import DTYPE_BYTES, DecoderShape

RTTS_MILLIS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class Payload:
    """Tensor bytes of one token, without any framing. up: device to cloud; down: cloud to device.

    low_rank: compressed and injections, the entry's included; full_rank: what the same plan of targets would exchange without A, B
    and P, at the same precision: u down once per source in the cloud (an entry source's u is the device's own), each target's change
    up at its full width.
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


def payload(plan: ExchangePlan, shape: DecoderShape, dtype: str) -> Payload:
    """Bytes per generated token of `plan` with wire tensors of `dtype`: one row of each tensor, one exit row."""
    size = DTYPE_BYTES[dtype]
    up = sum(exchange.injection_columns for exchange in plan.all_exchanges)
    down = sum(exchange.compressed_columns for exchange in plan.exchanges)
    full_up = sum(shape.out_features(column.target) for column in plan.columns)
    return Payload(
        entry_up=shape.hidden * size,
        exit_down=shape.hidden * size,
        low_rank_up=up * size,
        low_rank_down=down * size,
        full_rank_up=full_up * size,
        full_rank_down=len(plan.exchanges) * shape.hidden * size,
    )


def prompt_bytes(plan: ExchangePlan, shape: DecoderShape, dtype: str, tokens: int) -> tuple[int, int]:
    """(up, down) of a prompt of `tokens` tokens. Of the exit only the last row comes back, `[1, hidden]`, unless the device has back
    layers, whose KV cache needs every token's: `[tokens, hidden]`."""
    one = payload(plan, shape, dtype)
    exit_rows = tokens if plan.back_layers else 1
    return tokens * one.up, tokens * one.low_rank_down + exit_rows * one.exit_down


def unshared(plan: ExchangePlan) -> ExchangePlan:
    """The same plan with a core of its own for each layer and target: what a shared injection saves is the difference."""
    return replace(plan, sources=tuple(replace(source, shared_injection=0) for source in plan.sources))


def tokens_per_second(plan: ExchangePlan, rtt_millis: float, compute_millis: float) -> float:
    """1 / (round trips · RTT + compute): the wall that round trips are; bandwidth comes on top. compute_millis: above 0."""
    return 1000.0 / (plan.round_trips * rtt_millis + compute_millis)
