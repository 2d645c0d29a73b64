"""`trash ls`, `trash restore` and `trash empty`: removed files, until they are gone."""

from __future__ import annotations

import click

from .find import age_s
from .output import human_bytes, human_time, iso_time, json_option, note, plural, print_columns, print_json, print_line
from .store import open_store, store_argument


@click.group(
    no_args_is_help=True,
    epilog="\b\nExamples:\n"
    "  emberline fs trash ls                         # ids, times and paths of what was removed\n"
    "  emberline fs trash restore 0000000000000019   # back where it was\n"
    "  emberline fs trash empty --older 7d           # gone for good",
)
def trash() -> None:
    """What `emberline fs rm` removed, and how to get it back."""


@trash.command(
    epilog="\b\nExamples:\n  emberline fs trash ls ember:///srv/store\n  emberline fs trash ls --json | jq -r .id"
)
@store_argument
@json_option
def ls(store: str | None, as_json: bool) -> None:
    """List the trash, oldest first."""
    rows = []
    with open_store(store) as client:
        for entry in client.trash_list():
            deleted_s = entry.deleted_ns / 1e9
            if as_json:
                print_json({
                    "id": entry.id, "path": entry.path, "deleted": iso_time(deleted_s),
                    "type": entry.inode.kind.name.lower(), "size_bytes": entry.inode.length,
                })  # fmt: skip
            size = "-" if entry.inode.is_dir else human_bytes(entry.inode.length)
            rows.append((entry.id, human_time(deleted_s), size, entry.path + ("/" if entry.inode.is_dir else "")))
    if not as_json:
        print_columns([("id", "removed", "size", "path"), *rows] if rows else [], right=(2,))


@trash.command(
    epilog="\b\nExamples:\n"
    "  emberline fs trash restore 0000000000000019\n"
    "  emberline fs trash restore 0000000000000019 ember:///srv/store --to /rescued.txt"
)
@click.argument("id")
@store_argument
@click.option("--to", "path", default="", help="Path in the store to restore to; else where it was.")
@json_option
def restore(id: str, store: str | None, path: str, as_json: bool) -> None:
    """Put the entry ID of the trash back where it was."""
    with open_store(store) as client:
        was_at = next((entry.path for entry in client.trash_list() if entry.id == id), "")
        client.trash_restore(id, path)
    if as_json:
        print_json({"action": "restore", "id": id, "path": path or was_at})
    else:
        print_line(f"restored {path or was_at}")


@trash.command(
    epilog="\b\nExamples:\n  emberline fs trash empty ember:///srv/store\n  emberline fs trash empty --older 7d"
)
@store_argument
@click.option("--older", type=age_s, metavar="AGE", default="0s", help="Only what was removed longer ago (12h, 7d).")
@json_option
def empty(store: str | None, older: float, as_json: bool) -> None:
    """Remove for good what is in the trash. `emberline fs gc --now` then frees the space at once."""
    with open_store(store) as client:
        before = len(client.trash_list())
        client.trash_empty(older_than_s=older)
        after = len(client.trash_list())
    if as_json:
        print_json({"action": "empty", "removed": before - after, "left": after})
    else:
        note(f"removed {plural(before - after, 'entry')} for good, {after} left")
