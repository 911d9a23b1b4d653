"""From measured compute to decoders and machines that we do not have: seconds per step of a plan on a named GPU, phone and link.

    step  =  round trips · (RTT + overhead)  +  bytes up · 8 / up  +  bytes down · 8 / down  +  cloud  +  device
    cloud, device  =  max(bytes read / (memory bandwidth · share), FLOPs / (peak · share))          the roofline model, CACM 52(4), 2009

Nothing overlaps in it. No GPU and no phone was measured by us; the shares are assumptions, held against published figures (`anchors`).
bench/scaling.py makes the tables of docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.cost import payload, prompt_bytes
from plora.artifact.errors import UsageError
from plora.artifact.plan import TARGETS
from plora.artifact.shape import DecoderShape, Rope, check_fits
from plora.protocol.limits import MAX_STEP_TOKENS

from .profiles import PROFILES, Profile

WEIGHT_BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8.5, "int4": 4.5}
"""Bits per weight; int8 and int4 in blocks of 32 with an fp16 scale each (GGUF's Q8_0 and Q4_0)."""
KV_DTYPE = "fp16"
OVERHEAD_SECONDS = 0.5e-3
"""Of a round trip beyond the network: gRPC, framing, checks. Measured here over loopback: 16.2 ms for 31 (docs/benchmarks.md, paper)."""


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UsageError(f"{name} {value:g}, expected above 0")


def _bits(weights: str) -> float:
    if weights not in WEIGHT_BITS:
        raise UsageError(f"weights {weights!r}, expected one of {', '.join(WEIGHT_BITS)}")
    return WEIGHT_BITS[weights]


@dataclass(frozen=True)
class Chip:
    """A processor and its memory. gigabytes_per_second, teraflops: peaks (10^9, 10^12; dense, no sparsity); the shares of them that
    decoding and prefill reach; memory_gb: what weights must fit in."""

    name: str
    gigabytes_per_second: float
    bandwidth_share: float
    teraflops: float
    compute_share: float
    memory_gb: float
    source: str

    def __post_init__(self) -> None:
        for name in ("gigabytes_per_second", "teraflops", "memory_gb"):
            _positive(f"{self.name}: {name}", getattr(self, name))
        for name in ("bandwidth_share", "compute_share"):
            if not 0 < getattr(self, name) <= 1:
                raise UsageError(f"{self.name}: {name} {getattr(self, name):g}, expected above 0 and at most 1")

    def seconds(self, work: Work) -> float:
        read = work.read_bytes / (1e9 * self.gigabytes_per_second * self.bandwidth_share)
        return max(read, work.flops / (1e12 * self.teraflops * self.compute_share))

    def holds(self, weight_bytes: float) -> bool:
        return weight_bytes <= 1e9 * self.memory_gb


@dataclass(frozen=True)
class Work:
    """read_bytes: weights and KV cache that a step reads from memory; weight_bytes: of them, weights, once."""

    read_bytes: float
    flops: float
    weight_bytes: float


GPU_SHARES = {"bandwidth_share": 0.7, "compute_share": 0.5}
"""Assumed. Bandwidth: gpt-fast reads 1,397 of 2,039 GB/s (0.69) with Llama-2-7B on an A100, batch 1 (its README). Compute: usual for
prefill of a few hundred tokens; not measured."""
PHONE_SHARES = {"bandwidth_share": 0.6, "compute_share": 1.0}
"""Assumed. Bandwidth: ExecuTorch decodes Llama 3.2 1B in bf16 at 19.2 tokens/s on a OnePlus 12, 2.47 GB each: 47 of 76.8 GB/s (0.62); int4
reaches 0.53 to 0.56 there, so 0.6 flatters the phone alone. Compute: the peak given is what its prefill reached."""
PHONE_TERAFLOPS = 0.6
"""ExecuTorch on a OnePlus 12's CPU: prefill of Llama 3.2 1B and 3B, int4 weights, at 260 and 90 tokens/s: 2 · parameters · rate. Assumed of
every phone here: none publishes a figure that a decoder reaches."""

GPUS = (
    Chip("H100 SXM", 3350, teraflops=989, memory_gb=80, source="NVIDIA H100 datasheet: 3.35 TB/s, 1,979 TFLOPS fp16 sparse", **GPU_SHARES),
    Chip("A100 80GB", 2039, teraflops=312, memory_gb=80, source="NVIDIA A100 datasheet (SXM): 2,039 GB/s, 312 TFLOPS fp16", **GPU_SHARES),
    Chip("L4", 300, teraflops=121, memory_gb=24, source="NVIDIA L4 datasheet: 300 GB/s, 242 TFLOPS fp16 sparse", **GPU_SHARES),
    Chip(
        "RTX 4090", 1008, teraflops=165.2, memory_gb=24,
        source="NVIDIA Ada whitepaper: 1,008 GB/s, 165.2 TFLOPS fp16 with fp32 accumulate", **GPU_SHARES,
    ),
)  # fmt: skip
PHONES = (
    Chip(
        "Snapdragon 8 Gen 3", 76.8, teraflops=PHONE_TERAFLOPS, memory_gb=16,
        source="Qualcomm product brief: LPDDR5X at 4,800 MHz; 9,600 MT/s · 64 bit. OnePlus 12: up to 16 GB", **PHONE_SHARES,
    ),
    Chip(
        "Snapdragon 8 Elite", 84.8, teraflops=PHONE_TERAFLOPS, memory_gb=16,
        source="Qualcomm product brief: LPDDR5X at 5,300 MHz; 10,600 MT/s · 64 bit. Phones with up to 16 GB", **PHONE_SHARES,
    ),
    Chip(
        "Apple A17 Pro", 51.2, teraflops=PHONE_TERAFLOPS, memory_gb=8,
        source="Apple publishes none: LPDDR5-6400 · 64 bit, 8 GB, as taken apart by others", **PHONE_SHARES,
    ),
)  # fmt: skip
H100, A100 = GPUS[:2]
PHONE = PHONES[0]
MEDIAN_5G = Profile("5g median", 44, up_mbits=19.9, down_mbits=207.4, source="Ookla Speedtest, 5G worldwide, 2023: medians")
LINKS = (PROFILES["wifi"], PROFILES["5g"], MEDIAN_5G, PROFILES["wan"])


def _shape(
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocabulary: int,
    context_tokens: int,
    theta: float,
    epsilon: float,
) -> DecoderShape:
    size = hidden // heads
    rope = Rope(tuple(theta ** (-2 * index / size) for index in range(size // 2)), 1.0)
    sizes = (hidden, layers, heads, kv_heads, size, intermediate, vocabulary, context_tokens)
    return DecoderShape(*sizes, epsilon, (0,) * layers, rope)


SHAPES = {
    "SmolLM2-135M": _shape(576, 30, 9, 3, 1536, 49152, 8192, 1e5, 1e-5),
    "Llama-2-7B": _shape(4096, 32, 32, 32, 11008, 32000, 4096, 1e4, 1e-5),
    "Llama-3-8B": _shape(4096, 32, 32, 8, 14336, 128256, 8192, 5e5, 1e-5),
    "LLaMA-33B": _shape(6656, 60, 52, 52, 17920, 32000, 2048, 1e4, 1e-6),
}
"""From the models' config.json; LLaMA-33B: arXiv 2302.13971, table 2."""


RANK = 128
"""The paper's for 7B and above."""


def plans(shape: DecoderShape, rank: int = RANK) -> dict[str, ExchangePlan]:
    """The named plans at a decoder's depth; "front": 4 of 30 layers as in the demo, scaled to the depth."""
    layers, front = shape.layers, round(4 * shape.layers / 30)
    return {
        "paper": paper_plan(layers, rank),
        "grouped by 6": grouped_plan(layers, 6, rank, TARGETS),
        "entry": entry_plan(layers, 0, rank),
        "entry, shared 2048": entry_plan(layers, 0, rank, shared_injection=2048),
        "entry, front": entry_plan(layers, front, rank),
        "entry, front, shared 2048": entry_plan(layers, front, rank, shared_injection=2048),
        "entry, front, shared 4096": entry_plan(layers, front, rank, shared_injection=4096),
    }


@dataclass(frozen=True)
class Setup:
    """Who computes what with which numbers. cached_tokens: in the KV cache when a token is decoded. int8 and int4 on the device are
    predictions only: edge halves are fp32 or fp16 today."""

    shape: DecoderShape
    plan: ExchangePlan
    cloud: Chip = H100
    device: Chip = PHONE
    link: Profile = PROFILES["5g"]
    cloud_weights: str = "fp16"
    layer_weights: str = "fp16"
    head_weights: str = "fp16"
    wire: str = "fp16"
    cached_tokens: int = 512
    overhead_seconds: float = OVERHEAD_SECONDS

    def __post_init__(self) -> None:
        check_fits(self.plan, self.shape)
        for name in (self.cloud_weights, self.layer_weights, self.head_weights):
            _bits(name)
        if self.cached_tokens < 0 or not 0 <= self.overhead_seconds < math.inf:
            raise UsageError(f"{self.cached_tokens} cached tokens, overhead {self.overhead_seconds:g} s per round trip: expected 0 or more")

    def on_device(self, weights: str) -> Setup:
        """The same with device layers and head of `weights`."""
        return replace(self, layer_weights=weights, head_weights=weights)


@dataclass(frozen=True)
class Speculation:
    """rows: tokens that a step computes, the last one and its drafts; gained: tokens that it adds to the text, on average."""

    rows: int = 1
    gained: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1 or not 1 <= self.gained <= self.rows:
            raise UsageError(f"{self.gained:g} tokens gained of {self.rows} rows in a step, expected 1 <= gained <= rows")


@dataclass(frozen=True)
class Prediction:
    """Where the seconds of a step go, and how many tokens it adds."""

    round_trips_seconds: float
    transfer_seconds: float
    cloud_seconds: float
    device_seconds: float
    overhead_seconds: float
    tokens: float

    @property
    def seconds(self) -> float:
        return self.round_trips_seconds + self.transfer_seconds + self.cloud_seconds + self.device_seconds + self.overhead_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def layer_weights(shape: DecoderShape) -> int:
    """Values in one decoder layer: projections and both norms."""
    attention = 2 * shape.hidden * shape.query_width + 2 * shape.hidden * shape.kv_width
    return attention + 3 * shape.hidden * shape.intermediate + 2 * shape.hidden


def cloud_work(setup: Setup, rows: int, steps: int = 1) -> Work:
    """The cloud's layers, and every A and B that it holds; `rows` tokens in all, read in `steps` passes."""
    shape, plan = setup.shape, setup.plan
    basis = sum(shape.out_features(column.target) * column.out_rank for column in plan.columns)
    basis += sum(exchange.compressed_columns * shape.hidden for exchange in plan.exchanges)
    values = plan.cloud_layers * layer_weights(shape) + basis
    return _work(shape, plan.cloud_layers, values, values * _bits(setup.cloud_weights) / 8, rows, setup.cached_tokens, steps)


def device_work(setup: Setup, rows: int, head_rows: int, steps: int = 1) -> Work:
    """Device layers, an entry source's A, cores (fp32), and the head for `head_rows`. Of the embedding a row is read: nothing."""
    shape, plan = setup.shape, setup.plan
    layers = len(plan.device_layers)
    values = layers * layer_weights(shape) + shape.hidden
    held = plan.entry_exchange.compressed_columns * shape.hidden if plan.entry_exchange else 0
    cores = sum(math.prod(size) for size in plan.trained.values())
    size = values * _bits(setup.layer_weights) / 8 + held * 2 + cores * 4
    body = _work(shape, layers, values + held + cores, size, rows, setup.cached_tokens, steps)
    head = shape.hidden * shape.vocabulary
    head_bytes = head * _bits(setup.head_weights) / 8
    return Work(body.read_bytes + head_bytes, body.flops + 2 * head * head_rows, body.weight_bytes + head_bytes)


def _work(shape: DecoderShape, layers: int, values: int, weight_bytes: float, rows: int, cached: int, steps: int) -> Work:
    """Each step reads the weights and the cache; each row multiplies with every value, and with keys and values of half of what
    its prompt adds and all that was cached."""
    positions = cached + rows / 2
    attention = 4 * layers * shape.query_width * positions
    read = steps * (weight_bytes + cached * shape.kv_bytes_per_token(KV_DTYPE, layers))
    return Work(read, rows * (2 * values + attention), weight_bytes)


def decode(setup: Setup, speculation: Speculation = Speculation()) -> Prediction:
    """One step of decoding."""
    one, rows = payload(setup.plan, setup.shape, setup.wire), speculation.rows
    work = cloud_work(setup, rows), device_work(setup, rows, rows)
    return _predict(setup, rows * one.up, rows * one.down, work, 1, speculation.gained)


def first_token(setup: Setup, prompt_tokens: int) -> Prediction:
    """A prompt, from an empty cache to its first token. Chunks follow each other without waiting, so the round trips count once."""
    if prompt_tokens < 1:
        raise UsageError(f"a prompt of {prompt_tokens} tokens, expected at least 1")
    empty, steps = replace(setup, cached_tokens=0), math.ceil(prompt_tokens / MAX_STEP_TOKENS)
    up, down = prompt_bytes(setup.plan, setup.shape, setup.wire, prompt_tokens)
    work = cloud_work(empty, prompt_tokens, steps), device_work(empty, prompt_tokens, 1, steps)
    return _predict(setup, up, down, work, steps, 1.0)


def _predict(setup: Setup, up: float, down: float, work: tuple[Work, Work], steps: int, tokens: float) -> Prediction:
    trips, rtt = setup.plan.round_trips, setup.link.rtt_millis / 1e3
    network = predict_rtt(0.0, trips, rtt, up, down, setup.link.up_mbits, setup.link.down_mbits)
    cloud, device = setup.cloud.seconds(work[0]), setup.device.seconds(work[1])
    return Prediction(trips * rtt, network - trips * rtt, cloud, device, steps * trips * setup.overhead_seconds, tokens)


def alone(shape: DecoderShape, chip: Chip, weights: str, rows: int = 1, cached_tokens: int = 512) -> float:
    """Seconds of a step of the whole decoder on one chip, no network: decode of one row, or a prompt of `rows` (cached_tokens 0)."""
    return chip.seconds(alone_work(shape, weights, rows, cached_tokens))


def alone_work(shape: DecoderShape, weights: str, rows: int = 1, cached_tokens: int = 512) -> Work:
    head = shape.hidden * shape.vocabulary
    values = shape.layers * layer_weights(shape) + shape.hidden
    body = _work(shape, shape.layers, values, values * _bits(weights) / 8, rows, cached_tokens, 1)
    size = head * _bits(weights) / 8
    return Work(body.read_bytes + size, body.flops + 2 * head, body.weight_bytes + size)


def rtt_for(setup: Setup, tokens_per_second: float, speculation: Speculation = Speculation()) -> float:
    """Milliseconds of RTT at which the split decodes that fast; below 0 where no link could."""
    _positive("tokens per second", tokens_per_second)
    near = decode(replace(setup, link=replace(setup.link, rtt_millis=0, jitter_millis=0)), speculation)
    return 1e3 * (near.tokens / tokens_per_second - near.seconds) / setup.plan.round_trips


def predict_rtt(
    compute_seconds: float,
    round_trips: float,
    rtt_seconds: float,
    bytes_up: float,
    bytes_down: float,
    up_mbits: float | None,
    down_mbits: float | None,
) -> float:
    """Seconds of a step over a link, from its seconds without one. mbits: 10^6 bits per second; None: unlimited. Raises UsageError."""
    for name, value in (
        ("compute_seconds", compute_seconds), ("round_trips", round_trips), ("rtt_seconds", rtt_seconds), ("bytes_up", bytes_up),
        ("bytes_down", bytes_down),
    ):  # fmt: skip
        if not 0 <= value < math.inf:
            raise UsageError(f"{name} {value:g}, expected 0 or more")
    seconds = compute_seconds + round_trips * rtt_seconds
    for name, size, mbits in (("up_mbits", bytes_up, up_mbits), ("down_mbits", bytes_down, down_mbits)):
        if mbits is not None:
            _positive(name, mbits)
            seconds += 8 * size / (1e6 * mbits)
    return seconds


def check(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The formula against this machine: relative error, (predicted - measured) / measured, by plan and RTT.

    measured[plan]: round_trips, bytes_up, bytes_down per step; step_seconds by RTT in milliseconds (keys may be text), with 0, which
    is the compute; up_mbits and down_mbits where the link had a rate. Raises UsageError.
    """
    errors: dict[str, dict[str, float]] = {}
    for plan, figures in measured.items():
        missing = [key for key in ("round_trips", "bytes_up", "bytes_down", "step_seconds") if key not in figures]
        if missing:
            raise UsageError(f"measured figures of plan {plan!r} lack {', '.join(missing)}")
        seconds = {float(rtt): value for rtt, value in figures["step_seconds"].items()}
        if 0.0 not in seconds:
            raise UsageError(f"plan {plan!r} was measured at RTTs {sorted(seconds)} ms, expected 0 among them: it is the compute")
        rates = figures.get("up_mbits"), figures.get("down_mbits")
        size = figures["bytes_up"], figures["bytes_down"]
        compute = seconds[0.0] - predict_rtt(0.0, 0, 0.0, *size, *rates)
        errors[plan] = {}
        for rtt, value in sorted(seconds.items()):
            _positive(f"plan {plan!r}: seconds of a step at {rtt:g} ms", value)
            if rtt:
                errors[plan][f"{rtt:g}"] = predict_rtt(compute, figures["round_trips"], rtt / 1e3, *size, *rates) / value - 1
    return errors


def anchors() -> list[tuple[str, float, float]]:
    """Published decoding at batch 1 beside the formula's: (what, published, predicted tokens/s)."""
    seven, eight = SHAPES["Llama-2-7B"], SHAPES["Llama-3-8B"]
    one, three = _shape(2048, 16, 32, 8, 8192, 128256, 131072, 5e5, 1e-5), _shape(3072, 28, 24, 8, 8192, 128256, 131072, 5e5, 1e-5)
    a100, rtx, phone = A100, GPUS[3], PHONE
    return [
        (f"{what}, {chip.name}, {weights}; {source}", published, 1 / alone(shape, chip, weights, cached_tokens=cached))
        for what, chip, weights, shape, cached, published, source in (
            ("Llama-2-7B", a100, "fp16", seven, 100, 104.9, "gpt-fast, README; the GPU share is from here"),
            ("Llama-2-7B", a100, "int8", seven, 100, 155.6, "gpt-fast, README"),
            ("Llama-2-7B", a100, "int4", seven, 100, 196.8, "gpt-fast, README"),
            ("Llama-2-7B", rtx, "fp16", seven, 100, 65.0, "gpt-fast, issue 27"),
            ("Llama 3.2 1B", phone, "fp16", one, 64, 19.2, "ExecuTorch, OnePlus 12; the phone share is from here"),
            ("Llama 3.2 3B", phone, "fp16", three, 64, 7.6, "ExecuTorch, OnePlus 12"),
            ("Llama 3 8B", phone, "int4", eight, 64, 10.85, "ExecuTorch, OnePlus 12, groups of 128"),
        )
    ]
