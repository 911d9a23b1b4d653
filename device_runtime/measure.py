"""Times a link, a cloud and a device, for forecast.py to predict from. All that the doctor does with a clock.

Nothing of a person's is sent: pings are zeros, steps are tokens from all over the vocabulary.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from ..artifact.errors import RefusedContract, RefusedVersion, Unreachable
from ..protocol import DeviceSession, Precision
from ..protocol.events import PongArrived
from ..protocol.limits import MAX_PROBE_BYTES
from .access import Access
from .chunks import CHUNK_TOKENS
from .edge import Edge
from .forecast import Curve, DeviceFigures, LinkFigures, Setup, step
from .link import Link
from .runner import Runner
from .speculation import SLOWEST
from .stepper import Stepper
from .transport import Deadlines, Transport

T = TypeVar("T")
Say = Callable[[str], None]

PINGS, REST_SECONDS = 40, 0.025
"""Rests between pings: as in decoding, whoever waits has gone to sleep."""
PROBES = (16 << 10, 64 << 10, 256 << 10, MAX_PROBE_BYTES)
PROBE_REPEATS = 3
ENOUGH_SECONDS = 0.15
"""A probe that takes so much longer than a ping tells the rate: jitter is some milliseconds."""
BUDGET_SECONDS = 2.0
"""For each direction."""
FASTEST_BITS_PER_SECOND = 400e6
"""Beyond, frames of 1 MiB take both ends' Python as long as the link: 0.6 to 1.2 Gbit/s over loopback here."""
FEW, MANY, FULL = 9, 64, CHUNK_TOKENS
"""Rows of a step with drafts, of a prompt's small chunk, and of a full one where that is no burden."""
LARGEST_STEP_BYTES, LARGEST_STEP_SECONDS = 4e6, 2.0
"""On the link, either way: beyond, the prompt waits for the link and not for the cloud."""
STEPS = {1: 24, FEW: 8, MANY: 4, FULL: 4}
"""How often steps of so many rows are timed; less often, but LEAST_STEPS times, where that takes longer than STEPS_SECONDS."""
LEAST_STEPS, STEPS_SECONDS = 3, 10.0
CYCLES = {1: 16, FEW: 6, MANY: 4, FULL: 3}
"""How often the device's part of them is."""
WARM_UP = 2
"""Times before that count; one where they are slow."""
TIMED_EXCHANGES = 3
"""In each such part, at most."""


def typical(values: Sequence[float]) -> float:
    """The mean, since that is what many tokens take; what is beyond SLOWEST times the median counts as so much."""
    most = SLOWEST * statistics.median(values)
    return statistics.fmean(min(value, most) for value in values)


class Visit:
    """A session with the cloud, to be measured; a context manager. Raises as PrivateSession does."""

    def __init__(self, edge: Edge, address: str, precision: Precision, access: Access = Access()) -> None:  # noqa: B008  frozen
        def machine() -> DeviceSession:
            return DeviceSession(edge.plan, edge.shape, edge.contract.hash, precision)

        self.edge = edge
        self.link = Link(address, Deadlines(), machine, lambda state: None, partial(Transport, access=access))
        self.stepper = Stepper(edge, self.link)
        self._runner = Runner(self.link.interrupt)
        self._pings = 1 << 31  # away from those of the link's own heartbeat

    def __enter__(self) -> Visit:
        try:
            self._run(self.stepper.open())
        except RefusedContract as error:
            self.__exit__(None, None, None)
            raise RefusedContract(
                f"{error}; the first --edge ({self.edge.folder}) must be the half of what {self.link.address} serves"
            ) from None
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run(self.stepper.close())
        self._runner.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def ping(self, padding_bytes: int = 0, reply_bytes: int = 0) -> float:
        """Seconds until the pong."""
        return self._run(self._ping(padding_bytes, reply_bytes))

    async def _ping(self, padding_bytes: int, reply_bytes: int) -> float:
        """Not through Link.receive, whose heartbeat would take a long pong for a dead link."""
        link, self._pings = self.link, self._pings + 1
        assert link.transport is not None  # opened
        try:
            async with asyncio.timeout(link.deadlines.step_seconds):
                began = time.perf_counter()
                await link.send(link.machine.ping(self._pings, padding_bytes, reply_bytes))
                while True:
                    data = await link.transport.receive()
                    link.bytes_down += len(data)
                    event = link.machine.receive(data)
                    if isinstance(event, PongArrived) and event.id == self._pings:
                        return time.perf_counter() - began
        except TimeoutError:
            raise Unreachable(f"{link.address}: no pong within {link.deadlines.step_seconds:g} s; given up") from None

    def step(self, ids: list[int], exit_rows: int, position: int) -> tuple[float, float]:
        """(seconds from the ids to the logits, seconds of these that the cloud computed)."""
        began = time.perf_counter()
        self.edge.logits(self._run(self.stepper.feed(ids, exit_rows, position)))
        return time.perf_counter() - began, self.stepper.cloud_micros / 1e6


