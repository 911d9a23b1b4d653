"""Reads a decoder checkpoint through transformers: a Hugging Face folder, a hub id, or a GGUF file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from optimum.utils import NormalizedConfigManager
from torch import Tensor, nn

from ..artifact.errors import MissingFile, UnsupportedModel, first_line
from ..artifact.shape import DecoderShape, Rope
from ..artifact.strict import canonical_json

SUPPORTED = {"llama": "Llama 2/3.x", "mistral": "Mistral", "qwen2": "Qwen2/2.5"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rope scalings whose inverse frequencies do not depend on the sequence length."""


@dataclass(frozen=True)
class Source:
    """Where transformers finds a checkpoint: a folder or hub id, and the file in it if it is a GGUF."""

    location: str
    gguf_file: str | None

    @property
    def keywords(self) -> dict[str, Any]:
        return {"gguf_file": self.gguf_file} if self.gguf_file else {}


@dataclass
class Base:
    """A frozen base model. fingerprint: SHA-256 of its dequantised tensors; name: what the user called it."""

    name: str
    shape: DecoderShape
    model: Any
    fingerprint: str
    source: Source


def locate(base: str) -> Source:
    """Raises MissingFile if `base` is no folder with a checkpoint, no GGUF file and no hub id."""
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise MissingFile(f"{base}: no such GGUF file")
        return Source(str(path.parent), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingFile(f"{base}: no config.json in this folder; expected a Hugging Face checkpoint or a .gguf file")
        return Source(str(path), None)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not path.is_absolute() and not base.startswith("."):
        return Source(base, None)
    raise MissingFile(f"{base}: no such folder or .gguf file, and not a hub id of the form owner/name")


def read_config(source: Source) -> Any:
    """The transformers config, refused by name if its architecture is not one that we run."""
    if source.gguf_file is None and Path(source.location).is_dir():
        model_type = _plain_model_type(Path(source.location) / "config.json")
        if model_type not in SUPPORTED:
            raise UnsupportedModel(_unsupported(model_type))
    try:
        config = transformers.AutoConfig.from_pretrained(source.location, **source.keywords)
    except Exception as error:  # transformers reads files that anyone may have made, and raises what its parsers raise
        raise _unreadable(source, error) from None
    if config.model_type not in SUPPORTED:
        raise UnsupportedModel(_unsupported(config.model_type))
    _check_details(config)
    return config


def _plain_model_type(path: Path) -> str:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"{path}: not a model config ({type(error).__name__}: {error})") from None


def _unsupported(model_type: str) -> str:
    supported = ", ".join(f"{key} ({label})" for key, label in SUPPORTED.items())
    return f"unsupported architecture {model_type}; supported: {supported}"


def _unreadable(source: Source, error: Exception) -> Exception:
    where = f"{source.location}/{source.gguf_file}" if source.gguf_file else source.location
    return UnsupportedModel(f"{where}: transformers cannot read it: {type(error).__name__}: {first_line(error)}")


def _check_details(config: Any) -> None:
    """Refuse by name what our graphs would compute wrongly."""
    if config.hidden_act != "silu":
        raise UnsupportedModel(f"activation {config.hidden_act} in a {config.model_type}; supported: silu")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise UnsupportedModel(f"rope scaling {rope['rope_type']} depends on the sequence length; supported: {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel(f"partial rotary factor {rope['partial_rotary_factor']}; supported: 1.0")
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else getattr(quantization, "quant_method", None)
    if method is not None and str(getattr(method, "value", method)) != "gguf":
        raise UnsupportedModel(f"checkpoint quantised by {method}; supported: plain weights, or a GGUF file, which is dequantised")


def read_skeleton(base: str) -> tuple[DecoderShape, Any]:
    """Shape and a model without weights (on the "meta" device): for what needs no tensor. Raises as read_base."""
    config = read_config(locate(base))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return decoder_shape(model), model


def read_base(base: str) -> Base:
    """Loads a checkpoint in the dtype that it is stored in (GGUF: fp32), frozen, in eval mode, and fingerprints it.

    Raises MissingFile, UnsupportedModel.
    """
    source = locate(base)
    config = read_config(source)
    dtype = torch.float32 if source.gguf_file else "auto"
    try:
        # The GGUF reader draws a bar of its own, which transformers' switch does not silence.
        with contextlib.redirect_stderr(io.StringIO()) if source.gguf_file else contextlib.nullcontext():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(
                source.location, config=config, dtype=dtype, attn_implementation="sdpa", **source.keywords
            )
    except Exception as error:  # transformers reads files that anyone may have made, and raises what its parsers raise
        raise _unreadable(source, error) from None
    loaded.eval().requires_grad_(False)
    if source.gguf_file:  # read as plain fp32 tensors; transformers would still refuse to cast or save it
        vars(loaded).update(hf_quantizer=None, is_quantized=False)
        vars(loaded.config).pop("quantization_config")
    return Base(display_name(base), decoder_shape(loaded), loaded, fingerprint(loaded), source)


def display_name(base: str) -> str:
    """What files and messages call a base: a hub id as it is, a path without its folders."""
    return Path(base).name if Path(base).exists() else base


def read_tokenizer(source: Source) -> Any:
    """The fast tokenizer of a checkpoint. Raises UnsupportedModel if it has none."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.location, **source.keywords)
    except Exception as error:  # transformers reads files that anyone may have made, and raises what its parsers raise
        raise _unreadable(source, error) from None
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModel(f"{source.location}: its tokenizer {type(tokenizer).__name__} has no tokenizer.json form for the device")
    return tokenizer


def decoder_shape(model: Any) -> DecoderShape:
    """Sizes through optimum's normalised config; rope as transformers computes it, so scalings are honoured as they are."""
    config = model.config
    normal = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    heads = normal.num_attention_heads
    rotary = type(model.model.rotary_emb)(config=config)  # afresh: the model's own may be half precision, or on "meta"
    return DecoderShape(
        hidden=normal.hidden_size,
        layers=normal.num_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or normal.hidden_size // heads,
        intermediate=config.intermediate_size,
        vocabulary=normal.vocab_size,
        context_tokens=config.max_position_embeddings,
        epsilon=float(torch.tensor(config.rms_norm_eps, dtype=torch.float32)),  # as it is used, and as a GGUF stores it
        windows=_windows(config, normal.num_layers),
        rope=Rope(tuple(rotary.inv_freq.float().tolist()), float(rotary.attention_scaling)),
    )


def _windows(config: Any, layers: int) -> tuple[int, ...]:
    size = getattr(config, "sliding_window", None) or 0
    if config.model_type == "llama":
        size = 0
    if config.model_type == "qwen2":
        kinds = config.layer_types
        return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    return (size,) * layers


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the model's tensors as fp32, sorted by name, tied tensors once: equal for a GGUF and its HF copy."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(canonical_json([name, list(tensor.shape)]))
        digest.update(fp32_bytes(tensor))
    return digest.hexdigest()


def fp32_bytes(tensor: Tensor) -> memoryview:
    """Little-endian fp32 bytes of a tensor, without a copy if it is fp32 already."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")


def is_tied(model: Any) -> bool:
    return model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
