"""What a link, a device and a cloud make of a plan: seconds of a step and of a prompt, and bytes. No clock, no I/O.

    step = round trips · RTT + bytes up / rate + bytes down / rate + cloud + device + overhead

In one step nothing overlaps but what the cloud computes ahead while an exchange is away. The chunks of a prompt do overlap: they queue at
the device, at either direction of the link and at the cloud, and `flow` walks them through.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from math import isfinite, sqrt

from ..artifact.errors import UsageError
from ..artifact.plan import Exchange, ExchangePlan, Segment
from ..artifact.shape import DecoderShape
from ..artifact.walk import Entry, Exit, walk
from ..protocol import Precision
from ..protocol.tensors import VALUE_BYTES
from .chunks import Chunk, chunks
from .speculation import MATCHES, DraftLength, StepCosts, expected_tokens

FRAME_BYTES = 65
"""Of a frame beyond its tensors, counted on the socket: its own fields, the headers of gRPC and HTTP/2, and acknowledgements."""
PLACES: tuple[str, ...] = ("device", "up", "cloud", "down")
"""Where the steps of a prompt queue."""
PARTS_ERROR = 0.05
PROMPTS = (128, 512)
YIELDS = (2, 3)
DRAFTED = 4
"""Tokens drafted in a step that is said to yield so many."""


@dataclass(frozen=True)
class Curve:
    """Seconds by rows (tokens of a step): straight between the points, and beyond the last two of them."""

    points: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rows = [row for row, _ in self.points]
        if not rows or rows != sorted(set(rows)) or rows[0] < 1 or not all(isfinite(each) and each >= 0 for _, each in self.points):
            raise UsageError(f"seconds by rows {self.points}, expected rising rows from 1 on, and seconds that are finite and not negative")

    def seconds(self, rows: int) -> float:
        points = self.points
        if rows <= points[0][0] or len(points) == 1:
            return points[0][1]
        (low, least), (high, most) = next((pair for pair in pairwise(points) if rows <= pair[1][0]), points[-2:])
        slope = (most - least) / (high - low)
        return least + slope * (rows - low) if rows <= high else most + max(0.0, slope) * (rows - high)

    def times(self, factor: float) -> Curve:
        return Curve(tuple((row, factor * seconds) for row, seconds in self.points))


NOTHING = Curve(((1, 0.0),))


@dataclass(frozen=True)
class LinkFigures:
    """median_seconds, p95_seconds: median and 95th percentile of `pings` round trips; rtt_seconds: what predicts, their mean, once
    `reconcile` has seen a step; jitter_seconds: median absolute difference from one to the next; up_, down_bits_per_second: of large
    frames; …_at_least: the link may be faster, handling a frame takes as long."""

    rtt_seconds: float
    median_seconds: float
    p95_seconds: float
    jitter_seconds: float
    pings: int
    up_bits_per_second: float
    down_bits_per_second: float
    up_at_least: bool = False
    down_at_least: bool = False

    def __post_init__(self) -> None:
        for name in ("rtt_seconds", "up_bits_per_second", "down_bits_per_second"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"{name} {getattr(self, name)}, expected finite and above 0")


@dataclass(frozen=True)
class DeviceFigures:
    """The device's own work by rows. front, back: all of its layers there; cores: one exchange; head: norm and logits.

    Few rows are timed after pauses of `pause_seconds`, as a step leaves them; the many of a prompt without. pause_cost_seconds: by which
    a step of one row takes longer with the pauses than without.
    """

    threads: int = 1
    embedding: Curve = NOTHING
    front: Curve = NOTHING
    entry_injection: Curve = NOTHING
    cores: Curve = NOTHING
    back: Curve = NOTHING
    head: Curve = NOTHING
    pause_seconds: float = 0.0
    pause_cost_seconds: float = 0.0

    def before(self, rows: int) -> float:
        """From token ids to the entry."""
        return self.embedding.seconds(rows) + self.front.seconds(rows) + self.entry_injection.seconds(rows)


@dataclass(frozen=True)
class CloudFigures:
    """layer: one decoder layer with its adapter; overhead_seconds: of a step, beyond its parts; chunk_tokens: of a prompt, most
    in one step; window: steps in flight; context_tokens: as the session's terms have it."""

    layer: Curve
    overhead_seconds: float
    chunk_tokens: int
    window: int
    context_tokens: int


@dataclass(frozen=True)
class Setup:
    """All that a prediction rests on."""

    plan: ExchangePlan
    shape: DecoderShape
    precision: Precision
    link: LinkFigures
    device: DeviceFigures
    cloud: CloudFigures


# The round trips of a step


@dataclass(frozen=True)
class Leg:
    """One round trip: the device's work, a frame up, the cloud's work, a frame down. ahead_seconds: what the cloud computes once that
    frame has left, of what it would have to after the next one."""

    device_seconds: float
    up_bytes: int
    cloud_seconds: float
    ahead_seconds: float
    down_bytes: int


