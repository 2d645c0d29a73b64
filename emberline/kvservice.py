"""`emberline kv serve` and what an operator asks of a service: numbers, quotas, and taking away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import human_bytes, json_option, note, print_columns, print_json, print_line

if TYPE_CHECKING:
    from emberkv.operator import Operator

address_option = click.option(
    "--address", envvar="EMBERLINE_KV", required=True, metavar="HOST:PORT",
    help="Of the service, or unix:/path, or several with commas. Or set EMBERLINE_KV.",
)  # fmt: skip
token_option = click.option(
    "--token", envvar="EMBERLINE_KV_TOKEN", default="", help="Of an operator. Or set EMBERLINE_KV_TOKEN."
)
tls_option = click.option("--tls", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                           help="With ca.pem, cert.pem and key.pem.")  # fmt: skip


def size_bytes_of(text: str) -> int:
    from emberfs.cli.find import size_bytes

    return int(size_bytes(text))


@click.command()
@click.option(
    "--store",
    envvar="EMBERLINE_URL",
    required=True,
    metavar="URL",
    help="The store that holds the pages. Or set EMBERLINE_URL.",
)
@click.option("--root", default="/kv", show_default=True, metavar="PATH", help="A directory of the store for them.")
@click.option(
    "--listen", default="127.0.0.1:7400", show_default=True, metavar="HOST:PORT", help="Or unix:/path; port 0: any."
)
@click.option(
    "--capacity",
    default="10GiB",
    show_default=True,
    metavar="SIZE",
    help="Of each namespace, on disk; replicas apart. Less while the store is nearly full.",
)
@click.option("--ttl-hours", type=click.FloatRange(min=0, min_open=True), default=72.0, show_default=True, metavar="N",
              help="A page that nobody asked for in so long goes.")  # fmt: skip
@click.option("--namespaces", type=click.IntRange(min=1), default=64, show_default=True, metavar="N",
              help="So many at most, each of that capacity.")  # fmt: skip
@click.option("--tenants", type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE",
              help="Whose tokens the service takes. Without it whoever reaches the port may do all.")  # fmt: skip
@click.option("--grants", type=click.Path(dir_okay=False, exists=True, path_type=Path), metavar="FILE",
              help="Keys that grants for readers are made with, the same as the storage servers'.")  # fmt: skip
@tls_option
@click.option("--metrics", default="", metavar="HOST:PORT", help="Serve a page for Prometheus there.")
@click.option("--events", default="", metavar="ENDPOINT", help="Publish KV events by ZeroMQ there: tcp://*:5557.")
@click.option("--events-replay", default="", metavar="ENDPOINT", help="Tell lost ones again there: tcp://*:5558.")
@click.option("--events-tokens", is_flag=True, help="With the tokens of pages, which are the prompts.")
def serve(
    store: str, root: str, listen: str, capacity: str, ttl_hours: float, namespaces: int, tenants: Path | None,
    grants: Path | None, tls: Path | None, metrics: str, events: str, events_replay: str, events_tokens: bool,
) -> None:  # fmt: skip
    """Serve KV pages that lie in a store, until SIGTERM or Ctrl-C.

    It says where they are, takes leases and makes room; the bytes go between clients and the storage servers. A second
    one on the same root waits until the first is silent for two seconds, and takes over. The first line of its output
    is JSON with its address.

    The file of tenants holds digests, not tokens: {"operators": [SHA256, ...], "tenants": {"acme": [SHA256, ...]}},
    each of them of: printf %s TOKEN | sha256sum.

    \b
    Examples:
      emberline kv serve --store ember:///srv/store --capacity 2TiB --metrics 127.0.0.1:9400
      emberline kv serve --store ember://10.0.0.1:7300 --listen 0.0.0.0:7400 --tls /etc/kv --tenants tenants.json
    """
    if events_replay and not events:
        raise click.UsageError("--events-replay tells again what --events told: give both")
    from emberkv.server import ServerConfig, run_server
    from emberkv.space import SpaceConfig

    space = SpaceConfig(capacity_bytes=size_bytes_of(capacity), ttl_s=3600 * ttl_hours)
    run_server(
        ServerConfig(
            store=store,
            root=root,
            listen=listen,
            space=space,
            namespaces_max=namespaces,
            tenants=tenants,
            grants=grants,
            tls=tls,
            metrics=metrics,
            events=events,
            events_replay=events_replay,
            events_tokens=events_tokens,
        )
    )


def operator_of(address: str, token: str, tls: Path | None) -> Operator:
    from emberfs.cluster.store import tls_files
    from emberfs.transport import TcpConfig
    from emberkv.operator import Operator

    return Operator(address, token=token, tcp=TcpConfig(tls=tls_files(tls)))


@click.command()
@address_option
@token_option
@tls_option
@json_option
def stat(address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Tell what a service holds and what it did: hits, reasons of misses, evictions, by namespace.

    \b
    Examples:
      emberline kv stat --address 127.0.0.1:7400
      EMBERLINE_KV=127.0.0.1:7400 emberline kv stat --json
    """
    with operator_of(address, token, tls) as operator:
        numbers = operator.stat()
    if as_json:
        print_json(numbers)
        return
    rows: list[list[str]] = [["namespace", "pages", "live", "on disk", "of", "asked", "hit", "evicted"]]
    for name, each in numbers["namespaces"].items():
        counts = each["counts"]
        rate = counts["matched_pages"] / counts["asked_pages"] if counts["asked_pages"] else 0.0
        sizes = [human_bytes(each[field]) for field in ("live_bytes", "disk_bytes", "capacity_bytes")]
        rows.append([name, f"{each['pages']:,}", *sizes, f"{counts['asked_pages']:,}", f"{rate:.1%}",
                     f"{counts['evicted_pages'] + counts['expired_pages']:,}"])  # fmt: skip
    print_columns(rows, right=range(1, 8))
    for name, each in numbers["namespaces"].items():
        if each["limit_bytes"] < each["capacity_bytes"]:
            sizes = [human_bytes(each[field]) for field in ("limit_bytes", "capacity_bytes")]
            print_line(f"{name}: the store fills up, and has room for {sizes[0]} of {sizes[1]}")
        stops = ", ".join(f"{reason} {count:,}" for reason, count in sorted(each["counts"]["stops"].items()))
        print_line(f"{name}: matches ended by {stops or 'nothing yet'}")
        for tenant, about in each["tenants"].items():
            clients = ", ".join(f"{policy} {count:,}" for policy, count in sorted(about["put_policies"].items()))
            if clients:
                print_line(f"{name}: clients of {tenant} put {clients}")


