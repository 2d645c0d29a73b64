"""How fast are token batches read at random: beside `preadv` of the same bytes, and beside other loaders?

Everybody reads the same samples in the same order from the page cache, in one process. Ours is `TokenDataset.batches`,
as a trainer uses it: it works the order out, and where documents begin, and reads ahead, by default four batches.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from emberflow import TokenDataset
from emberflow.tokens.group import Vocabulary, writing
from emberfs.cluster.local import LocalCluster, Plan

from .environments import Environment
from .runner import Row, Subject, compare, verify

MI = 1 << 20
BATCH_TOKENS = 1 << 18
DOCUMENT_TOKENS = 1000
"""On average."""
THREADS = 2
"""That read ahead: ours are so many by default, two batches each."""
VOCABULARY = Vocabulary(tokenizer="random", tokenizer_hash="random", vocab_size=129_280, eos_id=1)

CEILING_GOAL = 0.5
PEER_GOAL = 2.0
PEERS = ("streaming", "litdata")
ENVIRONMENT = Environment(
    name="loader", requirements=("mosaicml-streaming>=0.13", "litdata>=0.2.76"), imports="streaming, litdata"
)
WORKER = Path(__file__).with_name("loader_worker.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much work there is."""

    data_bytes: int
    """Of tokens; each peer has them once for each length of a sample."""
    sequences: tuple[int, ...]
    """Tokens of a sample."""
    steps: int
    """Batches in a pass. `FULL` takes all whole batches there are, once."""
    rounds: int
    has_goals: bool


