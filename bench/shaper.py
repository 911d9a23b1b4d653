"""What a link does to bytes, without socket or clock: when they come out, what a stall costs, which gRPC messages they complete."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says before its first frame (RFC 9113, 3.4)."""
FRAME_HEADER_BYTES = 9
"""Length in 3 bytes, type, flags, stream in 4 (RFC 9113, 4.1)."""
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM = 1
MESSAGE_HEADER_BYTES = 5
"""A flag and the length in 4 bytes, before each gRPC message."""

PIECE_SECONDS = 0.001
"""At a limited rate bytes come out in pieces of this long."""
MIN_PIECE_BYTES = 1448
"""The payload of a full segment on Ethernet: nothing smaller is worth a timer."""
MAX_PIECE_BYTES = 1 << 16
MIN_BUFFER_BYTES = 1 << 18
"""So that a slow link takes a prefill chunk whole, as a kernel's send buffer would."""
UNLIMITED_BUFFER_BYTES = 1 << 24
"""In flight at most where the rate is unlimited: 3.3 Gbit/s at a one-way delay of 40 ms."""
JITTER_HOLD_SECONDS = 0.005
"""One draw of jitter serves this long: a message of many pieces is late or early as one."""


class Shaper:
    """One direction: a serialiser of `mbits` (None: unlimited) shared by all connections, then a delay that changes by burst,
    first in first out.

    piece_bytes: how much goes through at once; buffer_bytes: how much one connection may have inside before the link stops reading
    from it, twice the bandwidth-delay product (round trip) or more.
    """

    def __init__(self, mbits: float | None, delay_seconds: float, jitter_seconds: float = 0.0, seed: int | str = 0) -> None:
        self.delay_seconds = delay_seconds
        self.jitter_seconds = jitter_seconds
        self._seconds_per_byte = 0.0 if mbits is None else 8e-6 / mbits
        self._random = random.Random(seed)
        self._free = 0.0
        self._jitter = 0.0
        self._hold_until = 0.0
        self._last = 0.0
        if mbits is None:
            self.piece_bytes, self.buffer_bytes = MAX_PIECE_BYTES, UNLIMITED_BUFFER_BYTES
        else:
            bytes_per_second = mbits * 1e6 / 8
            self.piece_bytes = min(MAX_PIECE_BYTES, max(MIN_PIECE_BYTES, round(bytes_per_second * PIECE_SECONDS)))
            self.buffer_bytes = max(MIN_BUFFER_BYTES, round(2 * bytes_per_second * 2 * (delay_seconds + jitter_seconds)))

    def release(self, now: float, size: int) -> float:
        """When the last of `size` bytes that came at `now` is out at the far end. Seconds; `now` must not go back."""
        self._free = max(now, self._free) + size * self._seconds_per_byte
        if self.jitter_seconds and self._free >= self._hold_until:
            self._jitter = self._random.uniform(-self.jitter_seconds, self.jitter_seconds)
            self._hold_until = self._free + JITTER_HOLD_SECONDS
        self._last = max(self._last, self._free + self.delay_seconds + self._jitter)
        return self._last

    def drop(self, now: float) -> None:
        """All that was inside is lost: the way is free."""
        self._free = self._last = now


class LinkClock:
    """Link time: real time that stands still during a stall, so that everything inside waits and nothing changes its order."""

    def __init__(self) -> None:
        self._lost = 0.0
        self._began = 0.0
        self._until = 0.0

    def stall(self, now: float, seconds: float) -> float:
        """Begins or prolongs a stall; returns its end in real time."""
        if now >= self._until:
            self._lost += self._until - self._began
            self._began = self._until = now
        self._until = max(self._until, now + seconds)
        return self._until

    def link_time(self, now: float) -> float:
        return min(now, self._began) - self._lost if now < self._until else now - (self._until - self._began) - self._lost

    def real_time(self, link: float) -> float:
        """When the link's time will be `link`, as far as is known now."""
        at = link + self._lost
        return at if at <= self._began else at + (self._until - self._began)


@dataclass
class _Stream:
    """Where one HTTP/2 stream stands within a gRPC message."""

    header: bytearray = field(default_factory=bytearray)
    left: int = 0

    def feed(self, data: bytes, start: int, stop: int) -> list[int]:
        ends = []
        while start < stop:
            if len(self.header) < MESSAGE_HEADER_BYTES:
                taken = data[start : min(stop, start + MESSAGE_HEADER_BYTES - len(self.header))]
                self.header += taken
                start += len(taken)
                if len(self.header) < MESSAGE_HEADER_BYTES:
                    break
                self.left = int.from_bytes(self.header[1:])
            taken_bytes = min(self.left, stop - start)
            self.left -= taken_bytes
            start += taken_bytes
            if not self.left:
                ends.append(start)
                self.header.clear()
        return ends


class Messages:
    """Finds gRPC messages in one direction of one HTTP/2 connection, whatever its streams; holds headers, never payload.

    What does not begin as HTTP/2 (TLS, say) has none. Padding, which gRPC does not use, is not understood. up: from the client,
    which begins with the preface.
    """

    def __init__(self, up: bool) -> None:
        self._preface = PREFACE if up else b""
        self._header = bytearray()
        self._first = True
        self._left = 0
        self._streams: dict[int, _Stream] = {}
        self._within: _Stream | None = None
        self._foreign = False

    def feed(self, data: bytes) -> list[int]:
        """The offset in `data` behind the last byte of each message that it completes."""
        position = min(len(self._preface), len(data))
        self._foreign |= data[:position] != self._preface[:position]
        self._preface = self._preface[position:]
        ends: list[int] = []
        while position < len(data) and not self._foreign:
            if self._left:
                stop = min(len(data), position + self._left)
                if self._within is not None:
                    ends += self._within.feed(data, position, stop)
                self._left -= stop - position
                position = stop
            else:
                taken = data[position : position + FRAME_HEADER_BYTES - len(self._header)]
                self._header += taken
                position += len(taken)
                if len(self._header) == FRAME_HEADER_BYTES:
                    self._begin_frame()
        return ends

    def _begin_frame(self) -> None:
        kind, flags, stream = self._header[3], self._header[4], int.from_bytes(self._header[5:])
        self._left = int.from_bytes(self._header[:3])
        self._header.clear()
        self._foreign = self._first and kind != SETTINGS  # both sides must begin with it
        self._first = False
        self._within = self._streams.setdefault(stream, _Stream()) if kind == DATA else None
        if kind == RST_STREAM or (kind in (DATA, HEADERS) and flags & END_STREAM):
            self._streams.pop(stream, None)
