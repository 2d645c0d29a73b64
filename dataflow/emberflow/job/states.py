"""The stages of a job as they stand: which have begun, their tasks, and whose outputs count.

Does not know: how tasks run, or what to do when they fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..executor.base import Handle
from ..plan.pieces import stages_in_pieces
from ..plan.pipes import Exchange, Program, Stage
from .rendering import Rendering
from .shares import Spec
from .steps import Output, Place


@dataclass(eq=False, slots=True)
class TaskState:
    """A task, and how it goes."""

    stage: StageState
    index: int
    spec: Spec
    output: Output | None = None
    attempts: int = 0
    memory_bytes: int = 0
    handles: list[Handle] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.stage.stage.label} {self.stage.stage.id}.{self.index}"


@dataclass(eq=False, slots=True)
class StageState:
    """A stage whose inputs are complete, and its tasks."""

    stage: Stage
    place: Place
    rendering: Rendering
    repeatable: bool
    """Any two attempts put the same rows into each partition."""
    tasks: list[TaskState] = field(default_factory=list)
    reused: int = 0

    @property
    def outputs(self) -> list[Output]:
        return [task.output for task in self.tasks if task.output is not None]

    @property
    def is_done(self) -> bool:
        return all(task.output is not None for task in self.tasks)


class Stages:
    """All stages of a program, in an order in which each comes after those it reads from."""

    def __init__(self, program: Program) -> None:
        self._plan = list(program.stages)
        self._begun: dict[int, StageState] = {}
        """In the order they began."""
        self.given: dict[int, list[Spec]] = {}
        """The tasks of stages whose tasks were known before they began."""

    def __iter__(self) -> Iterator[StageState]:
        """Those that have begun."""
        return iter(self._begun.values())

    def __getitem__(self, stage: Stage) -> StageState:
        return self._begun[stage.id]

    def ready(self) -> Iterator[Stage]:
        """Those that have not begun and could. What is added meanwhile is among them."""
        for stage in self._plan:
            if stage.id not in self._begun and all(map(self.is_complete, stage.inputs())):
                yield stage

    def begin(self, state: StageState) -> None:
        self._begun[state.stage.id] = state

    def add_pieces(self, stage: Stage, pieces: list[Spec]) -> None:
        """Two more stages make the rows of those partitions of `stage` that `pieces` are of."""
        exchanges = (exchange for known in self._plan for exchange in (known.exchange, *known.inputs()))
        first, second = stages_in_pieces(
            stage,
            id=1 + max(known.id for known in self._plan),
            exchange=1 + max(exchange.id for exchange in exchanges),
            pieces=len(pieces),
        )
        self.given[first.id] = pieces
        stage.exchange.producers.append(second)
        place = self._plan.index(stage) + 1
        self._plan[place:place] = [first, second]

    @property
    def is_done(self) -> bool:
        return all(stage.id in self._begun and self._begun[stage.id].is_done for stage in self._plan)

    def is_complete(self, exchange: Exchange) -> bool:
        """Whether all of an exchange's rows are there."""
        return all(stage.id in self._begun and self._begun[stage.id].is_done for stage in exchange.producers)

    def outputs_of(self, exchange: Exchange) -> list[Output]:
        """What the tasks of an exchange's producers have made, in order."""
        if exchange.made is not None:
            return list(exchange.made)
        return [output for stage in exchange.producers for output in self._begun[stage.id].outputs]

    def makers_of(self, stage: Stage) -> list[StageState]:
        """The stages that a stage reads from."""
        return [self._begun[maker.id] for exchange in stage.inputs() for maker in exchange.producers]

    def tasks(self) -> Iterator[TaskState]:
        for state in self:
            yield from state.tasks
