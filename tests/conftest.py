"""Small random models of every family, their adapters and exports, and real servers on loopback: nothing is downloaded."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from plora.artifact import Exchange, ExchangePlan, entry_plan, paper_plan
from plora.artifact.names import features_bias_name, features_weight_name
from plora.device_runtime import PrivateSession
from plora.export.config import ExportConfig
from plora.export.export import export
from plora.export.halves import write_halves
from plora.models.adapter import Adapter, replace_cores, write_adapter
from plora.models.basis import new_adapter
from plora.models.checkpoint import Base, read_base
from plora.models.features import features_of
from plora.models.formula import merge

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner may have started us, and so our children, with it ignored

TEXTS = [
    "the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "hello world, how are you today?",
    "a lighthouse keeper writes down the weather every morning", "what is the capital of France? it is Paris", "naïve café – 12345 …",
]  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)

SMALL: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
"""The one scaling that also multiplies cos and sin."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-odd-heads": ("Llama", {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 10}),
    "llama-mha-bias": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 9}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
}


def tiny_tokenizer(vocabulary: int) -> Any:
    """Byte-level BPE with `vocabulary` entries, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|start|>", chat_template=CHAT_TEMPLATE
    )


def save_tiny_base(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A random model of `family` (a key of FAMILIES) with its tokenizer, as a Hugging Face folder."""
    name, extra = FAMILIES[family]
    tokenizer = tiny_tokenizer(300)
    settings = {**SMALL, "vocab_size": 300, "eos_token_id": 0, "bos_token_id": 1, **extra, **overrides}
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or parameter_name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)  # ones and zeros would hide a forgotten weight
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tuned(adapter: Adapter, seed: int = 1, size: float = 0.5) -> Adapter:
    """`adapter` with random non-zero cores, as if tuned."""
    generator = torch.Generator().manual_seed(seed)
    return replace_cores(adapter, {name: torch.randn(core.shape, generator=generator) * size for name, core in adapter.cores.items()})


@dataclass(frozen=True)
class Made:
    """A base folder, an adapter folder, the adapter, and the export of both (None until asked for)."""

    base: Path
    adapter_folder: Path
    adapter: Adapter
    out: Path


def make_export(
    folder: Path,
    family: str = "llama",
    plan: Callable[[int], ExchangePlan] | None = None,
    kind: str = "random",
    dtype: str = "fp32",
    edge_dtype: str = "fp32",
    verified: bool = True,
    **overrides: Any,
) -> Made:
    """Base, tuned adapter and export in `folder`. plan: from the number of layers; dtype, edge_dtype: of the export; verified: by
    the exporter, as users get it, which takes a process and some seconds."""
    base_folder = save_tiny_base(folder / "base", family, **overrides)
    base = read_base(str(base_folder))
    layers = base.shape.layers
    adapter = tuned(new_adapter(base, plan(layers) if plan else paper_plan(layers, 6), kind, 1.0, 0))
    write_adapter(adapter, folder / "adapter")
    config = ExportConfig(str(base_folder), folder / "adapter", folder / "out", dtype, edge_dtype)
    if verified:
        export(config, lambda stage: None, write_halves)  # in this process: a fresh one costs 4 s for every export
    else:
        config.out.mkdir()
        write_halves(config, config.out, lambda stage: None)
    return Made(base_folder, folder / "adapter", adapter, folder / "out")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The export that most tests share: a small Llama with the paper's plan. Do not write into it."""
    return make_export(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def layered(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """An export of one round trip per token: layers 0 and 3 of four run on the device, fused; a shared injection goes with the entry.
    Do not write into it."""
    plan = entry_plan(4, 1, 5, shared_injection=6, back_layers=1)
    return make_export(tmp_path_factory.mktemp("layered"), "llama", lambda layers: plan, num_hidden_layers=4, head_dim=16)


def oracle(made: Made) -> Base:
    """The unsplit base, freshly loaded."""
    return read_base(str(made.base))


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone when the block ends, by its own id."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def command(name: str) -> str:
    """Path of one of our commands, beside the interpreter that runs the tests."""
    return str(Path(sys.executable).parent / name)


@contextmanager
def cloud(folder: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`plora-cloud serve` on a free loopback port: (address, process)."""
    arguments = [
        command("plora-cloud"),
        "serve",
        str(folder),
        "--listen",
        "127.0.0.1:0",
        "--threads",
        "1",
        "--kv-bytes",
        str(64 << 20),
        *flags,
    ]
    with running(arguments) as process:
        os.set_blocking(process.stdout.fileno(), True)  # type: ignore[union-attr]
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            if match := re.search(r"listening on (\S+)", line):
                yield match[1], process
                return
        pytest.fail(f"the server ended before it listened: {''.join(lines)}")


@pytest.fixture(scope="session")
def served(made: Made) -> Iterator[str]:
    """Address of a cloud that serves `made`, for tests that leave it alive."""
    with cloud(made.out / "cloud") as (address, _):
        yield address


@pytest.fixture(scope="session")
def merged(made: Made) -> Base:
    """The base of `made` with the adapter merged into its weights: what both halves together must equal. Leave it as it is."""
    base = oracle(made)
    merge(base.model, made.adapter)
    return base


@torch.no_grad()
def greedy(base: Base, ids: list[int], count: int) -> list[int]:
    """The tokens that transformers appends to `ids` [T], at most `count`, the end token included."""
    return base.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0].tolist()[len(ids) :]


def answer(session: PrivateSession, ids: list[int], count: int) -> list[int]:
    """The same over the wire."""
    list(session.stream(ids, session.sampling(max_tokens=count, temperature=0.0)))
    assert session.answer is not None
    return session.answer.token_ids


def injected(adapter: Adapter, exchange: Exchange, compressed: Tensor) -> Tensor:
    """What a device returns: compressed [..., C] -> injection [..., I], by the adapter's own cores."""
    read = compressed
    if exchange.features:
        weight, bias = adapter.cores[features_weight_name(exchange.source)], adapter.cores[features_bias_name(exchange.source)]
        read = features_of(compressed, weight, bias)
    return torch.cat([read[..., core.down_start : core.down_stop] @ adapter.cores[core.name].T for core in exchange.cores], -1)
