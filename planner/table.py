"""What is proposed, for a person and as plain values."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from ..artifact.strict import plain
from .calibration import CalibrationConfig
from .config import PlanConfig
from .machine import Side
from .needs import Needs, explain
from .planning import Planned
from .proposal import Proposal

HEAD = ["", "plan", "tokens/s", "first token", "MB / 1,000", "device MB", "quality", ""]
LEFT = (1, 7)
"""Columns of words."""


def tables(planned: Planned, config: PlanConfig, everything: bool) -> str:
    """everything: plans of the front that miss a need, too."""
    world, link = planned.world, planned.world.link
    lines = [
        f"link: RTT {1e3 * link.rtt_seconds:.3g} ms, up {link.up_bits_per_second / 1e6:.3g}, down {link.down_bits_per_second / 1e6:.3g} "
        f"Mbit/s, {world.precision} on the wire",
        f"device: {_side(world.device)}; cloud: {_side(world.cloud)}",
        f"{planned.looked_at} plans looked at; prompt: {world.prompt_tokens} tokens; MB / 1,000: up and down, for 1,000 tokens",
        *_of_quality(planned),
        "",
        *_rows(planned, config.needs, everything),
    ]
    hidden = [each for each in planned.front if config.needs.unmet(each)]
    if hidden and not everything:
        lines.append(f"({len(hidden)} more on the front miss a need: --all shows them)")
    if planned.chosen is not None:
        lines += ["", f"chosen: {planned.meeting.index(planned.chosen) + 1}, {planned.chosen.candidate.words}"]
        if config.out is not None:
            lines += [f"written to {config.out}; go on with", *(f"  {line}" for line in commands(config))]
        else:
            lines.append("pass --out FILE to have it written")
    return "\n".join(lines)


def _side(side: Side) -> str:
    return f"{1e3 * side.layer.seconds(1):.3g} ms a layer ({side.origin})"


def _of_quality(planned: Planned) -> list[str]:
    own = planned.calibration
    if own is None:
        return ["quality: unknown (--data FILE calibrates it); the number of trained values stands for it"]
    return [
        "quality: share of what the best tuned plan with exchanges gains over static biases at q, k, v on "
        f"{own.held_out_rows} held-out rows after {own.steps} steps; ~ interpolated"
    ]


def _rows(planned: Planned, needs: Needs, everything: bool) -> list[str]:
    rows = [[str(number), *_cells(each), ""] for number, each in enumerate(planned.meeting, 1)]
    if everything:
        missing = [(each, needs.unmet(each)) for each in planned.front]
        rows += [["-", *_cells(each), f"misses {', '.join(missed)}"] for each, missed in missing if missed]
    head = HEAD if planned.calibration else [cell.replace("quality", "trained") for cell in HEAD]
    return _aligned(head, rows)


def _cells(proposal: Proposal) -> list[str]:
    own, quality = proposal.figures, proposal.quality
    return [
        proposal.candidate.words,
        f"{own.tokens_per_second:.3g}",
        f"{own.first_token_millis:.0f} ms",
        f"{own.megabytes_per_1000_tokens:.3g}",
        f"{own.device_megabytes:.1f}",
        f"{'~' if quality.origin == 'interpolated' else ''}{quality.share:.2f}" if quality else f"{own.trained_values:,}",
    ]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" if at in LEFT else f"{cell:>{width}}" for at, (cell, width) in enumerate(zip(row, widths))).rstrip()
        for row in (head, *rows)
    ]


def commands(config: PlanConfig) -> list[str]:
    """What to run next with the plan that was written."""
    own = config.calibration
    data = own.data if own is not None else "rows.jsonl"
    base, out = shlex.quote(config.base), shlex.quote(str(config.out))
    edge = f" --edge-dtype {config.edge_dtype}" if config.edge_dtype != PlanConfig.edge_dtype else ""
    longest = f" --max-tokens {own.max_tokens}" if own is not None and own.max_tokens != CalibrationConfig.max_tokens else ""
    return [
        f"plora-export {base} --dry-run --plan {out}{edge}",
        f"plora-tune {base} --data {shlex.quote(str(data))} --plan {out}{longest} --out adapter",
        f"plora-export {base} --adapter adapter{edge} --out out",
    ]


def as_dict(planned: Planned, config: PlanConfig) -> dict[str, Any]:
    """Everything, as plain values; curves as milliseconds by rows."""
    world, why = planned.world, planned.unmet
    numbers = {id(each): number for number, each in enumerate(planned.meeting, 1)}
    shown = [*planned.meeting, *(each for each in planned.front if config.needs.unmet(each))]
    return {
        "base": config.base,
        "link": {
            "rtt_millis": 1e3 * world.link.rtt_seconds,
            "up_mbit": world.link.up_bits_per_second / 1e6,
            "down_mbit": world.link.down_bits_per_second / 1e6,
        },
        "device": _side_facts(world.device),
        "cloud": _side_facts(world.cloud),
        "overhead_millis_per_round_trip": 1e3 * world.overhead_seconds,
        "wire_dtype": str(world.precision),
        "prompt_tokens": world.prompt_tokens,
        "needs": {need.flag: need.limit for need in config.needs.all},
        "looked_at": planned.looked_at,
        "calibration": plain(planned.calibration) if planned.calibration else None,
        "proposals": [{"number": numbers.get(id(each)), **facts(each, config.needs)} for each in shown],
        "chosen": facts(planned.chosen, config.needs) if planned.chosen else None,
        "unmet": None
        if why is None
        else {
            "binding": [list(flags) for flags in why.binding],
            "plans_without_it": list(why.freed),
            "nearest": facts(why.nearest, config.needs),
            "shortfalls": why.shortfalls,
            "message": explain(why, config.needs),
        },
        "out": str(config.out) if config.out is not None and planned.chosen is not None else None,
        "commands": commands(config) if config.out is not None and planned.chosen is not None else [],
    }


def _side_facts(side: Side) -> dict[str, Any]:
    return {
        "layer_millis": {str(rows): 1e3 * seconds for rows, seconds in side.layer.points},
        "head_millis": None if side.head_seconds is None else 1e3 * side.head_seconds,
        "origin": side.origin,
    }


def facts(proposal: Proposal, needs: Needs) -> dict[str, Any]:
    """One proposal; misses: flags of needs that it does not meet."""
    return {
        "words": proposal.candidate.words,
        **plain(proposal.candidate),
        "round_trips": proposal.plan.round_trips,
        **plain(proposal.figures),
        "quality": proposal.quality.share if proposal.quality else None,
        "quality_origin": proposal.quality.origin if proposal.quality else "unknown",
        "misses": list(needs.unmet(proposal)),
        "plan": plain(proposal.plan),
    }
