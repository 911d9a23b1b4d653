"""The processes of bench/soak.py: the cloud that it is about, and children that speak in lines of JSON."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from plora.artifact.manifest import CloudManifest, read_manifest

from .conditions import ROOT
from .cuts import CONTEXT_TOKENS, START_SECONDS, Server
from .processes import BIN

BLOCK_TOKENS = 64
BLOCKS_OF_A_DEVICE = 5
"""Of the KV budget: long prompts take 15, short ones one or two, so room is short at times."""


@dataclass(frozen=True)
class Deadlines:
    """The server's, as its flags of these names."""

    lease_seconds: float = 5.0
    idle_seconds: float = 20.0
    quiet_seconds: float = 3.0


class SoakServer(Server):
    """`plora-cloud serve` with the soak's deadlines, little room, and metrics. complaints: its standard error."""

    def __init__(self, folder: Path, devices: int, deadlines: Deadlines, complaints: Path) -> None:
        self.devices, self.deadlines = devices, deadlines
        self.complaints = complaints
        self.ops: str | None = None
        super().__init__(folder)

    def start(self) -> None:
        deadlines, contract = self.deadlines, read_manifest(CloudManifest, self.folder).contract
        context = min(CONTEXT_TOKENS, contract.shape.context_tokens)
        block_bytes = BLOCK_TOKENS * contract.shape.kv_bytes_per_token("fp32", contract.plan.cloud_layers)
        kv_bytes = block_bytes * max(-(-context // BLOCK_TOKENS), BLOCKS_OF_A_DEVICE * self.devices)
        command = [
            BIN / "plora-cloud", "serve", self.folder, "--json", "--listen", self.address, "--threads", "1", "--context", context,
            "--kv-bytes", kv_bytes, "--lease-seconds", deadlines.lease_seconds, "--idle-seconds", deadlines.idle_seconds,
            "--quiet-seconds", deadlines.quiet_seconds, "--ops", "127.0.0.1:0",
        ]  # fmt: skip
        with self.complaints.open("wb") as complaints:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdout=subprocess.PIPE, stderr=complaints, text=True, start_new_session=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.folder}: the cloud ended before it listened; {self.complaints} says why")
        facts = json.loads(line)
        self.port, self.ops = int(facts["listening"].rpartition(":")[2]), facts.get("ops")

    def failures(self) -> dict[str, int]:
        """Tracebacks in what it complained of, by the exception's name."""
        text = self.complaints.read_text(encoding="utf-8", errors="replace")
        return dict(Counter(re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*([\w.]+)", text, re.MULTILINE)))


class Child:
    """`python -m bench.MODULE SETTINGS`, whose lines of JSON go to `hear`; its end of input ends it. As a Server, it can be killed and
    started again. pids: of all that ran."""

    def __init__(self, module: str, settings: Callable[[int], dict[str, Any]], hear: Callable[[dict[str, Any]], None], log: Path) -> None:
        self.module, self.settings, self.hear, self.log = module, settings, hear, log
        self.pids: list[int] = []
        self._lock = threading.Lock()
        self._killed = False
        self.start()

    def start(self) -> None:
        with self._lock:
            self._start()

    def _start(self) -> None:
        self._killed = False
        settings = json.dumps(self.settings(len(self.pids)))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"bench.{self.module}", settings], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, cwd=ROOT, start_new_session=True,
            )  # fmt: skip
        self.pids.append(self.process.pid)
        self.ear = threading.Thread(target=self._listen, args=(self.process.stdout,), name=self.module, daemon=True)
        self.ear.start()

    def _listen(self, lines: IO[str]) -> None:
        for line in lines:
            with suppress(json.JSONDecodeError):  # the last one of a process that was killed
                self.hear(json.loads(line))

    def stop(self, number: int) -> None:
        with self._lock:
            self._killed = True
            self.process.send_signal(number)
            self._end(START_SECONDS)

    def leave(self) -> None:
        """Tells it to end in good order; `wait` waits for it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by itself; else it is killed."""
        with suppress(subprocess.TimeoutExpired):
            self._end(seconds)
            return True
        self.stop(signal.SIGKILL)
        return False

    def _end(self, seconds: float) -> None:
        self.process.wait(seconds)
        self.ear.join(START_SECONDS)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def restart_if_dead(self) -> bool:
        """Whether it had ended, though nobody killed it."""
        with self._lock:
            if self._killed or self.process.poll() is None:
                return False
            self._end(START_SECONDS)
            self._start()
            return True