def legs(setup: Setup, rows: int, exit_rows: int) -> list[Leg]:
    """The round trips of a step of `rows` tokens, in order."""
    plan, shape, wire = setup.plan, setup.shape, setup.precision
    layer = setup.cloud.layer.seconds(rows)
    found: list[Leg] = []
    device, up, cloud = 0.0, 0, 0.0
    for stage in walk(plan):
        if isinstance(stage, Entry):
            held = stage.exchange
            device, up = setup.device.before(rows), _frame(shape.hidden, rows, wire.entry)
            up += _tensor(held.injection_columns, rows, wire.injections) if held else 0
        elif isinstance(stage, Segment):
            cloud += (stage.stop - stage.first) * layer
        elif isinstance(stage, Exchange):
            ahead = ahead_share(plan, shape, stage) * layer
            found.append(Leg(device, up, cloud, ahead, _frame(stage.compressed_columns, rows, wire.compressed)))
            device, up, cloud = setup.device.cores.seconds(rows), _frame(stage.injection_columns, rows, wire.injections), -ahead
        elif isinstance(stage, Exit):
            found.append(Leg(device, up, cloud, 0.0, _frame(shape.hidden, exit_rows, wire.exit)))
    return found


def _tensor(columns: int, rows: int, dtype: str) -> int:
    """int8: with a float32 scale for each token."""
    return rows * (columns * VALUE_BYTES[dtype] + (4 if dtype == "int8" else 0))


def _frame(columns: int, rows: int, dtype: str) -> int:
    return FRAME_BYTES + _tensor(columns, rows, dtype)


def ahead_share(plan: ExchangePlan, shape: DecoderShape, exchange: Exchange) -> float:
    """Of the weights of the layer that an exchange starts, with its adapter, those of q, k, v, which need no injection."""
    qkv = shape.hidden * (shape.query_width + 2 * shape.kv_width)
    layer = qkv + shape.hidden * (shape.query_width + 3 * shape.intermediate)
    own = [column for each in plan.all_exchanges for column in each.columns if column.layer == exchange.source]
    return qkv / (layer + sum(column.out_rank * shape.out_features(column.target) for column in own))


@dataclass(frozen=True)
class Flow:
    """From the first chunk's first token id to the last one's exit. …_seconds: that each was at work."""

    seconds: float
    device_seconds: float
    up_seconds: float
    cloud_seconds: float
    down_seconds: float


def flow(setup: Setup, steps: Sequence[Chunk]) -> Flow:
    """Steps of one session behind one another, `window` of them in flight. Whoever comes first to the device, a direction of the link or
    the cloud is served first there, one at a time."""
    link, window = setup.link, setup.cloud.window
    half = link.rtt_seconds / 2
    order = count()
    waiting: list[tuple[float, int, int, int]] = []  # when it is ready, in which order, which chunk, which of its works
    free, busy = dict.fromkeys(PLACES, 0.0), dict.fromkeys(PLACES, 0.0)
    works = [_works(setup, chunk, half) for chunk in steps]
    for index in range(min(window, len(steps))):
        heapq.heappush(waiting, (0.0, next(order), index, 0))
    end = 0.0
    while waiting:
        ready, _, index, number = heapq.heappop(waiting)
        place, seconds, still, delay = works[index][number]
        done = max(ready, free[place]) + seconds
        free[place] = done + still
        busy[place] += seconds + still
        end = max(end, done + delay)
        if number + 1 < len(works[index]):
            heapq.heappush(waiting, (done + delay, next(order), index, number + 1))
        elif index + window < len(steps):
            heapq.heappush(waiting, (done, next(order), index + window, 0))
    return Flow(end, *(busy[place] for place in PLACES))


def _works(setup: Setup, chunk: Chunk, half: float) -> list[tuple[str, float, float, float]]:
    """(where, seconds, seconds that it is busy with this after that, seconds on the way to the next)."""
    found: list[tuple[str, float, float, float]] = []
    rows, link = len(chunk.ids), setup.link
    for leg in legs(setup, rows, chunk.exit_rows):
        found.append(("device", leg.device_seconds, 0.0, 0.0))
        found.append(("up", 8 * leg.up_bytes / link.up_bits_per_second, 0.0, half))
        found.append(("cloud", leg.cloud_seconds, leg.ahead_seconds, 0.0))
        found.append(("down", 8 * leg.down_bytes / link.down_bits_per_second, 0.0, half))
    found.append(("device", setup.device.back.seconds(rows), 0.0, 0.0))
    return found


# What is asked


