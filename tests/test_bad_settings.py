"""Settings that a person may well type: refused in one line, before anything is loaded or sent."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest

from plora.artifact import paper_plan
from plora.artifact.errors import DataError, UsageError
from plora.cloud_server.engine import Engine
from plora.cloud_server.serve import ServerConfig
from plora.cloud_server.service import Limits
from plora.device_runtime.sampling import Sampling
from plora.models.rows import read_rows, tokenize
from plora.models.tune import TuneConfig

from .conftest import Made, command, tiny_tokenizer


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


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_training_cannot_take(seed: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--seed"):
        TuneConfig("base", tmp_path / "rows", tmp_path / "out", lambda layers: paper_plan(layers, 2), seed=seed)


def test_a_negative_sampling_seed(made: Made) -> None:
    with pytest.raises(UsageError, match="seed -1"):
        Sampling(seed=-1)
    flags = ["--edge", str(made.out / "edge"), "--cloud", "127.0.0.1:1", "--seed", "-1"]
    result = subprocess.run([command("plora-device"), "generate", "hello", *flags], capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr


def test_rows_that_the_chat_template_refuses_are_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(300)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (row,) = read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="row 7: the chat template refuses it: roles must alternate"):
        tokenize(row, tokenizer, 64, "row 7")


def test_a_conversation_that_the_assistant_opens(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hello"}]}\n')
    with pytest.raises(DataError, match="line 1: the first message is the assistant's"):
        read_rows(tmp_path / "rows.jsonl")
