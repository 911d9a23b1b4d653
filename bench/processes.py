"""Whole processes measured from outside: peak memory of a process tree, start times, and a cloud to talk to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Run:
    """seconds: wall; peak_bytes: largest sum of resident memory over the process and its children, polled."""

    seconds: float
    peak_bytes: int


def run(*command: str | Path) -> Run:
    """Runs to the end. Raises CalledProcessError."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watched, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            peak = max(peak, sum(one.memory_info().rss for one in (watched, *watched.children(recursive=True))))
        except psutil.NoSuchProcess:
            pass
        time.sleep(POLL_SECONDS)
    if process.returncode:
        assert process.stderr is not None
        raise subprocess.CalledProcessError(process.returncode, command, stderr=process.stderr.read())
    return Run(time.perf_counter() - began, peak)


@dataclass(frozen=True)
class Cloud:
    address: str
    pid: int
    start_seconds: float

    @property
    def rss_bytes(self) -> int:
        return psutil.Process(self.pid).memory_info().rss


def pin(pid: int, core: int) -> None:
    """All threads of a process, and those that they will start, on one core."""
    for thread in psutil.Process(pid).threads():
        os.sched_setaffinity(thread.id, {core})


@contextmanager
def cloud(folder: Path, threads: int, kv_bytes: int = 512 << 20, *flags: str) -> Iterator[Cloud]:
    """`plora-cloud serve` on a free loopback port."""
    began = time.perf_counter()
    command = [
        BIN / "plora-cloud",
        "serve",
        folder,
        "--listen",
        "127.0.0.1:0",
        "--threads",
        str(threads),
        "--kv-bytes",
        str(kv_bytes),
        *flags,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"listening on (\S+)", line):
                yield Cloud(match[1], process.pid, time.perf_counter() - began)
                return
        raise RuntimeError(f"{folder}: the cloud ended before it listened")
    finally:
        process.terminate()
        process.wait(30)
