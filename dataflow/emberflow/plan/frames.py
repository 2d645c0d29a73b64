"""What a DataFrame is made of: SQL over sources, and the operators that SQL has no word for.

A frame is a value, and lazy: making one only says what would be done.

Does not know: how any of it runs, or in how many partitions its rows are (`partitions.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ..functions.steps import PythonStep
from ..job.steps import Output
from ..query import Query
from .nodes import Column
from .pipes import Exchange


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Repartition:
    """The child's rows in `partitions` partitions.

    `keys` are SQL expressions over it: whose hash, or whose value, says which.

    "files" keeps files whole where the child is files; "rows" deals rows out evenly.
    """

    child: Frame
    partitions: int
    by: Literal["files", "rows", "hash", "value"]
    keys: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Shuffle:
    """The child's rows dealt out at random, and in an order, that the seed decides."""

    child: Frame
    partitions: int | None
    """None: as many as the child's, or a number of ours where those are not known."""
    seed: int


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PartialSql:
    """A query over one partition of each of its inputs at a time. If there are several, all have as many partitions,
    or one for all."""

    text: str
    inputs: Mapping[str, Frame]


def input_name(position: int) -> str:
    """What stands in the text of a `PartialSql` where the user wrote `{0}`, `{1}`, ..."""
    return f"emberflow_input_{position}"


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Apply:
    """The user's Python function over the child's rows; partitions stay as they are."""

    child: Frame
    step: PythonStep


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Computed:
    """Rows that a job has made already."""

    exchange: Exchange
    columns: tuple[Column, ...]
    """As the user named them."""
    outputs: tuple[Output, ...]
    partitions: int | None = None
    """In how many partitions they are, if the plan said so: those of the exchange, or an output each."""


Frame: TypeAlias = Query | Repartition | Shuffle | PartialSql | Apply | Computed
