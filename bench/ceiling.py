"""What a batch could reach at best: the same artifact's layers on the same engine in this process, without devices, network or server.

`python -m bench.ceiling OUT 1 4 16 [--base BASE --adapter ADAPTER]` prints tokens per second by batch; with a base the whole unsplit model,
too: all layers, cores in place, embeddings and head.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from plora.cloud_server.engine import Engine, Floats, Piece, padded_rows

PROMPT_TOKENS = 64
"""Cached before the first measured token, about what scripted devices have on the average."""
STEPS = 24
WARM_STEPS = 3


def engine_ceiling(folder: Path, batch: int, threads: int, steps: int = STEPS) -> float:
    """Tokens per second of `batch` rows that decode together; their injections are there before they are asked for."""
    torch.set_num_threads(threads)
    engine = Engine(folder, (1 << 30) + batch * (16 << 20), 512, batch)
    generator = np.random.default_rng(0)

    def values(tokens: int, columns: int) -> Floats:
        return generator.standard_normal((tokens, columns)).astype(np.float32)

    slots = [slot for slot in (engine.pool.take() for _ in range(batch)) if slot is not None]
    assert len(slots) == batch, "the KV budget is too small"
    held = engine.plan.entry_exchange
    length, seconds = 0, []
    for step in range(WARM_STEPS + steps):
        tokens = PROMPT_TOKENS if step == 0 else 1
        rows = []
        for slot in slots:
            assert engine.pool.reserve(slot, length + tokens)
            injection = values(tokens, held.injection_columns) if held else None
            rows.append(engine.begin(slot, length, values(tokens, engine.shape.hidden), injection))
        waiting = [values(tokens, exchange.injection_columns) for exchange in engine.plan.exchanges]
        began = time.perf_counter()
        for index, leg in enumerate(engine.legs):
            engine.go(index, [Piece(row, row.count) for row in rows])
            if leg.exchange is not None:
                for row in rows:
                    engine.inject(row, leg.exchange.index, waiting[leg.exchange.index])
        if step >= WARM_STEPS:
            seconds.append(time.perf_counter() - began)
        length += tokens
    return batch / statistics.median(seconds)


def model_ceiling(base: str, adapter: Path, batch: int, threads: int, steps: int = STEPS) -> float:
    """Tokens per second of the whole unsplit model, `batch` rows that decode together, greedy."""
    from .unsplit import UnsplitModel

    torch.set_num_threads(threads)
    model = UnsplitModel(base, adapter, 512, batch)
    ids = torch.arange(1, 1 + batch * PROMPT_TOKENS) % 1000
    slots, seconds = list(range(batch)), []
    with torch.inference_mode():
        logits = model.module.batch(ids, [0] * batch, [PROMPT_TOKENS] * batch, 0, slots, model.keys, model.values)
        for step in range(WARM_STEPS + steps):
            lengths = [PROMPT_TOKENS + step] * batch
            began = time.perf_counter()
            padding = padded_rows(batch) - batch
            logits = model.module.batch(logits.argmax(-1), lengths, [1] * batch, padding, slots, model.keys, model.values)
            if step >= WARM_STEPS:
                seconds.append(time.perf_counter() - began)
    return batch / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a batch could reach at best, as JSON.")
    parser.add_argument("out", type=Path)
    parser.add_argument("batches", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base")
    parser.add_argument("--adapter", type=Path)
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {
        "engine": {str(batch): engine_ceiling(arguments.out / "cloud", batch, arguments.threads) for batch in arguments.batches}
    }
    if arguments.base:
        found["model"] = {
            str(batch): model_ceiling(arguments.base, arguments.adapter, batch, arguments.threads) for batch in arguments.batches
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
