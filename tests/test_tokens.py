"""Access tokens and what their users may have, without a network: the file, who is let in, buckets that refill."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plora.artifact.errors import (
    DamagedFile,
    ManifestError,
    MissingFile,
    UsageError,
)
from plora.artifact.strict import plain
from plora.cloud_server import token_file
from plora.cloud_server.access import DENIED, Denied, Guard, User
from plora.cloud_server.allowance import DAY, PATIENCE_SECONDS, Allowances, Bucket
from plora.cloud_server.quota import Quota, Refusal

# Access tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def shown(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def test_a_token_is_shown_once_and_kept_as_a_hash(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    assert token not in tokens.read_text()
    assert tokens.stat().st_mode & 0o777 == 0o600
    assert Guard(tokens, Quota()).check(shown(token)) == ("ann", token_file.digest(token))
    assert len(token) > 43 and token != token_file.add(tokens, "ann")


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer plora_guess")],
        [("authorization", "Basic x")],
        [("authorization", b"Bearer \xff")],
    ],
)
def test_whoever_has_no_token_hears_one_and_the_same_answer(tokens: Path, metadata: list[tuple[str, str | bytes]]) -> None:
    token_file.add(tokens, "ann")
    with pytest.raises(Denied, match=f"^{DENIED}$"):
        Guard(tokens, Quota()).check(metadata)


def test_two_tokens_in_one_call_are_none(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    with pytest.raises(Denied):
        Guard(tokens, Quota()).check([*shown(token), *shown(token)])


def test_a_token_expires(tokens: Path) -> None:
    token = token_file.add(tokens, "ann", 2, None)
    now = datetime.datetime.now().timestamp()
    clock = [now]
    guard = Guard(tokens, Quota(), lambda: clock[0])
    user = User(*guard.check(shown(token)))
    clock[0] = now + 2 * DAY - 60
    assert guard.stands(user)
    clock[0] = now + 2 * DAY + 60
    assert not guard.stands(user)
    with pytest.raises(Denied):
        guard.check(shown(token))


def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(tokens: Path) -> None:
    old = token_file.add(tokens, "ann")
    guard = Guard(tokens, Quota(sessions=9))
    new = token_file.add(tokens, "ann", None, {"sessions": 1})
    with pytest.raises(Denied):
        guard.check(shown(new))
    guard.refresh()
    assert guard.check(shown(new))[0] == guard.check(shown(old))[0] == "ann"
    assert (guard.quota_of("ann").sessions, guard.quota_of("bob").sessions) == (1, 9)
    assert token_file.revoke(tokens, "ann", keep_newest=True) == 1
    guard.refresh()
    with pytest.raises(Denied):
        guard.check(shown(old))
    for broken in ("{", json.dumps({**plain(token_file.read(tokens)), "version": 2})):
        tokens.write_text(broken)
        guard.refresh()
        assert guard.check(shown(new))[0] == "ann"
    tokens.unlink()
    guard.refresh()
    assert guard.check(shown(new))[0] == "ann"


def test_revoking_everything_of_a_user(tokens: Path) -> None:
    token_file.add(tokens, "ann")
    token_file.add(tokens, "bob")
    assert token_file.revoke(tokens, "ann", keep_newest=False) == 1
    assert list(token_file.read(tokens).users) == ["bob"]
    with pytest.raises(UsageError, match="no user 'ann'; it has bob"):
        token_file.revoke(tokens, "ann", keep_newest=False)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda file: "{", DamagedFile, "not a JSON file"),
        (lambda file: {**file, "extra": 1}, ManifestError, "extra: unknown key"),
        (lambda file: {**file, "format": "x"}, ManifestError, "expected plora-access-tokens version 1"),
        (lambda file: {**file, "users": {"a:b": file["users"]["ann"]}}, ManifestError, "user 'a:b'"),
        (lambda file: _with_token(file, sha256="00"), ManifestError, "64 hexadecimal digits"),
        (lambda file: _with_token(file, expires="tomorrow"), ManifestError, "expected a time"),
        (lambda file: _with_token(file, expires="2027-01-01T00:00:00"), ManifestError, "with its zone"),
        (lambda file: {**file, "users": {"ann": {**file["users"]["ann"], "quota": {"sessions": -1}}}}, UsageError, "sessions -1"),
        (lambda file: {**file, "users": {"ann": {**file["users"]["ann"], "quota": {"session": 1}}}}, ManifestError, "no limit is called session; known"),
    ],
)  # fmt: skip
def test_a_token_file_that_is_none(tokens: Path, change: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    token_file.add(tokens, "ann")
    changed = change(json.loads(tokens.read_text()))
    tokens.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(error, match=words) as caught:
        token_file.read(tokens)
    assert str(tokens) in str(caught.value)


def _with_token(file: Any, **changes: Any) -> Any:
    return {**file, "users": {"ann": {"quota": {}, "tokens": [{**file["users"]["ann"]["tokens"][0], **changes}]}}}


def test_names_and_days_that_cannot_be(tokens: Path) -> None:
    for name in ("", "a b", "host:x", "x" * 65, "-x"):
        with pytest.raises(UsageError, match="expected 1 to 64 letters"):
            token_file.add(tokens, name, None, None)
    for days in (0, -1, math.nan, 1e9):
        with pytest.raises(UsageError, match="--days"):
            token_file.add(tokens, "ann", days, None)
    with pytest.raises(UsageError, match="--sessions -1"):
        token_file.add(tokens, "ann", None, {"sessions": -1})
    assert not tokens.exists()
    with pytest.raises(MissingFile, match="plora-cloud token add"):
        token_file.read(tokens)


def test_many_commands_at_a_time_lose_no_token(tokens: Path) -> None:
    """In processes of their own, as operators' scripts are."""
    code = "import sys; from pathlib import Path; from plora.cloud_server import token_file\n"
    code += "for n in range(8): token_file.add(Path(sys.argv[1]), f'{sys.argv[2]}{n}')"
    running = [subprocess.Popen([sys.executable, "-c", code, str(tokens), name]) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len(token_file.read(tokens).users) == 32


def test_a_file_that_was_not_readable_for_a_moment_is_read_again(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    guard = Guard(tokens, Quota())
    aside = tokens.rename(tokens.with_suffix(".aside"))
    token_file.revoke(aside, "ann", keep_newest=False)
    tokens.mkdir()  # so that not even root can read it
    guard.refresh()
    assert guard.check(shown(token))[0] == "ann"
    tokens.rmdir()
    aside.rename(tokens)
    guard.refresh()
    with pytest.raises(Denied):
        guard.check(shown(token))


# Allowances


def test_a_bucket_refills_evenly_and_is_paid_back() -> None:
    bucket = Bucket(60, 60.0, 0.0)
    bucket.take(100, 0.0)  # more than it holds
    assert bucket.wait_seconds(0.0) == 41.0
    assert bucket.wait_seconds(40.5) == 0.5
    assert bucket.wait_seconds(41.0) == 0.0
    assert not bucket.full(90.0)
    assert bucket.full(100.0)
    bucket.take(1, 1e6)
    assert bucket.wait_seconds(1e6) == 0.0  # it has not filled beyond its limit: 59 are left
    bucket.take(59, 1e6)
    assert bucket.wait_seconds(1e6) == 1.0


def test_a_user_over_the_rate_waits_a_little_and_is_refused_beyond_that() -> None:
    clock = [0.0]
    allowances = Allowances(lambda user: Quota(tokens_per_minute=60) if user == "ann" else Quota(), lambda: clock[0])

    async def script() -> None:
        await allowances.compute("ann", 60)
        await allowances.compute("bob", 10**9)  # no limit, and nothing to do with ann's
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await allowances.compute("ann", 1)  # paced: one second's wait is bearable
        clock[0] = 1.0
        await allowances.compute("ann", 60)
        with pytest.raises(Refusal, match="60 tokens computed in a minute") as caught:
            await allowances.compute("ann", 1)
        assert caught.value.code == "QUOTA"
        assert caught.value.retry_after_millis > 1000 * PATIENCE_SECONDS

    asyncio.run(script())


def test_users_whose_buckets_are_full_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plora.cloud_server.allowance.SWEEP_USERS", 10)
    clock = [0.0]
    allowances = Allowances(lambda user: Quota(connections_per_minute=60), lambda: clock[0])
    for number in range(100):
        clock[0] += 1.0
        allowances.connect(str(number))
    assert len(allowances._buckets) <= 12
