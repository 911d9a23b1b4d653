"""What `plora-cloud` says where something is not as it should be: the same as the server would, in one line, and nothing is left half done."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from plora.artifact.errors import MissingFile, UsageError
from plora.cloud_server import token_file
from plora.cloud_server.checks import check
from plora.cloud_server.cli import main
from plora.cloud_server.config import ServerConfig
from plora.cloud_server.engine import Engine

from .conftest import Made

BOUND_SECONDS = 30


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the server's variables are set."""
    for name in [name for name in os.environ if name.startswith("PLORA_CLOUD_")]:
        monkeypatch.delenv(name)


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], env=environment)


# Tokens


def add(tokens: Path, *arguments: str | Path) -> Result:
    return run("token", "add", "ann", "--tokens", tokens, *arguments)


@pytest.mark.parametrize("out", ["none/ann.token", "file/ann.token", "file", "folder", "link"])
def test_a_token_that_cannot_be_kept_is_not_added(tmp_path: Path, out: str) -> None:
    """Else it would be valid, and nobody would know it."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for tokens in (tmp_path / "new.json", tmp_path / "old.json"):
        if tokens.name == "old.json":
            token_file.add(tokens, "ann")
        done = add(tokens, "--out", tmp_path / out)
        assert (done.exit_code, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: --out {tmp_path / out}: cannot be made (") and done.stderr.count("\n") == 1
    assert not (tmp_path / "new.json").exists() and not (tmp_path / "elsewhere").exists()
    assert len(token_file.read(tmp_path / "old.json").users["ann"].tokens) == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_token_that_cannot_be_added_is_not_kept(tmp_path: Path) -> None:
    tokens, out = tmp_path / "tokens.json", tmp_path / "ann.token"
    tokens.write_text("no JSON")
    assert add(tokens, "--out", out).exit_code == 3
    assert not out.exists()
    tokens.unlink()
    same = add(out, "--out", out)
    assert (same.exit_code, out.exists()) == (3, False)
    assert add(tokens, "--out", out).exit_code == 0
    (token,) = token_file.read(tokens).users["ann"].tokens
    assert token.sha256 == token_file.digest(out.read_text().strip())
    assert out.stat().st_mode & 0o777 == 0o600


def test_a_limit_out_of_range_is_called_by_the_flag_that_was_given(tmp_path: Path) -> None:
    for flag in ("sessions", "kv-bytes", "tokens-per-minute", "tokens-per-day", "connections", "connections-per-minute"):
        done = add(tmp_path / "tokens.json", f"--{flag}", "-1")
        assert (done.exit_code, done.stderr) == (2, f"error: --{flag} -1: expected 0 (no limit) or more\n")
    assert not (tmp_path / "tokens.json").exists()


# What a server would not start with


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kv_bytes": 1000}, "a KV budget of 1,000 bytes holds no session"),
        ({"kv_bytes": 1 << 60}, "more than this machine's memory"),
        ({"context_tokens": 257}, r"--context 257, expected 1\.\.256"),
    ],
)
def test_a_budget_that_the_engine_refuses_is_refused_beforehand(made: Made, settings: dict[str, int], words: str) -> None:
    config = ServerConfig(made.out / "cloud", **settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=words) as told:
        check(config, [])
    with pytest.raises(UsageError) as refused:
        Engine(config.folder, config.kv_bytes, config.context_tokens)
    assert str(told.value) == str(refused.value)


def test_the_smallest_budget_that_passes_is_the_smallest_that_serves(made: Made) -> None:
    folder = made.out / "cloud"
    least = Engine(folder, 64 << 20).pool
    enough = least.blocks_for(least.context_tokens) * least.block_bytes
    check(ServerConfig(folder, kv_bytes=enough), [])
    assert Engine(folder, enough).pool.slots == enough // least.block_bytes
    for ask in (lambda: check(ServerConfig(folder, kv_bytes=enough - 1), []), lambda: Engine(folder, enough - 1)):
        with pytest.raises(UsageError, match="holds no session"):
            ask()
    with pytest.raises(MissingFile):
        check(ServerConfig(folder / "none", kv_bytes=1000), [])


# Health


@contextmanager
def talker(says: bytes) -> Iterator[str]:
    """HOST:PORT where somebody says that to whoever comes in, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def answer() -> None:
            peer, _ = door.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(says)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"127.0.0.1:{door.getsockname()[1]}"
        thread.join(BOUND_SECONDS)


READY = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nready\n"


@pytest.mark.usefixtures("alone")
def test_health_asks_whatever_the_server_would_be_refused_for() -> None:
    """It opens no door: an address beyond loopback, without the certificate and tokens that only `serve` was told of."""
    with talker(READY) as ops:
        done = run("health", PLORA_CLOUD_LISTEN="0.0.0.0:7070", PLORA_CLOUD_OPS=ops)
        assert (done.exit_code, done.stdout, done.stderr) == (0, "ready\n", "")
    with talker(READY) as ops:
        assert run("health", "--ops", ops.replace("127.0.0.1", "0.0.0.0"), "--sessions", "0").exit_code == 0
    for flags in (("--listen", "0.0.0.0:7070", "--tls-cert", "c", "--tls-key", "k"), ("--listen", "nowhere"), ("--ops", "nowhere")):
        assert run("health", *flags).exit_code == 2


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"220 mail.example.org ESMTP\r\n", "no answer in HTTP (BadStatusLine)"),
        (b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff", "no answer in HTTP (BadStatusLine)"),  # gRPC's settings
        (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n", "no answer in HTTP (HTTPException)"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "no answer in HTTP (IncompleteRead)"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xfe\x00\x01", "4 bytes that do not say ready"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n<html>", "6 bytes that do not say ready"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "not ready (503)"),
        (b"", "no answer ("),
    ],
)  # fmt: skip
def test_health_of_a_port_where_something_else_listens(says: bytes, words: str) -> None:
    with talker(says) as ops:
        done = run("health", "--ops", ops)
    assert (done.exit_code, done.stdout) == (9, "")
    assert done.stderr.startswith(f"error: http://{ops}/readyz: {words}") and done.stderr.count("\n") == 1
