"""`make bench`: split over loopback against the unsplit model in one run, bytes on the socket, export, memory, start times."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from plora.artifact import entry_plan, paper_plan

from .conditions import ROOT, write_results
from .plans import PLANS, compare_plans, plan_line, plot_plans
from .processes import BIN, cloud, run
from .wire import socket_bytes

ADAPTER = ROOT / "examples" / "persona" / "adapter"


def model_path() -> str:
    return subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], check=True, capture_output=True, text=True).stdout.strip()


def llama_7b_width(folder: Path) -> dict[str, Any]:
    """Llama-2-7B's width and heads at rank 128, on the socket; two layers."""
    import torch
    import transformers

    from plora.models.adapter import write_adapter
    from plora.models.basis import new_adapter
    from plora.models.checkpoint import read_base
    from tests.conftest import tiny_tokenizer, tuned

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=32, vocab_size=300,
        max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    tiny_tokenizer(300).save_pretrained(folder / "base")
    base = read_base(str(folder / "base"))
    plans = {
        "paper, one A": paper_plan(2, 128),
        "paper, separate A": paper_plan(2, 128, separate=True),
        "entry, each core its own": entry_plan(2, 0, 128),
        "entry, shared injection of 512": entry_plan(2, 0, 128, shared_injection=512),
    }
    figures = {}
    for name, plan in plans.items():
        adapter, out = folder / name / "adapter", folder / name / "out"
        write_adapter(tuned(new_adapter(base, plan, "random", 1.0, 0), size=0.01), adapter)
        run(BIN / "plora-export", folder / "base", "--adapter", adapter, "--out", out)
        with cloud(out / "cloud", 1) as server:
            figures[name] = socket_bytes(server.address, out / "edge")
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
        "device layers": own["layers_millis"],
        "device cores": own["cores_millis"] + own["entry_injection_millis"],
        "device embedding": own["embedding_millis"],
    }
    trips = figures["socket"]["round_trips_per_token"]
    rest = figures["split_token_millis"]["median"] - sum(parts.values())
    return {**parts, f"{trips:.0f} round trips of gRPC over loopback, framing, checks, scheduling": rest}


def table(figures: dict[str, Any]) -> str:
    """The figures for a person."""
    plans, narrow, wide, start = figures["plans"], figures["export"], figures["llama_7b_width"], figures["start"]
    rows = [(f"plan {name}", plan_line(plan)) for name, plan in plans.items()]
    for name, plan in plans.items():
        rows += [(f"{name}: {place}", f"{millis:.1f} ms") for place, millis in plan["where_a_split_token_goes_millis"].items()]
        rows += [
            (f"{name}: first token, prompt of {size}: split / unsplit", f"{t['split']:.2f} / {t['unsplit']:.2f} s")
            for size, t in plan["ttft_seconds"].items()
        ]
        rows.append((f"{name}: resident, device / cloud", f"{plan['split_rss_bytes'] / 1e6:.0f} / {plan['cloud_rss_bytes'] / 1e6:.0f} MB"))
    rows += [
        (f"communication reduction, 7B width, rank 128, {name}", f"{100 * w['communication_reduction']:.1f} %") for name, w in wide.items()
    ]
    rows += [
        (f"export from {kind}: s, peak over checkpoint", f"{narrow[kind]['seconds']:.0f} s, {narrow[kind]['peak_over_checkpoint']:.2f}")
        for kind in ("folder", "gguf")
    ]
    rows.append(
        ("device: import / one token, whole process", f"{start['device_import_seconds']:.2f} / {start['device_one_token_seconds']:.2f} s")
    )
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="turns of each side")
    parser.add_argument(
        "--plans", nargs="+", choices=list(PLANS), default=list(PLANS), metavar="PLAN", help="some of them; nothing is written then"
    )
    arguments = parser.parse_args()
    base = model_path()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        figures: dict[str, Any] = {"export": export_cost(base, scratch / "out")}
        figures["start"] = start_times(scratch / "out")
        figures["plans"] = compare_plans(str(scratch / "copy"), scratch / "plans", arguments.rounds, arguments.plans)
        figures["llama_7b_width"] = llama_7b_width(scratch / "wide")
    for plan in figures["plans"].values():
        plan["where_a_split_token_goes_millis"] = where_it_goes(plan)
    print(table(figures))
    if set(figures["plans"]) != set(PLANS):
        return
    paper, entry = figures["plans"]["paper"], figures["plans"]["entry"]
    figures["split_over_unsplit"] = paper["split_over_unsplit"]
    figures["entry_over_unsplit"] = entry["split_over_unsplit"]
    figures["entry_round_trips_per_token"] = entry["socket"]["round_trips_per_token"]
    figures["entry_communication_reduction"] = entry["socket"]["communication_reduction"]
    figures["communication_reduction_7b_rank128"] = figures["llama_7b_width"]["paper, one A"]["communication_reduction"]
    figures["export_peak_over_checkpoint"] = figures["export"]["folder"]["peak_over_checkpoint"]
    figures["export_peak_over_checkpoint_gguf"] = figures["export"]["gguf"]["peak_over_checkpoint"]
    print(write_results("bench", figures, "make bench"), plot_plans(figures["plans"]))


if __name__ == "__main__":
    main()
