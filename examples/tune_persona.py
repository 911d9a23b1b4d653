"""`make persona`: tunes the demo's adapter anew, under the entry plan."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PERSONA = ROOT / "examples" / "persona"
FLAGS = ("--plan", "entry", "--front-layers", "4", "--rank", "64", "--shared-injection", "2048", "--epochs", "6", "--replace")


def main() -> None:
    model = subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], check=True, capture_output=True, text=True).stdout.strip()
    files = ("--data", PERSONA / "rows.jsonl", "--held-out", PERSONA / "held_out.jsonl", "--out", PERSONA / "adapter")
    began = time.monotonic()
    subprocess.run([Path(sys.executable).parent / "plora-tune", model, *files, *FLAGS], check=True)
    print(f"{time.monotonic() - began:.0f} s in all, reading the model and making the basis included")


if __name__ == "__main__":
    main()
