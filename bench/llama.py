"""The device by itself: llama.cpp on the same GGUF, greedy, from a prebuilt wheel in an environment of its own under out/.

The wheel is xllamacpp (MIT; llama.cpp, MIT, linked in; AVX2 kernels): for figures only, no dependency of plora's. On SmolLM2's GGUF it
computes with what the file holds: Q4_1 layers and a Q8_0 table (which is the head too), activations quantised to 8 bits, integer dot
products, an fp16 KV cache. Our halves and the unsplit model hold the same weights dequantised, in fp32; `fp32_copy` makes a GGUF of those,
so that both kinds of figure can stand side by side.

`PYTHON -m bench.llama GGUF THREADS` is the process: lines of JSON as in bench/worker.py. Run as a module it needs the standard library and
xllamacpp alone, hence the imports inside functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, VERSION = "xllamacpp", "2026.10.11549"
"""34 MB to fetch, 106 MB on disk (Linux x86-64)."""
HOME = ROOT / "out" / f"{PACKAGE}-{VERSION}"
CONTEXT_TOKENS = 2048
INSTALL_SECONDS = 300


@dataclass(frozen=True)
class Timed:
    """first_seconds: from the ids to the first token; seconds: of each later one; rss_bytes: the process, mapped weights included."""

    tokens: list[int]
    first_seconds: float
    seconds: list[float]
    rss_bytes: int


class DeviceOnly:
    """A process with the model loaded. gguf: any that llama.cpp reads; threads: of both prefill and decoding.

    Raises UsageError, in one line, where llama.cpp cannot be had or cannot read the file.
    """

    def __init__(self, gguf: Path, threads: int) -> None:
        from plora.artifact.errors import UsageError

        if threads < 1:
            raise UsageError(f"{threads} threads, expected at least 1")
        if not gguf.is_file():
            raise UsageError(f"{gguf}: no such GGUF file")
        command = [str(interpreter()), "-m", "bench.llama", str(gguf.resolve()), str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment)
        try:
            self._answer()
        except UsageError:
            self.close()
            raise

    def generate(self, prompt_ids: list[int], count: int) -> Timed:
        """Exactly `count` greedy tokens from an empty cache. An end token is never chosen: llama.cpp cannot go on after one, so it ranks
        them last, where plora's worker takes it and goes on; tokens compare up to there. Raises UsageError."""
        from plora.artifact.errors import UsageError

        if not prompt_ids or count < 1 or len(prompt_ids) + count > CONTEXT_TOKENS:
            raise UsageError(f"{len(prompt_ids)} prompt tokens and {count} new ones, expected 1 or more of each, {CONTEXT_TOKENS} in all")
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says that it ended
            self.process.stdin.write(json.dumps({"prompt": prompt_ids, "count": count}) + "\n")
            self.process.stdin.flush()
        return Timed(**self._answer())

    def _answer(self) -> dict[str, Any]:
        from plora.artifact.errors import UsageError

        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with code {self.process.wait()}"}
        if "error" in answer:
            raise UsageError(f"the device-only baseline: llama.cpp ({PACKAGE} {VERSION}): {answer['error']}")
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def __enter__(self) -> DeviceOnly:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def interpreter() -> Path:
    """The Python that has llama.cpp, made on first use. Raises UsageError, in one line, where it cannot be had."""
    from plora.artifact.errors import UsageError

    python = HOME / "bin" / "python"
    if _has_package(python):
        return python
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "-q", "--no-deps"]
    for command in (
        [sys.executable, "-m", "venv", "--clear", "--without-pip", str(HOME)],
        [*pip, "--only-binary", ":all:", f"{PACKAGE}=={VERSION}"],
    ):
        try:
            ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=INSTALL_SECONDS)
            why = "" if ran.returncode == 0 else (ran.stderr.strip().splitlines() or [f"exit code {ran.returncode}"])[-1]
        except subprocess.TimeoutExpired:
            why = f"no end after {INSTALL_SECONDS} s"
        if why:
            raise UsageError(f"the device-only baseline needs {PACKAGE}=={VERSION} in {HOME}, which cannot be installed here: {why}")
    if not _has_package(python):
        raise UsageError(f"the device-only baseline: {PACKAGE}=={VERSION} was installed in {HOME}, but does not import on this machine")
    return python


def fp32_copy(gguf: Path, target: Path) -> Path:
    """The same model with every tensor dequantised to fp32: what our halves compute with. 540 MB for SmolLM2-135M; kept if it is there."""
    if target.is_file():
        return target
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    reader = GGUFReader(gguf)
    writer = GGUFWriter(partial, reader.fields["general.architecture"].contents())
    ours = ("general.architecture", "general.file_type", "general.quantization_version")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ours:
            is_list = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=field.types[-1] if is_list else None)
    writer.add_file_type(0)  # all fp32
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(target)


def _has_package(python: Path) -> bool:
    code = f"import {PACKAGE}, importlib.metadata as m, sys; sys.exit(m.version('{PACKAGE}') != '{VERSION}')"
    return python.exists() and subprocess.run([python, "-c", code], check=False, capture_output=True).returncode == 0


def _server(gguf: str, threads: int) -> Any:
    """llama.cpp's server with one slot, called in this process; it also listens on a free loopback port, which nobody calls."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel = CONTEXT_TOKENS, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.n_threads_http = 1
    params.cache_prompt, params.cache_ram_mib, params.n_ctx_checkpoints = False, 0, 0  # nothing is kept between calls
    params.fit_params, params.ui = False, False
    params.verbosity = 0
    return xllamacpp.Server(params)


def _generate(server: Any, prompt: list[int], count: int) -> dict[str, Any]:
    request = {"prompt": prompt, "n_predict": count, "samplers": ["top_k"], "top_k": 1, "temperature": 0.0, "ignore_eos": True}
    options = {"cache_prompt": False, "stream": True, "return_tokens": True, "verbose": True}  # "verbose" gives the ids
    tokens: list[int] = []
    stamps = [time.perf_counter()]
    failed: list[str] = []

    def heard(chunk: dict[str, Any]) -> bool:
        now = time.perf_counter()
        if "error" in chunk or "__verbose" not in chunk:
            failed.append(str(chunk.get("error", chunk))[:300])
        elif ids := chunk["__verbose"]["tokens"]:
            stamps.append(now)
            tokens.extend(ids)
        return False

    server.handle_completions({**request, **options}, heard)
    if failed or len(tokens) != count or len(stamps) != count + 1:
        return {"error": failed[0] if failed else f"{len(tokens)} tokens in {len(stamps) - 1} messages, expected {count}"}
    rss = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    seconds = [after - before for before, after in zip(stamps[1:], stamps[2:], strict=False)]
    return {"tokens": tokens, "first_seconds": stamps[1] - stamps[0], "seconds": seconds, "rss_bytes": rss}


def main() -> None:
    gguf, threads = sys.argv[1:]
    try:
        server = _server(gguf, int(threads))
    except Exception as error:
        print(json.dumps({"error": f"{gguf}: {error}"}), flush=True)
        sys.exit(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_generate(server, request["prompt"], request["count"])), flush=True)


if __name__ == "__main__":
    main()
