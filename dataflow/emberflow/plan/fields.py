"""A JSON object of DuckDB's, read strictly: what the reader does not know by name stops it.

A newer DuckDB may say more about an operator than we read. A field nobody read must not be lost silently, so each
object is read field by field, and `done` refuses what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Json: TypeAlias = Any
"""Parsed JSON, whose shape only the reading code knows."""


class NotPlannable(Exception):
    """The query has no plan of ours; DuckDB runs it as one task. `reason` is for people: "a recursive CTE"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Fields:
    """One JSON object. `what` names it in a refusal."""

    def __init__(self, json: Json, what: str) -> None:
        if not isinstance(json, Mapping):
            raise NotPlannable(f"{what}, which DuckDB writes in a way we do not know")
        self._left: dict[str, Json] = dict(json)
        self.what = what

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def __len__(self) -> int:
        return len(self._left)

    def take(self, name: str, default: Json = ...) -> Json:
        """The field's value; without a default it has to be there."""
        if default is ... and name not in self._left:
            raise NotPlannable(f"{self.what} without {name}")
        return self._left.pop(name, default)

    def expect(self, name: str, *values: Json) -> None:
        """The field, if it is there, has one of the values."""
        value = self._left.pop(name, values[0])
        if value not in values:
            raise NotPlannable(f"{self.what} with {name} = {str(value)[:60]}")

    def ignore(self, *names: str) -> None:
        """Fields that cannot change what the rows are."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        for name in self._left:
            raise NotPlannable(f"{self.what} with {name}")
