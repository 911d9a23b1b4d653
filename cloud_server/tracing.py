"""Optional OpenTelemetry: one span for each step. Needs the package opentelemetry-api and a provider that somebody has set up, as
`opentelemetry-instrument plora-cloud serve …` does from OTEL_EXPORTER_OTLP_ENDPOINT and the like; without either, nothing happens."""

from __future__ import annotations

import time
from collections.abc import Callable

StepDone = Callable[[float, int, float, str], None]
"""Told of each: seconds that it took until now, its tokens, seconds of the engine, session's name in logs."""


def step_spans() -> StepDone:
    """Makes the spans, or does nothing."""
    try:
        from opentelemetry import trace
    except ImportError:
        return lambda seconds, tokens, engine_seconds, session: None
    tracer = trace.get_tracer("plora.cloud")

    def done(seconds: float, tokens: int, engine_seconds: float, session: str) -> None:
        end = time.time_ns()
        attributes = {"plora.tokens": tokens, "plora.engine_seconds": engine_seconds, "plora.session": session}
        tracer.start_span("plora.step", start_time=end - int(seconds * 1e9), attributes=attributes).end(end)

    return done
