"""Who is let in, and what they may have: access tokens, certificates, quotas; over real connections where it matters."""

from __future__ import annotations

import asyncio
import datetime
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from plora.artifact.errors import (
    AccessDenied,
    DamagedFile,
    ManifestError,
    MissingFile,
    QuotaReached,
    ServerFull,
    Unreachable,
    Untrusted,
    UsageError,
)
from plora.artifact.strict import plain
from plora.cloud_server import tls, token_file
from plora.cloud_server.access import DENIED, Denied, Guard, User
from plora.cloud_server.allowance import DAY, PATIENCE_SECONDS, Allowances, Bucket
from plora.cloud_server.config import Door, ServerConfig
from plora.cloud_server.quota import Quota, Refusal
from plora.device_runtime import Access, open_session
from plora.device_runtime.access import read_token
from plora.device_runtime.transport import PATH, Deadlines, Transport
from plora.models.checkpoint import Base
from plora.protocol import plora_pb2 as pb

from .conftest import Made, answer, cloud, command, greedy

IDS = [5, 6, 7]
BOUND_SECONDS = 30


# Access tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def shown(token: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "x"), ("authorization", f"Bearer {token}")]


def test_a_token_is_shown_once_and_kept_as_a_hash(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    assert token not in tokens.read_text()
    assert tokens.stat().st_mode & 0o777 == 0o600
    assert Guard(tokens, Quota()).check(shown(token)) == ("ann", token_file.digest(token))
    assert len(token) > 43 and token != token_file.add(tokens, "ann")


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer plora_guess")],
        [("authorization", "Basic x")],
        [("authorization", b"Bearer \xff")],
    ],
)
def test_whoever_has_no_token_hears_one_and_the_same_answer(tokens: Path, metadata: list[tuple[str, str | bytes]]) -> None:
    token_file.add(tokens, "ann")
    with pytest.raises(Denied, match=f"^{DENIED}$"):
        Guard(tokens, Quota()).check(metadata)


