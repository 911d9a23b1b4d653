"""What `plora-plan` is asked: checked when it is built, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import UsageError
from ..artifact.folders import check_new
from ..artifact.shape import DTYPE_BYTES
from ..models.plan_flags import NAMED
from .calibration import CalibrationConfig
from .needs import Needs
from .proposal import CHOICES


@dataclass(frozen=True)
class Link:
    """rtt_millis: both ways; rates in 10^6 bits per second. None: as the doctor's report has it."""

    rtt_millis: float | None = None
    up_mbit: float | None = None
    down_mbit: float | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--rtt-ms", self.rtt_millis), ("--up-mbit", self.up_mbit), ("--down-mbit", self.down_mbit)):
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{flag} {value:g}: expected more than 0")


@dataclass(frozen=True)
class PlanConfig:
    """base: folder, hub id or GGUF; device_layer, cloud_layer: milliseconds as machine.stated reads them, None to measure here with so
    many threads; doctor: a report that says what is not stated; wire: as --wire-dtype; edge_dtype: of the device's tables and layers;
    prompt_tokens: whose first token is predicted; rank: largest, None for the default; calibration: rows to tune on, or quality_from: a
    file that an earlier calibration left; choose: of proposal.CHOICES, or a number of the table, None for the default; out: plan file.

    Raises UsageError.
    """

    base: str
    link: Link
    needs: Needs
    device_layer: str | None = None
    cloud_layer: str | None = None
    device_threads: int = 1
    cloud_threads: int = 1
    doctor: Path | None = None
    wire: str = "fp32"
    edge_dtype: str = "fp32"
    prompt_tokens: int = 128
    rank: int | None = None
    calibration: CalibrationConfig | None = None
    quality_from: Path | None = None
    choose: str | None = None
    out: Path | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        link = {"--rtt-ms": self.link.rtt_millis, "--up-mbit": self.link.up_mbit, "--down-mbit": self.link.down_mbit}
        if self.doctor is None and (absent := [flag for flag, value in link.items() if value is None]):
            raise UsageError(f"the link is not known: give {', '.join(absent)}, or --doctor FILE from `plora-device doctor --json`")
        if self.calibration is not None and self.quality_from is not None:
            raise UsageError("either --data FILE, to calibrate, or --quality-from FILE, which is a calibration: give one of the two")
        if self.calibration is not None and self.out is None:
            raise UsageError("--data needs --out FILE: what is calibrated is kept beside it")
        if self.needs.quality is not None and self.calibration is None and self.quality_from is None:
            raise UsageError(
                f"--quality {self.needs.quality:g} cannot be judged: the quality of a plan is unknown without --data FILE, to calibrate "
                "on, or --quality-from FILE"
            )
        if self.edge_dtype not in DTYPE_BYTES:
            raise UsageError(f"--edge-dtype {self.edge_dtype}: expected one of {', '.join(DTYPE_BYTES)}")
        counts = {"--prompt-tokens": self.prompt_tokens, "--device-threads": self.device_threads, "--cloud-threads": self.cloud_threads}
        for flag, value in {**counts, "--rank": self.rank}.items():
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value}: expected at least 1")
        if self.choose is not None and self.choose not in CHOICES and not self.choose.isdecimal():
            raise UsageError(f"--choose {self.choose}: expected a number of the table, or one of {', '.join(CHOICES)}")
        if self.out is not None:
            self._check_out(self.out)

    def _check_out(self, out: Path) -> None:
        if out.is_dir():
            raise UsageError(f"{out}: is a folder; give --out a file")
        if str(out) in NAMED:
            raise UsageError(f"--out {out}: `--plan {out}` names a plan that plora has; give the file another name, or write ./{out}.json")
        if not out.absolute().parent.is_dir():
            raise UsageError(f"{out}: there is no folder {out.absolute().parent}")
        check_new(out, self.replace)

    @property
    def kept(self) -> Path | None:
        """Where calibration results are kept."""
        return self.out.with_name(f"{self.out.name}.calibration.json") if self.out is not None else None
