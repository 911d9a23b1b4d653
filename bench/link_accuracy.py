"""How well bench/link.py keeps its profiles: docs/results/link.json. The link is a process of its own, the peers are threads here."""

from __future__ import annotations

import math
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .conditions import write_results
from .link import LinkProcess, link_process
from .profiles import PROFILES, RTT_SWEEP_MILLIS, Profile, rtt_only

ECHOES = 150
HANDSHAKES = 7
BULK_BYTES = 2_000_000
UNLIMITED_BULK_BYTES = 100_000_000
"""Several times what the link buffers, or it would be one burst."""
CUT_SECONDS = 0.5
CUT_RTT_MILLIS = 20
WAIT_SECONDS = 60.0
STAMPS = struct.Struct("!ddQ")
"""perf_counter of the first and the last arrival, bytes of the first."""


def serve(listener: socket.socket) -> None:
    """Connections one after the other, each begins with what it wants: E echo, or U up, D down and a size in 8 bytes. Ends with the
    listener."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve_one, args=(connection,), daemon=True).start()


def serve_one(connection: socket.socket) -> None:
    with connection:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wish = connection.recv(1)
            if wish == b"E":
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            elif wish in (b"U", b"D"):
                size = int.from_bytes(connection.recv(8, socket.MSG_WAITALL))
                if wish == b"U":
                    connection.sendall(STAMPS.pack(*arrivals(connection, size)))
                else:
                    connection.sendall(bytes(size))
                connection.recv(1)
        except OSError:
            pass  # cut


def arrivals(connection: socket.socket, size: int) -> tuple[float, float, int]:
    first_bytes = len(connection.recv(1 << 16))
    first = time.perf_counter()
    left = size - first_bytes
    while left:
        left -= len(connection.recv(min(left, 1 << 16)))
    return first, time.perf_counter(), first_bytes


def connect(address: str, wish: bytes) -> socket.socket:
    host, _, port = address.rpartition(":")
    client = socket.create_connection((host, int(port)), WAIT_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.sendall(wish)
    return client


def echo_millis(client: socket.socket) -> float:
    began = time.perf_counter()
    client.sendall(b"x")
    if not client.recv(1):
        raise ConnectionError("closed")
    return 1e3 * (time.perf_counter() - began)


def spread(millis: list[float]) -> dict[str, float]:
    ordered = sorted(millis)
    return {
        "median": statistics.median(ordered),
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "stdev": statistics.stdev(ordered),
    }


def echoes(address: str) -> dict[str, float]:
    with connect(address, b"E") as client:
        echo_millis(client)
        return spread([echo_millis(client) for _ in range(ECHOES)])


def handshake_millis(address: str) -> float:
    """From connect to the first echo."""
    began = time.perf_counter()
    with connect(address, b"E") as client:
        echo_millis(client)
        return 1e3 * (time.perf_counter() - began)


def rate_mbits(address: str, wish: bytes, size: int) -> float:
    """From the first arrival to the last, the first piece not counted."""
    with connect(address, wish + size.to_bytes(8)) as client:
        if wish == b"U":
            client.sendall(bytes(size))
            first, last, first_bytes = STAMPS.unpack(client.recv(STAMPS.size, socket.MSG_WAITALL))
        else:
            first, last, first_bytes = arrivals(client, size)
    return 8e-6 * (size - first_bytes) / (last - first)


def cpu_seconds(link: LinkProcess) -> float:
    """On a CPU so far, all threads; in nanoseconds where psutil has hundredths of a second."""
    return 1e-9 * sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{link.pid}/task").glob("*/schedstat"))


def measure(target: str, profile: Profile, seed: int) -> dict[str, Any]:
    with link_process(target, profile, seed) as link:
        before = cpu_seconds(link)
        round_trip = echoes(link.address)
        cpu_per_echo = 1e3 * (cpu_seconds(link) - before) / (ECHOES + 1)
        setup = statistics.median(handshake_millis(link.address) for _ in range(HANDSHAKES))
        before, began = cpu_seconds(link), time.perf_counter()
        rates = {
            way: rate_mbits(link.address, wish, BULK_BYTES if limit else UNLIMITED_BULK_BYTES)
            for way, wish, limit in (("up", b"U", profile.up_mbits), ("down", b"D", profile.down_mbits))
        }
        cpu_share = (cpu_seconds(link) - before) / (time.perf_counter() - began)
    return {
        "nominal": {
            "rtt_millis": profile.rtt_millis,
            "rtt_stdev_millis": profile.jitter_millis * math.sqrt(2 / 3),  # two even draws of ± jitter
            "connect_and_echo_millis": 2 * profile.rtt_millis,
            "up_mbits": profile.up_mbits,
            "down_mbits": profile.down_mbits,
        },
        "rtt_millis": round_trip,
        "connect_and_echo_millis": setup,
        "up_mbits": rates["up"],
        "down_mbits": rates["down"],
        "cpu_millis_per_echo": cpu_per_echo,
        "cpu_share_in_bulk": cpu_share,
    }


def until_back(address: str, attempt: Callable[[], object]) -> float:
    """Seconds until `attempt` succeeds, tried again at once when the connection is reset."""
    began = time.perf_counter()
    while time.perf_counter() < began + WAIT_SECONDS:
        try:
            attempt()
            return time.perf_counter() - began
        except ConnectionError:
            time.sleep(0.002)
    raise TimeoutError(f"{address}: not back within {WAIT_SECONDS:g} s")


def measure_cuts(target: str) -> dict[str, Any]:
    """Seconds from the command to the first echo after it, each cut CUT_SECONDS long."""
    rtt = CUT_RTT_MILLIS / 1e3
    with link_process(target, rtt_only(CUT_RTT_MILLIS)) as link:
        link.cut("reset", CUT_SECONDS)
        after_reset = until_back(link.address, lambda: handshake_millis(link.address))
        link.cut("silence", CUT_SECONDS)
        after_silence = until_back(link.address, lambda: handshake_millis(link.address))
        with connect(link.address, b"E") as client:
            echo_millis(client)
            link.stall(CUT_SECONDS)
            after_stall = echo_millis(client) / 1e3
    return {
        "cut_seconds": CUT_SECONDS,
        "rtt_millis": CUT_RTT_MILLIS,
        "reset, a new connection each 2 ms": {"nominal": CUT_SECONDS + 2 * rtt, "seconds": after_reset},
        "silence, a new connection at once": {"nominal": 1 + 2 * rtt, "seconds": after_silence},
        "stall, the same connection": {"nominal": CUT_SECONDS + rtt, "seconds": after_stall},
    }


def table(figures: dict[str, Any]) -> str:
    """For docs/links.md."""
    lines = [
        "| profile | RTT ms: set / median / p95 | its deviation ms: set / got | connect + echo ms: set / got | up Mbit/s: set / got "
        "| down Mbit/s: set / got | CPU ms per echo | CPU in bulk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, got in figures["profiles"].items():
        nominal, rtt = got["nominal"], got["rtt_millis"]
        rates = [f"{nominal[way] or 'no limit'} / {got[way]:.{1 if nominal[way] else 0}f}" for way in ("up_mbits", "down_mbits")]
        lines.append(
            f"| {name} | {nominal['rtt_millis']:g} / {rtt['median']:.2f} / {rtt['p95']:.2f} | {nominal['rtt_stdev_millis']:.2f} / "
            f"{rtt['stdev']:.2f} | {nominal['connect_and_echo_millis']:g} / {got['connect_and_echo_millis']:.2f} | {rates[0]} | {rates[1]} "
            f"| {got['cpu_millis_per_echo']:.2f} | {100 * got['cpu_share_in_bulk']:.0f} % |"
        )
    lines += ["", "| after | set s | got s |", "|---|---|---|"]
    lines += [f"| {name} | {got['nominal']:.2f} | {got['seconds']:.3f} |" for name, got in figures["cuts"].items() if isinstance(got, dict)]
    return "\n".join(lines)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        figures: dict[str, Any] = {"echoes": ECHOES, "bulk_bytes": BULK_BYTES, "unlimited_bulk_bytes": UNLIMITED_BULK_BYTES}
        figures["direct_echo_millis"] = echoes(target)
        measured = [*PROFILES.values(), *(rtt_only(millis) for millis in RTT_SWEEP_MILLIS if millis)]
        figures["profiles"] = {one.name: measure(target, one, seed) for seed, one in enumerate(measured)}
        figures["cuts"] = measure_cuts(target)
    print(table(figures))
    print(f"direct: {figures['direct_echo_millis']['median']:.3f} ms", write_results("link", figures, "python -m bench.link_accuracy"))


if __name__ == "__main__":
    main()
