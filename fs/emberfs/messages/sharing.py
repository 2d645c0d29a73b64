"""What processes that share an embedded store ask of the server that owns it, beside names and chunks."""

from __future__ import annotations

from .base import EVERYBODY, Message


class Attach(Message):
    """A client begins, or comes back after it lost the connection. -> Attached

    Raises SessionExpired if it comes back (`again`) and was given up meanwhile, Unavailable if the server is leaving.
    """

    may_send = EVERYBODY

    client: bytes
    again: bool
    description: str
    """Program and pid, for people."""


class Attached(Message):
    pid: int
    """Of the server."""
    settings: str
    """JSON of the settings that the store is open with."""


class Attend(Message):
    """Is never answered: the client lives as long as this call is under way. Lost, it has a while to come back."""

    may_send = EVERYBODY
    changes_nothing = True

    client: bytes


class Detach(Message):
    """The client ends: what it has open is closed."""

    may_send = EVERYBODY

    client: bytes


class Maintain(Message):
    """Upkeep by name: see `emberfs.maintenance`. -> Maintained"""

    may_send = EVERYBODY

    what: str
    arguments: str
    """JSON."""


class Maintained(Message):
    result: str
    """JSON."""
