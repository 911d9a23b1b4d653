"""The server process: artifact in, port out, health, and a graceful end."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from ..artifact.errors import UsageError
from ..artifact.memory import give_back
from ..protocol.limits import MAX_FRAME_BYTES, METHOD, SERVICE
from .engine import Engine
from .scheduler import engine_thread
from .service import Limits, Service

log = logging.getLogger("plora.cloud")


MAX_IDLE_SECONDS = (2**32 - 1) // 1000
"""The handshake tells it in milliseconds, in 32 bits: seven weeks."""


MAX_SESSIONS = 65_536
"""Ports that one host has, and far more than one engine serves."""


@dataclass(frozen=True)
class ServerConfig:
    """kv_bytes: budget of the KV pool; context_tokens: of one session, None for the default; sessions: at a time, None for as many as the
    budget has room for; threads: of each product,
    0 for torch's own choice; grace_seconds: for running steps when told to stop."""

    folder: Path
    listen: str = "127.0.0.1:7070"
    kv_bytes: int = 2 << 30
    context_tokens: int | None = None
    sessions: int | None = None
    threads: int = 0
    grace_seconds: float = 10.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise UsageError(f"--listen {self.listen}: expected HOST:PORT, port 0 to 65535 (0 picks a free one)")
        if self.kv_bytes <= 0:
            raise UsageError(f"--kv-bytes {self.kv_bytes}: expected more than 0")
        if self.sessions is not None and not 1 <= self.sessions <= MAX_SESSIONS:
            raise UsageError(f"--sessions {self.sessions}: expected 1 to {MAX_SESSIONS:,}")
        if self.limits.quiet_seconds < 0 or not math.isfinite(self.limits.quiet_seconds):
            raise UsageError(f"--quiet-seconds {self.limits.quiet_seconds}: expected 0 or more, and finite")
        if self.limits.quota.sessions < 0 or self.limits.quota.kv_bytes < 0:
            raise UsageError(
                f"--user-sessions {self.limits.quota.sessions}, --user-kv-bytes {self.limits.quota.kv_bytes}: expected 0 (no limit) or more"
            )
        if not 0 < self.limits.idle_seconds <= MAX_IDLE_SECONDS:
            raise UsageError(f"--idle-seconds {self.limits.idle_seconds}: expected above 0 and at most {MAX_IDLE_SECONDS:,}")
        if not 0 <= self.limits.lease_seconds <= MAX_IDLE_SECONDS:
            raise UsageError(f"--lease-seconds {self.limits.lease_seconds}: expected 0 (no lease) to {MAX_IDLE_SECONDS:,}")
        if self.threads < 0 or not 0 <= self.grace_seconds < math.inf:
            raise UsageError(f"--threads {self.threads}, --grace-seconds {self.grace_seconds}: expected 0 or more, and finite")


def make_engine(config: ServerConfig) -> Engine:
    """Ready to compute, on this thread: how many others help it is a setting of the thread."""
    if config.threads:
        torch.set_num_threads(config.threads)
    engine = Engine(config.folder, config.kv_bytes, config.context_tokens, config.sessions)
    engine.warm_up()
    give_back()
    return engine


async def serve(config: ServerConfig, ready: Callable[[str, Engine], None]) -> None:
    """Serves until SIGTERM or SIGINT; calls `ready(address, engine)` once it listens."""
    worker = engine_thread()
    engine = await asyncio.get_running_loop().run_in_executor(worker, make_engine, config)
    gc.freeze()  # the collector need not look through torch and the graph again and again
    service = Service(engine, config.limits, worker)
    health = HealthServicer()
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
            ("grpc.max_send_message_length", MAX_FRAME_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ]
    )
    # Registered by name, without generated stubs: those would drag grpc into the protocol package.
    handlers = {METHOD: grpc.stream_stream_rpc_method_handler(service.exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    try:
        port = server.add_insecure_port(config.listen)
    except RuntimeError:
        raise UsageError(
            f"--listen {config.listen}: cannot listen there (in use, not an address of this machine, or not allowed)"
        ) from None
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watch = asyncio.create_task(service.watch())
    await server.start()
    serving = health_pb2.HealthCheckResponse.SERVING
    for name in ("", SERVICE):
        await health.set(name, serving)
    ready(f"{config.listen.rpartition(':')[0]}:{port}", engine)
    await stop.wait()
    log.info("stopping: %d connections", len(service.carriers))
    await health.enter_graceful_shutdown()
    await service.stop(config.grace_seconds)
    await server.stop(1.0)
    watch.cancel()
    service.close()
    made = service.scheduler.counters
    rows = made.rows / max(made.batches, 1)
    log.info("%d batches of %.1f rows on the average, at most %d; %.1f s", made.batches, rows, made.largest, made.seconds)
