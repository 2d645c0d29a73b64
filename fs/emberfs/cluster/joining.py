"""Getting a certificate: what a new machine does with its token, and who answers it at the manager."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..errors import AlreadyExists
from ..messages import Join, Joined, Message
from ..portal import Portal
from ..runtime import AsyncioRuntime
from ..transport import TcpConfig, TcpNetwork, TlsFiles
from ..transport.certificates import (
    CA_FILE,
    CERT_FILE,
    JoinToken,
    install,
    make_request,
    read_token,
    role_of,
    sign_request,
)
from ..transport.types import Service


def join_cluster(token: str, manager: str, *, into: Path, names: Sequence[str], replaces: bool = False) -> None:
    """Make a key here, have it certified by the manager at `manager`, and put both into the directory `into`.

    A certificate there of the same cluster and role is renewed; another one only if it `replaces` whatever is there.
    The private key never leaves this machine. Raises AccessDenied, AlreadyExists, Unavailable.
    """
    said = read_token(token)
    if not replaces and (others := _others_in(into, said)):
        raise AlreadyExists(f"there are credentials {others}: give another directory by --into, or --force", str(into))
    key, csr = make_request(names, role=said.role)
    runtime = AsyncioRuntime("emberfs-join")
    portal = Portal(runtime)
    try:
        with TemporaryDirectory() as directory:
            # The token says whom to trust: nobody in between can pose as the manager.
            ca = Path(directory) / CA_FILE
            ca.write_bytes(x509.load_der_x509_certificate(said.ca).public_bytes(Encoding.PEM))
            # And which cluster: servers whose configuration does not name theirs are of it too.
            config = TcpConfig(role=said.role, tls=TlsFiles(ca=ca))
            network = TcpNetwork(runtime, config)
            try:
                joined = portal.run(_ask(network, manager, Join(token, csr)))
            finally:
                with contextlib.suppress(OSError):
                    portal.run(network.close())
    finally:
        runtime.stop()
    install(into, key=key, cert=joined.cert, ca=joined.ca)


def _others_in(directory: Path, said: JoinToken) -> str:
    """Whose the credentials in `directory` are, unless they are what the token would renew."""
    try:
        ca = (directory / CA_FILE).read_bytes()
        cert = (directory / CERT_FILE).read_bytes()
    except FileNotFoundError:
        return ""
    try:
        authorities = [each.public_bytes(Encoding.DER) for each in x509.load_pem_x509_certificates(ca)]
        role = role_of(x509.load_pem_x509_certificate(cert))
    except ValueError:
        return "that cannot be read"
    if said.ca not in authorities:
        return "of another cluster"
    return "" if role == said.role else f"of the role {role}, not {said.role}"


async def _ask(network: TcpNetwork, manager: str, request: Join) -> Joined:
    answer = await network.connection(manager).call(request)
    assert isinstance(answer, Joined)
    return answer


class JoinDesk:
    """Answers `Join` from the authority in a directory; everything else goes to `service`."""

    def __init__(self, service: Service, authority: Path) -> None:
        self._service = service
        self._authority = authority
        self._serve: Callable[[Message, Sequence[memoryview]], Awaitable[Message]] = service.handle

    def handle(self, request: Message, buffers: Sequence[memoryview] = ()) -> Awaitable[Message]:
        """Serve one request."""
        return self._join(request) if isinstance(request, Join) else self._serve(request, buffers)

    async def _join(self, request: Join) -> Message:
        cert = sign_request(self._authority, token=request.token, csr=request.csr, now_s=time.time())
        return Joined(cert, (self._authority / CA_FILE).read_bytes())
