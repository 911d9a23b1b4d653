"""The dry run's facts for a person: the plan as device, wire and cloud from top to bottom, then sides, bytes and speed."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import Any

from ..artifact.plan import SHARED
from .dry_run import BYTES_PER_SECOND

COLUMNS = 100
DEVICE_COLUMNS = 27
WIRE = "fp32"
"""Wire dtype of the bytes in the drawing; the table below it has the others."""
LISTED = ("fp32", "fp16")

Facts = dict[str, Any]


def format_dry_run(facts: Facts) -> str:
    """The drawing, then what is where, the bytes and the predicted speed; at most COLUMNS wide, but for long paths."""
    plan = facts["plan"]
    title = (
        f"{plan['layers']} layers: {counted(plan['front_layers'], 'front layer')}, {counted(plan['segments'], 'cloud segment')}, "
        f"{counted(plan['back_layers'], 'back layer')}; {counted(plan['exchanges'], 'exchange')}, "
        f"{counted(plan['round_trips_per_token'], 'round trip')} per token"
    )
    return "\n".join([facts["base"], title, "", *draw(plan["stages"]), "", *where(facts), "", *wire(facts), "", *speed(facts)])


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


# The drawing

Row = tuple[str, str, str]
"""Text on the device's side, an arrow's text with its direction in front ("> " up, "< " down) or "", text on the cloud's side."""


def draw(stages: list[Facts]) -> list[str]:
    """Lines of the drawing: three lanes; exchanges with their segments that differ in layer numbers alone are drawn once."""
    blocks: list[tuple[str, list[Row]]] = []
    for count, group in runs(stages):
        rows = [row for stage in group for row in stage_rows(stage, group[0]["source"] if count > 1 else None)]
        blocks.append((run_title(count, group) if count > 1 else "", rows))
    blocks[0] = ("", [("token embeddings", "", ""), *blocks[0][1]])
    blocks.append(("", [("final norm, head, sampling", "", "")]))
    wire = max(len(row[1]) for _, rows in blocks for row in rows) + 4
    cloud = COLUMNS - DEVICE_COLUMNS - wire - 6
    rule = "─" * (DEVICE_COLUMNS + 1) + "┼" + "─" * (wire + 2) + "┼" + "─" * (cloud + 1)
    lines = [f"{'DEVICE':<{DEVICE_COLUMNS}} │ {f'bytes per token, {WIRE}':^{wire}} │ CLOUD", rule]
    for title, rows in blocks:
        if title:
            lines.append(f"┌─ {title} ".ljust(COLUMNS, "─"))
        lines += [line for row in rows for line in row_lines(row, wire, cloud)]
        if title:
            lines.append("└".ljust(COLUMNS, "─"))
    return lines


def row_lines(row: Row, wire: int, cloud: int) -> list[str]:
    """One row of three lanes, its texts wrapped."""
    device_text, arrow_text, cloud_text = row
    direction, text = arrow_text[:1], arrow_text[2:]
    arrow = {">": f"── {text} ".ljust(wire - 1, "─") + "▶", "<": "◀" + f" {text} ──".rjust(wire - 1, "─"), "": ""}[direction]
    cells = zip_longest(textwrap.wrap(device_text, DEVICE_COLUMNS) or [""], [arrow], textwrap.wrap(cloud_text, cloud), fillvalue="")
    return [f"{left:<{DEVICE_COLUMNS}} │ {middle:<{wire}} │ {right}".rstrip() for left, middle, right in cells]


def runs(stages: list[Facts]) -> list[tuple[int, list[Facts]]]:
    """(count, first of them): a stage, or an exchange with its segment, and how many alike follow each other."""
    groups: list[list[Facts]] = []
    for stage in stages:
        if stage["kind"] == "segment" and groups and groups[-1][-1]["kind"] == "exchange":
            groups[-1].append(stage)
        else:
            groups.append([stage])
    found: list[tuple[int, list[Facts]]] = []
    for group in groups:
        if found and group[0]["kind"] == "exchange" and relative(group) == relative(found[-1][1]):
            found[-1] = (found[-1][0] + 1, found[-1][1])
        else:
            found.append((1, group))
    return found


