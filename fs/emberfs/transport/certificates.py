"""The certificates of a cluster: its authority, what it issues, and the token with which a machine asks for its own.

    make_authority(dir, cluster="c1")                                   # once: ca.pem, ca.key
    issue(dir, names=["127.0.0.1"], role="storage", into=other)         # cert.pem, key.pem, ca.pem
    token = make_token(dir, role="storage", valid_s=3600, now_s=...)    # on paper, to the new machine
    key, csr = make_request(names, role)                                # there; `Join(token, csr)` to the manager
    cert = sign_request(dir, token=token, csr=csr, now_s=...)           # here; checks the token

A token carries the authority's certificate, so that the new machine knows whom to believe before it is believed
itself, and is vouched for by an HMAC with a secret that only holders of the authority's key have.

Invariants: a private key is never sent, and its file is its owner's only (0600). A certificate gives names (of hosts,
addresses, and nodes) and one role; only that of a server's role can serve. The names are what the request says: whoever
has a token for a server's role is believed about where it serves, and as which nodes. Functions here block: they read
and write files.

Does not know: connections. Time is handed in, as Unix seconds.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import hmac
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import AccessDenied
from ..messages.base import SERVERS
from .config import TlsFiles

DAY_S = 24 * 3600
AUTHORITY_VALID_S = 3650 * DAY_S
CERTIFICATE_VALID_S = 365 * DAY_S
CLOCK_SLACK_S = 3600
"""Certificates begin so much in the past, for machines whose clock is behind."""

TOKEN_PREFIX = "ember-join-"

CA_FILE = "ca.pem"
CA_KEY_FILE = "ca.key"
CERT_FILE = "cert.pem"
KEY_FILE = "key.pem"


class JoinToken(msgspec.Struct, frozen=True, array_like=True):
    """What a token says."""

    cluster: str
    role: str
    expires_s: int
    """Unix time."""
    ca: bytes
    """DER."""

    @property
    def ca_pem(self) -> str:
        """The authority to trust, as `TlsFiles.ca` wants it."""
        return ssl.DER_cert_to_PEM_cert(self.ca)


def make_authority(directory: Path, *, cluster: str, now_s: float) -> None:
    """A new authority in `directory`. Raises FileExistsError if there is one."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "emberline authority"),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster),
        ]
    )
    usage = _key_usage(signs_certificates=True)
    certificate = (
        _builder(name, key.public_key(), issuer=name, now_s=now_s, valid_s=AUTHORITY_VALID_S)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    directory.mkdir(parents=True, exist_ok=True)
    _write_new(directory / CA_KEY_FILE, _key_pem(key), mode=0o600)
    _write_new(directory / CA_FILE, _pem(certificate), mode=0o644)


def issue(authority: Path, names: Sequence[str], *, role: str, into: Path, now_s: float) -> TlsFiles:
    """A key and a certificate for `names` in the directory `into`, with the authority's beside it.

    What is there is replaced: connections that exist go on, new ones use the new files.
    """
    key, csr = make_request(names, role=role)
    certificate = _sign(authority, x509.load_pem_x509_csr(csr), role=role, now_s=now_s)
    return install(into, key=key, cert=_pem(certificate), ca=(authority / CA_FILE).read_bytes())


def install(into: Path, *, key: bytes, cert: bytes, ca: bytes) -> TlsFiles:
    """Put PEM files where `TlsFiles` finds them; each appears whole."""
    into.mkdir(parents=True, exist_ok=True)
    for name, content, mode in ((CA_FILE, ca, 0o644), (KEY_FILE, key, 0o600), (CERT_FILE, cert, 0o644)):
        fresh = into / f"{name}.new"
        fresh.unlink(missing_ok=True)
        _write_new(fresh, content, mode=mode)
        fresh.replace(into / name)
    return TlsFiles(ca=into / CA_FILE, cert=into / CERT_FILE, key=into / KEY_FILE)


def make_request(names: Sequence[str], *, role: str) -> tuple[bytes, bytes]:
    """(private key, certificate signing request), both PEM. The first of `names` is the machine's own."""
    if not names:
        raise ValueError("a certificate needs at least one name")
    key = ec.generate_private_key(ec.SECP256R1())
    csr = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(names[0], role))
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in names]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return _key_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def make_token(authority: Path, *, role: str, valid_s: float, now_s: float) -> str:
    """A secret that gets a certificate for `role` until it expires. Anyone who has it can have one."""
    ca = x509.load_pem_x509_certificate((authority / CA_FILE).read_bytes())
    cluster = str(ca.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value)
    token = JoinToken(cluster, role, int(now_s + valid_s), ca.public_bytes(serialization.Encoding.DER))
    body = msgspec.msgpack.encode(token)
    return TOKEN_PREFIX + base64.urlsafe_b64encode(_mac(authority, body) + body).decode().rstrip("=")


