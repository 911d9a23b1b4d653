"""Who may have how much of the KV pool: admission before work, a quota for each user, and who has to go when there is no room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from ..artifact.errors import RemoteProtocolError
from .cache import Pool

EVICTION_SECONDS = 2.0
"""For sessions that were told to go to be gone."""
LEAST_RETRY_MILLIS, MOST_RETRY_MILLIS = 250, 60_000


@dataclass(frozen=True)
class Quota:
    """Of one user, 0 for no limit. sessions: open at a time; kv_bytes: of all of them."""

    sessions: int = 0
    kv_bytes: int = 0


class Refusal(RemoteProtocolError):
    """No room, and when to try again."""

    def __init__(self, message: str, code: str, retry_after_millis: int) -> None:
        super().__init__(message, code)
        self.retry_after_millis = retry_after_millis


class Guest(Protocol):
    """A session, as far as room goes. lost_at: since when it has no connection; quiet_at: since when it waits for its device between
    steps, None while it works."""

    slot: int
    user: str
    lost_at: float | None

    @property
    def quiet_at(self) -> float | None: ...

    def end(self, code: str, detail: str) -> None: ...


class Room:
    """One pool and those who live in it. lease_seconds: after which a session without a connection goes by itself; quiet_seconds: after
    which one that waits for its device may be sent away for others (it is refilled by its device when that has something to say)."""

    def __init__(self, pool: Pool, quota: Quota, lease_seconds: float, quiet_seconds: float, worker: Executor) -> None:
        self.pool = pool
        self.quota = quota
        self.lease_seconds = lease_seconds
        self.quiet_seconds = quiet_seconds
        self.worker = worker
        self.guests: set[Guest] = set()
        self.evicted = 0
        self._leaving: set[Guest] = set()
        self._freed = asyncio.Event()

    async def admit(self, user: str) -> int:
        """A slot for a new session of `user`; whoever gets it is then a guest (`enter`). Raises Refusal."""
        own = [guest for guest in self.guests if guest.user == user]
        if self.quota.sessions and len(own) >= self.quota.sessions:
            lost = [guest for guest in own if guest.lost_at is not None]
            if not lost:
                raise Refusal(
                    f"{len(own)} sessions of this user are open, the most that are allowed; close one, or try again",
                    "QUOTA",
                    self._retry_millis(own),
                )
            min(lost, key=lambda guest: guest.lost_at or 0.0).end("EXPIRED", "its user has begun another one; begin a new session")
        self._check_share(user, self.pool.block_bytes)
        if (slot := self.pool.take()) is None:
            await self._make_room(1, None)
            slot = self.pool.take()
        if slot is None:
            pool = self.pool
            raise Refusal(
                f"{pool.slots - pool.free_slots} of {pool.slots} sessions hold {pool.held_bytes:,} of "
                f"{pool.blocks * pool.block_bytes:,} bytes of KV cache; try again",
                "FULL",
                self._retry_millis(self.guests),
            )
        return slot

    def enter(self, guest: Guest) -> None:
        self.guests.add(guest)

    async def grow(self, guest: Guest, tokens: int) -> None:
        """Room for the first `tokens` tokens of the guest's session, before they are computed. Raises Refusal."""
        pool = self.pool
        blocks = pool.blocks_for(tokens) - pool.bytes_of(guest.slot) // pool.block_bytes
        if blocks <= 0:
            return
        self._check_share(guest.user, blocks * pool.block_bytes)
        if not pool.reserve(guest.slot, tokens):
            await self._make_room(blocks, guest)
            if not pool.reserve(guest.slot, tokens):
                raise Refusal(
                    f"{tokens} tokens need {blocks * pool.block_bytes:,} more bytes of KV cache, "
                    f"{pool.free_blocks * pool.block_bytes:,} of {pool.blocks * pool.block_bytes:,} are free; try again",
                    "FULL",
                    self._retry_millis(each for each in self.guests if each is not guest),
                )

    def leave(self, guest: Guest) -> None:
        """Its slot is cleared on the engine's thread, behind whatever batch it is still in, and then free."""
        self.guests.discard(guest)
        self._leaving.add(guest)
        cleared = asyncio.get_running_loop().run_in_executor(self.worker, self.pool.clear, guest.slot)
        cleared.add_done_callback(lambda _: self._left(guest))

    def _left(self, guest: Guest) -> None:
        self._leaving.discard(guest)
        self.pool.free(guest.slot)
        self._freed.set()

    def _check_share(self, user: str, more_bytes: int) -> None:
        if self.quota.kv_bytes:
            held = sum(self.pool.bytes_of(guest.slot) for guest in self.guests if guest.user == user)
            if held + more_bytes > self.quota.kv_bytes:
                raise Refusal(
                    f"this user's sessions hold {held:,} bytes of KV cache and need {more_bytes:,} more, "
                    f"{self.quota.kv_bytes:,} are allowed; close one",
                    "QUOTA",
                    self._retry_millis(guest for guest in self.guests if guest.user == user),
                )

    async def _make_room(self, blocks: int, asking: Guest | None) -> None:
        """Sends away who can be spared until `blocks` blocks and a slot are free, and waits for them to be gone."""
        leaving = {guest: self.pool.bytes_of(guest.slot) // self.pool.block_bytes for guest in self._leaving}
        for guest in self._spare(asking):
            if self.pool.free_blocks + sum(leaving.values()) >= blocks and (self.pool.free_slots or leaving or asking is not None):
                break
            leaving[guest] = self.pool.bytes_of(guest.slot) // self.pool.block_bytes
            self.evicted += 1
            guest.end("EXPIRED", "sent away for others: no room is left, and it had nothing to do; begin a new session")
        if not leaving:
            return
        try:
            async with asyncio.timeout(EVICTION_SECONDS):
                while self.pool.free_blocks < blocks or (asking is None and not self.pool.free_slots):
                    if not any(guest in self.guests or guest in self._leaving for guest in leaving):
                        return
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            pass

    def _spare(self, asking: Guest | None) -> list[Guest]:
        """Those without a connection, the longest gone first; then those that have waited for their devices for long."""
        now = time.monotonic()
        others = [guest for guest in self.guests if guest is not asking]
        lost = sorted((guest for guest in others if guest.lost_at is not None), key=lambda guest: guest.lost_at or 0.0)
        quiet = [guest for guest in others if guest.lost_at is None and guest.quiet_at is not None]
        quiet = [guest for guest in quiet if now - (guest.quiet_at or now) > self.quiet_seconds]
        return lost + sorted(quiet, key=lambda guest: guest.quiet_at or 0.0)

    def _retry_millis(self, guests: Iterable[Guest]) -> int:
        """Until the first of them goes, or may be sent away."""
        now = time.monotonic()
        waits = [MOST_RETRY_MILLIS / 1000]
        for guest in guests:
            if guest.lost_at is not None:
                waits.append(guest.lost_at + self.lease_seconds - now)
            elif guest.quiet_at is not None:
                waits.append(guest.quiet_at + self.quiet_seconds - now)
        busy = any(guest.lost_at is None and guest.quiet_at is None for guest in self.guests)
        wait = min([*waits, 1.0] if busy else waits)
        return min(max(int(wait * 1000), LEAST_RETRY_MILLIS), MOST_RETRY_MILLIS)
