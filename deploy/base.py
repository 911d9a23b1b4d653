"""A base image where no registry can be reached: Debian bookworm by debootstrap, with python3.11 and the security updates."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

from .engines import DeployError, Engine, need, need_root

TAG = "plora-base:bookworm"
RELEASE = "bookworm"
PACKAGES = ("ca-certificates", "python3.11")
STRIPPED = (
    "var/cache/apt/*", "var/cache/debconf/*-old", "var/cache/ldconfig/*", "var/lib/apt/lists/*", "var/log/*", "tmp/*", "run/*",
    "usr/share/man/*", "usr/share/info/*", "usr/share/lintian", "usr/share/locale/*", "usr/share/bash-completion",
    "usr/lib/python3*/**/__pycache__", "etc/resolv.conf", "etc/hostname", "etc/machine-id", "etc/apt/apt.conf.d/*proxy*",
)  # fmt: skip
"""Caches, logs, manuals, translations, what is this machine's own. /usr/share/doc/*/copyright stays: the licences ask for it."""


def make_base(engine: Engine, scratch: Path, mirror: str | None, security: str | None) -> None:
    """Leaves the image TAG in the engine's store. mirror, security: addresses; None for debootstrap's own and what lies beside it."""
    need("debootstrap", "it makes the base image; on Debian, apt-get install debootstrap. Or give --base IMAGE to `build`")
    need_root("debootstrap makes devices and changes its root")
    root = scratch / "base"
    shutil.rmtree(root, ignore_errors=True)
    (scratch / "debootstrap.log").unlink(missing_ok=True)
    try:
        print(f"base: debootstrap {RELEASE} with {', '.join(PACKAGES)}", flush=True)
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(root)]
        run_logged([*command, *([mirror] if mirror else [])], scratch / "debootstrap.log")
        update(root, security)
        before = tree_bytes(root)
        strip(root)
        print(f"base: {before / 1e6:.0f} MB, stripped to {tree_bytes(root) / 1e6:.0f} MB", flush=True)
        engine.import_base(root, TAG)
        print(f"base: image {TAG}", flush=True)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def update(root: Path, security: str | None) -> None:
    """Security and point-release updates: debootstrap installs the release as it was."""
    _, mirror, *_ = (root / "etc/apt/sources.list").read_text().split()
    security = security or f"{mirror.rstrip('/')}-security"
    lines = [f"deb {mirror} {RELEASE} main", f"deb {mirror} {RELEASE}-updates main", f"deb {security} {RELEASE}-security main"]
    (root / "etc/apt/sources.list").write_text("\n".join(lines) + "\n")
    print("base: security updates", flush=True)
    log = root.parent / "debootstrap.log"
    run_logged(["chroot", str(root), "apt-get", "--quiet", "update"], log)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]
    run_logged(["chroot", str(root), *environment, "apt-get", "--quiet", "--yes", "dist-upgrade"], log)


def strip(root: Path) -> None:
    for path in [path for pattern in STRIPPED for path in root.glob(pattern)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.exists() or path.is_symlink():
            path.unlink()
    for path in sorted((root / "usr/share/doc").rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.name != "copyright" and not path.is_dir():  # a linked folder leads to another package's copyright
            path.unlink()


def run_logged(command: list[str], log: Path) -> None:
    """Output to a file; a failure shows its end."""
    with log.open("a", encoding="utf-8") as written:
        process = subprocess.Popen(command, stdout=written, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if code:
        raise DeployError(f"{' '.join(command[:4])} … ended with {code}; see {log}:\n" + "\n".join(log.read_text().splitlines()[-5:]))


def tree_bytes(root: Path) -> int:
    """Of all regular files below, each counted once however many names it has."""
    seen: dict[tuple[int, int], int] = {}
    for folder, _, names in os.walk(root):
        for status in (os.lstat(os.path.join(folder, name)) for name in names):
            if stat.S_ISREG(status.st_mode):
                seen[status.st_dev, status.st_ino] = status.st_size
    return sum(seen.values())
