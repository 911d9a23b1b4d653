"""From needs to a plan, start to end: grid, predictions, quality, front, choice, file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..artifact.errors import UsageError
from ..artifact.folders import new_file
from ..artifact.manifest import read_json, write_json
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from ..device_runtime.forecast import LinkFigures
from ..models.checkpoint import display_name, read_skeleton
from ..models.report import Report
from ..protocol.precision import read_precision
from .calibration import Calibration, calibrate, read_calibration
from .candidates import Candidate, default_rank, grid
from .config import Link, PlanConfig
from .machine import OVERHEAD_SECONDS, Side, Told, from_doctor, measure, stated
from .needs import Unmet, unmet
from .predict import World, predict
from .proposal import Proposal, choose, pareto
from .quality import Interpolation, skeleton


@dataclass(frozen=True)
class Planned:
    """front: the plans that none is better than in everything, fastest first, and those that meet every need as `meeting`; chosen: None
    if none does, and then `unmet` says why."""

    world: World
    looked_at: int
    front: tuple[Proposal, ...]
    meeting: tuple[Proposal, ...]
    chosen: Proposal | None
    unmet: Unmet | None
    calibration: Calibration | None


def plan_for(config: PlanConfig, report: Report | None = None) -> Planned:
    """Writes the chosen plan to `config.out`, if there is one.

    Raises UsageError, PlanError, what reading a base or rows raises, DataError for rows that leak or a calibration that shows nothing.
    """
    report = report or Report()
    precision = read_precision(config.wire)
    report.note(f"reading {config.base}")
    shape, bare = read_skeleton(config.base)
    if config.prompt_tokens >= shape.context_tokens:
        raise UsageError(f"--prompt-tokens {config.prompt_tokens}: the context holds {shape.context_tokens}; give fewer")
    rank = config.rank or default_rank(shape)
    plans = grid(shape, rank)
    link, device, cloud, overhead = _machines(config, shape, report)  # before hours of tunes
    calibration = _calibration(config, shape, plans, rank, report)
    world = World(shape, bare, link, device, cloud, precision, config.edge_dtype, config.prompt_tokens, overhead)
    proposals = _proposals(world, plans, calibration)
    why = unmet(proposals, config.needs)
    front = tuple(pareto(proposals))
    meeting = tuple(pareto([each for each in proposals if not config.needs.unmet(each)]))
    chosen = _chosen(config, meeting) if meeting else None
    if chosen is not None and config.out is not None:
        with new_file(config.out) as temporary:
            write_json(temporary, chosen.plan)
    return Planned(world, len(proposals), front, meeting, chosen, why, calibration)


def _calibration(
    config: PlanConfig, shape: DecoderShape, plans: Mapping[Candidate, ExchangePlan], rank: int, report: Report
) -> Calibration | None:
    if config.quality_from is not None:
        found = read_calibration(config.quality_from, shape)
        if found.base_name != display_name(config.base):  # its fingerprint would take reading the weights
            report.note(f"{config.quality_from}: calibrated on {found.base_name}; quality is only right if that is the same base")
        return found
    if config.calibration is None or config.kept is None:
        return None
    tuned = {each: plans[each] for each in skeleton(shape.layers, plans, rank)}
    return calibrate(config.base, config.calibration, tuned, rank, config.kept, report)


def _machines(config: PlanConfig, shape: DecoderShape, report: Report) -> tuple[LinkFigures, Side, Side, float]:
    """(link, device, cloud, overhead of each round trip). What is stated counts; then the doctor's report; then what is measured here.

    The overhead goes with the RTT: the doctor's, of application pings, has most of it.
    """
    device = stated(config.device_layer, "--device-ms-per-layer") if config.device_layer is not None else None
    cloud = stated(config.cloud_layer, "--cloud-ms-per-layer") if config.cloud_layer is not None else None
    told = from_doctor(read_json(config.doctor), str(config.doctor)) if config.doctor is not None else None
    if told is not None:
        device, cloud = device or told.device, cloud or told.cloud
    device = device or measure(shape, config.device_threads, told is None, lambda line: report.note(f"device: {line}"))
    if told is not None:
        device = replace(device, head_seconds=told.head_seconds)
    cloud = cloud or measure(shape, config.cloud_threads, False, lambda line: report.note(f"cloud: {line}"))
    overhead = told.overhead_seconds if told is not None and config.link.rtt_millis is None else OVERHEAD_SECONDS
    return _link(config.link, told), device, cloud, overhead


def _link(link: Link, told: Told | None) -> LinkFigures:
    """told: not None where a figure is not stated (PlanConfig)."""
    stated_seconds = None if link.rtt_millis is None else link.rtt_millis / 1e3
    rates = [None if mbit is None else mbit * 1e6 for mbit in (link.up_mbit, link.down_mbit)]
    its = (told.link.rtt_seconds, told.link.up_bits_per_second, told.link.down_bits_per_second) if told is not None else (0.0, 0.0, 0.0)
    rtt, up, down = (other if own is None else own for own, other in zip((stated_seconds, *rates), its, strict=True))
    return LinkFigures(rtt, rtt, rtt, 0.0, 1, up, down)


def _proposals(world: World, plans: Mapping[Candidate, ExchangePlan], calibration: Calibration | None) -> list[Proposal]:
    quality = None
    if calibration is not None and calibration.control is not None:
        quality = Interpolation(world.shape.layers, calibration.control, calibration.by_candidate)
    return [
        Proposal(candidate, plan, predict(plan, world), quality.quality(candidate) if quality else None)
        for candidate, plan in plans.items()
    ]


def _chosen(config: PlanConfig, meeting: tuple[Proposal, ...]) -> Proposal:
    """By default the fastest of those that meet --quality; without that need the best."""
    name = config.choose or ("fastest" if config.needs.quality is not None else "best")
    if not name.isdecimal():
        return choose(meeting, name)
    if not 1 <= int(name) <= len(meeting):
        raise UsageError(f"--choose {name}: {len(meeting)} plans are proposed; give 1 to {len(meeting)}")
    return meeting[int(name) - 1]
