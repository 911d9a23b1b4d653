"""What binds a plan on a link, and what would help how much: each knob is another `Setup`, predicted and compared. No clock, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..artifact.plan import SHARED, AdaptedLayer, ExchangePlan
from ..artifact.plans import entry_plan
from ..protocol import uniform
from .forecast import DRAFTED, NOTHING, YIELDS, DeviceFigures, Setup, first_token, prompts, step

LEAST_GAIN = 1.03
"""What helps less than that is not worth a sentence, nor told from noise."""
ANSWER_TOKENS = 128
"""Knobs are ranked by what they do for an answer of so many tokens to the longest prompt."""
SHARED_VALUES = 2048
"""Of the shared injections that we advise, all together: the demo's (docs/tuning.md)."""
PARTS = {
    "round_trips": "round trips",
    "up": "uplink",
    "down": "downlink",
    "cloud": "cloud compute",
    "device": "device compute",
    "overhead": "handling of frames",
}


@dataclass(frozen=True)
class Knob:
    """decode_gain: new over old tokens per second; first_token_…: of the longest prompt, gain: old over new seconds; answer_gain: of an
    answer of ANSWER_TOKENS to it."""

    name: str
    sentence: str
    tokens_per_second: float
    decode_gain: float
    first_token_seconds: float
    first_token_gain: float
    answer_gain: float


