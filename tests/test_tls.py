"""Certificates on both sides, and what the two of them insist on beyond loopback; without a server."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from plora.artifact import folders
from plora.artifact.errors import (
    MissingFile,
    UsageError,
)
from plora.cloud_server import tls
from plora.cloud_server.config import Door, ServerConfig
from plora.device_runtime import Access, open_session
from plora.device_runtime.access import read_token

from .conftest import Made

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


def test_a_renewed_pair_leaves_the_folder_and_what_else_is_in_it(tmp_path: Path) -> None:
    """A container has mounted that very folder, and another user may have to read the files."""
    out = tmp_path / "it"
    tls.make_self_signed(("localhost",), out, 30)
    (out / "client-ca.pem").write_text("mine")
    out.chmod(0o750)
    (out / "cert.pem").chmod(0o604)
    (out / "key.pem").chmod(0o640)
    if os.geteuid() == 0:
        for name in ("cert.pem", "key.pem"):
            os.chown(out / name, 4711, 4712)
    before, folder = {path.name: path.stat() for path in out.iterdir()}, out.stat()
    fingerprint = tls.make_self_signed(("localhost",), out, 30, replace=True)
    after = {path.name: path.stat() for path in out.iterdir()}
    assert (out.stat().st_ino, out.stat().st_mode) == (folder.st_ino, folder.st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
    assert {name: (each.st_mode, each.st_uid, each.st_gid) for name, each in after.items()} == {
        name: (each.st_mode, each.st_uid, each.st_gid) for name, each in before.items()
    }
    assert {name for name in after if after[name].st_ino != before[name].st_ino} == {"cert.pem", "key.pem"}  # each appears whole
    tls.read(tls.Files(out / "cert.pem", out / "key.pem"))
    assert tls.fingerprint(out / "cert.pem") == fingerprint


def test_a_pair_beside_other_files_is_made_with_the_rights_of_a_new_one(tmp_path: Path) -> None:
    (tmp_path / "client-ca.pem").write_text("mine")
    tls.make_self_signed(("localhost",), tmp_path, 30, replace=True)
    assert {path.name for path in tmp_path.iterdir()} == {"cert.pem", "key.pem", "client-ca.pem"}
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="--out .*client-ca.pem: not a folder"):
        tls.make_self_signed(("localhost",), tmp_path / "client-ca.pem", 30, replace=True)
    assert (tmp_path / "client-ca.pem").read_text() == "mine"


def test_a_server_that_reads_in_the_middle_of_a_renewal_keeps_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "it"
    tls.make_self_signed(("localhost",), out, 30)
    credentials = tls.Credentials(tls.Files(out / "cert.pem", out / "key.pem"))
    first, served = credentials.pair, []
    replace = folders.os.replace

    def shown(source: Path, target: Path) -> None:
        replace(source, target)
        credentials.refresh()
        served.append(credentials.pair)

    monkeypatch.setattr(folders.os, "replace", shown)
    tls.make_self_signed(("localhost",), out, 30, replace=True)
    assert [pair is first for pair in served] == [True, False]
    assert served[1].certificate == (out / "cert.pem").read_bytes()
    assert served[1].key == (out / "key.pem").read_bytes()


def test_a_pair_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "it"
    tls.make_self_signed(("localhost",), out, 30)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UsageError, match="cert.pem and key.pem cannot be written there .No space left"):
            tls.make_self_signed(("localhost",), out, 30, replace=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


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
