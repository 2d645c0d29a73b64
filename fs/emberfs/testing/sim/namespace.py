"""What clients do to the files of a simulated cluster, and what must come of it.

Estates: a tree of its own for each worker. Every answer must be the one that a `Tree` gives, errors included. When an
update is in doubt (UpdateUnknown, or its client was killed) nobody touches the estate any more, because the update may
come late; in the end it must look as if the update had happened, or not.

Shared names: files that all clients put, rename onto, read, take away and remove. Each read gets a whole file that
somebody put there, and the history of each name is linearizable. And a log that one client at a time appends to: in the
end it has each acknowledged record once, where it was put.

Does not know: faults.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ...client.core import Core, NewFile, Range
from ...client.file import OpenFile, open_file
from ...client.namespace import Namespace
from ...errors import Conflict, DataLost, EmberError, NotFound, SessionExpired, StaleChunk, Unavailable, UpdateUnknown
from ...types import CHUNK_SIZE_BYTES_MIN, INLINE_BYTES_MAX, Inode
from .checker import Call, History, Outcome, Read, Remove, Replace, failures
from .cluster import SimClient
from .model import Doubt, ModelFile, Node, Seen, Tree, differences, unlike

NEW = NewFile(chunk_size_bytes=CHUNK_SIZE_BYTES_MIN)
PATHS = ("a", "b", "c", "d", "d/a", "d/b", "d/f", "d/f/a", "e", "e/a", "e/b")
DIRECTORIES = ("d", "d/f", "e")
SHARED = "/shared"
LOG = f"{SHARED}/log"
RECORD_BYTES = 1024
TAG_BYTES = 10
STORY_ACTS = 12
RESTORE_S = 8.0
"""What is in the trash for longer is not put back: it may expire any moment."""

Work = Callable[[Core], Awaitable[Any]]
_LOST = (NotFound, StaleChunk, SessionExpired, Conflict)
"""What a call gets that loses its session on the way."""
_IN_DOUBT = (UpdateUnknown, DataLost)


@dataclass(kw_only=True, slots=True)
class Act:
    """One operation: on the store, and on the model."""

    what: str
    perform: Work
    apply: Callable[[Tree], Any]
    edits: str = ""
    """The file that is changed in place, in several steps; "" for none."""
    doubts: list[Doubt] = field(default_factory=list)
    """What is written to it."""
    creates: bool = False


@dataclass(kw_only=True, slots=True)
class Estate:
    """A tree that one worker owns."""

    path: str
    tree: Tree = field(default_factory=Tree)
    act: Act | None = None
    """What is under way, or in doubt for ever."""
    story: list[str] = field(default_factory=list)
    trash: dict[str, tuple[float, str, Node]] = field(default_factory=dict)
    """Id -> (when, path, what)."""
    now_s: float = 0.0
    """When the act began."""

    def at(self, path: str) -> str:
        return f"{self.path}/{path}" if path else self.path

    def tell(self, line: str) -> None:
        self.story.append(line)

    def candidates(self) -> list[Tree]:
        """All that the tree may be."""
        act = self.act
        if act is None:
            return [self.tree]
        after = copy.deepcopy(self.tree)
        with contextlib.suppress(EmberError):
            if act.edits:
                file = after.make_file(act.edits) if act.creates else after.file(act.edits)
                for offset, payload in act.doubts:
                    file.maybe(offset, payload)
            else:
                act.apply(after)
        return [self.tree, after]


@dataclass(slots=True)
class Record:
    """An append to the log."""

    content: bytes
    offset: int = -1
    is_acknowledged: bool = False


class Files:
    """The files of one simulation, and what happened to them."""

    def __init__(self) -> None:
        self.operations = 0
        self.is_over = False
        self.pause_s = 0.5
        self.estates: list[Estate] = []
        self.history = History()
        self.records: list[Record] = []
        self.names = [f"{SHARED}/{name}" for name in "xyz"]
        self._tags = 0
        self._lengths: dict[bytes, int] = {}
        """Tag -> length of the whole file that it begins."""

    # ---- the workers

    async def run(self, client: SimClient, rng: random.Random) -> None:
        """One worker, until `is_over`."""
        world = client.process.world
        estate: Estate | None = None
        while not self.is_over:
            await client.process.sleep(rng.expovariate(1 / self.pause_s))
            choice = rng.random()
            if estate is None or estate.act is not None:
                estate = await self._settle_down(client)
            elif choice < 0.6:
                estate.now_s = world.now_s()
                await self._act(client, estate, _any_act(estate, rng))
            elif choice < 0.88:
                await self._share(client, rng)
            elif choice < 0.96:
                await self._append(client)
            else:
                with contextlib.suppress(*_IN_DOUBT, Unavailable):
                    await Namespace(client.core).collect_garbage(rng.random() < 0.5)
            self.operations += 1

    async def _settle_down(self, client: SimClient) -> Estate | None:
        """A new estate, if it is certain that there is one."""
        estate = Estate(path=f"/e{len(self.estates)}")
        self.estates.append(estate)
        estate.act = Act(what="mkdir", perform=_nothing, apply=lambda tree: None)
        try:
            await Namespace(client.core).mkdir(SHARED, 0o755, True, True)
            await Namespace(client.core).mkdir(estate.path, 0o755, False, False)
        except (Unavailable, UpdateUnknown):
            return None
        estate.act = None
        return estate

    async def _act(self, client: SimClient, estate: Estate, act: Act) -> None:
        """Do it, and compare."""
        world = client.process.world
        estate.act = act
        session = client.routes.client
        got: Any
        try:
            got = await act.perform(client.core)
        except EmberError as error:
            got = error
        is_renewed = client.routes.client != session
        estate.tell(f"{estate.now_s:.3f}..{world.now_s():.3f} {client.name} {act.what} -> {_shown(got)}")
        world.note(estate.story[-1])
        if isinstance(got, _IN_DOUBT):
            return
        if isinstance(got, (Unavailable, Conflict, SessionExpired)) or (is_renewed and isinstance(got, _LOST)):
            estate.act = act if act.edits else None
            return
        try:
            expected = act.apply(estate.tree)
        except EmberError as error:
            expected = error
        estate.act = None
        if type(expected) is not type(got) or (not isinstance(got, EmberError) and expected != got):
            is_content = isinstance(expected, bytes) and isinstance(got, bytes)
            detail = unlike(expected, got) if is_content else f"not {_shown(expected)}"
            raise AssertionError("\n".join([f"estate {estate.path}: {detail}", *estate.story[-STORY_ACTS:]]))

    # ---- shared names

    async def _share(self, client: SimClient, rng: random.Random) -> None:
        name = rng.choice(self.names)
        kind = rng.choices(["get", "put", "rename", "take", "remove"], [45, 25, 12, 6, 12])[0]
        names = Namespace(client.core)
        if kind == "get":
            await self.look(client, name)
        elif kind == "put":
            tag, content = self._whole(rng)
            await self._tried(client, name, Replace(tag), client.core.put(name, memoryview(content), NEW))
        elif kind == "rename":
            tag, content = self._whole(rng)
            aside = f"{SHARED}/{tag.decode()}"
            with contextlib.suppress(*_IN_DOUBT, Unavailable, StaleChunk, SessionExpired):
                await client.core.put(aside, memoryview(content), NEW)
                await self._tried(client, name, Replace(tag), names.rename(aside, name, True))
        elif kind == "take":
            aside = f"{SHARED}/{self._tag().decode()}"
            if await self._tried(client, name, Remove(), names.rename(name, aside, False)):
                with contextlib.suppress(Unavailable, DataLost):
                    self._check_whole(aside, await client.core.get(aside))
        else:
            await self._tried(client, name, Remove(), names.remove(name, False, rng.random() < 0.5, "any"))

    async def _tried(
        self, client: SimClient, name: str, operation: Replace | Remove, work: Coroutine[Any, Any, Any]
    ) -> bool:
        """Put a change of a shared name into the history. True if it happened."""
        world = client.process.world
        session = client.routes.client
        call = self.history.begin(name.encode(), operation, client=client.name, now_s=world.now_s())
        outcome = Outcome.DONE
        try:
            await work
        except NotFound:
            assert isinstance(operation, Remove), f"{client.name}: {call} found nothing to replace"
            call.operation = Read(0, TAG_BYTES)  # It saw that there was nothing.
        except (Unavailable, Conflict):
            outcome = Outcome.NOTHING
        except SessionExpired:
            outcome = Outcome.NOTHING
        except StaleChunk:
            assert client.routes.client != session, f"{client.name}: the id of {call} was not reserved any more"
            outcome = Outcome.NOTHING
        except _IN_DOUBT:
            outcome = Outcome.UNKNOWN
        self._end(call, outcome, b"", world.now_s())
        return outcome is Outcome.DONE and isinstance(call.operation, (Replace, Remove))

    async def look(self, client: SimClient, name: str) -> None:
        """Read a shared name, whole."""
        world = client.process.world
        call = self.history.begin(name.encode(), Read(0, TAG_BYTES), client=client.name, now_s=world.now_s())
        outcome, tag = Outcome.DONE, b""
        try:
            inode = await client.core.file(name)
            try:
                tag = self._check_whole(name, await _content(client.core, inode, name))
            except NotFound:
                outcome = Outcome.NOTHING  # It was replaced, and its garbage collected, while we read.
        except NotFound:
            pass
        except (Unavailable, DataLost):
            outcome = Outcome.NOTHING
        self._end(call, outcome, tag, world.now_s())

    def _end(self, call: Call, outcome: Outcome, got: bytes, now_s: float) -> None:
        self.history.end(call, outcome, got, now_s=now_s)

    def _tag(self) -> bytes:
        self._tags += 1
        return b"<%08d>" % self._tags

    def _whole(self, rng: random.Random) -> tuple[bytes, bytes]:
        """A content that is like no other, and its tag."""
        tag = self._tag()
        length = rng.choice([10, 500, INLINE_BYTES_MAX, INLINE_BYTES_MAX + 1, 9000, CHUNK_SIZE_BYTES_MIN + 500])
        self._lengths[tag] = length
        return tag, _body(tag, length)

    def _check_whole(self, name: str, content: bytes) -> bytes:
        tag = content[:TAG_BYTES]
        assert tag in self._lengths, f"{name} begins with {tag!r}, which nobody wrote"
        expected = _body(tag, self._lengths[tag])
        assert content == expected, f"{name} is not whole: {unlike(expected, content)}"
        return tag

    # ---- the log

    async def _append(self, client: SimClient) -> None:
        record = Record(_body(self._tag(), RECORD_BYTES))
        self.records.append(record)
        try:
            file = await open_file(client.core, LOG, "ab", NEW)
            record.offset = file.length
            async with _Closing(file):
                await file.write(file.length, memoryview(record.content))
        except (*_IN_DOUBT, *_LOST, Unavailable):
            return  # Conflict: somebody else appends just now.
        record.is_acknowledged = True

    # ---- the end

    async def audit(self, client: SimClient) -> None:
        """Everything must be as it should. All sessions but the client's have ended."""
        for name in self.names:
            await self.look(client, name)
        for key, story in failures(self.history):
            raise AssertionError(f"{key.decode()} is not linearizable: {story}")
        await self._audit_listing(client)
        await self._audit_log(client)
        for estate in self.estates:
            seen = await _walk(client.core, estate.path)
            found = [differences(tree, seen) for tree in estate.candidates()]
            if not any(not each for each in found):
                lines = [line for each in found for line in ["either:", *each]]
                raise AssertionError("\n".join([f"estate {estate.path}", *lines, *estate.story[-STORY_ACTS:]]))

    async def _audit_listing(self, client: SimClient) -> None:
        """Nobody changes anything: a listing and the stats say the same."""
        for name, inode in await Namespace(client.core).entries(SHARED):
            found = await client.core.stat(f"{SHARED}/{name}")
            assert found == inode, f"{name} is listed as {inode}, and is {found}"

    async def _audit_log(self, client: SimClient) -> None:
        content = b""
        with contextlib.suppress(NotFound):
            content = await client.core.get(LOG)
        assert len(content) % RECORD_BYTES == 0, f"the log has {len(content)} bytes"
        known = {record.content: record for record in self.records}
        offsets: dict[bytes, list[int]] = {}
        for offset in range(0, len(content), RECORD_BYTES):
            part = content[offset : offset + RECORD_BYTES]
            assert part in known, f"at {offset} of the log is {part[:TAG_BYTES]!r}, which nobody wrote"
            offsets.setdefault(part, []).append(offset)
        for record in self.records:
            found = offsets.get(record.content, [])
            name = record.content[:TAG_BYTES].decode()
            if record.is_acknowledged:
                assert found == [record.offset], f"{name} was appended at {record.offset} and is at {found}"
            assert len(found) <= 1, f"{name} is in the log at {found}"


