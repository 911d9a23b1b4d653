"""The edge half's files beside its graphs: tables, cores, tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact.edge_layout import layer_tensors
from ..artifact.manifest import write_json
from ..artifact.names import CHAT_TEMPLATE, CORES, ENTRY_DOWN, GENERATION, HEAD_TABLE, LAYERS, TABLE, TOKENIZER, down_name
from ..artifact.plan import ExchangePlan
from ..artifact.shape import DecoderShape
from ..models.adapter import Adapter, write_cores
from ..models.checkpoint import Base, is_tied
from ..models.formula import target_projection
from .edge_graphs import write_graphs
from .ort_files import write_ort_files

TABLE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
ROWS_AT_ONCE = 4096
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_edge(folder: Path, base: Base, tokenizer: Any, adapter: Adapter, dtype: str) -> list[str]:
    """Writes every file of the edge half but its manifest; returns their names."""
    return write_numbers(folder, base, adapter, dtype) + write_text_files(folder, base.model, tokenizer)


def write_numbers(folder: Path, base: Base, adapter: Adapter, dtype: str, ort: bool = True) -> list[str]:
    """Graphs, tables, layers and cores; returns the files' names. ort: the graphs as `.ort` too."""
    model = base.model
    plan = adapter.config.plan
    graphs = write_graphs(folder, plan, base.shape, model.model.norm.weight.detach().float().numpy(), dtype)
    names = [f"{graph}.onnx" for graph in graphs] + (write_ort_files(folder, graphs) if ort else [])
    write_table(model.model.embed_tokens.weight, folder / TABLE, TABLE_DTYPES[dtype])
    names.append(TABLE)
    if not is_tied(model):
        write_table(model.lm_head.weight, folder / HEAD_TABLE, TABLE_DTYPES[dtype])
        names.append(HEAD_TABLE)
    if plan.device_layers:
        write_layers(model, plan, base.shape, folder / LAYERS, TABLE_DTYPES[dtype])
        names.append(LAYERS)
    if plan.entry_exchange:
        write_entry_down(model, adapter, folder / ENTRY_DOWN)
        names.append(ENTRY_DOWN)
    write_cores(adapter, folder / CORES)
    return [*names, CORES]


def write_table(table: Tensor, path: Path, dtype: torch.dtype) -> None:
    """[V, H], row-major little-endian, converted a block of rows at a time."""
    with path.open("wb") as file:
        for rows in table.detach().split(ROWS_AT_ONCE):
            file.write(np.ascontiguousarray(rows.to(dtype).numpy()).data.cast("B"))


def write_layers(model: Any, plan: ExchangePlan, shape: DecoderShape, path: Path, dtype: torch.dtype) -> None:
    """The device's decoder layers, tensor by tensor as edge_layout.layer_tensors says."""
    with path.open("wb") as file:
        for index in plan.device_layers:
            layer = model.model.layers[index]
            parts = {
                "input_norm": [layer.input_layernorm],
                "qkv": [target_projection(layer, target) for target in ("q", "k", "v")],
                "o": [target_projection(layer, "o")],
                "mlp_norm": [layer.post_attention_layernorm],
                "gate_up": [target_projection(layer, target) for target in ("gate", "up")],
                "down": [target_projection(layer, "down")],
            }
            for name, size in layer_tensors(shape):
                tensors = [_member(module, "bias" if name.endswith("_bias") else "weight") for module in parts[name.removesuffix("_bias")]]
                whole = torch.cat(tensors)
                assert tuple(whole.shape) == size
                file.write(np.ascontiguousarray(whole.to(dtype).numpy()).data.cast("B"))


def _member(module: Any, name: str) -> Tensor:
    """Weight or bias; zeros for a bias that the base lacks."""
    found = getattr(module, name)
    return torch.zeros(module.weight.shape[0], dtype=module.weight.dtype) if found is None else found.detach()


def write_entry_down(model: Any, adapter: Adapter, path: Path) -> None:
    """A of the entry source with the weight of the source's norm folded in: A diag(w) `[C, hidden]` float32."""
    plan = adapter.config.plan
    source = plan.source(plan.front_layers)
    down = torch.cat([adapter.basis[down_name(source.layer, name)] for name, _ in source.ranks])
    folded = down * model.model.layers[source.layer].input_layernorm.weight.detach().float()
    path.write_bytes(np.ascontiguousarray(folded.numpy(), "<f4").data.cast("B"))


def write_text_files(folder: Path, model: Any, tokenizer: Any) -> list[str]:
    """tokenizer.json, the chat template if there is one, and what of the generation config the device uses."""
    (folder / TOKENIZER).write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    names = [TOKENIZER, GENERATION]
    if tokenizer.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template(tokenizer), encoding="utf-8")
        names.append(CHAT_TEMPLATE)
    generation = model.generation_config
    end = generation.eos_token_id  # what generate() stops at; the tokenizer's own end token is not asked
    sampled = bool(generation.do_sample)
    write_json(
        folder / GENERATION,
        {
            "eos_token_ids": [] if end is None else end if isinstance(end, list) else [end],
            "special_tokens": {name: value for name in SPECIAL_TOKENS if (value := getattr(tokenizer, name)) is not None},
            # transformers ignores these three unless it samples
            "temperature": _float(generation.temperature) if sampled else None,
            "top_k": generation.top_k if sampled else None,
            "top_p": _float(generation.top_p) if sampled else None,
            "repetition_penalty": _float(generation.repetition_penalty),
            "max_tokens": generation.max_new_tokens,
        },
    )
    return names


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def chat_template(tokenizer: Any) -> str:
    """The template itself; of several named ones the default."""
    template = tokenizer.chat_template
    return template["default"] if isinstance(template, dict) else template
