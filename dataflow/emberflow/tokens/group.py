"""A group of token shards: the zarr v3 group that holds a corpus as tokens, written once and then only read.

    <url>/zarr.json           the group; its attributes say what the tokens are. Put last: without it there is no group
    <url>/tokens/...          uint32 [tokens]: all documents, one after the other, each with its eos token at its end
    <url>/offsets/...         int64 [documents + 1]: where each document begins, and the end of the last

Invariant: the eos token is nowhere else than at the end of a document, so the tokens by themselves say where documents
begin. All tokens are lower than the vocabulary's size.

A group is made in a hidden directory beside its place, and moved there when it is whole.

Does not know: text, or how tokens are read at random.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import DatasetExists, DatasetNotFound, InvalidArgument, TokensInvalid
from ..sources import STAGING_PREFIX, StorageOptions, open_url, protocol_of, url_of
from .array import METADATA, ArrayLayout, ArrayWriter
from .ranges import Seal

FORMAT = "emberline-tokens"
VERSION = 1
VOCABULARY_SIZE_MAX = 1 << 32

_OWNER = "owner"
_READY = "ready"

GroupMode = Literal["error", "overwrite"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """What token ids mean."""

    tokenizer: str
    """What people call it."""
    tokenizer_hash: str
    """Equal hashes: equal tokens for equal texts."""
    vocab_size: int
    """All ids are lower."""
    eos_id: int
    """The token that ends a document."""

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= VOCABULARY_SIZE_MAX:
            raise InvalidArgument(f"tokens are 32 bits: a vocabulary of {self.vocab_size:,} does not fit")
        if not 0 <= self.eos_id < self.vocab_size:
            raise InvalidArgument(f"the eos token {self.eos_id} is not in the vocabulary of {self.vocab_size:,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TokensReport:
    """What was written."""

    url: str
    documents: int
    tokens: int
    """The eos tokens of the documents among them."""
    skipped: int = 0
    """Rows without text, which are no documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenGroup:
    """A group as its metadata describes it."""

    url: str
    """The same from every working directory."""
    vocabulary: Vocabulary
    tokens: ArrayLayout
    offsets: ArrayLayout
    checksums: tuple[str, str]
    """Of the tokens and of the offsets: SHA-256 over the CRC32C of all chunks, 4 bytes each, little-endian."""
    seal: Seal
    """Its zarr.json, which has the checksums in it: other tokens, another seal."""

    @property
    def documents(self) -> int:
        return self.offsets.length - 1

    @property
    def size_bytes(self) -> int:
        """Of its files, but for a few metadata."""
        return self.tokens.size_bytes + self.offsets.size_bytes

    @property
    def content_hash(self) -> str:
        """Equal for equal tokens of equal meaning."""
        told = [VERSION, self.vocabulary.tokenizer_hash, self.tokens.length, self.documents, *self.checksums]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def open_group(url: str, storage_options: StorageOptions | None = None) -> TokenGroup:
    """The group at `url`. Raises `DatasetNotFound`, and `TokensInvalid` for what is no group of this version."""
    filesystem, path = open_url(url, storage_options or {})
    path = path.rstrip("/")
    try:
        seal = Seal(metadata := posixpath.join(path, METADATA), filesystem.cat_file(metadata))
        fields = json.loads(seal.held)
        attributes = fields["attributes"]
        written_as, version = attributes["format"], attributes["version"]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DatasetNotFound(
            f"no token shards at {url}: `emberline corpus tokenize` or emberflow.tokenize() writes them"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise TokensInvalid(f"{url} holds no token shards: {METADATA} says nothing of them") from error
    if written_as != FORMAT:
        raise TokensInvalid(f"{url} holds no token shards: its format is {written_as!r}")
    if version != VERSION:
        raise TokensInvalid(
            f"the token shards at {url} are of version {version}, and this program reads version {VERSION}: "
            "update emberline, or tokenize the corpus again"
        )
    try:
        vocabulary = Vocabulary(
            **{name: attributes[name] for name in ("tokenizer", "tokenizer_hash", "vocab_size", "eos_id")}
        )
        tokens, offsets = (
            ArrayLayout.from_json(f"{path}/{name}", kind, filesystem.cat_file(f"{path}/{name}/{METADATA}"))
            for name, kind in (("tokens", "uint32"), ("offsets", "int64"))
        )
        checksums = (str(attributes["checksums"]["tokens"]), str(attributes["checksums"]["offsets"]))
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise TokensInvalid(f"the token shards at {url} are not whole: {error!r}") from error
    return TokenGroup(
        url=url_of(filesystem, path), vocabulary=vocabulary, tokens=tokens, offsets=offsets, checksums=checksums,
        seal=seal,
    )  # fmt: skip


def write_tokens(
    url: str,
    documents: Iterable[Sequence[int] | npt.NDArray[Any]],
    *,
    tokenizer: str,
    tokenizer_hash: str,
    vocab_size: int,
    eos_id: int,
    mode: GroupMode = "error",
    storage_options: StorageOptions | None = None,
) -> TokensReport:
    """Writes documents, each the ids of its tokens with or without the eos token at the end, as a group at `url`.

    Raises `InvalidArgument` for no documents, an id that is not in the vocabulary, or an eos token inside a document;
    `DatasetExists` if `mode` is "error" and there is something at `url`.
    """
    vocabulary = Vocabulary(tokenizer=tokenizer, tokenizer_hash=tokenizer_hash, vocab_size=vocab_size, eos_id=eos_id)
    with writing(url, vocabulary, mode=mode, storage_options=storage_options) as group:
        for document in documents:
            ids = np.asarray(document)
            if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
                raise InvalidArgument(f"a document is a row of integers, not {ids.dtype} {list(ids.shape)}")
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
                raise InvalidArgument(f"document {group.documents} has ids outside of the vocabulary of {vocab_size:,}")
            if not ids.size or ids[-1] != eos_id:
                ids = np.append(ids.astype(np.uint32), np.uint32(eos_id))
            group.add(ids.astype("<u4", copy=False), np.array([ids.size]))
    return TokensReport(url=url, documents=group.documents, tokens=group.tokens_count)


class GroupWriter:
    """Writes a group's arrays into a directory."""

    def __init__(self, filesystem: Any, path: str, vocabulary: Vocabulary) -> None:
        self._filesystem = filesystem
        self._path = path
        self._vocabulary = vocabulary
        self._tokens = ArrayWriter(filesystem, posixpath.join(path, "tokens"), "uint32")
        self._offsets = ArrayWriter(filesystem, posixpath.join(path, "offsets"), "int64")
        self._offsets.append(np.zeros(1, np.int64))

    @property
    def documents(self) -> int:
        return self._offsets.length - 1

    @property
    def tokens_count(self) -> int:
        return self._tokens.length

    def add(self, tokens: npt.NDArray[np.uint32], lengths: npt.NDArray[Any]) -> None:
        """Adds documents: their tokens, one document after the other, each with its eos token, and their lengths."""
        ends = np.cumsum(lengths, dtype=np.int64)
        assert len(tokens) == (ends[-1] if len(ends) else 0)
        if len(tokens) and int(tokens.max()) >= self._vocabulary.vocab_size:
            raise InvalidArgument(
                f"a document has the token {int(tokens.max())}, and the vocabulary is {self._vocabulary.vocab_size:,}"
            )
        eos_at = np.flatnonzero(tokens == self._vocabulary.eos_id)
        if not np.array_equal(eos_at, ends - 1):
            (wrong,) = np.setxor1d(eos_at, ends - 1)[:1]
            document = self.documents + int(np.searchsorted(ends, wrong, side="right"))
            raise InvalidArgument(
                f"document {document} has the eos token {self._vocabulary.eos_id} inside, or not at its end: it ends "
                "documents, and is nowhere else"
            )
        self._offsets.append(self.tokens_count + ends)
        self._tokens.append(tokens)

    def close(self) -> None:
        """Makes a group of what was added. Raises `InvalidArgument` if that is nothing."""
        if not self.documents:
            raise InvalidArgument("there are no documents to write")
        attributes = {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self._vocabulary),
            "documents": self.documents,
            "checksums": {},
        }
        for name, array in (("tokens", self._tokens), ("offsets", self._offsets)):
            array.close()
            attributes["checksums"][name] = checksum_of(array.sums)
        fields = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        self._filesystem.pipe_file(posixpath.join(self._path, METADATA), json.dumps(fields, indent=2).encode())

    def discard(self) -> None:
        """Lets go of what is open, after a failure."""
        self._tokens.discard()
        self._offsets.discard()


