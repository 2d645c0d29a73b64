"""Checkpoints into a store, beside torch DCP into a plain directory and `torch.save`.

    python -m benchmarks checkpoint --quick

The state is that of a model with AdamW: for each weight two more tensors of its size, fp32. Every side writes with as
many threads, to the same disk, and ends with everything synced. A save of ours checksums what it writes, publishes it,
and removes the one before; DCP and `torch.save` write over theirs. Between passes the store gives back the space of
what was removed, as it does by itself between saves that are minutes apart. A load of ours checks what it reads.

*Blocked* is what an asynchronous save costs the caller once its staging memory is there, by what a synchronous one
takes. DCP keeps such memory, too, with a stager that lives from one save to the next (`cache_staged_state_dict` of its
writer does the same, and needs an accelerator).

With `--quick` no row has a goal: one round of 100 MB says nothing of a disk.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emberfs
import torch
import torch.distributed.checkpoint as dcp
from emberfs import Client
from embertrain.checkpoint import Checkpoints
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.model.presets import preset
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from .runner import Row, compare, verify

THREADS = 2
MIB = 1 << 20
PEER = "dcp"
GOAL = 0.7
"""Of DCP on a plain directory."""
BLOCKING_GOAL = 0.2
"""Of a synchronous save."""
SHAPES = ((4096, 1024), (1024, 4096), (1024, 1024), (1024, 1024), (256, 1024), (1024,), (1024,), (64,))
"""Of the weights of a layer: 16 MiB to 256 bytes."""
STEP_TOKENS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How much there is."""

    data_bytes: int
    rounds: int
    steps: int
    """Of training without a save, for each round."""
    saves: int
    """Asynchronous ones that are timed, after the first. More than rounds: where it was looked at, the first two
    blocked half as long again as the others."""
    has_goals: bool
    shapes: tuple[tuple[int, ...], ...] = SHAPES


FULL = Size(data_bytes=1_250_000_000, rounds=5, steps=10, saves=9, has_goals=True)
QUICK = Size(data_bytes=100_000_000, rounds=1, steps=3, saves=1, has_goals=False)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows. Raises WrongResult where a load gives back something else."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        with warnings.catch_warnings():  # DCP's, at every call, that there is one process
            warnings.simplefilter("ignore")
            state = state_of(size)
            with (
                emberfs.connect(f"ember://{directory}/store") as store,
                Checkpoints(f"ember://{directory}/store/!/run", keep=1, threads=THREADS) as ours,
            ):
                rows = _whole(directory, store, ours, state, size)
                return [*rows, *_blocking(directory, store, ours, state, size), *_steps(ours, state, size)]
    finally:
        torch.set_num_threads(before)


def state_of(size: Size) -> dict[str, Any]:
    """Weights and two moments each, at least so many bytes in all."""
    generator = torch.Generator().manual_seed(0)
    model: dict[str, Tensor] = {}
    moments: dict[str, dict[str, Tensor]] = {}
    held = 0
    while held < size.data_bytes:
        layer = held
        for number, shape in enumerate(size.shapes):
            name = f"layers.{layer}.{number}"
            model[name], first, second = (torch.rand(shape, generator=generator) for _ in range(3))
            moments[name] = {"exp_avg": first, "exp_avg_sq": second}
            held += 3 * 4 * model[name].numel()
    return {"model": model, "optimizer": moments, "step": 1}


def _tensors(state: dict[str, Any]) -> list[Tensor]:
    return [*state["model"].values(), *(each for both in state["optimizer"].values() for each in both.values())]


def _amount(state: dict[str, Any]) -> float:
    return sum(tensor.nbytes for tensor in _tensors(state)) / MIB


def _blank(state: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state["model"].items()},
        "optimizer": {
            name: {key: torch.zeros_like(tensor) for key, tensor in both.items()}
            for name, both in state["optimizer"].items()
        },
        "step": 0,
    }


def _check(found: dict[str, Any], state: dict[str, Any], whose: str) -> None:
    same = all(torch.equal(a, b) for a, b in zip(_tensors(found), _tensors(state), strict=True))
    verify(same and found["step"] == state["step"], f"{whose} gave back another state")


# ---- whole saves and loads


