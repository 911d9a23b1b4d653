"""The edge half's files beside its graphs: tables, cores, tokenizer, chat template, generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifact.manifest import write_json
from ..artifact.names import CHAT_TEMPLATE, CORES, GENERATION, HEAD_TABLE, TABLE, TOKENIZER
from ..models.adapter import Adapter, write_cores
from ..models.checkpoint import Base, is_tied
from .edge_graphs import write_graphs
from .ort_files import write_ort_files

TABLE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
ROWS_AT_ONCE = 4096
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def write_edge(folder: Path, base: Base, tokenizer: Any, adapter: Adapter, dtype: str) -> list[str]:
    """Writes every file of the edge half but its manifest; returns their names."""
    model = base.model
    names = write_graphs(folder, base.shape, model.model.norm.weight.detach().float().numpy(), dtype)
    names += write_ort_files(folder)
    write_table(model.model.embed_tokens.weight, folder / TABLE, TABLE_DTYPES[dtype])
    names.append(TABLE)
    if not is_tied(model):
        write_table(model.lm_head.weight, folder / HEAD_TABLE, TABLE_DTYPES[dtype])
        names.append(HEAD_TABLE)
    write_cores(adapter, folder / CORES)
    names.append(CORES)
    return names + write_text_files(folder, model, tokenizer)


def write_table(table: Tensor, path: Path, dtype: torch.dtype) -> None:
    """[V, H], row-major little-endian, converted a block of rows at a time."""
    with path.open("wb") as file:
        for rows in table.detach().split(ROWS_AT_ONCE):
            file.write(np.ascontiguousarray(rows.to(dtype).numpy()).data.cast("B"))


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
