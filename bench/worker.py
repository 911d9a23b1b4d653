"""A process that generates on request, so that sides of a comparison take turns in one run and share nothing.

`python -m bench.worker unsplit BASE ADAPTER THREADS` or `… split EDGE CLOUD THREADS`; each input line is a JSON object
{"prompt": [ids], "count": N}, each output line {"tokens", "first_seconds", "seconds", "rss_bytes"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

Generate = Callable[[list[int], int], tuple[list[int], float, list[float]]]


def unsplit(base: str, adapter: str, threads: int) -> Generate:
    import torch

    from .unsplit import UnsplitModel

    torch.set_num_threads(threads)
    return UnsplitModel(base, Path(adapter)).generate


def split(edge: str, cloud: str, threads: int) -> Generate:
    from plora.device_runtime import open_session

    session = open_session(edge, cloud, threads=threads)
    session.text.defaults = type(session.text.defaults)((), {}, None, None, None, None, None)  # no end token: always `count`

    def generate(prompt: list[int], count: int) -> tuple[list[int], float, list[float]]:
        stamps = [time.perf_counter()]
        pieces = session.stream(prompt, session.sampling(max_tokens=count, temperature=0.0))
        tokens = []
        for piece in pieces:
            stamps.append(time.perf_counter())
            tokens.append(piece.token_id)
        session.forget()
        return tokens, stamps[1] - stamps[0], [b - a for a, b in zip(stamps[1:], stamps[2:], strict=False)]

    return generate


def main() -> None:
    kind, *where, threads = sys.argv[1:]
    generate = {"unsplit": unsplit, "split": split}[kind](*where, int(threads))
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        tokens, first, seconds = generate(request["prompt"], request["count"])
        rss = psutil.Process().memory_info().rss
        print(json.dumps({"tokens": tokens, "first_seconds": first, "seconds": seconds, "rss_bytes": rss}), flush=True)


class Worker:
    """The parent's handle of such a process."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._line() != "ready":
            raise RuntimeError(f"worker {arguments} did not start")

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "count": count}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


if __name__ == "__main__":
    main()
