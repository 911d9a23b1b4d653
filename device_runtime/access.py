"""How a device knows its cloud, and shows who it is: TLS, pins, and the access token. Nothing of it is printed or logged."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from ..artifact.addresses import host_and_port, is_loopback
from ..artifact.errors import Unreachable, Untrusted, UsageError
from ..artifact.watched import read_named
from ..protocol.limits import TOKEN_KEY, TOKEN_SCHEME

TOKEN_VARIABLE = "PLORA_TOKEN"
PIN = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Access:
    """token: "" for none; ca: certificates, PEM, that sign the cloud's, or are its own, instead of the public ones; pins: SHA-256 of
    the cloud's certificate, hex: one of them must fit, and then nobody else vouches for it; client_cert, client_key: PEM, for a cloud that
    asks for one; server_name: that the cloud's certificate is for, if not the host's; plaintext: no TLS, also beyond loopback.

    Without any of them a cloud on loopback is spoken to in plaintext, and any other over TLS. Raises UsageError.
    """

    token: str = field(default="", repr=False)
    ca: Path | None = None
    pins: tuple[str, ...] = ()
    client_cert: Path | None = None
    client_key: Path | None = None
    server_name: str | None = None
    plaintext: bool = False

    def __post_init__(self) -> None:
        for pin in self.pins:
            if not PIN.fullmatch(_digits(pin)):
                raise UsageError(f"--pin {pin}: expected sha256: and 64 hexadecimal digits, as `plora-cloud certificate` prints them")
        if self.ca is not None and self.pins:
            raise UsageError("--ca and --pin: expected one of them")
        if (self.client_cert is None) != (self.client_key is None):
            raise UsageError("--client-cert and --client-key: expected both or neither")
        if self.plaintext and self._says_tls:
            raise UsageError("--plaintext: expected without --ca, --pin, --client-cert and --server-name")
        if not self.token.isascii() or any(not 33 <= ord(each) <= 126 for each in self.token):
            raise UsageError("the access token has characters that no token has; is it the right file?")

    @property
    def _says_tls(self) -> bool:
        return any((self.ca, self.pins, self.client_cert, self.server_name))

    def secures(self, address: str) -> bool:
        """Whether connections to host:port are TLS. Raises UsageError for an address that is none: gRPC would take a port of its own."""
        host, _ = host_and_port("--cloud", address)
        return self._says_tls or not (self.plaintext or is_loopback(host))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of every call."""
        return ((TOKEN_KEY, TOKEN_SCHEME + self.token),) if self.token else ()

    async def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> grpc.aio.Channel:
        """Raises Untrusted if a pin does not fit, Unreachable, MissingFile, UsageError for a file that is no certificate."""
        direct = [*options, ("grpc.enable_http_proxy", 0)]  # a proxy would be sent in the clear what is meant for this machine
        if not self.secures(address):
            return grpc.aio.insecure_channel(address, direct)
        roots = None if self.ca is None else read_named("--ca", self.ca)
        if roots is not None:
            _check_roots(self.ca, roots)
        if self.pins:
            roots, options = await self._pinned(address), direct
        key = None if self.client_key is None else read_named("--client-key", self.client_key)
        chain = None if self.client_cert is None else read_named("--client-cert", self.client_cert)
        if self.client_cert is not None and self.client_key is not None:
            _check_pair(self.client_cert, self.client_key)
        name = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(roots, key, chain), [*options, *name])

    async def _pinned(self, address: str) -> bytes:
        """The cloud's own certificate, PEM, if it is one of those pinned: as the only root it makes every handshake check it again."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # its hash is what counts
        context.minimum_version = ssl.TLSVersion.TLSv1_3  # there it comes before ours would be asked for
        host, port = host_and_port("--cloud", address)
        try:
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=self.server_name or host)
        except ssl.SSLError as error:
            raise Untrusted(f"{address}: no TLS there ({error.reason or error})") from None
        except OSError as error:
            raise Unreachable(f"{address}: {error.strerror or error}; is plora-cloud running there?") from None
        certificate = writer.get_extra_info("ssl_object").getpeercert(True)
        writer.transport.abort()
        found = hashlib.sha256(certificate or b"").hexdigest()
        if certificate is None or found not in {_digits(pin) for pin in self.pins}:
            raise Untrusted(
                f"{address}: its certificate is sha256:{found}, which is not pinned; do not go on unless you know why it changed"
            )
        return ssl.DER_cert_to_PEM_cert(certificate).encode()


def read_token(path: Path | None) -> str:
    """The one line of a token file; without a file what PLORA_TOKEN says, or "". Not a flag of its own: others on the machine can read
    those. Raises MissingFile, UsageError."""
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip()
    words = read_named("--token-file", path).split()
    if len(words) != 1:
        raise UsageError(f"--token-file {path}: {len(words)} words, expected one access token")
    return words[0].decode(errors="replace")


def why_untrusted(details: str) -> str | None:
    """What gRPC says of a connection that failed, if it was about trust: in words for a person. None if it was about something else."""
    if "Hostname Verification Check failed" in details:
        return "its certificate is for another name; --server-name says which one to expect"
    if (found := re.search(r"CERTIFICATE_VERIFY_FAILED: ([a-zA-Z ,]+)", details)) is not None:
        return f"its certificate is not trusted: {found[1].strip()}; --ca names who signs it, --pin the certificate itself"
    if re.search(r"WRONG_VERSION_NUMBER|TSI_PROTOCOL_FAILURE|Tls handshake failed", details):
        return "no TLS there, or none that fits; --plaintext is for a cloud that has none"
    return None


def _check_roots(path: Path | None, roots: bytes) -> None:
    """gRPC would fail to connect, and not say why."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=roots.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise UsageError(f"--ca {path}: not a certificate in PEM form") from None


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password="")
    except (OSError, ssl.SSLError, ValueError):
        raise UsageError(f"--client-cert {certificate}, --client-key {key}: not a certificate and its key in PEM form") from None


def _digits(pin: str) -> str:
    return pin.lower().replace("sha256:", "").replace(":", "")
