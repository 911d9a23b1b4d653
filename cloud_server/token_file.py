"""The file of access tokens: who may come in, until when, and what each may have. It holds hashes; a token itself is shown once."""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..artifact.errors import DamagedFile, ManifestError, MissingFile, UsageError
from ..artifact.folders import renewed_file
from ..artifact.strict import decode, plain
from .quota import Quota, check_quota

FORMAT, VERSION = "plora-access-tokens", 1
PREFIX = "plora_"
"""So that scanners for leaked secrets know one when they see it."""
TOKEN_BYTES = 32
"""Of randomness. Nobody guesses 256 bits, so one SHA-256 without salt hides them (NIST SP 800-63B, section 5.1.2.2, asks for 112)."""
LIMITS = {field.name for field in fields(Quota)}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
"""Of a user. No colon, so that no user is taken for a host."""


@dataclass(frozen=True)
class AccessToken:
    """sha256: of the whole token, hex; made, expires: ISO 8601 with time zone, expires None for never."""

    sha256: str
    made: str
    expires: str | None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ManifestError(f"sha256 of {len(self.sha256)} characters, expected 64 hexadecimal digits")
        instant(self.made)
        if self.expires is not None:
            instant(self.expires)


@dataclass(frozen=True)
class Entry:
    """quota: limits of this user's own, by name of Quota's fields, in place of the server's."""

    tokens: tuple[AccessToken, ...]
    quota: dict[str, int]


@dataclass(frozen=True)
class TokenFile:
    format: str
    version: int
    users: dict[str, Entry]

    def __post_init__(self) -> None:
        if (self.format, self.version) != (FORMAT, VERSION):
            raise ManifestError(f"format {self.format} version {self.version}, expected {FORMAT} version {VERSION}")
        for name, entry in self.users.items():
            if not NAME.fullmatch(name):
                raise ManifestError(f"user {name!r}: expected 1 to 64 letters, digits, dots, dashes, underscores or @")
            if unknown := set(entry.quota) - LIMITS:
                raise ManifestError(f"user {name}: no limit is called {', '.join(sorted(unknown))}; known: {', '.join(sorted(LIMITS))}")
            check_quota(Quota(**entry.quota), f"user {name}: ")


def instant(text: str) -> float:
    """ISO 8601 with time zone -> Unix time in seconds. Raises ManifestError."""
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ManifestError(f"{text!r}: expected a time such as 2027-01-31T12:00:00+00:00") from None
    if moment.tzinfo is None:
        raise ManifestError(f"{text!r}: expected a time with its zone, such as 2027-01-31T12:00:00+00:00")
    return moment.timestamp()


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read(path: Path) -> TokenFile:
    """Raises MissingFile, DamagedFile, ManifestError naming the key, UsageError for a limit out of range."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found; make it with `plora-cloud token add NAME --tokens {path}`") from None
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise DamagedFile(f"{path}: not a JSON file") from None
    try:
        return decode(TokenFile, value, path.name)
    except (ManifestError, UsageError) as error:
        raise type(error)(f"{path}: {error}") from None


def readable_by_others(path: Path) -> bool:
    return bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))


def write(path: Path, file: TokenFile) -> None:
    """Whole or not at all; a new one for its owner alone, another one for those who could read the old one."""
    with renewed_file(path) as temporary:
        temporary.write_text(json.dumps(plain(file), indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Nobody else changes the file meanwhile: two who read, change and write would lose what the first one did. Raises UsageError if its
    folder cannot be written to."""
    try:
        descriptor = os.open(path.absolute().parent / f".{path.name}.lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise UsageError(f"--tokens {path}: its folder cannot be written to ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _kept(out: Path, token: str) -> Iterator[None]:
    """The token stands in a new file for its owner alone, which goes again if the block fails. Raises UsageError if it cannot be made."""
    try:
        file = os.fdopen(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except OSError as error:
        raise _unwritable(out, error) from None
    try:
        try:
            with file:
                file.write(f"{token}\n")
        except OSError as error:
            raise _unwritable(out, error) from None
        yield
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _unwritable(out: Path, error: OSError) -> UsageError:
    return UsageError(f"--out {out}: cannot be made ({error.strerror}); name a new file in a folder that you can write to")


def add(path: Path, name: str, days: float | None = None, quota: dict[str, int] | None = None, out: Path | None = None) -> str:
    """A new token of `name`, beside those that they have; the only time that it can be seen. quota: limits of theirs to set; out: a new
    file that gets it before it is valid. Raises UsageError, and then nothing was added, and what `read` raises."""
    if not NAME.fullmatch(name):
        raise UsageError(f"user {name!r}: expected 1 to 64 letters, digits, dots, dashes, underscores or @, the first a letter or digit")
    if days is not None and not 0 < days <= 36_500:
        raise UsageError(f"--days {days:g}: expected above 0 and at most 36,500")
    check_quota(Quota(**(quota or {})), "--")
    token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    expires = None if days is None else (now + datetime.timedelta(days=days)).isoformat()
    with alone(path), nullcontext() if out is None else _kept(out, token):
        file = read(path) if path.exists() else TokenFile(FORMAT, VERSION, {})
        before = file.users.get(name, Entry((), {}))
        made = AccessToken(digest(token), now.isoformat(), expires)
        entry = Entry((*before.tokens, made), {**before.quota, **(quota or {})})
        write(path, replace(file, users={**file.users, name: entry}))
    return token


def revoke(path: Path, name: str, keep_newest: bool) -> int:
    """How many tokens of `name` are void from now on; with keep_newest all but the last made, else the user goes, too."""
    with alone(path):
        file = read(path)
        if name not in file.users:
            raise UsageError(f"{path}: no user {name!r}; it has {', '.join(sorted(file.users)) or 'none'}")
        entry = file.users[name]
        kept = entry.tokens[-1:] if keep_newest else ()
        users = {each: own for each, own in file.users.items() if each != name}
        write(path, replace(file, users={**users, name: replace(entry, tokens=kept)} if kept else users))
    return len(entry.tokens) - len(kept)
