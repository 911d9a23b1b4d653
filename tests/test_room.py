"""Who gets in, who has to go, and what a refusal says: the pool's accounts, quotas, eviction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import pytest

from plora.artifact import DecoderShape
from plora.artifact.errors import QuotaReached, ServerFull, UsageError
from plora.artifact.shape import Rope
from plora.cloud_server.budget import BLOCK_TOKENS
from plora.cloud_server.cache import Pool
from plora.cloud_server.quota import Quota, Refusal
from plora.cloud_server.room import EVICTION_SECONDS, MOST_RETRY_MILLIS, Room
from plora.device_runtime import open_session
from plora.models.checkpoint import Base
from plora.models.formula import merge

from .conftest import Made, answer, cloud, greedy, make_export, oracle

SHAPE = DecoderShape(8, 2, 2, 1, 4, 8, 10, 1000, 1e-5, (0, 0), Rope((1.0, 0.1), 1.0))
TOKEN_BYTES = 2 * 2 * 4 * 4
"""Keys and values, two layers, one head of four values, fp32."""
BLOCK_BYTES = BLOCK_TOKENS * TOKEN_BYTES
BOUND_SECONDS = 30


def pool_of(blocks: int, sessions: int | None = None, context: int = 2 * BLOCK_TOKENS) -> Pool:
    return Pool(SHAPE, 2, context, blocks * BLOCK_BYTES, "fp32", sessions)


@dataclass(eq=False)
class Guest:
    """As much of a session as Room sees."""

    room: Room
    slot: int
    user: str = "me"
    lost_at: float | None = None
    quiet_at: float | None = None
    ended: str | None = None

    def end(self, code: str, detail: str) -> None:
        self.ended = code
        asyncio.get_running_loop().call_soon(self.room.leave, self)


def in_room(script: Any, pool: Pool, quota: Quota | None = None) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(1) as worker:
            async with asyncio.timeout(BOUND_SECONDS):
                await script(Room(pool, lambda user: quota or Quota(), 60.0, 30.0, worker))

    asyncio.run(run())


async def come_in(room: Room, user: str = "me", **state: Any) -> Guest:
    guest = Guest(room, await room.admit(user), user, **state)
    room.enter(guest)
    return guest


async def refusal(attempt: Coroutine[Any, Any, Any]) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await attempt
    return caught.value


# The pool


def test_a_session_is_charged_for_the_blocks_that_it_has_filled() -> None:
    pool = pool_of(5)
    assert (pool.slots, pool.free_blocks) == (5, 5)
    first, second = pool.take(), pool.take()
    assert first is not None
    assert second is not None
    assert pool.reserve(first, BLOCK_TOKENS)
    assert pool.free_blocks == 3
    assert pool.reserve(first, BLOCK_TOKENS + 1)
    assert pool.bytes_of(first) == 2 * BLOCK_BYTES
    assert pool.reserve(second, 2 * BLOCK_TOKENS)
    third = pool.take()
    assert third is not None
    assert pool.free_blocks == 0
    assert pool.take() is None  # a slot is free, a block is not
    assert not pool.reserve(third, BLOCK_TOKENS + 1)
    assert pool.bytes_of(third) == BLOCK_BYTES  # a refusal changes nothing
    for slot in (first, second, third):
        pool.give_back(slot)
    assert (pool.free_blocks, pool.free_slots, pool.held_bytes) == (5, 5, 0)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("context", [1, 63, 130, 1000])
def test_what_was_written_is_zeros_again_and_neighbours_are_not_touched(dtype: str, context: int) -> None:
    """Slots that begin and end anywhere in a page."""
    pool = Pool(SHAPE, 2, context, 1 << 20, dtype, 3)
    slots = [pool.take() for _ in range(3)]
    for slot in slots:
        assert slot is not None
        assert pool.reserve(slot, context)
    for tensor in (*pool.keys, *pool.values):
        assert not tensor.any()
        tensor.fill_(7.0)
    assert slots[1] is not None
    pool.give_back(slots[1])
    for tensor in (*pool.keys, *pool.values):
        assert not tensor[slots[1]].any()
        assert (tensor[slots[0]] == 7.0).all()
        assert (tensor[slots[2]] == 7.0).all()


def test_memory_that_is_given_back_is_the_machines_again() -> None:
    """64 MiB of a context of 256 MiB, written and given back: neither the rest nor what was written stays resident."""
    shape = DecoderShape(64, 1, 16, 16, 64, 8, 10, 1 << 15, 1e-5, (0,), Rope(tuple([1.0] * 32), 1.0))
    pool = Pool(shape, 1, 1 << 15, 256 << 20, "fp32", 1)
    resident = psutil.Process().memory_info
    before, slot = resident().rss, pool.take()
    assert slot is not None
    assert pool.reserve(slot, 1 << 13)
    for tensor in (*pool.keys, *pool.values):
        tensor[slot, :, : 1 << 13] = 1.0
    assert 60 << 20 < resident().rss - before < 80 << 20
    pool.give_back(slot)
    assert resident().rss - before < 8 << 20


def test_budgets_that_hold_nothing_or_more_than_there_is() -> None:
    with pytest.raises(
        UsageError, match=rf"a KV budget of {BLOCK_BYTES:,} bytes holds no session: one of 128 tokens takes {2 * BLOCK_BYTES:,}"
    ):
        pool_of(1)
    with pytest.raises(UsageError, match="more than this machine's memory of"):
        Pool(SHAPE, 2, 100, 1 << 60, "fp32")


# Admission


def test_a_full_pool_says_when_to_try_again() -> None:
    async def script(room: Room) -> None:
        guests = [await come_in(room) for _ in range(2)]
        error = await refusal(room.admit("me"))
        assert error.code == "FULL"
        assert f"2 of 2 sessions hold {2 * BLOCK_BYTES:,} of {4 * BLOCK_BYTES:,} bytes" in str(error)
        assert error.retry_after_millis == 1000  # both are at work
        guests[0].quiet_at = time.monotonic()
        guests[1].quiet_at = time.monotonic() - 10
        assert 19_000 < (await refusal(room.admit("me"))).retry_after_millis <= 20_000  # 30 s after it fell quiet
        guests[1].lost_at = time.monotonic() - 100
        room.leave(guests[1])
        while room.pool.free_slots == 0:
            await asyncio.sleep(0.001)
        await come_in(room)

    in_room(script, pool_of(4, sessions=2))


def test_sessions_without_connection_go_first_then_the_quiet_ones_and_never_the_busy() -> None:
    async def script(room: Room) -> None:
        now = time.monotonic()
        busy = await come_in(room)
        quiet = await come_in(room, quiet_at=now - 40)
        quieter = await come_in(room, quiet_at=now - 50)
        resting = await come_in(room, quiet_at=now - 20)
        lost = await come_in(room, lost_at=now - 1)
        gone = []
        for _ in range(3):
            await come_in(room)
            gone.append([guest for guest in (busy, quiet, quieter, resting, lost) if guest.ended and guest not in gone])
        assert gone[0] == [lost]
        assert quieter in gone[1]
        assert quiet in gone[2]
        assert {guest.ended for guest in (lost, quieter, quiet)} == {"EXPIRED"}
        assert (await refusal(room.admit("me"))).code == "FULL"
        assert busy.ended is None
        assert resting.ended is None
        assert room.evicted == 3

    in_room(script, pool_of(5))


def test_a_session_that_grows_sends_others_away_but_never_itself() -> None:
    async def script(room: Room) -> None:
        growing = await come_in(room, quiet_at=time.monotonic() - 100)
        other = await come_in(room, quiet_at=time.monotonic() - 100)
        busy = await come_in(room)
        await room.grow(growing, 2 * BLOCK_TOKENS)
        assert other.ended == "EXPIRED"
        assert growing.ended is None
        growing.quiet_at = None
        error = await refusal(room.grow(busy, 2 * BLOCK_TOKENS))
        assert error.code == "FULL"
        assert f"128 tokens need {BLOCK_BYTES:,} more bytes of KV cache, 0 of {3 * BLOCK_BYTES:,} are free" in str(error)
        assert error.retry_after_millis == 1000
        assert room.pool.bytes_of(busy.slot) == BLOCK_BYTES

    in_room(script, pool_of(3))


def test_nobody_is_sent_away_where_there_is_room() -> None:
    async def script(room: Room) -> None:
        quiet = await come_in(room, quiet_at=time.monotonic() - 100)
        for _ in range(3):
            await come_in(room)
        assert quiet.ended is None
        assert room.evicted == 0

    in_room(script, pool_of(4))


def test_who_does_not_go_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plora.cloud_server.room.EVICTION_SECONDS", 0.05)
    assert EVICTION_SECONDS < BOUND_SECONDS

    async def script(room: Room) -> None:
        for _ in range(2):
            (await come_in(room, lost_at=time.monotonic())).end = lambda code, detail: None  # type: ignore[method-assign]
        assert (await refusal(room.admit("me"))).code == "FULL"

    in_room(script, pool_of(2))


def test_a_storm_of_newcomers_finds_all_the_room_that_there_is() -> None:
    """Four at once, while four sessions have no connection: each makes way for one."""

    async def script(room: Room) -> None:
        lost = [await come_in(room, lost_at=time.monotonic()) for _ in range(4)]
        await asyncio.gather(*(come_in(room) for _ in range(4)))
        assert [guest.ended for guest in lost] == ["EXPIRED"] * 4
        assert room.evicted == 4
        assert len(room.guests) == 4

    in_room(script, pool_of(4))


def test_nobody_is_sent_away_in_vain() -> None:
    """A step needs three blocks, those who can be spared have two."""

    async def script(room: Room) -> None:
        growing = await come_in(room)
        spare = [await come_in(room, lost_at=time.monotonic()) for _ in range(2)]
        busy = await come_in(room)
        assert (await refusal(room.grow(growing, 4 * BLOCK_TOKENS))).code == "FULL"
        assert not any(guest.ended for guest in (*spare, busy))

    in_room(script, pool_of(4, context=4 * BLOCK_TOKENS))


# Quotas


def test_a_quota_holds_for_those_who_come_at_once() -> None:
    async def script(room: Room) -> None:
        gone = [await come_in(room, f"user {number}") for number in range(4)]
        for guest in gone:
            room.leave(guest)  # their slots are being cleared
        found = await asyncio.gather(*(come_in(room, "me") for _ in range(4)), return_exceptions=True)
        assert sorted(each.code for each in found if isinstance(each, Refusal)) == ["QUOTA"] * 3
        assert len(room.guests) == 1

    in_room(script, pool_of(4), Quota(sessions=1))


def test_lost_sessions_make_way_within_a_share_of_bytes_too() -> None:
    async def script(room: Room) -> None:
        lost, here = await come_in(room, "me", lost_at=time.monotonic()), await come_in(room, "me")
        await room.grow(here, 2 * BLOCK_TOKENS)
        assert lost.ended == "EXPIRED"
        here.lost_at = time.monotonic()
        assert (await refusal(room.grow(here, 3 * BLOCK_TOKENS))).code == "QUOTA"
        assert here.ended is None  # it does not make way for itself

    in_room(script, pool_of(8, context=4 * BLOCK_TOKENS), Quota(kv_bytes=2 * BLOCK_BYTES))


def test_a_user_has_so_many_sessions_and_others_have_theirs() -> None:
    async def script(room: Room) -> None:
        mine = [await come_in(room, "me", quiet_at=time.monotonic()) for _ in range(2)]
        error = await refusal(room.admit("me"))
        assert (error.code, str(error)[:35]) == ("QUOTA", "2 sessions of this user are open, t")
        assert error.retry_after_millis == MOST_RETRY_MILLIS
        await come_in(room, "you")
        mine[0].lost_at = time.monotonic()  # a phone that has lost its session begins another one in its place
        await come_in(room, "me")
        assert mine[0].ended == "EXPIRED"

    in_room(script, pool_of(8), Quota(sessions=2))


def test_a_user_has_so_many_bytes() -> None:
    async def script(room: Room) -> None:
        mine, other, yours = [await come_in(room, user) for user in ("me", "me", "you")]
        await room.grow(mine, 2 * BLOCK_TOKENS)
        assert (await refusal(room.admit("me"))).code == "QUOTA"
        await room.grow(yours, 2 * BLOCK_TOKENS)
        error = await refusal(room.grow(other, 2 * BLOCK_TOKENS))
        assert error.code == "QUOTA"
        assert f"hold {3 * BLOCK_BYTES:,} bytes of KV cache and need {BLOCK_BYTES:,} more, {3 * BLOCK_BYTES:,} are allowed" in str(error)

    in_room(script, pool_of(8), Quota(kv_bytes=3 * BLOCK_BYTES))


# Over the wire


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_export(tmp_path_factory.mktemp("long"), max_position_embeddings=512)


@pytest.fixture(scope="module")
def long_merged(long: Made) -> Base:
    base = oracle(long)
    merge(base.model, long.adapter)
    return base


KV_TOKEN_BYTES = 2 * 16 * 3 * 4
"""Keys and values of 2 heads of 8 in 3 layers, fp32, of one token of that model."""


def test_a_session_sent_away_goes_on_as_if_it_had_not_been(long: Made, long_merged: Base) -> None:
    """Two conversations that do not fit together, in turns: each is refilled by its device when it speaks again."""
    budget = str(512 * KV_TOKEN_BYTES)
    with cloud(long.out / "cloud", "--kv-bytes", budget, "--quiet-seconds", "0") as (address, _), ExitStack() as stack:
        first, second = (stack.enter_context(open_session(long.out / "edge", address)) for _ in range(2))
        prompts = [np.random.default_rng(seed).integers(2, 300, 290).tolist() for seed in (0, 1)]
        for _ in range(3):
            for session, ids in zip((first, second), prompts, strict=True):
                assert answer(session, ids, 12) == greedy(long_merged, ids, 12)
        assert first._link.reconnections + second._link.reconnections == 4


def test_a_pool_without_room_ends_a_step_by_name_and_the_others_do_not_notice(long: Made, long_merged: Base) -> None:
    budget = str(512 * KV_TOKEN_BYTES)
    with cloud(long.out / "cloud", "--kv-bytes", budget, "--quiet-seconds", "1000") as (address, _), ExitStack() as stack:
        first, second = (stack.enter_context(open_session(long.out / "edge", address)) for _ in range(2))
        ids = np.random.default_rng(0).integers(2, 300, 400).tolist()
        assert answer(first, ids, 4) == greedy(long_merged, ids, 4)
        with pytest.raises(ServerFull, match="more bytes of KV cache") as caught:
            answer(second, ids[:200], 4)
        assert caught.value.retry_after_millis > 0
        assert answer(first, ids[:10], 4) == greedy(long_merged, ids[:10], 4)


def test_quotas_are_said_by_name(made: Made) -> None:
    with cloud(made.out / "cloud", "--user-sessions", "1") as (address, _), open_session(made.out / "edge", address):
        with pytest.raises(QuotaReached, match="1 sessions of this user are open") as caught:
            open_session(made.out / "edge", address)
        assert caught.value.retry_after_millis > 0
        assert not issubclass(QuotaReached, ServerFull)
