"""Who may have how much of the KV pool: admission before work, a quota for each user, and who has to go when there is no room."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Protocol

from .cache import Pool
from .logs import event
from .quota import Quota, Refusal

log = logging.getLogger("plora.cloud")

EVICTION_SECONDS = 2.0
"""For sessions that were told to go to be gone."""
BUSY_SECONDS = 1.0
"""After which a session that works may have ended: nobody knows."""
LEAST_RETRY_MILLIS, MOST_RETRY_MILLIS = 250, 60_000


class Guest(Protocol):
    """A session, as far as room goes. lost_at: since when it has no connection; quiet_at: since when it waits for its device, None while
    it works."""

    slot: int
    user: str
    lost_at: float | None

    @property
    def quiet_at(self) -> float | None: ...

    def end(self, code: str, detail: str) -> None: ...


class Room:
    """One pool and those who live in it. lease_seconds: after which a session without a connection goes by itself; quiet_seconds: after
    which one that waits for its device may be sent away for others (it is refilled by its device when that has something to say);
    quota_of: user -> what they may have; evicted: guests that had to make room."""

    def __init__(
        self,
        pool: Pool,
        quota_of: Callable[[str], Quota],
        lease_seconds: float,
        quiet_seconds: float,
        worker: Executor,
    ) -> None:
        self.pool = pool
        self.quota_of = quota_of
        self.lease_seconds = lease_seconds
        self.quiet_seconds = quiet_seconds
        self.worker = worker
        self.guests: set[Guest] = set()
        self.evicted = 0
        self._told: set[Guest] = set()  # to go, and still here
        self._leaving: set[Guest] = set()  # gone, but for their slots
        self._wanted = [0, 0]  # blocks and slots, by those who wait for room
        self._freed = asyncio.Event()

    async def admit(self, user: str) -> int:
        """A slot for a new session of `user`; whoever gets it is then a guest (`enter`, at once). Raises Refusal."""
        self._check_quota(user, 1, None)
        slot = self.pool.take()
        if slot is None:
            await self._make_room(1, 1, None)
            self._check_quota(user, 1, None)  # others may have come in meanwhile
            slot = self.pool.take()
        if slot is None:
            pool = self.pool
            raise Refusal(
                f"{pool.slots - pool.free_slots} of {pool.slots} sessions hold {pool.held_bytes:,} of "
                f"{pool.blocks * pool.block_bytes:,} bytes of KV cache; try again",
                "FULL",
                self._retry_millis(None),
            )
        return slot

    def enter(self, guest: Guest) -> None:
        self.guests.add(guest)

    async def grow(self, guest: Guest, tokens: int) -> None:
        """Room for the first `tokens` tokens of the guest's session, before they are computed. Raises Refusal."""
        pool = self.pool
        blocks = pool.blocks_for(tokens) - pool.blocks_of(guest.slot)
        if blocks <= 0:
            return
        self._check_quota(guest.user, blocks, guest)
        if not pool.reserve(guest.slot, tokens):
            await self._make_room(blocks, 0, guest)
            self._check_quota(guest.user, blocks, guest)
            if not pool.reserve(guest.slot, tokens):
                raise Refusal(
                    f"{tokens} tokens need {blocks * pool.block_bytes:,} more bytes of KV cache, "
                    f"{pool.free_blocks * pool.block_bytes:,} of {pool.blocks * pool.block_bytes:,} are free; try again",
                    "FULL",
                    self._retry_millis(guest),
                )

    def leave(self, guest: Guest) -> None:
        """Its slot is cleared on the engine's thread, behind whatever batch it is still in, and then free."""
        self.guests.discard(guest)
        self._told.discard(guest)
        self._leaving.add(guest)
        cleared = asyncio.get_running_loop().run_in_executor(self.worker, self.pool.clear, guest.slot)
        cleared.add_done_callback(lambda done: self._left(guest, done))

    def _left(self, guest: Guest, cleared: asyncio.Future[None]) -> None:
        self._leaving.discard(guest)
        if cleared.cancelled() or cleared.exception() is not None:
            event(log, logging.ERROR, "a slot could not be cleared, and is not used again", slot=guest.slot)
        else:
            self.pool.free(guest.slot)
        self._freed.set()

    def _send_away(self, guest: Guest, why: str) -> None:
        self._told.add(guest)
        self.evicted += 1
        guest.end("EXPIRED", f"{why}; begin a new session")

    # Quotas

    def _check_quota(self, user: str, blocks: int, growing: Guest | None) -> None:
        """Whether the user may have so many more blocks, or else another session. Sessions of theirs that have no connection make way, the
        longest gone first, if that is enough: a phone that lost its session begins another one in its place."""
        quota = self.quota_of(user)
        if not (quota.sessions or quota.kv_bytes):
            return
        own = {guest for guest in self.guests - self._told if guest.user == user}
        lost = self._lost(own - {growing} if growing is not None else own)
        going: list[Guest] = []
        while reason := self._over(quota, own, blocks, growing):
            if not lost:
                raise Refusal(f"{reason}; close one, or try again", "QUOTA", MOST_RETRY_MILLIS)
            going.append(lost.pop(0))
            own.discard(going[-1])
        for guest in going:
            self._send_away(guest, "its user has begun another one")

    def _over(self, quota: Quota, own: set[Guest], blocks: int, growing: Guest | None) -> str:
        """What would be too much; nothing if it would not."""
        if growing is None and quota.sessions and len(own) >= quota.sessions:
            return f"{len(own)} sessions of this user are open, the most that are allowed"
        held, more = sum(self.pool.bytes_of(guest.slot) for guest in own), blocks * self.pool.block_bytes
        if quota.kv_bytes and held + more > quota.kv_bytes:
            return f"this user's sessions hold {held:,} bytes of KV cache and need {more:,} more, {quota.kv_bytes:,} are allowed"
        return ""

    # Making room

    async def _make_room(self, blocks: int, slots: int, asking: Guest | None) -> None:
        """Sends away who can be spared until so much is free, and waits for them to be gone; nobody if that would be in vain."""
        pool = self.pool
        self._wanted = [self._wanted[0] + blocks, self._wanted[1] + slots]
        try:
            async with asyncio.timeout(EVICTION_SECONDS):
                while pool.free_blocks < blocks or pool.free_slots < slots:
                    going = self._leaving | self._told
                    coming = [pool.free_blocks + sum(pool.blocks_of(guest.slot) for guest in going), pool.free_slots + len(going)]
                    spare = self._spare(asking)
                    if coming[0] + sum(pool.blocks_of(guest.slot) for guest in spare) < blocks or coming[1] + len(spare) < slots:
                        return
                    while spare and (coming[0] < self._wanted[0] or coming[1] < self._wanted[1]):
                        coming = [coming[0] + pool.blocks_of(spare[0].slot), coming[1] + 1]
                        self._send_away(spare.pop(0), "sent away for others, since no room is left and it had nothing to do")
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            pass
        finally:
            self._wanted = [self._wanted[0] - blocks, self._wanted[1] - slots]

    @staticmethod
    def _lost(guests: set[Guest]) -> list[Guest]:
        """Those without a connection, the longest gone first."""
        return sorted((guest for guest in guests if guest.lost_at is not None), key=lambda guest: guest.lost_at or 0.0)

    def _spare(self, asking: Guest | None) -> list[Guest]:
        """Those without a connection; then those that have waited for their devices for long, the longest wait first."""
        others = {guest for guest in self.guests - self._told if guest is not asking}
        now = time.monotonic()
        quiet = [(guest.quiet_at, guest) for guest in others if guest.lost_at is None and guest.quiet_at is not None]
        quiet = [(since, guest) for since, guest in quiet if now - since > self.quiet_seconds]
        return self._lost(others) + [guest for _, guest in sorted(quiet, key=lambda each: each[0])]

    def _retry_millis(self, asking: Guest | None) -> int:
        """Until the first of the others goes, or may be sent away."""
        now = time.monotonic()
        waits = [MOST_RETRY_MILLIS / 1000]
        for guest in self.guests:
            if guest is asking:
                continue
            if guest.lost_at is not None:
                waits.append(guest.lost_at + self.lease_seconds - now)
            elif guest.quiet_at is not None:
                waits.append(guest.quiet_at + self.quiet_seconds - now)
            else:
                waits.append(BUSY_SECONDS)
        return min(max(int(min(waits) * 1000), LEAST_RETRY_MILLIS), MOST_RETRY_MILLIS)
