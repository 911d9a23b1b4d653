"""One connection through a link: two directions, each a queue of what is under way. Runs in the link's loop; bench/link.py owns it."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING

from .shaper import Messages

if TYPE_CHECKING:
    from .link import Link

SOCKET_BUFFER_BYTES = 1 << 18
"""The kernel's receive buffer on the link's sockets: what is on the link should be in the link, where it can be counted and lost."""
SYN_RETRY_SECONDS = (1, 2, 3, 4, 5, 7, 11, 19, 35, 67)
"""After the first SYN: Linux 6.5 and later, by default; iOS alike (the tcp_syn_linear_timeouts commit names it as its model)."""
SYN_GIVE_UP_SECONDS = 131
CONNECT_SECONDS = 10.0
"""For the link's own connection to its target, on loopback."""
FLUSH_SECONDS = 1.0
"""For a message that must be delivered before a cut, if the far end does not read."""
WAKE_SECONDS = 0.00015
"""How late a timer fires here (median after an idle wait of 10 ms or more): asked for that much earlier."""

END = b""
"""In a queue: the sender has closed its side."""
RESET = None
"""In a queue: the sender's connection was reset."""


def reset(end: socket.socket) -> None:
    """Closes with RST instead of FIN."""
    if end.fileno() >= 0:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()


