"""The flags that name a plan: what each combination means, and which do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from plora.artifact import ExchangePlan, entry_plan, grouped_plan, paper_plan
from plora.artifact.errors import PlanError, UsageError
from plora.artifact.manifest import write_json
from plora.artifact.plan import TARGETS
from plora.models.plan_flags import PlanChoice, chosen_plan, plan_options

LAYERS = 12


def choice_of(*words: str) -> PlanChoice | None:
    """What `chosen_plan` makes of a command line, through click as in the commands; other flags are left alone."""
    found: list[PlanChoice | None] = []

    @click.command()
    @click.option("--seed", default=7)
    @plan_options
    def command(**flags: Any) -> None:
        found.append(chosen_plan(flags))
        assert flags == {"seed": 7}

    result = CliRunner().invoke(command, list(words), catch_exceptions=False, standalone_mode=False)
    assert result.exit_code == 0
    return found[0]


def plan_of(*words: str) -> ExchangePlan:
    choice = choice_of(*words)
    assert choice is not None
    return choice.plan(LAYERS)


MEANINGS: dict[str, ExchangePlan] = {
    "--plan paper": paper_plan(LAYERS, 64),
    "--rank 8": paper_plan(LAYERS, 8),
    "--rank 8 --targets v,q --separate": paper_plan(LAYERS, 8, ("q", "v"), separate=True),
    "--rank 8 --out-rank 4": paper_plan(LAYERS, 8, out_rank=4),
    "--separate": paper_plan(LAYERS, 64, separate=True),
    "--front-layers 2 --rank 8": grouped_plan(LAYERS, 1, 8, front_layers=2),
    "--plan grouped": grouped_plan(LAYERS, 6, 64, TARGETS),
    "--group 4 --rank 8,6,4": grouped_plan(LAYERS, 4, (8, 6, 4), TARGETS),
    "--plan grouped --group 5 --front-layers 1 --back-layers 2 --rank 8": grouped_plan(
        LAYERS, 5, 8, TARGETS, front_layers=1, back_layers=2
    ),
    "--group 3 --rank 8 --shared-injection 10 --targets q,k": grouped_plan(LAYERS, 3, 8, ("q", "k"), shared_injection=10),
    "--plan entry": entry_plan(LAYERS, 0, 64),
    "--plan entry --front-layers 4 --back-layers 1 --rank 8": entry_plan(LAYERS, 4, 8, back_layers=1),
    "--plan entry --rank 8 --shared-injection 32 --targets gate,down": entry_plan(LAYERS, 0, 8, ("gate", "down"), shared_injection=32),
    "--plan entry --rank 8 --core-features 16": entry_plan(LAYERS, 0, 8, features=16),
    "--rank 8 --core-features 16 --back-layers 1": grouped_plan(LAYERS, 1, 8, back_layers=1, features=16),
    "--group 3 --rank 8 --shared-injection 10 --core-features 5": grouped_plan(LAYERS, 3, 8, TARGETS, shared_injection=10, features=5),
    "--plan entry --separate --out-rank 3": entry_plan(LAYERS, 0, 64, separate=True, out_rank=3),
}


@pytest.mark.parametrize("words", MEANINGS)
def test_flags_mean_a_plan(words: str) -> None:
    assert plan_of(*words.split()) == MEANINGS[words]


def test_the_meanings_differ() -> None:
    assert len(set(MEANINGS.values())) == len(MEANINGS)  # else a flag that is ignored would pass


def test_no_flag_is_no_plan() -> None:
    assert choice_of() is None
    assert choice_of("--seed", "7") is None


def test_a_file_is_a_plan(tmp_path: Path) -> None:
    plan = entry_plan(LAYERS, 3, 5)
    write_json(tmp_path / "plan.json", plan)
    assert plan_of("--plan", str(tmp_path / "plan.json")) == plan
    with pytest.raises(UsageError, match=r"other\.json: not one of paper, grouped, entry, and no such file"):
        plan_of("--plan", str(tmp_path / "other.json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--plan p.json --rank 8", r"--plan p\.json is a file and says everything; leave out --rank"),
        ("--plan p.json --group 3 --front-layers 2 --separate", "leave out --group, --front-layers, --separate"),
        ("--plan p.json --shared-injection 4", "leave out --shared-injection"),
        ("--plan p.json --core-features 4", "leave out --core-features"),
        ("--plan p.json --front-layers 0", "leave out --front-layers"),
        ("--plan paper --group 3", "--group 3 goes with --plan grouped, not paper"),
        ("--plan entry --group 3", "--group 3 goes with --plan grouped, not entry"),
        ("--rank many", "--rank many: expected a number, or numbers with commas between them"),
        ("--rank 8,", "--rank 8,: expected a number"),
        ("--rank 8;6", "--rank 8;6: expected a number"),
    ],
)
def test_flags_that_do_not_go_together(words: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choice_of(*words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rank 0", "rank 0, expected at least 1"),
        ("--rank -3", "rank -3, expected at least 1"),
        ("--rank 8,6", "2 ranks for 12 sources"),
        ("--group 5 --rank 8,6", r"2 ranks for 3 sources \(layers 0, 5, 10\)"),
        ("--targets q,z", r"targets \['q', 'z'\]"),
        ("--targets q,q", r"targets \['q', 'q'\], expected some of .* each once"),
        ("--front-layers 12", "front_layers 12 and back_layers 0 must be >= 0 and leave the cloud at least one of 12 layers"),
        ("--plan entry --front-layers 8 --back-layers 4", "front_layers 8 and back_layers 4"),
        ("--plan entry --back-layers -1", "back_layers -1"),
        ("--group 0", "group of 0 layers"),
        ("--out-rank 0", "out_rank 0"),
        ("--group -2", "group of -2 layers, expected at least 1"),
        ("--plan entry --rank 2 --shared-injection 200", "source 0: a shared injection of 200 values stands for 168 only"),
        ("--plan entry --separate --core-features 8", "8 features with down-projections .* 'shared'"),
        ("--core-features -1", "source 0: -1 features"),
        ("--plan entry --separate --shared-injection 8", "expected 0, or 1 and more with one down-projection 'shared'"),
    ],
)
def test_plans_that_are_not_legal_are_refused_once_the_layers_are_known(words: str, message: str) -> None:
    choice = choice_of(*words.split())
    assert choice is not None
    with pytest.raises(PlanError, match=message):
        choice.plan(LAYERS)
