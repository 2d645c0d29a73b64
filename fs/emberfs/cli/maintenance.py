"""`info`, `fsck`, `scrub` and `gc`: the upkeep of a store."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
import msgspec

from ..maintenance import NodeScrub, ScrubSummary
from ..meta.check import Finding
from ..urls import cluster_addresses
from .output import (
    human_bytes,
    human_time,
    json_option,
    note,
    plural,
    print_columns,
    print_fields,
    print_json,
    print_line,
    progress_bar,
)  # fmt: skip
from .store import open_cluster, open_store, store_argument, url_of


@click.command(
    epilog="\b\nExamples:\n  emberline fs info ember:///srv/store\n  emberline fs info --json | jq .settings"
)
@store_argument
@json_option
def info(store: str | None, as_json: bool) -> None:
    """Describe a store: ids, format versions, sizes, settings."""
    with open_store(store) as client:
        is_cluster = bool(cluster_addresses(client.url))
        facts: dict[str, Any] = {"store": client.url} if is_cluster else client.maintenance.info()
        usage = client.usage()
        space = client.space()
    counts = {name: getattr(usage, name) for name in usage.__struct_fields__}
    if as_json:
        print_json({**facts, "usage": counts, "space": space})
        return
    replicas = space.pop("replicas", 1)
    held = [
        ("files", f"{usage.files} in {plural(usage.directories, 'directory')}, {human_bytes(usage.length_bytes)}"),
        ("trash", plural(usage.trash_entries, "entry")),
        ("garbage", f"{plural(usage.gc_pending, 'file')} waiting to be freed"),
        ("space", ", ".join(f"{human_bytes(count)} {_words(name)}" for name, count in space.items())),
    ]
    if is_cluster:
        print_fields([("cluster", facts["store"]), ("replicas", f"{replicas} of each chunk"), *held])
        note("`emberline cluster status` shows its servers")
        return
    print_fields([
        ("directory", facts["directory"]),
        ("store", facts["store"]),
        ("format", str(facts["format"])),
        ("made", human_time(facts["created_ns"] / 1e9)),
        *held,
        ("reserve", f"new data is refused below {human_bytes(facts['settings']['reserve_bytes'])} free"),
        ("gc delay", f"{facts['settings']['gc_delay_s']:.0f} s for readers of a removed file"),
        ("trash time", f"{facts['settings']['trash_s'] / 86400:.1f} days"),
    ])  # fmt: skip
    for target in facts["targets"]:
        blocks = ", ".join(f"{count} of {human_bytes(size)}" for size, count in target["blocks"].items()) or "none"
        print_fields(
            [(f"target {target['target']}", f"format {target['format']}, id {target['id']}, blocks: {blocks}")]
        )


def _words(name: str) -> str:
    return name.removesuffix("_bytes").replace("_", " ")


@click.command(
    epilog="\b\nExamples:\n  emberline fs fsck ember:///srv/store\n  emberline fs fsck --repair\n"
    "  emberline fs fsck ember://db1:7301,db2:7301"
)
@store_argument
@click.option("--repair", is_flag=True, help="Mend what can be mended without losing a byte.")
@json_option
def fsck(store: str | None, repair: bool, as_json: bool) -> None:
    """Check names against files, files against chunks, chunks against space. Exit code 1 if something is wrong.

    A cluster is checked while it is in use: what is found is looked at again before it is told. It takes an admin's
    credentials; nothing is repaired, and space is not looked at.
    """
    url = url_of(store)
    if cluster_addresses(url):
        if repair:
            raise click.UsageError(f"{url} is a cluster: `fsck` looks at one that is in use, and changes nothing")
        with open_cluster(url) as maintenance:
            report = maintenance.fsck(say=note)
    else:
        with open_store(url) as client:
            report = client.maintenance.fsck(repair=repair)
    _print_findings(report.findings, as_json=as_json)
    repaired = sum(finding.repaired for finding in report.findings)
    left = len(report.findings) - repaired
    if as_json:
        print_json({"clean": report.clean, "findings": len(report.findings), "repaired": repaired})
    elif report.findings:
        hint = "" if repair or not left or cluster_addresses(url) else "; --repair mends what can be mended"
        note(f"{plural(len(report.findings), 'finding')}, {repaired} repaired{hint}")
    else:
        print_line("clean")
    if not report.clean:
        sys.exit(1)


@click.command(
    epilog="\b\nExamples:\n  emberline fs scrub ember:///srv/store\n  emberline fs scrub --rate 50 --json\n"
    "  emberline fs scrub ember://db1:7301,db2:7301"
)
@store_argument
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Read at most this many MiB/s (per server).")
@json_option
def scrub(store: str | None, rate: float | None, as_json: bool) -> None:
    """Read every stored byte from the disk and check it. Exit code 1 if something is, and stays, damaged.

    On a cluster every storage server reads its own disk, and mends what is damaged from other replicas. It takes an
    admin's credentials.
    """
    limit = None if rate is None else max(int(rate * (1 << 20)), 1)
    url = url_of(store)
    summary = _scrub_cluster(url, limit) if cluster_addresses(url) else _scrub_store(url, limit)
    _print_findings(summary.findings, as_json=as_json)
    for node in summary.nodes:
        if as_json:
            print_json(msgspec.structs.asdict(node))
        for skipped in node.skipped:
            note(f"{node.node}: not looked at: {skipped}")
    if as_json:
        print_json({
            "clean": summary.clean, "chunks": summary.chunks, "read_bytes": summary.read_bytes,
            "findings": len(summary.findings),
        })  # fmt: skip
    else:
        print_line(f"{_read(summary)}: {_found(summary.findings)}")
    if not summary.clean:
        sys.exit(1)


def _scrub_store(url: str, limit: int | None) -> ScrubSummary:
    with open_store(url) as client, _bytes_read(client.space()["used_bytes"]) as show:
        return client.maintenance.scrub(bytes_per_s_max=limit, progress=show)


def _scrub_cluster(url: str, limit: int | None) -> ScrubSummary:
    def tell(node: NodeScrub) -> None:
        damaged = f"{node.damaged} damaged, {node.repaired} of them mended" if node.damaged else "nothing damaged"
        note(f"{node.node}: {_read(node)}, {damaged}")

    with open_cluster(url) as maintenance, _bytes_read(maintenance.disk_used_bytes()) as show:
        return maintenance.scrub(bytes_per_s_max=limit, progress=show, on_node=tell)


@contextmanager
def _bytes_read(total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that is told of chunks and bytes so far."""
    with progress_bar("scrubbing", total_bytes) as advance:
        read_before = 0

        def show(_: int, read_bytes: int) -> None:
            nonlocal read_before
            advance(read_bytes - read_before)
            read_before = read_bytes

        yield show


