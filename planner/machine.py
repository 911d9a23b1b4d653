"""How fast the two sides are: stated, read from a doctor's report, or measured here with torch. A layer is a layer's worth of weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from ..artifact.errors import DamagedFile, UsageError
from ..artifact.shape import DecoderShape
from ..device_runtime.forecast import Curve, LinkFigures

GROWTH = ((1, 1.0), (9, 1.9), (64, 5.5), (128, 10.0), (256, 20.0))
"""Times one row's that a step of so many rows takes, where one figure is all that is stated: fp32 products on the CPUs seen."""
TIMED_ROWS = (1, 9, 64, 128)
REPEATS = {1: 15, 9: 9, 64: 5, 128: 3}
CACHED_TOKENS = 128
"""Behind the rows that are timed: of a short conversation."""
OVERHEAD_SECONDS = 1.5e-3
"""Of each round trip beyond RTT, rates and compute: frames through gRPC and Python at both ends, waking up. docs/planning.md has how well
that does."""
COPIES = 4
"""Of the weights, taken in turn: a real layer finds none of its own in the caches."""
LARGE_BYTES = 256e6
"""A layer of more than that finds nothing of its own there anyway: one copy."""


@dataclass(frozen=True)
class Side:
    """layer: seconds of one decoder layer by rows; head: seconds of norm and logits of one row, None for its share of the weights;
    origin: "stated", "measured here" or the file that says so; adapted: whether the layer has an adapter already."""

    layer: Curve
    head_seconds: float | None
    origin: str
    adapted: bool = False


@dataclass(frozen=True)
class Told:
    """What a doctor's report says. device: None if none of its edges runs a layer there; head_seconds: as a Side has them;
    overhead_seconds: of each round trip, beyond the report's RTT, rates and compute; its RTT has frames and Python in it."""

    device: Side | None
    head_seconds: float
    cloud: Side
    link: LinkFigures
    overhead_seconds: float


def layer_values(shape: DecoderShape) -> int:
    """Weights of one decoder layer's seven projections."""
    return shape.hidden * (2 * shape.query_width + 2 * shape.kv_width + 3 * shape.intermediate)


def stated(text: str, flag: str) -> Side:
    """`1.5`, milliseconds of one token, or `1:1.5,64:9`, by rows of a step. Raises UsageError."""
    try:
        if ":" not in text:
            return Side(Curve(tuple((rows, float(text) * factor / 1e3) for rows, factor in GROWTH)), None, "stated")
        pairs = [part.split(":") for part in text.split(",")]
        return Side(Curve(tuple((int(rows), float(millis) / 1e3) for rows, millis in pairs)), None, "stated")
    except (ValueError, UsageError):
        raise UsageError(f"{flag} {text}: expected milliseconds, or rows:milliseconds with commas between them, rows rising") from None


def from_doctor(report: Any, path: str) -> Told:
    """Of `plora-device doctor --json`: the device as the edge with most layers there saw it, the rest as the first edge, whose plan the
    cloud serves. Raises DamagedFile for what is no such report."""
    try:
        edge, cloud = report["edges"][0], _curve(report["cloud"]["layer"])
        layers, device_edge = max(((each["front_layers"] + each["back_layers"], each) for each in report["edges"]), key=itemgetter(0))
        parts = [_curve(device_edge["device"][part]) for part in ("front", "back") if device_edge[f"{part}_layers"]]
        rows = [row for row, _ in cloud.points]
        device = Curve(tuple((row, sum(part.seconds(row) for part in parts) / layers) for row in rows)) if layers else None
        head = _curve(device_edge["device"]["head"]).seconds(1)
        rtt, up, down = (report["link"][name] for name in ("rtt_seconds", "up_bits_per_second", "down_bits_per_second"))
        link = LinkFigures(rtt, rtt, rtt, 0.0, 1, up, down)
        overhead = Curve(((1, report["cloud"]["overhead_seconds"] / edge["round_trips"]),)).seconds(1)
        return Told(Side(device, head, path) if device else None, head, Side(cloud, None, path, adapted=True), link, overhead)
    except (ArithmeticError, KeyError, IndexError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise DamagedFile(f"{path}: no report of `plora-device doctor --json` ({type(error).__name__}: {error})") from None


def _curve(points: dict[str, float]) -> Curve:
    return Curve(tuple(sorted((int(rows), float(seconds)) for rows, seconds in points.items())))


def measure(shape: DecoderShape, threads: int, head: bool, say: Callable[[str], None]) -> Side:
    """One layer's products and attention, with random weights of the decoder's sizes, in fp32 by torch on `threads` threads."""
    import torch

    say(f"timing a decoder layer here, {threads} thread{'s' if threads > 1 else ''}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            layers = [_Layer(shape) for _ in range(copies(shape))]
            points = tuple((rows, _timed(layers, rows)) for rows in TIMED_ROWS)
            seconds = _head_seconds(shape) if head else None
    finally:
        torch.set_num_threads(before)
    return Side(Curve(points), seconds, "measured here")


def copies(shape: DecoderShape) -> int:
    """How many layers are timed in turn."""
    return COPIES if 4 * layer_values(shape) <= LARGE_BYTES else 1


class _Layer:
    """What a decoder layer multiplies."""

    def __init__(self, shape: DecoderShape) -> None:
        import torch

        self.shape = shape
        wide = shape.query_width + 2 * shape.kv_width
        sizes = [
            (wide, shape.hidden),
            (shape.hidden, shape.query_width),
            (2 * shape.intermediate, shape.hidden),
            (shape.hidden, shape.intermediate),
        ]
        self.weights = [torch.rand(size) / size[1] for size in sizes]
        self.keys = torch.rand(1, shape.kv_heads, CACHED_TOKENS, shape.head_dim)

    def run(self, hidden: Any) -> Any:
        """hidden, and what comes of it: `[T, hidden]`."""
        import torch

        shape, (qkv, out, gate_up, down) = self.shape, self.weights
        rows = len(hidden)
        u = torch.nn.functional.rms_norm(hidden, (shape.hidden,))
        query = torch.nn.functional.linear(u, qkv)[:, : shape.query_width].view(1, rows, shape.heads, shape.head_dim).transpose(1, 2)
        attended = torch.nn.functional.scaled_dot_product_attention(query, self.keys, self.keys, enable_gqa=True)
        hidden = hidden + torch.nn.functional.linear(attended.transpose(1, 2).reshape(rows, -1), out)
        gate, up = torch.nn.functional.linear(torch.nn.functional.rms_norm(hidden, (shape.hidden,)), gate_up).chunk(2, -1)
        return hidden + torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down)


def _timed(layers: list[_Layer], rows: int) -> float:
    import torch

    hidden = torch.rand(rows, layers[0].shape.hidden)
    return _median(lambda index: layers[index % len(layers)].run(hidden), REPEATS[rows])


def _head_seconds(shape: DecoderShape) -> float:
    import torch

    table, row = torch.rand(shape.vocabulary, shape.hidden), torch.rand(1, shape.hidden)
    return _median(lambda index: torch.nn.functional.linear(row, table), REPEATS[9])


def _median(work: Callable[[int], object], repeats: int) -> float:
    """Seconds, without the first two times."""
    found = []
    for index in range(repeats + 2):
        began = time.perf_counter()
        work(index)
        found.append(time.perf_counter() - began)
    return statistics.median(found[2:])
