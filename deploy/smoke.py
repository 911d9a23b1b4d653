"""Runs the image as an operator would, and answers a device from outside it.

Read-only root, no capability, uid 10001; artifact, certificate and tokens mounted read-only; SIGTERM at the end.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .engines import READY_SECONDS, Container, DeployError, Engine, Spec, run

PROMPT = "the quick brown fox"
TOKENS = 32
REFUSED = 8
"""plora-device's exit code for a cloud that refuses it."""
UID = 10001
GRACE_SECONDS = 10
HEALTH_SECONDS = 30
"""Of which the interval is 10."""
STOP_SECONDS = GRACE_SECONDS + 5.0
PYTHON = "/opt/plora/bin/python"
CLOUD = "/opt/plora/bin/plora-cloud"
PROBE = """
import json, os
def writable(folder):
    path = os.path.join(folder, "probe")
    try:
        open(path, "w").close()
    except OSError:
        return False
    os.unlink(path)
    return True
found, setuid = [], []
for folder, below, names in os.walk("/"):
    if folder == "/":
        below[:] = [name for name in below if name not in ("proc", "sys", "dev")]
    found += [folder] if writable(folder) else []
    setuid += [name for name in names if os.lstat(os.path.join(folder, name)).st_mode & 0o6000]
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
print(json.dumps({
    "uid": status["Uid"].split(), "capabilities": status["CapEff"].strip(), "no_new_privileges": status["NoNewPrivs"].strip(),
    "writable": found, "setuid": setuid,
}))
"""
"""Runs inside: what the first process may do, where a file can be written, and what would run as somebody else."""


def smoke(engine: Engine, tag: str, scratch: Path, artifact: Path | None, prompt: str) -> None:
    folder = scratch / "smoke"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected = None
    if artifact is None:
        print("smoke: exporting a tiny model", flush=True)
        artifact, expected = tiny_export(folder, prompt)
    elif not (artifact / "cloud").is_dir() or not (artifact / "edge").is_dir():
        raise DeployError(f"{artifact} is no export: expected the folders cloud and edge in it")
    spec = secrets(folder, artifact)
    with engine.container(tag, spec) as container:
        seconds = wait_until_ready(container)
        print(f"smoke: `plora-cloud health` says ready after {seconds:.1f} s, at {container.address}", flush=True)
        confined(container)
        watched(container, engine.name)
        device = Device(folder, artifact / "edge", prompt, raw=expected is not None)
        answer = device.answer(container.address)
        if expected is not None and answer["token_ids"] != expected:
            raise DeployError(f"the device got tokens {answer['token_ids']}, expected {expected}")
        said = "those of the unsplit model" if expected is not None else repr(answer["text"])
        print(f"smoke: a device from outside got {len(answer['token_ids'])} tokens over TLS with its token: {said}", flush=True)
        print(f"smoke: a wrong token is refused: {device.refused(container.address)}", flush=True)
        code, seconds = container.stop(STOP_SECONDS)
        if code:
            raise DeployError(f"SIGTERM ended it with {code}, expected 0:\n{container.log()[-2000:]}")
        print(f"smoke: SIGTERM ended it with 0 after {seconds:.1f} s", flush=True)


def tiny_export(folder: Path, prompt: str) -> tuple[Path, list[int]]:
    """A random model's export with layers on the device, and the tokens that transformers gives for it."""
    import torch

    from plora.artifact import entry_plan
    from plora.models.checkpoint import read_base
    from plora.models.formula import adapted
    from tests.conftest import make_export, tiny_tokenizer

    made = make_export(folder / "model", plan=lambda layers: entry_plan(layers, 1, 6, back_layers=1), head_dim=16)
    model = read_base(str(made.base)).model
    ids = torch.tensor([tiny_tokenizer(300)(prompt)["input_ids"]])
    with adapted(model, made.adapter):
        tokens = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
    return made.out, tokens


