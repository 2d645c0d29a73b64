"""Groups of equal keys, waiting for what is to be computed of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import InvalidArgument

if TYPE_CHECKING:
    from .dataframe import DataFrame


class Grouped:
    """What `DataFrame.group_by` gives."""

    def __init__(self, frame: DataFrame, keys: tuple[str, ...]) -> None:
        self._frame = frame
        self._keys = keys

    def agg(self, *aggregates: str) -> DataFrame:
        """A row for each group: its keys, then SQL aggregates: `agg("count(*) AS n", "sum(x) AS total")`. No keys at
        all make one group of everything."""
        if not aggregates:
            raise InvalidArgument('agg() needs at least one aggregate, like "count(*) AS n"')
        from .dataframe import DataFrame

        chosen = ", ".join((*self._keys, *aggregates))
        grouping = f"GROUP BY {', '.join(self._keys)}" if self._keys else ""
        return DataFrame(self._frame.session, self._frame.query.wrapped(f"SELECT {chosen} FROM", grouping))

    def count(self) -> DataFrame:
        """The number of rows of each group, as `count`."""
        return self.agg("count(*) AS count")