def relative(group: list[Facts]) -> Any:
    """What an exchange and its segment have in common with those that differ in layer numbers alone; None for other stages."""
    if group[0]["kind"] != "exchange":
        return None
    exchange, segment = group
    source = exchange["source"]
    fed = [(each["first"] - source, each["stop"] - source, each["targets"]) for each in exchange["feeds"]]
    inputs = [index if index < 0 else exchange["index"] - index for index in segment["inputs"]]
    figures = [exchange[key] for key in ("ranks", "features", "cores", "injection", "expanded")]
    return figures, fed, inputs, segment["stop"] - segment["first"]


def run_title(count: int, group: list[Facts]) -> str:
    """How often an exchange and its segment come, and the layers i that they begin with."""
    segment = group[-1]
    first, size = segment["first"], segment["stop"] - segment["first"]
    numbers = [str(first + size * index) for index in range(count)]
    shown = numbers if count < 6 else [numbers[0], numbers[1], "…", numbers[-1]]
    return f"x {count}: layers {first}..{first + size * count - 1}; exchange by exchange, i = {', '.join(shown)}"


def stage_rows(stage: Facts, i: int | None) -> list[Row]:
    """What a stage says in each lane; layers are numbered from the layer `i` if there is one."""
    match stage["kind"]:
        case "front_layers" | "back_layers":
            return [(layers(stage["first"], stage["stop"]), "", "")]
        case "entry":
            rows = [("", f"> entry [{stage['hidden']}] {stage['bytes_up'][WIRE]:,} B", "")]
            if injection := stage["injection"]:
                downs = f"{down_projections(injection, stage['hidden'])}, norm of layer {injection['source']} folded in"
                rows = [(downs, "", ""), *rows, *injection_rows(injection, None)]
            return rows
        case "exchange":
            source = stage["source"] if i is None else "i"
            compressed = f"< compressed [{stage['compressed']}] {stage['bytes_down'][WIRE]:,} B"
            down = ("", compressed, f"{down_projections(stage, stage['hidden'])} on layer {source}'s normed input")
            return [down, *injection_rows(stage, i)]
        case "segment":
            own = stage["inputs"] if i is None else []
            names = ", ".join("the entry" if index < 0 else f"exchange {index}" for index in own)
            return [("", "", f"{layers(stage['first'], stage['stop'], i)}{f', fed by {names}' if names else ''}")]
        case _:
            every = "every token's row, for the back layers" if stage["prompt_rows"] == "all" else "of a prompt, the last token's row"
            return [("", f"< exit [{stage['hidden']}] {stage['bytes_down'][WIRE]:,} B", every)]


def injection_rows(facts: Facts, i: int | None) -> list[Row]:
    """Features and cores on the device, the injection on the wire, and in the cloud whom it feeds."""
    cores = ", ".join(f"{counted(each['count'], 'core')} [{each['out_rank']}, {each['rank']}]" for each in facts["cores"])
    text = f"> injection [{facts['injection']}] {facts['bytes_up'][WIRE]:,} B"
    fed = [f"feeds {layers(each['first'], each['stop'], i)}: {', '.join(each['targets'])}" for each in facts["feeds"]]
    expanded = [f"P expands it to {facts['expanded']}"] if facts["expanded"] else []
    first, *others = expanded + fed
    features = [(f"{counted(facts['features'], 'private feature')}", "", "")] if facts["features"] else []
    return [*features, (cores, text, first), *(("", "", other) for other in others)]


def down_projections(facts: Facts, hidden: int) -> str:
    """The A's of a source: `A [64, 576]`, or by target with those of one rank together."""
    names: dict[int, list[str]] = {}
    for name, rank in facts["ranks"].items():
        names.setdefault(rank, []).append(name)
    return "A " + ", ".join(f"[{rank}, {hidden}]" + ("" if own == [SHARED] else f" of {' '.join(own)}") for rank, own in names.items())


