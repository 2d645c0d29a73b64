"""What a server process is told: one TOML file per process.

    name = "storage-1"
    role = "storage"                     # kv, manager, meta or storage
    listen = "10.0.0.5:7401"
    managers = ["10.0.0.2:7301", "10.0.0.3:7301"]
    directory = "/srv/disk1"             # kv with an embedded engine, and storage

    [tls]
    directory = "/etc/emberline/tls"     # ca.pem, cert.pem, key.pem: `emberline cluster join` makes them

Unknown names are refused, so that a typing error is not silently the default. What holds for the whole cluster is not
set here but with `emberline cluster config` (see `emberfs.settings`).
Does not know: what a role does with it.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path

import msgspec

from ..errors import InvalidPath
from ..routing import Role
from ..settings import SETTINGS
from ..transport import LoadConfig
from ..transport.config import ucx_kinds


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
    grants: str = ""
    """File of the keys that grants are checked with, the same as the signing service's. Empty: readers are refused."""


_LOAD = LoadConfig()


class LoadSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much the server takes on for all its clients together: see `emberfs.transport.turns`."""

    bytes_max: int = _LOAD.bytes_max
    """Bytes of memory for their requests and replies."""
    calls_max: int = _LOAD.calls_max
    """Calls under way."""
    wait_s_max: float = _LOAD.wait_s_max
    """Seconds that a call may wait for its turn, before it is refused and comes again."""

    def __post_init__(self) -> None:
        self.limits()

    def limits(self) -> LoadConfig:
        """Raises ValueError."""
        return LoadConfig(bytes_max=self.bytes_max, calls_max=self.calls_max, wait_s_max=self.wait_s_max)


class ManagerSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the manager role."""

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
    ucx: str = ""
    """storage: large buffers go by UCX, not encrypted, with clients that have it too. auto, or kinds of device in the
    order to try them, as in "rdma,tcp". Empty: no."""
    tls: TlsConfig = TlsConfig()
    storage: StorageSection = StorageSection()
    manager: ManagerSection = ManagerSection()
    load: LoadSection = LoadSection()

    def __post_init__(self) -> None:
        if not self.name or any(letter in self.name for letter in "/ \n\0"):
            raise ValueError(f"name must be a word: {self.name!r}")
        if self.role in (Role.MANAGER, Role.META) and not self.kv:
            raise ValueError(f"a {self.role} server needs kv, as in kv://host:port")
        if self.role in (Role.META, Role.STORAGE) and not self.managers:
            raise ValueError(f"a {self.role} server needs managers, a list of host:port")
        if self.role in (Role.KV, Role.STORAGE) and not self.directory:
            raise ValueError(f"a {self.role} server needs directory")
        ucx_kinds(self.ucx)
        if self.ucx and self.role != Role.STORAGE:
            raise ValueError("ucx is for storage servers: the others send nothing large")
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
        raw = tomllib.loads(path.read_text())
        _check_names(raw)
        return msgspec.convert(raw, ServerConfig)
    except (msgspec.MsgspecError, ValueError) as error:
        raise InvalidPath(f"{path}: {error}") from error


def _check_names(raw: dict[str, object]) -> None:
    """Raise ValueError that says which names there are, and which one may have been meant."""
    tables = {"": ServerConfig} | {
        field.name: field.type
        for field in msgspec.structs.fields(ServerConfig)
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
    }
    known = {table: struct.__struct_fields__ for table, struct in tables.items()}
    places = {name: table for table, names in reversed(known.items()) for name in names}  # `directory` is in two.
    for table, names in known.items():
        given = raw if not table else raw.get(table)
        for name in given if isinstance(given, dict) else ():
            if name in names:
                continue
            where = f" in [{table}]" if table else ""
            if name in SETTINGS:
                raise ValueError(
                    f"unknown name {name!r}{where}; it is set for the whole cluster: "
                    f"`emberline cluster config set {name}=VALUE`"
                )
            if name in places:
                meant = f"it belongs in [{places[name]}]" if places[name] else "it belongs above the first [table]"
            else:
                close = difflib.get_close_matches(name, names, n=1)
                meant = f"did you mean {close[0]}?" if close else ""
            hints = [meant, f"there are {', '.join(names)}"]
            raise ValueError("; ".join([f"unknown name {name!r}{where}", *filter(None, hints)]))


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
