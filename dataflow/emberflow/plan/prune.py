"""Columns that nobody reads are dropped where they could first be, so that no exchange carries them.

DuckDB has done this for scans; what is left are the columns that a join, a window or a filter was the last to need.

Invariant: `narrowed(node, keep)` gives the rows of `node` with exactly the columns `keep`, in that order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .nodes import (
    Aggregate,
    Call,
    Column,
    Condition,
    Distinct,
    Expr,
    Filter,
    Fixed,
    Input,
    Join,
    Limit,
    Node,
    Project,
    Scan,
    SetOperation,
    Shared,
    Sort,
    SortKey,
    Unnest,
    Window,
    WindowCall,
    column,
)


def pruned(node: Node) -> Node:
    """The plan with the same output, and nothing more inside than it takes."""
    return narrowed(node, range(len(node.columns)))


def narrowed(node: Node, keep: Sequence[int]) -> Node:
    """The node's rows with only the columns `keep`."""
    keep = tuple(keep)
    if isinstance(node, Scan):
        columns = tuple(node.columns[i] for i in keep)
        return replace(node, positions=tuple(node.positions[i] for i in keep), columns=columns)
    if isinstance(node, Fixed | Input):
        return chosen(node, keep, range(len(node.columns)))
    if isinstance(node, Filter):
        needed = _sorted(keep, node.conditions)
        moved = tuple(_moved(condition, needed) for condition in node.conditions)
        return chosen(Filter(narrowed(node.child, needed), moved), keep, needed)
    if isinstance(node, Project):
        exprs = [node.exprs[i] for i in keep]
        needed = _sorted((), exprs)
        names = tuple(node.names[i] for i in keep)
        return Project(narrowed(node.child, needed), tuple(_moved(expr, needed) for expr in exprs), names)
    if isinstance(node, Sort):
        needed = _sorted(keep, (key.expr for key in node.keys))
        return chosen(Sort(narrowed(node.child, needed), _keys(node.keys, needed)), keep, needed)
    if isinstance(node, Limit):
        return replace(node, child=narrowed(node.child, keep))
    if isinstance(node, Distinct):
        return _distinct(node, keep)
    if isinstance(node, Aggregate):
        return _aggregate(node, keep)
    if isinstance(node, Join):
        return _join(node, keep)
    if isinstance(node, Window | Unnest):
        return _appending(node, keep)
    if isinstance(node, SetOperation):
        return _set_operation(node, keep)
    assert isinstance(node, Shared)
    return Shared(node.id, pruned(node.definition), narrowed(node.body, keep))


def chosen(node: Node, keep: Sequence[int], have: Sequence[int]) -> Node:
    """`node`, whose columns are `have` of what was asked, with only `keep` of them."""
    if tuple(keep) == tuple(have):
        return node
    where = {position: i for i, position in enumerate(have)}
    exprs = tuple(column(where[i], node.columns[where[i]].type) for i in keep)
    return Project(node, exprs, tuple(node.columns[where[i]].name for i in keep))


def _sorted(keep: Iterable[int], exprs: Iterable[Expr]) -> tuple[int, ...]:
    needed = set(keep)
    for expr in exprs:
        needed |= expr.columns
    return tuple(sorted(needed))


def _moved(expr: Expr, have: Sequence[int]) -> Expr:
    return expr.moved({position: i for i, position in enumerate(have)})


def _keys(keys: Iterable[SortKey], have: Sequence[int]) -> tuple[SortKey, ...]:
    return tuple(replace(key, expr=_moved(key.expr, have)) for key in keys)


def _distinct(node: Distinct, keep: Sequence[int]) -> Node:
    if node.on is None:
        everything = range(len(node.columns))
        return chosen(replace(node, child=narrowed(node.child, everything)), keep, everything)
    needed = _sorted(keep, (*node.on, *(key.expr for key in node.order)))
    on = tuple(_moved(expr, needed) for expr in node.on)
    return chosen(Distinct(narrowed(node.child, needed), on, _keys(node.order, needed)), keep, needed)


