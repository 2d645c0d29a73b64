"""What a step is, as a digest: two steps with the same identity make the same rows.

Into it go our own version, DuckDB's minor version, the plan as text, files by path, size and version, what is read
from other steps by their identities, tables by their bytes, functions by their meaning, and how tasks are cut. What
cannot be known to be the same (a function whose captured values cannot be compared, random()) gives no identity: such a
step is the job's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..engine import duckdb_minor
from ..functions import shipping
from ..functions.identity import identity_of
from ..functions.udf import Udf
from ..plan.filescans import ResolvedScan
from ..plan.grade import is_volatile
from ..plan.pipes import (
    ByRange,
    Exchange,
    ExchangeFeed,
    Feed,
    FileFeed,
    PythonSegment,
    SqlSegment,
    Stage,
    TextSegment,
)
from .shares import Spec

_SECRET = re.compile(r"key|secret|token|password|credential|expir|(^|_)(auth|sas)", re.IGNORECASE)
VERSION = 2
"""Of what steps mean: a change that makes old outputs wrong to use raises it."""


def digest(*parts: object) -> str:
    """Thirty-two hexadecimal digits over the parts' own texts."""
    hashing = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hashing.update(len(data).to_bytes(8, "little"))
        hashing.update(data)
    return hashing.hexdigest()[:32]


class Unknown(Exception):
    """The step has no identity; the message says why."""


def stage_identity(
    stage: Stage, specs: Sequence[Spec], exchanges: Mapping[int, str], *extra: object, job: str | None = None
) -> str:
    """The stage's identity. `exchanges` are the identities of what it reads. Raises `Unknown`; with a `job`, what
    cannot be known to be the same is taken to be so within that job."""
    how = stage.partitioning
    parts: list[object] = [VERSION, duckdb_minor(), stage.label, stage.exchange.partitions, job, *extra]
    if isinstance(how, ByRange):
        parts += [repr(how.keys), exchanges[how.sample.id]]
    else:
        parts.append(repr(how))
    for segment in stage.pipe.segments:
        if isinstance(segment, SqlSegment):
            if is_volatile(segment.tree) and job is None:
                raise Unknown("it calls a function that gives something else each time")
            parts.append(repr(segment.tree))
        elif isinstance(segment, TextSegment):
            if segment.reads is None and job is None:
                raise Unknown("nobody can tell what it reads, or it gives something else each time")
            parts += [segment.text, repr(segment.inputs), *(_scan(scan, job) for scan in segment.reads or ())]
        else:
            parts.append(_function(segment, job))
    for feed_id, feed in sorted(stage.pipe.feeds.items()):
        parts += [feed_id, _feed(feed, exchanges, job)]
    parts.append(repr(list(specs)))
    return digest(*parts)


def function_identity(function: Callable[..., Any], version: str | None, job: str | None = None) -> str:
    """A function's meaning. Raises `Unknown`; with a `job`, what it is made of stands for its meaning."""
    known = identity_of(function, version=version)
    if known.digest is None and job is not None:
        return digest("bytes", shipping.dumps(function))
    if known.digest is None:
        raise Unknown(f"its function is not known to be the same: {known.reason}")
    return known.digest


def udf_identity(udf: Udf, job: str | None = None) -> str:
    """What a function for SQL is, how it is called included. Raises `Unknown` as `function_identity` does."""
    told = (udf.name, udf.parameters, udf.return_type, udf.vectorized, udf.null_handling, udf.deterministic)
    return digest(function_identity(udf.function, udf.version, job), repr(told))


def stores(options: object) -> object:
    """What of storage options says which store is meant: an endpoint, a project; not what is secret and changes."""
    if isinstance(options, Mapping):
        return sorted((str(key), stores(value)) for key, value in options.items() if not _SECRET.search(str(key)))
    if isinstance(options, list | tuple):
        return [stores(value) for value in options]
    return options if isinstance(options, str | int | float | None) else type(options).__name__


def _function(segment: PythonSegment, job: str | None) -> str:
    step = segment.step
    return digest(function_identity(step.function, step.version, job), step.kind, step.schema, step.batch_rows)


def _scan(scan: ResolvedScan, job: str | None) -> str:
    if job is None and any(not file.version for file in scan.files):
        raise Unknown("a filesystem does not tell when its files change")
    files = [(file.url, file.size_bytes, file.version) for file in scan.files]
    # Files that are left out have had their say in how the others are read.
    read = sorted(scan.arguments.items()) if scan.arguments is not None else None, scan.is_whole
    return digest(scan.scan.function, scan.scan.options, repr(scan.columns), repr(files), repr(read))


def _feed(feed: Feed, exchanges: Mapping[int, str], job: str | None) -> str:
    if isinstance(feed, FileFeed):
        return digest(_scan(feed.scan, job), feed.names, feed.shares, feed.by_partition)
    if isinstance(feed, ExchangeFeed):
        return digest(exchanges[feed.exchange.id], feed.by)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, feed.table.schema) as stream:
        stream.write_table(feed.table)
    return digest(sink.getvalue().to_pybytes(), repr(feed.columns), feed.positions)


def exchange_identity(exchange: Exchange, stages: Mapping[int, str]) -> str:
    """The identity of what all the producers of an exchange make."""
    if exchange.made is not None:
        return digest(*(output.attempt for output in exchange.made))
    return digest(*(stages[stage.id] for stage in exchange.producers), exchange.partitions)
