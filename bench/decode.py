"""One plan's decoding over loopback beside the unsplit model, in turns, in one run."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from .processes import cloud
from .wire import socket_bytes
from .worker import Worker

PROMPT_TOKENS = 16
NEW_TOKENS = 48
TTFT_PROMPTS = (16, 128, 512)


def prompt(tokens: int) -> list[int]:
    """Token ids from all over the vocabulary: what they say does not change what they cost."""
    return [1 + (7919 * index) % 49_000 for index in range(tokens)]


def compare(base: str, adapter: Path, out: Path, rounds: int) -> dict[str, Any]:
    """Unsplit and split take turns, `rounds` times; medians per token and their ratio, same total threads."""
    figures: dict[str, Any] = {"rounds": rounds, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "threads_total": 2}
    with cloud(out / "cloud", 1) as server:
        unsplit, split = Worker("unsplit", base, adapter, "2"), Worker("split", out / "edge", server.address, "1")
        try:
            seconds: dict[str, list[float]] = {"unsplit": [], "split": []}
            tokens: dict[str, list[int]] = {}
            for _ in range(rounds):
                for name, worker in (("unsplit", unsplit), ("split", split)):
                    answer = worker.generate(prompt(PROMPT_TOKENS), NEW_TOKENS)
                    seconds[name] += answer["seconds"]
                    tokens[name] = answer["tokens"]
                    figures[f"{name}_rss_bytes"] = answer["rss_bytes"]
            for name, values in seconds.items():
                quarters = statistics.quantiles(values, n=4)
                figures[f"{name}_token_millis"] = {
                    "median": 1e3 * statistics.median(values),
                    "quartiles": [1e3 * quarters[0], 1e3 * quarters[2]],
                }
            figures["split_over_unsplit"] = statistics.median(seconds["unsplit"]) / statistics.median(seconds["split"])
            figures["tokens_equal"] = tokens["unsplit"] == tokens["split"]
            figures["cloud_rss_bytes"] = server.rss_bytes
            figures["cloud_start_seconds"] = server.start_seconds
            figures["ttft_seconds"] = {
                str(size): {
                    name: statistics.median(worker.generate(prompt(size), 1)["first_seconds"] for _ in range(3))
                    for name, worker in (("unsplit", unsplit), ("split", split))
                }
                for size in TTFT_PROMPTS
            }
        finally:
            unsplit.close()
            split.close()
        figures["device"] = device_alone(out)
        figures["socket"] = socket_bytes(server.address, out / "edge")
    figures["cloud_compute_millis"] = cloud_alone(out / "cloud")
    return figures


def device_alone(out: Path, repeats: int = 40) -> dict[str, float]:
    """Milliseconds of the device's own work per token: embedding, own layers, cores, norm and head; one thread."""
    import numpy as np

    from plora.device_runtime.edge import Edge

    edge = Edge(out / "edge")
    hidden = edge.embed([5])
    front = edge.device_layers(0, edge.plan.front_layers, 64)
    back = edge.device_layers(edge.plan.layers - edge.plan.back_layers, edge.plan.layers, 64)
    held = edge.plan.entry_exchange
    compressed = [np.ones((1, exchange.compressed_columns), np.float32) for exchange in edge.plan.exchanges]
    work = {
        "embedding_millis": lambda: edge.embed([5]),
        "layers_millis": lambda: (front.run(hidden, 16), back.run(hidden, 16)),
        "entry_injection_millis": lambda: edge.entry_injection(held, hidden) if held else None,
        "cores_millis": lambda: [edge.inject(e, c) for e, c in zip(edge.plan.exchanges, compressed, strict=True)],
        "head_millis": lambda: edge.logits(hidden),
    }
    return {name: median_millis(call, repeats) for name, call in work.items()}


def cloud_alone(folder: Path, repeats: int = 40) -> float:
    """Milliseconds of the cloud's work per token without a network: the engine in this process, one thread."""
    import torch

    from plora.cloud_server.engine import Engine

    torch.set_num_threads(1)
    engine = Engine(folder, 256 << 20)
    engine.warm_up()
    return median_millis(lambda: engine.blank_step(0, 16, 1), repeats)


def median_millis(call: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)