# ---- acts


def _any_act(estate: Estate, rng: random.Random) -> Act:
    kinds: list[tuple[Callable[[Estate, random.Random], Act], int]] = [
        (_put, 18),
        (_get, 20),
        (_edit, 14),
        (_truncate, 12),
        (_mkdir, 9),
        (_rename, 10),
        (_link, 4),
        (_remove, 9),
        (_list, 6),
        (_stat, 4),
    ]
    fresh = [key for key, (thrown_s, _, _) in estate.trash.items() if estate.now_s - thrown_s < RESTORE_S]
    if fresh and rng.random() < 0.1:
        return _restore(estate, rng.choice(fresh))
    makes, weights = [kind for kind, _ in kinds], [weight for _, weight in kinds]
    return rng.choices(makes, weights)[0](estate, rng)


def _path(estate: Estate, rng: random.Random, *, file: bool = True) -> str:
    """Mostly one that exists."""
    there = [path for path, _ in estate.tree.files()] if file else estate.tree.directories()
    return rng.choice(there) if there and rng.random() < 0.75 else rng.choice(PATHS if file else DIRECTORIES)


def _place(estate: Estate, rng: random.Random) -> str:
    """Mostly in a directory that exists."""
    directories = ["", *estate.tree.directories()]
    places = [path for path in PATHS if path.rpartition("/")[0] in directories]
    return rng.choice(places if rng.random() < 0.85 else PATHS)