def _read(what: ScrubSummary | NodeScrub) -> str:
    return f"{plural(what.chunks, 'chunk')}, {human_bytes(what.read_bytes)} read"


def _found(findings: Sequence[Finding]) -> str:
    if not findings:
        return "all good"
    repaired = sum(finding.repaired for finding in findings)
    return plural(len(findings), "finding") + (f", {repaired} repaired" if repaired else "")


def _print_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    if as_json:
        for finding in findings:
            print_json({name: getattr(finding, name) for name in finding.__struct_fields__})
        return
    rows = [(item.kind, "repaired" if item.repaired else "wrong", item.path, item.detail) for item in findings]
    print_columns(rows)


@click.command(epilog="\b\nExamples:\n  emberline fs gc ember:///srv/store\n  emberline fs gc --now")
@store_argument
@click.option("--now", "force", is_flag=True, help="Do not wait for readers that may still have a removed file open.")
@json_option
def gc(store: str | None, force: bool, as_json: bool) -> None:
    """Free the space of files removed for good. A store does this by itself while it is open."""
    with open_store(store) as client:
        collected = client.collect_garbage(force=force)
        # The servers of a cluster look after their disks themselves.
        trimmed_bytes = 0 if cluster_addresses(client.url) else client.maintenance.trim()
    if as_json:
        counts = {name: getattr(collected, name) for name in collected.__struct_fields__}
        print_json({**counts, "trimmed_bytes": trimmed_bytes})
        return
    what = f"freed {plural(collected.files, 'file')}, {plural(collected.chunks, 'chunk')}"
    print_line(f"{what}, gave {human_bytes(trimmed_bytes)} back to the disk, {collected.pending} waiting")
    if collected.pending and not force:
        note("those that wait may still have readers; `emberline fs gc --now` frees them at once")
