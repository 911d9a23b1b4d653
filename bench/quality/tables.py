"""docs/results/quality.json as the tables of docs/quality.md; tools/generated.py puts them there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .tasks import NAMES

MEASURES = {
    "recall": ("recall", 100, "{:.0f} %"),
    "other_nll": ("other text, nats", 1, "{:.2f}"),
    "bleu": ("BLEU", 1, "{:.1f}"),
    "slot_recall": ("slots said", 100, "{:.0f} %"),
    "exact_match": ("exact match", 100, "{:.0f} %"),
}
"""Column title, factor and form of what a task has beside its loss."""


def markdown(found: dict[str, Any]) -> str:
    """One table for each task that has figures, one of what the methods cost, one of the rates tried."""
    tasks = [task for task in NAMES if task in found]
    parts = [_task(task, found[task], found["methods"]) for task in tasks]
    if "persona" in tasks:
        parts.append(_general(found["general_text"], found["persona"]["methods"]["base"]["other_nll"]))
    return "\n\n".join([*parts, _costs(found["methods"]), _tried(found["tried"], tasks)])


def _task(task: str, of_task: dict[str, Any], methods: dict[str, Any]) -> str:
    measures = [name for name in MEASURES if any(name in each for each in of_task["methods"].values())]
    title = f"**{task}**: {of_task['rows']} held-out rows, drawn in {of_task['drawn_groups']} groups; {of_task['steps']} steps of tuning"
    header = [
        "",
        "trained parameters",
        "rate",
        "share beyond the control [95 %]",
        "by seed",
        "share of seven [95 %]",
        "plain",
        "nats per token",
        "seeds",
    ]
    header += [MEASURES[name][0] for name in measures]
    lines = []
    for name, each in _best_first(of_task).items():
        words = methods[name]["words"] if name in methods else "the base, nothing tuned"
        low, high = each.get("interval", (0.0, 0.0))
        learned = name not in ("base", "control", "lora")
        lines.append(
            [
                f"`{name}`: {words}{_remark(each)}",
                f"{each.get('parameters', 0):,}",
                f"{each['rate']:.3g}" if "rate" in each else "",
                f"{_percent(each['share'])} [{_percent(low)}, {_percent(high)}]" if learned else _fixed(name),
                ", ".join(map(_percent, each.get("share_by_seed", ()))) if learned else "",
                _of_seven(each),
                _percent(each["plain_improvement"]) if "plain_improvement" in each else _percent(0),
                f"{each['nll']:.3f}",
                str(each["seeds"]),
                *(MEASURES[key][2].format(MEASURES[key][1] * each[key]) if key in each else "" for key in measures),
            ]
        )
    return f"{title}\n\n{_table(header, lines)}{_test_set(of_task)}"


def _best_first(of_task: dict[str, Any]) -> dict[str, Any]:
    """Methods by share; losses of unlike seeds have no order. The base, which has none, at the end."""
    return dict(sorted(of_task["methods"].items(), key=lambda item: -item[1].get("share", -math.inf)))


def _test_set(of_task: dict[str, Any]) -> str:
    """Shares of the rows that are of the task's own test set, where the figures have them apart."""
    if (found := of_task.get("test_set")) is None:
        return ""
    shares = [
        f"`{name}` {_percent(found[name])} [{', '.join(map(_percent, found[f'{name}_interval']))}]"
        for name in _best_first(of_task)
        if name in found
    ]
    return f"\n\nShares on the {found['rows']} rows of the test set alone: {', '.join(shares)}."


def _of_seven(each: dict[str, Any]) -> str:
    if "share_of_seven" not in each:
        return ""
    return f"{_percent(each['share_of_seven'])} [{', '.join(map(_percent, each['share_of_seven_interval']))}]"


def _remark(each: dict[str, Any]) -> str:
    diverged = f" ({each['diverged_seeds']} seeds diverged)" if each.get("diverged_seeds") else ""
    return diverged + " (best at the grid's edge)" * each.get("at_grid_edge", False)


def _fixed(name: str) -> str:
    """Where a share is what it is by its definition."""
    return {"control": "0", "lora": "100"}.get(name, "")


def _general(by_method: dict[str, Any], base: float) -> str:
    lines = [
        [f"`{name}`", rate, f"{each['nll']:.3f}", f"{100 * each['recall']:.0f} %", f"{each['other_nll']:.2f}"]
        for name, by_rate in by_method.items()
        for rate, each in by_rate.items()
    ]
    header = ["persona", "learning rate", "held out, nats per token", "recall", "general text, nats per token"]
    title = (
        f"What learning the persona costs elsewhere, by each try that was the best when it was made (general text without it: {base:.2f})"
    )
    return f"{title}:\n\n{_table(header, lines)}"


def _costs(methods: dict[str, Any]) -> str:
    header = [
        "",
        "round trips per token",
        "device layers",
        "bytes per token up / down, fp32",
        "multiply-accumulates on the device, millions",
    ]
    lines = [
        [
            f"`{name}`",
            str(each["round_trips"]),
            str(each["device_layers"]),
            f"{each['up_bytes_per_token']:,} / {each['down_bytes_per_token']:,}",
            f"{each['device_multiplications'] / 1e6:.1f}",
        ]
        for name, each in methods.items()
        if "round_trips" in each
    ]
    return f"What a token costs under each plan:\n\n{_table(header, lines)}"


def _tried(tried: dict[str, Any], tasks: Sequence[str]) -> str:
    lines = [
        [task, f"`{name}`", "; ".join(f"{rate}: {_loss(loss)}" for rate, loss in losses.items())]
        for task in tasks
        for name, losses in tried[task].items()
        if losses
    ]
    return f"Validation loss by learning rate, every try:\n\n{_table(['task', 'method', 'rate: nats per token'], lines)}"


def _loss(value: float | None) -> str:
    return "diverged" if value is None or not math.isfinite(value) else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
