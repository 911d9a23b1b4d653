"""The sizes of a decoder, as both halves need them. Nothing here depends on where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import PlanError
from .plan import ExchangePlan

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
"""Bytes per value of the dtypes that weights and wire tensors may have."""


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: inverse frequencies in radians per token `[head_dim / 2]`, scaling included, and the
    factor on cos and sin that some scalings add (arXiv 2104.09864; yarn: arXiv 2309.00071)."""

    inv_freq: tuple[float, ...]
    attention_scaling: float


@dataclass(frozen=True)
class DecoderShape:
    """hidden, intermediate, vocabulary, head_dim: values per token; context_tokens: positions that the model was made for.

    windows: sliding window of each layer in tokens, the token itself included; 0 for full attention.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context_tokens: int
    epsilon: float
    windows: tuple[int, ...]
    rope: Rope

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def out_features(self, target: str) -> int:
        """Width of a target projection's output."""
        widths = {
            "q": self.query_width,
            "k": self.kv_width,
            "v": self.kv_width,
            "o": self.hidden,
            "gate": self.intermediate,
            "up": self.intermediate,
            "down": self.hidden,
        }
        return widths[target]

    def kv_bytes_per_token(self, dtype: str, layers: int) -> int:
        """KV cache bytes of one token over `layers` layers."""
        return 2 * self.kv_width * layers * DTYPE_BYTES[dtype]


def check_fits(plan: ExchangePlan, shape: DecoderShape) -> None:
    """Raises PlanError where the decoder's sizes make no sense, or the plan's layers or ranks do not fit it."""
    if plan.layers != shape.layers:
        raise PlanError(f"the plan is for {plan.layers} layers, the model has {shape.layers}")
    _check_sizes(shape)
    for source in plan.sources:
        for name, rank in source.ranks:
            if rank > shape.hidden:
                raise PlanError(f"source {source.layer}, down-projection {name}: rank {rank} exceeds the hidden size {shape.hidden}")
        if source.features > shape.intermediate:  # as wide as the base's own MLPs, and no wider: else it is no small part of a layer
            raise PlanError(f"source {source.layer}: {source.features} features exceed the intermediate size {shape.intermediate}")
    for adapted in plan.adapted:
        for target, out_rank in adapted.out_ranks:
            if out_rank > shape.hidden:
                raise PlanError(f"layer {adapted.layer}, target {target}: out_rank {out_rank} exceeds the hidden size {shape.hidden}")


def _check_sizes(shape: DecoderShape) -> None:
    for name in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocabulary", "context_tokens"):
        if getattr(shape, name) < 1:
            raise PlanError(f"{name} {getattr(shape, name)}, expected at least 1")
    if shape.heads % shape.kv_heads:
        raise PlanError(f"{shape.heads} heads do not share {shape.kv_heads} key-value heads evenly")
    if len(shape.windows) != shape.layers or min(shape.windows) < 0:
        raise PlanError(f"windows {list(shape.windows)}, expected one of 0 or more tokens for each of {shape.layers} layers")
    if len(shape.rope.inv_freq) * 2 != shape.head_dim:
        raise PlanError(f"{len(shape.rope.inv_freq)} rope frequencies, expected half of head_dim {shape.head_dim}")
