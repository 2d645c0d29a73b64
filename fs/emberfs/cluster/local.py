"""A whole cluster on this host, for trying things out, tests and benchmarks: one process per role and per disk.

    D/cluster.json      what there is: written first, so that an interrupted `up` goes on
    D/ca/               the cluster's own certificate authority
    D/client/           credentials of this user; a copy is left under ~/.config/emberline
    D/admin/            those with which to change the cluster itself
    D/NAME/             a server: config.toml, tls/, data/, server.log, ready.json, pid.json

`up` may be run again: it starts what does not run. `down` ends only what was started from this directory.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ..errors import AlreadyExists, Conflict, InvalidPath, LimitExceeded, NotFound, Unavailable
from ..routing import Role, TargetState
from ..server import ServerConfig, read_config, write_config
from ..server.config import ManagerSection, StorageSection, TlsConfig
from ..settings import Value
from ..transport.certificates import issue, make_authority
from .admin import Admin
from .credentials import FILES, directory_for
from .processes import ServerProcess

START_TIMEOUT_S = 60.0
HOST = "127.0.0.1"
MANAGERS_MAX = 3
METAS_MAX = 2

Say = Callable[[str], object]
"""Is told what is being done."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster on this host is made of. Fixed when it is made, the storage nodes apart."""

    cluster: str
    """Its id: other clusters' certificates and servers are refused."""
    replicas: int = 3
    targets_per_disk: int = 6
    kv: str = ""
    """postgresql://… instead of a kv server of our own."""
    nodes: list[str] = []
    """Storage servers."""
    reserve_bytes: int = 64 << 20
    settings: dict[str, Value] = {}
    """What the cluster's configuration begins with, beside the defaults: see `emberfs.settings`."""


