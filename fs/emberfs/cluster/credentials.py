"""Where a client finds the certificate that a cluster gave it.

    $EMBERLINE_CREDENTIALS                    if it is set
    ~/.config/emberline/clusters/HOST_PORT/   what `cluster up` and `cluster join` leave, by a manager's address

Does not know: what is in a certificate.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import AccessDenied, Unavailable

FILES = ("ca.pem", "cert.pem", "key.pem")


def credentials_home() -> Path:
    """Where credentials of all clusters are kept for this user."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "emberline" / "clusters"


def directory_for(address: str) -> Path:
    """Where those for a manager's address are kept."""
    return credentials_home() / address.replace(":", "_")


@contextmanager
def explained(credentials: Path | None) -> Iterator[None]:
    """A server with TLS just hangs up on who speaks plainly: if there were no credentials, Unavailable says so."""
    try:
        yield
    except Unavailable as error:
        if credentials is not None:
            raise
        raise Unavailable(
            f"{error}. This client has no credentials of the cluster: if it wants some, get them with "
            "`emberline cluster join` or set EMBERLINE_CREDENTIALS"
        ) from error


def find_credentials(managers: Sequence[str], given: str = "") -> Path | None:
    """The directory to use, or None for none. Raises AccessDenied if the one that was named is not complete."""
    named = given or os.environ.get("EMBERLINE_CREDENTIALS", "")
    if named:
        directory = Path(named).expanduser()
        if missing := [name for name in FILES if not (directory / name).is_file()]:
            raise AccessDenied(f"no {', '.join(missing)} in the credentials", str(directory))
        return directory
    for address in managers:
        directory = directory_for(address)
        if all((directory / name).is_file() for name in FILES):
            return directory
    return None
