"""Addresses of workers, tokens, certificates and their fingerprints.

A worker's address is one line, ``sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT``. The fingerprint (SHA-256 of the
certificate in DER form) identifies the worker, so the certificate's host names and issuer do not matter and a
plain TCP tunnel may lie between. The token authorizes the client. The line as a whole is a secret: no
``repr``, log or error message of this package shows a token.

``cryptography`` is imported where it is needed: it takes longer to load than everything else here.
"""

from __future__ import annotations

import datetime
import hashlib
import socket
import ssl
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote, urlsplit

from sllm.errors import AuthError, RemoteError
from sllm.extras import needs
from sllm.folders import read_private, write_private
from sllm.hosts import DEFAULT_PORT, host_port, is_loopback
from sllm.wire.tokens import is_visible

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "CAPABILITY_BYTES",
    "Address",
    "bearer",
    "bearing",
    "belong_together",
    "capability_digest",
    "client_credentials",
    "fetch_certificate",
    "fingerprint",
    "header_digest",
    "load_or_make_certificate",
]


_SERVER_NAME = "sllm-worker"
CAPABILITY_BYTES = 32
"""Of a capability, which is made at random: none can be guessed from its hash."""

_BEGINNING = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_NO_END = datetime.datetime(9999, 12, 31, 23, 59, 59, tzinfo=datetime.timezone.utc)
"""RFC 5280's "no well-defined expiration date"."""


@dataclass(frozen=True)
class Address:
    """The address of a worker, and how to recognise it.

    Attributes:
        host, port: the address.
        token: the client's token; None if the worker requires none.
        fingerprint: SHA-256 of the worker's certificate, hex; None: the certificate must be valid for the
            host by the system's authorities.
        insecure: no TLS; loopback only.

    """

    host: str
    port: int
    token: str | None = field(default=None, repr=False)
    fingerprint: str | None = None
    insecure: bool = False

    @classmethod
    def parse(cls, uri: str) -> Address:
        """Read ``sllm://[TOKEN@]HOST[:PORT][#sha256=FINGERPRINT | #insecure]``.

        Raises:
            ValueError: another form; the message does not repeat it.

        """
        if not isinstance(uri, str):
            raise TypeError(f"the address of a worker is {type(uri).__name__}, expected str")
        form = "expected sllm://TOKEN@HOST:PORT#sha256=FINGERPRINT, the line that the worker printed"
        try:
            parts = urlsplit(uri.strip())
            port = parts.port
        except ValueError:  # from None: the message of urllib shows parts of the address
            raise ValueError(f"the address of the worker has no valid host and port; {form}") from None
        if parts.scheme != "sllm":
            raise ValueError(f"the address of the worker does not begin with sllm://; {form}")
        if not parts.hostname:
            raise ValueError(f"the address of the worker names no host; {form}")
        if parts.path not in ("", "/") or parts.query:
            raise ValueError(f"the address of the worker has something after its port; {form}")
        if parts.password is not None:
            raise ValueError(f"the address of the worker has a ':' before its '@'; {form}")
        token = unquote(parts.username) if parts.username else None
        if token is not None and not is_visible(token):
            raise ValueError(
                f"the token in the address of the worker has spaces, control or non-ASCII characters; {form}"
            )
        found: str | None = None
        insecure = False
        if parts.fragment == "insecure":
            insecure = True
        elif parts.fragment:
            name, _, digest = parts.fragment.partition("=")
            digest = digest.replace(":", "").lower()
            if name != "sha256" or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
                raise ValueError(f"the address of the worker has no valid fingerprint after its '#'; {form}")
            found = digest
        if insecure and not is_loopback(parts.hostname):
            raise ValueError(f"#insecure is for loopback alone, and the address names {parts.hostname}")
        return cls(parts.hostname, DEFAULT_PORT if port is None else port, token, found, insecure)

    @property
    def endpoint(self) -> str:
        """``HOST:PORT``, for messages."""
        return host_port(self.host, self.port)

    @property
    def uri(self) -> str:
        """The whole line, including the token: a secret."""
        token = f"{quote(self.token, safe='')}@" if self.token else ""
        end = "#insecure" if self.insecure else f"#sha256={self.fingerprint}" if self.fingerprint else ""
        return f"sllm://{token}{self.endpoint}{end}"


# ---- tokens


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a token."""
    return () if token is None else (("authorization", f"Bearer {token}"),)


def header_digest(header: str | bytes | None) -> str:
    """The digest (:func:`~sllm.wire.tokens.token_digest`) of the token in an ``authorization`` header; empty
    where it carries none.
    """
    given = header.encode("utf-8", "replace") if isinstance(header, str) else header or b""
    bare = given.removeprefix(b"Bearer ")
    return hashlib.sha256(bare).hexdigest() if len(bare) < len(given) else ""


# ---- capabilities


def bearing(capability: bytes) -> tuple[tuple[str, str], ...]:
    """The metadata that carries a capability: of a worker that brings another one the rows of one text."""
    return (("authorization", f"Hop {capability.hex()}"),)


def capability_digest(header: str | bytes | None) -> bytes:
    """SHA-256 of the capability in an ``authorization`` header; empty where it carries none."""
    given = header.decode("latin-1") if isinstance(header, bytes) else header or ""
    bare = given.removeprefix("Hop ")
    if len(bare) != 2 * CAPABILITY_BYTES or len(bare) == len(given):
        return b""
    try:
        return hashlib.sha256(bytes.fromhex(bare)).digest()
    except ValueError:
        return b""


# ---- certificates


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of the first certificate of a PEM file, hex.

    Raises:
        ValueError: no certificate in it.

    """
    text = certificate_pem.decode("latin-1")  # there may be any text around certificates
    _, header, rest = text.partition(ssl.PEM_HEADER)
    body, footer, _ = rest.partition(ssl.PEM_FOOTER)
    try:
        der = ssl.PEM_cert_to_DER_cert(header + body + footer)
    except ValueError:
        der = b""
    if not der:
        raise ValueError("there is no certificate in PEM form")
    return hashlib.sha256(der).hexdigest()


