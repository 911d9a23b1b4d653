"""Files that may change while we run: read from the disk with the flag that named them, and looked at again now and then."""

from __future__ import annotations

from pathlib import Path

from .errors import MissingFile

Stamp = tuple[tuple[int, int, int, int] | None, ...]


def read_named(flag: str, path: Path) -> bytes:
    """Raises MissingFile naming the flag."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingFile(f"{flag} {path}: cannot be read ({error.strerror})") from None


def stamp(*paths: Path) -> Stamp:
    """Changes whenever one of the files does, is replaced, or gets other rights."""
    found: list[tuple[int, int, int, int] | None] = []
    for path in paths:
        try:
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
        except OSError:
            found.append(None)
    return tuple(found)
