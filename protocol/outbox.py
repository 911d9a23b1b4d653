"""What makes a session outlive its connection: numbered frames are kept until the peer says that it received them."""

from __future__ import annotations

from collections import deque

from ..artifact.errors import RemoteProtocolError
from .limits import MAX_UNRECEIVED_FRAMES


class Outbox:
    """The numbered frames of one side, counted from 1. sent: how many there were; those from `received` on are kept.

    A peer acknowledges with each frame of its own (Frame.received), so only what is on its way is kept: a frame or two per step in flight.
    """

    def __init__(self) -> None:
        self.sent = 0
        self._received = 0
        self._kept: deque[bytes] = deque()

    def add(self, frame: bytes | None) -> None:
        """Counts a frame, and keeps it unless it is None. Raises RemoteProtocolError if the peer leaves too many unacknowledged."""
        if self.kept >= MAX_UNRECEIVED_FRAMES:
            raise RemoteProtocolError(f"{self.kept} frames were sent, and the peer acknowledges none of them", "BAD_FRAME")
        self.sent += 1
        if frame is not None:
            self._kept.append(frame)

    def received(self, count: int) -> None:
        """The peer has the first `count` frames; at most `sent`, and what it said before stands."""
        while self._kept and self._received < count:
            self._kept.popleft()
            self._received += 1

    def after(self, count: int) -> list[bytes]:
        """The frames that a peer lacks which received `count`. Raises RemoteProtocolError if they are not kept any more, or never were."""
        if not self._received <= count <= self.sent:
            raise RemoteProtocolError(
                f"a peer that received {count} numbered frames, expected {self._received}..{self.sent}: it cannot go on from there",
                "BAD_FRAME",
            )
        self.received(count)
        return list(self._kept)

    def frame(self, number: int) -> bytes | None:
        """The numbered frame `number`, if it was made and is kept."""
        place = number - self._received - 1
        return self._kept[place] if 0 <= place < len(self._kept) else None

    @property
    def kept(self) -> int:
        """Frames that the peer has not acknowledged."""
        return len(self._kept)

    @property
    def kept_bytes(self) -> int:
        """Memory that unacknowledged frames take."""
        return sum(map(len, self._kept))
