"""`plora-device doctor`: what measure.py finds, what forecast.py makes of it for each edge's plan, and what knobs.py would change."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from ..artifact.errors import WrongPair
from ..artifact.manifest import EdgeManifest, read_manifest
from ..protocol import Precision
from .access import Access
from .chunks import CHUNK_TOKENS
from .edge import Edge
from .forecast import NOTHING, CloudFigures, Curve, DeviceFigures, Forecast, LinkFigures, Setup, predict, reconcile, step
from .knobs import Knob, bound, knobs
from .measure import FEW, Say, Steps, Visit, measure_device, measure_link, measure_steps

LONGEST_PAUSE_SECONDS = 0.25
"""Slept in place of a wait for the cloud: after that nothing gets any colder."""


@dataclass(frozen=True)
class EdgeReport:
    """Of one edge's plan. more_threads: the device's figures with twice as many, where there are cores for them."""

    edge: str
    round_trips: int
    cloud_layers: int
    front_layers: int
    back_layers: int
    device: DeviceFigures
    more_threads: DeviceFigures | None
    forecast: Forecast
    bound: str
    knobs: tuple[Knob, ...]


@dataclass(frozen=True)
class Report:
    """steps: measured with the first edge, whose other half the cloud serves; bytes_up, bytes_down: of frames, that all this took."""

    address: str
    wire_dtype: str
    threads: int
    link: LinkFigures
    cloud: CloudFigures
    steps: Steps
    edges: tuple[EdgeReport, ...]
    bytes_up: int
    bytes_down: int
    reconnections: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a curve becomes seconds by rows."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Curve):
        return {str(rows): seconds for rows, seconds in value.points}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def examine(
    edges: list[Path],
    address: str,
    precision: Precision = Precision(),  # noqa: B008  frozen
    threads: int = 1,
    say: Say = lambda line: None,
    access: Access = Access(),  # noqa: B008  frozen
) -> Report:
    """The cloud at `address` (host:port) must serve the other half of the first edge; the others are predicted from the same base.

    say: told what is being done; access: of the cloud. Raises ArtifactError's children, WrongPair naming an edge of another base,
    Refused's, Unreachable.
    """
    check_bases(edges)
    say(f"opening {edges[0]}")
    first = Edge(edges[0], threads=threads)
    with Visit(first, address, precision, access) as visit:
        link, terms = measure_link(visit, say), visit.stepper.terms
        cloud = CloudFigures(NOTHING, 0.0, min(CHUNK_TOKENS, terms.step_tokens), terms.window, terms.context_tokens)
        steps = measure_steps(visit, Setup(first.plan, first.shape, precision, link, DeviceFigures(), cloud), say)
    layer = Curve(tuple((rows, seconds / first.plan.cloud_layers) for rows, seconds in sorted(steps.cloud_seconds.items())))
    cloud = replace(cloud, layer=layer)
    more = min(2 * threads, os.cpu_count() or 1)
    setups: dict[str, Setup] = {}
    wider: dict[str, DeviceFigures] = {}
    for folder in edges:
        say(f"timing the device's part of {folder}")
        edge = first if folder == edges[0] else Edge(folder, threads=threads)
        setup = Setup(edge.plan, edge.shape, precision, link, DeviceFigures(), cloud)
        pause = min(LONGEST_PAUSE_SECONDS, step(setup).seconds / edge.plan.round_trips)
        setups[str(folder)] = replace(setup, device=measure_device(edge, threads, pause, sorted(steps.seconds)))
        if more > threads:
            wider[str(folder)] = measure_device(Edge(folder, threads=more), more, pause, sorted(steps.seconds))
    link, cloud = reconcile(setups[str(edges[0])], steps.seconds[1])
    setups = {name: replace(setup, link=link, cloud=cloud) for name, setup in setups.items()}
    reports = tuple(_report(name, setups, wider.get(name)) for name in setups)
    moved = visit.link.bytes_up, visit.link.bytes_down, visit.link.reconnections
    return Report(address, str(precision), threads, link, cloud, steps, reports, *moved)


def _report(name: str, setups: dict[str, Setup], more_threads: DeviceFigures | None) -> EdgeReport:
    setup = setups[name]
    plan = setup.plan
    advice = knobs(setup, more_threads, {other: each for other, each in setups.items() if other != name})
    layers = plan.cloud_layers, plan.front_layers, plan.back_layers
    return EdgeReport(name, plan.round_trips, *layers, setup.device, more_threads, predict(setup), bound(setup), tuple(advice))


def check_bases(edges: list[Path]) -> None:
    """Raises WrongPair for an edge whose base is not that of the first."""
    own = read_manifest(EdgeManifest, edges[0]).contract
    for folder in edges[1:]:
        other = read_manifest(EdgeManifest, folder).contract
        if (other.base, other.shape) != (own.base, own.shape):
            raise WrongPair(
                f"{folder}: exported from base {other.base[:16]}…, but {edges[0]} from {own.base[:16]}…; give edges of one base"
            )


# For a person


def tables(report: Report) -> str:
    """The report in a screenful."""
    link, cloud = report.link, report.cloud
    times = ", ".join(f"{_millis(seconds)} for {rows}" for rows, seconds in cloud.layer.points)
    lines = [
        f"link: RTT {_millis(link.median_seconds)} ms (p95 {_millis(link.p95_seconds)}, jitter {_millis(link.jitter_seconds)}), "
        f"up {_rate(link.up_bits_per_second, link.up_at_least)}, down {_rate(link.down_bits_per_second, link.down_at_least)}",
        f"cloud: ms a layer by tokens of a step {times}; {_millis(cloud.overhead_seconds)} ms a step beside all parts",
        "",
        *_device_table(report),
        "",
        *_forecast_table(report),
    ]
    for edge in report.edges:
        lines += ["", edge.edge, edge.bound, *(f"{index}. {knob.sentence}" for index, knob in enumerate(edge.knobs, 1))]
    if report.reconnections:
        lines += ["", f"The connection broke {report.reconnections} times meanwhile, and was taken up again: figures may be high."]
    return "\n".join(lines)


def _device_table(report: Report) -> list[str]:
    """Milliseconds of a step of one row by part; then of a few rows, and by how much pauses made that of one row longer."""
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    head = [f"device, ms, {threads}", "embedding", "front", "injection", "cores", "back", "head", f"{FEW} rows", "pauses"]
    return _aligned(head, [_device_row(edge) for edge in report.edges])


def _device_row(edge: EdgeReport) -> list[str]:
    device, exchanges = edge.device, edge.round_trips - 1
    curves = (device.embedding, device.front, device.entry_injection, device.cores.times(exchanges), device.back, device.head)
    return [
        edge.edge,
        *(_millis(curve.seconds(1)) if curve.seconds(1) else "-" for curve in curves),
        _millis(sum(curve.seconds(FEW) for curve in curves)),
        _millis(device.pause_cost_seconds),
    ]


def _forecast_table(report: Report) -> list[str]:
    first = report.edges[0].forecast
    head = ["predicted", "round trips", "tokens/s", *(f"{gained} a step" for gained in first.tokens_per_second_yielding)]
    head += [f"first token, {tokens}" for tokens in first.first_token_seconds]
    head += ["MB up, 1,000 tokens", "down"]
    rows = []
    for edge in report.edges:
        own = edge.forecast
        row = [edge.edge, str(edge.round_trips), f"{own.tokens_per_second:.3g}"]
        row += [f"{rate:.3g}" for rate in own.tokens_per_second_yielding.values()]
        row += [f"{seconds:.2g} s" for seconds in own.first_token_seconds.values()]
        rows.append([*row, f"{own.up_megabytes_per_1000_tokens:.3g}", f"{own.down_megabytes_per_1000_tokens:.3g}"])
    return _aligned(head, rows)


def _aligned(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}" for column, (cell, width) in enumerate(zip(row, widths)))
        for row in (head, *rows)
    ]


def _millis(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds >= 1e-4 else f"{1e3 * seconds:.2f}"


def _rate(bits_per_second: float, at_least: bool) -> str:
    return f"{'over ' if at_least else ''}{bits_per_second / 1e6:.3g} Mbit/s"
