"""Python operators over a stream of Arrow batches: map, flat_map, filter, map_batches.

They mean what smallpond's mean. `map` is called with a row as a dict and gives a dict, which is the whole new row, not
merged into the old one. `flat_map` gives any number of them. `filter` keeps the rows for which it gives something true.
`map_batches` is called with tables of exactly `batch_rows` rows (the last one has what is left) and gives a table, or
several. A class in the place of a function is made once per stream and then called: a model is loaded once.

The columns of the output are the step's schema; keys that it has not are dropped, missing ones are NULL. Without a
schema they are what the first rows that come out say (`inference.py`), and later rows must fit. If no row comes out,
the schema is the input's: a caller for whom that matters gives one.

Does not know: where batches come from, sessions, how a stream is divided among workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import pyarrow as pa

from ..errors import CallCancelled, FlowError, InvalidArgument, UserCodeError
from .failure import cut, failed, name_of
from .inference import Misfit, Produced, fitted_rows, fitted_table, schema_of_rows, schema_of_table
from .rows import check_types, rows, with_decimals
from .shipping import by_fields
from .sqltypes import TypeSpec, arrow_schema

Kind: TypeAlias = Literal["map", "flat_map", "filter", "map_batches"]
Batches: TypeAlias = Iterator[pa.RecordBatch]

BATCH_ROWS = 122_880
"""Rows of a table for `map_batches`: what DuckDB puts into a row group."""
_SLICE_ROWS = 8192
"""Rows that are Python objects at one time, for the other kinds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PythonStep:
    """A function of the user's, and how it is applied. A value that travels to workers."""

    kind: Kind
    function: Callable[..., Any]
    schema: Mapping[str, TypeSpec] | pa.Schema | None = None
    """Of what comes out. A mapping of columns to DuckDB types becomes an Arrow schema. None: as the first rows are."""
    batch_rows: int = BATCH_ROWS
    version: str | None = None
    """For the step cache, in place of looking into the function."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidArgument(f"a step is one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if not callable(self.function):
            raise InvalidArgument(f"{self.kind} takes a function, not {cut(self.function)}")
        if self.batch_rows < 1:
            raise InvalidArgument(f"a batch has at least one row, not {self.batch_rows}")
        if self.schema is not None and self.kind == "filter":
            raise InvalidArgument("filter keeps the columns as they are; it takes no schema")
        if self.schema is not None and not isinstance(self.schema, pa.Schema):
            object.__setattr__(self, "schema", arrow_schema(self.schema))
        if self.schema is not None:
            check_types(self.schema)

    @property
    def name(self) -> str:
        """What the function is called."""
        return name_of(self.function)

    def __reduce__(self) -> tuple[object, ...]:
        return by_fields(self)


def apply(
    step: PythonStep,
    batches: Batches,
    schema: pa.Schema,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> tuple[pa.Schema, Batches]:
    """The schema and the batches that come out. Runs as they are drawn; without a schema in the step, up to the first
    rows at once. Raises `UserCodeError`, and `CallCancelled` between two rows once `interrupted`."""
    stream = _Stream(step, interrupted)
    if step.kind == "filter":
        return schema, stream.filtered(batches)
    if step.kind == "map_batches":
        return stream.fitted(stream.tables(batches), schema, schema_of_table, fitted_table)
    made = stream.mapped(batches) if step.kind == "map" else stream.flat_mapped(batches)
    return stream.fitted(made, schema, schema_of_rows, fitted_rows)


class _Stream:
    """One run of a step."""

    def __init__(self, step: PythonStep, interrupted: Callable[[], bool]) -> None:
        self._step = step
        self._interrupted = interrupted
        self._function = step.function
        if isinstance(step.function, type):
            self._function = self._guarded(step.function)

    def filtered(self, batches: Batches) -> Batches:
        for _, batch in _sliced(batches):
            answers = [self._call(row) for row in rows(batch)]
            kept = self._guarded(partial(_truths, answers))
            if any(kept):
                yield batch.filter(pa.array(kept, pa.bool_()))

    def mapped(self, batches: Batches) -> Iterator[Produced]:
        """What comes out of map, a slice at a time."""
        for first, batch in _sliced(batches):
            sources = rows(batch)
            made = [self._call(row) for row in sources]
            self._check_rows(made, sources)
            yield Produced(made, sources, range(first, first + len(made)))

    def flat_mapped(self, batches: Batches) -> Iterator[Produced]:
        """What comes out of flat_map, of a slice at a time."""
        for first, batch in _sliced(batches):
            made: list[Any] = []
            sources: list[Mapping[str, Any]] = []
            numbers: list[int] = []
            for number, row in enumerate(rows(batch), first):
                result = self._call(row)
                if isinstance(result, Mapping | str | bytes) or not isinstance(result, Iterable):
                    raise self._refused(f"gave a {type(result).__name__}, not a list of dicts: {cut(result)}", row)
                # A generator runs only now.
                new = result if isinstance(result, list) else self._guarded(partial(list, result), row)
                made += new
                sources += [row] * len(new)
                numbers += [number] * len(new)
            self._check_rows(made, sources)
            if made:
                yield Produced(made, sources, numbers)

    def tables(self, batches: Batches) -> Iterator[pa.Table]:
        """What comes out of map_batches."""
        for given in _regrouped(batches, self._step.batch_rows):
            result = self._call(given)
            for table in self._tables_of(result):
                if table.num_rows:
                    yield table

    def fitted(
        self,
        made: Iterator[Any],
        given: pa.Schema,
        schema_of: Callable[[Any, pa.Schema], pa.Schema],
        fit: Callable[..., list[pa.RecordBatch]],
    ) -> tuple[pa.Schema, Batches]:
        """What came out, as batches of the step's schema, or of what the first of it says."""
        if self._step.schema is not None:
            return self._step.schema, self._fit(made, self._step.schema, partial(fit, inferred=False))
        first = next(made, None)
        if first is None:
            return given, iter(())
        target = self._guarded(partial(schema_of, first, given))
        return target, self._fit(itertools.chain([first], made), target, partial(fit, inferred=True))

    def _fit(self, made: Iterator[Any], target: pa.Schema, fit: Callable[..., list[pa.RecordBatch]]) -> Batches:
        for out in made:
            yield from self._guarded(partial(fit, out, target))

    def _call(self, argument: Any) -> Any:
        """The function's answer to a row or a table."""
        if self._interrupted():
            raise CallCancelled(f"cancelled in the {self._step.kind} function {self._step.name!r}")
        try:
            return self._function(argument)
        except FlowError:
            raise
        except Exception as error:
            raise self._failed(error, argument if isinstance(argument, dict) else None) from error

    def _guarded(self, work: Callable[[], Any], row: Mapping[str, Any] | None = None) -> Any:
        """The answer of `work`, which runs code of the user's in some way or looks at what it gave."""
        try:
            return work()
        except FlowError:
            raise
        except Misfit as misfit:
            raise self._refused(str(misfit), misfit.row) from misfit.__cause__
        except Exception as error:
            raise self._failed(error, row) from error

    def _check_rows(self, made: Sequence[Any], sources: Sequence[Mapping[str, Any]]) -> None:
        for new, source in zip(made, sources, strict=True):
            if type(new) is not dict and not isinstance(new, Mapping):
                raise self._refused(f"gave a {type(new).__name__}, not a dict: {cut(new)}", source)

    def _tables_of(self, result: Any) -> Iterator[pa.Table]:
        table = self._guarded(partial(_table, result))
        if table is not None:
            yield table
            return
        if not isinstance(result, Iterator | list | tuple):
            raise self._refused(f"gave a {type(result).__name__}, not a table: {cut(result)}", None)
        several = iter(result)
        while (one := self._guarded(partial(next, several, None))) is not None:
            table = self._guarded(partial(_table, one))
            if table is None:
                raise self._refused(f"gave a {type(one).__name__} among its tables: {cut(one)}", None)
            yield table

    def _failed(self, error: Exception, row: Mapping[str, Any] | None) -> UserCodeError:
        return failed(error, what=self._step.kind, function=self._step.name, row=row)

    def _refused(self, why: str, row: Mapping[str, Any] | None) -> UserCodeError:
        shown = "" if row is None else cut(row)
        place = f"\nfor the row {shown}" if shown else ""
        name = self._step.name
        return UserCodeError(f"{self._step.kind} function {name!r} {why}{place}", function=name, row=shown)


