"""Tokens of a model to text as it comes: which tokenizers fit a model, and streams that show whole characters only.

`TextStream` keeps back what may be the beginning of a character. The tokenizers themselves are those that make corpora
(`emberflow.tokens.tokenizer`), so that what a model was trained on is what it is asked.
"""

from __future__ import annotations

from emberflow.tokens.tokenizer import UNKNOWN, ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, v4_tokenizer

from ..errors import VocabularyError

__all__ = [
    "UNKNOWN",
    "V4_VOCABULARY",
    "ByteTokenizer",
    "FileTokenizer",
    "TextStream",
    "Tokenizer",
    "fit",
    "load_tokenizer",
    "v4_tokenizer",
]

V4_VOCABULARY = 129_280
_HELD_BACK = 3
"""Bytes of a character that is not complete, and so the most replacement characters that may yet turn into one."""


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
