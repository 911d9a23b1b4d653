"""Imports the PrivateLoRA authors' own checkpoints (github.com/alipay/private_llm): a torch file of A, M and B per
layer and target, separate A, scale 1."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact.errors import AdapterError, DamagedFile, MissingFile, first_line
from ..artifact.names import core_name, down_name, up_name
from ..artifact.plan import TARGETS, AdaptedLayer, ExchangePlan, Source
from ..artifact.shape import DecoderShape
from .adapter import Adapter, check_shapes, make_adapter, replace_cores

KEY = re.compile(
    r"(?:.*\.)?layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<target>[a-z]+)_lora\.(?P<part>lora_A|lora_mobile|lora_B)(?:\.weight)?"
)
PARTS = ("lora_A", "lora_mobile", "lora_B")
PAPER_TARGETS = ("q", "k", "v")


def read_authors_checkpoint(path: Path, shape: DecoderShape) -> Adapter:
    """The adapter in `path`, for a decoder of `shape`. Base tensors beside it are ignored.

    Raises MissingFile, DamagedFile, AdapterError naming layer and part, PlanError.
    """
    parts = _parts(_load(path), path)
    plan = _plan(parts, shape, path)
    basis: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    for (layer, target), tensors in parts.items():
        basis[down_name(layer, target)] = tensors["lora_A"]
        basis[up_name(layer, target)] = tensors["lora_B"]
        cores[core_name(layer, target)] = tensors["lora_mobile"]
    adapter = make_adapter(plan, shape, basis, 1.0, "imported", 0, "", path.name)
    check_shapes(cores, plan.trained, str(path))
    return replace_cores(adapter, cores)


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MissingFile(f"{path}: not found") from None
    except Exception as error:  # torch's restricted unpickler lets KeyError, IndexError and more through on damaged files
        raise DamagedFile(f"{path}: not a torch file of tensors: {first_line(error)}") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise AdapterError(f"{path}: holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def _parts(state: dict[str, Any], path: Path) -> dict[tuple[int, str], dict[str, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None or not isinstance(tensor, Tensor):
            continue
        target = match["target"]
        if target not in PAPER_TARGETS:
            raise AdapterError(f"{path}: {key}: adapter on {target}; the authors' formula feeds q, k and v from the layer's input norm")
        if tensor.ndim != 2:
            raise AdapterError(f"{path}: {key}: shape {list(tensor.shape)}, expected two dimensions")
        found.setdefault((int(match["layer"]), target), {})[match["part"]] = tensor.float().contiguous()
    if not found:
        raise AdapterError(f"{path}: no key like model.layers.0.self_attn.q_lora.lora_A.weight among its {len(state)} keys")
    for (layer, target), tensors in found.items():
        for part in PARTS:
            if part not in tensors:
                raise AdapterError(f"{path}: layer {layer}, target {target}: {part} is missing")
    return dict(sorted(found.items(), key=lambda item: (item[0][0], TARGETS.index(item[0][1]))))


def _plan(parts: dict[tuple[int, str], dict[str, Tensor]], shape: DecoderShape, path: Path) -> ExchangePlan:
    layers = sorted({layer for layer, _ in parts})
    if layers[-1] >= shape.layers:
        raise AdapterError(f"{path}: adapts layer {layers[-1]}, but the base has layers 0..{shape.layers - 1}")
    sources = []
    adapted = []
    for layer in layers:
        targets = [target for target in TARGETS if (layer, target) in parts]
        sources.append(Source(layer, tuple((target, parts[layer, target]["lora_A"].shape[0]) for target in targets)))
        adapted.append(AdaptedLayer(layer, layer, tuple((target, parts[layer, target]["lora_B"].shape[1]) for target in targets)))
    return ExchangePlan(shape.layers, 0, 0, tuple(sources), tuple(adapted))
