"""A folder or file appears whole or not at all: written beside its place under a temporary name, then renamed."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UsageError


def check_new(out: Path, replace: bool = False) -> None:
    """Raises UsageError if `out` cannot be made: before the work, not after it."""
    if out.exists() and not replace:
        raise UsageError(f"{out}: already exists; choose another --out or pass --replace")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{out}: cannot be made, {parent} is not a writable folder")


@contextmanager
def new_folder(out: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` if the block ends without an exception, and else is removed."""
    check_new(out, replace)
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        check_new(out, replace)  # somebody else may have made it meanwhile
        if out.exists():
            _replace(temporary, out)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    """Puts `new` in the place of `out`; what was there goes once the new one stands, and comes back if it cannot."""
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    aside = old / out.name
    try:
        os.replace(out, aside)
        os.replace(new, out)
    except BaseException:
        if aside.exists() and not out.exists():
            os.replace(aside, out)
        shutil.rmtree(old)
        raise
    shutil.rmtree(old)


@contextmanager
def new_file(out: Path) -> Iterator[Path]:
    """A temporary file path that becomes `out` (replacing it) if the block ends without an exception."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def renewed_file(out: Path, mode: int = 0o600) -> Iterator[Path]:
    """`new_file`, made beforehand: with mode and owner of the file that it replaces, else with `mode` and this process's. Another owner
    is kept by root alone. Raises OSError if the folder, or that group, is out of reach."""
    before = out.stat() if out.exists() else None
    with new_file(out) as temporary:
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=mode if before is None else 0o600, exist_ok=False)
        if before is not None:
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):  # root may do it for a server that is not
                os.chown(temporary, before.st_uid if os.geteuid() == 0 else -1, before.st_gid)
            temporary.chmod(stat.S_IMODE(before.st_mode))
        yield temporary