@click.command()
@click.argument("namespace")
@address_option
@token_option
@tls_option
@json_option
def gc(namespace: str, address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Let NAMESPACE give back now what is dead, and tell what was done for room since the service started.

    \b
    Example:
      emberline kv gc deepseek-v3-0123456789abcdef --address 127.0.0.1:7400
    """
    with operator_of(address, token, tls) as operator:
        counts = operator.collect(namespace)
    _told(counts, as_json)


@click.command()
@click.argument("namespace")
@click.argument("tenant")
@click.argument("limit")
@address_option
@token_option
@tls_option
def quota(namespace: str, tenant: str, limit: str, address: str, token: str, tls: Path | None) -> None:
    """Let TENANT hold at most LIMIT in NAMESPACE; 0: as much as there is room for. What is over it is evicted.

    \b
    Example:
      emberline kv quota deepseek-v3-0123456789abcdef acme 500GiB --address 127.0.0.1:7400
    """
    limit_bytes = size_bytes_of(limit)
    with operator_of(address, token, tls) as operator:
        operator.set_quota(namespace, tenant, limit_bytes)
    note(f"{tenant} may hold {limit if limit_bytes else 'as much as there is room for'} in {namespace}")


@click.command()
@click.argument("namespace")
@click.argument("time")
@click.option("--tenant", default="", metavar="NAME", help="Only this one's.")
@address_option
@token_option
@tls_option
def ttl(namespace: str, time: str, tenant: str, address: str, token: str, tls: Path | None) -> None:
    """Let pages of NAMESPACE go that nobody asked for in TIME, as in 12h or 7d; 0: as the service is set.

    A page counts as asked for when one after it was. That of a tenant goes before that of the namespace.

    \b
    Examples:
      emberline kv ttl deepseek-v3-0123456789abcdef 72h --address 127.0.0.1:7400
      emberline kv ttl deepseek-v3-0123456789abcdef 30d --tenant acme --address 127.0.0.1:7400
    """
    from emberfs.cli.find import age_s

    ttl_s = 0.0 if time == "0" else age_s(time)
    with operator_of(address, token, tls) as operator:
        operator.set_ttl(namespace, ttl_s, tenant=tenant)
    whose = tenant or "tenants without a time of their own"
    note(f"pages of {whose} stay {f'for {time}' if ttl_s else 'as long as before it was set'} in {namespace}")


@click.command()
@click.argument("tenant")
@click.option("--namespace", default="", metavar="NAME", help="Only in this one.")
@address_option
@token_option
@tls_option
@json_option
def erase(tenant: str, namespace: str, address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Take out every page of TENANT, and report what it had. The tombstones are durable when this ends.

    Nothing is taken out if a namespace is not open at that server: where several servers have one each, ask each for
    its own with --namespace.

    \b
    Example:
      emberline kv erase acme --address 127.0.0.1:7400 --json
    """
    with operator_of(address, token, tls) as operator:
        report = operator.erase(tenant, namespace=namespace)
    _told(report, as_json)


@click.command()
@click.argument("namespace")
@address_option
@token_option
@tls_option
@json_option
def drop(namespace: str, address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Take out every page of NAMESPACE: a model or a revision that nobody serves any more.

    \b
    Example:
      emberline kv drop deepseek-v3-0123456789abcdef --address 127.0.0.1:7400
    """
    with operator_of(address, token, tls) as operator:
        report = operator.drop(namespace)
    _told(report, as_json)


def _told(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    for name, value in report.items():
        told = (
            ", ".join(f"{count:,} {what}" for what, count in value.items()) if isinstance(value, dict) else f"{value:,}"
        )
        print_line(f"{name}: {told}")
    if not report:
        print_line("there was nothing")
