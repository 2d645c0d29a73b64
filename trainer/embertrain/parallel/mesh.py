"""The ranks of a run, and what each is for: dp * fsdp * ep of them.

Every rank reads samples of its own, so a rank's number is that of its data. Matrices outside experts are cut over fsdp,
with dp * ep copies; experts are spread over ep, then cut over fsdp, with dp copies. Neighbouring ranks differ in ep:
they exchange rows in every layer, and should be close to each other.

`torchrun` says how many ranks there are. Without it there is one, and no process group.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """What the ranks of a run are for: dp * fsdp * ep is their number."""

    dp: int = 0
    """Copies of everything; 0: as many as ranks are left."""
    fsdp: int = 1
    """Ranks over which weights, gradients and optimizer states are cut."""
    ep: int = 1
    """Ranks over which the experts are spread."""
    offload: bool = False
    """Whether weights, gradients and optimizer states of fsdp are in the host's memory between uses."""

    def __post_init__(self) -> None:
        _need(self.dp >= 0, f"dp is 0 (what is left) or more, not {self.dp}")
        _need(self.fsdp >= 1, f"fsdp is 1 or more, not {self.fsdp}")
        _need(self.ep >= 1, f"ep is 1 or more, not {self.ep}")
        _need(not self.offload or self.fsdp > 1, "offload is part of fsdp: it needs fsdp of 2 or more")

    def sizes(self, ranks: int) -> tuple[int, int, int]:
        """dp, fsdp and ep of so many ranks. Raises ConfigError."""
        dp = self.dp or max(1, ranks // (self.fsdp * self.ep))
        count = dp * self.fsdp * self.ep
        _need(
            count == ranks,
            f"dp {dp} * fsdp {self.fsdp} * ep {self.ep} are {count} ranks, but {ranks} were started: change one of "
            f"them, or start the run with torchrun --nproc-per-node {count}",
        )
        return dp, self.fsdp, self.ep


class Mesh:
    """The ranks; a context manager that leaves what `start` joined."""

    def __init__(self, config: ParallelConfig, device: torch.device, *, owned: bool = False) -> None:
        """Of the process group that there is, if there is one. Raises ConfigError."""
        self.device, self.offload = device, config.offload
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.dp, self.fsdp, self.ep = config.sizes(self.ranks)
        self.group = dist.group.WORLD if self.ranks > 1 else None
        self._owned = owned
        self._all: DeviceMesh | None = None
        self._dense: DeviceMesh | None = None
        if self.ranks > 1:
            self._all = init_device_mesh(device.type, (self.dp, self.fsdp, self.ep), mesh_dim_names=_NAMES)
            ranks = torch.arange(self.ranks).view(self.dp, self.fsdp, self.ep)
            copies = ranks.transpose(1, 2).reshape(-1, self.fsdp)
            self._dense = DeviceMesh(device.type, copies, mesh_dim_names=("copies", "fsdp"))

    @staticmethod
    def start(
        config: ParallelConfig, device: torch.device | None = None, *, environment: Mapping[str, str] = os.environ
    ) -> Mesh:
        """Joins the ranks that torchrun started, on `device` or this machine's accelerator of that local rank.

        Raises ConfigError, before anybody waits for anybody.
        """
        ranks = int(environment.get("WORLD_SIZE", "1"))
        config.sizes(ranks)
        if device is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device = accelerator or torch.device("cpu")
        if device.type != "cpu":
            torch.accelerator.set_device_index(int(environment.get("LOCAL_RANK", "0")))
        if ranks == 1 or dist.is_initialized():
            return Mesh(config, device)
        backend = dist.get_default_backend_for_device(device)
        if device.type != "cpu":
            backend = f"cpu:gloo,{device.type}:{backend}"  # What is in the host's memory crosses too: checkpoints.
        dist.init_process_group(backend)
        return Mesh(config, device, owned=True)

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the process group, if `start` joined it."""
        if self._owned:
            dist.destroy_process_group()
            self._owned = False

    @property
    def dense(self) -> DeviceMesh:
        """Over which weights outside experts are cut: fsdp, within copies where there are copies."""
        assert self._dense is not None
        return self._dense if self.dp * self.ep > 1 else self._dense["fsdp"]

    @property
    def experts(self) -> DeviceMesh:
        """Over which a rank's own experts are cut, likewise."""
        assert self._all is not None
        return self._all["dp", "fsdp"] if self.dp > 1 else self._all["fsdp"]

    def along(self, name: str) -> DeviceMesh:
        """The ranks that differ from this one in `name` alone: dp, fsdp or ep."""
        assert self._all is not None
        return self._all[name]

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks; a tensor of its own."""
        total = tensor.clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        return total


_NAMES = ("dp", "fsdp", "ep")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(f"parallel: {message}")