# The link


def measure_link(visit: Visit, say: Say) -> LinkFigures:
    say(f"pinging {visit.link.address}")
    times = []
    for _ in range(PINGS):
        time.sleep(REST_SECONDS)
        times.append(visit.ping())
    rtt = typical(times)
    jitter = statistics.median(abs(after - before) for before, after in zip(times, times[1:], strict=False))
    noise = max(jitter, 1e-3)
    say(f"RTT {1e3 * statistics.median(times):.3g} ms; measuring the uplink")
    up = measure_rate(lambda size: visit.ping(padding_bytes=size) - rtt, noise)
    say("measuring the downlink")
    down = measure_rate(lambda size: visit.ping(reply_bytes=size) - rtt, noise)
    p95 = sorted(times)[math.ceil(0.95 * PINGS) - 1]
    return LinkFigures(rtt, statistics.median(times), p95, jitter, PINGS, up[0], down[0], up[1], down[1])


def measure_rate(probe: Callable[[int], float], noise_seconds: float) -> tuple[float, bool]:
    """(bits per second, whether the link may be faster). probe: bytes -> seconds beyond a round trip."""
    began = time.perf_counter()
    size, times = 0, [0.0]
    for size in PROBES:
        times = [probe(size)]
        if times[0] >= ENOUGH_SECONDS or time.perf_counter() - began > BUDGET_SECONDS / 2:
            break
    while len(times) < PROBE_REPEATS and time.perf_counter() - began + times[0] < BUDGET_SECONDS:
        times.append(probe(size))
    seconds = statistics.median(times)
    rate = 8 * size / max(seconds, noise_seconds)
    return rate, rate > FASTEST_BITS_PER_SECOND or seconds < 4 * noise_seconds


# Steps


@dataclass(frozen=True)
class Steps:
    """Of the first edge, by rows. seconds: from the token ids to the logits, cloud_seconds: of these, as the cloud says."""

    seconds: dict[int, float]
    cloud_seconds: dict[int, float]


def token_ids(count: int, vocabulary: int) -> list[int]:
    """From all over the vocabulary: which they are does not change what they cost."""
    return [(7919 * index + 1) % vocabulary for index in range(count)]