def _truths(answers: Sequence[Any]) -> list[bool]:
    # An array or a pandas value may refuse to be one.
    return [bool(answer) for answer in answers]


def _sliced(batches: Batches) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows in batches that are small as Python objects too, each with the number of its first row."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _SLICE_ROWS):
            part = batch.slice(start, _SLICE_ROWS)
            yield number, part
            number += part.num_rows


def _regrouped(batches: Batches, rows_each: int) -> Iterator[pa.Table]:
    """The rows in tables of exactly `rows_each`, the last one with what is left."""
    held: list[pa.RecordBatch] = []
    missing = rows_each
    for batch in batches:
        batch = with_decimals(batch)
        while batch.num_rows:
            part = batch.slice(0, missing)
            held.append(part)
            batch = batch.slice(part.num_rows)
            missing -= part.num_rows
            if not missing:
                yield pa.Table.from_batches(held)
                held, missing = [], rows_each
    if held:
        yield pa.Table.from_batches(held)


def _table(result: Any) -> pa.Table | None:
    """A table of what is one in some form, or None."""
    if isinstance(result, pa.Table):
        return result
    if type(result).__module__.partition(".")[0] == "pandas":
        return pa.Table.from_pandas(result, preserve_index=False)
    # Record batches, readers, frames of other libraries.
    return pa.table(result) if hasattr(result, "__arrow_c_stream__") or isinstance(result, pa.RecordBatch) else None
