"""Token shards: what is written, what is read at random, in which order. Run: pytest tests/dataflow/test_tokens.py"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import pickle
import resource
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import emberflow.tokens.batches as batches_module
import emberflow.tokens.dataset as dataset_module
import emberfs
import fsspec
import numpy as np
import pytest
import zarr
from emberflow import DatasetExists, DatasetNotFound, InvalidArgument, TokenDataset, TokensInvalid, write_tokens
from emberflow.tokens import array, group, ranges
from emberflow.tokens.order import Order
from emberfs.storage.service import granule_log2_of
from emberfs.types import Chunks
from fsspec.core import url_to_fs
from hypothesis import given, settings
from hypothesis import strategies as st

VOCABULARY = 500
EOS = 499
WORDS = {"tokenizer": "numbers", "tokenizer_hash": "sha256:1", "vocab_size": VOCABULARY, "eos_id": EOS}

Documents = list[np.ndarray[Any, Any]]


def documents(count: int, *, longest: int = 60, seed: int = 0) -> Documents:
    """Rows of random tokens, some of them empty, without eos."""
    random = np.random.default_rng(seed)
    return [random.integers(0, EOS, random.integers(0, longest)) for _ in range(count)]


def stream(texts: Documents) -> np.ndarray[Any, Any]:
    """All of them end to end, as they are stored."""
    return np.concatenate([np.append(text, EOS) for text in texts]).astype(np.uint32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays of several chunks and files, without much in them."""
    monkeypatch.setattr(array, "CHUNK_ITEMS", 64)
    monkeypatch.setattr(array, "SHARD_CHUNKS", 3)


@pytest.fixture
def dataset(root: str, small_chunks: None) -> Iterator[TokenDataset]:
    write_tokens(f"{root}/corpus", documents(100), **WORDS)
    with TokenDataset(f"{root}/corpus", sequence_tokens=50, seed=7) as dataset:
        yield dataset


# ---- the order


