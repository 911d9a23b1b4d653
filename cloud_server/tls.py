"""The server's certificate and key: checked when it starts, read again for every handshake if the files have changed."""

from __future__ import annotations

import datetime
import ipaddress
import logging
from dataclasses import dataclass
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ..artifact.errors import PloraError, UsageError
from ..artifact.folders import new_folder, renewed_file
from ..artifact.watched import read_named, stamp
from .logs import event

log = logging.getLogger("plora.cloud")

SOON_DAYS = 30
"""Before a certificate expires its operator should hear of it."""
CERTIFICATE_FILE, KEY_FILE = "cert.pem", "key.pem"


@dataclass(frozen=True)
class Files:
    """PEM. certificate: with the chain behind it; client_ca: who signs the certificates that devices must show, None for none asked."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    @property
    def all(self) -> tuple[Path, ...]:
        return (self.certificate, self.key, *([self.client_ca] if self.client_ca else []))


@dataclass(frozen=True)
class Pair:
    """What the files held, checked."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None
    expires: datetime.datetime

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], root_certificates=self.client_ca)


def read(files: Files) -> Pair:
    """Raises MissingFile for a file that cannot be read, UsageError for one that is not what it should be, a key that belongs to another
    certificate, and a certificate that has expired or is not valid yet."""
    certificate, key = read_named("--tls-cert", files.certificate), read_named("--tls-key", files.key)
    client_ca = None if files.client_ca is None else read_named("--client-ca", files.client_ca)
    first = _certificate("--tls-cert", files.certificate, certificate)
    if files.client_ca is not None and client_ca is not None:
        _certificate("--client-ca", files.client_ca, client_ca)
    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise UsageError(f"--tls-key {files.key}: has a passphrase; decrypt it into a file that the server alone can read") from None
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"--tls-key {files.key}: not a private key in PEM form") from None
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != first.public_key().public_bytes(*form):
        raise UsageError(f"--tls-key {files.key}: belongs to another certificate than {files.certificate}")
    now = datetime.datetime.now(datetime.UTC)
    if now > first.not_valid_after_utc:
        raise UsageError(f"--tls-cert {files.certificate}: expired on {first.not_valid_after_utc:%Y-%m-%d}; renew it")
    if now < first.not_valid_before_utc:
        raise UsageError(
            f"--tls-cert {files.certificate}: not valid before {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?"
        )
    return Pair(certificate, key, client_ca, first.not_valid_after_utc)


def _certificate(flag: str, path: Path, pem: bytes) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificates(pem)[0]
    except ValueError:
        raise UsageError(f"{flag} {path}: not a certificate in PEM form") from None


class Credentials:
    """What gRPC asks at every handshake. New files are taken once they are whole and fit each other; until then the old ones serve."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self._stamp = stamp(*files.all)
        self._told = ""
        self.pair = read(files)

    def server_credentials(self) -> grpc.ServerCredentials:
        required = self.files.client_ca is not None
        return grpc.dynamic_ssl_server_credentials(self.pair.configuration(), self._fetch, required)  # type: ignore[arg-type]  None is legal

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """On one of gRPC's threads. None: the same as before."""
        return self.pair.configuration() if self.refresh() else None

    def refresh(self) -> bool:
        """Whether there is a new pair."""
        if (found := stamp(*self.files.all)) == self._stamp:
            return False
        try:
            self.pair = read(self.files)
        except PloraError as error:  # tried again the next time, but told of once
            if self._told != str(error):
                self._told = str(error)
                event(log, logging.ERROR, "certificate not read again, the old one stays", reason=str(error))
            return False
        self._stamp, self._told = found, ""
        event(log, logging.INFO, "certificate read again", expires=self.pair.expires.isoformat())
        return True


def fingerprint(path: Path) -> str:
    """SHA-256 of a PEM file's first certificate, hex: what `plora-device --pin` takes."""
    return _certificate("--tls-cert", path, read_named("--tls-cert", path)).fingerprint(hashes.SHA256()).hex()


def make_self_signed(hosts: tuple[str, ...], out: Path, days: int, replace: bool = False) -> str:
    """cert.pem and key.pem for `hosts` (names or addresses), valid for so many days, in a new folder `out`, or with `replace` in one that
    is there; the certificate's fingerprint. Raises UsageError."""
    if not 1 <= days <= 3650:
        raise UsageError(f"--days {days}: expected 1 to 3,650")
    key = ec.generate_private_key(ec.SECP256R1())
    if replace and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: not a folder; name one, for {CERTIFICATE_FILE} and {KEY_FILE}")
    now = datetime.datetime.now(datetime.UTC)
    try:
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    except ValueError:
        raise UsageError(f"--host {' '.join(hosts)}: expected host names in ASCII, or addresses") from None
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    pair = certificate.public_bytes(serialization.Encoding.PEM), key.private_bytes(*form)
    try:
        if replace and out.is_dir():
            _renew(out, *pair)
        else:
            with new_folder(out) as folder:
                _renew(folder, *pair)
    except OSError as error:
        raise UsageError(
            f"--out {out}: {CERTIFICATE_FILE} and {KEY_FILE} cannot be written there ({error.strerror}); "
            "name a folder that you can write to, and run this as who owns the files, or as root"
        ) from None
    return certificate.fingerprint(hashes.SHA256()).hex()


def _renew(folder: Path, certificate: bytes, key: bytes) -> None:
    """Both files are whole before either gets its name, and each keeps the mode and owner of the one that it replaces. The folder stays
    the same one, since a container may have mounted it, and so does whatever else is in it. A server that reads between the two names has
    a pair that does not fit, and goes on with the old one (`Credentials.refresh`). Raises OSError."""
    with renewed_file(folder / KEY_FILE) as new_key, renewed_file(folder / CERTIFICATE_FILE, 0o644) as new_certificate:
        new_certificate.write_bytes(certificate)
        new_key.write_bytes(key)


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
