"""plora-tune: every plan and basis learns, a run resumes bit for bit, what cannot go on says so, private stays private."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.errors import DataError, ModelError, PlanError, PloraError, UsageError
from plora.artifact.names import ADAPTER_CONFIG, BASIS, CORES
from plora.models import tune as tuning
from plora.models.adapter import read_adapter
from plora.models.checkpoint import read_base, read_tokenizer
from plora.models.formula import adapted
from plora.models.plan_flags import PlanChoice
from plora.models.report import Report
from plora.models.rows import IGNORED, read_examples
from plora.models.schedule import split
from plora.models.trainer import CoresTrainer, Tuned
from plora.models.tune import CARD, METRICS, Interrupted, tune
from plora.models.tune_cli import main
from plora.models.tune_config import LEARNING_RATES, TuneConfig
from plora.models.unfinished import Unfinished

from .conftest import command, save_tiny_base

ROWS = [{"prompt": f"what is {n}?", "response": f"it is {'quick ' * (n % 4)}{n * n}"} for n in range(24)]
PLANS: dict[str, Callable[[int], ExchangePlan]] = {
    "paper": lambda layers: paper_plan(layers, 6),
    "separate": lambda layers: paper_plan(layers, 6, separate=True),
    "grouped": lambda layers: grouped_plan(layers, 2, (6, 4), ("q", "o", "gate", "down")),
    "entry": PlanChoice("entry", (6,), front_layers=1).plan,
    "shared": lambda layers: entry_plan(layers, 1, 6, shared_injection=12, back_layers=1),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and rows. Do not change them."""
    folder = tmp_path_factory.mktemp("tune")
    save_tiny_base(folder / "base", "llama")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def config(work: Path, out: Path, **changes: Any) -> TuneConfig:
    settings: dict[str, Any] = {"plan": PLANS["entry"], "steps": 12, "device": "cpu", "save_every": 3, **changes}
    return TuneConfig(str(work / "base"), work / "rows.jsonl", out, **settings)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