@given(length=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_each_epoch_is_a_permutation(length: int, seed: int, epoch: int) -> None:
    assert sorted(Order(length, seed).at(epoch * length + np.arange(length))) == list(range(length))


@given(
    length=st.integers(1, 2**50),
    seed=st.integers(0, 2**64),
    begin=st.integers(0, 2**60),
    cuts=st.lists(st.integers(0, 9)),
)
@settings(max_examples=60, deadline=None)
def test_any_part_of_the_order_is_known_by_itself(length: int, seed: int, begin: int, cuts: list[int]) -> None:
    order = Order(length, seed)
    whole = order.at(begin + np.arange(sum(cuts)))
    places = itertools.accumulate(cuts, initial=begin)
    assert [*whole] == [
        number for at, count in zip(places, cuts, strict=False) for number in order.at(at + np.arange(count))
    ]
    assert all(0 <= number < length for number in whole)


def test_the_order_is_the_same_in_every_version() -> None:
    assert Order(10, 0).at(0 + np.arange(20)).tolist() == [1, 0, 9, 3, 5, 6, 2, 8, 7, 4, 0, 3, 9, 5, 8, 4, 2, 7, 1, 6]
    assert Order(1_000_003, 42).at(5_000_000 + np.arange(4)).tolist() == [875190, 614236, 764823, 100918]
    assert Order(2**40 + 1, -1).at(2**60 + np.arange(3)).tolist() == [786717224244, 741545620568, 343702977698]


def test_the_order_shows_no_pattern() -> None:
    """Neighbours are as far from each other, and seeds and epochs agree as seldom, as they would by chance."""
    length = 10_000
    first, other, later = (
        Order(length, 1).at(0 + np.arange(length)),
        Order(length, 2).at(0 + np.arange(length)),
        Order(length, 1).at(length + np.arange(length)),
    )
    assert abs(np.abs(np.diff(first)).mean() / (length / 3) - 1) < 0.03
    for one, two in itertools.combinations((first, other, later, np.arange(length)), 2):
        assert np.count_nonzero(one == two) < 12
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.05


# ---- what is read


@pytest.mark.usefixtures("small_chunks")
def test_zarr_reads_what_was_written(root: str) -> None:
    texts = documents(100)
    report = write_tokens(f"{root}/corpus", texts, **WORDS)
    found = zarr.open_group(f"{root}/corpus", mode="r")
    assert (report.documents, report.tokens) == (100, len(stream(texts)))
    assert found["tokens"].dtype == np.uint32 and found["offsets"].dtype == np.int64
    assert np.array_equal(found["tokens"][:], stream(texts))
    assert found["offsets"][:].tolist() == [0, *itertools.accumulate(len(text) + 1 for text in texts)]
    assert found.attrs["vocab_size"] == VOCABULARY and found.attrs["eos_id"] == EOS


@pytest.mark.parametrize("length", [1, 63, 64, 65, 191, 192, 193, 384, 1000])
@pytest.mark.usefixtures("small_chunks")
def test_arrays_end_at_chunks_at_shards_and_between(tmp_path: Path, length: int) -> None:
    text = np.arange(length - 1) % EOS
    write_tokens(str(tmp_path / "corpus"), [text], **WORDS)
    assert np.array_equal(zarr.open_group(tmp_path / "corpus", mode="r")["tokens"][:], stream([text]))
    if length > 1:
        with TokenDataset(str(tmp_path / "corpus"), sequence_tokens=length - 1) as dataset:
            assert np.array_equal(dataset.read([0]).tokens[0], stream([text]))
            assert not list(dataset.verify())


def test_a_store_has_fine_checksums_of_shards(tmp_path: Path) -> None:
    store = f"ember://{tmp_path}/store"
    write_tokens(f"{store}/!/corpus", documents(3000), **WORDS)
    with emberfs.connect(store) as client:
        layout = client.stat("/corpus/tokens/c/0").layout
    assert isinstance(layout, Chunks)
    assert 1 << granule_log2_of(layout.chunk_size_bytes) == 4096


@pytest.mark.parametrize("has_native", [False, True])
@given(data=st.data())
def test_a_token_is_found_wherever_it_is(has_native: bool, data: st.DataObject) -> None:
    tokens = np.array(data.draw(st.lists(st.integers(0, data.draw(st.sampled_from([0, 1, 40]))), max_size=150)), "<u4")
    tokens = tokens[data.draw(st.integers(0, 3)) :]
    with pytest.MonkeyPatch.context() as patch:
        if not has_native:
            patch.setattr(dataset_module, "native", None)
        assert dataset_module._places(tokens, 0).tolist() == [at for at, token in enumerate(tokens) if token == 0]


def test_samples_are_windows_of_the_stream(dataset: TokenDataset) -> None:
    tokens = stream(documents(100))
    assert dataset.tokens_count == len(tokens) and len(dataset) == (len(tokens) - 1) // 50
    numbers = [*range(len(dataset)), 0, 3, 3]
    samples = dataset.read(numbers)
    assert samples.tokens.dtype == np.uint32 and samples.tokens.flags.c_contiguous and samples.tokens.flags.writeable
    for row, starts, number in zip(samples.tokens, samples.starts, numbers, strict=True):
        begin = number * 50
        assert np.array_equal(row, tokens[begin : begin + 51])
        assert starts.dtype == np.int64
        assert starts.tolist() == [0, *(i for i in range(1, 50) if tokens[begin + i - 1] == EOS)]
    empty = dataset.read([])
    assert empty.tokens.shape == (0, 51) and empty.starts == ()
    for wrong in ([-1], [len(dataset)]):
        with pytest.raises(IndexError, match="from 0 to"):
            dataset.read(wrong)


def seen(dataset: TokenDataset, steps: int, batch: int, **options: Any) -> list[tuple[int, list[list[int]]]]:
    with dataset.batches(batch, **options) as batches:
        return [(step.step, step.samples.tokens.tolist()) for step in itertools.islice(batches, steps)]


@pytest.mark.parametrize("prefetch", [0, 1, 4, 9])
def test_ranks_share_one_order_over_epochs(dataset: TokenDataset, prefetch: int) -> None:
    steps = 3 * len(dataset) // 12 + 1
    whole = seen(dataset, steps, 12)
    assert [step for step, _ in whole] == list(range(steps))
    flat = [tuple(sample) for _, samples in whole for sample in samples]
    for epoch in range(3):
        of_epoch = flat[epoch * len(dataset) : (epoch + 1) * len(dataset)]
        assert sorted(of_epoch) == sorted(map(tuple, dataset.read(range(len(dataset))).tokens.tolist()))
    for ranks in (2, 4):
        parts = [seen(dataset, steps, 12, rank=rank, ranks=ranks, prefetch=prefetch) for rank in range(ranks)]
        together = [[sample for _, samples in part for sample in samples] for part in zip(*parts, strict=True)]
        assert together == [samples for _, samples in whole]
        start = steps // 2
        assert seen(dataset, 5, 12, rank=1, ranks=ranks, start=start, prefetch=prefetch) == parts[1][start : start + 5]


def test_small_steps_are_read_two_at_a_time(dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    read_rows = TokenDataset.read_rows

    def counting(self: TokenDataset, rows: Any, begin: int, end: int) -> Any:
        calls.append(end - begin)
        return read_rows(self, rows, begin, end)

    monkeypatch.setattr(TokenDataset, "read_rows", counting)
    for prefetch, at_once in ((0, 1), (3, 1), (4, 2), (7, 2)):
        calls.clear()
        seen(dataset, 5, 12, prefetch=prefetch)
        assert set(calls) == {12 * at_once}
        # What was asked for when the fifth was given: no more than `prefetch` behind it.
        assert len(calls) * at_once <= 5 + prefetch
    monkeypatch.setattr(batches_module, "_PAIRED_BYTES_MAX", 24 * 51 * 4 - 1)
    calls.clear()
    seen(dataset, 5, 12, prefetch=4)
    assert set(calls) == {12}


def test_batches_go_on_where_they_were(dataset: TokenDataset) -> None:
    expected = seen(dataset, 9, 4)
    with dataset.batches(4) as batches:
        for _ in range(3):
            next(batches)
        batches.close()
        with pickle.loads(pickle.dumps(batches)) as other:
            assert other.step == batches.step == 3
            told = [(step.step, step.samples.tokens.tolist()) for step in itertools.islice(other, 3)]
        assert told == expected[3:6]
        assert next(batches).samples.tokens.tolist() == expected[3][1]


@pytest.mark.parametrize("prefetch", [2, 4])
def test_a_step_that_could_not_be_read_is_read_again(
    dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch, prefetch: int
) -> None:
    expected = seen(dataset, 4, 4)
    with dataset.batches(4, prefetch=prefetch) as batches:
        next(batches)
        batches.close()
        with monkeypatch.context() as patch:
            patch.setattr(ranges.Files, "read", lambda self, wanted: Path(__file__, "no").read_bytes())
            with pytest.raises(NotADirectoryError):
                next(batches)
        told = [(step.step, step.samples.tokens.tolist()) for step in itertools.islice(batches, 3)]
    assert told == expected[1:4]


def test_an_interrupted_step_is_given_again(dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = seen(dataset, 6, 4)
    with dataset.batches(4) as batches:
        next(batches)
        with monkeypatch.context() as patch:
            patch.setattr(batches, "_read_ahead", lambda: _raise(RuntimeError("can't start new thread")))
            with pytest.raises(RuntimeError):
                next(batches)
        assert batches.step == 1
        told = [next(batches)]
        batches._ready.clear()
        batches._reading.popleft()
        told.append(next(batches))
        batches._ready.popleft()
        told += [next(batches) for _ in range(3)]
    assert [(step.step, step.samples.tokens.tolist()) for step in told] == expected[1:6]


def _raise(error: Exception) -> None:
    raise error


def tell(connection: Any, batches: Any) -> None:
    connection.send([(step.step, step.samples.tokens.tolist()) for step in itertools.islice(batches, 4)])
    batches.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_the_same(dataset: TokenDataset, method: str) -> None:
    if method == "spawn" and dataset.url.startswith("memory:"):
        pytest.skip("nobody else has this process' memory")
    expected = seen(dataset, 7, 4)
    context = multiprocessing.get_context(method)
    with dataset.batches(4) as batches:
        next(batches), next(batches), next(batches)  # now threads read ahead, files are open, and a step is ready
        ours, theirs = context.Pipe()
        process = context.Process(target=tell, args=(theirs, batches))
        process.start()
        assert ours.poll(60) and ours.recv() == expected[3:7]
        process.join(60)
        assert process.exitcode == 0
        assert [next(batches).samples.tokens.tolist() for _ in range(4)] == [samples for _, samples in expected[3:7]]


def test_a_fingerprint_is_of_what_decides_the_batches(root: str) -> None:
    def fingerprint(name: str, texts: Documents, sequence: int = 20, seed: int = 0, **words: Any) -> str:
        write_tokens(f"{root}/{name}", texts, **WORDS | words)
        with TokenDataset(f"{root}/{name}", sequence_tokens=sequence, seed=seed) as dataset:
            return dataset.fingerprint

    texts = documents(30)
    first = fingerprint("a", texts)
    assert first == fingerprint("b", texts, tokenizer="the same, by another name")
    others = [
        fingerprint("c", documents(30, seed=1)),
        fingerprint("d", texts, 21),
        fingerprint("e", texts, seed=1),
        fingerprint("f", texts, tokenizer_hash="sha256:2"),
    ]
    assert len({first, *others}) == 5


# ---- what is refused


def test_what_cannot_be_written_is_refused_and_leaves_nothing(root: str) -> None:
    bad: list[tuple[list[Any], dict[str, Any], str]] = [
        ([], {}, "no documents"),
        ([[1], [2, EOS, 3]], {}, "document 1 has the eos token 499 inside"),
        ([[1], [VOCABULARY]], {}, "document 1 has ids outside"),
        ([[-1]], {}, "ids outside"),
        ([[[1]]], {}, "row of integers"),
        ([[0.5]], {}, "row of integers"),
        ([[1]], {"vocab_size": 2**32 + 1}, "32 bits"),
        ([[1]], {"eos_id": VOCABULARY}, "not in the vocabulary"),
        ([[1]], {"mode": "append"}, "mode is"),
    ]
    for texts, words, message in bad:
        with pytest.raises(InvalidArgument, match=message):
            write_tokens(f"{root}/corpus", texts, **WORDS | words)
    filesystem, path = url_to_fs(root)
    assert not filesystem.find(path)


def test_an_existing_group_is_kept_or_replaced_whole(root: str) -> None:
    url = f"{root}/corpus"
    write_tokens(url, [[1, 2, 3]], **WORDS)
    with pytest.raises(DatasetExists, match="overwrite"):
        write_tokens(url, [[4, 5, 6]], **WORDS)
    with pytest.raises(InvalidArgument):
        write_tokens(url, [[4, EOS, 6]], **WORDS, mode="overwrite")
    with TokenDataset(url, sequence_tokens=3) as dataset:
        assert dataset.read([0]).tokens.tolist() == [[1, 2, 3, EOS]]
    write_tokens(url, [[4, 5, 6, EOS]], **WORDS, mode="overwrite")
    with TokenDataset(url, sequence_tokens=3) as dataset:
        assert dataset.read([0]).tokens.tolist() == [[4, 5, 6, EOS]]
    filesystem, path = url_to_fs(root)
    assert not [name for name in filesystem.find(path) if "emberflow" in name]
    filesystem.makedirs(f"{path}/other")
    filesystem.pipe_file(f"{path}/other/data.bin", b"x")
    with pytest.raises(InvalidArgument, match="something else"):
        write_tokens(f"{root}/other", [[1]], **WORDS, mode="overwrite")


@pytest.mark.parametrize("dies", ["before", "behind"])
def test_an_overwrite_that_dies_between_its_moves_is_ended(
    root: str, monkeypatch: pytest.MonkeyPatch, dies: str
) -> None:
    """Back if it had not said that it is ready, else forth."""
    url = f"{root}/corpus"
    write_tokens(url, [[1, 2, 3]], **WORDS)
    note = group.GroupPlace._note

    def dying(self: group.GroupPlace, name: str) -> None:
        if name != "ready":
            note(self, name)
            return
        if dies == "behind":
            note(self, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(group.GroupPlace, "_note", dying)
        with pytest.raises(KeyboardInterrupt):
            write_tokens(url, [[4, 5, 6]], **WORDS, mode="overwrite")
    with pytest.raises(DatasetNotFound):
        TokenDataset(url, sequence_tokens=3)
    with pytest.raises(DatasetExists):
        write_tokens(url, [[7]], **WORDS)
    with TokenDataset(url, sequence_tokens=3) as dataset:
        assert dataset.read([0]).tokens.tolist() == [[*([1, 2, 3] if dies == "before" else [4, 5, 6]), EOS]]
    filesystem, path = url_to_fs(root)
    assert not [name for name in filesystem.find(path) if "emberflow" in name]


def test_what_is_in_the_way_is_no_place_to_move_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a directory that came at the last moment."""
    url = tmp_path / "corpus"
    note = group.GroupPlace._note

    def late(self: group.GroupPlace, name: str) -> None:
        note(self, name)
        if name == "ready":
            url.mkdir()

    monkeypatch.setattr(group.GroupPlace, "_note", late)
    with pytest.raises(DatasetExists, match="in the way"):
        write_tokens(str(url), [[1, 2, 3]], **WORDS)
    assert not list(url.iterdir())
    url.rmdir()
    with pytest.raises(DatasetExists, match="overwrite"):
        write_tokens(str(url), [[4, 5, 6]], **WORDS)
    with TokenDataset(str(url), sequence_tokens=3) as dataset:
        assert dataset.read([0]).tokens.tolist() == [[1, 2, 3, EOS]]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of a file's size stands for it: what is in the file's buffer fails again as it is closed."""
    monkeypatch.setattr(array, "CHUNK_ITEMS", 1 << 14)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 14, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tokens(str(tmp_path / "corpus"), [np.zeros(1 << 16, int)], **WORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_local_corpus_is_on_disk_before_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(group, "sync", lambda path: synced.append(path))
    moved = group.GroupPlace._move

    def move(self: group.GroupPlace, source: str, target: str, **order: str) -> None:
        assert set(synced) == {source, *self.filesystem.find(source, withdirs=True)}
        moved(self, source, target, **order)

    monkeypatch.setattr(group.GroupPlace, "_move", move)
    write_tokens(str(tmp_path / "corpus"), [[1, 2, 3]], **WORDS)
    assert synced[-1] == str(tmp_path)


def test_a_writer_that_was_overtaken_writes_nothing_to_the_other(root: str) -> None:
    first, second = (group.GroupPlace(f"{root}/corpus", "error") for _ in range(2))
    first.begin()
    second.begin()
    assert first.new != second.new
    first.filesystem.makedirs(first.new, exist_ok=True)
    first.filesystem.pipe_file(f"{first.new}/late", b"x")
    with pytest.raises(DatasetExists, match="took over"):
        first.settle()
    first.discard()
    assert not first.filesystem.exists(first.new)
    second.settle()
    second.discard()
    filesystem, path = url_to_fs(root)
    assert not filesystem.find(path)


def test_of_two_writers_at_once_one_wins_whole(root: str) -> None:
    def slow() -> Iterator[Sequence[int]]:
        yield [1] * 10
        write_tokens(f"{root}/corpus", [[2] * 10], **WORDS)
        yield [1] * 10

    with pytest.raises((DatasetExists, OSError)):
        write_tokens(f"{root}/corpus", slow(), **WORDS)
    with TokenDataset(f"{root}/corpus", sequence_tokens=10) as dataset:
        assert dataset.read([0]).tokens.tolist() == [[2] * 10 + [EOS]] and not list(dataset.verify())


@pytest.mark.usefixtures("small_chunks")
def test_tokens_of_an_overwritten_corpus_are_not_mixed(root: str) -> None:
    url = f"{root}/corpus"
    write_tokens(url, documents(100), **WORDS)
    with TokenDataset(url, sequence_tokens=50) as dataset, TokenDataset(url, sequence_tokens=50) as other:
        dataset.read([0])  # one of several files is open
        write_tokens(url, documents(100, longest=80, seed=1), **WORDS, mode="overwrite")
        with pytest.raises(TokensInvalid, match="replaced"):
            dataset.read([len(dataset) - 1])
        with pytest.raises(TokensInvalid, match="replaced"):
            pickle.loads(pickle.dumps(other)).read([0])


def test_what_is_no_group_is_told_apart(root: str) -> None:
    filesystem, path = url_to_fs(root)
    with pytest.raises(DatasetNotFound, match="corpus tokenize"):
        TokenDataset(f"{root}/nothing", sequence_tokens=3)
    with pytest.raises(DatasetNotFound):
        TokenDataset(root, sequence_tokens=3)
    write_tokens(f"{root}/corpus", [[1, 2, 3]], **WORDS)
    metadata = json.loads(filesystem.cat_file(f"{path}/corpus/zarr.json"))

    def refused(message: str, **attributes: Any) -> None:
        changed = metadata | {"attributes": metadata["attributes"] | attributes}
        filesystem.pipe_file(f"{path}/corpus/zarr.json", json.dumps(changed).encode())
        with pytest.raises(TokensInvalid, match=message):
            TokenDataset(f"{root}/corpus", sequence_tokens=3)

    refused("version 2, and this program reads version 1", version=2)
    refused("its format is", format="other")
    refused("not whole", checksums=None)
    filesystem.pipe_file(f"{path}/corpus/zarr.json", b'{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(TokensInvalid, match="says nothing"):
        TokenDataset(f"{root}/corpus", sequence_tokens=3)


def test_another_tokenizer_and_too_few_tokens_are_refused(root: str) -> None:
    write_tokens(f"{root}/corpus", [[1, 2, 3]], **WORDS)
    TokenDataset(f"{root}/corpus", sequence_tokens=3, tokenizer_hash="sha256:1").close()
    with pytest.raises(InvalidArgument, match="'numbers'"):
        TokenDataset(f"{root}/corpus", sequence_tokens=3, tokenizer_hash="sha256:2")
    with pytest.raises(InvalidArgument, match="4 tokens, too few for a sample of 4"):
        TokenDataset(f"{root}/corpus", sequence_tokens=4)
    with TokenDataset(f"{root}/corpus", sequence_tokens=1) as dataset:
        for batch, options in ((0, {}), (3, {"ranks": 2}), (2, {"rank": 2, "ranks": 2}), (1, {"start": -1})):
            with pytest.raises(InvalidArgument):
                dataset.batches(batch, **options)


# ---- damage


def flipped(filesystem: Any, path: str, at: int) -> None:
    data = bytearray(filesystem.cat_file(path))
    data[at] ^= 1
    filesystem.pipe_file(path, bytes(data))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda fs, path: flipped(fs, f"{path}/tokens/c/1", 70), "tokens/c/1: the chunk at byte 0 is damaged"),
        (lambda fs, path: flipped(fs, f"{path}/tokens/c/1", -9), "the index at its end is damaged"),
        (lambda fs, path: flipped(fs, f"{path}/offsets/c/0", 8), "offsets/c/0: the chunk at byte 0 is damaged"),
        (lambda fs, path: fs.rm_file(f"{path}/tokens/c/2"), "tokens/c/2"),
        (lambda fs, path: fs.pipe_file(f"{path}/tokens/c/2", b"short"), "tokens/c/2 is shorter"),
        (
            lambda fs, path: fs.cp_file(f"{path}/tokens/c/0", f"{path}/tokens/c/1"),
            "not what the group was written with",
        ),
    ],
)
def test_verify_finds_damage(tmp_path: Path, harm: Callable[[Any, str], None], message: str) -> None:
    url = str(tmp_path / "corpus")
    write_tokens(url, documents(60), **WORDS)
    with TokenDataset(url, sequence_tokens=5) as dataset:
        assert not list(dataset.verify())
        harm(fsspec.filesystem("file"), url)
    with TokenDataset(url, sequence_tokens=5) as dataset:
        assert any(message in problem for problem in dataset.verify())
