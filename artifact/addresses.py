"""HOST:PORT, as flags have it."""

from __future__ import annotations

import ipaddress

from .errors import UsageError


def host_and_port(flag: str, address: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 host in brackets -> (host without them, port). Raises UsageError naming the flag."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(f"{flag} {address}: expected HOST:PORT, port 0 to 65535 (0 picks a free one)")
    return host.removeprefix("[").removesuffix("]"), int(port)


def is_loopback(host: str) -> bool:
    """Of a name only localhost is: where others lead is not in our hands."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
