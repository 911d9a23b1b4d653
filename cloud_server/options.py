"""The server's settings as flags, environment variables and a file: one list for every command that reads them.

A flag goes before PLORA_CLOUD_<FLAG>, that before the file's key, that before the default; click keeps account of which it was.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..artifact.console import reports_errors
from ..artifact.errors import UsageError
from ..artifact.watched import read_named
from .logs import FORMATS, LEVELS

PREFIX = "PLORA_CLOUD_"
ORCHESTRATORS = re.compile(r"SERVICE_(HOST|PORT.*)|PORT(_\d+_(TCP|UDP).*)?")
"""What Kubernetes sets for a service that is called plora-cloud."""

TOML_TYPES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

Command = TypeVar("Command", bound=Callable[..., Any])


@reports_errors
def read_file(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Makes the file's values the command's defaults. Raises MissingFile, UsageError naming the key."""
    if path is None:
        return None
    try:
        values = tomllib.loads(read_named("--config", path).decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: not TOML: {error}") from None
    known = settings()
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, list(known), 1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"
            raise UsageError(f"--config {path}: {key}: no such key; {hint}")
        defaults[key] = _checked(f"--config {path}: {key}", known[key], value, context)
    context.default_map = defaults
    return path


def _checked(where: str, parameter: click.Parameter, value: Any, context: click.Context) -> Any:
    """TOML has types of its own: true is no number, and 1.5 no whole one."""
    kind = parameter.type
    wanted: tuple[type, ...] = (str,)
    if isinstance(kind, click.types.BoolParamType):
        wanted = (bool,)
    elif isinstance(kind, click.types.IntParamType):
        wanted = (int,)
    elif isinstance(kind, click.types.FloatParamType):
        wanted = (int, float)
    if type(value) not in wanted:
        raise UsageError(f"{where}: got {value!r}, expected {TOML_TYPES[wanted[-1]]}")
    try:
        return value if isinstance(value, bool) else kind.convert(value, parameter, context)
    except click.UsageError as error:
        raise UsageError(f"{where}: {error.message}") from None


def unknown_variables() -> list[str]:
    """Names in the environment that look like ours and mean nothing: most likely misspelt."""
    known = {PREFIX + name.upper() for name in (*settings(), "config")}
    ours = (name for name in os.environ if name.startswith(PREFIX))
    return sorted(name for name in ours if name not in known and not ORCHESTRATORS.fullmatch(name.removeprefix(PREFIX)))


def _option(name: str, **more: Any) -> Callable[[Command], Command]:
    return click.option(f"--{name}", envvar=PREFIX + name.replace("-", "_").upper(), **more)


PATH = click.Path(path_type=Path)
OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("artifact", metavar="DIR", type=PATH, required=False, envvar=f"{PREFIX}ARTIFACT"),
    click.option(
        "--config",
        type=PATH,
        envvar=f"{PREFIX}CONFIG",
        metavar="FILE",
        is_eager=True,
        expose_value=False,
        callback=read_file,
        help="TOML; its keys are these flags with underscores, and `artifact` for DIR.",
    ),
    _option("listen", default="127.0.0.1:7070", show_default=True, metavar="HOST:PORT", help="Where to listen; port 0 picks a free one."),
    _option("tls-cert", type=PATH, metavar="FILE", help="Certificate and chain, PEM. Read again when it changes."),
    _option("tls-key", type=PATH, metavar="FILE", help="Its private key, PEM."),
    _option("client-ca", type=PATH, metavar="FILE", help="Serve only devices that show a certificate signed by this one (mutual TLS)."),
    _option("tokens", type=PATH, metavar="FILE", help="Serve only users with an access token in this file (`plora-cloud token`)."),
    _option("without-tls", is_flag=True, help="Listen beyond loopback although there is no TLS."),
    _option("without-tokens", is_flag=True, help="Listen beyond loopback although whoever asks is served."),
    _option("ops", metavar="HOST:PORT", help="Serve /metrics, /healthz and /readyz over HTTP here. [default: nowhere]"),
    _option("open-ops", is_flag=True, help="Serve these beyond loopback, to whoever asks."),
    _option("kv-bytes", default=2 << 30, show_default=True, metavar="N", help="Budget of all sessions' KV caches, in bytes."),
    _option("context", type=int, metavar="TOKENS", help="Most tokens of one session. [default: the model's context, at most 2048]"),
    _option("sessions", type=int, metavar="N", help="Sessions at a time. [default: as many as the budget has blocks for, at most 1024]"),
    _option("connections", default=2048, show_default=True, metavar="N", help="Connections at a time, those that never greet included."),
    _option("inbox-bytes", default=256 << 20, show_default=True, metavar="N", help="Frames that may wait, beyond one of each session."),
    _option("threads", default=0, metavar="N", help="Threads of one matrix product. [default: torch's choice]"),
    _option("idle-seconds", default=300.0, show_default=True, metavar="S", help="A session that is silent for so long expires."),
    _option(
        "lease-seconds",
        default=60.0,
        show_default=True,
        metavar="S",
        help="How long a session outlives its connection, so that a device whose link broke goes on where it was; 0 for not at all.",
    ),
    _option(
        "quiet-seconds",
        default=30.0,
        show_default=True,
        metavar="S",
        help="A session that has had nothing to do for so long may be sent away when there is no room; its device refills another one.",
    ),
    _option("user-sessions", default=0, metavar="N", help="Sessions of one user at a time. [default: no limit]"),
    _option("user-kv-bytes", default=0, metavar="N", help="KV cache of one user's sessions, in bytes. [default: no limit]"),
    _option("user-tokens-per-minute", default=0, metavar="N", help="Tokens computed for one user. [default: no limit]"),
    _option("user-tokens-per-day", default=0, metavar="N", help="The same over a day. [default: no limit]"),
    _option("user-connections", default=0, metavar="N", help="Connections of one user at a time. [default: no limit]"),
    _option("user-connections-per-minute", default=0, metavar="N", help="New connections of one user. [default: no limit]"),
    _option(
        "drain-seconds",
        default=0.0,
        show_default=True,
        metavar="S",
        help="After SIGTERM: be not ready, but serve as before, until balancers have noticed.",
    ),
    _option("grace-seconds", default=10.0, show_default=True, metavar="S", help="Then: time for answers that are under way."),
    _option("log-format", type=click.Choice(FORMATS), default="text", show_default=True, help="Of the lines on standard error."),
    _option(
        "log-level",
        type=click.Choice(LEVELS),
        default="warning",
        show_default=True,
        help="info: every session's begin and end. Never text, tokens or activations.",
    ),
)


def settings() -> dict[str, click.Parameter]:
    """Every setting but the file itself, by its key."""

    @click.command()
    @server_options
    def every() -> None: ...

    return {str(each.name): each for each in every.params if each.name != "config"}


def server_options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return command
