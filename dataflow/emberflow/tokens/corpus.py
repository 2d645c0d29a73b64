"""From a corpus of texts to token shards, and to a tokenizer of its own.

The texts become tokens in tasks on the session's executor. What a task has made lasts as all steps do, so with a
`data_root` a run that died goes on from there. Then this process packs the documents into one group, in the order of
the rows of the source: the same bytes, however many workers there were.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from ..dataframe import DataFrame
from ..errors import DatasetExists, InvalidArgument
from ..progress import row_progress
from ..query import quoted
from ..session import Session, init
from ..sources import STAGING_PREFIX, StorageOptions, open_url
from .group import GroupMode, GroupPlace, GroupWriter, TokensReport, writing
from .tokenizer import CONFIG, Tokenizer, load_tokenizer

Source = DataFrame | str | Sequence[str]

BATCH_DOCUMENTS = 1024
EOS = "<|endoftext|>"
VOCABULARY_MIN = 257
"""Of a byte-level tokenizer: all bytes, and the eos token."""

_VERSION = 1
"""Of what a task makes of a text: another one does not find the steps of this."""
_COMPRESSIONS = (".gz", ".zst")


def tokenize(
    source: Source,
    url: str,
    *,
    tokenizer: str | Tokenizer,
    text_column: str = "text",
    mode: GroupMode = "error",
    session: Session | None = None,
    progress: bool | None = None,
) -> TokensReport:
    """Writes the texts of `source` as token shards at `url`, which is there when all of it is.

    `source`: a frame, or paths, patterns or directories of Parquet or JSON lines, read by `session` (by default one of
    its own). `tokenizer`: one, or "byte", "v4", or the URL of a tokenizer.json. A row whose text is NULL or empty is no
    document, and is counted. `progress` shows bars; by default on a terminal.

    Raises `DatasetExists` if `mode` is "error" and there is something at `url`; `InvalidArgument` for no documents, a
    column that is not there or no text, or a tokenizer without an eos token; ImportError for one that is not installed.
    """
    with _session_for(source, session) as session:
        options = session.config.storage_options
        words = tokenizer if not isinstance(tokenizer, str) else load_tokenizer(tokenizer, storage_options=options)
        vocabulary = words.vocabulary()
        GroupPlace(url, mode, options).check()
        texts = _texts(session, source, text_column)
        # One thread a task: the rows keep their order.
        texts = DataFrame(session, replace(texts.query, deterministic=True))
        tokens = texts.map_batches(
            _Pack(words),
            batch_size=BATCH_DOCUMENTS,
            schema={"tokens": "UINTEGER[]"},
            version=f"{_VERSION} {vocabulary.tokenizer_hash}",
        )

        def packed() -> TokensReport:
            made = session.jobs.compute(tokens.frame, progress=progress)
            skipped = 0
            with (
                row_progress(f"packing {url}", show=progress) as advance,
                writing(url, vocabulary, mode=mode, storage_options=options) as group,
            ):
                for batch in session.jobs.batches(made):
                    skipped += _add(group, batch.column(0))
                    advance(batch.num_rows)
            return TokensReport(url=url, documents=group.documents, tokens=group.tokens_count, skipped=skipped)

        return session.jobs.whole(packed)


def train_tokenizer(
    source: Source,
    url: str,
    *,
    vocab_size: int,
    text_column: str = "text",
    eos: str = EOS,
    sample: float | None = None,
    mode: GroupMode = "error",
    session: Session | None = None,
    progress: bool | None = None,
) -> Tokenizer:
    """Trains a byte-level BPE of `vocab_size` tokens, `eos` among them, and writes it: to `url` if that ends in .json,
    else to `url`/tokenizer.json, with a tokenizer_config.json beside it that names `eos`; of one that is there, `mode`
    "overwrite" keeps all else. Gives the tokenizer.

    Equal texts in equal order make equal files. What the texts consist of, each different word once, is held in this
    process: of a large corpus take a `sample`, a fraction of the texts by their hash. A small one may not have so many
    tokens in it. Raises as `tokenize` does.
    """
    if vocab_size < VOCABULARY_MIN:
        raise InvalidArgument(f"a byte-level tokenizer has at least {VOCABULARY_MIN} tokens, not {vocab_size}")
    try:
        from tokenizers import Tokenizer as Trained
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ImportError("training a tokenizer needs tokenizers: pip install 'emberline[text]'") from error
    with _session_for(source, session) as session:
        filesystem, path = open_url(url, session.config.storage_options)
        path = path if path.endswith(".json") else posixpath.join(path, "tokenizer.json")
        config_path = posixpath.join(posixpath.dirname(path), CONFIG)
        for name in (path, config_path) if mode == "error" else ():
            if filesystem.exists(name):
                raise DatasetExists(f'{name} exists; pass mode="overwrite" to replace it')
        config = {**_config(filesystem, config_path), "eos_token": eos}
        texts = _texts(session, source, text_column)
        if sample is not None:
            texts = texts.sample(sample)
        trained = Trained(models.BPE())
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trained.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[eos],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        with row_progress(f"reading for {url}", show=progress) as advance:
            trained.train_from_iterator(_read(texts, advance), trainer)
        filesystem.makedirs(posixpath.dirname(path), exist_ok=True)
        _put(filesystem, config_path, json.dumps(config, indent=2))
        _put(filesystem, path, trained.to_str(pretty=True))
        return load_tokenizer(
            url if url.endswith(".json") else f"{url.rstrip('/')}/tokenizer.json",
            storage_options=session.config.storage_options,
        )


class _Pack:
    """What tasks do: a batch of texts to a batch of lists of tokens, NULL for no document."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, table: pa.Table) -> pa.Table:
        texts = table.column(0).to_pylist()
        is_document = np.array([bool(text) for text in texts], bool)
        lengths = np.zeros(len(texts), np.int64)
        flat, lengths[is_document] = self._tokenizer.pack([text for text in texts if text])
        ends = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), mask=pa.array(~is_document))
        return pa.table({"tokens": lists})