@dataclass(frozen=True)
class Step:
    """Where the seconds of one step go, and its bytes with framing."""

    round_trips_seconds: float
    up_seconds: float
    down_seconds: float
    cloud_seconds: float
    device_seconds: float
    overhead_seconds: float
    up_bytes: int
    down_bytes: int

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part."""
        return {name.removesuffix("_seconds"): value for name, value in vars(self).items() if name.endswith("_seconds")}

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def step(setup: Setup, rows: int = 1) -> Step:
    """Of decoding, with `rows` - 1 drafted tokens."""
    walked = flow(setup, [Chunk(0, [0] * rows, rows, rows)])
    trips = legs(setup, rows, rows)
    away = len(trips) * setup.link.rtt_seconds
    cloud = walked.seconds - away - walked.up_seconds - walked.down_seconds - walked.device_seconds  # what is ahead hides in the rest
    device = walked.device_seconds + setup.device.head.seconds(rows)
    up, down = sum(leg.up_bytes for leg in trips), sum(leg.down_bytes for leg in trips)
    return Step(away, walked.up_seconds, walked.down_seconds, cloud, device, setup.cloud.overhead_seconds, up, down)


def reconcile(setup: Setup, seconds: float) -> tuple[LinkFigures, CloudFigures]:
    """What the parts and `seconds`, a step of one row as a whole, say together.

    They differ by what a step takes beyond its parts, and by errors: of the mean RTT, its deviation over the root of the pings, in each
    round trip; of what was timed on either side, PARTS_ERROR of it. The difference goes to the RTT and to the overhead as such errors
    add up, in squares.
    """
    plain, link = step(setup), setup.link
    difference = seconds - plain.seconds
    of_link = setup.plan.round_trips * link.jitter_seconds / sqrt(link.pings)
    of_parts = PARTS_ERROR * (plain.cloud_seconds + plain.device_seconds)
    share = of_link**2 / (of_link**2 + of_parts**2) if of_link else 0.0
    rtt = link.rtt_seconds + share * difference / setup.plan.round_trips
    return (
        replace(link, rtt_seconds=max(rtt, link.rtt_seconds / 2)),
        replace(setup.cloud, overhead_seconds=max(0.0, (1 - share) * difference)),
    )


def first_token(setup: Setup, prompt_tokens: int) -> Flow:
    """Of a prompt of which the cloud has nothing yet: until its first token is known."""
    plan, cloud = setup.plan, setup.cloud
    steps = list(chunks(0, [0] * prompt_tokens, prompt_tokens - 1, cloud.chunk_tokens, bool(plan.back_layers)))
    walked = flow(setup, steps)
    after = setup.device.head.seconds(1) + len(steps) * cloud.overhead_seconds
    return replace(walked, seconds=walked.seconds + after, device_seconds=walked.device_seconds + setup.device.head.seconds(1))


@dataclass(frozen=True)
class Speculation:
    """With drafts that rest on `matched` equal tokens before them and are accepted as usual (speculation.USUAL): how many tokens are
    drafted, how many a step yields, the tail of the answer not counted, and tokens per second."""

    matched: int
    drafted: int
    tokens_per_step: float
    tokens_per_second: float


def speculate(setup: Setup, matched: int) -> Speculation:
    one, more = step(setup).seconds, step(setup, 1 + DRAFTED).seconds
    length = DraftLength(costs=StepCosts(one, max(0.0, more - one) / DRAFTED))
    drafted = length.choose(matched)
    gained = float(expected_tokens(length.chances(matched)[:drafted])[-1])
    return Speculation(matched, drafted, gained, gained / step(setup, 1 + drafted).seconds)


@dataclass(frozen=True)
class Forecast:
    """step: plain decoding; tokens_per_second_yielding: by tokens that a step of 1 + DRAFTED rows yields; first_token_seconds: by tokens
    of the prompt, of those that fit the context; megabytes (10^6) of plain decoding."""

    step: Step
    tokens_per_second: float
    tokens_per_second_yielding: dict[int, float]
    speculation: tuple[Speculation, ...]
    first_token_seconds: dict[int, float]
    up_megabytes_per_1000_tokens: float
    down_megabytes_per_1000_tokens: float


def predict(setup: Setup) -> Forecast:
    plain, checked = step(setup), step(setup, 1 + DRAFTED).seconds
    return Forecast(
        plain,
        1 / plain.seconds,
        {gained: gained / checked for gained in YIELDS},
        tuple(speculate(setup, matched) for matched in MATCHES),
        {tokens: first_token(setup, tokens).seconds for tokens in prompts(setup)},
        plain.up_bytes / 1e3,
        plain.down_bytes / 1e3,
    )


def prompts(setup: Setup) -> tuple[int, ...]:
    """PROMPTS that leave room for an answer; at least half of a small context."""
    context = min(setup.cloud.context_tokens, setup.shape.context_tokens)
    return tuple(tokens for tokens in PROMPTS if tokens < context) or (max(1, context // 2),)
