"""Builds the wheel and proves, in fresh environments, that the device needs no torch and the cloud no transformers.

Exports a tiny random model here, serves it from an environment with `plora[cloud]`, and generates from one with
`plora[device]`; the tokens must be those of transformers with the adapter.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = {"device": ("torch", "transformers", "onnx", "optimum"), "cloud": ("transformers", "onnx", "onnxruntime", "optimum", "tokenizers")}
TOKENS = 32
PROMPT = "the quick brown fox"


def run(*command: str | Path, **more: object) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, **more).stdout  # type: ignore[call-overload]


def environment(extra: str, wheel: Path) -> Path:
    """A virtual environment beside .venv with the wheel and one extra; its bin folder."""
    folder = ROOT / f".venv-{extra}"
    run(sys.executable, "-m", "venv", "--clear", folder)
    python = folder / "bin" / "python"
    pip = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "-c", ROOT / "constraints.txt")
    run(python, *pip, f"plora[{extra}] @ {wheel.as_uri()}")
    for package in ABSENT[extra]:
        code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is not None)"
        if subprocess.run([python, "-c", code], check=False).returncode:
            sys.exit(f"{package} is installed in the {extra} environment: an extra pulls it in")
    return folder / "bin"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import torch

    from plora.artifact import entry_plan
    from plora.models.checkpoint import read_base
    from plora.models.formula import adapted
    from tests.conftest import make_export

    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack what an older build left there
    with tempfile.TemporaryDirectory() as scratch:
        run(sys.executable, "-m", "build", "--wheel", "--outdir", scratch, ROOT, stderr=subprocess.DEVNULL)
        (wheel,) = Path(scratch).glob("plora-*.whl")
        print(f"built {wheel.name}, {wheel.stat().st_size:,} bytes", flush=True)
        device, cloud = environment("device", wheel), environment("cloud", wheel)
        if "plora/models/calibration.txt" not in zipfile.ZipFile(wheel).namelist():
            sys.exit("the wheel lacks plora's calibration text")
        # Every graph that a device may run: front and back layers, injections with the entry.
        made = make_export(Path(scratch), plan=lambda layers: entry_plan(layers, 1, 6, back_layers=1), head_dim=16)
        base = read_base(str(made.base))
        server = subprocess.Popen(
            [cloud / "plora-cloud", "serve", made.out / "cloud", "--listen", "127.0.0.1:0", "--kv-bytes", "50000000"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
        )
        try:
            assert server.stdout is not None
            address = next(match[1] for line in server.stdout if (match := re.search(r"listening on (\S+)", line)))
            flags = ("--edge", made.out / "edge", "--cloud", address, "--raw", "--json", "--max-tokens", str(TOKENS), "--temperature", "0")
            answer = json.loads(run(device / "plora-device", "generate", PROMPT, *flags, cwd=scratch))
        finally:
            server.terminate()
            server.wait(30)
        ids = torch.tensor([answer["prompt_token_ids"]])
        with adapted(base.model, made.adapter):
            expected = base.model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        if answer["token_ids"] != expected:
            sys.exit(f"the wheel's tokens {answer['token_ids']} differ from {expected}")
        if server.returncode != 0:
            sys.exit(f"the cloud ended with {server.returncode}")
    print(f"device without {', '.join(ABSENT['device'])}; cloud without {', '.join(ABSENT['cloud'])}; {len(expected)} tokens equal")


if __name__ == "__main__":
    main()
