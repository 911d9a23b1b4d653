"""What the server counts, as Prometheus reads it. No user, session or text is in a label."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Look = Callable[[], dict[str, tuple[str, float]]]
"""Name -> (what it is, its value now); what only grows is named `…_total`."""


class Metrics:
    """One server's. Names follow prometheus.io/docs/practices/naming: base units, `_total` for what only grows."""

    def __init__(self) -> None:
        disable_created_metrics()  # the process's start says as much
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.sessions_opened = Counter("plora_sessions_opened", "Sessions begun.", registry=registry)
        self.sessions_ended = Counter("plora_sessions_ended", "Sessions over, by what ended them.", ["why"], registry=registry)
        self.resumed = Counter("plora_resumed", "Sessions taken up again over another connection.", registry=registry)
        self.refused = Counter("plora_refused", "Connections refused at the door, by wire fault code.", ["code"], registry=registry)
        self.denied = Counter("plora_denied", "Calls turned away for want of a valid access token.", registry=registry)
        self.tokens = Counter("plora_tokens", "Tokens computed, by the kind of step.", ["kind"], registry=registry)
        self.batch_rows = Histogram("plora_batch_rows", "Rows (sessions) of one batch.", buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram("plora_batch_seconds", "Of the engine, for one batch.", buckets=SECONDS, registry=registry)
        self.step_seconds = Histogram(
            "plora_step_seconds",
            "From an entry's arrival to the exit's sending, the device's own time in exchanges included.",
            buckets=SECONDS,
            registry=registry,
        )
        self.exchange_seconds = Histogram(
            "plora_exchange_seconds",
            "From a frame's arrival to the answer to it: one leg, its queue included.",
            buckets=SECONDS,
            registry=registry,
        )

    def batch(self, rows: int, seconds: float) -> None:
        self.batch_rows.observe(rows)
        self.batch_seconds.observe(seconds)

    def watch(self, look: Look) -> None:
        """Calls `look` whenever it is read, on the reader's thread."""
        self.registry.register(_Looked(look))


class _Looked(Collector):
    def __init__(self, look: Look) -> None:
        self.look = look

    def collect(self) -> Iterable[Metric]:
        for name, (what, value) in self.look().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, what, value)
