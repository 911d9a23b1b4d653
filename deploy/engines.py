"""Three ways to build and run one image: docker and podman, which have one command line, and buildah with runc, which need no daemon.

Every container, mount and working copy is gone when its `with` block ends, Ctrl-C included.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

READY_SECONDS = 120
PORT = 7070
"""Inside the container, where it has a network of its own."""


class DeployError(Exception):
    """Said in one line; the exit code is 1."""


def run(*command: str | Path, shown: bool = False) -> str:
    """What the command printed. shown: on the terminal instead, as it comes. Raises DeployError with its last words if it fails."""
    pipe = None if shown else subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
    try:
        output, errors = process.communicate()
    except BaseException:  # Ctrl-C reached it as well: let it clean up before we do
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if process.returncode:
        words = " ".join(map(str, command[:4]))
        raise DeployError(f"{words} … ended with {process.returncode}" + (f": {errors.strip()[-600:]}" if errors else ""))
    return output


def need(program: str, why: str) -> None:
    if shutil.which(program) is None:
        raise DeployError(f"{program} is not installed: {why}")


def need_root(why: str) -> None:
    if os.geteuid() != 0:
        raise DeployError(f"not root: {why}")


@dataclass(frozen=True)
class Spec:
    """What a container is given. mounts: path inside -> folder outside, all read-only; environment: over the image's."""

    mounts: dict[str, Path]
    environment: dict[str, str] = field(default_factory=dict)


class Daemon:
    """docker or podman: the same words for both."""

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self) -> None:
        """Raises DeployError if this engine cannot work here."""
        need(self.name, "name another --engine, or install it")
        if subprocess.run([self.name, "info"], capture_output=True, check=False).returncode:
            raise DeployError(f"`{self.name} info` fails: its daemon does not run, or you may not speak to it; --engine buildah needs none")

    def build(self, dockerfile: Path, context: Path, tag: str, arguments: dict[str, str]) -> None:
        flags = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        # podman would drop the health check from its own format
        form = ["--format", "docker"] if self.name == "podman" else []
        run(self.name, "build", "--force-rm", *form, *flags, "--file", dockerfile, "--tag", tag, context, shown=True)

    def import_base(self, folder: Path, tag: str) -> None:
        """An image of one layer from a root file system."""
        with tempfile.TemporaryFile() as packed:
            subprocess.run(["tar", "--create", "--numeric-owner", "--directory", folder, "."], stdout=packed, check=True)
            packed.seek(0)
            subprocess.run([self.name, "import", "-", tag], stdin=packed, stdout=subprocess.DEVNULL, check=True)

    def has(self, tag: str) -> bool:
        return not subprocess.run([self.name, "image", "inspect", tag], capture_output=True, check=False).returncode

    def image_config(self, tag: str) -> dict[str, Any]:
        (image,) = json.loads(run(self.name, "image", "inspect", tag))
        return {"Healthcheck": image.get("Healthcheck"), **image["Config"]}

    @contextmanager
    def files(self, tag: str) -> Iterator[Path]:
        """A folder with the image's files."""
        name = run(self.name, "create", tag, "true").strip()  # a base that was imported names no command
        try:
            with tempfile.TemporaryDirectory() as folder:
                export = subprocess.Popen([self.name, "export", name], stdout=subprocess.PIPE)
                subprocess.run(
                    ["tar", "--extract", "--no-same-owner", "--exclude=dev/*", "--directory", folder], stdin=export.stdout, check=True
                )
                export.wait()
                yield Path(folder)
        finally:
            run(self.name, "rm", "--force", name)

    @contextmanager
    def container(self, tag: str, spec: Spec) -> Iterator[Container]:
        """Started, not yet ready."""
        name = f"plora-cloud-{uuid.uuid4().hex[:8]}"
        mounts = [word for inside, outside in spec.mounts.items() for word in ("--volume", f"{outside}:{inside}:ro")]
        settings = {**spec.environment, "PLORA_CLOUD_LISTEN": f"0.0.0.0:{PORT}"}
        variables = [word for key, value in settings.items() for word in ("--env", f"{key}={value}")]
        limits = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "512")
        if self.name == "podman":
            limits += ("--read-only-tmpfs=false",)  # nothing writable at all, as with docker
        publish = ("--publish", f"127.0.0.1::{PORT}")
        try:
            run(self.name, "run", "--detach", "--name", name, *limits, *publish, *mounts, *variables, tag)
            address = run(self.name, "port", name, f"{PORT}/tcp").split()[0]
            yield DaemonContainer(self.name, name, address)
        finally:
            subprocess.run([self.name, "rm", "--force", name], capture_output=True, check=False)


