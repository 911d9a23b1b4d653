"""What the unsplit model with its adapter computes, recorded before it is taken apart: verification compares with this.

All in fp32, whatever the checkpoint is stored in. The record holds private values (injections): it stays with the exporter,
in neither half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from ..models.adapter import Adapter, replace_cores
from ..models.checkpoint import Base
from ..models.formula import adapted

REFERENCE = "reference.safetensors"
PROBE_TEXT = "The lighthouse keeper writes down the weather every morning, and the wind every"
RANDOM_TOKENS = 8
GREEDY_TOKENS = 24
GREEDY_TOKENS_WIDENED = 4
"""A checkpoint in 16 bits is widened layer by layer for every step: exact, and slow."""
SEED = 20231123
OTHER_CORES = 0.1
"""Standard deviation of the noise: enough to move the exit by far more than rounding, whatever the plan."""


def probe_tokens(tokenizer: Any, vocabulary: int) -> list[int]:
    """A little text, then a few tokens from anywhere in the vocabulary."""
    text = tokenizer(PROBE_TEXT, add_special_tokens=True)["input_ids"]
    text = [token for token in text if token < vocabulary] or [0]
    anywhere = torch.randint(0, vocabulary, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(SEED)).tolist()
    return anywhere + text


@torch.no_grad()
def record_reference(base: Base, adapter: Adapter, tokenizer: Any, path: Path) -> None:
    """Runs the oracle on the probe and writes `path`: ids; embedded, entry, compressed and injection of each exchange (-1: the
    entry's), exit, residual (before the final norm); logits of the last token, greedy tokens with their top-2 gaps; and the exit
    with other cores, so that all of B and P is compared though an adapter's own cores be zero."""
    model, plan = base.model, adapter.config.plan
    ids = torch.tensor([probe_tokens(tokenizer, base.shape.vocabulary)])
    ids = ids[:, : max(1, base.shape.context_tokens // 2)]
    kept: dict[str, Tensor] = {"ids": ids[0]}
    layers = (*model.model.layers, model.model.norm)
    with widened(model), adapted(model, adapter, torch.float32) as cores, torch.no_grad():
        places = {"entry": layers[plan.front_layers], "exit": layers[plan.layers - plan.back_layers], "residual": layers[-1]}
        hooks = [module.register_forward_pre_hook(_keep(kept, name)) for name, module in places.items()]
        logits = model(ids).logits[0]
        for hook in hooks:
            hook.remove()
        kept["embedded"] = model.model.embed_tokens(ids)[0].float()
        kept["logits"] = logits[-1].float()
        for exchange in plan.all_exchanges:
            downs = [name for name, _ in plan.source(exchange.source).ranks]
            kept[f"compressed.{exchange.index}"] = torch.cat([cores.compressed[exchange.source, name][0] for name in downs], -1)
            kept[f"injection.{exchange.index}"] = cores.injection(exchange)[0]
        room = base.shape.context_tokens - ids.shape[1]
        wanted = min(GREEDY_TOKENS if model.dtype == torch.float32 else GREEDY_TOKENS_WIDENED, room)
        kept["greedy"], kept["gaps"] = greedy(model, ids, wanted)
    others = {name: torch.from_numpy(core) for name, core in other_cores({n: c.numpy() for n, c in adapter.cores.items()}).items()}
    with widened(model), adapted(model, replace_cores(adapter, others), torch.float32), torch.no_grad():
        hook = layers[plan.layers - plan.back_layers].register_forward_pre_hook(_keep(kept, "other_exit"))
        model(ids)
        hook.remove()
    path.touch(mode=0o600)
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in kept.items()}))


def other_cores(cores: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Every core with noise upon it, the same for the same names and shapes: what no persona has."""
    random = np.random.default_rng(SEED)
    return {name: cores[name] + (OTHER_CORES * random.standard_normal(cores[name].shape)).astype(np.float32) for name in sorted(cores)}


def _keep(kept: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any) -> None:
        kept[name] = inputs[0][0].float().clone()

    return hook


def greedy(model: Any, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` greedy tokens after ids [1, T] and the logit gap between the two best at each."""
    tokens, gaps, past, feed = [], [], None, ids
    for _ in range(count):
        output = model(feed, past_key_values=past, use_cache=True)
        past = output.past_key_values
        best = output.logits[0, -1].float().topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(float(best.values[0] - best.values[1]))
        feed = best.indices[:1][None]
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(gaps, dtype=torch.float32)


@contextmanager
def widened(model: Any) -> Iterator[None]:
    """The model computes in fp32 inside the block; a 16-bit one is widened layer by layer as it runs (exact both ways), so
    that no second copy of it is ever in memory."""
    dtype = model.dtype
    if dtype == torch.float32:
        yield
        return
    handles = []
    for module in (*model.model.layers, model.model.norm, model.lm_head):
        handles.append(module.register_forward_pre_hook(_widen))
        handles.append(module.register_forward_hook(_narrow(dtype)))
    handles.append(model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.float()))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _widen(module: nn.Module, inputs: Any) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.float()


def _narrow(dtype: torch.dtype) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)

    return hook
