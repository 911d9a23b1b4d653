"""The model card of an adapter: what anyone may know of it. No text of a row, no name of a file."""

from __future__ import annotations

from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from ..artifact.names import ADAPTER_CONFIG, BASIS, CORES
from ..artifact.plan import TARGETS, ExchangePlan
from .adapter import AdapterConfig

BASES = {
    "random": "random A and B, from a seed",
    "svd": "A and B from the truncated SVD of the base's weights (LoRA-XS)",
    "pca": "A from the whitened principal components of the source layers' inputs on {text}, B from the base's weights",
    "imported": "imported",
}


def plan_words(plan: ExchangePlan) -> str:
    """The plan in one line."""
    targets = {column.target for column in plan.columns}
    shared = sorted({source.shared_injection for source in plan.sources if source.shared_injection})
    parts = [
        f"{plan.round_trips} round trip{'s' * (plan.round_trips > 1)} per token ({len(plan.exchanges)} exchanges)",
        f"{plan.front_layers} front and {plan.back_layers} back of {plan.layers} layers on the device",
        f"targets {','.join(target for target in TARGETS if target in targets)}",
        f"rank {_range(rank for source in plan.sources for _, rank in source.ranks)}",
        f"cores {_range(core.out_rank for core in plan.cores)} rows",
    ]
    if shared:
        parts.append(f"shared injection of {_range(shared)} values")
    if features := {source.features for source in plan.sources if source.features}:
        parts.append(f"cores of {_range(features)} private features")
    return ", ".join(parts)


def card(config: AdapterConfig, base: str, folder: str, summary: dict[str, Any], learning_rate: float, own_text: bool) -> str:
    """README.md of an adapter folder. own_text: the calibration text was the user's."""
    losses = f"training {summary['train_loss']:.4f} (token accuracy {summary['train_accuracy']:.3f})"
    if "held_out_loss" in summary:
        losses += f", held-out {summary['held_out_loss']:.4f} (token accuracy {summary['held_out_accuracy']:.3f})"
    kind = BASES[config.basis_kind].format(text="a text of the user's" if own_text else "the text that comes with plora")
    versions = ", ".join(f"{name} {version(name)}" for name in ("plora", "torch", "transformers"))
    return f"""# PrivateLoRA adapter for {base}

| | |
|---|---|
| base | {base}, fingerprint `{config.base[:16]}` |
| exchange plan | {plan_words(config.plan)} |
| basis | {kind}; scale {config.scale:g}, seed {config.seed}, hash `{config.basis[:16]}` |
| trained parameters | {summary["parameters"]:,} |
| data | {summary["rows"]:,} rows, {summary["held_out_rows"]:,} held out |
| training | {summary["steps"]:,} steps, peak learning rate {learning_rate:g} |
| loss per response token | {losses} |
| made with | {versions}, {datetime.now(UTC):%Y-%m-%d} |

## Use

```sh
plora-export BASE --adapter {folder} --out out                                       # cloud half and edge half
plora-export BASE --adapter {folder} --cores-only --exported out --out {folder}-cores  # for an export of the same basis
plora-tune BASE --data rows.jsonl --basis {folder} --out other                       # another persona on this basis
```

## Who may see what

`{ADAPTER_CONFIG}`, `{BASIS}` and this file are public: they are the same for every persona, but for the figures above.
`{CORES}` and `metrics.jsonl` are private to the person whose rows these were: keep them on their devices.
"""


def _range(values: Any) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"