@dataclass(frozen=True)
class DaemonContainer:
    """address: HOST:PORT on loopback at which a device finds the server."""

    engine: str
    name: str
    address: str

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as the server's user."""
        return subprocess.run([self.engine, "exec", self.name, *command], capture_output=True, text=True, check=False)

    def log(self) -> str:
        return subprocess.run(
            [self.engine, "logs", self.name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        ).stdout

    def exit_code(self) -> int | None:
        """None while it runs."""
        running, code = run(self.engine, "inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", self.name).split()
        return None if running == "true" else int(code)

    def health(self) -> str | None:
        """What the engine makes of the image's own health check; None if it runs none."""
        if self.engine == "podman":  # its timer is systemd's; this is one turn of it
            return "unhealthy" if subprocess.run(["podman", "healthcheck", "run", self.name], check=False).returncode else "healthy"
        return run(self.engine, "inspect", "--format", "{{.State.Health.Status}}", self.name).strip()

    def stop(self, seconds: float) -> tuple[int, float]:
        """SIGTERM. Returns (exit code, seconds that it took). Raises DeployError past `seconds`."""
        start = time.monotonic()
        run(self.engine, "kill", "--signal", "TERM", self.name)
        while (code := self.exit_code()) is None:
            if time.monotonic() - start > seconds:
                raise DeployError(f"SIGTERM did not end the container within {seconds:.0f} s")
            time.sleep(0.1)
        return code, time.monotonic() - start


class Buildah:
    """Builds with `buildah bud --isolation chroot`, runs with runc or crun on the host's network; all as root, without a daemon.

    buildah picks its storage driver; STORAGE_DRIVER=vfs works where overlay does not, slower."""

    name = "buildah"

    def check(self) -> None:
        need("buildah", "on Debian, apt-get install buildah; or name another --engine")
        need_root("buildah is driven as root here, because the image is mounted to be run; with --engine podman you need not be")

    def build(self, dockerfile: Path, context: Path, tag: str, arguments: dict[str, str]) -> None:
        flags = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
        # The docker format: OCI's has no health check. --pull=false: a base that was made here is in no registry.
        form = ("--isolation", "chroot", "--format", "docker", "--pull=false", "--layers=false")
        run("buildah", "bud", *form, *flags, "--file", dockerfile, "--tag", tag, context, shown=True)

    def import_base(self, folder: Path, tag: str) -> None:
        name = run("buildah", "from", "scratch").strip()
        try:
            run("buildah", "add", "--quiet", name, folder, "/")
            run("buildah", "config", "--cmd", '["python3.11"]', "--env", "LANG=C.UTF-8", name)
            run("buildah", "commit", "--quiet", "--format", "docker", name, tag)
        finally:
            run("buildah", "rm", name)

    def has(self, tag: str) -> bool:
        return not subprocess.run(["buildah", "inspect", "--type", "image", tag], capture_output=True, check=False).returncode

    def image_config(self, tag: str) -> dict[str, Any]:
        return json.loads(run("buildah", "inspect", "--type", "image", tag))["Docker"]["config"]

    @contextmanager
    def files(self, tag: str) -> Iterator[Path]:
        name = run("buildah", "from", "--pull-never", tag).strip()
        try:
            yield Path(run("buildah", "mount", name).strip())
        finally:
            run("buildah", "rm", name)  # unmounts as well

    @contextmanager
    def container(self, tag: str, spec: Spec) -> Iterator[Container]:
        runtime = low_level_runtime()
        config = self.image_config(tag)
        port, ops = free_ports(2)
        # On the host's network: free ports of loopback, and no others
        environment = {"PLORA_CLOUD_LISTEN": f"127.0.0.1:{port}", "PLORA_CLOUD_OPS": f"127.0.0.1:{ops}", **spec.environment}
        with self.files(tag) as root, tempfile.TemporaryDirectory() as bundle:
            run(*runtime, "spec", "--bundle", bundle)
            path = Path(bundle, "config.json")
            path.write_text(json.dumps(runtime_config(json.loads(path.read_text()), config, root, spec.mounts, environment)))
            name = f"plora-cloud-{uuid.uuid4().hex[:8]}"
            with open(Path(bundle, "log"), "w+", encoding="utf-8") as log:
                command = [*runtime, "run", "--bundle", bundle, name]
                # In a session of its own, so that Ctrl-C ends it below and not by itself
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
                try:
                    yield RuntimeContainer(runtime, name, f"127.0.0.1:{port}", process, Path(log.name))
                finally:
                    subprocess.run([*runtime, "delete", "--force", name], capture_output=True, check=False)
                    process.wait()


def low_level_runtime() -> tuple[str, ...]:
    """runc or crun. No limits of memory or processes are set through them here: engines set those."""
    for runtime in (("runc",), ("crun", "--cgroup-manager=disabled")):  # crun 1.8 refuses hybrid control groups even so
        if shutil.which(runtime[0]):
            return runtime
    raise DeployError("neither runc nor crun is installed, which run what buildah built; on Debian, apt-get install runc")


@dataclass(frozen=True)
class RuntimeContainer:
    """The same of a container that runc or crun runs."""

    runtime: tuple[str, ...]
    name: str
    address: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.runtime, "exec", self.name, *command], capture_output=True, text=True, check=False)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def exit_code(self) -> int | None:
        return self.process.poll()

    def health(self) -> str | None:
        return None

    def stop(self, seconds: float) -> tuple[int, float]:
        start = time.monotonic()
        run(*self.runtime, "kill", self.name, "TERM")
        try:
            return self.process.wait(seconds), time.monotonic() - start
        except subprocess.TimeoutExpired:
            raise DeployError(f"SIGTERM did not end the container within {seconds:.0f} s") from None