def measure_steps(visit: Visit, blank: Setup, say: Say) -> Steps:
    """Steps of several sizes, largest first: those of a prompt behind one another, those of an answer behind MANY tokens. blank: what
    there is without device and cloud. Raises RefusedVersion."""
    context = visit.stepper.context_tokens
    most = max(1, min(blank.cloud.chunk_tokens, context // 2))
    seconds, cloud_seconds = {}, {}
    for rows, count in sorted({min(rows, most): count for rows, count in STEPS.items()}.items(), reverse=True):
        crossing = step(blank, rows)
        if rows > MANY and (max(crossing.up_bytes, crossing.down_bytes) > LARGEST_STEP_BYTES or crossing.seconds > LARGEST_STEP_SECONDS):
            continue
        say(f"steps of {rows} token{'s' if rows > 1 else ''}")
        ids, warm_up = token_ids(rows, blank.shape.vocabulary), WARM_UP if rows < MANY else 1
        timed, until = [], time.perf_counter() + STEPS_SECONDS
        for index in range(count + warm_up):
            if time.perf_counter() > until and index >= LEAST_STEPS + warm_up:
                break
            position = min(MANY, most) if rows < MANY else rows * max(0, index - warm_up)
            timed.append(visit.step(ids, min(rows, FEW), position if position + rows <= context else 0))
        seconds[rows], cloud_seconds[rows] = (typical(each) for each in zip(*timed[warm_up:], strict=True))
    if not all(cloud_seconds.values()):
        raise RefusedVersion(f"{visit.link.address}: does not say how long it computes, as clouds before protocol minor 2; update it")
    return Steps(seconds, cloud_seconds)


# The device


def measure_device(edge: Edge, threads: int, pause_seconds: float, sizes: list[int]) -> DeviceFigures:
    """Its parts of steps of so many rows. threads: that `edge` was opened with."""
    rhythm = _Rhythm(edge, max(sizes))
    points: dict[str, list[tuple[int, float]]] = {}
    for rows in sizes:
        for part, seconds in rhythm.timed(rows, pause_seconds if rows < MANY else 0.0).items():
            if part != "head" or rows <= FEW:  # nobody wants the logits of a whole prompt
                points.setdefault(part, []).append((rows, seconds))
    parts = {part: Curve(tuple(own)) for part, own in points.items()}
    unpaused = rhythm.timed(1, 0.0)
    exchanges = len(edge.plan.exchanges)
    cost = sum((parts[part].seconds(1) - unpaused[part]) * (exchanges if part == "cores" else 1) for part in unpaused)
    return DeviceFigures(threads, **parts, pause_seconds=pause_seconds, pause_cost_seconds=cost)


class _Rhythm:
    """The device's part of steps as decoding has it: after one wait the end of a step and the beginning of the next, after each other
    wait an exchange."""

    def __init__(self, edge: Edge, most_rows: int) -> None:
        plan = edge.plan
        self.edge, self.most_rows = edge, most_rows
        context = min(edge.shape.context_tokens, 2 * most_rows)
        self.front = edge.device_layers(0, plan.front_layers, context)
        self.back = edge.device_layers(plan.layers - plan.back_layers, plan.layers, context)
        self.exchanges = plan.exchanges[:: math.ceil(len(plan.exchanges) / TIMED_EXCHANGES) or 1]
        self.ids = token_ids(most_rows, edge.shape.vocabulary)
        for layers in (self.front, self.back):
            layers.run(edge.embed(self.ids), 0)

    def timed(self, rows: int, pause_seconds: float) -> dict[str, float]:
        """Seconds by part, of those that the plan has; without the first time."""
        repeats = next(count for most, count in CYCLES.items() if rows <= most)
        cycles = [self._cycle(rows, pause_seconds) for _ in range(repeats + 1)][1:]
        return {part: typical([cycle[part] for cycle in cycles]) for part in cycles[0]}

    def _cycle(self, rows: int, pause_seconds: float) -> dict[str, float]:
        edge, plan, ids = self.edge, self.edge.plan, self.ids[:rows]
        position = self.most_rows if rows < self.most_rows else 0
        seconds: dict[str, float] = {}

        def timed(part: str, work: Callable[[], T]) -> T:
            began = time.perf_counter()
            result = work()
            seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - began
            return result

        left = edge.embed(ids)
        time.sleep(pause_seconds)
        if plan.back_layers:
            left = timed("back", lambda: self.back.run(left, position))
        timed("head", lambda: edge.logits(left[:FEW]))
        hidden = timed("embedding", lambda: edge.embed(ids))
        if plan.front_layers:
            hidden = timed("front", lambda: self.front.run(hidden, position))
        if held := plan.entry_exchange:
            timed("entry_injection", lambda: edge.entry_injection(held, hidden))
        for exchange in self.exchanges:
            compressed = np.full((rows, exchange.compressed_columns), 0.1, np.float32)
            time.sleep(pause_seconds)
            timed("cores", lambda: edge.inject(exchange, compressed))  # noqa: B023  called at once
        if self.exchanges:
            seconds["cores"] /= len(self.exchanges)
        return seconds