FULL = Size(data_bytes=1024 * MI, sequences=(4096, 16384), steps=1023, rounds=7, has_goals=True)
QUICK = Size(data_bytes=32 * MI, sequences=(4096,), steps=48, rounds=2, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows."""
    raw = directory / "raw"
    tokens = _make(raw, size.data_bytes // 4)
    peers = PEERS if ENVIRONMENT.is_there() else ()
    rows: list[Row] = []
    with _cluster(directory / "cluster") as store:
        urls = {
            "a store": f"{store}/tokens",
            "an embedded store": f"ember://{directory}/embedded/!/tokens",
            "a folder": str(directory / "folder"),
        }
        for url in urls.values():
            _write(url, tokens)
        for sequence in size.sequences:
            for place, url in urls.items():
                # They read plain files, wherever ours are.
                rows += _rows(directory, raw, tokens, place, url, sequence, peers if place == "a store" else (), size)
        rows.append(_resume_row(urls["a store"], size.sequences[0]))
    return rows


def _make(raw: Path, count: int) -> npt.NDArray[np.uint32]:
    """Random tokens in documents, end to end in one file."""
    random = np.random.default_rng(0)
    tokens = random.integers(2, VOCABULARY.vocab_size, count, dtype=np.uint32)
    tokens[random.random(count) < 1 / DOCUMENT_TOKENS] = VOCABULARY.eos_id
    tokens[-1] = VOCABULARY.eos_id
    tokens.tofile(raw)
    return tokens


def _write(url: str, tokens: npt.NDArray[np.uint32]) -> None:
    ends = np.flatnonzero(tokens == VOCABULARY.eos_id) + 1
    with writing(url, VOCABULARY) as group:
        group.add(tokens, np.diff(ends, prepend=0))


@contextmanager
def _cluster(directory: Path) -> Iterator[str]:
    """The URL of a store with one storage server, which runs in processes of its own on this host."""
    cluster = LocalCluster(directory)
    cluster.up(Plan(cluster="bench", replicas=1, targets_per_disk=2, nodes=["storage-1"], tls=False))
    try:
        yield cluster.url
    finally:
        cluster.down()


def _rows(
    directory: Path, raw: Path, tokens: npt.NDArray[np.uint32], place: str, url: str, sequence: int,
    peers: tuple[str, ...], size: Size,
) -> list[Row]:  # fmt: skip
    """Ours from one place: beside `preadv`, and beside each peer."""
    batch = BATCH_TOKENS // sequence
    with contextlib.ExitStack() as stack:
        dataset = stack.enter_context(TokenDataset(url, sequence_tokens=sequence))
        calls = dataset.indices(0, batch, steps=size.steps)
        amount = size.steps * BATCH_TOKENS / 1e6

        def ours(check: bool) -> float:
            with dataset.batches(batch) as batches:
                for step, read in zip(calls, batches, strict=False):
                    if check:
                        for row, number in zip(read.samples.tokens, step.tolist(), strict=True):
                            begin = number * sequence
                            verify(np.array_equal(row, tokens[begin : begin + sequence + 1]), f"sample {number}")
            return amount

        row = compare(
            f"from {place}, {sequence:,} a sample, Mtokens/s",
            ours,
            peers={
                name: stack.enter_context(_peer(name, directory / f"{name}-{sequence}", raw, sequence, calls, amount))
                for name in peers
            },
            ceiling=_preadv(stack, raw, sequence, calls, amount),
            baseline="ceiling",
            goal=CEILING_GOAL if size.has_goals else None,
            rounds=size.rounds,
        )
    goal = PEER_GOAL if size.has_goals else None
    name = f"from {place}, {sequence:,} a sample"
    return [row] + [
        replace(row, row=f"{name}, by {peer}", ratio=row.against(peer), baseline=peer, goal=goal) for peer in peers
    ]


def _preadv(
    stack: contextlib.ExitStack, raw: Path, sequence: int, calls: npt.NDArray[np.int64], amount: float
) -> Subject:
    """The same bytes, by as many threads as ours, into memory that rotates."""
    width = 4 * (sequence + 1)
    batch_bytes = calls.shape[1] * width
    slots = 64 * MI // batch_bytes
    memory = memoryview(bytearray(slots * batch_bytes))
    file = os.open(raw, os.O_RDONLY)
    stack.callback(os.close, file)
    offsets = (calls * (4 * sequence)).tolist()

    def read_step(step: int) -> None:
        at = step % slots * batch_bytes
        for offset in offsets[step]:
            verify(os.preadv(file, (memory[at : at + width],), offset) == width, "the file is too short")
            at += width

    def read(check: bool) -> float:
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(read_step, range(len(offsets))):
                pass
        return amount

    return read


@contextmanager
def _peer(
    name: str, folder: Path, raw: Path, sequence: int, calls: npt.NDArray[np.int64], amount: float
) -> Iterator[Subject]:
    """Another loader in a process of its own; its samples are written first."""
    command = [ENVIRONMENT.python, "-P", WORKER, name, folder, raw, str(sequence)]
    log = folder.with_suffix(".log").open("w")
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    assert worker.stdin is not None and worker.stdout is not None

    def answered() -> None:
        answer = worker.stdout.readline()
        while answer and not answer.startswith("done"):
            answer = worker.stdout.readline()  # The libraries log there.
        verify(answer.startswith("done"), f"{name} failed: see {log.name}")

    def ask(request: dict[str, Any]) -> None:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        answered()

    def read(check: bool) -> float:
        ask({"check": check})
        return amount

    try:
        answered()
        ask({"calls": calls.tolist()})
        yield read
    finally:
        worker.stdin.close()
        worker.terminate()
        worker.wait()
        worker.stdout.close()
        log.close()


def _resume_row(url: str, sequence: int) -> Row:
    """Of runs of 1, 2 and 4 ranks that are cut after each of their steps: how many go on as the uncut one of one rank
    would have."""
    batch, steps = 8, 12
    exact = cuts = 0
    with TokenDataset(url, sequence_tokens=sequence, seed=7) as dataset:
        # Into the second epoch.
        first = len(dataset) // batch - steps // 2
        whole = [tokens.tobytes() for tokens in _steps(dataset, batch, first, steps, 0, 1)]
        for ranks in (1, 2, 4):
            for cut in range(steps + 1):
                parts = [
                    [
                        *_steps(dataset, batch, first, cut, rank, ranks),
                        *_steps(dataset, batch, first + cut, steps - cut, rank, ranks),
                    ]
                    for rank in range(ranks)
                ]
                together = [np.concatenate(step).tobytes() for step in zip(*parts, strict=True)]
                exact += together == whole
                cuts += 1
    return Row(row="resumed runs of 1, 2, 4 ranks that are exact, share", ours=exact / cuts, goal=1.0)


def _steps(
    dataset: TokenDataset, batch: int, start: int, steps: int, rank: int, ranks: int
) -> list[npt.NDArray[np.uint32]]:
    with dataset.batches(batch, start=start, rank=rank, ranks=ranks) as batches:
        return [each.samples.tokens for each in itertools.islice(batches, steps)]
