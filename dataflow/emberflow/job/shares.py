"""How a stage becomes tasks: which share of its driving feeds each gets, decided when its inputs are there.

Shares follow bytes, never the number of workers, so a job that goes on with other workers finds its tasks again. Small
neighbouring partitions share a task; one that is much larger than the others is cut by producer, where the plan says
that is right: one side of a join, the other side read whole by every piece; or, if what the pieces give has to meet
again (`plan/pieces.py`), in a stage of their own.

Does not know: SQL, executors.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..plan.filescans import Share
from ..plan.pipes import Exchange, ExchangeFeed, FileFeed, Stage
from .steps import Output

SKEW = 4
"""A partition is large at more than so many times the usual one."""
_SKEW_BYTES_MIN = 8 << 20
_SKEW_PIECES_MAX = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShareConfig:
    """How much a task is given."""

    scan_bytes: int = 128 << 20
    """Of files, as they are on disk."""
    task_bytes: int = 256 << 20
    """Of exchanges, as they are in memory."""
    together_bytes: int = 256 << 20
    """Neighbouring partitions share a task up to so much."""
    together_python_bytes: int = 256 << 20
    """The same where tasks run the user's Python, which may take any time for a row."""
    shares_min: int = 8
    """Fewest shares of files, while each has `share_bytes_min` of the columns that are read."""
    share_bytes_min: int = 8 << 20
    """To read so much costs several times what a task costs by itself."""
    scan_small_bytes: int = 16 << 20
    """Where tasks run the user's Python, files of more than so much have `shares_min` shares, whatever is read."""
    functions: frozenset[str] = frozenset()
    """Names of the user's Python functions that SQL may call."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What a task reads of one exchange: some partitions of some of its producers' outputs."""

    partitions: tuple[int, ...]
    outputs: tuple[int, ...] | None = None
    """Positions among the exchange's outputs; None: all."""


@dataclass(frozen=True, slots=True)
class Spec:
    """One task's shares, by feed. Feeds that are not named are read whole."""

    files: Mapping[int, Share] = field(default_factory=dict)
    exchanges: Mapping[int, Exchanged] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a stage becomes."""

    specs: list[Spec]
    """Its tasks."""
    pieces: list[Spec] = field(default_factory=list)
    """Of the partitions that are left to stages of their own, the tasks of the first of those."""


def cut(stage: Stage, outputs: Mapping[int, Sequence[Output]], config: ShareConfig) -> Cut:
    """The tasks of a stage. `outputs` are those of every exchange it reads, by the exchange's id."""
    pipe = stage.pipe
    shared = {
        feed_id: feed
        for feed_id, feed in pipe.feeds.items()
        if (isinstance(feed, FileFeed) and (feed_id == pipe.drive or feed.shares or feed.by_partition))
        or (isinstance(feed, ExchangeFeed) and feed.by != "all")
    }
    if pipe.drive is None or not shared:
        return Cut([Spec()])
    runs_python = stage.runs_python(config.functions)
    together_bytes = config.together_python_bytes if runs_python else config.together_bytes
    files: dict[int, list[Share]] = {
        i: _file_shares(feed, config, runs_python=runs_python)
        for i, feed in shared.items()
        if isinstance(feed, FileFeed)
    }
    exchanged = {i: feed for i, feed in shared.items() if isinstance(feed, ExchangeFeed)}
    pieces: dict[int, list[Exchanged]] = {
        i: _pieces(feed.exchange, outputs, together_bytes) for i, feed in exchanged.items() if feed.by == "piece"
    }
    partitioned = {i: feed.exchange for i, feed in exchanged.items() if feed.by == "partition"}
    if partitioned and not files and not pieces:
        return _partitions(stage, partitioned, outputs, config, together_bytes)
    counts = {len(shares) for shares in files.values()} | {len(groups) for groups in pieces.values()}
    counts |= {exchange.partitions for exchange in partitioned.values()}
    assert len(counts) == 1, f"feeds that are cut together have {counts} shares"
    return Cut(
        [
            Spec(
                {i: shares[n] for i, shares in files.items()},
                {i: groups[n] for i, groups in pieces.items()} | {i: Exchanged((n,)) for i in partitioned},
            )
            for n in range(counts.pop())
        ]
    )


