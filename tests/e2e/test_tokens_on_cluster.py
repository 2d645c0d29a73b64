"""Token batches of a cluster on this host: the same by lanes as otherwise, and a fork copies them.

Run: pytest tests/e2e/test_tokens_on_cluster.py
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from emberflow import TokenDataset, write_tokens
from emberflow.tokens.batches import TokenBatch
from emberfs.cluster.local import LocalCluster, Plan

SEQUENCE, BATCH, STEPS = 1000, 8, 40


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    cluster = LocalCluster(tmp_path_factory.mktemp("tokens") / "cluster")
    cluster.up(Plan(cluster="tokens", replicas=1, targets_per_disk=2, nodes=["storage-1"], tls=False))
    tokens = np.random.default_rng(3).integers(2, 1000, SEQUENCE * BATCH * STEPS + 1, np.uint32)
    corpus = f"{cluster.url}/corpus"
    write_tokens(corpus, [tokens], tokenizer="none", tokenizer_hash="none", vocab_size=1000, eos_id=1)
    yield corpus
    cluster.down()


@pytest.fixture
def dataset(url: str) -> Iterator[TokenDataset]:
    with TokenDataset(url, sequence_tokens=SEQUENCE) as dataset:
        yield dataset


def copy_of(dataset: TokenDataset, step: int) -> Any:
    """What a step has, read in another way."""
    indices = dataset.indices(step, BATCH).reshape(-1)
    return np.stack([dataset.read([index]).tokens[0] for index in indices.tolist()])


def _child(held: TokenBatch, dataset: TokenDataset, connection: Any) -> None:
    before = held.samples.tokens.copy()
    connection.send("began")
    connection.recv()
    is_whole = np.array_equal(held.samples.tokens, before)
    held.samples.tokens[:] = 0
    with dataset.batches(BATCH, start=5) as batches:
        connection.send((is_whole, next(batches).samples.tokens))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_copies_the_batches_that_there_are(dataset: TokenDataset) -> None:
    """Neither the parent's later batches nor what one of them does to its own is seen by the other."""
    context = multiprocessing.get_context("fork")
    with dataset.batches(BATCH) as batches:
        for batch in itertools.islice(batches, 3):
            held = batch
        expected = held.samples.tokens.copy()
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(held, dataset, theirs))
        child.start()
        assert ours.poll(60) and ours.recv() == "began"
        mark = held.samples.tokens[0, 0] = 999
        # All blocks of before would be used again by now.
        later = [next(batches).samples.tokens.copy() for _ in range(STEPS)]
        ours.send("go on")
        assert ours.poll(60)
        is_whole, of_child = ours.recv()
        assert is_whole and np.array_equal(of_child, copy_of(dataset, 5))
        child.join(60)
        assert child.exitcode == 0
    assert held.samples.tokens[0, 0] == mark and np.array_equal(held.samples.tokens[1:], expected[1:])
    for step, tokens in enumerate(later, 3):
        assert np.array_equal(tokens, copy_of(dataset, step))
