"""What an export is asked for, and its stages. Light: imports no framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import UsageError

CLOUD_DTYPES = ("fp32", "fp16", "bf16")
EDGE_DTYPES = ("fp32", "fp16")
STAGES = ("read the checkpoint", "record the unsplit model", "write the edge half", "write the cloud half", "hash", "verify")


@dataclass(frozen=True)
class ExportConfig:
    """base: folder, hub id or GGUF; adapter: our folder or the authors' torch file; dtype: of the cloud's weights and cache;
    edge_dtype: of the tables and the device's layers."""

    base: str
    adapter: Path
    out: Path
    dtype: str = "fp32"
    edge_dtype: str = "fp32"
    replace: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in CLOUD_DTYPES:
            raise UsageError(f"--dtype {self.dtype}, expected one of {', '.join(CLOUD_DTYPES)}")
        if self.edge_dtype not in EDGE_DTYPES:
            raise UsageError(f"--edge-dtype {self.edge_dtype}, expected one of {', '.join(EDGE_DTYPES)}")
