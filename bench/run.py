"""`make bench`: split over loopback against the unsplit model in one run, bytes on the socket, export, memory, start times."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from plora.artifact import paper_plan
from plora.artifact.cost import payload

from .conditions import ROOT, write_results
from .processes import BIN, cloud, run
from .relay import Relay
from .worker import Worker

ADAPTER = ROOT / "examples" / "persona" / "adapter"
PROMPT_TOKENS = 16
NEW_TOKENS = 48
TTFT_PROMPTS = (16, 128, 512)


def model_path() -> str:
    return subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], check=True, capture_output=True, text=True).stdout.strip()


def prompt(tokens: int) -> list[int]:
    """Token ids from all over the vocabulary: what they say does not change what they cost."""
    return [1 + (7919 * index) % 49_000 for index in range(tokens)]


def compare(base: str, out: Path, rounds: int) -> dict[str, Any]:
    """Unsplit and split take turns, `rounds` times; medians per token and their ratio, same total threads."""
    figures: dict[str, Any] = {"rounds": rounds, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "threads_total": 2}
    with cloud(out / "cloud", 1) as server:
        unsplit, split = Worker("unsplit", base, ADAPTER, "2"), Worker("split", out / "edge", server.address, "1")
        try:
            seconds: dict[str, list[float]] = {"unsplit": [], "split": []}
            tokens: dict[str, list[int]] = {}
            for _ in range(rounds):
                for name, worker in (("unsplit", unsplit), ("split", split)):
                    answer = worker.generate(prompt(PROMPT_TOKENS), NEW_TOKENS)
                    seconds[name] += answer["seconds"]
                    tokens[name] = answer["tokens"]
                    figures[f"{name}_rss_bytes"] = answer["rss_bytes"]
            for name, values in seconds.items():
                quarters = statistics.quantiles(values, n=4)
                figures[f"{name}_token_millis"] = {
                    "median": 1e3 * statistics.median(values),
                    "quartiles": [1e3 * quarters[0], 1e3 * quarters[2]],
                }
            figures["split_over_unsplit"] = statistics.median(seconds["unsplit"]) / statistics.median(seconds["split"])
            figures["tokens_equal"] = tokens["unsplit"] == tokens["split"]
            figures["cloud_rss_bytes"] = server.rss_bytes
            figures["cloud_start_seconds"] = server.start_seconds
            figures["ttft_seconds"] = {
                str(size): {
                    name: statistics.median(worker.generate(prompt(size), 1)["first_seconds"] for _ in range(3))
                    for name, worker in (("unsplit", unsplit), ("split", split))
                }
                for size in TTFT_PROMPTS
            }
        finally:
            unsplit.close()
            split.close()
        figures["device"] = device_alone(out)
        figures["socket"] = socket_bytes(server.address, out / "edge")
    figures["cloud_compute_millis"] = cloud_alone(out / "cloud")
    return figures


def device_alone(out: Path, repeats: int = 40) -> dict[str, float]:
    """Milliseconds of the device's own work per token: embedding, all exchanges' cores, norm and head; one thread."""
    import numpy as np

    from plora.device_runtime.edge import Edge

    edge = Edge(out / "edge")
    hidden = edge.embed([5])
    compressed = [np.ones((1, exchange.compressed_columns), np.float32) for exchange in edge.plan.exchanges]
    work = {
        "embedding_millis": lambda: edge.embed([5]),
        "cores_millis": lambda: [edge.inject(e, c) for e, c in zip(edge.plan.exchanges, compressed, strict=True)],
        "head_millis": lambda: edge.logits(hidden),
    }
    return {name: median_millis(call, repeats) for name, call in work.items()}


def cloud_alone(folder: Path, repeats: int = 40) -> float:
    """Milliseconds of the cloud's work per token without a network: the engine in this process, one thread."""
    import numpy as np
    import torch

    from plora.cloud_server.engine import Engine

    torch.set_num_threads(1)
    engine = Engine(folder, 256 << 20)
    engine.warm_up()
    hidden = np.ones((1, engine.shape.hidden), np.float32)
    injections = [np.zeros((1, exchange.injection_columns), np.float32) for exchange in engine.plan.exchanges]

    def token() -> None:
        row = engine.begin(0, 16, hidden, None)
        for segment in engine.plan.segments:
            engine.open(segment.index, [row])
            engine.ahead(segment.index, [row])
            if segment.exchange is not None:
                engine.inject(row, segment.exchange, injections[segment.exchange])
            engine.run(segment.index, [row])

    return median_millis(token, repeats)


