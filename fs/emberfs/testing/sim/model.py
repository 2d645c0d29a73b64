"""What a tree of files must look like: a reference model in memory, as simple as can be.

    tree = Tree()
    tree.put("a/b", b"content")         # raises what the store would raise

Paths are relative, "" is the top. A file is an object, so two names may lead to one. `Doubt` is a write in place that
was not acknowledged: each part of it that fits into one chunk may be there or not.

Does not know: the store, or who else changes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Union

from ...errors import AlreadyExists, DirectoryNotEmpty, InvalidPath, IsADirectory, NotADirectory, NotFound
from ...types import CHUNK_SIZE_BYTES_MIN

Doubt = tuple[int, bytes]
"""(offset, payload)"""


@dataclass(slots=True, eq=False)
class ModelFile:
    """A file's content."""

    content: bytes = b""
    doubts: list[Doubt] = field(default_factory=list)
    """Parts of writes that may have happened."""

    def write(self, offset: int, payload: bytes) -> None:
        end = offset + len(payload)
        self.content = self.content[:offset].ljust(offset, b"\0") + payload + self.content[end:]

    def truncate(self, length: int) -> None:
        self.content = self.content[:length].ljust(length, b"\0")

    def maybe(self, offset: int, payload: bytes) -> None:
        """The write may have happened, in parts."""
        while payload:
            room = CHUNK_SIZE_BYTES_MIN - offset % CHUNK_SIZE_BYTES_MIN
            self.doubts.append((offset, payload[:room]))
            offset, payload = offset + room, payload[room:]

    def allows(self, content: bytes) -> bool:
        """Whether the file may read so."""
        if content == self.content:
            return True
        ends = {max(len(self.content), offset + len(payload)) for offset, payload in self.doubts}
        if len(content) not in ends | {len(self.content)}:
            return False
        return all(
            byte
            in (expected, *(payload[at - offset] for offset, payload in self.doubts if 0 <= at - offset < len(payload)))
            for at, (byte, expected) in enumerate(zip(content, self.content.ljust(len(content), b"\0"), strict=True))
            if byte != expected
        )


Directory = dict[str, Union["Directory", ModelFile]]
Node = Directory | ModelFile


class Tree:
    """A directory and what is below it."""

    def __init__(self) -> None:
        self.top: Directory = {}

    # ---- looking

    def node(self, path: str) -> Node:
        """What is there. Raises NotFound, NotADirectory."""
        node: Node = self.top
        for name in path.split("/") if path else ():
            if isinstance(node, ModelFile):
                raise NotADirectory("not a directory", path)
            if name not in node:
                raise NotFound("no such file", path)
            node = node[name]
        return node

    def file(self, path: str) -> ModelFile:
        """The file there. Raises IsADirectory, too."""
        node = self.node(path)
        if not isinstance(node, ModelFile):
            raise IsADirectory("is a directory", path)
        return node

    def names(self, path: str) -> list[str]:
        """A directory's entries, in order."""
        node = self.node(path)
        if isinstance(node, ModelFile):
            raise NotADirectory("not a directory", path)
        return sorted(node)

    def files(self) -> list[tuple[str, ModelFile]]:
        """Every name of every file."""
        return [(path, node) for path, node in walk(self.top) if isinstance(node, ModelFile)]

    def directories(self) -> list[str]:
        """Every directory but the top."""
        return [path for path, node in walk(self.top) if not isinstance(node, ModelFile)]

    # ---- changing

    def put(self, path: str, content: bytes) -> None:
        """A new file, also in place of another one."""
        parent, name = self._parent(path)
        if name in parent and not isinstance(parent[name], ModelFile):
            raise IsADirectory("a directory is in the way", path)
        parent[name] = ModelFile(content)

    def make_file(self, path: str) -> ModelFile:
        """The file there, a new one if there is none."""
        parent, name = self._parent(path)
        if name not in parent:
            parent[name] = ModelFile()
        return self.file(path)

    def mkdir(self, path: str) -> None:
        parent, name = self._parent(path)
        if name in parent:
            raise AlreadyExists("exists", path)
        parent[name] = {}

    def remove(self, path: str, *, recursive: bool) -> Node:
        """Returns what went."""
        node = self.node(path)
        if isinstance(node, dict) and node and not recursive:
            raise DirectoryNotEmpty("not empty", path)
        parent, name = self._parent(path)
        del parent[name]
        return node

    def restore(self, path: str, node: Node) -> None:
        """Put back what `remove` returned, making directories that are gone."""
        names = path.split("/")
        for depth in range(1, len(names)):
            above = "/".join(names[:depth])
            parent, name = self._parent(above)
            if isinstance(parent.setdefault(name, {}), ModelFile):
                raise NotADirectory("a file is in the way", above)
        parent, name = self._parent(path)
        if name in parent:
            raise AlreadyExists("exists", path)
        parent[name] = node

    def rename(self, source: str, target: str, *, overwrite: bool) -> None:
        node = self.node(source)
        parent, name = self._parent(target)
        there = parent.get(name)
        if there is node:
            return
        if there is not None and not overwrite:
            raise AlreadyExists("exists", target)
        if isinstance(node, dict) and (target + "/").startswith(source + "/"):
            raise InvalidPath("into its own subtree")
        if isinstance(there, dict):
            if isinstance(node, ModelFile):
                raise IsADirectory("a file cannot replace a directory", target)
            if there:
                raise DirectoryNotEmpty("not empty", target)
        elif there is not None and isinstance(node, dict):
            raise NotADirectory("a directory cannot replace a file", target)
        old_parent, old_name = self._parent(source)
        del old_parent[old_name]
        parent[name] = node

    def link(self, source: str, target: str) -> None:
        file = self.file(source)
        parent, name = self._parent(target)
        if name in parent:
            raise AlreadyExists("exists", target)
        parent[name] = file

    def _parent(self, path: str) -> tuple[Directory, str]:
        above, _, name = path.rpartition("/")
        parent = self.node(above)
        if isinstance(parent, ModelFile):
            raise NotADirectory("not a directory", path)
        return parent, name


def walk(directory: Directory, above: str = "") -> list[tuple[str, Node]]:
    """Everything below, each directory before what is in it."""
    found: list[tuple[str, Node]] = []
    for name, node in sorted(directory.items()):
        found.append((above + name, node))
        if isinstance(node, dict):
            found += walk(node, f"{above}{name}/")
    return found


Seen = dict[str, bytes | None]
"""Path -> content; None: a directory."""


def differences(tree: Tree, seen: Seen) -> list[str]:
    """How what was seen is not the tree."""
    expected = dict(walk(tree.top))
    found = [f"{path} is missing" for path in expected if path not in seen]
    for path, content in seen.items():
        node = expected.get(path)
        if node is None:
            found.append(f"{path} should not be there")
        elif (content is None) != isinstance(node, dict):
            found.append(f"{path} is {'a directory' if content is None else 'a file'}")
        elif isinstance(node, ModelFile) and content is not None and not node.allows(content):
            found.append(f"{path}: {unlike(node.content, content)}")
    return found


def unlike(expected: bytes, content: bytes) -> str:
    """Where two contents part."""
    at = next(
        (at for at, pair in enumerate(zip(expected, content, strict=False)) if pair[0] != pair[1]),
        min(len(expected), len(content)),
    )
    return (
        f"{len(content)} bytes, not {len(expected)}; from byte {at} it is {content[at : at + 16]!r}, "
        f"not {expected[at : at + 16]!r}"
    )
