"""Which key filters (`plan/keys.py`) a task applies: those whose keys are few beside the rows that they are to filter.

A filter is taken to drop as large a share of the rows as was dropped before of those that its keys come from. To read
a key and put it into a hash table takes about as long as to send a row through the exchange and to take it in; to look
one up, a tenth of that. So the keys have at most half the bytes of the rows that would go, and those are at least half
of all.

Invariant: a function of the task's shares and of what its inputs hold, so that attempts agree as far as these do. What
a filter leaves in changes no result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..plan.guesses import left_of_inputs
from ..plan.nodes import Input, KeyFilter, Node
from ..plan.pipes import ExchangeFeed, FileFeed, Pipe, TableFeed
from .shares import Spec
from .steps import Output

_KEYS_OF_DROPPED_BYTES = 0.5
_KEPT_MAX = 0.5
_ROWS_BYTES_MIN = 1 << 20
"""Less is sent in about the time that it takes to open files of keys."""
_BYTES_OF_FILES = 2
"""What a byte of files becomes in memory, at least."""


def with_cheap_keys(pipe: Pipe, spec: Spec, outputs: Mapping[int, Sequence[Output]]) -> Node:
    """The pipe's plan, without the key filters that are not worth their keys. `outputs` are those of the exchanges that
    it reads, by id."""
    tree = pipe.tree
    filters: list[KeyFilter] = []
    while isinstance(tree, KeyFilter):
        filters.append(tree)
        tree = tree.child
    if not filters:
        return tree
    rows_bytes = _read_bytes(pipe, spec, outputs, {_feed_of(each) for each in filters}) * left_of_inputs(tree)
    for each in reversed(filters):
        feed = pipe.feeds[_feed_of(each)]
        assert isinstance(feed, ExchangeFeed)
        keys = outputs[feed.exchange.id]
        # Where nobody knows it is taken to be just worth it.
        kept = _KEPT_MAX
        if each.scanned_rows is not None:
            kept = sum(output.rows for output in keys) / max(1, each.scanned_rows)
        is_small = sum(output.size_bytes for output in keys) <= _KEYS_OF_DROPPED_BYTES * (1 - kept) * rows_bytes
        if is_small and kept <= _KEPT_MAX and (rows_bytes >= _ROWS_BYTES_MIN or each.is_for_keys):
            tree = replace(each, child=tree)
            rows_bytes *= kept
    return tree


def _feed_of(filter: KeyFilter) -> int:
    assert isinstance(filter.keys, Input)
    return filter.keys.id


def _read_bytes(pipe: Pipe, spec: Spec, outputs: Mapping[int, Sequence[Output]], keys: set[int]) -> float:
    """What the task's share takes in memory, or all that it reads, if there is but one task; the feeds `keys` apart."""
    size_bytes = 0.0
    for feed_id, feed in pipe.feeds.items():
        if feed_id in keys or (pipe.drive is not None and feed_id not in (*spec.files, *spec.exchanges)):
            continue
        if isinstance(feed, FileFeed):
            share = spec.files.get(feed_id)
            part = 1.0 if share is None else share.size_bytes / max(1, feed.scan.size_bytes)
            size_bytes += _BYTES_OF_FILES * feed.read_bytes * part
        elif isinstance(feed, TableFeed):
            size_bytes += feed.table.nbytes
        else:
            given = spec.exchanges.get(feed_id)
            made = outputs[feed.exchange.id]
            chosen = made if given is None or given.outputs is None else [made[p] for p in given.outputs]
            partitions = range(feed.exchange.partitions) if given is None else given.partitions
            size_bytes += sum(int(output.exchange().partition_bytes[p]) for output in chosen for p in partitions)
    return size_bytes
