"""The worker's certificate, and its successor: renewed files are taken without a restart."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from sllm import folders
from sllm.extras import needs
from sllm.wire import auth

with needs("remote"):
    import grpc

if TYPE_CHECKING:
    import os

__all__ = ["Certificate"]

log = logging.getLogger("sllm.worker")

_Seen = tuple[tuple[int, ...] | int, ...]


class Certificate:
    """A certificate chain and its key, as a server shows them.

    Args:
        chain, key: PEM.
        paths: the files that they were read from; None: they stay what they are.

    Attributes:
        fingerprint: of the certificate that new connections are shown.

    """

    def __init__(
        self,
        chain: bytes,
        key: bytes,
        paths: tuple[str | os.PathLike[str], str | os.PathLike[str]] | None = None,
    ) -> None:
        self.fingerprint = auth.fingerprint(chain)
        self._pair = (chain, key)
        self._paths = None if paths is None else (Path(paths[0]), Path(paths[1]))
        self._new: grpc.ServerCertificateConfiguration | None = None
        # None: look at the files once, in case they have changed since the caller read them.
        self._known: _Seen | None = None
        self._seen = self._look()

    def credentials(self) -> grpc.ServerCredentials:
        """For :meth:`grpc.Server.add_secure_port`; those of files follow :meth:`reload`."""
        chain, key = self._pair
        if self._paths is None:
            return grpc.ssl_server_credentials([(key, chain)])
        first = grpc.ssl_server_certificate_configuration([(key, chain)])
        return grpc.dynamic_ssl_server_credentials(first, self._fetch)  # type: ignore[arg-type]  # may be None

    def reload(self) -> bool:
        """Look whether the files have changed, and take what they hold; whether another certificate is shown
        from now on. To be called again and again, by one thread.

        Changes are taken once the files have been the same in two looks: whoever renews them writes one after
        the other. What is not a certificate and its key is logged, and the old ones are kept.
        """
        if self._paths is None:
            return False
        seen, before = self._look(), self._seen
        self._seen = seen
        if seen != before or seen == self._known:
            return False
        self._known = seen
        try:
            chain, key = self._paths[0].read_bytes(), folders.read_private(self._paths[1])
            # The whole chain: gRPC would go on with the old one, and not say so.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self._paths, password=lambda: "")
            if not auth.belong_together(chain, key):
                raise ValueError("they are not a certificate and its key in PEM form, without a passphrase")
        except (OSError, ValueError) as error:
            reason = "not a chain of certificates" if isinstance(error, ssl.SSLError) else error
            names = " and ".join(str(path) for path in self._paths)
            log.warning("%s have changed, and the old certificate is kept: %s", names, reason)
            return False
        if (chain, key) == self._pair:
            return False
        self._pair = (chain, key)
        self._new = grpc.ssl_server_certificate_configuration([(key, chain)])
        self.fingerprint = auth.fingerprint(chain)
        log.info("took the certificate with the fingerprint %s", self.fingerprint)
        return True

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What gRPC asks at every handshake: another certificate, or None to go on with the last one."""
        new, self._new = self._new, None
        return new

    def _look(self) -> _Seen:
        """What tells the files from those that were there before."""
        if self._paths is None:
            return ()
        return tuple(folders.signature(path) for path in self._paths)
