"""`cp`, `sync`, `put`, `get`: one engine, four ways to say what goes where."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click

from .entry import find_entry
from .filecopy import has_directories, put_stream
from .location import Location, expand, locate, takes_paths
from .output import human_bytes, json_option, note, plural, print_json, print_line, progress_bar
from .transfer import Outcome, Plan, Transfer, TransferConfig, plan_copy

_RULES = """\b
What goes where:
  FILE TARGET      TARGET is the copy; if it is a directory or ends with /, FILE goes into it
  -r DIR TARGET    TARGET becomes a copy of DIR; if it ends with /, DIR goes into it
  A B C TARGET     everything goes into TARGET
What is there never changes what -r does, so a second run goes on where the first one stopped.
Directories that are missing on the way to TARGET are made.

\b
Symbolic links of the source:
  to a file        the copy is a file with that content
  to a directory, to nothing, in a circle
                   left out, and named at the end"""


def _transfer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        click.option("-j", "--jobs", type=click.IntRange(1, 256), default=16, show_default=True, help="Files at once."),
        click.option("--checksum", is_flag=True, help="Compare contents, not size and time; read every copy back."),
        click.option("-n", "--dry-run", is_flag=True, help="Print what would be done."),
        json_option,
    )
    for option in reversed(options):
        function = option(function)
    return function


_recursive = click.option("-r", "--recursive", is_flag=True, help="Copy directories.")
_force = click.option("-f", "--force", is_flag=True, help="Copy what looks complete too.")


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs cp -r s3://bucket/books ember:///srv/store/!/books\n"
    "  emberline fs cp 'file:///data/*.parquet' ember://corpus/\n"
    "  emberline fs cp -r -j 16 --checksum file:///data/books ember://books"
)
@click.argument("source", nargs=-1, required=True)
@click.argument("target")
@_recursive
@_force
@_transfer_options
def cp(source: Sequence[str], target: str, recursive: bool, **options: Any) -> None:
    """Copy files between any two URLs. Run again, it skips what is complete."""
    _copy_all(expand(source), locate(target, creates=not options["dry_run"]), recursive=recursive, **options)


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs put report.pdf ember:///srv/store/!/\n"
    "  emberline fs put -r ./books books\n"
    "  pg_dump shop | emberline fs put - backups/shop.sql"
)
@click.argument("local", nargs=-1, required=True)
@click.argument("target")
@_recursive
@_force
@_transfer_options
def put(local: Sequence[str], target: str, recursive: bool, **options: Any) -> None:
    """Copy local files into a store; "-" is the standard input."""
    if tuple(local) == ("-",):
        _put_stream(
            locate(target, creates=not options["dry_run"]), dry_run=options["dry_run"], as_json=options["as_json"]
        )
    else:
        _copy_all(
            expand(local, local=True), locate(target, creates=not options["dry_run"]), recursive=recursive, **options
        )


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs get ember:///srv/store/!/report.pdf .\n"
    "  emberline fs get -r books ./books\n"
    "  emberline fs get 'books/*.txt' ./texts/"
)
@click.argument("source", nargs=-1, required=True)
@click.argument("local")
@_recursive
@_force
@_transfer_options
def get(source: Sequence[str], local: str, recursive: bool, **options: Any) -> None:
    """Copy files of a store to local files."""
    target = locate(local, local=True)
    # "." and ".." are directories to copy into, as they are for cp of the shell.
    if local.rstrip("/").rsplit("/", 1)[-1] in {".", ".."}:
        target = Location(target.fs, target.path, into=True)
    _copy_all(expand(source), target, recursive=recursive, **options)


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs sync s3://bucket/books ember:///srv/store/!/books\n"
    "  emberline fs sync --delete --dry-run file:///data ember://data"
)
@click.argument("source")
@click.argument("target")
@click.option("--delete", is_flag=True, help="Remove from the target what the source does not have.")
@_transfer_options
def sync(source: str, target: str, delete: bool, **options: Any) -> None:
    """Make the directory TARGET hold what SOURCE holds. Copies only what differs."""
    plan = Plan()
    source_location, target_location = locate(source), locate(target, creates=not options["dry_run"])
    plan_copy(plan, source_location, target_location, recursive=True, mirror=delete)
    if not options["dry_run"]:
        _make_parent(target_location)
    _run(plan, force=False, **options)


for _command in (cp, put, get):
    _command.help = f"{_command.help}\n\n{_RULES}"


def _copy_all(sources: Sequence[Location], target: Location, *, recursive: bool, dry_run: bool, **options: Any) -> None:
    existing = find_entry(target.fs, target.path)
    target_is_dir = existing is not None and existing.is_dir
    if len(sources) > 1 and existing is not None and not target_is_dir:
        raise NotADirectoryError(f"several sources need a directory as target: {target.url}")
    plan = Plan()
    for source in sources:
        into = target.into or len(sources) > 1
        if not into and target_is_dir:
            entry = find_entry(source.fs, source.path)
            into = entry is not None and not entry.is_dir
        plan_copy(plan, source, target.join(source.name) if into else target, recursive=recursive)
    if not dry_run:
        _make_parent(target.join("x") if target.into or len(sources) > 1 else target)
    _run(plan, dry_run=dry_run, **options)


def _make_parent(target: Location) -> None:
    """Make the directory that `target` is in."""
    parent = target.path.rstrip("/").rpartition("/")[0]
    if parent and has_directories(target):
        target.fs.makedirs(parent, exist_ok=True)


def _run(plan: Plan, *, jobs: int, checksum: bool, dry_run: bool, as_json: bool, force: bool) -> None:
    config = TransferConfig(jobs=jobs, checksum=checksum, dry_run=dry_run, force=force)
    outcomes: dict[str, int] = {"copy": 0, "skip": 0, "delete": 0, "fail": 0}
    copied_bytes = 0
    failures: list[Outcome] = []
    start_s = time.monotonic()
    with progress_bar("copying", plan.total_bytes, quiet=dry_run) as advance:
        for outcome in Transfer(plan, config, on_bytes=advance).run():
            outcomes[outcome.action] += 1
            copied_bytes += outcome.size_bytes if outcome.action == "copy" else 0
            if outcome.action == "fail":
                failures.append(outcome)
            _print_outcome(outcome, dry_run=dry_run, as_json=as_json)
    elapsed_s = time.monotonic() - start_s
    if plan.links_followed and not as_json:
        note(f"followed {plural(plan.links_followed, 'symbolic link')} to files")
    for url, why in plan.left_out:
        note(f"left out, {why}: {url}")
    for failure in failures:
        note(f"failed: {failure.error}: {failure.source or failure.target}")
    if as_json:
        print_json({
            "action": "summary", "copied": outcomes["copy"], "skipped": outcomes["skip"],
            "deleted": outcomes["delete"], "failed": outcomes["fail"], "left_out": len(plan.left_out),
            "links_followed": plan.links_followed,
            "bytes": copied_bytes, "elapsed_s": round(elapsed_s, 6), "dry_run": dry_run,
        })  # fmt: skip
    else:
        note(_summary(outcomes, copied_bytes, elapsed_s, dry_run=dry_run))
    if failures:
        sys.exit(1)


def _print_outcome(outcome: Outcome, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        row = {"action": outcome.action, "source": outcome.source, "target": outcome.target}
        row |= {"bytes": outcome.size_bytes}  # type: ignore[dict-item]
        print_json(row | ({"error": outcome.error} if outcome.error else {}))
    elif dry_run and outcome.action == "copy":
        print_line(f"copy {outcome.source} -> {outcome.target} ({human_bytes(outcome.size_bytes)})")
    elif dry_run and outcome.action == "delete":
        print_line(f"delete {outcome.target}")


def _summary(outcomes: dict[str, int], copied_bytes: int, elapsed_s: float, *, dry_run: bool) -> str:
    verb = "would copy" if dry_run else "copied"
    parts = [f"{verb} {plural(outcomes['copy'], 'file')}, {human_bytes(copied_bytes)}"]
    if not dry_run:
        rate = f" ({human_bytes(copied_bytes / max(elapsed_s, 1e-6))}/s)" if copied_bytes else ""
        parts[0] += f" in {elapsed_s:.1f} s{rate}"
    parts += [f"skipped {outcomes['skip']}"] if outcomes["skip"] else []
    parts += [f"{'would delete' if dry_run else 'deleted'} {outcomes['delete']}"] if outcomes["delete"] else []
    parts += [f"failed {outcomes['fail']}"] if outcomes["fail"] else []
    return ", ".join(parts)


def _put_stream(target: Location, *, dry_run: bool, as_json: bool) -> None:
    """The standard input as one file, published when the input ends."""
    if target.into or not target.name:
        raise click.UsageError("the standard input has no name: give the name of the file, not a directory")
    count = 0
    if not dry_run:
        _make_parent(target)
        with progress_bar("reading", None) as advance:
            count = put_stream(sys.stdin.buffer, target, on_bytes=advance)
    if as_json:
        print_json({"action": "copy", "source": "-", "target": target.url, "bytes": count})
    else:
        note(f"{'would write' if dry_run else f'wrote {human_bytes(count)} to'} {target.url}")