def _file_shares(feed: FileFeed, config: ShareConfig, *, runs_python: bool) -> list[Share]:
    if feed.by_partition:
        return feed.scan.partitions()
    if feed.shares is not None:
        return feed.scan.shares(0, exactly=feed.shares)
    at_least = max(1, min(config.shares_min, int(feed.read_bytes / config.share_bytes_min)))
    if runs_python and feed.scan.size_bytes > config.scan_small_bytes:
        at_least = config.shares_min
    return feed.scan.shares(config.scan_bytes, at_least=at_least)


def _pieces(exchange: Exchange, outputs: Mapping[int, Sequence[Output]], together_bytes: int) -> list[Exchanged]:
    """The exchange's outputs, neighbours together up to `together_bytes`."""
    everything = tuple(range(exchange.partitions))
    groups: list[list[int]] = []
    held = 0
    for position, output in enumerate(outputs[exchange.id]):
        if not groups or exchange.fixed or held + output.size_bytes > together_bytes:
            groups.append([])
            held = 0
        groups[-1].append(position)
        held += output.size_bytes
    return [Exchanged(everything, tuple(group)) for group in groups]


def _partitions(
    stage: Stage,
    exchanges: Mapping[int, Exchange],
    outputs: Mapping[int, Sequence[Output]],
    config: ShareConfig,
    together_bytes: int,
) -> Cut:
    count = {exchange.partitions for exchange in exchanges.values()}
    assert len(count) == 1, f"exchanges that are read together have {count} partitions"
    partitions = range(count.pop())
    sizes = {
        feed: [sum(output.exchange().partition_bytes[p] for output in outputs[exchange.id]) for p in partitions]
        for feed, exchange in exchanges.items()
    }
    totals = [sum(of_feed[p] for of_feed in sizes.values()) for p in partitions]
    fixed = any(exchange.fixed for exchange in exchanges.values())
    if all(exchange.of_pieces for exchange in exchanges.values()):
        together_bytes = config.task_bytes
    # The lower of two in the middle: of two partitions, too, one can be large.
    usual = statistics.median_low(totals)
    found = Cut([])
    group: list[int] = []
    for p in partitions:
        split: list[Spec] = []
        splitting = [feed for feed, exchange in exchanges.items() if exchange.splittable]
        if splitting and totals[p] > max(SKEW * usual, _SKEW_BYTES_MIN):
            largest = max(splitting, key=lambda feed: sizes[feed][p])
            if sizes[largest][p] > totals[p] // 2:
                split = _split(p, largest, exchanges, outputs, max(usual, _SKEW_BYTES_MIN))
        if len(split) > 1 and stage.pipe.pieces is not None:
            found.pieces.extend(split)
            continue
        if len(split) > 1 or (group and (fixed or sum(totals[g] for g in group) + totals[p] > together_bytes)):
            found.specs.extend(_together(group, exchanges))
            group = []
        if len(split) > 1:
            found.specs.extend(split)
            continue
        group.append(p)
    found.specs.extend(_together(group, exchanges))
    return found


def _together(group: Sequence[int], exchanges: Mapping[int, Exchange]) -> list[Spec]:
    return [Spec({}, {feed: Exchanged(tuple(group)) for feed in exchanges})] if group else []


def _split(
    partition: int,
    splitting: int,
    exchanges: Mapping[int, Exchange],
    outputs: Mapping[int, Sequence[Output]],
    piece_bytes: float,
) -> list[Spec]:
    """One large partition as several tasks: the splitting side by producer, the others whole."""
    groups: list[list[int]] = [[]]
    held = 0
    producers = outputs[exchanges[splitting].id]
    total = sum(output.exchange().partition_bytes[partition] for output in producers)
    piece_bytes = max(piece_bytes, total / _SKEW_PIECES_MAX)
    for position, output in enumerate(producers):
        size = output.exchange().partition_bytes[partition]
        if groups[-1] and held + size > piece_bytes:
            groups.append([])
            held = 0
        groups[-1].append(position)
        held += size
    return [
        Spec(
            {},
            {feed: Exchanged((partition,), tuple(group) if feed == splitting else None) for feed in exchanges},
        )
        for group in groups
    ]
