"""Training of a small model by several real processes, which talk over gloo on this host alone.

A step is what a trainer's is: losses of the next token and of MTP, the balance loss, clipping, and biases moved by the
load of all ranks. Samples differ in how their documents are cut and in how many targets they have, so that nothing is
right by symmetry.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from embertrain.model.batch import Batch
from embertrain.model.model import Model
from embertrain.model.moe import MoE
from embertrain.model.presets import preset
from embertrain.model.router import Router, update_bias
from embertrain.optim import OptimConfig, build, clip, set_lr
from embertrain.parallel import Mesh, ParallelConfig, apply, reduce_gradients
from torch import Tensor
from torch.distributed.tensor import DTensor

from .runs import forkserver

SAMPLES = 4
TOKENS = 160
CUTS: tuple[tuple[int, ...], ...] = ((160,), (60, 100), (100, 60), (30, 130))
"""Documents of each sample: two of the four have none that is as long as the largest window."""
TIMEOUT_S = 280
"""For ranks that wait for each other for ever; a busy machine has taken more than 120 s for fifty steps."""


def start(count: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[BaseProcess]:
    """So many processes that join one process group and do `work(*args)`. Each call wants a folder of its own."""
    context = forkserver()
    folder.mkdir(parents=True, exist_ok=True)
    processes = [context.Process(target=_rank, args=(rank, count, folder, work, args)) for rank in range(count)]
    for process in processes:
        process.start()
    return list(processes)


def ranks(count: int, work: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """What `work(*args)` gives in each of so many processes that have joined one process group."""
    processes = start(count, work, folder, *args)
    try:
        for process in processes:
            process.join(TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error.*"))]
    assert not errors, "\n".join(errors)
    assert all(process.exitcode == 0 for process in processes), f"not done after {TIMEOUT_S} s"
    return [torch.load(folder / f"result.{rank}", weights_only=False) for rank in range(count)]


def _rank(rank: int, count: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
        torch.save(work(*args), folder / f"result.{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"error.{rank}").write_text(traceback.format_exc())
        raise


def each(works: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[Any]:
    """Several works of the same processes, one after the other: starting them takes longer than most."""
    return [work(*args) for work, args in works]


@dataclass(frozen=True)
class Run:
    """What a training left."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def train(
    name: str, parallel: ParallelConfig, optim: OptimConfig, steps: int, lr: float = 2e-3, calls: int | None = None
) -> Run:
    """A rank's part of it, or all of it where there is one process. `calls`: forward calls of a step, of all ranks
    together; if not said, one of each rank."""
    mesh = Mesh(parallel, torch.device("cpu"))
    model = begin(name, mesh, exact=calls is not None)
    return go_on(model, build(model, optim), mesh, range(steps), lr, calls)


def begin(name: str, mesh: Mesh, dtype: torch.dtype = torch.float32, *, exact: bool = False) -> Model:
    model = Model(preset(name))
    model.reset_parameters(torch.Generator().manual_seed(0))
    apply(model, mesh, dtype=dtype, exact=exact)
    return model


def go_on(
    model: Model,
    optimizers: list[torch.optim.Optimizer],
    mesh: Mesh,
    steps: range,
    lr: float = 2e-3,
    calls: int | None = None,
) -> Run:
    """So many steps on; two batches by turns, which a model soon begins to learn. `calls` as in `train`."""
    run = Run([], [], {})
    for step in steps:
        loss, counts = backward(model, mesh, step, calls)
        reduce_gradients(model, mesh)
        run.norms.append(clip(model, 0.5).item())
        set_lr(optimizers, lr)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for router, counts_E in counts:
            update_bias(router, mesh.sum(counts_E), 1e-3)
        run.losses.append(mesh.sum(loss).item())
    run.weights.update((n, whole(t.detach()).clone()) for n, t in model.state_dict().items())
    return run


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def backward(
    model: Model, mesh: Mesh, step: int, calls: int | None = None
) -> tuple[Tensor, list[tuple[Router, Tensor]]]:
    """This rank's part of the mean loss, and its load. `calls` as in `train`."""
    calls = calls or mesh.ranks
    here = calls // mesh.ranks
    parts = [samples(step, mesh.rank * here + i, calls) for i in range(here)]
    valid, valid_further = (mesh.sum(sum((part[i] >= 0).sum() for part in parts)) for i in (1, 2))
    total = torch.zeros((), dtype=torch.float64)
    loads: dict[Router, Tensor] = {}
    for ids, targets, further, batch in parts:
        out = model(ids, batch)
        loss = _sum(out.logits, targets) / valid
        routing = dict(out.aux.routing)
        if model.mtp:
            ahead = model.predict(0, out.residual, targets.clamp_min(0), batch)
            loss = loss + 0.3 * _sum(ahead.logits, further) / valid_further
            routing |= ahead.aux.routing
        for routed in routing.values():
            loss = loss + 1e-2 * routed.balance_loss / calls
        loss.backward()
        total += loss.detach()
        mixtures = [module for module in model.modules() if isinstance(module, MoE)]
        for mixture, routed in zip(mixtures, routing.values(), strict=True):
            if not mixture.gate.spec.hashed:
                loads[mixture.gate] = loads.get(mixture.gate, 0) + routed.counts_E
    return total, list(loads.items())


def _sum(logits: Tensor, targets: Tensor) -> Tensor:
    """In fp64: a sum in fp32 would hide how near the runs are."""
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none").double().sum()


def samples(step: int, rank: int, count: int) -> tuple[Tensor, Tensor, Tensor, Batch]:
    """Tokens, those after them, and those after these, of a rank's part of a step's samples."""
    stream = torch.randint(0, 256, (SAMPLES, TOKENS + 2), generator=torch.Generator().manual_seed(step % 2))
    ids, targets, further = (stream[:, i : i + TOKENS].clone() for i in range(3))
    for sample in range(SAMPLES):
        targets[sample, : 10 * sample] = -100
        further[sample, : 15 * sample] = -100
    part = range(rank * SAMPLES // count, (rank + 1) * SAMPLES // count)
    batch = Batch.of([(0, tokens) for sample in part for tokens in CUTS[sample]])
    mine = slice(part.start, part.stop)
    return ids[mine].flatten(), targets[mine].flatten(), further[mine].flatten(), batch