def _bytes(rng: random.Random, lengths: tuple[int, ...]) -> bytes:
    tag = b"%08x." % rng.getrandbits(32)
    return _body(tag, rng.choice(lengths))


def _put(estate: Estate, rng: random.Random) -> Act:
    path = _place(estate, rng)
    content = _bytes(rng, (0, 9, 300, INLINE_BYTES_MAX, 6000, CHUNK_SIZE_BYTES_MIN + 77))

    async def perform(core: Core) -> None:
        await core.put(estate.at(path), memoryview(content), NEW)

    return Act(what=f"put {path} {len(content)} bytes", perform=perform, apply=lambda tree: tree.put(path, content))


def _get(estate: Estate, rng: random.Random) -> Act:
    path = _path(estate, rng)
    offset, length = rng.choice([(0, 1 << 20), (0, 1 << 20), (rng.randrange(5000), 700)])

    async def perform(core: Core) -> bytes:
        return bytes(await core.get(estate.at(path), offset, length))

    return Act(
        what=f"get {path} {offset} {length}",
        perform=perform,
        apply=lambda tree: tree.file(path).content[offset : offset + length],
    )


def _edit(estate: Estate, rng: random.Random) -> Act:
    """Open a file, append to it or write into it, perhaps with a flush between, close it."""
    path = _path(estate, rng)
    appends = rng.random() < 0.5
    payloads = [_bytes(rng, (9, 100, 3000, 5000)) for _ in range(rng.randint(1, 2))]
    places = (0, 50, 4000, 9000, CHUNK_SIZE_BYTES_MIN - 40)
    offsets = [0 if appends else rng.choice(places) for _ in payloads]
    flushes, stays_s = rng.random() < 0.5, rng.choice([0.0, 0.0, 0.0, 2.0, 5.0])
    there = estate.tree.files()
    end = next((len(file.content) for name, file in there if name == path), 0)
    doubts: list[Doubt] = []
    for offset, payload in zip(offsets, payloads, strict=True):
        doubts.append((end if appends else offset, payload))
        end = max(end, doubts[-1][0] + len(payload))

    async def perform(core: Core) -> None:
        file = await open_file(core, estate.at(path), "ab" if appends else "r+b", NEW)
        async with _Closing(file):
            for offset, payload in doubts:
                await file.write(file.length if appends else offset, memoryview(payload))
                if flushes:
                    await file.sync()
            await core.runtime.sleep(stays_s)

    def apply(tree: Tree) -> None:
        file = tree.make_file(path) if appends else tree.file(path)
        for offset, payload in doubts:
            file.write(offset, payload)

    kind = "append to" if appends else "write into"
    what = f"{kind} {path} {[(offset, len(payload)) for offset, payload in doubts]}{' flushed' * flushes}"
    return Act(what=what, perform=perform, apply=apply, edits=path, doubts=doubts, creates=appends)