class LocalCluster:
    """The cluster under a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        """Somebody has made one here."""
        return (self.directory / "cluster.json").exists()

    def plan(self) -> Plan:
        """Raises NotFound."""
        try:
            return msgspec.json.decode((self.directory / "cluster.json").read_bytes(), type=Plan)
        except FileNotFoundError:
            raise NotFound("no cluster here; `emberline cluster up` makes one", str(self.directory)) from None

    def servers(self) -> list[ServerProcess]:
        """All servers, in the order they are started in."""
        plan = self.plan()
        first = [] if plan.kv else ["kv-1"]
        managers = [f"manager-{number}" for number in range(1, min(MANAGERS_MAX, len(plan.nodes)) + 1)]
        metas = [f"meta-{number}" for number in range(1, min(METAS_MAX, len(plan.nodes)) + 1)]
        return [ServerProcess(self.directory / name) for name in [*first, *managers, *plan.nodes, *metas]]

    def server(self, name: str) -> ServerProcess:
        """One by name. Raises NotFound."""
        for server in self.servers():
            if server.name == name:
                return server
        raise NotFound(f"no server of that name; there are {', '.join(each.name for each in self.servers())}", name)

    @property
    def url(self) -> str:
        """What `connect` takes."""
        managers = [server for server in self.servers() if server.name.startswith("manager-")]
        return "ember://" + ",".join(read_config(server.directory / "config.toml").listen for server in managers)

    def admin(self, *, timeout_s: float = 10.0) -> Admin:
        """The way to its managers."""
        return Admin(self.url, credentials=str(self.directory / "admin"), timeout_s=timeout_s)

    # --- up and down -----------------------------------------------------------------------------------------------

    def up(self, plan: Plan, *, say: Say = lambda _: None) -> None:
        """Make the cluster, or go on making it, and start what does not run. Returns once all chains serve.

        Raises LimitExceeded, AlreadyExists (something else is there), Unavailable (a server does not start).
        """
        if not self.exists:
            self._make(plan)
        # The certificate authority, settings and processes of what an interrupted `up` has not come to.
        self._write_configs()
        self._start(self.servers(), say)
        plan = self.plan()
        with self.admin(timeout_s=START_TIMEOUT_S) as admin:
            if not admin.routing().chains:
                self._wait_heard(admin, plan.nodes, say)
                admin.set_config(admin.config().version, plan.settings)
                admin.setup_chains(replicas=plan.replicas, targets_per_disk=plan.targets_per_disk)
            self.wait_serving(admin, say)
        self._leave_credentials()

    def _make(self, plan: Plan) -> None:
        if not 1 <= plan.replicas <= len(plan.nodes):
            raise LimitExceeded(f"{plan.replicas} replicas need as many nodes; there are {len(plan.nodes)}")
        self.directory.mkdir(parents=True, exist_ok=True)
        if strangers := [path.name for path in self.directory.iterdir() if path.name != "ca"]:
            raise AlreadyExists(f"not empty (it holds {strangers[0]!r}); give an empty directory", str(self.directory))
        if not (self.directory / "ca").exists():
            make_authority(self.directory / "ca", cluster=plan.cluster, now_s=time.time())
        self._save(plan)

    def _save(self, plan: Plan) -> None:
        temporary = self.directory / "cluster.json.new"
        temporary.touch(mode=0o600)  # A database URL is a secret.
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))
        temporary.replace(self.directory / "cluster.json")

    def _write_configs(self) -> None:
        """Settings and certificates of every server that has none yet."""
        plan = self.plan()
        ports = _free_ports()
        addresses: dict[str, str] = {}
        new: list[ServerProcess] = []
        for server in self.servers():
            path = server.directory / "config.toml"
            if path.exists():
                addresses[server.name] = read_config(path).listen
            else:
                addresses[server.name] = f"{HOST}:{next(ports)}"
                new.append(server)
        managers = [address for name, address in addresses.items() if name.startswith("manager-")]
        kv = plan.kv or f"kv://{addresses['kv-1']}"
        for server in new:
            role = Role(server.name.rpartition("-")[0])
            directory = server.directory
            directory.mkdir(parents=True, exist_ok=True)
            names = [server.name, HOST, "localhost"]
            issue(self.directory / "ca", names, role=role, into=directory / "tls", now_s=time.time())
            config = ServerConfig(
                name=server.name,
                role=role,
                listen=addresses[server.name],
                managers=managers,
                kv=kv if role in (Role.MANAGER, Role.META) else "",
                directory=str(directory / "data") if role in (Role.KV, Role.STORAGE) else "",
                # On this host each node plays a machine of its own.
                host=f"host-{server.name.rpartition('-')[2]}",
                metrics=f"{HOST}:{next(ports)}",
                cluster=plan.cluster,
                tls=TlsConfig(directory=str(directory / "tls")),
                storage=StorageSection(reserve_bytes=plan.reserve_bytes),
                manager=ManagerSection(authority=str(self.directory / "ca") if role == Role.MANAGER else ""),
            )
            temporary = directory / "config.toml.new"
            write_config(temporary, config)
            temporary.replace(directory / "config.toml")
        for person in ("client", "admin"):
            into = self.directory / person
            if not into.exists():
                issue(self.directory / "ca", [person], role=person, into=into, now_s=time.time())

    def _start(self, servers: list[ServerProcess], say: Say) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        # Role by role: each needs those before it. Within a role side by side.
        for role in (Role.KV, Role.MANAGER, Role.STORAGE, Role.META):
            group = [server for server in servers if server.name.rpartition("-")[0] == role]
            for server in group:
                if server.pid() is None:
                    say(f"starting {server.name}")
                    server.start()
            for server in group:
                server.wait_ready(deadline_s)

    def _wait_heard(self, admin: Admin, nodes: list[str], say: Say) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        say("waiting for the storage nodes to report")
        while True:
            heard = {node.node.name for node in admin.status().nodes if node.alive}
            if set(nodes) <= heard:
                return
            if time.monotonic() > deadline_s:
                raise Unavailable(f"not heard of: {', '.join(sorted(set(nodes) - heard))}")
            time.sleep(0.1)

    def wait_serving(self, admin: Admin, say: Say, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every chain has all its replicas serving."""
        deadline_s = time.monotonic() + timeout_s
        said = -1
        while True:
            chains = admin.routing().chains
            serving = sum(all(target.state == TargetState.SERVING for target in chain.targets) for chain in chains)
            if serving != said:
                say(f"{serving} of {len(chains)} chains serve with all replicas")
                said = serving
            if chains and serving == len(chains):
                return
            if time.monotonic() > deadline_s:
                raise Unavailable("not all chains came to serve; `emberline cluster status` says what is wrong")
            time.sleep(0.1)

    def _leave_credentials(self) -> None:
        for address in self.url.removeprefix("ember://").split(","):
            directory = directory_for(address)
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name in FILES:
                temporary = directory / f"{name}.new"
                temporary.unlink(missing_ok=True)
                temporary.touch(mode=0o600, exist_ok=False)  # Before there is a key in it.
                temporary.write_bytes((self.directory / "client" / name).read_bytes())
                temporary.replace(directory / name)

    def down(self, *, say: Say = lambda _: None) -> int:
        """Stop what runs, those that others need last; returns how many that were."""
        stopped = 0
        for server in reversed(self.servers()):
            if server.pid() is not None:
                say(f"stopping {server.name}")
                server.stop()
                stopped += 1
        if stopped:
            for address in self.url.removeprefix("ember://").split(","):
                shutil.rmtree(directory_for(address), ignore_errors=True)
        return stopped

    # --- storage nodes ---------------------------------------------------------------------------------------------

    def add_node(self, *, say: Say = lambda _: None) -> str:
        """One storage node more, which chains then move to; returns its name."""
        plan = self.plan()
        number = 1 + max(int(name.rpartition("-")[2]) for name in plan.nodes)
        name = f"storage-{number}"
        self._save(msgspec.structs.replace(plan, nodes=[*plan.nodes, name]))
        self._write_configs()
        self._start([self.server(name)], say)
        with self.admin() as admin:
            self._wait_heard(admin, [name], say)
            admin.add_node(name)
        return name

    def remove_node(self, name: str, *, say: Say = lambda _: None) -> None:
        """Take a drained storage node out and stop it; its directory stays. Raises Conflict while it holds targets."""
        plan = self.plan()
        if name not in plan.nodes:
            raise InvalidPath(f"not a storage node: {name!r}; there are {', '.join(plan.nodes)}")
        server = self.server(name)
        with self.admin() as admin:
            if held := sum(target.node == name for target in admin.routing().targets):
                raise Conflict(f"{name} still holds {held} replicas: drain it first")
            say(f"stopping {name}")
            server.stop()
            # The manager forgets a node only when its lease is over.
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while any(status.alive for status in admin.status().nodes if status.node.name == name):
                if time.monotonic() > deadline_s:
                    raise Unavailable(f"the manager still takes {name} for alive")
                time.sleep(0.1)
            admin.remove_node(name)
        self._save(msgspec.structs.replace(plan, nodes=[node for node in plan.nodes if node != name]))


def _free_ports() -> Iterator[int]:
    """Ports that nobody listens on now, each another one."""
    held = []
    try:
        while True:
            listener = socket.socket()
            held.append(listener)  # Held until all are chosen, so that none comes twice.
            listener.bind((HOST, 0))
            yield listener.getsockname()[1]
    finally:
        for listener in held:
            listener.close()
