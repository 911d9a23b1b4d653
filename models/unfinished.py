"""The private folder OUT.unfinished of a run that is not done: what it takes to go on, bit for bit, after Ctrl-C or a crash.

settings.json       what shapes the run; another command may not resume it
start/              the adapter before the first step: its basis is not computed again
checkpoint-N/       after step N, whole or not there: cores, metrics, and the Trainer's own state
partial/            a checkpoint being written
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..artifact.errors import UsageError
from ..artifact.folders import new_folder
from ..artifact.manifest import read_json, write_json
from .adapter import Adapter, read_adapter, write_adapter

Settings = dict[str, str | int | float | None]
SETTINGS = "settings.json"


@dataclass(frozen=True)
class Unfinished:
    """`folder` need not exist yet."""

    folder: Path

    @classmethod
    def of(cls, out: Path) -> Unfinished:
        return cls(out.absolute().with_name(f"{out.absolute().name}.unfinished"))

    @property
    def writing(self) -> Path:
        """Where the Trainer writes checkpoint-N before it counts."""
        return self.folder / "partial"

    def resumable(self, settings: Settings, restart: bool) -> bool:
        """Whether there is a run with these settings, which is not to `restart`.

        Raises UsageError if there is one with others, or something else.
        """
        if not self.folder.exists():
            return False
        if not (self.folder / SETTINGS).is_file():
            raise UsageError(f"{self.folder}: not left by plora-tune; move it away, or choose another --out")
        if restart:
            return False
        began = read_json(self.folder / SETTINGS)
        differing = [
            f"{name}: {_shown(began.get(name))} then, {_shown(settings.get(name))} now"
            for name in dict.fromkeys([*settings, *began])
            if began.get(name) != settings.get(name)
        ]
        if differing:
            raise UsageError(
                f"{self.folder} holds a run with other settings ({'; '.join(differing)}); give the same ones to resume it, or --restart "
                "to discard it"
            )
        return True

    def begin(self, settings: Settings, adapter: Adapter) -> None:
        """Makes the folder, whole or not at all."""
        with new_folder(self.folder) as folder:
            folder.chmod(0o700)
            write_json(folder / SETTINGS, settings)
            write_adapter(adapter, folder / "start")

    def start(self) -> Adapter:
        """The adapter before the first step."""
        return read_adapter(self.folder / "start")

    def latest(self) -> tuple[int, Path] | None:
        """(step, folder) of the last whole checkpoint."""
        found = {
            int(match[1]): path for path in self.folder.glob("checkpoint-*") if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
        }
        return (max(found), found[max(found)]) if found else None

    def commit(self, step: int) -> None:
        """The checkpoint of `step` counts from here on; the one before goes."""
        before = list(self.folder.glob("checkpoint-*"))
        os.replace(self.writing / f"checkpoint-{step}", self.folder / f"checkpoint-{step}")
        for path in before:
            shutil.rmtree(path)

    def remove(self) -> None:
        """In one stroke: a kill in the middle leaves nothing that could be taken for a run."""
        doomed = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.removed")
        try:
            os.replace(self.folder, doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other plora-tune works for this --out meanwhile. Raises UsageError if one does. The folder may come and go inside the
        block: the lock lies beside it."""
        lock = self.folder.with_name(f".{self.folder.name}.lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(f"{self.folder}: another plora-tune is at work there; wait for it, or choose another --out") from None
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _shown(value: object) -> str:
    return "not given" if value is None else str(value)