def _truncate(estate: Estate, rng: random.Random) -> Act:
    path = _path(estate, rng)
    is_long = any(name == path and len(file.content) > INLINE_BYTES_MAX for name, file in estate.tree.files())
    length = rng.choice([0, 30, 4000] if is_long else [10, 5000, CHUNK_SIZE_BYTES_MIN, CHUNK_SIZE_BYTES_MIN + 60])

    async def perform(core: Core) -> None:
        await core.truncate(estate.at(path), length)

    return Act(what=f"truncate {path} {length}", perform=perform, apply=lambda tree: tree.file(path).truncate(length))


def _mkdir(estate: Estate, rng: random.Random) -> Act:
    path = rng.choice(DIRECTORIES)

    async def perform(core: Core) -> None:
        await Namespace(core).mkdir(estate.at(path), 0o755, False, False)

    return Act(what=f"mkdir {path}", perform=perform, apply=lambda tree: tree.mkdir(path))


def _rename(estate: Estate, rng: random.Random) -> Act:
    source = _path(estate, rng, file=rng.random() < 0.6)
    target, overwrite = _place(estate, rng), rng.random() < 0.7

    async def perform(core: Core) -> None:
        await Namespace(core).rename(estate.at(source), estate.at(target), overwrite)

    return Act(
        what=f"rename {source} {target}{' over' * overwrite}",
        perform=perform,
        apply=lambda tree: tree.rename(source, target, overwrite=overwrite),
    )


