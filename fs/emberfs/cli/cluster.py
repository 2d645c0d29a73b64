"""`emberline cluster`: a whole cluster on this host, and what an operator asks of any cluster."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import NotFound, Unavailable
from ..urls import cluster_addresses
from .location import STORE_VARIABLE
from .output import json_option, note, note_if_slow, plural, print_columns, print_json, print_line, safe
from .placement import placement

if TYPE_CHECKING:
    from ..cluster.admin import Admin
    from ..cluster.local import LocalCluster
    from ..settings import Config, Value

NODES = 3
TARGETS_PER_DISK = 4
"""Of a cluster on this host, unless somebody says otherwise."""

_Command = TypeVar("_Command", bound=Callable[..., Any])

_directory = click.option(
    "--dir",
    "directory",
    envvar="EMBERLINE_CLUSTER",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the cluster on this host (or EMBERLINE_CLUSTER).",
)


@click.group(
    no_args_is_help=True,
    epilog="\b\nExamples:\n"
    "  emberline cluster up --nodes 3 --dir /tmp/ember   # a whole cluster on this host\n"
    "  export EMBERLINE_CLUSTER=/tmp/ember\n"
    "  emberline cluster status                          # what is wrong, and what will happen\n"
    "  emberline cluster add-node\n"
    "  emberline cluster drain storage-1 && emberline cluster remove-node storage-1\n"
    "  emberline cluster down",
)
def cluster() -> None:
    """A store of several servers: start one here, look after it.

    A cluster is named by --dir (one of this host) or by the URL of its managers, ember://host:port.
    """


# ---- on this host


@cluster.command(
    epilog="\b\nExamples:\n"
    "  emberline cluster up --nodes 3 --dir /tmp/ember\n"
    "  emberline cluster up --nodes 1 --replicas 1 --dir /tmp/small\n"
    "  emberline cluster up --dir /tmp/ember             # again: starts what does not run"
)
@_directory
@click.option("--nodes", type=click.IntRange(1, 64), help=f"Storage nodes.  [default: {NODES}]")
@click.option("--replicas", type=click.IntRange(1, 8), help="Copies of each chunk.  [default: 3, or as many as nodes]")
@click.option("--targets", type=click.IntRange(1, 64), help=f"Replicas a disk holds.  [default: {TARGETS_PER_DISK}]")
@click.option("--kv", envvar="EMBERLINE_KV", metavar="URL", help="postgresql://… for the metadata (or EMBERLINE_KV).")
@json_option
@click.pass_context
def up(
    context: click.Context,
    directory: Path | None,
    nodes: int | None,
    replicas: int | None,
    targets: int | None,
    kv: str | None,
    as_json: bool,
) -> None:
    """Start a cluster on this host: one process per role and per disk, TLS between them.

    All of it lies under --dir. The options hold when the cluster is made; later `up` starts what does not run. If the
    first `up` fails, what it has started is stopped again.
    """
    from ..cluster.local import Plan, differences

    local = _local(directory)
    if local.exists:
        is_typed = (
            context.get_parameter_source("kv") == ParameterSource.COMMANDLINE
        )  # The variable is for new clusters.
        asked_kv = kv if is_typed else None
        if found := differences(local.plan(), nodes=nodes, replicas=replicas, targets_per_disk=targets, kv=asked_kv):
            anew = "" if local.has_data else f". It holds no data yet: remove {local.directory} to begin anew"
            raise click.UsageError(f"there is a cluster in {local.directory}: {'; '.join(found)}{anew}")
    count = nodes or NODES
    plan = Plan(
        cluster=os.urandom(8).hex(),
        replicas=replicas or min(3, count),
        targets_per_disk=targets or TARGETS_PER_DISK,
        kv=kv or "",
        nodes=[f"storage-{number}" for number in range(1, count + 1)],
    )
    local.up(plan, say=note)
    if as_json:
        print_json({"url": local.url, "directory": str(local.directory)})
        return
    print_line(f"the cluster serves at {local.url}")
    for line in (
        f"export {STORE_VARIABLE}={local.url}",
        f"export EMBERLINE_CLUSTER={local.directory}",
        "emberline fs ls /",
    ):
        note(f"  {line}")


@cluster.command(epilog="\b\nExamples:\n  emberline cluster down --dir /tmp/ember")
@_directory
@json_option
def down(directory: Path | None, as_json: bool) -> None:
    """Stop the servers that were started from --dir, and nothing else. The data stays; `up` goes on with it."""
    local = _local(directory)
    stopped = local.down(say=note)
    if as_json:
        print_json({"stopped": stopped})
    else:
        note(f"stopped {plural(stopped, 'server')}")


@cluster.command(
    epilog="\b\nExamples:\n"
    "  emberline cluster logs manager-1 --dir /tmp/ember\n"
    "  emberline cluster logs storage-2 -f | jq -r .message"
)
@click.argument("name")
@_directory
@click.option("-f", "--follow", is_flag=True, help="Go on as more is written.")
@json_option
def logs(name: str, directory: Path | None, follow: bool, as_json: bool) -> None:
    """Print what a server logged: time, level and message; with --json its own lines."""
    path = _local(directory).server(name).log
    if not path.exists():
        raise NotFound("it has not logged anything", str(path))
    with open(path, encoding="utf-8", errors="replace") as lines:
        while True:
            line = lines.readline()
            if line:
                click.echo(line.rstrip("\n") if as_json else _readable(line))
            elif follow:
                sys.stdout.flush()
                time.sleep(0.2)
            else:
                return


def _readable(line: str) -> str:
    try:
        record = json.loads(line)
        text = f"{record['time']} {record['level']:7} {record['message']}"
    except (ValueError, KeyError, TypeError):
        return safe(line.rstrip("\n"))
    return safe(text) + (f"\n{record['traceback']}" if "traceback" in record else "")


# ---- any cluster


def _cluster_argument(function: _Command) -> _Command:
    return click.option("--url", metavar="URL", help="ember://host:port of its managers, if it is not of this host.")(
        _directory(function)
    )


@cluster.command(
    epilog="\b\nExamples:\n"
    "  emberline cluster status --dir /tmp/ember\n"
    "  emberline cluster status --url ember://db1:7301,db2:7301 --json | jq '.chains[] | select(.serving < .replicas)'"
)
@_cluster_argument
@json_option
def status(directory: Path | None, url: str | None, as_json: bool) -> None:
    """Say how the cluster is: servers, chains, what is wrong and what will happen. Exit code 1 if anything is wrong."""
    facts = _facts(directory, url)
    if as_json:
        print_json(facts)
    else:
        _print_status(facts)
    if facts["problems"]:
        sys.exit(1)


def _facts(directory: Path | None, url: str | None) -> dict[str, Any]:
    from ..cluster.outage import summarise_outage
    from ..cluster.status import summarise

    try:
        with _admin(directory, url) as admin:
            return summarise(admin.status())
    except Unavailable as error:
        local = _local(directory) if directory is not None and url is None else None
        if local is None or not any(server.pid() for server in local.servers()):
            raise
        return summarise_outage(local, str(error))


def _print_status(facts: dict[str, Any]) -> None:
    rows = [
        (node["name"], node["role"], node["address"], node["state"], str(node["targets"] or "-"))
        for node in facts["servers"]
    ]
    print_columns([("server", "role", "address", "state", "replicas"), *rows], right=(4,))
    click.echo()
    if facts["primary"]:
        print_line(
            f"{plural(facts['chains_total'], 'chain')}: {facts['chains_serving']} with all replicas; "
            f"{plural(facts['sessions'], 'client')}; primary manager {facts['primary']}"
        )
    for problem in facts["problems"]:
        print_line(f"- {problem}")
    for hint in facts["hints"]:
        print_line(f"hint: {hint}")
    if not facts["problems"]:
        print_line("all is well")


@cluster.command(epilog="\b\nExamples:\n  emberline cluster setup --replicas 3 --targets 6 --url ember://db1:7301")
@_cluster_argument
@click.option("--replicas", type=click.IntRange(1, 8), default=3, show_default=True, help="Copies of each chunk.")
@click.option("--targets", type=click.IntRange(1, 64), default=6, show_default=True, help="Replicas a disk holds.")
@json_option
def setup(directory: Path | None, url: str | None, replicas: int, targets: int, as_json: bool) -> None:
    """Make the chains over the storage nodes that are there, once. `up` does it by itself."""
    with _admin(directory, url) as admin:
        admin.setup_chains(replicas=replicas, targets_per_disk=targets)
        count = len(admin.routing().chains)
    if as_json:
        print_json({"chains": count})
    else:
        note(f"made {plural(count, 'chain')}; `emberline cluster status` shows when they serve")


@cluster.command(
    epilog="\b\nExamples:\n  emberline cluster drain storage-2 --dir /tmp/ember\n"
    "  emberline cluster drain storage-2 --no-wait --url ember://db1:7301"
)
@click.argument("name")
@_cluster_argument
@click.option("--wait/--no-wait", default=True, show_default=True, help="Return once it holds nothing.")
@json_option
def drain(name: str, directory: Path | None, url: str | None, wait: bool, as_json: bool) -> None:
    """Move everything off a storage node while the cluster serves. `remove-node` then takes it out."""
    from ..cluster.waiting import wait_until

    with _admin(directory, url) as admin:
        admin.drain_node(name)

        def look() -> tuple[bool, str]:
            left = sum(target.node == name for target in admin.routing().targets)
            return not left or not wait, f"{plural(left, 'replica')} left on {name}"

        wait_until(look, say=note)
        left = sum(target.node == name for target in admin.routing().targets)
    if as_json:
        print_json({"node": name, "left": left})
    elif not left:
        note(f"`emberline cluster remove-node {name}` takes it out")


@cluster.command(
    "add-node",
    epilog="\b\nExamples:\n"
    "  emberline cluster add-node --dir /tmp/ember                     # starts one more on this host\n"
    "  emberline cluster add-node storage-4 --url ember://db1:7301     # one that was started on its machine",
)
@click.argument("name", required=False)
@_cluster_argument
@json_option
def add_node(name: str | None, directory: Path | None, url: str | None, as_json: bool) -> None:
    """Let a storage node take its share of the chains; they move there while the cluster serves.

    Without NAME one more is started on this host. With it, it is one that runs and that `status` shows, or one that was
    drained and is to be filled again.
    """
    if name is not None:
        with _admin(directory, url) as admin:
            admin.add_node(name)
    elif url is not None or directory is None:
        raise click.UsageError("say which node: NAME, one that has been started; or --dir, to start one on this host")
    else:
        name = _local(directory).add_node(say=note)
    if as_json:
        print_json({"added": name})
    else:
        note(f"added {name}; `emberline cluster status` shows what moves")


@cluster.command(
    "remove-node",
    epilog="\b\nExamples:\n"
    "  emberline cluster remove-node storage-1 --dir /tmp/ember            # stops it, too\n"
    "  emberline cluster remove-node storage-1 --url ember://db1:7301      # after it was stopped on its machine",
)
@click.argument("name")
@_cluster_argument
@json_option
def remove_node(name: str, directory: Path | None, url: str | None, as_json: bool) -> None:
    """Take a server that holds nothing out of the cluster: a drained storage node, or one that is gone for good.

    One of this host (--dir) is stopped before. Its directory stays.
    """
    if url is None and directory is not None:
        _local(directory).remove_node(name, say=note)
    else:
        with _admin(directory, url) as admin:
            admin.remove_node(name)
    if as_json:
        print_json({"removed": name})
    else:
        note(f"removed {name}")


@cluster.command(
    "accept-loss", epilog="\b\nExamples:\n  emberline cluster accept-loss 7 --target 1f0c33aa --dir /tmp/ember"
)
@click.argument("chain", type=int)
@click.option("--target", required=True, metavar="ID", help="The replica to go on with; the first digits will do.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_cluster_argument
def accept_loss(chain: int, target: str, yes: bool, directory: Path | None, url: str | None) -> None:
    """Go on with what one replica has of a lost CHAIN. What only the other replicas had is gone for good."""
    with _admin(directory, url) as admin:
        found = [each for each in admin.routing().chains if each.id == chain]
        if not found:
            raise NotFound("no such chain", str(chain))
        matches = [each.target for each in found[0].targets if each.target.hex().startswith(target.lower())]
        if len(matches) != 1:
            raise click.UsageError(f"{len(matches)} replicas of chain {chain} begin with {target!r}")
        if not yes:
            click.confirm(f"Give up what only the other replicas of chain {chain} have?", abort=True)
        admin.accept_loss(chain, matches[0])
    note(f"chain {chain} goes on with {matches[0].hex()[:8]}")


cluster.add_command(placement)


# ---- its configuration


@cluster.group(
    no_args_is_help=True,
    epilog="\b\nExamples:\n"
    "  emberline cluster config get\n"
    "  emberline cluster config set resync_bytes_per_s=500MiB trash_s=3d\n"
    "  emberline cluster config unset trash_s",
)
def config() -> None:
    """Settings that hold on all nodes. A change is in force within a heartbeat, and nothing is restarted."""


@config.command("get", epilog="\b\nExample:\n  emberline cluster config get resync_bytes_per_s")
@click.argument("name", required=False)
@_cluster_argument
@json_option
def config_get(name: str | None, directory: Path | None, url: str | None, as_json: bool) -> None:
    """Print all settings, or the value of NAME alone."""
    from ..settings import SETTINGS, known

    with _admin(directory, url) as admin:
        found = admin.config()
    if name is not None and name not in found.values:
        known(name)
        raise NotFound("the managers are of an older release and do not know this setting", name)
    if name is not None:
        value = found.values[name]
        print_json({"version": found.version, "name": name, "value": value}) if as_json else click.echo(value)
    elif as_json:
        print_json({"version": found.version, "values": found.values, "chosen": found.chosen})
    else:
        rows = [
            (each, str(value), "" if each in found.chosen else "default", _meaning(SETTINGS.get(each)))
            for each, value in found.values.items()
        ]
        print_columns([(f"version {found.version}", "value", "", "meaning"), *rows], right=(1,))


def _meaning(setting: Field[Any] | None) -> str:
    return "of a newer release than this command" if setting is None else setting.metadata["means"]


@config.command("set", epilog="\b\nExample:\n  emberline cluster config set dead_after_s=6 heartbeat_s=1")
@click.argument("changes", nargs=-1, required=True, metavar="NAME=VALUE...")
@click.option("--version", type=int, help="Only if the configuration is still at this version.")
@_cluster_argument
@json_option
def config_set(
    changes: tuple[str, ...], version: int | None, directory: Path | None, url: str | None, as_json: bool
) -> None:
    """Change settings, all of them at once or none.

    Bytes may be written as 64KiB, 100MiB, 2GiB; seconds as 30s, 5min, 12h, 7d.
    """
    values = dict(map(_read_change, changes))
    with _admin(directory, url) as admin:
        after = admin.set_config(admin.config().version if version is None else version, values)
    _say_config(after, list(values), as_json)


@config.command("unset", epilog="\b\nExample:\n  emberline cluster config unset resync_bytes_per_s")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_cluster_argument
@json_option
def config_unset(names: tuple[str, ...], directory: Path | None, url: str | None, as_json: bool) -> None:
    """Give settings their defaults again."""
    with _admin(directory, url) as admin:
        after = admin.set_config(admin.config().version, {}, unset=names)
    _say_config(after, names, as_json)


def _say_config(after: Config, names: Sequence[str], as_json: bool) -> None:
    if as_json:
        print_json({"version": after.version, "values": {name: after.values[name] for name in names}})
        return
    for name in names:
        note(f"{name} is {after.values[name]}")
    if after.waits_s > after.values["dead_after_s"]:
        note(f"nodes are waited for {after.waits_s:g} s until the longer leases of before are over")


_UNITS = {
    "_bytes_per_s": {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30},
    "_s": {"s": 1, "min": 60, "h": 3600, "d": 86400},
}
"""End of a setting's name -> units that its value may have."""


