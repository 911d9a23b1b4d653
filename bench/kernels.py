"""What the engine's choices rest on, measured on this machine: how products and attention are written, and how many threads compute.

`python -m bench.kernels` writes docs/results/kernels.json: sizes of SmolLM2-135M's 26 cloud layers, fp32, medians.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plora.cloud_server.engine import Engine, padded_rows

from .conditions import write_results
from .network import SCRATCH

LAYERS = 26
PRODUCTS = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""Rows and columns of a layer's matrices: q/k/v, o, gate/up, down."""
HEADS, KV_HEADS, WIDTH, CONTEXT, SLOTS = 9, 3, 64, 2048, 40
ROWS = (1, 2, 3, 4, 6, 8, 9, 12, 15, 16, 24, 32, 64, 128, 256)
BATCHES, LENGTHS = (1, 4, 16, 32), (64, 256, 1024)
THREADS = (1, 2)


def median_seconds(work: Callable[[], Any], repeats: int, warm: int = 3) -> float:
    for _ in range(warm):
        work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


@torch.inference_mode()
def products() -> dict[str, Any]:
    """Milliseconds of all matrices of a step by rows: F.linear, F.linear with the wide ones turned (0.3), and (W xᵀ)ᵀ, filled up."""
    weights = [[torch.randn(size) for size in PRODUCTS] for _ in range(LAYERS)]
    turned = [[w.t().contiguous().t() if w.shape[0] > w.shape[1] else w for w in layer] for layer in weights]
    found: dict[str, Any] = {}
    for threads in THREADS:
        torch.set_num_threads(threads)
        for rows in ROWS:
            inputs = [torch.randn(rows, size[1]) for size in PRODUCTS]
            filled = [torch.cat([x, x.new_zeros(padded_rows(rows) - rows, x.shape[1])]) for x in inputs]

            def linear(layers: list[list[Tensor]], inputs: list[Tensor] = inputs) -> None:
                for layer in layers:
                    for w, x in zip(layer, inputs, strict=True):
                        F.linear(x, w)

            def across(filled: list[Tensor] = filled) -> None:
                for layer in weights:
                    for w, x in zip(layer, filled, strict=True):
                        torch.mm(w, x.t()).t().contiguous() if len(x) > 1 else F.linear(x, w)

            ways = {"linear": lambda: linear(weights), "turned": lambda: linear(turned), "across": across}
            found.setdefault(f"{threads} threads", {})[str(rows)] = {name: 1e3 * median_seconds(way, 7) for name, way in ways.items()}
        print(f"products, {threads} threads: done", flush=True)
    return found


class Loop(nn.Module):
    """Each row over its own cache, as the cloud graph has it."""

    def forward(self, q: Tensor, keys: Tensor, values: Tensor, slots: list[int], lengths: list[int]) -> Tensor:
        rows: list[Tensor] = []
        for row in range(len(slots)):
            own_keys = keys.select(0, slots[row]).narrow(1, 0, lengths[row])
            own_values = values.select(0, slots[row]).narrow(1, 0, lengths[row])
            scores = torch.bmm(q.narrow(0, row, 1).view(3, 3, 64) * 0.125, own_keys.transpose(1, 2))
            rows.append(torch.bmm(scores.softmax(-1), own_values).view(1, 576))
        return torch.cat(rows)


class Gathered(nn.Module):
    """One call over caches that were copied side by side, padded to the longest."""

    def forward(self, q: Tensor, keys: Tensor, values: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        seen = mask.shape[-1]
        own_keys, own_values = keys.narrow(2, 0, seen)[slots], values.narrow(2, 0, seen)[slots]
        return F.scaled_dot_product_attention(q.view(-1, 3, 3, 64), own_keys, own_values, attn_mask=mask).reshape(-1, 576)


@torch.inference_mode()
def attention() -> dict[str, Any]:
    """Microseconds of one layer's attention for rows that decode, by batch and cached tokens."""
    torch.set_num_threads(max(THREADS))
    keys, values = (torch.randn(SLOTS, KV_HEADS, CONTEXT, WIDTH) for _ in range(2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", DeprecationWarning)
        loop, gathered = torch.jit.script(Loop()), torch.jit.script(Gathered())
    found: dict[str, Any] = {}
    for batch in BATCHES:
        for length in LENGTHS:
            slots = torch.randperm(SLOTS)[:batch]
            lengths = [length - row for row in range(batch)]
            q = torch.randn(batch, HEADS, WIDTH)
            mask = (torch.arange(length) < torch.tensor(lengths)[:, None])[:, None, None].expand(batch, 1, HEADS // KV_HEADS, length)
            mask, listed = mask.contiguous(), slots.tolist()
            error = (loop(q, keys, values, listed, lengths) - gathered(q, keys, values, slots, mask)).abs().max()
            assert error < 1e-4, f"the two do not agree: {error}"
            found.setdefault(str(batch), {})[str(length)] = {
                "loop": 1e6 * median_seconds(lambda: loop(q, keys, values, listed, lengths), 50),  # noqa: B023
                "gathered": 1e6 * median_seconds(lambda: gathered(q, keys, values, slots, mask), 50),  # noqa: B023
            }
    print("attention: done", flush=True)
    return found


def threads_that_compute() -> dict[str, float]:
    """Milliseconds of a step of one and of 16 rows on one thread: while no other has ever computed, and after another has."""
    torch.set_num_threads(max(THREADS))
    engine = Engine(SCRATCH / "entry" / "cloud", 1 << 30, 512, 16)
    slots = [slot for slot in (engine.pool.take() for _ in range(16)) if slot is not None]

    def step(rows: int) -> float:
        for slot in slots:
            assert engine.pool.reserve(slot, 64)
        return 1e3 * median_seconds(lambda: engine.blank_step([(slot, 63, 1) for slot in slots[:rows]]), 15)

    found = {f"{rows} rows, one thread": step(rows) for rows in (1, 16)}
    with ThreadPoolExecutor(1) as other:
        other.submit(step, 1).result()
        found |= {f"{rows} rows, another thread has computed": step(rows) for rows in (1, 16)}
    return found


def main() -> None:
    threads = threads_that_compute()  # first: nothing else has computed yet
    figures = {"threads": threads, "products": products(), "attention": attention()}
    print(threads)
    print(write_results("kernels", figures, "python -m bench.kernels"))


if __name__ == "__main__":
    main()
