"""A TCP relay on loopback that counts what crosses it: bytes on the socket, framing and all, and gRPC messages among them."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

PREFACE_BYTES = len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
"""What a client says before its first frame (RFC 9113, 3.4)."""
FRAME_HEADER_BYTES = 9
"""Length in 3 bytes, type, flags, stream (RFC 9113, 4.1); type 0 is DATA."""
MESSAGE_HEADER_BYTES = 5
"""A flag and the length in 4 bytes, before each gRPC message."""


class Messages:
    """Counts the gRPC messages in one direction of an HTTP/2 connection that carries one stream at a time."""

    def __init__(self, preface_bytes: int) -> None:
        self.count = 0
        self._skip = preface_bytes
        self._frames = bytearray()
        self._data = bytearray()

    def feed(self, data: bytes) -> None:
        skipped = min(self._skip, len(data))
        self._skip -= skipped
        self._frames += data[skipped:]
        while len(self._frames) >= FRAME_HEADER_BYTES:
            end = FRAME_HEADER_BYTES + int.from_bytes(self._frames[:3])
            if len(self._frames) < end:
                return
            if self._frames[3] == 0:
                self._data += self._frames[FRAME_HEADER_BYTES:end]
            del self._frames[:end]
            self._count()

    def _count(self) -> None:
        while len(self._data) >= MESSAGE_HEADER_BYTES:
            end = MESSAGE_HEADER_BYTES + int.from_bytes(self._data[1:5])
            if len(self._data) < end:
                return
            del self._data[:end]
            self.count += 1


class Relay:
    """Forwards one connection to one address; `up` and `down` count bytes from and to the client, `messages` gRPC messages by way."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self.up = 0
        self.down = 0
        self.messages = {"up": Messages(PREFACE_BYTES), "down": Messages(0)}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.sockets: list[socket.socket] = [self.listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(self.target)
            self.sockets += [client, server]
            threading.Thread(target=self._forward, args=(client, server, "up"), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, "down"), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(1 << 16):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
                self.messages[way].feed(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for end in self.sockets:
            end.close()