def _add(group: GroupWriter, lists: pa.ListArray) -> int:
    """Adds a batch that `_Pack` made; gives how many of its rows are no documents."""
    lists = lists.drop_null() if (skipped := lists.null_count) else lists
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    group.add(lists.flatten().to_numpy(), lengths)
    return int(skipped)


def _session_for(source: Source, session: Session | None) -> AbstractContextManager[Session]:
    if isinstance(source, DataFrame):
        if session is not None and session is not source.session:
            raise InvalidArgument("the frame is of another session")
        return nullcontext(source.session)
    return nullcontext(session) if session is not None else init()


def _texts(session: Session, source: Source, column: str) -> DataFrame:
    """The one column."""
    frame = source if isinstance(source, DataFrame) else _read_files(session, source)
    named = next((name for name in frame.columns if name.lower() == column.lower()), None)
    if named is None:
        raise InvalidArgument(f"there is no column {column!r}: the columns are {', '.join(frame.columns)}")
    if frame.schema[named] != "VARCHAR":
        raise InvalidArgument(f"the column {named!r} is of type {frame.schema[named]}, not text")
    return frame.select(quoted(named))


def _read_files(session: Session, source: str | Sequence[str]) -> DataFrame:
    paths = [source] if isinstance(source, str) else list(source)
    kinds = {_kind(path, session.config.storage_options) for path in paths}
    if len(kinds) != 1:
        raise InvalidArgument(f"a corpus is files of one kind, Parquet or JSON lines, not of {len(kinds)}")
    return session.read_json(paths) if kinds == {"json"} else session.read_parquet(paths)


def _kind(path: str, options: StorageOptions) -> str:
    """ "json" or "parquet", by the name, or for a directory by the names in it."""
    filesystem, inner = open_url(path, options)
    names = [path] if not filesystem.isdir(inner) else sorted(filesystem.find(inner))
    for name in names:
        for compression in _COMPRESSIONS:
            name = name.removesuffix(compression)
        if name.endswith((".jsonl", ".json", ".ndjson")):
            return "json"
        if name.endswith(".parquet"):
            return "parquet"
    raise InvalidArgument(
        f"{path} holds neither Parquet nor JSON lines: other files are for a frame (session.read_csv)"
    )


def _read(texts: DataFrame, advance: Callable[[int], None]) -> Iterator[list[str]]:
    for batch in texts.to_batches(BATCH_DOCUMENTS):
        yield [text for text in batch.column(0).to_pylist() if text]
        advance(batch.num_rows)


def _config(filesystem: Any, path: str) -> dict[str, Any]:
    """What the tokenizer_config.json at `path` says; nothing if there is none."""
    try:
        config = json.loads(filesystem.cat_file(path))
    except FileNotFoundError:
        return {}
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise InvalidArgument(f"will not overwrite {path}: it holds something else than a tokenizer's settings")
    return config


def _put(filesystem: Any, path: str, text: str) -> None:
    """A file, whole or not at all."""
    folder, name = posixpath.split(path)
    made = posixpath.join(folder, f"{STAGING_PREFIX}{name}")
    filesystem.pipe_file(made, text.encode())
    filesystem.mv(made, path)
