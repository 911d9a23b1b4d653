"""Settings that a person may well type: refused in one line, before anything is loaded or sent."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest

from plora.artifact.errors import UsageError
from plora.cloud_server.config import Limits, ServerConfig
from plora.cloud_server.engine import Engine
from plora.device_runtime.sampling import Sampling

from .conftest import Made, command


@pytest.mark.parametrize("seconds", [math.inf, math.nan, 0.0, 5e6])
def test_idle_seconds_that_the_handshake_cannot_tell(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--idle-seconds"):
        ServerConfig(tmp_path, limits=Limits(idle_seconds=seconds))


def test_a_context_of_nothing(made: Made) -> None:
    with pytest.raises(UsageError, match="--context 0"):
        Engine(made.out / "cloud", 1 << 26, 0)


def test_a_kv_budget_beyond_the_machine(made: Made) -> None:
    with pytest.raises(UsageError, match="lower --kv-bytes"):
        Engine(made.out / "cloud", 1 << 60)


def test_a_negative_sampling_seed(made: Made) -> None:
    with pytest.raises(UsageError, match="seed -1"):
        Sampling(seed=-1)
    flags = ["--edge", str(made.out / "edge"), "--cloud", "127.0.0.1:1", "--seed", "-1"]
    result = subprocess.run([command("plora-device"), "generate", "hello", *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
