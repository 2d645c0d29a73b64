"""A cluster of real processes under load, harmed in turn. `pytest tests/e2e/test_chaos.py --chaos-seconds 600 --seed 7`

What must hold: no answer is wrong, no acknowledged write is lost, no call fails (but for the full disk, which may be
said to be full), and after each fault every chain has all its replicas again. How long anything takes decides nothing.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.chaos_lab import Lab
from tests.e2e.chaos_load import BLOCK_BYTES, BLOCKS, block_of, clean_blocks


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab(tmp_path_factory.mktemp("chaos"))
    try:
        lab.open()
        yield lab
    finally:
        lab.close()


@pytest.fixture
def seconds(request: pytest.FixtureRequest) -> float:
    found: float = request.config.getoption("--chaos-seconds")
    return found


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    seed = request.config.getoption("--seed") or 0
    return random.Random(seed)


# --- the faults: each harms, waits, and mends what does not mend itself


def kill(lab: Lab, rng: random.Random) -> str:
    server = rng.choice(lab.cluster.servers())
    down_s = rng.choice([0.0, 1.0, 4.0])
    server.stop(by=signal.SIGKILL)
    time.sleep(down_s)
    lab.start(server)
    return f"{server.name} killed, {down_s} s down"


def pause(lab: Lab, rng: random.Random) -> str:
    server = rng.choice(lab.cluster.servers())
    pause_s = rng.uniform(1.0, 8.0)
    pid = server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(pause_s)
    finally:
        os.kill(pid, signal.SIGCONT)
    return f"{server.name} paused for {pause_s:.1f} s"


def full_disk(lab: Lab, rng: random.Random) -> str:
    if not lab.has_small_disk:
        return "no full disk: only root may mount one"
    full_s = rng.uniform(1.0, 3.0)
    lab.fill_disk()
    try:
        time.sleep(full_s)
    finally:
        lab.empty_disk()
    return f"the disk of storage-1 full for {full_s:.1f} s"


def flipped_bit(lab: Lab, rng: random.Random) -> str:
    server = rng.choice([each for each in lab.cluster.servers() if each.name.startswith("storage-")])
    index = rng.randrange(BLOCKS)
    before = lab.metric(server, "emberline_storage_repaired_chunks")
    content = clean_blocks()[index]
    lab.flip_bit(server, content)
    # In turn: with nothing else under way it would ask the same replica each time.
    with lab.connect(read_from="round_robin") as client:
        while lab.metric(server, "emberline_storage_repaired_chunks") == before:
            assert client.get("/clean", index * BLOCK_BYTES, BLOCK_BYTES) == content
    return f"a bit flipped on the disk of {server.name}, and repaired"


def partition(lab: Lab, rng: random.Random) -> str:
    if not lab.has_network:
        return "no partition: only root may make networks"
    cut_s = rng.uniform(1.0, 6.0)
    lab.cut()
    try:
        time.sleep(cut_s)
    finally:
        lab.join()
    return f"storage-3 cut off for {cut_s:.1f} s"


FAULTS: list[Callable[[Lab, random.Random], str]] = [kill, pause, full_disk, flipped_bit, partition]


def test_faults_under_load(lab: Lab, rng: random.Random, seconds: float) -> None:
    begin_s = time.monotonic()
    lab.start_load(rng.randrange(1 << 30))
    while True:
        for fault in rng.sample(FAULTS, len(FAULTS)):
            fault_s = time.monotonic()
            said = fault(lab, rng)
            mended_s = time.monotonic()
            lab.wait_serving()
            print(f"{fault_s - begin_s:6.1f} s: {said}; all serve {time.monotonic() - mended_s:.1f} s later")
        if time.monotonic() - begin_s > seconds:
            break
    check(lab)


def test_a_rolling_restart_is_not_noticed(lab: Lab, rng: random.Random) -> None:
    lab.start_load(rng.randrange(1 << 30))
    for server in lab.cluster.servers():
        server.stop()
        lab.start(server)
        lab.wait_serving()
    assert not check(lab), "no disk was full"


def check(lab: Lab) -> int:
    """End the load: nothing was wrong, and all that was acknowledged is there. Returns how often space was refused."""
    reports = lab.end_load()
    for report in reports:
        print(report["calls"], {kind: round(longest_s, 1) for kind, longest_s in report["longest_s"].items()})
    assert [line for report in reports for line in report["wrong"]] == []
    assert [line for report in reports for line in report["errors"]] == []
    assert all(report["calls"][kind] for report in reports for kind in ("write", "read", "clean read", "put"))
    with lab.connect() as client:
        dirty = client.get("/dirty")
        for index in range(BLOCKS):
            block = dirty[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
            number = int.from_bytes(block[:8], "little")
            assert block == block_of(number, index)
            assert lab.board.oldest(index) <= number <= lab.board.sent[index]
        assert client.get("/clean") == b"".join(clean_blocks())
    return sum(report["refused"] for report in reports)
