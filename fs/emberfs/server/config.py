"""What a server process is told: one TOML file per process.

    name = "storage-1"
    role = "storage"                     # kv, manager, meta or storage
    listen = "10.0.0.5:7401"
    managers = ["10.0.0.2:7301", "10.0.0.3:7301"]
    directory = "/srv/disk1"             # kv with an embedded engine, and storage

    [tls]
    directory = "/etc/emberline/tls"     # ca.pem, cert.pem, key.pem: `emberline cluster join` makes them

Unknown names are refused, so that a typing error is not silently the default.
Does not know: what a role does with it.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ..errors import InvalidPath
from ..routing import Role


class TlsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How connections are protected."""

    directory: str = ""
    """Where ca.pem, cert.pem and key.pem are. Read again when they change."""
    insecure: bool = False
    """Speak plainly although the address is not of this machine: everybody on the network may read and write."""


class StorageSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the storage role."""

    reserve_bytes: int = 1 << 30
    """New data is refused when the disk has less than this left."""
    resync_bytes_per_s: int = 200 << 20
    """How fast a replica that missed writes is brought up to date, per disk."""
    tombstone_s: float = 600.0
    """Seconds that the trace of a removed chunk stays."""
    scrub_interval_s: float = 14 * 86400.0
    """Seconds in which every chunk is read back from the disk and checked. 0: never."""
    scrub_bytes_per_s: int = 20 << 20
    """That never reads faster than this, per disk."""


class MetaSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the metadata role."""

    gc_delay_s: float = 300.0
    """Seconds that readers of an unlinked or replaced file may go on."""
    gc_interval_s: float = 60.0
    """Seconds between two looks at the garbage."""
    trash_s: float = 7 * 86400.0
    """Seconds that removed files stay in the trash."""


class ManagerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the manager role."""

    session_timeout_s: float = 60.0
    """A client that is not heard of for this long is given up."""
    authority: str = ""
    """Directory of the cluster's certificate authority: this manager lets machines with a token join."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One server process."""

    name: str
    """Unique in the cluster, and for ever the same for the same disk."""
    role: Role
    listen: str
    """host:port"""
    advertise: str = ""
    """host:port as others reach it; empty: `listen`."""
    managers: list[str] = []
    """Addresses of all managers. The kv role does without; with them it is in `cluster status`."""
    kv: str = ""
    """Managers and metadata: kv://host:port, or postgresql://user@host/database."""
    directory: str = ""
    """kv and storage: where the data is."""
    rack: str = ""
    """Replicas are put into different racks if there are enough."""
    host: str = ""
    """The machine: replicas are put on different ones. Empty: the host of `advertise`."""
    metrics: str = ""
    """host:port of the Prometheus page; empty: none."""
    log_level: str = "info"
    """debug, info, warning or error."""
    drain_s: float = 10.0
    """When it is told to stop: seconds that calls in the air may take."""
    cluster: str = ""
    """Id of the cluster: others are refused. Empty: any."""
    tls: TlsConfig = TlsConfig()
    storage: StorageSection = StorageSection()
    meta: MetaSection = MetaSection()
    manager: ManagerSection = ManagerSection()

    def __post_init__(self) -> None:
        if not self.name or any(letter in self.name for letter in "/ \n\0"):
            raise ValueError(f"name must be a word: {self.name!r}")
        if self.role in (Role.MANAGER, Role.META) and not self.kv:
            raise ValueError(f"a {self.role} server needs kv, as in kv://host:port")
        if self.role in (Role.META, Role.STORAGE) and not self.managers:
            raise ValueError(f"a {self.role} server needs managers, a list of host:port")
        if self.role in (Role.KV, Role.STORAGE) and not self.directory:
            raise ValueError(f"a {self.role} server needs directory")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ValueError(f"log_level is debug, info, warning or error, not {self.log_level!r}")
        for address in (self.listen, self.advertise, self.metrics, *self.managers):
            if address and not address.rpartition(":")[2].isdigit():
                raise ValueError(f"an address is host:port, not {address!r}")

    @property
    def address(self) -> str:
        """Where others reach it."""
        return self.advertise or self.listen

    @property
    def machine(self) -> str:
        """The name of the machine."""
        return self.host or self.address.rpartition(":")[0]


def read_config(path: Path) -> ServerConfig:
    """The settings in a file. Raises InvalidPath that names the file and the field."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=ServerConfig)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidPath(f"{path}: {error}") from error


def write_config(path: Path, config: ServerConfig) -> None:
    """The reverse of `read_config`; defaults are left out. Only its owner may read it: a database URL is a secret."""
    raw = _without_defaults(config)
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text(_toml(raw))


def _without_defaults(struct: msgspec.Struct) -> dict[str, object]:
    raw: dict[str, object] = {}
    for field in msgspec.structs.fields(struct):
        value = getattr(struct, field.name)
        if value == field.default or (field.default_factory is list and value == []):
            continue
        raw[field.name] = _without_defaults(value) if isinstance(value, msgspec.Struct) else value
    return raw


def _toml(raw: dict[str, object]) -> str:
    """TOML of a flat table with tables of scalars: all that a `ServerConfig` is."""
    # JSON's strings, numbers, booleans and lists of them are TOML too.
    lines = [
        f"{name} = {msgspec.json.encode(value).decode()}" for name, value in raw.items() if not isinstance(value, dict)
    ]
    for name, value in raw.items():
        if isinstance(value, dict):
            lines += ["", f"[{name}]", _toml(value).rstrip()]
    return "\n".join(lines) + "\n"