def _aggregate(node: Aggregate, keep: Sequence[int]) -> Node:
    width = len(node.groups)
    wanted = [i for i, _ in enumerate(node.calls) if width + i in set(keep)]
    if not node.groups and not wanted:
        # Without groups and calls there would be no aggregate left, and with it no one row.
        wanted = [0]
    calls = [node.calls[i] for i in wanted]
    needed = _sorted((), (*node.groups, *(expr for call in calls for expr in _call_exprs(call))))
    groupings = range(width + len(node.calls), len(node.columns))
    tree = replace(
        node,
        child=narrowed(node.child, needed),
        groups=tuple(_moved(group, needed) for group in node.groups),
        calls=tuple(_call(call, needed) for call in calls),
    )
    return chosen(tree, keep, (*range(width), *(width + i for i in wanted), *groupings))


def _call_exprs(call: Call) -> Iterable[Expr]:
    yield from call.args
    yield from (key.expr for key in call.order)
    if call.filter is not None:
        yield call.filter


def _call(call: Call, have: Sequence[int]) -> Call:
    return replace(
        call,
        args=tuple(_moved(arg, have) for arg in call.args),
        order=_keys(call.order, have),
        filter=None if call.filter is None else _moved(call.filter, have),
    )


def _join(node: Join, keep: Sequence[int]) -> Node:
    width = len(node.left.columns)
    residual = node.residual.columns if node.residual is not None else frozenset()
    only_right = node.kind in ("right_semi", "right_anti")
    only_left = node.kind in ("semi", "anti", "mark")
    wanted_left = set() if only_right else {i for i in keep if i < width}
    wanted_right = set(keep) if only_right else set() if only_left else {i - width for i in keep if i >= width}
    wanted_left |= {i for i in residual if i < width}
    wanted_right |= {i - width for i in residual if i >= width}
    left = _sorted(wanted_left, (c.left for c in node.conditions))
    right = _sorted(wanted_right, (c.right for c in node.conditions))
    both = (*left, *(i + width for i in right))
    tree = replace(
        node,
        left=narrowed(node.left, left),
        right=narrowed(node.right, right),
        conditions=tuple(
            Condition(_moved(c.left, left), _moved(c.right, right), c.comparison) for c in node.conditions
        ),
        residual=None if node.residual is None else _moved(node.residual, both),
    )
    have = right if only_right else (*left, width) if node.kind == "mark" else left if only_left else both
    return chosen(tree, keep, have)


def _appending(node: Window | Unnest, keep: Sequence[int]) -> Node:
    """Operators that put columns behind their child's."""
    width = len(node.child.columns)
    below = {i for i in keep if i < width}
    if isinstance(node, Unnest):
        needed = _sorted(below, node.exprs)
        unnested = replace(
            node, child=narrowed(node.child, needed), exprs=tuple(_moved(expr, needed) for expr in node.exprs)
        )
        return chosen(unnested, keep, (*needed, *range(width, len(node.columns))))
    wanted = [i for i, _ in enumerate(node.calls) if width + i in set(keep)]
    calls = [node.calls[i] for i in wanted]
    needed = _sorted(below, (e for c in calls for e in (c.expr, *c.partition_by, *(k.expr for k in c.order_by))))
    child = narrowed(node.child, needed)
    if not calls:
        return chosen(child, keep, needed)
    moved = tuple(
        WindowCall(_moved(c.expr, needed), tuple(_moved(e, needed) for e in c.partition_by), _keys(c.order_by, needed))
        for c in calls
    )
    return chosen(Window(child, moved), keep, (*needed, *(width + i for i in wanted)))


def _set_operation(node: SetOperation, keep: Sequence[int]) -> Node:
    everything = tuple(range(len(node.columns)))
    have = tuple(keep) if node.kind == "union" and node.all else everything
    columns: tuple[Column, ...] = tuple(node.columns[i] for i in have)
    tree = replace(node, children=tuple(narrowed(child, have) for child in node.children), columns=columns)
    return chosen(tree, keep, have)
