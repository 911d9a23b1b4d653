"""The flags that name an exchange plan, for every command that takes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from ..artifact.errors import UsageError
from ..artifact.plan import TARGETS, ExchangePlan
from ..artifact.plans import QKV, entry_plan, grouped_plan, read_plan

NAMED = ("paper", "grouped", "entry")
PLAN_FLAGS = (
    *("plan", "group", "front_layers", "back_layers", "rank", "out_rank", "targets", "separate", "shared_injection"),
    "core_features",
)
Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class PlanChoice:
    """A plan before the number of layers is known. name: one of NAMED, or the path of a plan's JSON file; ranks: one, or one per
    source; targets: None for the plan's own; group: of a grouped plan; out_rank: None for the rank; core_features: of every source."""

    name: str = "paper"
    ranks: tuple[int, ...] = (64,)
    targets: tuple[str, ...] | None = None
    group: int = 6
    front_layers: int = 0
    back_layers: int = 0
    out_rank: int | None = None
    separate: bool = False
    shared_injection: int = 0
    core_features: int = 0

    def plan(self, layers: int) -> ExchangePlan:
        """For a decoder of `layers` layers. Raises PlanError, and for a file MissingFile, DamagedFile, ManifestError."""
        if self.name not in NAMED:
            if not Path(self.name).exists():
                raise UsageError(f"--plan {self.name}: not one of {', '.join(NAMED)}, and no such file")
            return read_plan(Path(self.name))
        targets = self.targets or (QKV if self.name == "paper" else TARGETS)
        shape = (self.ranks, targets, self.out_rank, self.separate, self.shared_injection)
        if self.name == "entry":
            return entry_plan(layers, self.front_layers, *shape, self.back_layers, self.core_features)
        group = 1 if self.name == "paper" else self.group
        return grouped_plan(layers, group, *shape, self.front_layers, self.back_layers, features=self.core_features)


def plan_options(function: Command) -> Command:
    """Adds the flags; the command receives them as keyword arguments, from which `chosen_plan` takes its own."""
    options = [
        click.option(
            "--plan",
            metavar="PLAN",
            help="paper (one exchange per layer), grouped (one per --group layers), entry (none: one round trip per token), or a JSON "
            "file with a plan of your own. [default: paper]",
        ),
        click.option("--group", type=int, metavar="N", help="Layers that one exchange of a grouped plan serves. [default: 6]"),
        click.option("--front-layers", type=int, metavar="N", help="First decoder layers, run on the device. [default: 0]"),
        click.option("--back-layers", type=int, metavar="N", help="Last decoder layers, run on the device. [default: 0]"),
        click.option(
            "--rank", metavar="R[,R…]", help="Rank of the down-projections A: one for all sources, or one per source. [default: 64]"
        ),
        click.option("--out-rank", type=int, metavar="R", help="Rows of every core M. [default: the rank]"),
        click.option(
            "--targets",
            metavar="LIST",
            help=f"Projections to adapt, of {','.join(TARGETS)}. [default: q,k,v under the paper's plan, else all]",
        ),
        click.option("--separate", is_flag=True, help="One A per target, as in the authors' checkpoints. [default: one A per source]"),
        click.option(
            "--shared-injection",
            type=int,
            metavar="K",
            help="One core [K, rank] per exchange, whose K values the cloud expands for all layers and targets. [default: off]",
        ),
        click.option(
            "--core-features",
            type=int,
            metavar="N",
            help="Non-linear cores: they read N private features that the device makes of each source's compressed. [default: off]",
        ),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def chosen_plan(flags: dict[str, Any]) -> PlanChoice | None:
    """Takes the plan's flags out of `flags`; None if none was given. Raises UsageError for flags that do not go together."""
    given = {
        name: value
        for name in PLAN_FLAGS
        if (value := flags.pop(name)) is not None and value is not False  # 0 is given, and may be refused
    }
    if not given:
        return None
    name = given.pop("plan", "grouped" if "group" in given else "paper")
    if name not in NAMED and given:
        raise UsageError(f"--plan {name} is a file and says everything; leave out {', '.join(_flag(other) for other in given)}")
    if "group" in given and name != "grouped":
        raise UsageError(f"--group {given['group']} goes with --plan grouped, not {name}")
    ranks = given.pop("rank", "64")
    targets = given.pop("targets", None)
    names = tuple(part.strip() for part in targets.split(",")) if targets else None
    return PlanChoice(name=name, ranks=_numbers(ranks), targets=names, **given)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--rank {text}: expected a number, or numbers with commas between them") from None
