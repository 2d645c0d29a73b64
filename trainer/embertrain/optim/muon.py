"""Muon: momentum whose singular values are all brought to one.

    M <- mu M + G,    U = orthogonal(G + mu M),    W <- (1 - lr * decay) W - lr * rms * sqrt(max(n, m)) * U

`orthogonal` is a Newton-Schulz iteration of matrix products alone: eight steps that bring singular values of any size
near one, and two that settle them there (arXiv 2606.19348 section 2.4; 2502.16982 for the scale, which gives a full
matrix the root mean square that AdamW's updates have, so that both take the same learning rate).

A parameter is one matrix [n, m], or many: a stack [E, n, m], or `parts` of them one below the other, [parts * n, m].
Each is orthogonalised alone.

Parameters that are sharded (FSDP2, expert parallel) are DTensors. Of a stack every rank holds whole matrices, and works
on its own. Single matrices are cut into rows: rank i gathers the i-th of as many matrices as there are ranks, works on
it, and gives every rank its rows back. So each matrix is worked on once, and crosses the network twice, however many
ranks there are; gathering all of them everywhere would be ranks / 2 times the bytes and ranks times the products.

Results have the same bits in every run with as many ranks and threads.

B matrices [n, m].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

Coefficients = tuple[float, float, float]

NEWTON_SCHULZ: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
"""(a, b, c) of each step: X <- a X + (b A + c A A) X with A = X X'."""

_TINY = 1e-20
"""What a norm is at least: a gradient of zeros stays one."""
_NUMBERS_MAX = 1 << 26
"""Numbers of a stack that are worked on at once: what the iteration needs besides is three times as much."""


def orthogonalise(
    matrices_Bnm: Tensor, steps: Sequence[Coefficients] = NEWTON_SCHULZ, dtype: torch.dtype = torch.float32
) -> Tensor:
    """U V' of each matrix U S V', nearly: [B, n, m] in `dtype`, in which it is computed too.

    Singular values of more than 3e-5 of the norm come out within 0.002 of one; those of zero stay zero.
    """
    n, m = matrices_Bnm.shape[1:]
    x = matrices_Bnm.float()
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(_TINY)).to(dtype)
    if n > m:
        x = x.transpose(1, 2)
    for a, b, c in steps:
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if n > m else x


class Muon(torch.optim.Optimizer):
    """Groups of parameters have `parts` beside the usual: how many matrices each parameter holds one below the other.

    `rms` is the root mean square of an update of full rank, over the learning rate; `dtype` that of the iteration.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        rms: float = 0.18,
        steps: Sequence[Coefficients] = NEWTON_SCHULZ,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rms": rms, "parts": 1}
        super().__init__(params, defaults)
        self.steps, self.dtype = tuple(steps), dtype
        for group in self.param_groups:
            for parameter in group["params"]:
                assert parameter.dim() >= 2, "Muon takes matrices"
                assert parameter.shape[-2] % group["parts"] == 0
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have a gradient. Ranks that share a matrix must step together."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        split: dict[dist.ProcessGroup, list[_Update]] = {}
        for update in self._updates():
            ranks = _rows_over(update.parameter)
            if ranks is None:
                update.apply(self._orthogonal(update.direction(), update.parts))
            else:
                split.setdefault(ranks, []).append(update)
        for ranks, updates in split.items():
            # Neighbours in this order are alike, so that ranks have as much to do.
            updates.sort(key=lambda update: update.parameter.shape, reverse=True)
            for i in range(0, len(updates), ranks.size()):
                self._in_turns(updates[i : i + ranks.size()], ranks)
        return loss

    def _updates(self) -> Iterator[_Update]:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    yield _Update(parameter, self.state[parameter]["momentum_buffer"], group)

    def _orthogonal(self, stacked: Tensor, parts: int) -> Tensor:
        """Of a whole parameter, or of whole matrices of it, as it lies in memory."""
        matrices_Bnm = stacked.unflatten(-2, (parts, -1)).flatten(0, -3)
        if matrices_Bnm.shape[0] == 0:
            return stacked
        at_once = max(1, _NUMBERS_MAX // matrices_Bnm[0].numel())
        done = [orthogonalise(some, self.steps, self.dtype) for some in matrices_Bnm.split(at_once)]
        return (torch.cat(done) if len(done) > 1 else done[0]).reshape(stacked.shape)

    def _in_turns(self, updates: Sequence[_Update], group: dist.ProcessGroup) -> None:
        """Of at most as many matrices as there are ranks, each rank's rows: to the i-th rank the i-th, and back."""
        rank, ranks = group.rank(), group.size()
        mine = updates[rank] if rank < len(updates) else None
        sent = [update.direction().to(self.dtype) for update in updates]
        width = mine.parameter.shape[1] if mine else 0
        heights = _rows_of_ranks(mine.parameter.shape[0], ranks) if mine else [0] * ranks
        here = [n * width for n in heights]
        there = [part.numel() for part in sent] + [0] * (ranks - len(sent))

        numbers = _exchange(torch.cat([part.flatten() for part in sent]), there, here, group)
        if mine:
            numbers = self._orthogonal(numbers.view(-1, width), mine.parts).flatten()
        returned = _exchange(numbers, here, there, group)
        for update, rows in zip(updates, returned.split(there[: len(sent)]), strict=True):
            update.apply(rows)


@dataclass(frozen=True, slots=True)
class _Update:
    """What a step does to one parameter, of which this rank may have a shard."""

    parameter: Tensor
    momentum: Tensor
    group: dict[str, Any]

    @property
    def parts(self) -> int:
        parts: int = self.group["parts"]
        return parts

    def direction(self) -> Tensor:
        """What is orthogonalised, in fp32; the momentum moves on. Where weights are offloaded, it is on the device that
        computes nevertheless."""
        assert self.parameter.grad is not None
        momentum, grad = local(self.momentum), local(self.parameter.grad).float()
        momentum.mul_(self.group["momentum"]).add_(grad)
        nesterov = torch.add(grad, momentum, alpha=self.group["momentum"])
        if isinstance(self.parameter, DTensor):
            return nesterov.to(self.parameter.device_mesh.device_type)
        return nesterov

    def apply(self, orthogonal: Tensor) -> None:
        """`orthogonal` is this rank's shard too."""
        lr, n, m = self.group["lr"], self.parameter.shape[-2] // self.parts, self.parameter.shape[-1]
        parameter = local(self.parameter)
        parameter.mul_(1 - lr * self.group["weight_decay"])
        parameter.add_(orthogonal.view(parameter.shape).to(parameter), alpha=-lr * self.group["rms"] * max(n, m) ** 0.5)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard, of the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows_over(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks over which the rows of a matrix are cut; None: every matrix is whole where it is."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    cut = [i for i, placement in enumerate(parameter.placements) if not placement.is_replicate() and mesh.size(i) > 1]
    if not cut or parameter.dim() > 2:
        return None
    assert len(cut) == 1 and parameter.placements[cut[0]].is_shard(0), "a matrix is cut once, and into rows"
    return mesh.get_group(cut[0])


def _rows_of_ranks(rows: int, ranks: int) -> list[int]:
    """As DTensor cuts them, which is as `torch.chunk` does."""
    most = -(-rows // ranks)
    return [max(0, min(rows, (i + 1) * most) - min(rows, i * most)) for i in range(ranks)]


def _exchange(numbers: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = numbers.new_empty(sum(received))
    dist.all_to_all_single(out, numbers, received, sent, group=group)
    return out