def secrets(folder: Path, artifact: Path) -> Spec:
    """A certificate and two tokens, as an operator makes them, readable for the container's user."""
    cloud = Path(sys.executable).parent / "plora-cloud"
    tls, tokens = folder / "tls", folder / "tokens"
    tokens.mkdir()
    run(cloud, "certificate", "--host", "localhost", "--host", "127.0.0.1", "--out", tls)
    told = run(cloud, "token", "add", "smoke", "--tokens", tokens / "tokens")
    (folder / "token").write_text(told.split()[-1] + "\n")
    (folder / "wrong-token").write_text(told.split()[-1][:-4] + "AAAA\n")
    for path in (tls, tokens, *tls.iterdir(), *tokens.iterdir()):
        if os.geteuid() == 0:
            os.chown(path, UID, UID)
        else:  # an engine without root maps our ids to others
            path.chmod(0o755 if path.is_dir() else 0o644)
    environment = {
        "PLORA_CLOUD_TLS_CERT": "/etc/plora/tls/cert.pem",
        "PLORA_CLOUD_TLS_KEY": "/etc/plora/tls/key.pem",
        "PLORA_CLOUD_TOKENS": "/etc/plora/tokens/tokens",
        "PLORA_CLOUD_GRACE_SECONDS": str(GRACE_SECONDS),
        "PLORA_CLOUD_DRAIN_SECONDS": "0",
        "PLORA_CLOUD_KV_BYTES": "500000000",
        "PLORA_CLOUD_THREADS": "1",
        "PLORA_CLOUD_LOG_FORMAT": "json",
    }
    return Spec({"/artifact": artifact / "cloud", "/etc/plora/tls": tls, "/etc/plora/tokens": tokens}, environment)


def wait_until_ready(container: Container) -> float:
    start = time.monotonic()
    while True:
        if (code := container.exit_code()) is not None:
            raise DeployError(f"the server ended with {code}:\n{container.log()[-2000:]}")
        if container.execute(CLOUD, "health").returncode == 0:
            return time.monotonic() - start
        if time.monotonic() - start > READY_SECONDS:
            raise DeployError(f"not ready after {READY_SECONDS} s:\n{container.log()[-2000:]}")
        time.sleep(0.5)


def confined(container: Container) -> None:
    """Raises DeployError unless the server is an ordinary user who can gain nothing and write nowhere."""
    probe = container.execute(PYTHON, "-c", PROBE)
    if probe.returncode:
        raise DeployError(f"the probe failed: {probe.stderr[-600:]}")
    found: dict[str, Any] = json.loads(probe.stdout)
    expected = {"uid": [str(UID)] * 4, "capabilities": "0" * 16, "no_new_privileges": "1", "writable": [], "setuid": []}
    if found != expected:
        raise DeployError(f"the container is confined to {found}, expected {expected}")
    print(f"smoke: uid {UID}, no capability, no new privileges, no setuid program, no folder that it could write to", flush=True)


def watched(container: Container, engine: str) -> None:
    """Waits until the engine's own health check has come round."""
    end = time.monotonic() + HEALTH_SECONDS
    while (said := container.health()) not in (None, "healthy"):
        if time.monotonic() > end:
            raise DeployError(f"{engine} says {said} after {HEALTH_SECONDS} s")
        time.sleep(0.5)
    print(f"smoke: {engine} says {said}" if said else f"smoke: {engine} runs no health check by itself", flush=True)


@dataclass(frozen=True)
class Device:
    """A phone's part, played by this machine. raw: the prompt as it is, without the chat template."""

    folder: Path
    edge: Path
    prompt: str
    raw: bool

    def ask(self, address: str, token: str) -> subprocess.CompletedProcess[str]:
        """Its answer as JSON. token: name of a file."""
        words = ["generate", self.prompt, "--edge", self.edge, "--cloud", address, *(["--raw"] if self.raw else []), "--json"]
        door = ["--ca", self.folder / "tls" / "cert.pem", "--token-file", self.folder / token, "--give-up-seconds", 5]
        command = [Path(sys.executable).parent / "plora-device", *words, *door, "--max-tokens", TOKENS, "--temperature", 0]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)

    def answer(self, address: str) -> dict[str, Any]:
        answered = self.ask(address, "token")
        if answered.returncode:
            raise DeployError(f"the device ended with {answered.returncode}: {answered.stderr[-600:]}")
        return json.loads(answered.stdout)

    def refused(self, address: str) -> str:
        """The negative control: why a wrong token is not answered."""
        answered = self.ask(address, "wrong-token")
        if answered.returncode != REFUSED:
            raise DeployError(f"a device with a wrong token ended with {answered.returncode}, expected {REFUSED}: {answered.stderr[-600:]}")
        return re.sub(r"\s+", " ", answered.stderr.strip().rpartition("\n")[2])
