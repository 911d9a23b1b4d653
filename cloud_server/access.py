"""Who calls: the user of an access token, of a client certificate, or else the host. Asked on every call, health aside."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ..artifact.errors import PloraError
from ..artifact.watched import Stamp, stamp
from ..protocol.limits import TOKEN_KEY, TOKEN_SCHEME
from . import token_file
from .logs import event
from .quota import Quota

log = logging.getLogger("plora.cloud")

DENIED = "the access token is missing, unknown or expired"
"""One answer for all of these: which of them it was is nobody's business."""
OPEN_TO_ALL = "/grpc.health.v1.Health/Check"


class Denied(PloraError):
    """Whoever calls has not shown who they are."""


@dataclass(frozen=True)
class User:
    """name: of the user, or `certificate:…` with its common name (or hash), or `host:…`; token: hash of the access token that they came
    with, "" for none. Whoever has a token or a certificate has shown who they are: their sessions are taken up by nobody else."""

    name: str
    token: str = ""

    @property
    def known(self) -> bool:
        return not self.name.startswith("host:")


class Guard:
    """Knows the users. path: of the token file, None for none: then a call needs no token. quota: of users, where their entry
    says nothing else."""

    def __init__(self, path: Path | None, quota: Quota, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.quota = quota
        self.clock = clock
        self._stamp: Stamp | None = None
        self._told = ""
        self._users: dict[str, tuple[str, float]] = {}
        self._quotas: dict[str, Quota] = {}
        if path is not None:
            self._stamp = stamp(path)
            self._take(token_file.read(path))

    def _take(self, file: token_file.TokenFile) -> None:
        self._users = {
            token.sha256: (name, math.inf if token.expires is None else token_file.instant(token.expires))
            for name, entry in file.users.items()
            for token in entry.tokens
        }
        self._quotas = {name: replace(self.quota, **entry.quota) for name, entry in file.users.items()}

    def refresh(self) -> None:
        """Reads the file again if it has changed. One that cannot be read changes nothing: those who are known stay known."""
        if self.path is None or (found := stamp(self.path)) == self._stamp:
            return
        try:
            self._take(token_file.read(self.path))
        except PloraError as error:  # tried again the next time, but told of once
            if self._told != str(error):
                self._told = str(error)
                event(log, logging.ERROR, "access tokens not read again, the old ones stay", reason=str(error))
        else:
            self._stamp, self._told = found, ""
            event(log, logging.INFO, "access tokens read again", users=len({name for name, _ in self._users.values()}))

    def check(self, metadata: Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
        """(user, hash of the token) of a call; two empty strings if no token is asked for. Raises Denied."""
        if self.path is None:
            return "", ""
        shown = [value for key, value in metadata if key == TOKEN_KEY]
        if len(shown) != 1 or not isinstance(shown[0], str) or not shown[0].startswith(TOKEN_SCHEME):
            raise Denied(DENIED)
        hashed = token_file.digest(shown[0][len(TOKEN_SCHEME) :])  # looked up by its hash: how long that takes tells nothing of a token
        name, expires = self._users.get(hashed, ("", 0.0))
        if self.clock() >= expires:
            raise Denied(DENIED)
        return name, hashed

    def user_of(self, context: Any) -> User:
        """Of a call's context; of one that is no gRPC call at all, as in tests, a nameless host. Raises Denied."""
        name, hashed = self.check(context.invocation_metadata() or ()) if self.path is not None else ("", "")
        if name:
            return User(name, hashed)
        if not hasattr(context, "peer"):
            return User("host:")
        shown = context.auth_context()  # of a certificate that the handshake has verified
        names = [name.decode(errors="replace") for name in shown.get("x509_common_name", ()) if name]
        if len(names) == 1:
            return User(f"certificate:{names[0]}")
        if shown.get("x509_pem_cert"):
            return User(f"certificate:sha256:{hashlib.sha256(shown['x509_pem_cert'][0]).hexdigest()}")
        return User(f"host:{context.peer().rpartition(':')[0]}")

    def stands(self, user: User) -> bool:
        """Whether the user would be let in with that token now."""
        return self.path is None or self.clock() < self._users.get(user.token, ("", 0.0))[1]

    def quota_of(self, name: str) -> Quota:
        return self._quotas.get(name, self.quota)


class Gatekeeper(grpc.aio.ServerInterceptor):
    """Turns calls away that the guard does not know, whatever method they ask for. on_denied: told of each and of its peer."""

    def __init__(self, guard: Guard, on_denied: Callable[[str], None]) -> None:
        self.guard = guard
        self.on_denied = on_denied

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        if handler_call_details.method != OPEN_TO_ALL:
            try:
                self.guard.check(handler_call_details.invocation_metadata)
            except Denied as error:
                return self._turn_away(str(error))
        return await continuation(handler_call_details)

    def _turn_away(self, why: str) -> Any:
        async def deny(_: Any, context: Any) -> None:
            self.on_denied(context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, why)

        return grpc.stream_stream_rpc_method_handler(deny)
