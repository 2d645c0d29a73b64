"""Token shards as samples of one length, in a global random order that is known by index.

Sample i is the S + 1 tokens from i * S on of the documents laid end to end: S to read and, one further, S to predict.
The last token of a sample is the first of the next; what is left over at the end is left out.

Invariant: all state of a run is the number of its step. Which samples a step has follows from the seed, the length and
the step (`order.py`), whoever asks, so any number of ranks sees one global order, and goes on from any step.

A dataset travels to other processes as its address: files are opened where they are read, and again after a fork.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from emberfs.lane import native

from ..errors import InvalidArgument
from ..sources import StorageOptions
from .array import bytes_view
from .group import open_group
from .memory import Memory
from .order import ORDER_VERSION, Order
from .ranges import Files, Rows

if TYPE_CHECKING:
    from .batches import Batches


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples, and where in them documents begin."""

    tokens: npt.NDArray[np.uint32]
    """[B, S + 1]"""
    starts: tuple[npt.NDArray[np.int64], ...]
    """Of each sample the positions in [0, S), rising, at which a document begins, or goes on from the sample before: 0
    is always the first."""

    def part(self, begin: int, end: int) -> Samples:
        """Those from `begin` to before `end`."""
        return Samples(self.tokens[begin:end], self.starts[begin:end])


class TokenDataset:
    """The samples of a group of token shards. Any number of threads may read one."""

    def __init__(
        self,
        url: str,
        *,
        sequence_tokens: int,
        seed: int = 0,
        tokenizer_hash: str | None = None,
        storage_options: StorageOptions | None = None,
    ) -> None:
        """`sequence_tokens` is S; `seed` says the order. With `tokenizer_hash`, only tokens of that tokenizer will do.

        Raises `DatasetNotFound`, `TokensInvalid`, and `InvalidArgument` for another tokenizer's tokens, or too few.
        """
        if sequence_tokens < 1:
            raise InvalidArgument(f"a sample has at least 1 token to predict, not {sequence_tokens}")
        self.url = url
        self.sequence_tokens = sequence_tokens
        self.seed = seed
        self.group = open_group(url, storage_options)
        self._memory = Memory()
        self._files = Files(self.group.url, storage_options or {}, self.group.seal)
        vocabulary = self.group.vocabulary
        if tokenizer_hash is not None and tokenizer_hash != vocabulary.tokenizer_hash:
            raise InvalidArgument(
                f"the tokens at {url} were made by the tokenizer {vocabulary.tokenizer!r} "
                f"({vocabulary.tokenizer_hash}), and its ids mean other texts to the one that was asked for "
                f"({tokenizer_hash})"
            )
        self._length = max(0, (self.tokens_count - 1) // sequence_tokens)
        if not self._length:
            raise InvalidArgument(
                f"{url} has {self.tokens_count:,} tokens, too few for a sample of {sequence_tokens:,} and 1 to predict"
            )
        self._order = Order(self._length, seed)

    @property
    def vocab_size(self) -> int:
        """All tokens are lower."""
        return self.group.vocabulary.vocab_size

    @property
    def eos_id(self) -> int:
        """The token at the end of each document."""
        return self.group.vocabulary.eos_id

    @property
    def tokenizer_hash(self) -> str:
        """Of the tokenizer that made the tokens."""
        return self.group.vocabulary.tokenizer_hash

    @property
    def tokens_count(self) -> int:
        """All tokens, those that are in no sample too."""
        return self.group.tokens.length

    @property
    def documents_count(self) -> int:
        """Documents in all tokens."""
        return self.group.documents

    @property
    def fingerprint(self) -> str:
        """Equal for datasets whose every step is the same: tokens, what they mean, sample length and order."""
        told = [ORDER_VERSION, self.group.content_hash, self.sequence_tokens, self.seed]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"<TokenDataset {self.url!r}: {self._length:,} samples of {self.sequence_tokens:,} tokens>"

    def read(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Samples:
        """The samples of these indices, in 0 to len(self) - 1, in one batch of reads. Raises IndexError."""
        numbers = np.asarray(indices, np.int64).reshape(-1)
        if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < self._length:
            raise IndexError(f"sample numbers are from 0 to {self._length - 1}")
        return self.read_rows(self.rows(numbers), 0, numbers.size)

    def rows(self, numbers: npt.NDArray[np.int64]) -> Rows:
        """Where samples are."""
        return self.group.tokens.rows(numbers * self.sequence_tokens, self.sequence_tokens + 1)

    def read_rows(self, rows: Rows, begin: int, end: int) -> Samples:
        """Those of the samples [begin, end) of `rows`, in one batch of reads."""
        tokens = self._memory.take(end - begin, self.sequence_tokens + 1)
        self._files.read(rows.ranges(begin, end, bytes_view(tokens)))
        return Samples(tokens, _starts(tokens, self.eos_id))

    def indices(
        self, step: int, batch_size: int, *, rank: int = 0, ranks: int = 1, steps: int = 1
    ) -> npt.NDArray[np.int64]:
        """Which samples rank `rank` of `ranks` reads in `steps` steps from `step` on of global batches of `batch_size`:
        [steps, batch_size // ranks]."""
        share = batch_size // ranks
        firsts = (step + np.arange(steps)) * batch_size + rank * share
        return self._order.at((firsts[:, None] + np.arange(share)).reshape(-1)).reshape(steps, share)

    def batches(self, batch_size: int, *, start: int = 0, rank: int = 0, ranks: int = 1, prefetch: int = 4) -> Batches:
        """The steps `start`, `start + 1`, ... for ever, each with `rank`'s share of the step's `batch_size` samples.

        Step s has the samples at [s * batch_size, (s + 1) * batch_size) of the order, which goes on from epoch to
        epoch; rank r reads the r-th of `ranks` equal parts. `prefetch` batches are read ahead by threads, small ones
        two at a time if it is 4 or more; 0: none.
        """
        from .batches import Batches

        return Batches(self, batch_size, step=start, rank=rank, ranks=ranks, prefetch=prefetch)

    def verify(self) -> Iterator[str]:
        """Reads all of the group, and says what is wrong with it, a sentence each."""
        from .verify import problems

        return problems(self.group, self._files)

    def close(self) -> None:
        """Lets go of the files; a read opens them again."""
        self._files.close()
        self._memory.clear()

    def __enter__(self) -> TokenDataset:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _starts(tokens: npt.NDArray[np.uint32], eos_id: int) -> tuple[npt.NDArray[np.int64], ...]:
    """Where documents begin: at the front, and behind each eos token that the sample predicts from."""
    count, width = tokens.shape
    after = _places(tokens.reshape(-1), eos_id) + 1
    rows, places = np.divmod(after, width)
    # Position S is only predicted; behind it, place 0 of the next row is not this one's.
    inside = (places > 0) & (places < width - 1)
    rows, places = rows[inside], places[inside]
    # Of each row a zero, then its places.
    starts = np.zeros(count + len(places), np.int64)
    starts[np.arange(1, len(places) + 1) + rows] = places
    bounds = (np.searchsorted(rows, np.arange(count + 1)) + np.arange(count + 1)).tolist()
    return tuple(starts[begin:end] for begin, end in itertools.pairwise(bounds))


def _places(tokens: npt.NDArray[np.uint32], token: int) -> npt.NDArray[np.int64]:
    """Where `token` is."""
    if native is None:
        return np.flatnonzero(tokens == token)
    # In one pass. numpy takes two, and gives up and awaits the interpreter's lock in each.
    return np.frombuffer(native.find_word(tokens, token), np.int64)
