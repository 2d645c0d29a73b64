"""Real text as token shards: the sources of Python's own library, as bytes."""

from __future__ import annotations

import encodings
import functools
import json as library
from pathlib import Path

import numpy as np
from emberflow import write_tokens
from numpy.typing import NDArray

EOS = 256
VOCABULARY = 257


@functools.cache
def documents(count: int = 40) -> list[NDArray[np.uint32]]:
    """One a file."""
    folder = Path(library.__file__).parent.parent
    files = sorted(folder.glob("*.py"))[:count]
    assert len(files) == count
    return [np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint32) for file in files]


@functools.cache
def tables() -> list[NDArray[np.uint32]]:
    """Sets of characters, one a file: other text than the rest of the library."""
    files = sorted(Path(encodings.__file__).parent.glob("cp*.py"))
    assert len(files) > 20
    return [np.frombuffer(file.read_bytes(), np.uint8).astype(np.uint32) for file in files]


def shards(folder: Path, *, piece: int | None = None, tokenizer: str = "bytes") -> str:
    """The URL of token shards of all documents; `piece`: each cut into documents of at most that many tokens."""
    whole = documents()
    if piece is not None:
        whole = [document[i : i + piece] for document in whole for i in range(0, len(document), piece)]
    return write(folder / "tokens", whole, tokenizer=tokenizer)


def write(path: Path, whole: list[NDArray[np.uint32]], *, tokenizer: str = "bytes") -> str:
    """The URL of token shards of these documents."""
    write_tokens(str(path), [d for d in whole if len(d)], tokenizer=tokenizer, tokenizer_hash=f"{tokenizer}-1",
                 vocab_size=VOCABULARY, eos_id=EOS)  # fmt: skip
    return str(path)
