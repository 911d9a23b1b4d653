"""`plora-cloud`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..artifact.console import CLICK_CONTEXT, INTERRUPTED, reports_errors
from ..artifact.errors import UsageError
from .options import PATH, server_options, settings, unknown_variables

if TYPE_CHECKING:
    from .config import ServerConfig
    from .engine import Engine

log = logging.getLogger("plora.cloud")


@click.group(context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
def main() -> None:
    """The cloud half of a PrivateLoRA model."""


@main.command()
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object once ready, instead of a line.")
@click.option("--verbose", is_flag=True, help="The same as --log-level info.")
@reports_errors
def serve(as_json: bool, verbose: bool, log_format: str, log_level: str, **values: Any) -> None:
    """Serve the cloud half in DIR (the `cloud` folder of an export) until SIGTERM.

    Prints `listening on HOST:PORT` once it accepts sessions. Everything that a session sends is a tensor of activations; text
    and tokens stay on the device. Beyond loopback it wants TLS and access tokens, unless told otherwise. Every flag may be given in
    the environment, as in PLORA_CLOUD_KV_BYTES, or in a file (--config). docs/operating.md has the whole story.
    """
    # Until it serves there is nothing to clean up, and an exception may get lost in an import.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))
    from .logs import event, set_up
    from .serve import serve

    set_up(log_format, "info" if verbose and log_level == "warning" else log_level)
    for name in unknown_variables():
        event(log, logging.WARNING, "a variable of the environment that means nothing", name=name)

    def ready(address: str, ops: str | None, engine: Engine) -> None:
        pool = engine.pool
        facts = {
            "listening": address,
            "ops": ops,
            "contract": engine.contract.hash,
            "sessions": pool.slots,
            "context_tokens": pool.context_tokens,
            "kv_bytes": pool.blocks * pool.block_bytes,
            "kv_bytes_per_token": pool.token_bytes,
            "round_trips_per_step": engine.plan.round_trips,
        }
        if as_json:
            click.echo(json.dumps(facts))
        else:
            click.echo(
                f"up to {pool.slots:,} sessions of at most {pool.context_tokens:,} tokens, "
                f"{pool.blocks * pool.block_tokens:,} tokens in all ({pool.token_bytes:,} bytes of KV cache each)"
            )
            if ops:
                click.echo(f"metrics on http://{ops}/metrics")
            click.echo(f"listening on {address}")

    asyncio.run(serve(config_of(values), ready))


def config_of(values: dict[str, Any]) -> ServerConfig:
    """From the values of server_options. Raises UsageError."""
    from .config import Door, Limits, ServerConfig
    from .quota import Quota
    from .tls import Files

    def some(*names: str) -> dict[str, Any]:
        return {name: values[name] for name in names}

    if values["artifact"] is None:
        raise UsageError("DIR is missing: name the `cloud` folder of an export, or set PLORA_CLOUD_ARTIFACT, or `artifact` in --config")
    if (values["tls_cert"] is None) != (values["tls_key"] is None):
        raise UsageError("--tls-cert and --tls-key: expected both or neither")
    if values["client_ca"] is not None and values["tls_cert"] is None:
        raise UsageError("--client-ca: expected with --tls-cert and --tls-key")
    files = None if values["tls_cert"] is None else Files(values["tls_cert"], values["tls_key"], values["client_ca"])
    names = ("sessions", "kv_bytes", "tokens_per_minute", "tokens_per_day", "connections", "connections_per_minute")
    quota = Quota(**{name: values[f"user_{name}"] for name in names})
    return ServerConfig(
        values["artifact"],
        context_tokens=values["context"],
        door=Door(tls=files, **some("listen", "tokens", "without_tls", "without_tokens", "ops", "open_ops")),
        limits=Limits(quota=quota, **some("idle_seconds", "lease_seconds", "quiet_seconds", "connections", "inbox_bytes")),
        **some("kv_bytes", "sessions", "threads", "drain_seconds", "grace_seconds"),
    )


@main.command("check-config")
@server_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@reports_errors
def check_config(as_json: bool, **values: Any) -> None:
    """Check what `serve` would be told, files and all, and say where each setting comes from; serve nothing.

    Takes the same flags, environment and file as `serve`. Exits with 0 if a server would start with them, as far as that can be told
    without loading the model or listening.
    """
    from .checks import check

    found = check(config_of(values), unknown_variables())
    source_of = click.get_current_context().get_parameter_source
    sources = {name: str(source_of(name).name).lower() for name in sorted(settings())}  # type: ignore[union-attr]
    names = {"default_map": "file", "commandline": "flag"}
    rows = {name: (values[name], names.get(source, source)) for name, source in sources.items()}
    if as_json:
        plain = {
            name: {"value": str(value) if isinstance(value, Path) else value, "from": source} for name, (value, source) in rows.items()
        }
        click.echo(json.dumps({"settings": plain, "facts": found.facts, "warnings": found.warnings}))
        return
    for name, (value, source) in rows.items():
        click.echo(f"{name} = {value if value is not None else '-'}{'' if source == 'default' else f'  (from the {source})'}")
    for fact in found.facts:
        click.echo(f"ok: {fact}")
    for warning in found.warnings:
        click.echo(f"warning: {warning}", err=True)


@main.command()
@server_options
@reports_errors
def health(**values: Any) -> None:
    """Ask the server that these settings describe, on this machine, whether it is ready; exit with 0 if so, else with 9.

    Takes the same flags, environment and file as `serve`. Over --ops if there is one, and there must be one if the server has
    TLS; else over gRPC's own health service.
    """
    from .checks import ask_health

    click.echo(ask_health(values["listen"], values["ops"], values["tls_cert"] is not None))


@main.group()
def token() -> None:
    """Make, list and revoke access tokens. The file holds their hashes; running servers read it again within seconds."""


TOKENS = click.option("--tokens", required=True, type=PATH, envvar="PLORA_CLOUD_TOKENS", metavar="FILE", help="The file of access tokens.")


@token.command()
@click.argument("name")
@TOKENS
@click.option("--days", type=float, metavar="N", help="How long it is valid. [default: until it is revoked]")
@click.option("--sessions", type=int, metavar="N", help="Sessions at a time, instead of the server's --user-sessions; 0 for no limit.")
@click.option("--kv-bytes", type=int, metavar="N", help="KV cache of all of them, instead of --user-kv-bytes.")
@click.option("--tokens-per-minute", type=int, metavar="N", help="Tokens computed, instead of --user-tokens-per-minute.")
@click.option("--tokens-per-day", type=int, metavar="N", help="The same over a day.")
@click.option("--connections", type=int, metavar="N", help="Connections at a time.")
@click.option("--connections-per-minute", type=int, metavar="N", help="New connections.")
@click.option("--out", type=PATH, metavar="FILE", help="Write the token to a new file that you alone can read, and print nothing.")
@reports_errors
def add(name: str, tokens: Path, days: float | None, out: Path | None, **limits: int | None) -> None:
    """Make a token for the user NAME and print it: it is not kept, and cannot be shown again.

    A user may have several, so that a new one can be handed out before the old one is revoked. Limits given here are the user's own, for
    all of their tokens; limits not given stay as they are, that is, as the server has them if nobody has ever said otherwise.
    """
    from . import token_file

    token = token_file.add(tokens, name, days, {key: value for key, value in limits.items() if value is not None}, out)
    if out is None:
        click.echo(token)


@token.command("list")
@TOKENS
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@reports_errors
def list_tokens(tokens: Path, as_json: bool) -> None:
    """List the users, their tokens' ages and their limits."""
    from ..artifact.strict import plain
    from . import token_file

    users = token_file.read(tokens).users
    if as_json:
        click.echo(json.dumps(plain(users)))
        return
    for name, entry in sorted(users.items()):
        limits = ", ".join(f"{key} {value:,}" for key, value in sorted(entry.quota.items())) or "the server's limits"
        for each in entry.tokens:
            click.echo(
                f"{name}  {each.sha256[:8]}  made {each.made}  {f'expires {each.expires}' if each.expires else 'never expires'}  {limits}"
            )


@token.command()
@click.argument("name")
@TOKENS
@click.option("--keep-newest", is_flag=True, help="All but the last one made.")
@reports_errors
def revoke(name: str, tokens: Path, keep_newest: bool) -> None:
    """Make the tokens of the user NAME void; their sessions end within seconds."""
    from . import token_file

    click.echo(f"{token_file.revoke(tokens, name, keep_newest)} revoked")


@main.command()
@click.option("--host", "hosts", multiple=True, required=True, metavar="NAME", help="Name or address that devices connect to; repeat.")
@click.option("--out", required=True, type=PATH, metavar="DIR", help="A new folder for cert.pem and key.pem.")
@click.option("--days", default=365, show_default=True, metavar="N", help="How long it is valid.")
@click.option("--replace", is_flag=True, help="Renew the two files in a folder that is there.")
@reports_errors
def certificate(hosts: tuple[str, ...], out: Path, days: int, replace: bool) -> None:
    """Make a certificate that nobody vouches for, to try things out or for devices that pin it; print its fingerprint."""
    from .tls import make_self_signed

    click.echo(f"sha256:{make_self_signed(hosts, out, days, replace)}")
