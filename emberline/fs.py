"""The group `emberline fs`: its commands by name, and what `--help` says of each.

The commands themselves are the store's, in `emberfs.cli`; this table is here so that help needs none of them.
"""

from __future__ import annotations

from .lazy import LazyCommand, LazyGroup

HELP = """Files in a store, and between stores.

A path is any fsspec URL (file://, s3://, memory://, ...). Of a store it is

\b
  ember:///store/dir/!/path     the store's directory, "!", the path inside
  /path or path                 in the store that EMBERLINE_URL names
  ember://path                  the same

Patterns (*, ?, [a-z], **) are expanded; quote them, or the shell does it first.

\b
Examples:
  emberline fs cp -r file:///data/books ember:///srv/store/!/books
  export EMBERLINE_URL=ember:///srv/store
  emberline fs ls -l books
  emberline fs cat 'books/*.txt' | wc -c
"""


def _row(module: str, name: str, summary: str) -> LazyCommand:
    return LazyCommand(f"emberfs.cli.{module}:{name}", summary)


fs = LazyGroup(
    "fs",
    help=HELP,
    short_help="Files in a store, and between stores.",
    no_args_is_help=True,
    lazy={
        "ls": _row("listing", "ls", "List directories."),
        "tree": _row("listing", "tree", "Show a directory as a tree."),
        "stat": _row("listing", "stat", "Show everything known about a path."),
        "du": _row("space", "du", "Sum up file sizes per directory."),
        "df": _row("space", "df", "Show free and used space."),
        "find": _row("find", "find", "Find paths by name, kind, size or age."),
        "cat": _row("content", "cat", "Write files to the standard output."),
        "checksum": _row("content", "checksum", "Print checksums of files."),
        "put": _row("copying", "put", "Copy local files into a store."),
        "get": _row("copying", "get", "Copy files of a store to local files."),
        "cp": _row("copying", "cp", "Copy files between any two URLs."),
        "sync": _row("copying", "sync", "Make a directory equal to another."),
        "mv": _row("namespace", "mv", "Move or rename files and directories."),
        "rm": _row("namespace", "rm", "Remove files and directories."),
        "mkdir": _row("namespace", "mkdir", "Make directories."),
        "trash": _row("trash", "trash", "List, restore or empty the trash."),
        "info": _row("maintenance", "info", "Describe a store: formats, sizes, settings."),
        "fsck": _row("maintenance", "fsck", "Check the structure of a store."),
        "scrub": _row("maintenance", "scrub", "Read every stored byte and check it."),
        "gc": _row("maintenance", "gc", "Free the space of removed files now."),
        "dump": _row("backup", "dump", "Write a backup of the metadata."),
        "load": _row("backup", "load", "Load a backup of the metadata."),
    },
)
