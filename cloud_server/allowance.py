"""What a user may ask for in a time: buckets that refill evenly, so that nobody waits for a full hour or day to begin."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from .quota import Quota, Refusal

PATIENCE_SECONDS = 5.0
"""Whoever would have to wait for longer is refused instead: a device has a deadline of its own for a step."""
MINUTE, DAY = 60.0, 86_400.0
SWEEP_USERS = 4096
"""Users remembered, after which those whose buckets are full again are forgotten."""


class Bucket:
    """Holds up to `limit` and refills within `seconds`. What is taken may be more than it holds: then others wait until that is paid back,
    so an amount need not be known to be possible before it is taken (a token bucket with debt)."""

    def __init__(self, limit: float, seconds: float, now: float) -> None:
        self.limit = limit
        self.rate = limit / seconds
        self._level = limit
        self._at = now

    def wait_seconds(self, now: float) -> float:
        """Until something may be taken; 0.0 if it may be now."""
        return max(0.0, (min(1.0, self.limit) - self._filled(now)) / self.rate)

    def take(self, amount: float, now: float) -> None:
        self._level, self._at = self._filled(now) - amount, now

    async def spend(self, amount: float) -> None:
        """Waits until something may be taken, and takes so much. By time.monotonic."""
        if wait := self.wait_seconds(time.monotonic()):
            await asyncio.sleep(wait)
        self.take(amount, time.monotonic())

    def full(self, now: float) -> bool:
        return self._filled(now) >= self.limit

    def _filled(self, now: float) -> float:
        return min(self.limit, self._level + (now - self._at) * self.rate)


class Allowances:
    """Every user's buckets. quota_of: user -> what they may have; clock: seconds."""

    def __init__(self, quota_of: Callable[[str], Quota], clock: Callable[[], float] = time.monotonic) -> None:
        self.quota_of = quota_of
        self.clock = clock
        self._buckets: dict[str, dict[tuple[str, float], Bucket]] = {}

    async def compute(self, user: str, tokens: int) -> None:
        """Waits until the user may have so many tokens computed. Raises Refusal if that is too long."""
        quota = self.quota_of(user)
        if not (quota.tokens_per_minute or quota.tokens_per_day):
            return
        limits = {("tokens", MINUTE): quota.tokens_per_minute, ("tokens", DAY): quota.tokens_per_day}
        while wait := self._wait(user, limits):
            if wait > PATIENCE_SECONDS:
                raise Refusal(
                    f"this user has had {quota.tokens_per_minute:,} tokens computed in a minute or {quota.tokens_per_day:,} in a day, the "
                    f"most that are allowed (0: any); try again in {wait:.0f} s",
                    "QUOTA",
                    int(1000 * wait),
                )
            await asyncio.sleep(wait)
        self._take(user, limits, tokens)

    def connect(self, user: str) -> None:
        """Raises Refusal if the user has come in too often."""
        limits = {("connections", MINUTE): self.quota_of(user).connections_per_minute}
        if wait := self._wait(user, limits):
            raise Refusal("too many new connections of this user; try again", "QUOTA", int(1000 * wait))
        self._take(user, limits, 1)

    def _wait(self, user: str, limits: dict[tuple[str, float], int]) -> float:
        now, own = self.clock(), self._buckets.get(user, {})
        waits = [own[name].wait_seconds(now) for name, limit in limits.items() if name in own and own[name].limit == limit]
        return max(waits, default=0.0)

    def _take(self, user: str, limits: dict[tuple[str, float], int], amount: int) -> None:
        now = self.clock()
        if len(self._buckets) > SWEEP_USERS:
            self._buckets = {each: own for each, own in self._buckets.items() if not all(one.full(now) for one in own.values())}
        for name, limit in limits.items():
            if limit:
                own = self._buckets.setdefault(user, {})
                if name not in own or own[name].limit != limit:  # new, or changed by the operator
                    own[name] = Bucket(limit, name[1], now)
                own[name].take(amount, now)
