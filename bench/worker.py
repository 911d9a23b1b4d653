"""A process that generates on request, so that sides of a comparison take turns in one run and share nothing.

`python -m bench.worker unsplit BASE ADAPTER THREADS` or `… split EDGE CLOUD THREADS`; each input line is a JSON object {"prompt": [ids],
"count": N} and, for split, optionally {"cloud": address, "speculate": true, "bucket": N, "wire_dtype": D}; each output line {"tokens",
"first_seconds", "seconds" (of each later token), "rss_bytes"} and, for split, "stats", or for unsplit "gaps" (between the two best logits).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

Generate = Callable[[dict[str, Any]], dict[str, Any]]


def unsplit(base: str, adapter: str, threads: int) -> Generate:
    import torch

    from .unsplit import UnsplitModel

    torch.set_num_threads(threads)
    model = UnsplitModel(base, Path(adapter))

    def generate(request: dict[str, Any]) -> dict[str, Any]:
        tokens, first, seconds, gaps = model.generate(request["prompt"], request["count"])
        return {"tokens": tokens, "first_seconds": first, "seconds": seconds, "gaps": gaps}

    return generate


def split(edge_folder: str, cloud: str, threads: int) -> Generate:
    from plora.device_runtime.api import PrivateSession
    from plora.device_runtime.drafts import NgramDrafts
    from plora.device_runtime.edge import Edge
    from plora.protocol import read_precision

    edge = Edge(Path(edge_folder), threads=threads)
    opened: dict[str, Any] = {}

    def session_for(request: dict[str, Any]) -> PrivateSession:
        """The last one, unless another is asked for."""
        wanted = (request.get("cloud", cloud), request.get("bucket"), request.get("wire_dtype", "fp32"))
        if opened.get("wanted") != wanted:
            if opened:
                opened["session"].close()
            address, bucket, dtype = wanted
            session = PrivateSession(edge, address, read_precision(dtype), bucket=bucket)
            session.text.defaults = type(session.text.defaults)((), {}, None, None, None, None, None)  # no end token: always `count`
            opened.update(wanted=wanted, session=session)
        return opened["session"]

    def generate(request: dict[str, Any]) -> dict[str, Any]:
        session = session_for(request)
        session.drafter = NgramDrafts() if request.get("speculate") else None
        stamps = [time.perf_counter()]
        tokens = []
        for piece in session.stream(request["prompt"], session.sampling(max_tokens=request["count"], temperature=0.0)):
            stamps.append(time.perf_counter())
            tokens.append(piece.token_id)
        assert session.answer is not None
        stats = asdict(session.answer.stats)
        session.forget()
        later = [b - a for a, b in zip(stamps[1:], stamps[2:], strict=False)]
        return {"tokens": tokens, "first_seconds": stamps[1] - stamps[0], "seconds": later, "stats": stats}

    return generate


def main() -> None:
    kind, *where, threads = sys.argv[1:]
    generate = {"unsplit": unsplit, "split": split}[kind](*where, int(threads))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps({**generate(json.loads(line)), "rss_bytes": psutil.Process().memory_info().rss}), flush=True)


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

    def generate(self, prompt: list[int], count: int, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "count": count, **options}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._line())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


if __name__ == "__main__":
    main()
