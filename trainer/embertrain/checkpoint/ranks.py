"""The processes that save and load together: rank 0 decides, the others are told.

Saving goes on in a thread beside the training, so it must not share a process group with it: collective calls of two
threads in one group would meet in any order. The group here is one of its own, over gloo, made by the first call that
all ranks take part in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import RankFailed, TrainError

T = TypeVar("T")


class Ranks:
    """This process among those of the default process group; alone where there is none."""

    def __init__(self) -> None:
        self.alone = not (dist.is_available() and dist.is_initialized())
        self.group: Any = None if self.alone else dist.new_group(backend="gloo")
        self.rank = 0 if self.alone else dist.get_rank()
        self.count = 1 if self.alone else dist.get_world_size()

    def told(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; or what it raises."""
        if self.alone:
            return decide()
        answer: list[Any] = [None, None]
        if self.rank == 0:
            try:
                answer[0] = decide()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def cause(self, failed: CheckpointException) -> BaseException:
        """What to raise for DCP's collection of what all ranks met.

        An error of ours is the same on every rank, so that all react alike; any other is that rank's own.
        """
        rank = min(failed.failures)
        error = failed.failures[rank][0]
        if isinstance(error, TrainError):
            return error
        own = failed.failures.get(self.rank)
        return own[0] if own else RankFailed(f"rank {rank}: {error}")

    def close(self) -> None:
        """Let go of the group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