def read_token(token: str) -> JoinToken:
    """What the token says, on the machine that was given it; only the authority can verify it. Raises AccessDenied."""
    return _split_token(token)[1]


def verify_token(authority: Path, token: str, *, now_s: float) -> JoinToken:
    """What the token says, if this authority made it and it has not expired. Raises AccessDenied."""
    mac, said, body = _split_token(token)
    if not hmac.compare_digest(mac, _mac(authority, body)):
        raise AccessDenied("the join token is not of this cluster")
    if now_s >= said.expires_s:
        raise AccessDenied("the join token has expired: make a new one")
    return said


def sign_request(authority: Path, *, token: str, csr: bytes, now_s: float) -> bytes:
    """The certificate (PEM) for a request that comes with a token. Raises AccessDenied."""
    said = verify_token(authority, token, now_s=now_s)
    try:
        request = x509.load_pem_x509_csr(csr)
        if not request.is_signature_valid:
            raise ValueError("it was not signed with its own key")
        return _pem(_sign(authority, request, role=said.role, now_s=now_s))
    except (ValueError, x509.ExtensionNotFound) as error:
        raise AccessDenied(f"not a certificate signing request that can be signed: {error}") from error


def role_of(certificate: x509.Certificate) -> str:
    """What a certificate of `issue` or `sign_request` lets its holder be; empty if it says nothing."""
    units = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    return str(units[0].value) if units else ""


def _split_token(token: str) -> tuple[bytes, JoinToken, bytes]:
    """(MAC, what it says, the bytes the MAC is of)."""
    text = token.strip().removeprefix(TOKEN_PREFIX)
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return raw[:32], msgspec.msgpack.decode(raw[32:], type=JoinToken), raw[32:]
    except (binascii.Error, msgspec.MsgspecError, ValueError) as error:
        raise AccessDenied("not a join token, or not all of it") from error


def _mac(authority: Path, body: bytes) -> bytes:
    """The secret is derived from the authority's key: who could forge a token could as well sign a certificate."""
    secret = hashlib.sha256(b"emberline join token" + (authority / CA_KEY_FILE).read_bytes()).digest()
    return hmac.digest(secret, body, "sha256")


def _sign(authority: Path, csr: x509.CertificateSigningRequest, *, role: str, now_s: float) -> x509.Certificate:
    """Takes from the request its key and its names, and nothing else."""
    ca = x509.load_pem_x509_certificate((authority / CA_FILE).read_bytes())
    key = serialization.load_pem_private_key((authority / CA_KEY_FILE).read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    own = str(csr.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    # The names are the holder's choice, and may be those of a server: TLS itself must not take others for one.
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + ([ExtendedKeyUsageOID.SERVER_AUTH] if role in SERVERS else [])
    return (
        _builder(_subject(own, role), csr.public_key(), issuer=ca.subject, now_s=now_s, valid_s=CERTIFICATE_VALID_S)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, public_key: object, *, issuer: x509.Name, now_s: float, valid_s: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(now_s, datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=CLOCK_SLACK_S))
        .not_valid_after(now + datetime.timedelta(seconds=valid_s))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)  # type: ignore[arg-type]
    )


def _subject(name: str, role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role),
        ]
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, content: bytes, *, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
