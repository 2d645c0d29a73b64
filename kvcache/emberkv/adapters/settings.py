"""What an engine's configuration says about the cache, checked when it is read.

Engines hand it over as a dict out of JSON. A name nobody knows is an error: no setting is silently without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from ..admission import PUT_POLICIES
from ..errors import InvalidNamespace

THREADS_MAX = 64
CONTAINERS = frozenset({"uint8", "int8"})
"""Engines keep several formats of KV in these: e4m3 and e5m2 in uint8, with pages of one size and other values."""
TYPES = {"str": (str,), "float": (float, int), "int": (int,), "bool": (bool,), "str | None": (str, type(None))}
"""Annotation -> what JSON has for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Of every adapter alike."""

    address: str
    """Of the service: host:port, unix:/path, or several with commas."""
    tenant: str = "default"
    token: str = ""
    salt: str = ""
    """More that keys depend on."""
    policy: str = "write-through"
    """Which of the pages that the engine puts are stored: "write-through" (all), "second-use" (at the second put),
    "on-evict" (all; for engines that put what they evict, the end of a prompt before its beginning)."""
    revision: str = ""
    """Of the model's weights: pages of another one are another model's."""
    timeout_s: float = 5.0
    """Within which the service answers, and a storage server. What takes longer is a miss."""
    retry_s: float = 2.0
    """After a failure all calls are misses until the service answers again. It is asked so often."""
    lease_s: float = 30.0
    """What a look-up found stays for so long."""
    threads: int = 4
    """How many calls are under way at once, where the engine does not bring threads of its own."""
    store: str | None = None
    """URL of the store, if it is another one than the service says."""
    tls: str | None = None
    """Directory with ca.pem, and cert.pem and key.pem if the service asks for them."""
    credentials: str | None = None
    """Directory with ca.pem, cert.pem and key.pem for the store, if they are elsewhere than `emberfs.connect` looks."""
    grants: bool = False
    """Pages are read and written under grants: what credentials of a reader or writer need."""
    shares_memory: bool = True

    def __post_init__(self) -> None:
        if not self.address:
            raise InvalidNamespace("address: where the service is, such as 127.0.0.1:7400")
        for name in ("timeout_s", "retry_s", "lease_s"):
            if not getattr(self, name) > 0:
                raise InvalidNamespace(f"{name} is a number of seconds above 0, not {getattr(self, name)!r}")
        if self.policy not in PUT_POLICIES:
            raise InvalidNamespace(f"policy is one of {', '.join(PUT_POLICIES)}, not {self.policy!r}")
        if not 1 <= self.threads <= THREADS_MAX:
            raise InvalidNamespace(f"threads is 1 to {THREADS_MAX}, not {self.threads!r}")

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """Out of an engine's configuration. Raises InvalidNamespace."""
        known = {field.name: field for field in fields(cls)}
        if unknown := sorted(set(given) - set(known)):
            raise InvalidNamespace(f"no such setting: {', '.join(unknown)}; the settings are {', '.join(known)}")
        missing = [name for name, field in known.items() if field.default is MISSING and name not in given]
        if missing:
            raise InvalidNamespace(f"{', '.join(missing)} must be given")
        for name, value in given.items():
            if type(value) not in TYPES[str(known[name].type)]:
                raise InvalidNamespace(f"{name} is of type {known[name].type}, not {value!r}")
        return cls(**given)


def dtype_told(stored: str, given: str) -> str:
    """The dtype of a namespace, of that of the tensors and what is `given` about it. Raises InvalidNamespace: pages of
    two formats would pass for each other."""
    if given:
        return given if given == stored else f"{given} as {stored}"
    if stored in CONTAINERS:
        raise InvalidNamespace(f'the KV is in {stored}, which says no format: set "dtype" to it, such as "fp8_e4m3"')
    return stored
