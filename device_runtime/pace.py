"""How long to wait on a link: round-trip estimates, when silence is suspicious, and the pauses between attempts. No clock, no I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass

BEAT_SECONDS = 0.025
"""How often we look whether a cloud that owes us a frame has fallen silent."""
QUIET_SECONDS = 0.05
"""Silence after which we ask whether it is there. A ping and its pong are 30 bytes: over a network that has a delay, one goes with most
steps, and a link that dies is known a round trip later."""
GRACE_SECONDS = 0.05
"""For either side's own processing of a ping."""
SLOWEST_BITS_PER_SECOND = 2e6
"""Uplink that frames on their way are given time for: a ping waits behind them."""
EAGER_SECONDS = 10.0
"""So long after a link broke it is tried for at a short pace: tunnels and lifts last seconds."""
LONGEST_PAUSE_SECONDS = 5.0


@dataclass
class RoundTrip:
    """Smoothed round-trip time and its mean deviation, in seconds (RFC 6298, section 2)."""

    smoothed: float = 0.0
    deviation: float = 0.0
    samples: int = 0

    def observe(self, seconds: float) -> None:
        if not self.samples:
            self.smoothed, self.deviation = seconds, seconds / 2
        else:
            self.deviation += (abs(seconds - self.smoothed) - self.deviation) / 4
            self.smoothed += (seconds - self.smoothed) / 8
        self.samples += 1

    def patience_seconds(self, bytes_on_their_way: int, false_alarms: int) -> float:
        """For the answer to a ping, before another connection is tried beside this one. Doubles with each attempt that led nowhere."""
        upload = 8 * bytes_on_their_way / SLOWEST_BITS_PER_SECOND
        return (GRACE_SECONDS + self.smoothed + 4 * self.deviation + upload) * 2 ** min(false_alarms, 6)


def pause_seconds(trying_seconds: float, round_trip_seconds: float, generator: random.Random) -> float:
    """Before the next attempt, having tried for `trying_seconds`: 50 ms and a quarter of a round trip at first, a little more as time goes
    on, since the delay may be longer than we know, much more beyond EAGER_SECONDS, up to LONGEST_PAUSE_SECONDS; give or take half, so
    that many devices do not come back at once."""
    pause = 0.05 + round_trip_seconds / 4 + trying_seconds / 50 + max(0.0, trying_seconds - EAGER_SECONDS) / 2
    return min(pause, LONGEST_PAUSE_SECONDS) * generator.uniform(0.5, 1.5)