def checksum_of(sums: Sequence[int]) -> str:
    """The checksum of an array by those of its chunks."""
    return hashlib.sha256(np.array(sums, "<u4").tobytes()).hexdigest()


@contextmanager
def writing(
    url: str, vocabulary: Vocabulary, *, mode: GroupMode = "error", storage_options: StorageOptions | None = None
) -> Iterator[GroupWriter]:
    """The block writes the group at `url`, which is there, whole, when the block has ended without an exception."""
    place = GroupPlace(url, mode, storage_options)
    place.begin()
    writer = GroupWriter(place.filesystem, place.new, vocabulary)
    try:
        yield writer
        writer.close()
        place.settle()
    except BaseException:
        try:
            writer.discard()
        finally:
            place.discard()
        raise
    # If this fails, the parts are for the next attempt to find.
    place.publish()


class GroupPlace:
    """Where a group goes, and the hidden directory beside it where it is made: the same one for each attempt, so that
    what a dead one left is found, and put in place or taken away. In it

        owner       whose attempt is under way
        <owner>/    what it makes
        old/        what it replaces, set aside
        ready       the owner, once only the move of what it made to its place is left to do
    """

    def __init__(self, url: str, mode: GroupMode, storage_options: StorageOptions | None = None) -> None:
        if mode not in ("error", "overwrite"):
            raise InvalidArgument(f"mode is error or overwrite, not {mode!r}")
        self.url = url
        self.mode = mode
        self.filesystem: Any
        self.filesystem, path = open_url(url, storage_options or {})
        self._path = path.rstrip("/")
        parent, name = posixpath.split(self._path)
        if not name:
            raise InvalidArgument(f"token shards need a directory of their own, not the root of a store: {url!r}")
        id = hashlib.sha256(url_of(self.filesystem, self._path).encode()).hexdigest()[:12]
        self._owner = uuid.uuid4().hex
        self._stage = posixpath.join(parent, f"{STAGING_PREFIX}{id}")
        self.new = posixpath.join(self._stage, self._owner)
        self._old = posixpath.join(self._stage, "old")

    def check(self) -> None:
        """Ends what a dead attempt had begun to publish, and refuses a target that may not be touched."""
        self._recover()
        self._refuse()

    def begin(self) -> None:
        """Checks the target, and makes the hidden directory empty."""
        self.check()
        self._remove(self._stage)
        self.filesystem.makedirs(self.new, exist_ok=True)
        self._note(_OWNER)

    def settle(self) -> None:
        """Has the disk keep what was written. Raises `DatasetExists` if another write of the same group has begun."""
        if self._noted(_OWNER) != self._owner:
            raise DatasetExists(f"another write to {self.url} has begun, and took over from this one")
        self._refuse()
        if self._is_local:
            sync_tree(self.new)

    def publish(self) -> None:
        """Puts the group in place: in one step where the filesystem can move a directory so, else its zarr.json last.
        Raises `DatasetExists` if another one came there meanwhile."""
        if self.filesystem.exists(self._path):
            self._move(self._path, self._old, first=METADATA)
        if self.filesystem.exists(self._path):
            self._remove(self.new)
            raise DatasetExists(f"another write to {self.url} came first")
        self._note(_READY)
        self._move(self.new, self._path, last=METADATA)
        self._remove(self._stage)

    def discard(self) -> None:
        """Removes what was made, and the hidden directory unless it is another write's by now."""
        self._remove(self._stage if self._noted(_OWNER) in (self._owner, "") else self.new)

    @property
    def _is_local(self) -> bool:
        return protocol_of(self.filesystem) in ("file", "local")

    def _refuse(self) -> None:
        files = self.filesystem.find(self._path)
        if not files:
            return
        if self.mode == "error":
            raise DatasetExists(f'{self.url} has files already; pass mode="overwrite" to replace it')
        if not self.filesystem.exists(posixpath.join(self._path, METADATA)):
            raise InvalidArgument(f"will not overwrite {self.url}: it holds something else than token shards")

    def _note(self, name: str) -> None:
        self.filesystem.pipe_file(posixpath.join(self._stage, name), self._owner.encode())

    def _noted(self, name: str) -> str:
        """Whose attempt noted that; "" for nobody's."""
        try:
            owner: bytes = self.filesystem.cat_file(posixpath.join(self._stage, name))
        except FileNotFoundError:
            return ""
        return owner.decode()

    def _remove(self, path: str) -> None:
        if self.filesystem.exists(path):
            # Not into a store's trash: nobody wants half a group back.
            for_good = {"trash": False} if protocol_of(self.filesystem) == "ember" else {}
            self.filesystem.rm(path, recursive=True, **for_good)

    def _recover(self) -> None:
        """Ends what an attempt that died had begun to publish. What was ready goes where it should; else what had been
        set aside goes back."""
        if self.filesystem.exists(posixpath.join(self._path, METADATA)):
            return
        for source in (posixpath.join(self._stage, self._noted(_READY)), self._old):
            if self.filesystem.exists(posixpath.join(source, METADATA)):
                self._move(source, self._path, last=METADATA)
                self._remove(self._stage)
                return

    def _move(self, source: str, target: str, *, first: str = "", last: str = "") -> None:
        """Moves all files of a directory; where that is not one step, with the one of a name before or after others."""
        if self._is_local or protocol_of(self.filesystem) == "ember":
            if self.filesystem.exists(target):
                # It would go into that, not there.
                raise DatasetExists(f"{target} is in the way of the token shards in {source}: remove it and try again")
            self.filesystem.mv(source, target, recursive=True)
            if self._is_local:
                sync(posixpath.dirname(target))
            return
        names = [name[len(source) + 1 :] for name in self.filesystem.find(source)]
        for name in sorted(names, key=lambda name: (name == last, name != first)):
            destination = posixpath.join(target, name)
            self.filesystem.makedirs(posixpath.dirname(destination), exist_ok=True)
            self.filesystem.mv(posixpath.join(source, name), destination)
        if self.filesystem.exists(source):
            self.filesystem.rm(source, recursive=True)


def sync_tree(folder: str) -> None:
    """Has the disk keep a folder of this machine, and all in it."""
    for inner, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(posixpath.join(inner, name))
        sync(inner)


def sync(path: str) -> None:
    """Has the disk keep a file of this machine, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
