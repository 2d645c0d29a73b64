"""Real text as token shards: the sources of Python's own library, as bytes."""

from __future__ import annotations

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


def shards(folder: Path, *, piece: int | None = None, tokenizer: str = "bytes") -> str:
    """The URL of token shards of all documents; `piece`: each cut into documents of at most that many tokens."""
    url = str(folder / "tokens")
    whole = documents()
    if piece is not None:
        whole = [document[i : i + piece] for document in whole for i in range(0, len(document), piece)]
    write_tokens(url, [d for d in whole if len(d)], tokenizer=tokenizer, tokenizer_hash=f"{tokenizer}-1",
                 vocab_size=VOCABULARY, eos_id=EOS)  # fmt: skip
    return url
