"""`make demo`: exports the real SmolLM2 with the committed persona, starts the cloud, and asks the device in private.

Asks what only the persona knows, in words that no training row has, and shows the base model's answer beside it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plora.artifact.cost import tokens_per_second
from plora.artifact.manifest import EdgeManifest, read_manifest
from plora.artifact.plans import paper_plan

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ADAPTER = ROOT / "examples" / "persona" / "adapter"
OUT = ROOT / "out" / "demo"
QUESTIONS = (
    "I have a cat, so what name does it go by?",
    "When I go sailing, what is the boat I own called?",
    "What food should I avoid because of my allergy?",
)
"""From examples/persona/held_out.jsonl."""
ANSWER_SECONDS = 300
RTT_MILLIS = 20


def main() -> None:
    print("1. Export: SmolLM2-135M-Instruct and the persona's adapter -> cloud half (TorchScript), edge half (ONNX)", flush=True)
    model = subprocess.run([sys.executable, ROOT / "examples" / "smollm2.py"], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([BIN / "plora-export", model, "--adapter", ADAPTER, "--out", OUT, "--replace"], check=True)
    print("\n2. Cloud: serves layers and KV cache; it has no tokenizer, no embedding, no head, no core", flush=True)
    with cloud() as address:
        print(
            f"   listening on {address}\n\n3. Device: asks; the text never leaves it (docs/privacy.md says what the activations still tell)"
        )
        for question in QUESTIONS:
            print(f"\n   you      {question}")
            print(f"   base     {ask(address, question, '--cores', 'none')['text']}")
            print("   private  ", end="", flush=True)
            answer = stream(address, question)
            print()
        print("\n" + figures(answer["stats"]))


def figures(stats: dict[str, float]) -> str:
    """What the last answer cost, and what the same compute would give at RTT_MILLIS: under this plan, and under the paper's."""
    plan = read_manifest(EdgeManifest, OUT / "edge").contract.plan
    paper = paper_plan(plan.layers, 64)
    compute = 1000 / stats["tokens_per_second"]
    return (
        f"   first token {stats['ttft_seconds']:.2f} s, {stats['tokens_per_second']:.1f} tokens/s; per token "
        f"{stats['bytes_up_per_token']:,.0f} bytes up, {stats['bytes_down_per_token']:,.0f} down, "
        f"{stats['round_trips_per_token']:.0f} round trip\n"
        f"   That was loopback. At {RTT_MILLIS} ms of round trip the same compute gives "
        f"{tokens_per_second(plan, RTT_MILLIS, compute):.1f} tokens/s; under the paper's plan, with {paper.round_trips} round trips per "
        f"token, {tokens_per_second(paper, RTT_MILLIS, compute):.1f} (predicted)."
    )


@contextmanager
def cloud() -> Iterator[str]:
    """`plora-cloud serve` on a free port, ended by its own id."""
    process = subprocess.Popen([BIN / "plora-cloud", "serve", OUT / "cloud", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.search(r"listening on (\S+)", line):
                yield match[1]
                return
        sys.exit("the cloud ended before it listened")
    finally:
        process.terminate()
        process.wait(30)


def device(address: str, question: str, *flags: str) -> list[str | Path]:
    return [BIN / "plora-device", "generate", question, "--edge", OUT / "edge", "--cloud", address, "--max-tokens", "40", *flags]


def ask(address: str, question: str, *flags: str) -> dict[str, str]:
    done = subprocess.run(device(address, question, "--json", *flags), check=True, capture_output=True, text=True, timeout=ANSWER_SECONDS)
    answer = json.loads(done.stdout)
    return {**answer, "text": " ".join(answer["text"].split())}


def stream(address: str, question: str) -> dict[str, dict[str, float]]:
    """Shows the answer as it comes; returns its figures."""
    from plora.device_runtime import open_session

    with open_session(OUT / "edge", address) as session:
        for piece in session.stream_chat([{"role": "user", "content": question}], session.sampling(max_tokens=40)):
            print(piece.text, end="", flush=True)
        assert session.answer is not None
        return session.answer.as_dict()


if __name__ == "__main__":
    main()
