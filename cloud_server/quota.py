"""What one user may have, and the refusal of whoever asks for more."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..artifact.errors import RemoteProtocolError, UsageError


@dataclass(frozen=True)
class Quota:
    """Of one user, 0 for no limit. sessions: open at a time; kv_bytes: of all of them; tokens_per_minute, tokens_per_day: computed, of
    prompts and answers, drafts included; connections: open at a time; connections_per_minute: new ones."""

    sessions: int = 0
    kv_bytes: int = 0
    tokens_per_minute: int = 0
    tokens_per_day: int = 0
    connections: int = 0
    connections_per_minute: int = 0


class Refusal(RemoteProtocolError):
    """No room, or no more of it for this user, and when to try again."""

    def __init__(self, message: str, code: str, retry_after_millis: int) -> None:
        super().__init__(message, code)
        self.retry_after_millis = retry_after_millis


def check_quota(quota: Quota, where: str) -> None:
    """where: what stands before a limit's name: of a flag what it begins with, `--user-` or `--`, else the place in a file. Raises
    UsageError naming the limit that is out of range."""
    for field in fields(quota):
        if getattr(quota, field.name) < 0:
            name = field.name.replace("_", "-") if where.startswith("--") else field.name
            raise UsageError(f"{where}{name} {getattr(quota, field.name)}: expected 0 (no limit) or more")