def _read_change(text: str) -> tuple[str, Value]:
    name, equals, value = text.partition("=")
    units = next((units for end, units in _UNITS.items() if name.endswith(end)), {})
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", value.strip())
    if not equals or match is None or match[2] not in ("", *units):
        example = f"5{next(iter(units))}" if units else "5"
        raise click.UsageError(f"not a change: {text!r}; it looks like {name or 'moves_max'}={example}")
    try:
        number: Value = float(match[1]) if "." in match[1] else int(match[1])
    except ValueError as error:
        raise click.UsageError(f"not a number: {match[1]!r}") from error
    return name, number * units.get(match[2], 1)


# ---- letting machines in


@cluster.command(
    epilog="\b\nExamples:\n  emberline cluster token --role storage --dir /srv/ember\n"
    "  emberline cluster token --role client --hours 1 --authority /etc/emberline/ca\n"
    "  emberline cluster token --role writer --tenant acme --dir /srv/ember"
)
@_directory
@click.option("--authority", type=click.Path(file_okay=False, path_type=Path), help="Where ca.pem and ca.key are.")
@click.option(
    "--role",
    type=click.Choice(["client", "reader", "writer", "admin", "kv", "manager", "meta", "storage"]),
    default="client",
)
@click.option("--tenant", default="", help="Of a reader or writer: whose grants it may use. Without: any it is given.")
@click.option("--hours", type=click.FloatRange(min=0), default=24.0, show_default=True, help="How long it is good for.")
def token(directory: Path | None, authority: Path | None, role: str, tenant: str, hours: float) -> None:
    """Print a secret with which another machine may `join`: whoever has it gets a certificate of that role.

    A client reads and writes files; a reader only reads what grants of a KV cache name, and a writer also writes what
    others name; an admin also adds, drains and removes nodes; the others are servers.
    """
    from ..transport.certificates import make_token

    if authority is None:
        local = _local(directory)
        local.plan()  # Raises NotFound where no cluster is.
        authority = local.directory / "ca"
    if tenant and role not in ("reader", "writer"):
        raise click.UsageError("--tenant is for readers and writers")
    role += f":{tenant}" if tenant else ""
    click.echo(make_token(authority, role=role, valid_s=hours * 3600, now_s=time.time()))