class Direction:
    """From `source` to `sink`. Stops reading while more than the shaper's buffer_bytes are under way."""

    def __init__(self, connection: Connection, source: socket.socket, sink: socket.socket, way: str) -> None:
        self.connection = connection
        self.link = connection.link
        self.loop = connection.link.loop
        self.source = source
        self.sink = sink
        self.way = way
        self.shaper = connection.link.shapers[way]
        self.messages = Messages(way == "up")
        self.queue: deque[tuple[float, bytes | None]] = deque()  # (link time of release, what)
        self.queued_bytes = 0
        self.refused = b""  # what the sink's kernel had no room for
        self.timer: asyncio.TimerHandle | None = None
        self.reading = False
        self.ended = False  # the source has nothing more
        self.done = False  # and the sink knows

    def read_on(self) -> None:
        if not self.reading and not self.ended and self.source.fileno() >= 0:
            self.loop.add_reader(self.source, self._readable)
            self.reading = True

    def pause(self) -> None:
        if self.reading:
            self.loop.remove_reader(self.source)
            self.reading = False

    def _readable(self) -> None:
        try:
            data = self.source.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.end(RESET)
            return
        if not data:
            self.end(END)
            return
        if self.connection.dead:
            return
        now, size = self.link.link_time(), self.shaper.piece_bytes
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            self.queue.append((self.shaper.release(now, len(piece)), piece))
        self.queued_bytes += len(data)
        if self.queued_bytes >= self.shaper.buffer_bytes:
            self.pause()
        self.release()

    def end(self, how: bytes | None) -> None:
        """The source is closed or reset: the sink learns it in its turn; if the connection is dead, never."""
        self.pause()
        self.ended = True
        if self.connection.dead:
            self.source.close()
            if self.connection.other(self).ended:
                self.link.forget(self.connection)
        else:
            self.queue.append((self.shaper.release(self.link.link_time(), 0), how))
            self.release()

    def release(self) -> None:
        """Sends what is due and sets the timer for the rest."""
        while self.queue and not self.refused:
            at, what = self.queue[0]
            due = self.link.clock.real_time(at) - WAKE_SECONDS
            if due > self.loop.time():
                if self.timer is None:
                    self.timer = self.loop.call_at(due, self._timed)
                break
            self.queue.popleft()
            if what is None:  # RESET
                self.connection.reset()
                return
            if what == END:
                self._finish()
                return
            self.queued_bytes -= len(what)
            kept, cut = self.link.crossing(self.way, self.messages, what)
            self._send(kept)
            if cut is not None:
                self._flush_for_good()
                self.link.begin_cut(cut.kind, cut.seconds, at_message=True)
                return
        if self.queued_bytes <= self.shaper.buffer_bytes // 2:
            self.read_on()

    def _timed(self) -> None:
        self.timer = None
        self.release()

    def _send(self, data: bytes) -> None:
        if not data:
            return
        try:
            sent = self.sink.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:  # the far end is gone: its RST comes back the other way, what is still under way to it is lost
            self.connection.other(self).end(RESET)
            return
        if sent < len(data):
            self.refused = data[sent:]
            self.loop.add_writer(self.sink, self._writable)

    def _writable(self) -> None:
        self.loop.remove_writer(self.sink)
        data, self.refused = self.refused, b""
        self._send(data)
        self.release()

    def _flush_for_good(self) -> None:
        """Whatever was refused, before anything else in the link moves."""
        if self.refused:
            self.loop.remove_writer(self.sink)
            self.sink.settimeout(FLUSH_SECONDS)
            try:
                self.sink.sendall(self.refused)
            except OSError:
                pass
            self.sink.settimeout(0)
            self.refused = b""

    def _finish(self) -> None:
        self.done = True
        if self.connection.other(self).done:
            self.connection.close()
            return
        try:
            self.sink.shutdown(socket.SHUT_WR)
        except OSError:
            self.connection.other(self).end(RESET)

    def lose(self) -> None:
        """Drops all that is under way."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.queue.clear()
        self.queued_bytes = 0
        if self.refused:
            self.loop.remove_writer(self.sink)
            self.refused = b""

    def stop(self) -> None:
        self.pause()
        self.lose()
        self.ended = True


class Connection:
    """From a client's connection to the end of both sides.

    dead: cut by silence. Bytes are taken from both sides and thrown away, and neither learns that the other has closed.
    """

    def __init__(self, link: Link, client: socket.socket) -> None:
        self.link = link
        self.client = client
        self.server: socket.socket | None = None
        self.directions: list[Direction] = []
        self.dead = False
        self.opening = link.loop.create_task(self._open())

    def other(self, direction: Direction) -> Direction:
        up, down = self.directions
        return down if direction is up else up

    async def _open(self) -> None:
        """The handshake, which the kernel has already done in no time: one round trip before the client's first byte sets out; a SYN
        that meets a silence is sent again; half a round trip later the server's first byte may set out."""
        link, profile = self.link, self.link.profile
        rtt_seconds = profile.rtt_millis / 1e3
        asked = link.loop.time()
        for wait_seconds in (0, *SYN_RETRY_SECONDS):
            await _until(link.loop, asked + wait_seconds)
            if link.silent():
                continue
            silences, sent = link.silences, link.link_time()
            await self._link_reaches(sent + rtt_seconds)
            if link.silences == silences:
                break
        else:
            await _until(link.loop, asked + SYN_GIVE_UP_SECONDS)
            self.reset()
            return
        if wait_seconds and _hung_up(self.client):  # gave up while nothing had got through: the server never hears of it
            self.close()
            return
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
        server.setblocking(False)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):  # wait_for of 3.11 forgets a cancellation that crosses the connection
                await link.loop.sock_connect(server, link.target)
        except (OSError, TimeoutError):
            server.close()
            self.reset()
            return
        except asyncio.CancelledError:
            server.close()
            raise
        self.server = server
        for end in (self.client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up, down = self.directions = [Direction(self, self.client, server, "up"), Direction(self, server, self.client, "down")]
        if link.silences != silences:
            self.silence()
            return
        up.read_on()
        await self._link_reaches(sent + 1.5 * rtt_seconds)
        down.read_on()

    async def _link_reaches(self, link_seconds: float) -> None:
        while (real := self.link.clock.real_time(link_seconds)) > self.link.loop.time() + WAKE_SECONDS:  # a stall may come between
            await _until(self.link.loop, real - WAKE_SECONDS)

    def silence(self) -> None:
        """Dead from now on. One that is still being opened is not hit: its SYN is sent again."""
        self.dead |= bool(self.directions)
        for direction in self.directions:
            direction.lose()
            direction.read_on()

    def reset(self) -> None:
        """RST to both sides, at once."""
        self.stop()
        for end in (self.client, self.server):
            if end is not None:
                reset(end)

    def close(self) -> None:
        self.stop()
        for end in (self.client, self.server):
            if end is not None:
                end.close()

    def stop(self) -> None:
        for direction in self.directions:
            direction.stop()
        if self.opening is not asyncio.current_task(self.link.loop):
            self.opening.cancel()
        self.link.forget(self)


def _hung_up(end: socket.socket) -> bool:
    poll = select.poll()
    poll.register(end, select.POLLRDHUP)
    return bool(poll.poll(0))


async def _until(loop: asyncio.AbstractEventLoop, real_seconds: float) -> None:
    if (wait := real_seconds - loop.time()) > 0:
        await asyncio.sleep(wait)
