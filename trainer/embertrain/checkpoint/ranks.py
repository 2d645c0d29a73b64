"""The processes that save and load together: rank 0 decides, the others are told.

Saving goes on in a thread beside the training, so it must not share a process group with it: collective calls of two
threads in one group would meet in any order. The group here is one of its own, over gloo, made by the first call that
all ranks take part in.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import RankFailed, TrainError

P = ParamSpec("P")
T = TypeVar("T")


def sends_errors(step: Callable[P, T]) -> Callable[P, T]:
    """A step of DCP whose errors every rank is told."""

    @functools.wraps(step)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            if (sent := _sendable(error)) is error:
                raise
            raise sent from error

    return call


def _sendable(error: Exception) -> Exception:
    """Itself, unless it does not survive the way to another rank, as some of other libraries do not: a rank that it
    was lost on would go, and the others wait for it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankFailed(f"{type(error).__name__}: {error}")
    return error


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
                answer[1] = _sendable(error)
        dist.broadcast_object_list(answer, src=0, group=self.group)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def cause(self, failed: CheckpointException) -> BaseException:
        """What to raise for DCP's collection of what all ranks met, which is the same on every rank.

        Where one of them met an error of ours every rank raises that one, so that all react alike, whatever they met
        themselves; without one a rank raises its own.
        """
        errors = {rank: failed.failures[rank][0] for rank in sorted(failed.failures)}
        if ours := next((error for error in errors.values() if isinstance(error, TrainError)), None):
            return ours
        rank = min(errors)
        return errors.get(self.rank) or RankFailed(f"rank {rank}: {errors[rank]}")

    def close(self) -> None:
        """Let go of the group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
            self.group = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