def bound(setup: Setup) -> str:
    """Where the time of a token and of a prompt goes, largest part first."""
    plain = step(setup)
    parts = sorted(plain.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{PARTS[name]} {1e3 * seconds:.3g} ms ({seconds / plain.seconds:.0%})" for name, seconds in parts[:3])
    longest = prompts(setup)[-1]
    walked = first_token(setup, longest)
    busy = {"device": walked.device_seconds, "up": walked.up_seconds, "cloud": walked.cloud_seconds, "down": walked.down_seconds}
    busy["round_trips"] = setup.plan.round_trips * setup.link.rtt_seconds
    most = max(busy, key=lambda name: busy[name])
    trips = f"{setup.plan.round_trips} round trip{'s' if setup.plan.round_trips > 1 else ''}"
    return (
        f"A token takes {1e3 * plain.seconds:.3g} ms and {trips}: {shares}. "
        f"A prompt of {longest} takes {walked.seconds:.2g} s, the {PARTS[most]} {busy[most]:.2g} s of it."
    )


def knobs(setup: Setup, more_threads: DeviceFigures | None = None, others: Mapping[str, Setup] | None = None) -> list[Knob]:
    """Those that help, best first. more_threads: the device, timed with more; others: other edges, by name."""
    longest = prompts(setup)[-1]
    old, old_first = step(setup).seconds, first_token(setup, longest).seconds

    def knob(name: str, what: str, seconds: float, first: float) -> Knob:
        decode, prompt = old / seconds, old_first / first
        said = []
        if _felt(decode):
            said.append(f"{1 / seconds:.3g} instead of {1 / old:.3g} tokens/s ({decode:.2f} times)")
        if _felt(prompt):
            said.append(f"first token of a prompt of {longest} after {first:.2g} instead of {old_first:.2g} s")
        answer = (old_first + ANSWER_TOKENS * old) / (first + ANSWER_TOKENS * seconds)
        return Knob(name, f"{what}: {', '.join(said)}.", 1 / seconds, decode, first, prompt, answer)

    found = [
        knob(name, what, step(changed).seconds, first_token(changed, longest).seconds)
        for name, what, changed in (
            *(("other edge", f"The plan of {edge}", other) for edge, other in (others or {}).items()),
            *_changes(setup, more_threads),
        )
    ]
    what = f"Speculation (--speculate) where steps of {DRAFTED} drafts yield {YIELDS[0]} tokens"
    found.append(knob("speculation", what, step(setup, 1 + DRAFTED).seconds / YIELDS[0], old_first))
    return sorted((each for each in found if each.answer_gain >= LEAST_GAIN), key=lambda each: -each.answer_gain)


def _felt(gain: float) -> bool:
    return not 1 / LEAST_GAIN < gain < LEAST_GAIN


def _changes(setup: Setup, more_threads: DeviceFigures | None) -> Iterator[tuple[str, str, Setup]]:
    plan = setup.plan
    if plan.exchanges:
        device = replace(setup.device, entry_injection=setup.device.cores, cores=NOTHING)
        entry = with_shared_injections(without_exchanges(plan))
        what = f"An entry plan, {_injected(entry)} (1 round trip a token instead of {plan.round_trips}; tuned anew)"
        yield "entry plan", what, replace(setup, plan=entry, device=device)
    if (shared := with_shared_injections(plan)) != plan:
        yield "shared injection", f"A shared injection, {_injected(shared)} (tuned anew)", replace(setup, plan=shared)
    for dtype, what in (("fp16", "half of fp32's bytes"), ("int8", "a quarter of fp32's bytes, coarser")):
        yield f"{dtype} on the wire", f"--wire-dtype {dtype} ({what}; docs/networks.md)", replace(setup, precision=uniform(dtype))
    if more_threads is not None:
        yield "threads", f"--threads {more_threads.threads} instead of {setup.device.threads}", replace(setup, device=more_threads)
    if plan.front_layers:
        fewer = plan.front_layers // 2
        device = replace(setup.device, front=setup.device.front.times(fewer / plan.front_layers))
        what = f"{plan.front_layers} front layers made {fewer} (the cloud learns more of the text; tuned anew)"
        yield "fewer front layers", what, replace(setup, plan=with_front(plan, fewer), device=device)
    rtt = setup.link.rtt_seconds / 2
    yield "nearer cloud", f"A cloud at half the RTT, {1e3 * rtt:.3g} ms", replace(setup, link=replace(setup.link, rtt_seconds=rtt))


def without_exchanges(plan: ExchangePlan) -> ExchangePlan:
    """The entry plan of the same layers, targets and ranks."""
    targets = {target: rank for adapted in plan.adapted for target, rank in adapted.out_ranks}
    names = {name: rank for source in plan.sources for name, rank in source.ranks}
    shared, features = (max(getattr(source, what) for source in plan.sources) for what in ("shared_injection", "features"))
    shape = (max(names.values()), tuple(targets), max(targets.values()), False, shared)
    return entry_plan(plan.layers, plan.front_layers, *shape, plan.back_layers, features)


def with_shared_injections(plan: ExchangePlan) -> ExchangePlan:
    """Every injection shared that has one down-projection, and more than its part of SHARED_VALUES."""
    part = SHARED_VALUES // max(1, len(plan.sources))
    wide = {each.source for each in plan.all_exchanges if each.injection_columns > part}
    sources = tuple(
        replace(source, shared_injection=part) if source.layer in wide and [name for name, _ in source.ranks] == [SHARED] else source
        for source in plan.sources
    )
    return replace(plan, sources=sources)


def _injected(plan: ExchangePlan) -> str:
    return f"{sum(each.injection_columns for each in plan.all_exchanges):,} values a token"


def with_front(plan: ExchangePlan, fewer: int) -> ExchangePlan:
    """The same plan with fewer front layers; those that go to the cloud are fed by an entry source, if there is one."""
    old, held = plan.front_layers, plan.entry_exchange is not None
    move = {old: fewer} if held else {}
    sources = tuple(replace(source, layer=move.get(source.layer, source.layer)) for source in plan.sources)
    adapted = [replace(layer, source=move.get(layer.source, layer.source)) for layer in plan.adapted]
    if held:
        ranks = next(layer.out_ranks for layer in adapted if layer.source == fewer)
        adapted[:0] = [AdaptedLayer(layer, fewer, ranks) for layer in range(fewer, old)]
    return replace(plan, front_layers=fewer, sources=sources, adapted=tuple(adapted))
