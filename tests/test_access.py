"""Who is let in, and what they may have, over real connections: access tokens, certificates, quotas, the commands."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from plora.artifact.errors import (
    AccessDenied,
    MissingFile,
    QuotaReached,
    ServerFull,
    Unreachable,
    Untrusted,
)
from plora.cloud_server import tls, token_file
from plora.cloud_server.access import DENIED
from plora.cloud_server.allowance import DAY
from plora.device_runtime import Access, open_session
from plora.device_runtime.transport import PATH, Deadlines, Transport
from plora.models.checkpoint import Base
from plora.protocol import plora_pb2 as pb

from .conftest import Made, answer, cloud, command, greedy
from .test_tls import Signer, signed, write_pair

IDS = [5, 6, 7]
BOUND_SECONDS = 30


# Both, over TLS


@pytest.fixture(scope="module")
def authority() -> Signer:
    return signed("ca", None, ca=True)


@pytest.fixture
def guarded(made: Made, tmp_path: Path, authority: Signer) -> Iterator[tuple[str, Path, tls.Files]]:
    """A cloud with TLS and tokens: (address, token file, its certificate's files)."""
    files = write_pair(tmp_path / "tls", signed("cloud", authority))
    (tmp_path / "ca.pem").write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    path = tmp_path / "tokens.json"
    token_file.add(path, "nobody")
    flags = ("--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--tokens", str(path))
    with cloud(made.out / "cloud", *flags) as (address, _):
        yield address, path, files


def wait_for_token(made: Made, address: str, access: Access) -> None:
    """Until the server has read its file again. Fails after BOUND_SECONDS."""
    for _ in range(10 * BOUND_SECONDS):
        try:
            open_session(made.out / "edge", address, access=access).close()
        except AccessDenied:
            subprocess.run(["sleep", "0.1"], check=True)
        else:
            return
    pytest.fail("a new token was not taken")


def test_a_device_with_a_token_over_tls(made: Made, merged: Base, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    """Right tokens for the right device; the wrong ones hear why, and the wrong server is not spoken to."""
    address, path, files = guarded
    edge, ca = made.out / "edge", tmp_path / "ca.pem"
    token = token_file.add(path, "ann")
    good = Access(token, ca)
    wait_for_token(made, address, good)
    pinned = Access(token, pins=(f"sha256:{tls.fingerprint(files.certificate)}",))
    own = Access(token, files.certificate)  # the server's certificate alone, without who signed it
    for access in (good, pinned, own):
        with open_session(edge, address, access=access) as session:
            assert answer(session, IDS, 12) == greedy(merged, IDS, 12)
    for access, error, words in (
        (Access("", ca), AccessDenied, DENIED),
        (Access("plora_guess", ca), AccessDenied, DENIED),
        (replace(good, ca=None, pins=("0" * 64,)), Untrusted, "which is not pinned"),
        (replace(good, ca=None, server_name="localhost"), Untrusted, "not trusted: (self signed|unable to get)"),
        (replace(good, server_name="elsewhere"), Untrusted, "for another name"),
        (replace(good, ca=tmp_path / "none"), MissingFile, "--ca .*cannot be read"),
        (Access(token), Unreachable, "If it has TLS"),
    ):
        with pytest.raises(error, match=words):
            open_session(edge, address, access=access)
    with pytest.raises(Untrusted, match="no TLS there"), cloud(made.out / "cloud") as (plain_address, _):
        open_session(edge, plain_address, access=pinned)


def test_a_certificate_is_renewed_without_a_restart(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    address, path, files = guarded
    token = token_file.add(path, "ann")
    wait_for_token(made, address, Access(token, files.certificate))
    old = (tmp_path / "old.pem", Access(token, tmp_path / "old.pem"))
    shutil.copyfile(files.certificate, old[0])
    with open_session(made.out / "edge", address, access=old[1]) as session:
        write_pair(files.certificate.parent, signed("cloud", None))
        answer(session, IDS, 4)  # open connections stay
        with pytest.raises(Untrusted):
            open_session(made.out / "edge", address, access=old[1])
        open_session(made.out / "edge", address, access=Access(token, files.certificate)).close()


def test_a_revoked_user_is_shown_out(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    address, path, _ = guarded
    token = token_file.add(path, "ann")
    access = Access(token, tmp_path / "ca.pem")
    wait_for_token(made, address, access)
    deadlines = Deadlines(give_up_seconds=BOUND_SECONDS)
    with open_session(made.out / "edge", address, access=access, deadlines=deadlines) as session:
        answer(session, IDS, 4)
        token_file.revoke(path, "ann", keep_newest=False)
        with pytest.raises(AccessDenied, match=DENIED):
            for _ in range(10_000):
                answer(session, IDS, 8)


def test_a_session_is_taken_up_by_its_own_user_alone(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    """Whoever got hold of a session's id, but not of its user's token, hears what a guesser hears."""
    address, path, _ = guarded
    ann, bob = (token_file.add(path, name) for name in ("ann", "bob"))
    wait_for_token(made, address, Access(bob, tmp_path / "ca.pem"))
    with open_session(made.out / "edge", address, access=Access(ann, tmp_path / "ca.pem")) as session:
        expected = answer(session, IDS, 8)
        machine = session._link.machine
        stolen = machine.hello_again()
        forged = pb.Frame.FromString(stolen)
        forged.hello.session = bytes(16)
        answers = [
            asyncio.run(say(address, data, bob, tmp_path / "ca.pem")) for data in (stolen, forged.SerializeToString(deterministic=True))
        ]
        assert [pb.FaultCode.Name(each.fault.code) for each in answers] == ["EXPIRED", "EXPIRED"]
        assert answers[0].fault.detail == answers[1].fault.detail
        assert session._link.reconnections == 0
        assert answer(session, IDS, 8) == expected
        own = asyncio.run(say(address, machine.hello_again(), ann, tmp_path / "ca.pem"))
        assert own.WhichOneof("kind") == "welcome"  # the check is about the user, and nothing else is in the way


async def say(address: str, data: bytes, token: str, ca: Path) -> pb.Frame:
    """One frame on a connection of its own -> the first answer."""
    channel = await Access(token, ca).channel(address, [("grpc.use_local_subchannel_pool", 1)])
    async with channel:
        call = channel.stream_stream(PATH)(metadata=Access(token, ca).metadata, timeout=BOUND_SECONDS)
        await call.write(data)
        answer = pb.Frame.FromString(await call.read())
        call.cancel()
    return answer


def test_devices_must_show_certificates_if_the_cloud_says_so(made: Made, merged: Base, authority: Signer, tmp_path: Path) -> None:
    files = write_pair(tmp_path / "tls", signed("cloud", authority))
    mine = write_pair(tmp_path / "mine", signed("ann", authority))
    others = write_pair(tmp_path / "others", signed("eve", signed("other ca", None, ca=True)))
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority[0].public_bytes(serialization.Encoding.PEM))
    flags = ("--tls-cert", str(files.certificate), "--tls-key", str(files.key), "--client-ca", str(ca), "--user-sessions", "1")
    with cloud(made.out / "cloud", *flags) as (address, _):
        access = Access("", ca, client_cert=mine.certificate, client_key=mine.key)
        with open_session(made.out / "edge", address, access=access) as session:
            assert answer(session, IDS, 8) == greedy(merged, IDS, 8)
            with pytest.raises(QuotaReached):  # by its certificate's name
                open_session(made.out / "edge", address, access=access)
        with pytest.raises(Unreachable, match="--client-cert"):
            open_session(made.out / "edge", address, access=Access("", ca))
        with pytest.raises(Unreachable):
            open_session(made.out / "edge", address, access=replace(access, client_cert=others.certificate, client_key=others.key))


def test_every_method_but_health_wants_a_token(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = token_file.add(path, "ann")
    with cloud(made.out / "cloud", "--tokens", str(path)) as (address, _), grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=BOUND_SECONDS)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        for method in (
            "/grpc.health.v1.Health/Watch",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            PATH,
            "/no.such/Method",
        ):
            with pytest.raises(grpc.RpcError) as caught:
                next(channel.stream_stream(method)(iter([b""]), timeout=BOUND_SECONDS))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
        with open_session(made.out / "edge", address, access=Access(token)) as session:
            answer(session, IDS, 4)


# Quotas over the wire


def test_users_have_limits_of_their_own(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    ann = Access(token_file.add(path, "ann", None, {"sessions": 1}))
    bob = Access(token_file.add(path, "bob", None, {"tokens_per_minute": 20, "connections": 2}))
    edge = made.out / "edge"
    with cloud(made.out / "cloud", "--tokens", str(path), "--user-sessions", "5") as (address, _):
        with open_session(edge, address, access=ann), pytest.raises(QuotaReached, match="1 sessions of this user"):
            open_session(edge, address, access=ann)
        deadlines = Deadlines(give_up_seconds=0.3)
        with (
            open_session(edge, address, access=bob, deadlines=deadlines) as session,
            pytest.raises((QuotaReached, Unreachable), match="20 tokens computed in a minute"),
        ):
            answer(session, list(range(5, 60)), 8)
            answer(session, IDS, 8)
        with (
            open_session(edge, address, access=bob),
            open_session(edge, address, access=bob),
            pytest.raises(ServerFull, match="2 connections of this user are open"),
        ):
            open_session(edge, address, access=bob)


# The commands


def test_tokens_from_the_command_line_to_the_device(made: Made, tmp_path: Path) -> None:
    """As an operator and a user would: the token goes into a file, and is on no command line and in no log."""
    path, secret = tmp_path / "tokens.json", tmp_path / "token"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([command("plora-cloud"), *arguments], capture_output=True, text=True, timeout=60)

    made_token = run("token", "add", "ann", "--tokens", str(path), "--days", "30", "--sessions", "2")
    run("token", "add", "ann", "--tokens", str(path), "--out", str(secret), "--kv-bytes", "1000000")
    assert secret.stat().st_mode & 0o777 == 0o600
    listed = run("token", "list", "--tokens", str(path))
    assert listed.stdout.startswith("ann  ") and "sessions 2" in listed.stdout
    assert made_token.stdout.strip() not in listed.stdout
    users = json.loads(run("token", "list", "--tokens", str(path), "--json").stdout)
    assert users["ann"]["quota"] == {"kv_bytes": 1_000_000, "sessions": 2}
    again = run("token", "add", "ann", "--tokens", str(path), "--out", str(secret))
    assert (again.returncode, len(token_file.read(path).users["ann"].tokens)) == (2, 2)
    with cloud(made.out / "cloud", "--tokens", str(path), "--log-level", "info") as (address, process):
        flags = ["--edge", str(made.out / "edge"), "--cloud", address, "--raw", "--max-tokens", "4", "--json"]
        asked = [command("plora-device"), "generate", "the quick", *flags]
        good = subprocess.run([*asked, "--token-file", str(secret)], capture_output=True, text=True, timeout=60)
        assert (good.returncode, good.stderr) == (0, "")
        assert len(json.loads(good.stdout)["token_ids"]) == 4
        bad = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        assert (bad.returncode, bad.stdout) == (8, "")
        assert bad.stderr.count("\n") == 1
        process.terminate()
        log, _ = process.communicate(timeout=BOUND_SECONDS)
    assert made_token.stdout.strip() not in log
    assert secret.read_text().strip() not in log
    assert run("token", "revoke", "ann", "--tokens", str(path)).stdout == "2 revoked\n"
    wrong = run("token", "revoke", "ann", "--tokens", str(path))
    assert (wrong.returncode, wrong.stderr) == (2, f"error: {path}: no user 'ann'; it has none\n")


def test_an_expired_token_ends_its_session_and_no_other(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    address, path, _ = guarded
    ca = tmp_path / "ca.pem"
    bob = Access(token_file.add(path, "bob"), ca)
    wait_for_token(made, address, bob)
    with open_session(made.out / "edge", address, access=bob) as other:
        expected = answer(other, IDS, 8)
        ann = Access(token_file.add(path, "ann", 5 / DAY), ca)
        wait_for_token(made, address, ann)
        with pytest.raises(AccessDenied, match=DENIED), open_session(made.out / "edge", address, access=ann) as session:
            for _ in range(100_000):
                answer(session, IDS, 8)
        assert answer(other, IDS, 8) == expected
        assert other._link.reconnections == 0


def test_a_session_goes_with_the_token_that_took_it_up_last(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    """Renewing a token does not end a session that already runs on the new one."""
    address, path, _ = guarded
    old, new = (Access(token_file.add(path, "ann"), tmp_path / "ca.pem") for _ in range(2))
    wait_for_token(made, address, new)
    with open_session(made.out / "edge", address, access=old) as session:
        expected = answer(session, IDS, 8)
        session._link.carrier = partial(Transport, access=new)
        session.reconnect()
        assert answer(session, IDS, 8) == expected
        assert session._link.reconnections == 1
        token_file.revoke(path, "ann", keep_newest=True)
        for _ in range(10 * BOUND_SECONDS):  # until the old one is not taken any more
            try:
                open_session(made.out / "edge", address, access=old).close()
            except AccessDenied:
                break
        assert answer(session, IDS, 8) == expected
        assert session._link.reconnections == 1
        token_file.revoke(path, "ann", keep_newest=False)
        with pytest.raises(AccessDenied):
            for _ in range(100_000):
                answer(session, IDS, 8)


def test_a_cloud_that_is_another_one_when_the_link_comes_back(made: Made, guarded: tuple[str, Path, tls.Files], tmp_path: Path) -> None:
    """The person is told of the certificate, and not only that the connection was lost."""
    address, path, files = guarded
    token = token_file.add(path, "ann")
    wait_for_token(made, address, Access(token, tmp_path / "ca.pem"))
    access = Access(token, pins=(tls.fingerprint(files.certificate),))
    with open_session(made.out / "edge", address, access=access, deadlines=Deadlines(give_up_seconds=1.0)) as session:
        answer(session, IDS, 4)
        session.reconnect()
        answer(session, IDS, 4)
        write_pair(files.certificate.parent, signed("somebody else", None))
        session.reconnect()
        with pytest.raises(Untrusted, match="which is not pinned; do not go on"):
            answer(session, IDS, 4)
