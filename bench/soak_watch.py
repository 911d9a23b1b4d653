"""What a server process holds, seen from outside, over an hour: memory, descriptors, threads, and what its metrics say."""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

GAUGES = {"sessions": "plora_sessions", "connections": "plora_connections", "kv_bytes": "plora_kv_bytes_used"}
COUNTERS = ("plora_resumed_total", "plora_refused_total", "plora_evicted_total", "plora_sessions_opened_total", "plora_tokens_total")
METRICS_SECONDS = 10.0
POLL_SECONDS = 0.5
CALM_POLLS = 3
"""In a row that say the same, before a server counts as settled."""


@dataclass(frozen=True)
class Sample:
    """sessions, connections, kv_bytes: None where the server has no metrics, or did not answer; counters: by name, those that there are."""

    minutes: float
    rss_bytes: int
    descriptors: int
    threads: int
    sessions: int | None = None
    connections: int | None = None
    kv_bytes: int | None = None
    counters: dict[str, float] | None = None

    @property
    def held(self) -> tuple[int | None, ...]:
        return (self.descriptors, self.sessions, self.connections, self.kv_bytes)


def read_metrics(text: str) -> dict[str, float]:
    """Prometheus text -> value by name, labels summed up."""
    values: dict[str, float] = {}
    for sample in (sample for family in text_string_to_metric_families(text) for sample in family.samples):
        values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values


class Watched:
    """One server. ops: host:port of its metrics, None if it has none; began: time.monotonic of minute 0."""

    def __init__(self, pid: int, ops: str | None) -> None:
        self.process = psutil.Process(pid)
        self.ops = ops
        self.began = time.monotonic()

    def sample(self) -> Sample:
        with self.process.oneshot():
            seen = (self.process.memory_info().rss, self.process.num_fds(), self.process.num_threads())
        minutes = (time.monotonic() - self.began) / 60
        if self.ops is None:
            return Sample(minutes, *seen)
        try:
            with urllib.request.urlopen(f"http://{self.ops}/metrics", timeout=METRICS_SECONDS) as answer:
                values = read_metrics(answer.read().decode())
        except OSError:  # too busy to say: the next one will be heard
            return Sample(minutes, *seen)
        gauges = {name: int(values[metric]) for name, metric in GAUGES.items() if metric in values}
        return Sample(minutes, *seen, **gauges, counters={name: values[name] for name in COUNTERS if name in values})

    def settle(self, least_seconds: float, most_seconds: float, calm: Callable[[Sample], bool] = lambda sample: True) -> Sample:
        """The last sample once the server holds the same for a while and `calm` says that it is enough; at any rate after most_seconds."""
        began, same = time.monotonic(), [self.sample()]
        while (waited := time.monotonic() - began) < most_seconds:
            if waited >= least_seconds and len(same) >= CALM_POLLS and calm(same[-1]):
                break
            time.sleep(POLL_SECONDS)
            now = self.sample()
            same = [*same, now] if now.held == same[-1].held else [now]
        return same[-1]


def leaks(before: Sample, after: Sample) -> dict[str, int | None]:
    """What is still held by nobody's session. None: not known."""
    return {
        "leaked_sessions": after.sessions,
        "leaked_connections": after.connections,
        "leaked_kv_bytes": after.kv_bytes,
        "leaked_file_descriptors": max(after.descriptors - before.descriptors, 0),
    }


def slope(minutes: Sequence[float], values: Sequence[float]) -> float | None:
    """Per hour, the median of those between any two samples (Theil and Sen): a burst or a hole moves it little."""
    x, y = np.asarray(minutes, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    apart = x[second] - x[first]
    there = apart > 0
    return float(np.median((y[second] - y[first])[there] / apart[there])) * 60 if there.any() else None


def over_time(samples: list[dict[str, Any]], name: str, start: float, after: float) -> dict[str, float | None]:
    """Of a run's samples (as `asdict` makes them): medians of the second and the last sixth of the time, and the slope after the first."""
    if not samples:
        return {"start": start, "second_sixth_median": None, "last_sixth_median": None, "slope_per_hour": None, "after": after}
    sixth = samples[-1]["minutes"] / 6
    second = [one[name] for one in samples if sixth <= one["minutes"] < 2 * sixth]
    last = [one[name] for one in samples if one["minutes"] >= 5 * sixth]
    later = [one for one in samples if one["minutes"] >= sixth]
    return {
        "start": start,
        "second_sixth_median": statistics.median(second) if second else None,
        "last_sixth_median": statistics.median(last) if last else None,
        "slope_per_hour": slope([one["minutes"] for one in later], [one[name] for one in later]),
        "after": after,
    }


def thinned(samples: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """At most so many, evenly, the first and the last among them."""
    if len(samples) <= most:
        return samples
    return [samples[round(index * (len(samples) - 1) / (most - 1))] for index in range(most)]
