"""The server process: artifact in, port out, health, metrics, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import signal
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_reflection.v1alpha import reflection

from ..artifact.addresses import host_and_port
from ..artifact.errors import UsageError
from ..artifact.memory import give_back
from ..protocol.limits import METHOD, SERVICE, device_frame_bytes
from .access import Gatekeeper, Guard
from .config import ServerConfig
from .engine import Engine
from .logs import event
from .metrics import Metrics
from .ops import Ops
from .scheduler import engine_thread
from .service import Service
from .tls import Credentials

log = logging.getLogger("plora.cloud")

HANDSHAKE_SECONDS = 10
"""For a peer to get from a TCP connection through TLS and HTTP/2."""
IDLE_CONNECTION_SECONDS = 60
"""For a connection that makes no call: whoever probes health comes again sooner, devices call at once."""
CALLS_PER_CONNECTION = 4
"""A device needs one; its attempts to reconnect have connections of their own."""
CONNECTION_AGE_SECONDS = 600
"""After which a connection takes no new call, though its open ones go on: nobody keeps one for ever by asking something now and then."""
MORE_CONNECTIONS = 64
"""Beyond those that are served: they hear that the server is full, instead of nothing."""


class Health(HealthServicer):
    """gRPC's standard one, without Watch: needing no token, it would be a way to hold connections for ever, and whoever reads none of what
    is written to them would hold up the server's end. Those who probe ask Check (the specification lets a server do so)."""

    async def Watch(self, request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "ask Check")


def make_engine(config: ServerConfig) -> Engine:
    """Ready to compute, on this thread: how many others help it is a setting of the thread."""
    if config.threads:
        torch.set_num_threads(config.threads)
    engine = Engine(config.folder, config.kv_bytes, config.context_tokens, config.sessions)
    engine.warm_up()
    give_back()
    return engine


def make_server(config: ServerConfig, service: Service, health: HealthServicer) -> grpc.aio.Server:
    """With its methods, not listening yet. Every limit that gRPC has for peers who mean no good is set here."""
    contract = service.engine.contract
    server = grpc.aio.server(
        interceptors=[Gatekeeper(service.guard, service.on_denied)],
        options=[
            ("grpc.max_receive_message_length", device_frame_bytes(contract.plan, contract.shape)),
            ("grpc.max_send_message_length", -1),  # the protocol has its own
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_SECONDS),
            ("grpc.max_connection_idle_ms", 1000 * IDLE_CONNECTION_SECONDS),
            ("grpc.max_connection_age_ms", 1000 * CONNECTION_AGE_SECONDS),
            ("grpc.max_concurrent_streams", CALLS_PER_CONNECTION),
            ("grpc.max_allowed_incoming_connections", config.limits.connections + MORE_CONNECTIONS),
        ],
    )
    # Registered by name, without generated stubs: those would drag grpc into the protocol package.
    handlers = {METHOD: grpc.stream_stream_rpc_method_handler(service.exchange)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    reflection.enable_server_reflection((SERVICE, HEALTH, reflection.SERVICE_NAME), server)
    return server


def listen(server: grpc.aio.Server, config: ServerConfig, credentials: Credentials | None) -> str:
    """The address that it listens at. Raises UsageError."""
    where = config.door.listen
    try:
        secure = None if credentials is None else credentials.server_credentials()
        port = server.add_insecure_port(where) if secure is None else server.add_secure_port(where, secure)
    except RuntimeError:
        raise UsageError(f"--listen {where}: cannot listen there (in use, not an address of this machine, or not allowed)") from None
    return f"{where.rpartition(':')[0]}:{port}"


def raise_file_limit() -> None:
    """As many open files as this process may have: every connection is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a container may forbid it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _watch_ended(watch: asyncio.Task[None], stop: asyncio.Event) -> None:
    """Without it nothing would ever expire: a server that has lost it stops."""
    if not watch.cancelled() and (error := watch.exception()) is not None:
        log.error("the watch over deadlines ended", exc_info=error)
        stop.set()


async def serve(config: ServerConfig, ready: Callable[[str, str | None, Engine], None]) -> None:
    """Serves until SIGTERM or SIGINT, a second of which ends it at once; calls `ready(address, ops address, engine)` once it listens."""
    raise_file_limit()
    credentials = None if config.door.tls is None else Credentials(config.door.tls)  # before the model: they tell sooner
    guard = Guard(config.door.tokens, config.limits.quota)
    metrics = Metrics()
    worker = engine_thread()
    engine = await asyncio.get_running_loop().run_in_executor(worker, make_engine, config)
    gc.freeze()  # the collector need not look through torch and the graph again and again
    service = Service(engine, config.limits, worker, guard=guard, metrics=metrics)
    health = Health()
    server = make_server(config, service, health)
    address = listen(server, config, credentials)
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: now.set() if stop.is_set() else stop.set())
    ops = None
    if config.door.ops is not None:
        host, port = host_and_port("--ops", config.door.ops)
        ops = Ops(host, port, metrics, lambda: service.ready)
    watch = asyncio.create_task(service.watch())
    watch.add_done_callback(lambda done: _watch_ended(done, stop))
    await server.start()
    for name in ("", SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    service.ready = True
    ready(address, None if ops is None else f"{config.door.ops.rpartition(':')[0]}:{ops.port}", engine)  # type: ignore[union-attr]
    event(log, logging.INFO, "ready", listening=address, tls=credentials is not None, tokens=guard.path is not None)
    await stop.wait()
    service.ready = False
    event(log, logging.INFO, "stopping", connections=len(service.carriers), sessions=len(service.sessions))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            await health.enter_graceful_shutdown()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.drain_seconds):
            await now.wait()
    await service.stop(config.grace_seconds, now)
    await server.stop(1.0)
    watch.cancel()
    service.close()
    if ops is not None:
        ops.close()
    made = service.scheduler.counters
    rows = made.rows / max(made.batches, 1)
    event(
        log,
        logging.INFO,
        "stopped",
        batches=made.batches,
        rows_per_batch=round(rows, 2),
        most_rows=made.largest,
        engine_seconds=round(made.seconds, 3),
    )
