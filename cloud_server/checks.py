"""What can be told of a server's settings without serving, and of a server that runs without being a device."""

from __future__ import annotations

import datetime
import http.client
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ..artifact.addresses import host_and_port, is_loopback
from ..artifact.errors import Unreachable, UsageError
from ..artifact.manifest import CloudManifest, check_files, read_manifest
from . import tls, token_file
from .budget import blocks_of, context_of
from .config import ServerConfig

HEALTH_SECONDS = 5.0


@dataclass(frozen=True)
class Findings:
    facts: list[str]
    warnings: list[str]


def check(config: ServerConfig, unknown_variables: list[str]) -> Findings:
    """Reads every file that the server would. Raises what it would raise."""
    facts, warnings = [], [f"{name}: a variable of the environment that means nothing" for name in unknown_variables]
    manifest = read_manifest(CloudManifest, config.folder)
    check_files(config.folder, manifest)
    shape = manifest.contract.shape
    facts.append(f"{config.folder}: contract {manifest.contract.hash[:12]}, {manifest.contract.plan.cloud_layers} layers, {manifest.dtype}")
    token_bytes = shape.kv_bytes_per_token(manifest.dtype, manifest.contract.plan.cloud_layers)
    blocks_of(context_of(shape, config.context_tokens), token_bytes, config.kv_bytes)
    if config.door.tls is not None:
        pair = tls.read(config.door.tls)
        facts.append(f"{config.door.tls.certificate}: sha256:{tls.fingerprint(config.door.tls.certificate)}, until {pair.expires:%Y-%m-%d}")
        if (left := pair.expires - datetime.datetime.now(datetime.UTC)).days < tls.SOON_DAYS:
            warnings.append(f"{config.door.tls.certificate}: expires in {left.days} days")
        if config.door.tls.key.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            warnings.append(f"{config.door.tls.key}: others on this machine can read it, or its group change it; chmod 600 or 640")
    if config.door.tokens is not None:
        users = token_file.read(config.door.tokens).users
        facts.append(f"{config.door.tokens}: {len(users)} users, {sum(len(entry.tokens) for entry in users.values())} tokens")
        if token_file.readable_by_others(config.door.tokens):
            warnings.append(f"{config.door.tokens}: others on this machine can read it; chmod 600")
    if not is_loopback(host_and_port("--listen", config.door.listen)[0]):
        warnings += ["--without-tls: whoever is on the way reads and changes everything"] if config.door.tls is None else []
        shown = config.door.tls is not None and config.door.tls.client_ca is not None
        who = "whoever shows a certificate of --client-ca is served" if shown else "whoever asks is served"
        warnings += [f"--without-tokens: {who}"] if config.door.tokens is None else []
    return Findings(facts, warnings)


def ask_health(listen: str, ops: str | None, has_tls: bool) -> str:
    """ "ready". listen, ops: HOST:PORT as the server was told. Raises Unreachable if it is not, or is not there; UsageError if it cannot
    be asked."""
    if ops is not None:
        return _ask_http(*host_and_port("--ops", ops))
    if has_tls:
        raise UsageError("a server with TLS is asked over --ops; set it, for instance to 127.0.0.1:9464")
    return _ask_grpc(*host_and_port("--listen", listen))


def _here(host: str, port: int) -> str:
    """An address at which a server that listens there is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ask_http(host: str, port: int) -> str:
    where = f"http://{_here(host, port)}/readyz"
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(where, timeout=HEALTH_SECONDS) as answer:
            said = answer.read(100)
    except urllib.error.HTTPError as error:
        error.close()
        raise Unreachable(f"{where}: not ready ({error.code})") from None
    except OSError as error:
        raise Unreachable(f"{where}: no answer ({getattr(error, 'reason', error)})") from None
    except http.client.HTTPException as error:
        raise Unreachable(f"{where}: no answer in HTTP ({type(error).__name__}); is --ops another program's port?") from None
    if said.strip() != b"ready":
        raise Unreachable(f"{where}: {len(said)} bytes that do not say ready; is --ops another program's port?")
    return "ready"


def _ask_grpc(host: str, port: int) -> str:
    where = _here(host, port)
    with grpc.insecure_channel(where, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=HEALTH_SECONDS)  # type: ignore[attr-defined]
        except grpc.RpcError as error:
            raise Unreachable(f"{where}: no answer ({error.code().name})") from None  # type: ignore[attr-defined]
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unreachable(f"{where}: not ready ({health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)})")
    return "ready"