def load_or_make_certificate(folder: Path) -> tuple[bytes, bytes]:
    """The certificate and key of a worker (PEM), made on the first call and kept in ``folder``, readable by
    its owner alone.

    Self-signed, and valid from 1970 without an end (RFC 5280, 4.1.2.5): clients pin its fingerprint, and a
    clock that is wrong on either side is no reason to refuse it.

    Raises:
        OSError: the folder cannot be read or written.
        PermissionError: other users may read or replace the file.
        ValueError: the file there is not a certificate with its key.

    """
    path = folder / "worker.pem"
    try:
        both = read_private(path)
    except FileNotFoundError:
        both = _make_certificate()
        if not write_private(path, both):
            both = read_private(path)
    key, header, certificate = both.partition(ssl.PEM_HEADER.encode())
    if not belong_together(header + certificate, key):
        raise ValueError(
            f"{path} does not hold a key and its certificate; move it away and a new one is made"
        )
    return header + certificate, key


def belong_together(certificate: bytes, key: bytes) -> bool:
    """Whether this is a certificate, or a chain of them, and the key of the first one (PEM)."""
    with needs("remote"):
        from cryptography import x509
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization

    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
        return serialization.load_pem_private_key(key, None).public_key() == public
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def _make_certificate() -> bytes:
    """A new key and its self-signed certificate, PEM, in this order."""
    with needs("remote"):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, _SERVER_NAME)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGINNING)
        .not_valid_after(_NO_END)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(_SERVER_NAME)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private + certificate.public_bytes(serialization.Encoding.PEM)


def fetch_certificate(address: Address, timeout: float) -> bytes:
    """The certificate (PEM) that the worker shows, if it has the pinned fingerprint.

    gRPC offers no check of one's own, so the certificate is fetched first, compared, and then is the only one
    that the real connection trusts.

    Raises:
        AuthError: another certificate.
        RemoteError: nobody answers there, or not in TLS.

    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection((address.host, address.port), timeout=timeout) as plain:
            der = _shown_certificate(plain, context, timeout)
    except ssl.SSLError as error:
        raise RemoteError(
            f"{address.endpoint} does not speak TLS as a worker does: {error.reason or error}"
        ) from error
    except OSError as error:
        raise RemoteError(f"{address.endpoint} cannot be reached: {error.strerror or error}") from error
    except UnicodeError:  # not a possible host name
        raise RemoteError(f"{address.endpoint} cannot be reached: its host name is not valid") from None
    found = hashlib.sha256(der).hexdigest()
    if address.fingerprint is not None and found != address.fingerprint:
        raise AuthError(
            f"{address.endpoint} has a certificate with the fingerprint {found},"
            f" expected {address.fingerprint}: this is another worker, or somebody intercepts the connection"
        )
    return ssl.DER_cert_to_PEM_cert(der).encode()


def _shown_certificate(plain: socket.socket, context: ssl.SSLContext, timeout: float) -> bytes:
    """The certificate (DER) that the other side shows in a handshake.

    Not by ``wrap_socket()``: that leaves a socket open that the other side resets before the handshake.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing)
    until = time.monotonic() + timeout
    done = False
    while not done:
        try:
            tls.do_handshake()
            done = True
        except ssl.SSLWantReadError:
            pass
        plain.settimeout(max(until - time.monotonic(), 0.001))
        plain.sendall(outgoing.read())
        if not done:
            received = plain.recv(1 << 14)
            incoming.write(received) if received else incoming.write_eof()
    return tls.getpeercert(binary_form=True) or b""


def client_credentials(certificate_pem: bytes) -> tuple[grpc.ChannelCredentials, str]:
    """Credentials that trust this one certificate, and the name in it that TLS is to expect.

    gRPC for Python has no way to leave the validity out: a certificate of one's own is refused where the
    client's clock is outside of it, its fingerprint notwithstanding.

    Raises:
        AuthError: it is not valid by this machine's clock.

    """
    with needs("remote"):
        from cryptography import x509

    certificate = x509.load_pem_x509_certificate(certificate_pem)
    now = datetime.datetime.now(datetime.timezone.utc)
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= now <= end:
        raise AuthError(
            f"the worker's certificate is valid from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, and"
            f" by the clock of this machine it is {now:%Y-%m-%d %H:%M}; set the clock or renew it"
        )
    name = ""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = [
            *names.get_values_for_type(x509.DNSName),
            *map(str, names.get_values_for_type(x509.IPAddress)),
        ]
        name = found[0].replace("*", "any") if found else ""
    except x509.ExtensionNotFound:
        pass
    if not name:
        common = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        name = str(common[0].value) if common else _SERVER_NAME
    return grpc.ssl_channel_credentials(root_certificates=certificate_pem), name
