"""Certificates and what of the network there is."""

from __future__ import annotations

import datetime
import socket
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

if TYPE_CHECKING:
    from pathlib import Path


def pem(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def authority(folder: Path, *names: x509.GeneralName) -> tuple[bytes, bytes]:
    """A chain of a certificate for ``names``, an intermediate and a root, and the certificate's key."""
    now = datetime.datetime.now(datetime.timezone.utc)
    issuer, issuer_key = "root", ec.generate_private_key(ec.SECP256R1())
    certificates: list[bytes] = []
    for name in ("root", "intermediate", "leaf"):
        key = issuer_key if name == "root" else ec.generate_private_key(ec.SECP256R1())
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=name != "leaf", path_length=None), critical=True)
        )
        if name == "leaf" and names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(issuer_key, hashes.SHA256())
        certificates.insert(0, certificate.public_bytes(serialization.Encoding.PEM))
        issuer, issuer_key = name, key
    return b"".join(certificates), pem(issuer_key)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