Container = DaemonContainer | RuntimeContainer
Engine = Daemon | Buildah


def runtime_config(
    spec: dict[str, Any], image: dict[str, Any], root: Path, mounts: dict[str, Path], environment: dict[str, str]
) -> dict[str, Any]:
    """The runtime's own example of a config.json, made into what `docker run --read-only --cap-drop ALL --network host` asks for."""
    user, group = (int(number) for number in image["User"].split(":"))
    variables = dict(entry.split("=", 1) for entry in image["Env"]) | environment
    process = {
        **spec["process"],
        "terminal": False,
        "user": {"uid": user, "gid": group},
        "args": [*image["Entrypoint"], *image["Cmd"]],
        "env": [f"{name}={value}" for name, value in variables.items()],
        "cwd": image.get("WorkingDir") or "/",
        "capabilities": {},
        "noNewPrivileges": True,
    }
    linux = {**spec["linux"], "namespaces": [space for space in spec["linux"]["namespaces"] if space["type"] not in ("network", "cgroup")]}
    linux.pop("resources", None)
    kept = [mount for mount in spec["mounts"] if "cgroup" not in mount["destination"]]
    bound = [
        {"destination": inside, "source": str(outside.resolve()), "type": "bind", "options": ["rbind", "ro", "nosuid", "nodev"]}
        for inside, outside in mounts.items()
    ]
    return {**spec, "process": process, "linux": linux, "root": {"path": str(root), "readonly": True}, "mounts": [*kept, *bound]}


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listening.getsockname()[1] for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


def choose(name: str | None) -> Engine:
    """The engine of that name, or the first that works here."""
    engines: list[Engine] = [Daemon("docker"), Daemon("podman"), Buildah()]
    if name:
        engine = next(engine for engine in engines if engine.name == name)
        engine.check()
        return engine
    reasons = []
    for engine in engines:
        try:
            engine.check()
        except DeployError as error:
            reasons.append(f"{engine.name}: {error}")
        else:
            return engine
    raise DeployError("no engine works here: " + "; ".join(reasons))
