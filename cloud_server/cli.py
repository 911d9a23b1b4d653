"""`plora-cloud`: parses, calls one function, turns errors into one line and an exit code."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import click

from ..artifact.console import CLICK_CONTEXT, reports_errors


@click.group(context_settings=CLICK_CONTEXT)
@click.version_option(package_name="plora")
def main() -> None:
    """The cloud half of a PrivateLoRA model."""


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--listen", default="127.0.0.1:7070", show_default=True, metavar="HOST:PORT", help="Where to listen; port 0 picks a free one."
)
@click.option("--kv-bytes", default=2 << 30, show_default=True, metavar="N", help="Budget of all sessions' KV caches, in bytes.")
@click.option("--context", type=int, metavar="TOKENS", help="Most tokens of one session. [default: the model's context, at most 2048]")
@click.option("--sessions", type=int, metavar="N", help="Sessions at a time. [default: as many as the budget has blocks for, at most 1024]")
@click.option("--threads", default=0, metavar="N", help="Threads of one matrix product. [default: torch's choice]")
@click.option("--idle-seconds", default=300.0, show_default=True, metavar="S", help="A session that is silent for so long expires.")
@click.option(
    "--lease-seconds",
    default=60.0,
    show_default=True,
    metavar="S",
    help="How long a session outlives its connection, so that a device whose link broke goes on where it was; 0 for not at all.",
)
@click.option(
    "--quiet-seconds",
    default=30.0,
    show_default=True,
    metavar="S",
    help="A session that has had nothing to do for so long may be sent away when there is no room; its device refills another one.",
)
@click.option("--user-sessions", default=0, metavar="N", help="Sessions of one user, that is, one host, at a time. [default: no limit]")
@click.option("--user-kv-bytes", default=0, metavar="N", help="KV cache of one user's sessions, in bytes. [default: no limit]")
@click.option("--grace-seconds", default=10.0, show_default=True, metavar="S", help="Time for running steps after SIGTERM.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object once ready, instead of a line.")
@click.option("--verbose", is_flag=True, help="Log sessions to standard error (never text, tokens or activations).")
@reports_errors
def serve(
    folder: Path,
    listen: str,
    kv_bytes: int,
    context: int | None,
    sessions: int | None,
    threads: int,
    idle_seconds: float,
    lease_seconds: float,
    quiet_seconds: float,
    user_sessions: int,
    user_kv_bytes: int,
    grace_seconds: float,
    as_json: bool,
    verbose: bool,
) -> None:
    """Serve the cloud half in DIR (the `cloud` folder of an export) until SIGTERM.

    Prints `listening on HOST:PORT` once it accepts sessions. Everything that a session sends is a tensor of activations; text
    and tokens stay on the device. This release has no TLS: listen on loopback or behind a proxy that has.
    """
    from .engine import Engine
    from .room import Quota
    from .serve import ServerConfig, serve
    from .service import Limits

    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    quota = Quota(user_sessions, user_kv_bytes)
    limits = Limits(idle_seconds=idle_seconds, lease_seconds=lease_seconds, quiet_seconds=quiet_seconds, quota=quota)
    config = ServerConfig(folder, listen, kv_bytes, context, sessions, threads, grace_seconds, limits)

    def ready(address: str, engine: Engine) -> None:
        pool = engine.pool
        facts = {
            "listening": address,
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
            click.echo(f"listening on {address}")

    asyncio.run(serve(config, ready))