def layers(first: int, stop: int, i: int | None = None) -> str:
    """`layers 4..29`, or counted from the layer i: `layers i..i+5`."""
    names = [str(layer) if i is None else f"i+{layer - i}" if layer > i else "i" for layer in (first, stop - 1)]
    return f"layer {names[0]}" if stop == first + 1 else f"layers {names[0]}..{names[1]}"


# The tables


def where(facts: Facts) -> list[str]:
    """Values and megabytes by part and side, and the KV caches."""
    cloud, edge = facts["cloud"], facts["edge"]
    names = [
        name
        for name in ("embedding", "head", "final norm", "decoder layers", "A", "B", "P", "features", "cores")
        if name in cloud["parts"] or name in edge["parts"]
    ]
    lines = [f"{'values, MB':<28}{'device':>24}{'cloud':>28}"]
    rows: list[tuple[str, Facts | None, Facts | None]] = [(name, edge["parts"].get(name), cloud["parts"].get(name)) for name in names]
    totals = [{"values": side["total"], "bytes": side["bytes"]} for side in (edge, cloud)]
    for name, *sides in [*rows, (f"all ({edge['dtype']} and {cloud['dtype']})", *totals)]:
        cells = [f"{side['values']:,} {side['bytes'] / 1e6:>10,.2f}" if side else "–" for side in sides]
        lines.append(f"  {name:<26}{cells[0]:>24}{cells[1]:>28}")
    caches = (facts["device_kv_cache_bytes_per_token"], facts["kv_cache_bytes_per_token"])
    lines.append(f"  {'KV cache, bytes per token':<26}{caches[0]:>24,}{caches[1]:>28,}")
    return lines


def wire(facts: Facts) -> list[str]:
    """Bytes per token and per prompt, by wire dtype; if the plan shares injections, beside what it would cost without."""
    columns = [(dtype, facts["wire_bytes_per_token"][dtype]) for dtype in LISTED]
    if without := facts["wire_bytes_per_token_unshared"]:
        columns += [(f"{dtype}, unshared", without[dtype]) for dtype in LISTED]
    lines = [f"{'bytes per token':<36}" + "".join(f"{title:>16}" for title, _ in columns)]
    for label, key in (
        ("up", "up"),
        ("  entry", "entry_up"),
        ("  injections", "low_rank_up"),
        ("down", "down"),
        ("  compressed", "low_rank_down"),
        ("  exit", "exit_down"),
        ("instead, at full rank: injections", "full_rank_up"),
        ("instead, at full rank: u", "full_rank_down"),
    ):
        lines.append(f"  {label:<34}" + "".join(f"{values[key]:>16,}" for _, values in columns))
    reductions = [f"{100 * values['communication_reduction']:.1f} %" for _, values in columns]
    lines.append(f"  {'communication reduction':<34}" + "".join(f"{text:>16}" for text in reductions))
    for label, key in (("up", "prompt_up"), ("down", "prompt_down")):
        prompt = f"prompt of {facts['prompt_tokens']} tokens, {label}"
        lines.append(f"  {prompt:<34}" + "".join(f"{values[key]:>16,}" for _, values in columns))
    return lines


def speed(facts: Facts) -> list[str]:
    """What round trips and compute allow, over RTT."""
    source = f"assumed: weights read at {BYTES_PER_SECOND / 1e9:g} GB/s" if facts["compute_is_assumed"] else "given"
    rates = facts["tokens_per_second"]
    trips = counted(facts["plan"]["round_trips_per_token"], "round trip")
    return [
        f"predicted: 1 / ({trips} x RTT + {facts['compute_millis']:g} ms of compute), compute {source}",
        f"  {'RTT, ms':<12}" + "".join(f"{rtt:>9}" for rtt in rates),
        f"  {'tokens/s':<12}" + "".join(f"{rate:>9.2f}" for rate in rates.values()),
    ]
