"""Damaged and missing intermediates: whose tasks have to run again.

Their maker's has, and if what it makes may come out otherwise, the tasks of all who read the earlier attempt, near or
far. Of several tasks that meet the same damage the first one says so.

Does not know: when tasks run.
"""

from __future__ import annotations

from collections.abc import Callable

from ..errors import ExchangeCorrupt
from ..plan.pipes import Stage
from ..sources import StorageOptions, open_kept, open_url
from .states import Stages, TaskState
from .steps import Output


class Repair:
    """Of one job. `again` has a task run once more; `tell` is told of tasks whose output was damaged, and why."""

    def __init__(
        self,
        stages: Stages,
        storage_options: StorageOptions,
        *,
        again: Callable[[TaskState], None],
        tell: Callable[[TaskState, str], None],
    ) -> None:
        self._stages = stages
        self._storage_options = storage_options
        self._again = again
        self._tell = tell
        self._dropped: set[str] = set()
        """Damaged files whose makers have been told."""

    def mend(self, error: ExchangeCorrupt) -> bool:
        """Has the maker of a damaged file run again, the makers of files that went with it, and all who read what may
        come out otherwise; whether that was news. Raises the error if nobody here has made the file."""
        maker = next(
            (t for t in self._stages.tasks() if t.output is not None and self._path(t.output) == error.path), None
        )
        if maker is None:
            if error.path not in self._dropped:
                raise error
            # Another has met the same damage before.
            return False
        gone = [
            t for t in maker.stage.tasks if t.output is not None and t is not maker and not self._has_file(t.output)
        ]
        for task in (maker, *gone):
            assert task.output is not None
            self._dropped.add(self._path(task.output))
            self._tell(task, str(error))
            self._again(task)
        if not maker.stage.repeatable:
            self._again_after(maker.stage.stage)
        return True

    def _again_after(self, stage: Stage) -> None:
        """Has everything run again that comes from a stage's rows, near or far."""
        touched = {stage.exchange.id}
        for state in self._stages:
            if touched.isdisjoint(exchange.id for exchange in state.stage.inputs()):
                continue
            touched.add(state.stage.exchange.id)
            for task in state.tasks:
                if task.output is not None:
                    self._again(task)

    def _has_file(self, output: Output) -> bool:
        filesystem, path = open_kept(output.url, self._storage_options)
        return bool(filesystem.exists(path))

    def _path(self, output: Output) -> str:
        return open_url(output.url, self._storage_options)[1] if output.url else ""
