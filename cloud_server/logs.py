"""Logs: one line per event, as text or JSON, with fields that have names. They never hold an activation, a text or a token.

An event is a sentence that never changes and its fields. Of an exception only its kind and the places it passed are written: messages
of libraries may quote values.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import traceback
from pathlib import Path
from typing import Any

from ..artifact.errors import printable

FORMATS = ("text", "json")
LEVELS = ("debug", "info", "warning", "error")


def event(log: logging.Logger, level: int, what: str, **fields: Any) -> None:
    """fields: numbers, codes, names and addresses; whatever identifies a session goes through `session_name`."""
    log.log(level, what, extra={"fields": fields})


def session_name(session_id: bytes) -> str:
    """What logs call a session. Whoever knows an id can take the session up, so it is no name."""
    return hashlib.sha256(session_id).hexdigest()[:8]


def set_up(form: str, level: str) -> None:
    """For the process's own command: everything from `level` on goes to standard error in that form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = dict(getattr(record, "fields", {}))
    if record.exc_info and record.exc_info[1] is not None:
        error = record.exc_info[1]
        found["error"] = type(error).__name__
        found["at"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    return found


def _time(record: logging.LogRecord) -> str:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")


def _what(record: logging.LogRecord) -> str:
    """The event; of another library's message the first line, since those that tell of an exception quote it in the next."""
    message = record.getMessage()
    if not record.name.startswith("plora"):
        message = message.partition("\n")[0]
    return printable(message)


class JsonFormatter(logging.Formatter):
    """{"time", "level", "logger", "event", …fields} on a line."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "logger": record.name, "event": _what(record)}
        return json.dumps({**line, **_fields(record)}, default=str)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={json.dumps(value, default=str)}" for name, value in _fields(record).items())
        return f"{_time(record)} {record.levelname:7} {_what(record)}{fields}"
