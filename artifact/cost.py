"""What one token costs under a plan: bytes each way, round trips, and what that allows over a link (design, part 3)."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import ExchangePlan
from .shape import DTYPE_BYTES, DecoderShape

RTTS_MILLIS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0)


@dataclass(frozen=True)
class Payload:
    """Tensor bytes of one token, without any framing. up: device to cloud; down: cloud to device.

    low_rank: compressed and injections; full_rank: what the same plan of targets would exchange without A and B, at the same
    precision: u down (once per source), each target's change up at its full width.
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
    """Bytes per token of `plan` with wire tensors of `dtype`."""
    size = DTYPE_BYTES[dtype]
    up = sum(exchange.injection_columns for exchange in plan.all_exchanges)
    down = sum(exchange.compressed_columns for exchange in plan.exchanges)
    full_up = sum(shape.out_features(column.target) for exchange in plan.all_exchanges for column in exchange.columns)
    return Payload(
        entry_up=shape.hidden * size,
        exit_down=shape.hidden * size,
        low_rank_up=up * size,
        low_rank_down=down * size,
        full_rank_up=full_up * size,
        full_rank_down=len(plan.exchanges) * shape.hidden * size,
    )


def tokens_per_second(plan: ExchangePlan, rtt_millis: float, compute_millis: float) -> float:
    """1 / (round trips · RTT + compute): the wall that round trips are; bandwidth comes on top."""
    return 1000.0 / (plan.round_trips * rtt_millis + compute_millis)