class Interrupt(Report):
    """Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def advance(self, step: int, of: int) -> None:
        if step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("plan", "kind"),
    [(plan, kind) for plan in PLANS for kind in ("random", "pca")] + [("paper", "svd"), ("separate", "svd"), ("entry", "svd")],
)
def test_every_plan_and_basis_learns(plan: str, kind: str, work: Path, tmp_path: Path) -> None:
    summary = tune(config(work, tmp_path / "out", plan=PLANS[plan], basis_kind=kind, steps=16, held_out_share=0.2))
    first = next(record for record in records(tmp_path / "out") if "held_out_loss" in record)
    assert first["step"] == 0
    assert summary["held_out_loss"] < first["held_out_loss"] - 0.05
    adapter = read_adapter(tmp_path / "out")
    assert adapter.config.plan == PLANS[plan](3)
    assert (adapter.config.basis_kind, summary["parameters"]) == (kind, sum(core.numel() for core in adapter.cores.values()))
    assert all(core.abs().max() > 0 for core in adapter.cores.values())


def test_held_out_metrics_are_those_of_the_adapter(work: Path, tmp_path: Path) -> None:
    """Loss and token accuracy, once more, by transformers' own loss with the written adapter, on rows not trained on."""
    summary = tune(config(work, tmp_path / "out", held_out_share=0.25, steps=40, learning_rate=0.03, seed=5))
    base = read_base(str(work / "base"))
    _, held = split(read_examples(work / "rows.jsonl", read_tokenizer(base.source), 512), 0.25, 5)
    loss = right = tokens = 0.0
    with adapted(base.model, read_adapter(tmp_path / "out")), torch.no_grad():
        for row in held:
            labels = torch.tensor([row.labels])
            out = base.model(torch.tensor([row.input_ids]), labels=labels)
            counted = labels[:, 1:] != IGNORED
            tokens += int(counted.sum())
            loss += float(out.loss) * int(counted.sum())
            right += int(((out.logits[:, :-1].argmax(-1) == labels[:, 1:]) & counted).sum())
    assert (summary["rows"], summary["held_out_rows"]) == (18, 6)
    assert summary["held_out_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert summary["held_out_accuracy"] == pytest.approx(right / tokens)
    assert 0.1 < summary["held_out_accuracy"] < 1


def test_metrics_come_at_their_steps(work: Path, tmp_path: Path) -> None:
    others = [{**row, "prompt": f"tell me, {row['prompt']}"} for row in ROWS]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    tune(config(work, tmp_path / "out", held_out=tmp_path / "held_out.jsonl", steps=40, eval_every=16, save_every=100))
    *found, summary = records(tmp_path / "out")
    assert [record["step"] for record in found if "held_out_loss" in record] == [0, 16, 32, 40]
    assert [record["step"] for record in found if "loss" in record] == list(range(2, 41, 2))
    assert summary["train_loss"] == found[-2]["loss"]


def test_held_out_rows_that_are_trained_on_are_refused(work: Path, tmp_path: Path) -> None:
    others = [{"prompt": "what is new?", "response": "this"}, ROWS[6] | {"prompt": ROWS[6]["prompt"].upper() + "  "}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    with pytest.raises(DataError, match=r"held_out.jsonl: 1 of 2 held-out rows are trained on: row 2 is row 7 of .*rows.jsonl; take"):
        tune(config(work, tmp_path / "out", held_out=tmp_path / "held_out.jsonl"))
    assert not (tmp_path / "out.unfinished").exists()


def test_accumulation_is_a_larger_batch(work: Path, tmp_path: Path) -> None:
    tune(config(work, tmp_path / "one", batch_size=8))
    tune(config(work, tmp_path / "four", batch_size=2, accumulate=4))
    tune(config(work, tmp_path / "other", batch_size=4))
    one, four, other = (read_adapter(tmp_path / name).cores for name in ("one", "four", "other"))
    assert max(float((one[name] - four[name]).abs().max()) for name in one) < 1e-5
    assert max(float((one[name] - other[name]).abs().max()) for name in one) > 1e-3


def test_two_processes_are_a_larger_batch(work: Path, tmp_path: Path) -> None:
    """By gloo, as `accelerate launch` starts GPUs by NCCL."""
    flags = ["--plan", "entry", "--front-layers", "1", "--rank", "6", "--basis-kind", "random", "--steps", "6", "--held-out-share", "0.2"]
    arguments = [str(work / "base"), "--data", str(work / "rows.jsonl"), *flags, "--device", "cpu", "--json"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "plora.models.tune_cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    many = subprocess.run(
        [*launcher, *arguments, "--out", str(tmp_path / "many"), "--batch-size", "4"], capture_output=True, text=True, timeout=120, env=environment
    )  # fmt: skip
    assert many.returncode == 0, many.stderr
    assert many.stderr.count("step 6/6: loss") == 1  # one process speaks
    summary = tune(config(work, tmp_path / "one", steps=6, held_out_share=0.2, save_every=None))
    told = json.loads(many.stdout)
    for name in ("train_loss", "held_out_loss", "held_out_accuracy"):
        assert told[name] == pytest.approx(summary[name], rel=1e-5)
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "many")
    assert one.config == two.config
    assert max(float((one.cores[name] - two.cores[name]).abs().max()) for name in one.cores) < 1e-5


# Going on


@pytest.mark.parametrize("step", [4, 12])
def test_a_resumed_run_ends_bit_for_bit_as_an_undisturbed_one(step: int, work: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"basis_kind": "pca", "held_out_share": 0.2, "accumulate": 2, "batch_size": 3, "eval_every": 2}
    tune(config(work, tmp_path / "whole", **changes))
    with pytest.raises(Interrupted, match=f"saved up to step {step // 3 * 3 if step < 12 else 9} of 12"):
        tune(config(work, tmp_path / "out", **changes), Interrupt(step))
    left = Unfinished.of(tmp_path / "out").folder
    assert stat.S_IMODE(left.stat().st_mode) == 0o700
    assert [path.name for path in left.glob("checkpoint-*")] == [f"checkpoint-{3 if step == 4 else 9}"]
    assert not (tmp_path / "out").exists()
    assert sum(path.stat().st_size for path in left.rglob("*")) < (work / "base" / "model.safetensors").stat().st_size  # not the base
    watcher = Interrupt(-1)
    tune(config(work, tmp_path / "out", **changes), watcher)
    assert watcher.notes == [f"resuming at step {3 if step == 4 else 9} of 12"]
    assert (tmp_path / "whole" / CORES).read_bytes() == (tmp_path / "out" / CORES).read_bytes()
    assert (tmp_path / "whole" / BASIS).read_bytes() == (tmp_path / "out" / BASIS).read_bytes()
    assert records(tmp_path / "whole")[:-1] == records(tmp_path / "out")[:-1]  # the last one has the seconds
    assert not left.exists()


def test_a_save_that_is_cut_short_leaves_the_one_before(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: CoresTrainer, folder: str) -> None:
        if self.state.global_step == 9:
            raise OSError("disk full")
        real(self, folder)

    real = CoresTrainer._save_optimizer_and_scheduler
    monkeypatch.setattr(CoresTrainer, "_save_optimizer_and_scheduler", cut)
    with pytest.raises(PloraError, match=r"disk full; saved up to step 6 of 12: the same command resumes there"):
        tune(config(work, tmp_path / "out"))
    monkeypatch.undo()
    left = Unfinished.of(tmp_path / "out")
    assert (left.writing / "checkpoint-9" / CORES).exists()
    watcher = Interrupt(-1)
    tune(config(work, tmp_path / "out"), watcher)
    assert watcher.notes == ["resuming at step 6 of 12"]
    tune(config(work, tmp_path / "whole"))
    assert (tmp_path / "whole" / CORES).read_bytes() == (tmp_path / "out" / CORES).read_bytes()


def test_a_checkpoint_that_does_not_fit_is_told(work: Path, tmp_path: Path) -> None:
    """A limit of file sizes that torch.save meets first, which reports a full disk as an error of its own kind."""
    out = tmp_path / "out"
    flags = ["--plan", "entry", "--front-layers", "1", "--rank", "6", "--basis-kind", "random", "--steps", "3", "--device", "cpu"]
    arguments = [str(work / "base"), "--data", str(work / "rows.jsonl"), "--out", str(out), *flags]
    limits = (14_000, 14_000)
    done = subprocess.run(
        [command("plora-tune"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    )
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: \S+/out.unfinished/partial: the checkpoint cannot be written \(.+\); is the disk full\?; nothing saved yet: the same "
        r"command starts anew",
        done.stderr.strip(),
    )
    assert [path.name for path in tmp_path.iterdir()] == []


def test_an_adapter_that_does_not_fit_is_written_by_the_same_command(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuning, "write_adapter", full)
    with pytest.raises(PloraError, match=r"No space left on device; saved up to step 12 of 12: the same command resumes there"):
        tune(config(work, tmp_path / "out"))
    monkeypatch.undo()
    watcher = Interrupt(-1)
    tune(config(work, tmp_path / "out"), watcher)
    assert watcher.notes == ["resuming at step 12 of 12"]
    tune(config(work, tmp_path / "whole"))
    assert (tmp_path / "whole" / CORES).read_bytes() == (tmp_path / "out" / CORES).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_command_resumes(number: signal.Signals, work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--plan", "entry", "--front-layers", "1", "--rank", "6", "--basis-kind", "random", "--steps", "60", "--save-every", "3"]
    arguments = [str(work / "base"), "--data", str(work / "rows.jsonl"), "--out", str(out), *flags, "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [command("plora-tune"), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    left = Unfinished.of(out)
    while left.latest() is None and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 130), stderr
    if number == signal.SIGINT:
        assert "of 60: the same command resumes there" in stderr
        assert "Traceback" not in stderr
        again = subprocess.run([command("plora-tune"), *arguments, "--json"], capture_output=True, text=True, timeout=120, env=environment)
        assert json.loads(again.stdout)["steps"] == 60  # alone on standard output
        assert "resuming at step " in again.stderr
    else:
        watcher = Interrupt(-1)
        tune(config(work, out, steps=60), watcher)
        assert watcher.notes[0].startswith("resuming at step ")
    tune(config(work, tmp_path / "whole", steps=60))
    assert (tmp_path / "whole" / CORES).read_bytes() == (out / CORES).read_bytes()
    assert not left.folder.exists()


def test_ctrl_c_before_the_first_checkpoint_leaves_nothing(work: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="nothing saved yet"):
        tune(config(work, tmp_path / "out"), Interrupt(2))
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_resume(work: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        tune(config(work, tmp_path / "out"), Interrupt(7))
    with pytest.raises(UsageError, match=r"other settings \(--learning-rate: not given then, 0.5 now; --seed: 0 then, 9 now\).*--restart"):
        tune(config(work, tmp_path / "out", seed=9, learning_rate=0.5))
    (tmp_path / "more.jsonl").write_text((work / "rows.jsonl").read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(UsageError, match=r"\(--data: SHA-256 \w+ then, SHA-256 \w+ now\)"):
        tune(dataclasses.replace(config(work, tmp_path / "out"), data=tmp_path / "more.jsonl"))
    with pytest.raises(UsageError, match=r"\(plan: .* then, .* now\)"):
        tune(config(work, tmp_path / "out", plan=PLANS["paper"]))
    with Unfinished.of(tmp_path / "out").held(), pytest.raises(UsageError, match="another plora-tune is at work"):
        tune(config(work, tmp_path / "out"))
    watcher = Interrupt(-1)
    tune(config(work, tmp_path / "out", seed=9, restart=True), watcher)
    assert watcher.notes == []


def test_a_folder_of_somebody_else_is_left_alone(work: Path, tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="not left by plora-tune"):
        tune(config(work, tmp_path / "out"))
    with pytest.raises(UsageError, match="not left by plora-tune"):
        tune(config(work, tmp_path / "out", restart=True))
    assert (tmp_path / "out.unfinished" / "thesis.txt").read_text() == "mine"


def test_a_run_at_work_is_neither_resumed_nor_restarted(work: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(config(work, tmp_path / "out"), Interrupt(9))
    unfinished = Unfinished.of(tmp_path / "out")
    step = unfinished.latest()
    with unfinished.held():
        for restart in (False, True):
            with pytest.raises(UsageError, match="another plora-tune is at work there"):
                tune(config(work, tmp_path / "out", restart=restart))
        assert unfinished.latest() == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.unfinished"]


def test_a_plan_that_does_not_fit_the_base_is_refused_before_anything_is_made(work: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="out_rank 4096 exceeds the hidden size 48"):
        tune(config(work, tmp_path / "out", plan=lambda layers: entry_plan(layers, 0, 6, out_rank=4096)))
    assert list(tmp_path.iterdir()) == []


# What ends a run


def test_a_loss_that_is_no_number_is_refused_at_its_step(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def forward(self: Tuned, packs: Any) -> Any:
        calls.append(1)
        out = real(self, packs)
        return {**out, "loss": out["loss"] * float("nan")} if len(calls) == 8 else out

    real = Tuned.forward
    monkeypatch.setattr(Tuned, "forward", forward)
    with pytest.raises(
        ModelError, match=r"the loss is nan at step 8 of 12 \(learning rate \S+, rows \d+, .*\d\); lower --learning-rate"
    ) as refused:
        tune(config(work, tmp_path / "out", batch_size=4))
    assert len(calls) == 8
    numbers = str(refused.value).split("rows ")[1].split(")")[0].split(", ")
    assert len(numbers) == 4 and all(1 <= int(number) <= 24 for number in numbers)
    assert list(tmp_path.iterdir()) == []  # not even the checkpoint at step 6: it leads nowhere else


def test_a_gradient_that_is_no_number_is_refused_before_it_is_applied(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*arguments: Any) -> Tuned:
        model = Tuned(*arguments)
        next(iter(model.cores.parameters())).register_hook(lambda gradient: gradient * float("inf"))
        return model

    monkeypatch.setattr("plora.models.tune.Tuned", make)
    with pytest.raises(ModelError, match="the gradient's norm is nan at step 1 of 12"):
        tune(config(work, tmp_path / "out"))


def test_a_learning_rate_that_is_too_large_is_named(work: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"at step [34] of 12 \(learning rate .*e\+[23]\d, rows"):
        tune(config(work, tmp_path / "out", learning_rate=1e38, plan=PLANS["paper"]))


def test_a_plan_without_adapters_is_refused(work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="adapts no layer"):
        tune(config(work, tmp_path / "out", plan=lambda layers: ExchangePlan(layers, 0, 0, (), ())))
    with pytest.raises(PlanError, match="ranks for"):
        tune(config(work, tmp_path / "out", plan=PlanChoice("grouped", (1, 2, 3, 4, 5)).plan))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed"),
        ({"steps": 0}, "--steps 0: expected more than 0"),
        ({"epochs": float("nan")}, "--epochs nan"),
        ({"learning_rate": -1.0}, "--learning-rate -1.0"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"eval_every": 0}, "--eval-every 0"),
        ({"save_every": -1}, "--save-every -1"),
        ({"held_out_share": 0.5}, "--held-out-share 0.5: expected more than 0 and less than 0.5"),
        ({"held_out_share": 0.2, "held_out": Path("rows")}, "either --held-out FILE or --held-out-share"),
        ({"device": "tpu"}, "--device tpu"),
        ({"basis_kind": "fourier"}, "--basis-kind fourier"),
        ({"calibration": Path("text")}, "--calibration text goes with --basis-kind pca"),
        ({"basis": Path("other")}, "give one of the two"),
        ({"plan": None}, "give one of the two"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], complaint: str, work: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=complaint):
        config(work, tmp_path / "out", **changes)


# The command and its files


def test_files_and_who_may_see_them(work: Path, tmp_path: Path) -> None:
    plan = PLANS["shared"]
    summary = tune(config(work, tmp_path / "out", plan=plan, basis_kind="pca", held_out_share=0.2))
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "out").iterdir()}
    assert {name for name, mode in modes.items() if not mode} == {CORES, METRICS}
    assert {name for name, mode in modes.items() if mode} == {CARD, ADAPTER_CONFIG, BASIS}
    text = (tmp_path / "out" / CARD).read_text()
    facts = [
        "adapter for base",
        "1 round trip per token (0 exchanges)",
        "1 front and 1 back of 3 layers",
        "targets q,k,v,o,gate,up,down",
        "rank 6",
    ]
    facts += [
        "shared injection of 12 values",
        "principal components",
        "that comes with plora",
        "19 rows, 5 held out",
        "12 steps",
        "rate 0.01",
    ]
    facts += [
        f"{summary['parameters']:,}",
        f"{summary['held_out_loss']:.4f}",
        f"{summary['train_loss']:.4f}",
        "torch 2.",
        "plora-export BASE",
    ]
    assert [fact for fact in facts if fact not in text] == []
    for row in ROWS:
        assert row["prompt"] not in text and row["response"] not in text
    assert "rows.jsonl" not in text.replace("--data rows.jsonl", "") and str(work) not in text


def test_another_persona_on_the_same_basis(work: Path, tmp_path: Path) -> None:
    tune(config(work, tmp_path / "first", basis_kind="pca"))
    tune(config(work, tmp_path / "second", plan=None, basis=tmp_path / "first", seed=1))
    first, second = (read_adapter(tmp_path / name) for name in ("first", "second"))
    assert first.config == second.config
    assert any(not torch.equal(first.cores[name], second.cores[name]) for name in first.cores)
    for flags, named in ((["--rank", "4"], "plan flags"), (["--basis-kind", "svd"], "--basis-kind"), (["--scale", "2"], "--scale")):
        arguments = [
            str(work / "base"),
            "--data",
            str(work / "rows.jsonl"),
            "--out",
            str(tmp_path / "x"),
            "--basis",
            str(tmp_path / "first"),
        ]
        result = CliRunner().invoke(main, [*arguments, *flags])
        assert result.exit_code == 2 and f"either plan flags or --basis: {tmp_path / 'first'} brings its plan" in result.stderr
        assert f"leave out {named}" in result.stderr


@pytest.mark.parametrize(
    ("flags", "kind"), [([], "random"), (["--plan", "grouped"], "pca"), (["--plan", "entry"], "pca"), (["--plan", "entry", "--basis-kind", "svd"], "svd")]
)  # fmt: skip
def test_default_basis_of_each_plan(flags: list[str], kind: str, work: Path, tmp_path: Path) -> None:
    arguments = [
        str(work / "base"),
        "--data",
        str(work / "rows.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--rank",
        "6",
        "--steps",
        "2",
        *flags,
    ]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert read_adapter(tmp_path / "out").config.basis_kind == kind
    *metrics, last = result.stdout.splitlines()
    assert metrics and all(line.startswith("step ") for line in metrics)
    assert last.startswith(f"{tmp_path / 'out'}: ")
    assert result.stderr == ""


@pytest.mark.parametrize("kind", ["random", "svd", "pca"])
def test_learning_rate_of_each_basis(kind: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = CoresTrainer.train
    monkeypatch.setattr(CoresTrainer, "train", lambda self, **rest: (seen.append(self.args), real(self, **rest))[1])
    tune(config(work, tmp_path / "out", basis_kind=kind, plan=PLANS["paper"], steps=12))
    (arguments,) = seen
    assert (arguments.learning_rate, arguments.warmup_steps) == (LEARNING_RATES[kind], 5)
    assert (arguments.weight_decay, arguments.max_grad_norm, arguments.lr_scheduler_type) == (0.0, 1.0, "linear")
    rates = [record["learning_rate"] for record in records(tmp_path / "out") if "learning_rate" in record]
    assert max(rates) == LEARNING_RATES[kind]


def test_a_bad_row_is_named_before_anything_is_made(work: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: response is missing"):
        tune(dataclasses.replace(config(work, tmp_path / "out"), data=tmp_path / "bad.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_half_precision_base_trains_cores_of_32_bits(work: Path, tmp_path: Path) -> None:
    save_tiny_base(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    tune(dataclasses.replace(config(work, tmp_path / "out"), base=str(tmp_path / "base")))
    assert {core.dtype for core in load_file(tmp_path / "out" / CORES).values()} == {torch.float32}
