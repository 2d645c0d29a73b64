"""New files added to a dataset: all of them or none.

No filesystem moves several files in one step. So what is to be added is written down first, in the hidden directory of
the write; a move that fails takes back those before it, and after a process that was killed on the way, whoever goes on
with the write, or sweeps what it left, does that. Until then a reader may see some of the files.

Invariants: the names of new files are no other file's, so that nothing else is ever taken back; the list is there for
as long as only some of the files may be.

Does not know: what is in the files, or which write they are of.
"""

from __future__ import annotations

import json
import posixpath
from typing import Any

_LIST = "appending.json"


def append(filesystem: Any, stage: str, target: str) -> None:
    """Moves all that is under `stage`/new to the same place under `target`."""
    new = f"{stage}/new"
    names = [file[len(new) + 1 :] for file in filesystem.find(new)]
    filesystem.pipe_file(f"{stage}/{_LIST}", json.dumps(names).encode())
    try:
        for name in names:
            destination = f"{target}/{name}"
            filesystem.makedirs(posixpath.dirname(destination), exist_ok=True)
            filesystem.mv(f"{new}/{name}", destination)
    except BaseException:
        take_back(filesystem, stage, target)
        raise


def is_partly_done(filesystem: Any, stage: str) -> bool:
    """Whether only some files may have been added."""
    return bool(_listed(filesystem, stage)) and bool(filesystem.find(f"{stage}/new"))


def take_back(filesystem: Any, stage: str, target: str) -> None:
    """Removes what an earlier `append` from `stage` has added, if there was one."""
    for name in _listed(filesystem, stage):
        if filesystem.exists(f"{target}/{name}"):
            filesystem.rm_file(f"{target}/{name}")
    if filesystem.exists(f"{stage}/{_LIST}"):
        filesystem.rm_file(f"{stage}/{_LIST}")


def _listed(filesystem: Any, stage: str) -> list[str]:
    try:
        names: list[str] = json.loads(filesystem.cat_file(f"{stage}/{_LIST}"))
    except (FileNotFoundError, json.JSONDecodeError):
        # Written only in part: nothing had been moved yet.
        return []
    return names