def median_millis(call: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def socket_bytes(address: str, edge: Path, dtype: str = "fp32") -> dict[str, Any]:
    """Bytes per token on the TCP socket, HTTP/2 and gRPC framing included, from the difference of two lengths; and the
    communication reduction with all of that framing counted against us."""
    from plora.device_runtime import open_session

    with Relay(address) as relay, open_session(edge, relay.address, wire_dtype=dtype) as session:
        counted = []
        for count in (8, 40):
            session.forget()
            before = (relay.up, relay.down, session._stepper.counters.round_trips)
            list(session.stream(prompt_within(session.edge.shape.vocabulary), session.sampling(max_tokens=count, temperature=0.0)))
            time.sleep(0.2)  # what is still on its way through the relay
            assert session.answer is not None
            counted.append(
                (
                    relay.up - before[0],
                    relay.down - before[1],
                    session._stepper.counters.round_trips - before[2],
                    len(session.answer.token_ids),
                )
            )
        (up_a, down_a, trips_a, n_a), (up_b, down_b, trips_b, n_b) = counted
        tokens = n_b - n_a
        cost = payload(session.edge.plan, session.edge.shape, dtype)
    up, down = (up_b - up_a) / tokens, (down_b - down_a) / tokens
    exchanged = up + down - cost.entry_up - cost.exit_down
    full = cost.full_rank_up + cost.full_rank_down
    return {
        "wire_dtype": dtype,
        "up_bytes_per_token": up,
        "down_bytes_per_token": down,
        "payload_up_bytes_per_token": cost.up,
        "payload_down_bytes_per_token": cost.down,
        "round_trips_per_token": (trips_b - trips_a) / tokens,
        "communication_reduction": 1 - exchanged / full,
        "communication_reduction_payload_only": cost.communication_reduction,
    }


def prompt_within(vocabulary: int) -> list[int]:
    return [1 + (31 * index) % (vocabulary - 1) for index in range(4)]


def llama_7b_width(folder: Path) -> dict[str, Any]:
    """Llama-2-7B's width and heads at rank 128, on the socket; two layers and a narrow MLP, which no exchange depends on."""
    import torch
    import transformers

    from plora.models.adapter import write_adapter
    from plora.models.basis import new_adapter
    from plora.models.checkpoint import read_base
    from tests.conftest import tiny_tokenizer, tuned

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=64, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=32, vocab_size=300,
        max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer(300).save_pretrained(folder / "base")
    base = read_base(str(folder / "base"))
    figures = {}
    for name, separate in (("shared", False), ("separate", True)):
        adapter = tuned(new_adapter(base, paper_plan(2, 128, separate=separate), "random", 1.0, 0), size=0.01)
        write_adapter(adapter, folder / name)
        run(BIN / "plora-export", folder / "base", "--adapter", folder / name, "--out", folder / f"out-{name}")
        with cloud(folder / f"out-{name}" / "cloud", 1) as server:
            figures[name] = socket_bytes(server.address, folder / f"out-{name}" / "edge")
    return figures


def export_cost(base: str, out: Path) -> dict[str, Any]:
    """Seconds and peak memory of an export, from GGUF and from the same model as a Hugging Face folder in fp32."""
    from plora.models.checkpoint import read_base, read_tokenizer

    baseline = run(sys.executable, "-c", "import plora.export.halves, time; time.sleep(0.3)").peak_bytes
    loaded = read_base(base)
    checkpoint_bytes = 4 * sum(parameter.numel() for parameter in loaded.model.parameters())
    copy = out.parent / "copy"
    loaded.model.save_pretrained(copy)
    read_tokenizer(loaded.source).save_pretrained(copy)
    del loaded
    figures: dict[str, Any] = {"import_baseline_bytes": baseline, "checkpoint_bytes": checkpoint_bytes}
    for name, source, target in (("gguf", base, out), ("folder", str(copy), out.parent / "from-folder")):
        measured = run(BIN / "plora-export", source, "--adapter", ADAPTER, "--out", target)
        over = (measured.peak_bytes - baseline) / checkpoint_bytes
        figures[name] = {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes, "peak_over_checkpoint": over}
    return figures


def start_times(out: Path) -> dict[str, float]:
    """Seconds from exec: importing the device's API, `plora-device --help`, and one token through a warm cloud."""
    figures = {}
    with cloud(out / "cloud", 1) as server:
        generate = (BIN / "plora-device", "generate", "hello", "--edge", out / "edge", "--cloud", server.address, "--max-tokens", "1")
        for name, command in (
            ("device_import", (sys.executable, "-c", "import plora.device_runtime")),
            ("device_help", (BIN / "plora-device", "--help")),
            ("device_one_token", generate),
            ("cloud_import", (sys.executable, "-c", "import plora.cloud_server.serve")),
        ):
            figures[f"{name}_seconds"] = statistics.median(run(*command).seconds for _ in range(3))
    return figures


def where_it_goes(figures: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a split token by place; the rest is the wire and Python on both sides."""
    own = figures["device"]
    parts = {
        "cloud compute": figures["cloud_compute_millis"],
        "device head": own["head_millis"],
        "device cores, all exchanges": own["cores_millis"],
        "device embedding": own["embedding_millis"],
    }
    parts["30 round trips of gRPC over loopback, framing, checks, scheduling"] = figures["split_token_millis"]["median"] - sum(
        parts.values()
    )
    return parts


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    decode, narrow, wide = figures["decode"], figures["export"], figures["llama_7b_width"]
    rows = [
        ("split over unsplit, batch 1, 30 exchanges", f"{figures['split_over_unsplit']:.2f}"),
        ("unsplit, ms per token", f"{decode['unsplit_token_millis']['median']:.1f}"),
        ("split, ms per token", f"{decode['split_token_millis']['median']:.1f}"),
        *((f"  {place}", f"{millis:.1f} ms") for place, millis in figures["where_a_split_token_goes_millis"].items()),
        ("round trips per token", f"{decode['socket']['round_trips_per_token']:.0f}"),
        (
            "bytes per token on the socket, up / down",
            f"{decode['socket']['up_bytes_per_token']:,.0f} / {decode['socket']['down_bytes_per_token']:,.0f}",
        ),
        ("communication reduction, 7B width, rank 128, one A", f"{100 * wide['shared']['communication_reduction']:.1f} %"),
        ("communication reduction, 7B width, rank 128, separate A", f"{100 * wide['separate']['communication_reduction']:.1f} %"),
        *(
            (f"first token, prompt of {size}: split / unsplit", f"{t['split']:.2f} / {t['unsplit']:.2f} s")
            for size, t in decode["ttft_seconds"].items()
        ),
        (
            "export from a folder: s, peak over checkpoint",
            f"{narrow['folder']['seconds']:.0f} s, {narrow['folder']['peak_over_checkpoint']:.2f}",
        ),
        ("export from GGUF: s, peak over checkpoint", f"{narrow['gguf']['seconds']:.0f} s, {narrow['gguf']['peak_over_checkpoint']:.2f}"),
        ("resident, device / cloud", f"{decode['split_rss_bytes'] / 1e6:.0f} / {decode['cloud_rss_bytes'] / 1e6:.0f} MB"),
        ("cloud: start to listening", f"{decode['cloud_start_seconds']:.1f} s"),
        (
            "device: import / one token, whole process",
            f"{figures['start']['device_import_seconds']:.2f} / {figures['start']['device_one_token_seconds']:.2f} s",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    arguments = parser.parse_args()
    base = model_path()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, "out")
        figures: dict[str, Any] = {"export": export_cost(base, out)}
        figures["decode"] = compare(str(Path(scratch, "copy")), out, arguments.rounds)
        figures["start"] = start_times(out)
        figures["llama_7b_width"] = llama_7b_width(Path(scratch, "wide"))
    figures["split_over_unsplit"] = figures["decode"]["split_over_unsplit"]
    figures["communication_reduction_7b_rank128"] = figures["llama_7b_width"]["shared"]["communication_reduction"]
    figures["export_peak_over_checkpoint"] = figures["export"]["folder"]["peak_over_checkpoint"]
    figures["export_peak_over_checkpoint_gguf"] = figures["export"]["gguf"]["peak_over_checkpoint"]
    figures["where_a_split_token_goes_millis"] = where_it_goes(figures["decode"])
    print(table(figures))
    print(write_results("bench", figures, "make bench"))


if __name__ == "__main__":
    main()
