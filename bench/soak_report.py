"""docs/results/soak.json from what bench/soak.py kept of a run, finished or not."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from .conditions import RESULTS
from .soak_watch import COUNTERS, over_time, thinned

MOST_SAMPLES = 120


def report(raw: dict[str, Any]) -> dict[str, Any]:
    """Of a finished run, or of what there is of one."""
    counts: Counter[str] = Counter(raw["counts"])
    samples, before, after = raw["samples"], raw["before"], raw.get("after", {})
    killed = raw["cuts"].get("kill", 0) + counts["device_kills"]
    deterministic = sum(number for style, number in raw["styles"].items() if style.startswith("deterministic"))
    last = after if after else samples[-1] if samples else before
    memory = over_time(samples, "rss_bytes", before["rss_bytes"], after.get("rss_bytes"))
    memory["slope_bytes_per_hour"] = memory.pop("slope_per_hour")
    figures = {
        "soak": raw["soak"],
        "ended": raw["ended"],
        "minutes": samples[-1]["minutes"] if samples else 0.0,
        "metrics": raw["metrics"],
        **{name: raw.get(name) for name in ("leaked_sessions", "leaked_connections", "leaked_file_descriptors", "leaked_kv_bytes")},
        "wrong_tokens": counts["wrong_tokens"],
        "deterministic_rows_with_other_bits": counts["other_bits"],
        "near_ties": counts["near_ties"],
        "answers": counts["answers"],
        "tokens": counts["tokens"],
        "finished_answers": counts["finished_answers"],
        "deterministic_answers": deterministic,
        "cancelled_answers": counts["closed_answers"] + counts["interrupted_answers"],
        "interrupted_answers": counts["interrupted_answers"],
        "finished_by_style": raw["styles"],
        "longest_answer_seconds": raw["longest_answer_seconds"],
        "cuts": sum(number for kind, number in raw["cuts"].items() if kind != "kill"),
        "cuts_by_kind": {kind: number for kind, number in sorted(raw["cuts"].items()) if kind != "kill"},
        "device_kills": killed,
        "hostile_connections": sum(raw["hostile"].values()),
        "hostile_by_kind": dict(sorted(raw["hostile"].items())),
        "hostile_surprises": raw["surprises"],
        "reconnections": counts["reconnections"],
        "replayed_tokens": counts["replayed_tokens"],
        **{name.removeprefix("plora_"): (last.get("counters") or {}).get(name) for name in COUNTERS},
        "errors": raw["errors"],
        "child_crashes": counts["child_crashes"],
        "stuck_processes": counts["stuck_processes"],
        "server_exit_code": raw.get("server_exit_code"),
        "server_failures": raw.get("server_failures"),
        "processes_left": raw.get("processes_left"),
        "rss_bytes": memory,
        "after_with_links": raw.get("after_with_links"),
        "descriptors": over_time(samples, "descriptors", before["descriptors"], after.get("descriptors")),
        "mistakes": raw["mistakes"],
        "samples": thinned(samples, MOST_SAMPLES),
    }
    fuzz = RESULTS / "fuzz.json"
    if fuzz.exists():
        found = json.loads(fuzz.read_text(encoding="utf-8"))
        figures.update(fuzz_messages=found["messages"], fuzz_crashes=found["crashes"])
    return figures


NONE_OF = (
    "leaked_sessions", "leaked_connections", "leaked_file_descriptors", "leaked_kv_bytes", "wrong_tokens", "hostile_surprises",
    "deterministic_rows_with_other_bits", "child_crashes", "stuck_processes", "server_exit_code", "processes_left",
)  # fmt: skip
HARMLESS = "grpc._cython.cygrpc.ExecuteBatchError"
"""What grpc logs when a peer is gone in the moment when its stream ends."""

EXPECTED = {"ServerFull while answering", "ServerFull while opening", "Unreachable while opening"}
"""Errors: no room, of which there is little on purpose; and the first connection is tried for once only, so that a cut ends it."""


def faults(figures: dict[str, Any]) -> list[str]:
    """What should be none, and is some."""
    found = [f"{name} {figures[name]}" for name in NONE_OF if figures[name]]
    found += [f"{name} not known" for name in NONE_OF if figures["metrics"] and figures[name] is None]
    found += [f"{number} {error}" for error, number in figures["errors"].items() if error not in EXPECTED]
    return found + [f"the server failed with {name}" for name in figures["server_failures"] or () if name != HARMLESS]


def summary(figures: dict[str, Any]) -> str:
    shown = [name for name, value in figures.items() if name not in ("samples", "mistakes", "soak") and not isinstance(value, dict)]
    flat = figures["rss_bytes"]
    return "\n".join([*(f"{name}: {figures[name]}" for name in shown), f"errors: {figures['errors']}", f"rss_bytes: {flat}"])