def test_two_tokens_in_one_call_are_none(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    with pytest.raises(Denied):
        Guard(tokens, Quota()).check([*shown(token), *shown(token)])


def test_a_token_expires(tokens: Path) -> None:
    token = token_file.add(tokens, "ann", 2, None)
    now = datetime.datetime.now().timestamp()
    clock = [now]
    guard = Guard(tokens, Quota(), lambda: clock[0])
    user = User(*guard.check(shown(token)))
    clock[0] = now + 2 * DAY - 60
    assert guard.stands(user)
    clock[0] = now + 2 * DAY + 60
    assert not guard.stands(user)
    with pytest.raises(Denied):
        guard.check(shown(token))


def test_a_changed_file_is_taken_over_and_a_broken_one_is_not(tokens: Path) -> None:
    old = token_file.add(tokens, "ann")
    guard = Guard(tokens, Quota(sessions=9))
    new = token_file.add(tokens, "ann", None, {"sessions": 1})
    with pytest.raises(Denied):
        guard.check(shown(new))
    guard.refresh()
    assert guard.check(shown(new))[0] == guard.check(shown(old))[0] == "ann"
    assert (guard.quota_of("ann").sessions, guard.quota_of("bob").sessions) == (1, 9)
    assert token_file.revoke(tokens, "ann", keep_newest=True) == 1
    guard.refresh()
    with pytest.raises(Denied):
        guard.check(shown(old))
    for broken in ("{", json.dumps({**plain(token_file.read(tokens)), "version": 2})):
        tokens.write_text(broken)
        guard.refresh()
        assert guard.check(shown(new))[0] == "ann"
    tokens.unlink()
    guard.refresh()
    assert guard.check(shown(new))[0] == "ann"


def test_revoking_everything_of_a_user(tokens: Path) -> None:
    token_file.add(tokens, "ann")
    token_file.add(tokens, "bob")
    assert token_file.revoke(tokens, "ann", keep_newest=False) == 1
    assert list(token_file.read(tokens).users) == ["bob"]
    with pytest.raises(UsageError, match="no user 'ann'; it has bob"):
        token_file.revoke(tokens, "ann", keep_newest=False)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda file: "{", DamagedFile, "not a JSON file"),
        (lambda file: {**file, "extra": 1}, ManifestError, "extra: unknown key"),
        (lambda file: {**file, "format": "x"}, ManifestError, "expected plora-access-tokens version 1"),
        (lambda file: {**file, "users": {"a:b": file["users"]["ann"]}}, ManifestError, "user 'a:b'"),
        (lambda file: _with_token(file, sha256="00"), ManifestError, "64 hexadecimal digits"),
        (lambda file: _with_token(file, expires="tomorrow"), ManifestError, "expected a time"),
        (lambda file: _with_token(file, expires="2027-01-01T00:00:00"), ManifestError, "with its zone"),
        (lambda file: {**file, "users": {"ann": {**file["users"]["ann"], "quota": {"sessions": -1}}}}, UsageError, "sessions -1"),
        (lambda file: {**file, "users": {"ann": {**file["users"]["ann"], "quota": {"session": 1}}}}, ManifestError, "no limit is called session; known"),
    ],
)  # fmt: skip
def test_a_token_file_that_is_none(tokens: Path, change: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    token_file.add(tokens, "ann")
    changed = change(json.loads(tokens.read_text()))
    tokens.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(error, match=words) as caught:
        token_file.read(tokens)
    assert str(tokens) in str(caught.value)


def _with_token(file: Any, **changes: Any) -> Any:
    return {**file, "users": {"ann": {"quota": {}, "tokens": [{**file["users"]["ann"]["tokens"][0], **changes}]}}}


def test_names_and_days_that_cannot_be(tokens: Path) -> None:
    for name in ("", "a b", "host:x", "x" * 65, "-x"):
        with pytest.raises(UsageError, match="expected 1 to 64 letters"):
            token_file.add(tokens, name, None, None)
    for days in (0, -1, math.nan, 1e9):
        with pytest.raises(UsageError, match="--days"):
            token_file.add(tokens, "ann", days, None)
    with pytest.raises(UsageError, match="--user-sessions -1"):
        token_file.add(tokens, "ann", None, {"sessions": -1})
    assert not tokens.exists()
    with pytest.raises(MissingFile, match="plora-cloud token add"):
        token_file.read(tokens)


# Allowances


def test_a_bucket_refills_evenly_and_is_paid_back() -> None:
    bucket = Bucket(60, 60.0, 0.0)
    bucket.take(100, 0.0)  # more than it holds
    assert bucket.wait_seconds(0.0) == 41.0
    assert bucket.wait_seconds(40.5) == 0.5
    assert bucket.wait_seconds(41.0) == 0.0
    assert not bucket.full(90.0)
    assert bucket.full(100.0)
    bucket.take(1, 1e6)
    assert bucket.wait_seconds(1e6) == 0.0  # it has not filled beyond its limit: 59 are left
    bucket.take(59, 1e6)
    assert bucket.wait_seconds(1e6) == 1.0


def test_a_user_over_the_rate_waits_a_little_and_is_refused_beyond_that() -> None:
    clock = [0.0]
    allowances = Allowances(lambda user: Quota(tokens_per_minute=60) if user == "ann" else Quota(), lambda: clock[0])

    async def script() -> None:
        await allowances.compute("ann", 60)
        await allowances.compute("bob", 10**9)  # no limit, and nothing to do with ann's
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await allowances.compute("ann", 1)  # paced: one second's wait is bearable
        clock[0] = 1.0
        await allowances.compute("ann", 60)
        with pytest.raises(Refusal, match="60 tokens computed in a minute") as caught:
            await allowances.compute("ann", 1)
        assert caught.value.code == "QUOTA"
        assert caught.value.retry_after_millis > 1000 * PATIENCE_SECONDS

    asyncio.run(script())


def test_users_whose_buckets_are_full_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plora.cloud_server.allowance.SWEEP_USERS", 10)
    clock = [0.0]
    allowances = Allowances(lambda user: Quota(connections_per_minute=60), lambda: clock[0])
    for number in range(100):
        clock[0] += 1.0
        allowances.connect(str(number))
    assert len(allowances._buckets) <= 12


# The server's settings


def test_beyond_loopback_it_wants_tls_and_tokens(tmp_path: Path) -> None:
    files = tls.Files(tmp_path / "c", tmp_path / "k")
    for host in ("0.0.0.0", "[::]", "10.0.0.1", "example.org"):
        with pytest.raises(UsageError, match="without TLS .* and to whoever asks"):
            Door(f"{host}:7070")
        with pytest.raises(UsageError, match="it would serve to whoever asks"):
            Door(f"{host}:7070", files)
        with pytest.raises(UsageError, match="it would serve without TLS"):
            Door(f"{host}:7070", tokens=tmp_path / "t")
        with pytest.raises(UsageError, match="--open-ops"):
            Door(ops=f"{host}:9464")
        Door(f"{host}:7070", files, tmp_path / "t")
        Door(f"{host}:7070", without_tls=True, without_tokens=True, ops=f"{host}:9464", open_ops=True)
    for host in ("127.0.0.1", "127.8.8.8", "[::1]", "localhost"):
        Door(f"{host}:7070", ops=f"{host}:9464")
    assert ServerConfig(tmp_path).door == Door("127.0.0.1:7070")


# Certificates


@pytest.fixture(scope="module")
def authority() -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    return signed("ca", None, ca=True)


Signer = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def signed(name: str, by: Signer | None, ca: bool = False, days: tuple[float, float] = (-1, 30)) -> Signer:
    """A certificate for `name`, localhost and 127.0.0.1, valid from and until so many days from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    names = x509.SubjectAlternativeName([x509.DNSName(name), x509.DNSName("localhost"), tls._general_name("127.0.0.1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by[0].subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .sign(by[1] if by else key, hashes.SHA256())
    )
    return certificate, key


def write_pair(folder: Path, pair: Signer) -> tls.Files:
    folder.mkdir(exist_ok=True)
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(pair[1].private_bytes(*form))
    (folder / "cert.pem").write_bytes(pair[0].public_bytes(serialization.Encoding.PEM))
    return tls.Files(folder / "cert.pem", folder / "key.pem")


def test_certificates_that_a_server_does_not_start_with(tmp_path: Path) -> None:
    good, other = write_pair(tmp_path / "good", signed("a", None)), write_pair(tmp_path / "other", signed("b", None))
    assert tls.read(good).expires > datetime.datetime.now(datetime.UTC)
    (tmp_path / "text").write_text("hello")
    for files, error, words in (
        (replace(good, certificate=tmp_path / "none"), MissingFile, r"--tls-cert .*none: cannot be read \(No such file"),
        (replace(good, key=tmp_path), MissingFile, r"--tls-key .*cannot be read \(Is a directory\)"),
        (replace(good, certificate=tmp_path / "text"), UsageError, "text: not a certificate in PEM form"),
        (replace(good, key=tmp_path / "text"), UsageError, "text: not a private key in PEM form"),
        (replace(good, key=other.key), UsageError, "belongs to another certificate than"),
        (replace(good, client_ca=tmp_path / "text"), UsageError, "--client-ca .*not a certificate"),
        (write_pair(tmp_path / "old", signed("c", None, days=(-9, -2))), UsageError, "expired on 20.*; renew it"),
        (write_pair(tmp_path / "early", signed("d", None, days=(2, 9))), UsageError, "not valid before"),
    ):
        with pytest.raises(error, match=words):
            tls.read(files)


def test_a_key_with_a_passphrase(tmp_path: Path) -> None:
    pair = signed("a", None)
    files = write_pair(tmp_path / "it", pair)
    locked = serialization.BestAvailableEncryption(b"secret")
    files.key.write_bytes(pair[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    with pytest.raises(UsageError, match="has a passphrase"):
        tls.read(files)


def test_new_files_are_taken_once_they_fit_each_other(tmp_path: Path) -> None:
    files = write_pair(tmp_path / "it", signed("a", None))
    credentials = tls.Credentials(files)
    first = credentials.pair
    assert not credentials.refresh()
    other = write_pair(tmp_path / "other", signed("b", None))
    shutil.copyfile(other.certificate, files.certificate)  # the key is still the old one's
    assert not credentials.refresh()
    assert credentials.pair is first
    shutil.copyfile(other.key, files.key)
    assert credentials.refresh()
    assert credentials.pair.certificate == other.certificate.read_bytes()


def test_a_self_signed_pair_for_hosts(tmp_path: Path) -> None:
    fingerprint = tls.make_self_signed(("localhost", "127.0.0.1"), tmp_path / "it", 30)
    files = tls.Files(tmp_path / "it" / "cert.pem", tmp_path / "it" / "key.pem")
    assert files.key.stat().st_mode & 0o777 == 0o600
    tls.read(files)
    assert tls.fingerprint(files.certificate) == fingerprint
    with pytest.raises(UsageError, match="already exists"):
        tls.make_self_signed(("localhost",), tmp_path / "it", 30)
    with pytest.raises(UsageError, match="--days 0"):
        tls.make_self_signed(("localhost",), tmp_path / "no", 0)
    with pytest.raises(UsageError, match="host names in ASCII"):
        tls.make_self_signed(("hündchen",), tmp_path / "no", 1)
    assert not (tmp_path / "no").exists()


# The device's side


def test_what_a_device_does_not_accept_as_access(tmp_path: Path) -> None:
    for wrong, words in (
        ({"pins": ("sha256:12",)}, "--pin sha256:12: expected sha256: and 64"),
        ({"pins": ("a" * 64,), "ca": tmp_path}, "--ca and --pin"),
        ({"client_cert": tmp_path}, "--client-cert and --client-key"),
        ({"plaintext": True, "ca": tmp_path}, "--plaintext"),
        ({"token": "two words"}, "characters that no token has"),
        ({"token": "naïve"}, "characters that no token has"),
    ):
        with pytest.raises(UsageError, match=words):
            Access(**wrong)  # type: ignore[arg-type]
    assert "secret" not in repr(Access("secret"))


def test_tls_is_for_every_address_but_loopback(tmp_path: Path) -> None:
    for address in ("127.0.0.1:1", "localhost:1", "[::1]:1"):
        assert not Access().secures(address)
        assert Access(ca=tmp_path).secures(address)
    for address in ("10.0.0.1:1", "example.org:1", "[2001:db8::1]:1"):
        assert Access().secures(address)
        assert not Access(plaintext=True).secures(address)


def test_where_a_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_TOKEN", raising=False)
    assert read_token(None) == ""
    monkeypatch.setenv("PLORA_TOKEN", "from-there\n")
    assert read_token(None) == "from-there"
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(tmp_path / "token") == "from-file"
    (tmp_path / "token").write_text("two words")
    with pytest.raises(UsageError, match="2 words, expected one access token"):
        read_token(tmp_path / "token")
    with pytest.raises(MissingFile, match="--token-file .*cannot be read"):
        read_token(tmp_path / "none")


# Both, over TLS


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


def test_many_commands_at_a_time_lose_no_token(tokens: Path) -> None:
    """In processes of their own, as operators' scripts are."""
    code = "import sys; from pathlib import Path; from plora.cloud_server import token_file\n"
    code += "for n in range(8): token_file.add(Path(sys.argv[1]), f'{sys.argv[2]}{n}')"
    running = [subprocess.Popen([sys.executable, "-c", code, str(tokens), name]) for name in "abcd"]
    assert [process.wait(60) for process in running] == [0] * 4
    assert len(token_file.read(tokens).users) == 32


def test_a_file_that_was_not_readable_for_a_moment_is_read_again(tokens: Path) -> None:
    token = token_file.add(tokens, "ann")
    guard = Guard(tokens, Quota())
    aside = tokens.rename(tokens.with_suffix(".aside"))
    token_file.revoke(aside, "ann", keep_newest=False)
    tokens.mkdir()  # so that not even root can read it
    guard.refresh()
    assert guard.check(shown(token))[0] == "ann"
    tokens.rmdir()
    aside.rename(tokens)
    guard.refresh()
    with pytest.raises(Denied):
        guard.check(shown(token))


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


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_no_proxy_gets_what_is_meant_for_this_machine(made: Made, served: str, variable: str) -> None:
    """gRPC would send even loopback's plaintext there."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(0)
        code = "import sys; from plora.device_runtime import open_session; open_session(sys.argv[1], sys.argv[2]).close()"
        environment = {**os.environ, variable: f"http://127.0.0.1:{proxy.getsockname()[1]}"}
        done = subprocess.run(
            [sys.executable, "-c", code, str(made.out / "edge"), served], env=environment, capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            proxy.accept()


def test_files_that_are_no_certificates_are_named(made: Made, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    pair = write_pair(tmp_path / "mine", signed("ann", None))
    for access, words in (
        (Access(ca=tmp_path / "text"), "--ca .*text: not a certificate in PEM form"),
        (Access(client_cert=tmp_path / "text", client_key=pair.key), "--client-cert .*text.*not a certificate and its key"),
    ):
        with pytest.raises(UsageError, match=words):
            open_session(made.out / "edge", "127.0.0.1:1", access=access)
