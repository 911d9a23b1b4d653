"""Reading a base: what is refused and by which name, what is read of each family, and a GGUF that equals its HF copy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from plora.artifact.errors import MissingFile, UnsupportedModel
from plora.models.checkpoint import Base, decoder_shape, is_tied, locate, read_base, read_skeleton, read_tokenizer

from .conftest import FAMILIES, SMALL, Made, oracle, save_tiny_base


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """The config of a good base, to be spoilt; no weights: each refusal comes before they are read."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((made.base / "config.json").read_bytes())
    return tmp_path / "base"


def change(folder: Path, **changes: Any) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3", "gemma2", "of-nobody", "mixtral"])
def test_other_architectures_are_refused_by_name(model_type: str, folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match=rf"unsupported architecture {model_type}; supported: llama \(Llama 2/3\.x\), mistral"):
        read_base(change(folder, model_type=model_type))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden_act": "gelu"}, "activation gelu in a llama; supported: silu"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope scaling dynamic depends on the sequence length"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                                 "original_max_position_embeddings": 64}},
            "rope scaling longrope",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope scaling dynamic"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial rotary factor 0.5"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised by bitsandbytes"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_our_graphs_would_compute_wrongly_is_refused(changes: dict[str, Any], complaint: str, folder: Path) -> None:
    base = change(folder, **changes)
    with pytest.raises(UnsupportedModel, match=complaint):
        read_base(base)
    with pytest.raises(UnsupportedModel, match=complaint):
        read_skeleton(base)


def test_the_untouched_config_is_not_refused(folder: Path, made: Made) -> None:
    """The control of the refusals above."""
    shape, model = read_skeleton(str(folder))
    assert shape == oracle(made).shape
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"model_type": 3}', "null", "\ufffd"])
def test_configs_that_are_none_are_refused(content: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(UnsupportedModel, match="config|architecture"):
        read_base(str(folder))


def test_a_config_without_weights_or_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="transformers cannot read it"):
        read_base(str(folder))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnsupportedModel, match="transformers cannot read it"):
        read_base(str(folder))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "no such folder or .gguf file"),
        ("nowhere", "not a hub id of the form owner/name"),
        ("a/b/c", "not a hub id"),
        ("./a", "not a hub id"),
        ("/a/b", "not a hub id"),
        ("owner/na me", "not a hub id"),
        ("nowhere.gguf", "no such GGUF file"),
        ("owner/nowhere.GGUF", "no such GGUF file"),
    ],
)
def test_places_that_hold_no_checkpoint(name: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path / "..")
    with pytest.raises(MissingFile, match=complaint):
        locate(name) if name else locate(str(tmp_path / "none" / "at" / "all"))


def test_an_empty_folder_and_a_hub_id(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no config\.json in this folder"):
        read_base(str(tmp_path))
    assert locate("owner/name-1.0_x").location == "owner/name-1.0_x"
    (tmp_path / "broken.gguf").write_bytes(b"GGUF of no kind")
    with pytest.raises(UnsupportedModel, match="broken.gguf: transformers cannot read it"):
        read_base(str(tmp_path / "broken.gguf"))


# Shapes

EXPECTED_WINDOWS = {"mistral-window": (9, 9, 9), "qwen2-window": (0, 7, 7)}


@pytest.mark.parametrize("family", FAMILIES)
def test_shape_of_each_family(family: str, tmp_path: Path) -> None:
    base = read_base(str(save_tiny_base(tmp_path, family)))
    settings = {**SMALL, **FAMILIES[family][1]}
    shape, model = base.shape, base.model
    layer = model.model.layers[0]
    assert (shape.layers, shape.hidden, shape.vocabulary) == (settings["num_hidden_layers"], settings["hidden_size"], 300)
    assert shape.intermediate == layer.mlp.up_proj.out_features
    for target in ("q", "k", "v", "o"):
        assert shape.out_features(target) == getattr(layer.self_attn, f"{target}_proj").out_features
    for target in ("gate", "up", "down"):
        assert shape.out_features(target) == getattr(layer.mlp, f"{target}_proj").out_features
    assert shape.head_dim == settings.get("head_dim", settings["hidden_size"] // settings["num_attention_heads"])
    assert shape.windows == EXPECTED_WINDOWS.get(family, (0,) * shape.layers)
    assert shape.rope.inv_freq == tuple(model.model.rotary_emb.inv_freq.tolist())
    assert len(shape.rope.inv_freq) * 2 == shape.head_dim
    assert is_tied(model) is settings["tie_word_embeddings"]
    assert read_skeleton(str(tmp_path))[0] == shape
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert read_tokenizer(base.source).backend_tokenizer.get_vocab_size() >= 300  # qwen2 adds one of its own


def test_rope_is_exact_in_a_half_precision_checkpoint(tmp_path: Path) -> None:
    """A model cast to bf16 rounds its own frequencies; the shape holds those of its config."""
    wide = read_base(str(save_tiny_base(tmp_path / "wide", "llama3-rope")))
    half = read_base(str(save_tiny_base(tmp_path / "half", "llama3-rope", dtype=torch.bfloat16)))
    assert half.model.dtype == torch.bfloat16
    assert half.shape == wide.shape
    half.model.to(torch.bfloat16)
    assert decoder_shape(half.model) == wide.shape
    assert half.fingerprint != wide.fingerprint  # rounded weights are other weights


# GGUF


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k as llama.cpp wants them: its rope pairs neighbours, that of transformers pairs halves."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(base: Base, path: Path) -> None:
    """A llama as F32 tensors; no tokenizer."""
    model, shape = base.model, base.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    tensors = {"token_embd": model.model.embed_tokens, "output_norm": model.model.norm, "output": model.lm_head}
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        parts = {"attn_q": attention.q_proj, "attn_k": attention.k_proj, "attn_v": attention.v_proj, "attn_output": attention.o_proj}
        parts |= {"ffn_gate": mlp.gate_proj, "ffn_up": mlp.up_proj, "ffn_down": mlp.down_proj}
        parts |= {"attn_norm": layer.input_layernorm, "ffn_norm": layer.post_attention_layernorm}
        tensors |= {f"blk.{index}.{name}": module for name, module in parts.items()}
    turns: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "attn_q": lambda weight: permuted(weight, shape.heads),
        "attn_k": lambda weight: permuted(weight, shape.kv_heads),
    }
    for name, module in tensors.items():
        turn = turns.get(name.split(".")[-1], lambda weight: weight)
        writer.add_tensor(f"{name}.weight", turn(module.weight.detach()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_and_its_hugging_face_copy_are_the_same_base(made: Made, tmp_path: Path) -> None:
    expected = oracle(made)
    write_gguf(expected, tmp_path / "tiny.gguf")
    base = read_base(str(tmp_path / "tiny.gguf"))
    assert base.source.gguf_file == "tiny.gguf"
    assert base.fingerprint == expected.fingerprint
    assert base.shape == expected.shape
    base.model.save_pretrained(tmp_path / "copy")
    assert read_base(str(tmp_path / "copy")).fingerprint == expected.fingerprint
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert torch.allclose(base.model(ids).logits, expected.model(ids).logits, atol=1e-5)


def test_an_edited_gguf_is_another_base(made: Made, tmp_path: Path) -> None:
    """The control."""
    base = oracle(made)
    base.model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1e-4
    write_gguf(base, tmp_path / "tiny.gguf")
    assert read_base(str(tmp_path / "tiny.gguf")).fingerprint != base.fingerprint
