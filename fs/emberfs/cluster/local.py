"""A whole cluster on this host, for trying things out, tests and benchmarks: one process per role and per disk.

    D/cluster.json      what there is: written first, so that an interrupted `up` goes on
    D/ca/               the cluster's own certificate authority
    D/client/           credentials of this user; a copy is left under ~/.config/emberline
    D/admin/            those with which to change the cluster itself
    D/grants.keys       what storage servers check readers' grants with: for `emberline kv serve --grants`
    D/NAME/             a server: config.toml, tls/, data/, server.log, ready.json, pid.json

`up` may be run again: it starts what does not run. `down` ends only what was started from this directory. One of these
commands at a time: the directory is locked meanwhile.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from ..errors import (
    AlreadyExists,
    Conflict,
    InvalidPath,
    LimitExceeded,
    NotFound,
    StoreBusy,
    StoreFormat,
    Unavailable,
)
from ..grants import KEY_BYTES
from ..routing import Role, TargetState
from ..server import ServerConfig, read_config, write_config
from ..server.config import ManagerSection, StorageSection, TlsConfig
from ..settings import Value
from ..transport.certificates import issue, make_authority
from .admin import Admin
from .credentials import FILES, directory_for
from .processes import ServerProcess
from .waiting import Say, wait_until

START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 10.0
HOPELESS_TIMEOUT_S = 2.0
"""For an answer that hardly comes: what is needed for it does not run, unless somebody started it by hand."""
LOCK_TIMEOUT_S = 1.0
"""A command that was killed may leave the lock to a server on its way from fork to exec, which then lets it go."""
HOST = "127.0.0.1"
PORTS = range(10000, 32768)
"""Servers are there again after a `down`: not from 32768 on, where the kernel takes those of outgoing connections."""
MANAGERS_MAX = 3
METAS_MAX = 2


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
    ucx: str = ""
    """Of the storage servers: see `ServerConfig`."""
    settings: dict[str, Value] = {}
    """What the cluster's configuration begins with, beside the defaults: see `emberfs.settings`."""
    tls: bool = True
    """False: whoever is on this host may read and write everything. For measuring what TLS costs."""


