"""`mv`, `rm` and `mkdir`: names and directories."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

import click

from .entry import Entry, find_entry, get_entry, walk
from .filecopy import has_directories, rename
from .location import Location, expand, locate, takes_paths
from .output import json_option, note, print_json, print_line
from .transfer import Plan, Transfer, TransferConfig, plan_copy, refuse_overlap


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs mv draft.txt final.txt\n"
    "  emberline fs mv 'incoming/*.parquet' corpus/\n"
    "  emberline fs mv file:///data/old ember:///srv/store/!/archive/"
)
@click.argument("source", nargs=-1, required=True)
@click.argument("target")
@click.option("-n", "--no-clobber", is_flag=True, help="Fail if the target exists.")
@json_option
def mv(source: Sequence[str], target: str, no_clobber: bool, as_json: bool) -> None:
    """Move or rename. Atomic inside a store; between two, the source is removed after a complete copy."""
    sources, wanted = expand(source), locate(target, creates=True)
    existing = find_entry(wanted.fs, wanted.path)
    into = len(sources) > 1 or wanted.into or (existing is not None and existing.is_dir)
    if into and existing is not None and not existing.is_dir:
        raise NotADirectoryError(f"not a directory: {wanted.url}")
    for location in sources:
        destination = wanted.join(location.name) if into else wanted
        refuse_overlap(location, destination, mirror=False)
        if find_entry(destination.fs, destination.path) is not None:
            if no_clobber:
                raise FileExistsError(f"exists already: {destination.url}")
            if get_entry(destination.fs, destination.path).is_dir:
                raise FileExistsError(f"a directory of that name is there: {destination.url}")
        _move(location, destination)
        if as_json:
            print_json({"source": location.url, "target": destination.url})


def _move(source: Location, target: Location) -> None:
    entry = get_entry(source.fs, source.path)
    parent = target.path.rpartition("/")[0]
    if parent and has_directories(target):
        target.fs.makedirs(parent, exist_ok=True)
    if source.protocol == target.protocol and source.fs == target.fs and has_directories(target):
        rename(source, target)
        return
    plan = Plan()
    plan_copy(plan, source, target, recursive=True)
    if plan.left_out:
        raise ValueError(f"cannot move {plan.left_out[0][1]}: {plan.left_out[0][0]}")
    transfer = Transfer(plan, TransferConfig(force=True), on_bytes=lambda _: None)
    failures = [outcome for outcome in transfer.run() if outcome.action == "fail"]
    if failures:
        raise OSError(f"nothing was removed, because the copy failed: {failures[0].error}: {failures[0].source}")
    _remove(source, entry, permanent=True)


@takes_paths
@click.command(
    epilog="\b\nExamples:\n"
    "  emberline fs rm books/draft.txt\n"
    "  emberline fs rm -r --permanent ember:///srv/store/!/scratch\n"
    "  emberline fs rm --dry-run 'logs/2025-*.jsonl'"
)
@click.argument("path", nargs=-1, required=True)
@click.option("-r", "--recursive", is_flag=True, help="Remove directories and what is in them.")
@click.option("-f", "--force", is_flag=True, help="A path that does not exist is fine.")
@click.option("--permanent", is_flag=True, help="Not into the trash of the store.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be removed.")
@json_option
def rm(path: Sequence[str], recursive: bool, force: bool, permanent: bool, dry_run: bool, as_json: bool) -> None:
    """Remove files and directories. In a store they go to the trash first; `emberline fs trash restore ID` brings
    them back."""
    failed = False
    trashed: list[tuple[Location, str]] = []
    for text in path:
        try:
            locations = expand([text])
        except FileNotFoundError:
            if force:
                continue
            raise
        for location in locations:
            try:
                trash_id = _remove_one(location, recursive=recursive, permanent=permanent, dry_run=dry_run)
            except FileNotFoundError as error:
                if force:
                    continue
                note(f"failed: no such file or directory: {error.filename or location.url}")
                failed = True
            except (OSError, ValueError) as error:
                note(f"failed: {error}")
                failed = True
            else:
                _say_removed(location, trash_id, dry_run=dry_run, as_json=as_json)
                trashed += [(location, trash_id)] if trash_id else []
    if trashed and not as_json:
        _say_trashed(trashed)
    if failed:
        sys.exit(1)


def _remove_one(location: Location, *, recursive: bool, permanent: bool, dry_run: bool) -> str:
    entry = get_entry(location.fs, location.path)
    if not location.name:
        raise ValueError(f"the root is not removed: {location.url}")
    if entry.is_dir and entry.link_target is None and not recursive:
        raise IsADirectoryError(f"is a directory, pass -r to remove it: {location.url}")
    return "" if dry_run else _remove(location, entry, permanent=permanent)


def _say_removed(location: Location, trash_id: str, *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json({"action": "remove", "url": location.url, "trash_id": trash_id, "dry_run": dry_run})
    elif dry_run:
        print_line(f"remove {location.url}")


def _say_trashed(trashed: Sequence[tuple[Location, str]]) -> None:
    """How to get back what went to the trash of a store."""
    location, trash_id = trashed[0]
    store = location.fs.storage_options["url"]
    if len(trashed) == 1:
        note(f"moved to the trash; `emberline fs trash restore {trash_id} {store}` brings it back")
    else:
        note(
            f"moved {len(trashed)} to the trash; `emberline fs trash restore ID {store}` brings one back, "
            f"`emberline fs trash ls {store}` has the IDs"
        )


def _remove(location: Location, entry: Entry, *, permanent: bool) -> str:
    """Remove what `entry` describes; returns the id to restore it by, empty if it is gone for good."""
    fs, path = location.fs, location.path
    if location.protocol == "ember":
        with fs.client as client:
            return str(client.remove(path, recursive=True, trash=not permanent))
    if not entry.is_dir or entry.link_target is not None:
        fs.rm_file(path)
        return ""
    # fsspec's own recursive removal takes `path` for a pattern; a name may hold the characters of one.
    for _, child in reversed(list(walk(fs, path, with_parts=True))):
        if not child.is_dir or child.link_target is not None:
            fs.rm_file(child.path)
        elif has_directories(location):
            fs.rmdir(child.path)
    if has_directories(location):
        fs.rmdir(path)
    return ""


@takes_paths
@click.command(epilog="\b\nExamples:\n  emberline fs mkdir books\n  emberline fs mkdir -p ember:///srv/store/!/a/b/c")
@click.argument("path", nargs=-1, required=True)
@click.option("-p", "--parents", is_flag=True, help="Make what is missing on the way; an existing one is fine.")
@json_option
def mkdir(path: Sequence[str], parents: bool, as_json: bool) -> None:
    """Make directories."""
    for text in path:
        location = locate(text, creates=True)
        if parents:
            location.fs.makedirs(location.path, exist_ok=True)
        else:
            _make_one(location)
        if as_json:
            print_json({"action": "mkdir", "url": location.url})


def _make_one(location: Location) -> None:
    """A directory in one that is there. Raises FileNotFoundError that names the first one missing on the way."""
    try:
        location.fs.mkdir(location.path, create_parents=False)
    except FileNotFoundError as error:
        parent, above = location.path.rstrip("/"), []
        while parent := parent.rpartition("/")[0]:
            above.append(location.at(parent))
        missing = [place for place in above if find_entry(place.fs, place.path) is None]
        if not missing:
            raise
        what = "the parent directory is missing (-p makes it)"
        raise FileNotFoundError(errno.ENOENT, what, missing[-1].url) from error
