"""The namespace against a simple model: whatever the order of operations, both say the same, also in errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from emberfs.errors import (
    AlreadyExists,
    DirectoryNotEmpty,
    EmberError,
    InvalidPath,
    IsADirectory,
    NotADirectory,
    NotFound,
)
from emberfs.messages import CollectGarbage, Link, Message, Mkdir, Remove, Rename, TrashRestore, Usage
from emberfs.meta.check import check
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.fs.meta_fakes import CHUNK, Meta, SharedMeta


@dataclass(eq=False)
class File:
    length: int


@dataclass(eq=False)
class Directory:
    entries: dict[str, Any] = field(default_factory=dict)


class Model:
    """What the namespace should do. `trash`: id -> (path, node)."""

    def __init__(self) -> None:
        self.root = Directory()
        self.trash: dict[str, tuple[str, Any]] = {}

    def place(self, path: str) -> tuple[Directory, str]:
        *above, name = path[1:].split("/")
        directory = self.root
        for component in above:
            if component not in directory.entries:
                raise NotFound(path)
            directory = directory.entries[component]
            if isinstance(directory, File):
                raise NotADirectory(path)
        return directory, name

    def put(self, path: str, length: int) -> None:
        directory, name = self.place(path)
        if isinstance(directory.entries.get(name), Directory):
            raise IsADirectory(path)
        directory.entries[name] = File(length)

    def mkdir(self, path: str) -> None:
        directory, name = self.place(path)
        if name in directory.entries:
            raise AlreadyExists(path)
        directory.entries[name] = Directory()

    def link(self, source: str, target: str) -> None:
        directory, name = self.place(source)
        if name not in directory.entries:
            raise NotFound(source)
        node = directory.entries[name]
        if isinstance(node, Directory):
            raise IsADirectory(source)
        directory, name = self.place(target)
        if name in directory.entries:
            raise AlreadyExists(target)
        directory.entries[name] = node

    def rename(self, source: str, target: str, overwrite: bool) -> None:
        old, old_name = self.place(source)
        if old_name not in old.entries:
            raise NotFound(source)
        node = old.entries[old_name]
        new, new_name = self.place(target)
        replaced = new.entries.get(new_name)
        if replaced is node:
            return
        if replaced is not None and not overwrite:
            raise AlreadyExists(target)
        if isinstance(node, Directory) and target.startswith(source + "/"):
            raise InvalidPath(target)
        if isinstance(replaced, Directory):
            if isinstance(node, File):
                raise IsADirectory(target)
            if replaced.entries:
                raise DirectoryNotEmpty(target)
        elif replaced is not None and isinstance(node, Directory):
            raise NotADirectory(target)
        del old.entries[old_name]
        new.entries[new_name] = node

    def remove(self, path: str, recursive: bool) -> Any:
        directory, name = self.place(path)
        if name not in directory.entries:
            raise NotFound(path)
        node = directory.entries[name]
        if isinstance(node, Directory) and node.entries and not recursive:
            raise DirectoryNotEmpty(path)
        return directory.entries.pop(name)

    def restore(self, trash_id: str, path: str) -> None:
        directory, name = self.place(path)
        if name in directory.entries:
            raise AlreadyExists(path)
        directory.entries[name] = self.trash.pop(trash_id)[1]

    def files(self) -> set[File]:
        return {node for root in (self.root, *(node for _, node in self.trash.values())) for node in _files(root)}


def _files(node: Any) -> list[File]:
    return [node] if isinstance(node, File) else [file for below in node.entries.values() for file in _files(below)]


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda names: "/" + "/".join(names))


class Namespace(RuleBasedStateMachine):
    kind = Meta

    def __init__(self) -> None:
        super().__init__()
        self.meta = self.kind()
        self.model = Model()

    def both(self, request: Message, step: Any, *arguments: Any) -> Any:
        """Do it on both sides; the answers of both, or None if both refused for the same reason."""
        try:
            expected = step(*arguments)
        except EmberError as error:
            with pytest.raises(type(error)):
                self.meta(request)
            return None
        return self.meta(request), expected

    @rule(path=PATHS, chunks=st.integers(0, 2))
    def put(self, path: str, chunks: int) -> None:
        try:
            self.model.put(path, chunks * CHUNK)
        except EmberError as error:
            with pytest.raises(type(error)):
                self.meta.put(path)
        else:
            self.meta.put_chunks(path, chunks * CHUNK) if chunks else self.meta.put(path)

    @rule(path=PATHS)
    def mkdir(self, path: str) -> None:
        self.both(Mkdir(path, 0o755, False, False), self.model.mkdir, path)

    @rule(old=PATHS, new=PATHS)
    def link(self, old: str, new: str) -> None:
        self.both(Link(old, new), self.model.link, old, new)

    @rule(old=PATHS, new=PATHS, overwrite=st.booleans())
    def rename(self, old: str, new: str, overwrite: bool) -> None:
        self.both(Rename(old, new, overwrite), self.model.rename, old, new, overwrite)

    @rule(path=PATHS, recursive=st.booleans(), trash=st.booleans())
    def remove(self, path: str, recursive: bool, trash: bool) -> None:
        done = self.both(Remove(path, recursive, trash, "any"), self.model.remove, path, recursive)
        if done and trash:
            self.model.trash[done[0].trash_id] = (path, done[1])

    @rule(number=st.integers(0), path=PATHS)
    def restore(self, number: int, path: str) -> None:
        if self.model.trash:
            trash_id = sorted(self.model.trash)[number % len(self.model.trash)]
            self.both(TrashRestore(trash_id, path), self.model.restore, trash_id, path)

    @rule()
    def crash(self) -> None:
        self.meta.crash_and_restart()

    @invariant()
    def the_same_is_there(self) -> None:
        self.compare("/", self.model.root)

    def compare(self, path: str, directory: Directory) -> None:
        assert self.meta.names(path) == sorted(directory.entries)
        for name, node in directory.entries.items():
            below = f"{path.rstrip('/')}/{name}"
            if isinstance(node, Directory):
                self.compare(below, node)
            else:
                assert self.meta.stat(below).length == node.length

    def teardown(self) -> None:
        self.meta(CollectGarbage(force=True))
        files = self.model.files()
        usage = self.meta(Usage())
        assert (usage.files, usage.length_bytes) == (len(files), sum(file.length for file in files))
        assert sum(self.meta.chunks.lengths.values()) == usage.length_bytes
        assert self.meta.run(check(self.meta.kv, self.meta.chunks)) == []
        self.meta.close()


TestNamespace = Namespace.TestCase
TestNamespace.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


class SharedNamespace(Namespace):
    """Over two servers on one KV."""

    kind = SharedMeta


TestSharedNamespace = SharedNamespace.TestCase
TestSharedNamespace.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