def _link(estate: Estate, rng: random.Random) -> Act:
    source, target = _path(estate, rng), _place(estate, rng)

    async def perform(core: Core) -> None:
        await Namespace(core).link(estate.at(source), estate.at(target))

    return Act(what=f"link {source} {target}", perform=perform, apply=lambda tree: tree.link(source, target))


def _remove(estate: Estate, rng: random.Random) -> Act:
    path = _path(estate, rng, file=rng.random() < 0.7)
    recursive, trash = rng.random() < 0.6, rng.random() < 0.4
    ids: list[str] = []

    async def perform(core: Core) -> None:
        ids.append(await Namespace(core).remove(estate.at(path), recursive, trash, "any"))

    def apply(tree: Tree) -> None:
        node = tree.remove(path, recursive=recursive)
        if ids and ids[0]:
            estate.trash[ids[0]] = (estate.now_s, path, node)

    what = f"remove {path}{' and all in it' * recursive}{' to the trash' * trash}"
    return Act(what=what, perform=perform, apply=apply)


def _restore(estate: Estate, trash_id: str) -> Act:
    _, path, node = estate.trash.pop(trash_id)

    async def perform(core: Core) -> None:
        await Namespace(core).trash_restore(trash_id, "")

    return Act(what=f"restore {path}", perform=perform, apply=lambda tree: tree.restore(path, node))


def _list(estate: Estate, rng: random.Random) -> Act:
    path = rng.choice(["", _path(estate, rng, file=False)])

    async def perform(core: Core) -> list[tuple[str, int]]:
        return [(name, _length(inode)) for name, inode in await Namespace(core).entries(estate.at(path))]

    def apply(tree: Tree) -> list[tuple[str, int]]:
        return [(name, _model_length(tree.node(f"{path}/{name}" if path else name))) for name in tree.names(path)]

    return Act(what=f"list {path}", perform=perform, apply=apply)


def _stat(estate: Estate, rng: random.Random) -> Act:
    path = rng.choice(PATHS)

    async def perform(core: Core) -> int:
        return _length(await core.stat(estate.at(path)))

    return Act(what=f"stat {path}", perform=perform, apply=lambda tree: _model_length(tree.node(path)))


def _length(inode: Inode) -> int:
    """A file's, or -1."""
    return -1 if inode.is_dir else inode.length


def _model_length(node: Node) -> int:
    return len(node.content) if isinstance(node, ModelFile) else -1


# ---- small things


def _body(tag: bytes, length: int) -> bytes:
    return (tag * (length // len(tag) + 1))[:length]


def _shown(got: Any) -> str:
    if isinstance(got, EmberError):
        return f"{type(got).__name__}: {got}"
    return f"{len(got)} bytes" if isinstance(got, bytes) else repr(got)


async def _nothing(core: Core) -> None:
    """Of an act that is not done by `_act`."""


class _Closing:
    """Closes a file as `File` does: after an error what is not written is given up."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self._file.close()
        elif issubclass(kind, EmberError):
            with contextlib.suppress(EmberError):
                await self._file.discard()


async def _content(core: Core, inode: Inode, path: str) -> bytes:
    view = memoryview(bytearray(inode.length))
    count = await core.read_range(Range(inode, 0, view, path))
    return bytes(view[:count])


async def _walk(core: Core, path: str) -> Seen:
    """All that is below a directory; nothing if it is not there."""
    seen: Seen = {}
    pending = [""]
    while pending:
        above = pending.pop()
        try:
            entries = await Namespace(core).entries(f"{path}/{above}" if above else path)
        except NotFound:
            assert not above
            return {}
        for name, inode in entries:
            place = f"{above}/{name}" if above else name
            if inode.is_dir:
                seen[place] = None
                pending.append(place)
            else:
                seen[place] = await _content(core, inode, f"{path}/{place}")
    return seen
