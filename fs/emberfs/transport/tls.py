"""TLS contexts of a cluster: both sides show a certificate of the cluster's authority, and each checks the other's.

The files are looked at before each handshake, so that rotating a certificate or the authority needs no restart:
connections that exist live on, new ones use what is there now. Functions here block; they read a few small files.

Does not know: how certificates are made (`certificates`), or what a role may do.
"""

from __future__ import annotations

import logging
import os
import ssl

from .config import TlsFiles

log = logging.getLogger("emberline.transport")


class TlsContexts:
    """The two contexts made of a set of files."""

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._made: dict[bool, tuple[object, ssl.SSLContext]] = {}
        """Whether to serve -> (state of the files, context)."""

    def server(self) -> ssl.SSLContext:
        """Asks the client for a certificate and checks the one it has; whether it needs one is the handshake's to say.

        Raises OSError, ssl.SSLError.
        """
        return self._context(serves=True)

    def client(self) -> ssl.SSLContext:
        """Checks that the server has a certificate for the host that was asked for. Raises OSError, ssl.SSLError."""
        return self._context(serves=False)

    def _context(self, *, serves: bool) -> ssl.SSLContext:
        made = self._made.get(serves)
        try:
            state = self._state()
            if made is None or made[0] != state:
                made = self._made[serves] = (state, self._make(serves=serves))
        except OSError as error:
            if made is None:
                raise
            # Somebody is in the middle of replacing them: certificate and key do not fit for a moment.
            log.warning("the new TLS files cannot be used yet, the old ones go on: %s", error)
        return made[1]

    def _state(self) -> object:
        files = self._files
        stats = [os.stat(path) for path in (files.ca, files.cert, files.key) if path is not None]
        return [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats]

    def _make(self, *, serves: bool) -> ssl.SSLContext:
        files = self._files
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if serves else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(files.ca)
        if serves:
            context.verify_mode = ssl.CERT_OPTIONAL
            # A resumed session would skip the check of the client's certificate against today's authorities.
            context.num_tickets = 0
        if files.cert is not None and files.key is not None:
            context.load_cert_chain(files.cert, files.key)
        return context


def is_tls_refusal(error: Exception) -> bool:
    """True if TLS itself said no: another attempt with the same files fares no better."""
    return isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError)
