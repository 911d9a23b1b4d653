"""Where and when a figure was measured; nothing is quoted without it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"


def conditions(command: str) -> dict[str, Any]:
    """Machine, versions, date, commit and command."""
    import grpc
    import onnxruntime
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], check=False, capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], check=False, capture_output=True, text=True).stdout.strip()
    return {
        "machine": f"{os.cpu_count()} cores, {model or platform.processor()}, {platform.machine()}, shared and noisy",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "grpcio": grpc.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": commit + ("+changes" if dirty else ""),
        "command": command,
    }


def write_results(name: str, figures: dict[str, Any], command: str) -> Path:
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"conditions": conditions(command), **figures}, indent=1) + "\n", encoding="utf-8")
    return path
