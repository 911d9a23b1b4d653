"""What one server is told: frozen, checked when it is made, secure unless said otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ..artifact.addresses import host_and_port, is_loopback
from ..artifact.errors import UsageError
from .quota import Quota, check_quota
from .tls import Files

MAX_IDLE_SECONDS = (2**32 - 1) // 1000
"""The handshake tells it in milliseconds, in 32 bits: seven weeks."""

MAX_SESSIONS = 65_536
"""Ports that one host has, and far more than one engine serves."""

MAX_CONNECTIONS = 1 << 20


@dataclass(frozen=True)
class Limits:
    """hello_seconds: for a device to greet; idle_seconds: for any later frame; write_seconds: for a peer to take one; lease_seconds:
    how long a session outlives its connection, 0 for not at all; quiet_seconds: after which a session that has nothing to do may be sent
    away for others, if there is no room; connections: open streams at the most, greeted or not; inbox_bytes: of frames that wait for their
    sessions, beyond one for each; quota: of each user, where their entry in the token file says nothing else."""

    hello_seconds: float = 10.0
    idle_seconds: float = 300.0
    write_seconds: float = 30.0
    lease_seconds: float = 60.0
    quiet_seconds: float = 30.0
    connections: int = 2048
    inbox_bytes: int = 256 << 20
    quota: Quota = field(default_factory=Quota)

    def __post_init__(self) -> None:
        if self.quiet_seconds < 0 or not math.isfinite(self.quiet_seconds):
            raise UsageError(f"--quiet-seconds {self.quiet_seconds}: expected 0 or more, and finite")
        if not 0 < self.idle_seconds <= MAX_IDLE_SECONDS:
            raise UsageError(f"--idle-seconds {self.idle_seconds}: expected above 0 and at most {MAX_IDLE_SECONDS:,}")
        if not 0 <= self.lease_seconds <= MAX_IDLE_SECONDS:
            raise UsageError(f"--lease-seconds {self.lease_seconds}: expected 0 (no lease) to {MAX_IDLE_SECONDS:,}")
        if not 1 <= self.connections <= MAX_CONNECTIONS:
            raise UsageError(f"--connections {self.connections}: expected 1 to {MAX_CONNECTIONS:,}")
        if self.inbox_bytes < 0:
            raise UsageError(f"--inbox-bytes {self.inbox_bytes}: expected 0 or more")
        check_quota(self.quota, "--user-")


@dataclass(frozen=True)
class Door:
    """Where devices come in, and what they must show. tokens: file of access tokens, None for none asked; without_tls, without_tokens:
    said in so many words, for an address beyond loopback; ops: where to serve metrics and readiness, None for nowhere."""

    listen: str = "127.0.0.1:7070"
    tls: Files | None = None
    tokens: Path | None = None
    without_tls: bool = False
    without_tokens: bool = False
    ops: str | None = None
    open_ops: bool = False

    def __post_init__(self) -> None:
        host, _ = host_and_port("--listen", self.listen)
        if not is_loopback(host):
            missing = []
            if self.tls is None and not self.without_tls:
                missing.append("without TLS (give --tls-cert and --tls-key, or say --without-tls, for instance behind a proxy that has it)")
            if self.tokens is None and not self.without_tokens:
                missing.append("to whoever asks (give --tokens, or say --without-tokens)")
            if missing:
                raise UsageError(f"--listen {self.listen}: others could reach it, and it would serve {' and '.join(missing)}")
        if self.ops is not None:
            host, _ = host_and_port("--ops", self.ops)
            if not is_loopback(host) and not self.open_ops:
                raise UsageError(f"--ops {self.ops}: others could read the metrics; name a loopback address, or say --open-ops")


@dataclass(frozen=True)
class ServerConfig:
    """kv_bytes: budget of the KV pool; context_tokens: of one session, None for the default; sessions: at a time, None for as many as the
    budget has room for; threads: of each product, 0 for torch's own choice; drain_seconds: from being told to stop, and not ready any more,
    to refusing sessions; grace_seconds: after that, for answers that are under way."""

    folder: Path
    kv_bytes: int = 2 << 30
    context_tokens: int | None = None
    sessions: int | None = None
    threads: int = 0
    drain_seconds: float = 0.0
    grace_seconds: float = 10.0
    door: Door = field(default_factory=Door)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.kv_bytes <= 0:
            raise UsageError(f"--kv-bytes {self.kv_bytes}: expected more than 0")
        if self.context_tokens is not None and self.context_tokens < 1:
            raise UsageError(f"--context {self.context_tokens}: expected 1 or more")
        if self.sessions is not None and not 1 <= self.sessions <= MAX_SESSIONS:
            raise UsageError(f"--sessions {self.sessions}: expected 1 to {MAX_SESSIONS:,}")
        if self.threads < 0:
            raise UsageError(f"--threads {self.threads}: expected 0 or more")
        for flag, seconds in (("--drain-seconds", self.drain_seconds), ("--grace-seconds", self.grace_seconds)):
            if not 0 <= seconds < math.inf:
                raise UsageError(f"{flag} {seconds}: expected 0 or more, and finite")
