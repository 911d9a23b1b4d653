"""From a checkpoint and an adapter to a verified artifact folder: `cloud/`, `edge/`, and `verification/` beside them.

Two processes, one after the other, each with the memory of one model: one writes, one verifies from the files alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..artifact import errors
from ..artifact.errors import PloraError, VerificationError
from ..artifact.folders import check_new, new_folder
from ..artifact.manifest import write_json
from ..artifact.strict import plain
from .config import STAGES, ExportConfig

REPORT = "report.json"


Progress = Callable[[str], None]


def export(config: ExportConfig, progress: Progress, write: Callable[[ExportConfig, Path, Progress], None] | None = None) -> dict[str, Any]:
    """Writes `config.out` whole or not at all; returns the verification report. `progress` is told each of STAGES.

    write: what writes the halves; None for a process of its own, whose memory is gone before verification begins.

    Raises UsageError, ModelError, PlanError, ArtifactError, VerificationError and their children.
    """
    check_new(config.out, config.replace)
    with new_folder(config.out, config.replace) as out:
        (write or write_in_process)(config, out, progress)
        progress(STAGES[-1])
        report = verify_in_process(out)
        write_json(out / "verification" / REPORT, report)
    return report


def write_in_process(config: ExportConfig, out: Path, progress: Progress) -> None:
    """Runs `write_halves` in a fresh interpreter; its stages and errors are ours."""
    asked = {**plain(config), "adapter": str(config.adapter), "out": str(config.out)}
    writer = Child("plora.export.halves", json.dumps(asked), str(out))
    with writer as process:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            if "stage" in told:
                progress(told["stage"])
            else:
                raise getattr(errors, told["error"])(told["message"])
        if process.wait() != 0:
            raise PloraError(f"the exporting process ended with code {process.returncode}: {writer.last_line()}")


def verify_in_process(out: Path) -> dict[str, Any]:
    """Runs `verify` in a fresh interpreter; returns its report. Raises VerificationError with what it said."""
    verifier = Child("plora.export.verify", str(out))
    with verifier as process:
        assert process.stdout is not None
        output = process.stdout.read()
        if process.wait() != 0:
            raise VerificationError(f"verification failed, nothing was published: {verifier.last_line()}")
    return json.loads(output)


def private_stdout() -> TextIO:
    """For a child: standard output for us alone; whatever else prints goes to standard error."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return ours


class Child:
    """`python -P -m MODULE …` (-P: nothing in the current folder can stand in for a module), gone when the block ends, whatever
    ended it. Its standard error goes to a file, which cannot fill up while we read its output."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.command = [sys.executable, "-P", "-m", module, *arguments]
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  closed in __exit__

    def __enter__(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=self.said, text=True)
        return self.process

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self.process, self.said:
            if kind is not None and self.process.poll() is None:
                self.process.kill()

    def last_line(self) -> str:
        """What it said last on standard error."""
        self.said.seek(0)
        lines = self.said.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"
