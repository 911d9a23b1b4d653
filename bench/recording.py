"""What one device sends in a conversation, and what a right cloud answers, row by row: made once from both halves in one process.

The model is causal, so one pass over all tokens gives every row: a device that decodes token by token replays row t at step t. Each
device has a text and cores of its own. Nothing of a server is used: the halves are run as verification runs them (export/joined.py).
"""

from __future__ import annotations

import os
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from plora.artifact.manifest import EdgeManifest, read_manifest

from .conditions import ROOT
from .prompts import CODE, ITEMS, PASSAGE

if TYPE_CHECKING:
    from plora.export.joined import Halves

SCRATCH = ROOT / "out" / "load"
PROMPT_TOKENS, LONG_PROMPT_TOKENS, NEW_TOKENS = 32, 160, 96
LONG_EVERY = 8
"""Of so many devices the last one has a long prompt, of two chunks."""
CHUNK_TOKENS = 128
"""Of a prompt per step, as the device runtime sends it (device_runtime/stepper.py)."""
CORE_SIZE = 0.002
"""Standard deviation of the random cores, as in bench/network.py: they change the logits of SmolLM2, and it still writes text."""
PROGRESS_SECONDS = 10.0

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Recording:
    """T tokens of one device, the first `prompt_tokens` of them its prompt. entry, exit: [T, H]; injections: [T, I] by exchange, -1 the
    entry's; all float32."""

    prompt_tokens: int
    entry: Floats
    exit: Floats
    injections: dict[int, Floats]

    @property
    def tokens(self) -> int:
        return len(self.entry)

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        injections = {f"injection.{exchange}": values for exchange, values in self.injections.items()}
        part = path.with_suffix(f".part{os.getpid()}")
        with part.open("wb") as file:
            np.savez(file, prompt_tokens=np.array(self.prompt_tokens), entry=self.entry, exit=self.exit, **injections)
        part.replace(path)


def load(path: Path) -> Recording:
    """Raises OSError, ValueError or BadZipFile for a file that `save` has not written."""
    with np.load(path, allow_pickle=False) as arrays:
        injections = {int(name.removeprefix("injection.")): arrays[name] for name in arrays.files if name.startswith("injection.")}
        return Recording(int(arrays["prompt_tokens"]), arrays["entry"], arrays["exit"], injections)


def prompt_tokens_of(device: int) -> int:
    return LONG_PROMPT_TOKENS if device % LONG_EVERY == LONG_EVERY - 1 else PROMPT_TOKENS


def text_ids(edge: Path) -> list[int]:
    """All prose of bench/prompts.py in the export's own tokens."""
    from plora.device_runtime.text import Text

    return Text(edge, read_manifest(EdgeManifest, edge)).encode_raw("\n\n".join((PASSAGE, CODE, ITEMS)))


def record(halves: Halves, ids: list[int], prompt_tokens: int, seed: int, core_size: float) -> Recording:
    """One pass over `ids` with random cores of this seed; what it says of the halves' session and cores before is forgotten."""
    random = np.random.default_rng(seed)
    halves.cores = {name: (random.standard_normal(core.shape) * core_size).astype(np.float32) for name, core in halves.cores.items()}
    halves.reset()
    steps = [halves.step(ids[at : at + CHUNK_TOKENS]) for at in range(0, len(ids), CHUNK_TOKENS)]
    rows = {name: np.concatenate([step[name] for step in steps]) for name in steps[0] if name.startswith(("entry", "exit", "injection."))}
    injections = {int(name.removeprefix("injection.")): values for name, values in rows.items() if name.startswith("injection.")}
    return Recording(prompt_tokens, rows["entry"], rows["exit"], injections)


def folder_of(out: Path, scratch: Path = SCRATCH) -> Path:
    """Where the recordings of an export lie: another contract, another folder. out: with `edge` and `cloud`."""
    return scratch / f"{out.name}-{read_manifest(EdgeManifest, out / 'edge').contract_hash[:16]}"


def make(out: Path, count: int, folder: Path | None = None, new_tokens: int = NEW_TOKENS, core_size: float = CORE_SIZE) -> list[Path]:
    """The files of devices 0..count-1 of the export in `out`, those that are not there yet made now."""
    folder = folder or folder_of(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"device-{device:03d}-{new_tokens}.npz" for device in range(count)]
    missing = [device for device, path in enumerate(paths) if not readable(path)]
    if missing:
        import torch

        from plora.export.joined import Halves

        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as fast as two, and on a machine that is not ours alone ten times as fast
        halves, text = Halves(out, "onnx"), text_ids(out / "edge")
        said = began = time.monotonic()
        for done, device in enumerate(missing, start=1):
            prompt = prompt_tokens_of(device)
            ids = [text[(17 * device + at) % len(text)] for at in range(prompt + new_tokens)]
            record(halves, ids, prompt, device, core_size).save(paths[device])
            if (now := time.monotonic()) - said > PROGRESS_SECONDS or done == len(missing):
                said = now
                print(f"{out.name}: recorded {done} of {len(missing)} devices in {now - began:.0f} s", file=sys.stderr, flush=True)
        torch.set_num_threads(threads)
    return paths


def readable(path: Path) -> bool:
    try:
        load(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return True