def differences(
    plan: Plan, *, nodes: int | None, replicas: int | None, targets_per_disk: int | None, kv: str | None
) -> list[str]:
    """What a cluster is not that is asked for, and how to get there, a sentence each. None: not asked for."""
    found = []
    if nodes not in (None, len(plan.nodes)):
        found.append(
            f"it has {len(plan.nodes)} storage nodes, not {nodes}: `emberline cluster add-node` starts one more, "
            "`drain NAME` and then `remove-node NAME` take one out"
        )
    if replicas not in (None, plan.replicas):
        found.append(f"it keeps {plan.replicas} replicas, not {replicas}: that holds for good")
    if targets_per_disk not in (None, plan.targets_per_disk):
        found.append(
            f"a disk of it holds {plan.targets_per_disk} replicas, not {targets_per_disk}: that holds for good"
        )
    if kv not in (None, plan.kv):
        # Not which: a database URL may hold a password.
        where = "another database" if plan.kv and kv else "a database" if plan.kv else "a kv server of its own"
        found.append(f"its metadata is in {where}: that holds for good")
    return found


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
        except msgspec.MsgspecError as error:
            raise StoreFormat(f"{self.directory / 'cluster.json'} is damaged: {error}") from error

    def servers(self) -> list[ServerProcess]:
        """All servers, in the order they are started in. Raises InvalidPath in a copy of a cluster's directory."""
        plan = self.plan()
        self._check_place()
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

    def _check_place(self) -> None:
        """Settings name the place where they were made; process files in a copy name the servers of the original."""
        config = self.directory / "manager-1" / "config.toml"
        if not config.exists():
            return
        tls = read_config(config).tls.directory
        if not tls:
            return
        place = Path(tls).parent.parent
        if place.resolve() != self.directory:
            raise InvalidPath(f"this cluster was made as {place}, and works only there; move it back: {self.directory}")

    @property
    def has_data(self) -> bool:
        """Chains have been made: there are replicas on its disks."""
        return any(any((self.directory / name / "data").glob("target-*")) for name in self.plan().nodes)

    def address(self, name: str) -> str:
        """Of a server; empty before it has settings."""
        config = self.directory / name / "config.toml"
        return read_config(config).listen if config.exists() else ""

    @property
    def url(self) -> str:
        """What `connect` takes."""
        managers = [server for server in self.servers() if server.name.startswith("manager-")]
        return "ember://" + ",".join(self.address(server.name) for server in managers)

    def admin(self, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Admin:
        """The way to its managers."""
        credentials = str(self.directory / "admin") if self.plan().tls else ""
        return Admin(self.url, credentials=credentials, timeout_s=timeout_s)

    @contextmanager
    def reach(self) -> Iterator[Admin]:
        """The way to a manager that answers. Raises Unavailable, which says what does not run."""
        if not any(server.pid() for server in self.servers()):
            raise Unavailable("the cluster does not run: `emberline cluster up` starts it")
        stopped = self._needed_and_stopped()
        with self.admin(timeout_s=HOPELESS_TIMEOUT_S if stopped else ANSWER_TIMEOUT_S) as admin:
            try:
                admin.routing()
            except Unavailable as error:
                if not stopped:
                    raise
                raise Unavailable(f"no {stopped} runs: `emberline cluster up` starts what does not run") from error
            yield admin

    def _needed_and_stopped(self) -> str:
        """The role without which no manager can answer, if none of it runs."""
        for role in (Role.KV, Role.MANAGER):
            servers = [server for server in self.servers() if role_of(server.name) == role]
            if servers and not any(server.pid() for server in servers):
                return f"{role} server"
        return ""

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands that start the same server would lose track of one of its processes. Raises StoreBusy."""
        self.plan()  # Or there is nothing to lock.
        descriptor = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                wait_until(lambda: (_take_lock(descriptor), ""), say=lambda _: None, timeout_s=LOCK_TIMEOUT_S)
            except Unavailable:
                what = "another `emberline cluster` command is at work on this cluster; wait for it, or end it"
                raise StoreBusy(what, str(self.directory)) from None
            yield
        finally:
            os.close(descriptor)

    # --- up and down -----------------------------------------------------------------------------------------------

    def up(self, plan: Plan, *, say: Say = lambda _: None) -> None:
        """Make the cluster, or go on making it, and start what does not run. Returns once all chains serve.

        Raises LimitExceeded, AlreadyExists (something else is there), Unavailable (a server does not start).
        """
        if not self.exists:
            self._make(plan)
        with self._alone():
            # The certificate authority, settings and processes of what an interrupted `up` has not come to.
            self._write_configs()
            # One that has data goes on with the servers that there are, as a cluster does; of a new one nothing stays.
            with self._undone_unless_up(say, keeps=self.has_data) as started:
                self._start(self.servers(), say, started)
                plan = self.plan()
                with self.admin(timeout_s=START_TIMEOUT_S) as admin:
                    if not admin.routing().chains:
                        self._wait_heard(admin, plan.nodes, say)
                        admin.set_config(admin.config().version, plan.settings)
                        admin.setup_chains(replicas=plan.replicas, targets_per_disk=plan.targets_per_disk)
                    self.wait_serving(admin, say)
                self._leave_credentials()

    @contextmanager
    def _undone_unless_up(self, say: Say, *, keeps: bool) -> Iterator[list[ServerProcess]]:
        """Yields a list for the servers that are started. After an error, or Ctrl-C, they are stopped unless `keeps`.

        What still runs then is said: a server does not end with the command that started it.
        """
        started: list[ServerProcess] = []
        try:
            yield started
        except BaseException:
            try:
                for server in reversed([] if keeps else started):
                    if server.pid() is not None:
                        say(f"stopping {server.name}")
                        server.stop()
            finally:
                if left := [server.name for server in started if server.pid() is not None]:
                    say(f"started, and still running: {', '.join(left)}")
                    say(f"`emberline cluster down --dir {self.directory}` stops them, `up` goes on; `status` says more")
                elif started:
                    say(f"nothing that was started runs on; what it logged: {self.directory}/NAME/server.log")
            raise

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
        keys = self.directory / "grants.keys"
        if plan.tls and not keys.exists():
            keys.touch(mode=0o600)
            keys.write_text(os.urandom(KEY_BYTES).hex() + "\n")
        managers = [address for name, address in addresses.items() if name.startswith("manager-")]
        kv = plan.kv or f"kv://{addresses['kv-1']}"
        for server in new:
            role = role_of(server.name)
            directory = server.directory
            directory.mkdir(parents=True, exist_ok=True)
            names = [server.name, HOST, "localhost"]
            if plan.tls:
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
                tls=TlsConfig(directory=str(directory / "tls") if plan.tls else ""),
                ucx=plan.ucx if role == Role.STORAGE else "",
                storage=StorageSection(
                    reserve_bytes=plan.reserve_bytes,
                    grants=str(keys) if role == Role.STORAGE and plan.tls else "",
                ),
                manager=ManagerSection(
                    authority=str(self.directory / "ca") if role == Role.MANAGER and plan.tls else ""
                ),
            )
            temporary = directory / "config.toml.new"
            write_config(temporary, config)
            temporary.replace(directory / "config.toml")
        for person in ("client", "admin"):
            into = self.directory / person
            if not into.exists():
                issue(self.directory / "ca", [person], role=person, into=into, now_s=time.time())

    def _start(self, servers: list[ServerProcess], say: Say, started: list[ServerProcess]) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        # Role by role: each needs those before it. Within a role side by side.
        for role in (Role.KV, Role.MANAGER, Role.STORAGE, Role.META):
            group = [server for server in servers if role_of(server.name) == role]
            for server in group:
                if server.pid() is None:
                    say(f"starting {server.name}")
                    started.append(server)
                    server.start()
            for server in group:
                server.wait_ready(deadline_s, say=say)

    def _wait_heard(self, admin: Admin, nodes: list[str], say: Say) -> None:
        def look() -> tuple[bool, str]:
            left = sorted(set(nodes) - {node.node.name for node in admin.status().nodes if node.alive})
            words = f"the primary manager has not heard of {', '.join(left)}"
            return not left, words if left else "the primary manager has heard of all storage nodes"

        wait_until(look, say=say, timeout_s=START_TIMEOUT_S)

    def wait_serving(self, admin: Admin, say: Say, *, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until every chain has all its replicas serving."""

        def look() -> tuple[bool, str]:
            chains = admin.routing().chains
            serving = sum(all(target.state == TargetState.SERVING for target in chain.targets) for chain in chains)
            words = f"{serving} of {len(chains)} chains serve with all replicas"
            return bool(chains) and serving == len(chains), words

        try:
            wait_until(look, say=say, timeout_s=timeout_s)
        except Unavailable as error:
            raise Unavailable(f"{error}; `emberline cluster status` says what is wrong") from error

    def _leave_credentials(self) -> None:
        if not self.plan().tls:
            return
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
        servers = self.servers()
        with self._alone():
            for server in reversed(servers):
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
        """One storage node more, which chains then move to; returns its name. Raises Unavailable if it cannot be."""
        # Reached before there is a node that nobody would take.
        with self._alone(), self.reach() as admin:
            plan = self.plan()
            number = 1 + max(int(name.rpartition("-")[2]) for name in plan.nodes)
            name = f"storage-{number}"
            self._save(msgspec.structs.replace(plan, nodes=[*plan.nodes, name]))
            try:
                self._write_configs()
                with self._undone_unless_up(say, keeps=False) as started:
                    self._start([self.server(name)], say, started)
                    self._wait_heard(admin, [name], say)
            except BaseException:
                self._save(plan)
                raise
            # From here on it may be a member, whatever becomes of this call.
            say(f"{name} runs; should this fail: `emberline cluster add-node {name}`")
            admin.add_node(name)
        return name

    def remove_node(self, name: str, *, say: Say = lambda _: None) -> None:
        """Take a drained storage node out and stop it; its directory stays. Raises Conflict while it holds targets."""
        with self._alone(), self.reach() as admin:
            plan = self.plan()
            if name not in plan.nodes:
                raise InvalidPath(f"not a storage node: {name!r}; there are {', '.join(plan.nodes)}")
            server = self.server(name)
            if held := sum(target.node == name for target in admin.routing().targets):
                raise Conflict(f"{name} still holds {held} replicas: drain it first")
            if server.pid() is not None:
                say(f"stopping {name}")
                server.stop()

            def look() -> tuple[bool, str]:
                is_alive = any(status.alive for status in admin.status().nodes if status.node.name == name)
                return not is_alive, f"the manager takes {name} for alive until its lease is over" if is_alive else ""

            wait_until(look, say=say, timeout_s=START_TIMEOUT_S)
            with suppress(NotFound):  # An earlier attempt may have got so far.
                admin.remove_node(name)
            self._save(msgspec.structs.replace(plan, nodes=[node for node in plan.nodes if node != name]))


def role_of(name: str) -> Role:
    """Of a server of such a cluster, by its name."""
    return Role(name.rpartition("-")[0])


def _take_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _free_ports() -> Iterator[int]:
    """Ports that nobody listens on now, each another one."""
    held = []
    try:
        for port in random.sample(PORTS, len(PORTS)):
            listener = socket.socket()
            held.append(listener)  # Held until all are chosen, so that nobody else takes one.
            try:
                listener.bind((HOST, port))
            except OSError:
                continue
            yield port
    finally:
        for listener in held:
            listener.close()