def _whole(directory: Path, store: Client, ours: Checkpoints, state: dict[str, Any], size: Size) -> list[Row]:
    plain, file = directory / "dcp", directory / "torch.pt"
    target = _blank(state)
    amount = _amount(state)
    step = iter(range(1, 1 << 30))

    def save_ours(_: bool) -> float:
        ours.save(next(step), state)
        return amount

    def save_dcp(_: bool) -> float:
        dcp.save(state, storage_writer=_writer(plain))
        return amount

    def save_torch(_: bool) -> float:
        with file.open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())
        return amount

    def load(whose: str, work: Callable[[], Any]) -> Callable[[bool], float]:
        def one(check: bool) -> float:
            if check:
                for tensor in _tensors(target):
                    tensor.zero_()
                target["step"] = 0
            found = work() or target
            if check:
                _check(found, state, whose)
            return amount

        return one

    def load_ours() -> None:
        ours.load(target)

    def load_dcp() -> None:
        dcp.load(target, storage_reader=dcp.FileSystemReader(plain))

    def load_torch() -> Any:
        return torch.load(file)

    goal = GOAL if size.has_goals else None
    what = f"{amount:,.0f} MiB"
    peers = {PEER: save_dcp, "torch.save": save_torch}

    def between() -> None:
        store.collect_garbage(force=True)

    ours.save(next(step), state)  # a store that keeps one has blocks of two, and only the third save meets used ones
    saves = compare(
        f"save {what}, MiB/s", save_ours, peers=peers, baseline=PEER, goal=goal, rounds=size.rounds, between=between
    )
    peers = {PEER: load(PEER, load_dcp), "torch.save": load("torch.load", load_torch)}
    loads = compare(
        f"load {what}, MiB/s", load("ours", load_ours), peers=peers, baseline=PEER, goal=goal, rounds=size.rounds
    )
    return [saves, loads]


def _writer(path: Path) -> dcp.FileSystemWriter:
    return dcp.FileSystemWriter(path, thread_count=THREADS, sync_files=True, overwrite=True)


# ---- asynchronous saves


def _blocking(directory: Path, store: Client, ours: Checkpoints, state: dict[str, Any], size: Size) -> list[Row]:
    plain = directory / "dcp"

    def save_async() -> Callable[[], Any]:
        ours.save_async(1, state)
        return ours.wait

    stager = DefaultStager(StagingOptions(False, False, False, False))  # what else there is needs an accelerator

    def dcp_async() -> Callable[[], Any]:
        future: Any = dcp.async_save(state, storage_writer=_writer(plain), async_stager=stager, no_dist=True)
        return future.result

    for begin in (save_async, dcp_async):  # from here on both have their staging memory
        begin()()
    shares, shares_dcp = [], []
    for _ in range(size.saves):
        store.collect_garbage(force=True)
        whole = _timed(lambda: ours.save(1, state))
        whole_dcp = _timed(lambda: dcp.save(state, storage_writer=_writer(plain)))
        shares.append(_blocked(save_async) / whole)
        shares_dcp.append(_blocked(dcp_async) / whole_dcp)
    stager.close()
    return [
        Row(
            row="caller blocked by an asynchronous save, of a synchronous one",
            ours=statistics.median(shares),
            peers={PEER: statistics.median(shares_dcp)},
            goal=BLOCKING_GOAL if size.has_goals else None,
            at_most=True,
        )
    ]


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _blocked(begin: Callable[[], Callable[[], Any]]) -> float:
    """Seconds until the caller may go on; then the rest is waited for."""
    began = time.perf_counter()
    wait = begin()
    took = time.perf_counter() - began
    wait()
    return took


# ---- training beside a write


def _steps(ours: Checkpoints, state: dict[str, Any], size: Size) -> list[Row]:
    model = Model(preset("micro"))
    model.reset_parameters(torch.Generator().manual_seed(0))
    ids = torch.randint(0, model.config.vocab_size, (STEP_TOKENS,), generator=torch.Generator().manual_seed(0))
    batch = Batch.of([(0, STEP_TOKENS)])
    torch.set_num_threads(1)  # `run` puts it back; threads of so small a product would wait for each other

    def one() -> None:
        model.zero_grad()
        model(ids, batch).logits.float().logsumexp(-1).sum().backward()

    one()
    alone, beside = [], []
    for _ in range(size.rounds):
        alone += [_timed(one) for _ in range(size.steps)]
        ours.save_async(1, state)
        beside.append(_timed(one))  # of a tiny save there is only one
        while ours.saving:
            beside.append(_timed(one))
        ours.wait()
    return [
        Row(
            row="training step beside a write, ms",
            ours=1000 * statistics.median(beside),
            peers={"no save": 1000 * statistics.median(alone)},
        )
    ]
