"""Who may use the service, as whom: tokens of tenants and of operators.

    {"operators": ["sha256 of a token", ...], "tenants": {"acme": ["sha256 of a token", ...]}}

The file holds digests only. Without a file there are no tokens, and everybody who reaches the port is every tenant
and an operator: for a service on loopback.

Does not know: the network.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
from emberfs.errors import AccessDenied, InvalidPath

_DIGEST = re.compile("[0-9a-f]{64}")


class Tenants(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """See the module."""

    operators: list[str] = []
    tenants: dict[str, list[str]] = {}
    is_open: bool = False
    """There are no tokens."""

    def check(self, tenant: str, token: str) -> None:
        """Raises AccessDenied, the same for a tenant that is not there as for a token that is wrong."""
        if not self.is_open and not _is_in(token, [*self.tenants.get(tenant, []), *self.operators]):
            raise AccessDenied("the service does not know this tenant with this token")

    def check_operator(self, token: str) -> None:
        """Raises AccessDenied."""
        if not self.is_open and not _is_in(token, self.operators):
            raise AccessDenied("this takes a token of an operator")

    def is_operator(self, token: str) -> bool:
        """It is a token of an operator."""
        return self.is_open or _is_in(token, self.operators)


EVERYBODY = Tenants(is_open=True)


def _is_in(token: str, digests: Iterable[str]) -> bool:
    mine = hashlib.sha256(token.encode()).hexdigest()
    same = [hmac.compare_digest(mine, each) for each in digests]  # All of them, whichever it is.
    return any(same)


def read_tenants(path: Path) -> Tenants:
    """Raises InvalidPath for what is no such file."""
    try:
        tenants = msgspec.json.decode(path.read_bytes(), type=Tenants)
    except msgspec.MsgspecError as error:
        raise InvalidPath(f"{path} is no file of tenants: {error}") from error
    for digests in (tenants.operators, *tenants.tenants.values()):
        for digest in digests:
            if not _DIGEST.fullmatch(digest):  # A token, perhaps: nobody would be let in by it, and it is not told.
                raise InvalidPath(f"{path} has what is no SHA-256 in 64 of 0-9 and a-f, {len(digest)} characters of it")
    return tenants