@cluster.command(
    epilog="\b\nExamples:\n  emberline cluster join TOKEN 10.0.0.2:7301\n"
    "  emberline cluster join TOKEN 10.0.0.2:7301 --into /etc/emberline/tls --name 10.0.0.9 --name storage-1"
)
@click.argument("token")
@click.argument("manager")
@click.option(
    "--into", type=click.Path(file_okay=False, path_type=Path), help="Directory for ca.pem, cert.pem, key.pem."
)
@click.option(
    "--name",
    "names",
    multiple=True,
    help="Address of this machine, or name of a server on it. As often as needed.",
)
@click.option("--force", is_flag=True, help="Replace credentials of another cluster or role.")
def join(token: str, manager: str, into: Path | None, names: tuple[str, ...], force: bool) -> None:
    """Get this machine a certificate from the MANAGER (host:port). Without --into it is for this user's clients.

    A server needs one with the address that others reach it at, and with its own name. One that is there already is
    renewed, if it is of the same cluster and role.
    """
    from ..cluster.credentials import directory_for
    from ..cluster.joining import join_cluster
    from ..messages.base import SERVERS
    from ..transport.certificates import read_token

    role = read_token(token).role
    if into is None and role in SERVERS:
        raise click.UsageError(f"this token is for a {role} server: give its directory by --into, as in its [tls]")
    where = into or directory_for(manager)
    join_cluster(token, manager, into=where, names=list(names) or [socket.gethostname()], replaces=force)
    note(f"the certificate is in {where}")


# ---- which one


def _local(directory: Path | None) -> LocalCluster:
    from ..cluster.local import LocalCluster

    if directory is None:
        raise click.UsageError("say which cluster: --dir DIR, or set EMBERLINE_CLUSTER")
    return LocalCluster(directory)


@contextmanager
def _admin(directory: Path | None, url: str | None) -> Iterator[Admin]:
    from ..cluster.admin import Admin

    if url is None and directory is None:
        given = os.environ.get(STORE_VARIABLE, "")
        if not cluster_addresses(given):
            raise click.UsageError("say which cluster: --dir DIR, --url ember://host:port, or set EMBERLINE_CLUSTER")
        url = given
    if url is not None and not cluster_addresses(url):
        raise click.UsageError(f"not the URL of a cluster: {url!r}; it looks like ember://host:port")
    with ExitStack() as stack:
        with note_if_slow("no manager has answered yet; still trying"):
            if url is None:
                admin = stack.enter_context(_local(directory).reach())
            else:
                admin = stack.enter_context(Admin(url))
                admin.routing()
        yield admin
