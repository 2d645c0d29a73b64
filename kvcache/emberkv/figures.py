"""The figures of a service and of its namespaces: what there is now, beside what was counted since the start.

One dictionary of plain values, which is what `stat`, the metrics page and the live view are made of.

Does not know: who asks, or how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np

from .counts import ServiceCounts
from .page import HEADER_BYTES
from .pool import Pool
from .segments import State
from .table import FREE

Figures = dict[str, Any]


def requests_of(counts: ServiceCounts) -> Figures:
    """By kind of request its histogram, as `msgspec.to_builtins` has it, and its errors by class."""
    errors: dict[str, dict[str, int]] = {}
    for (request, error), count in counts.errors.items():
        errors.setdefault(request, {})[error] = count
    return {
        request: {"seconds": msgspec.to_builtins(histogram, str_keys=True), "errors": errors.get(request, {})}
        for request, histogram in counts.requests.items()
    }


def stat_of(pool: Pool, policies: Mapping[int, Mapping[str, int]], only: str | None = None) -> Figures:
    """The figures of a namespace; `policies`: of each tenant, how many clients put by which; `only`: as far as they are
    of one tenant."""
    index, space = pool.index, pool.space
    tenants = {
        name: {
            "pages": len(index.table.slots_of(number)),
            "bytes": index.table.tenant_bytes[number],
            "quota_bytes": index.quotas[number],
            "ttl_s": space.ttl_s(number),
            "put_policies": dict(policies.get(number, {})),
        }
        for number, name in enumerate(index.tenants)
        if only in (None, name)
    }
    if only is not None:  # Whose pages are not in it need not know what it is.
        return {"tenants": tenants, **({"namespace": msgspec.to_builtins(pool.namespace)} if tenants else {})}
    segments = {state.name.lower(): 0 for state in State}
    for segment in index.segments:
        segments[segment.state.name.lower()] += 1
    disk_bytes, pending_bytes = index.segments.disk_bytes, space.pending_bytes.total()
    return {
        "namespace": msgspec.to_builtins(pool.namespace),
        "is_owned": not pool.is_lost,
        "is_read_only": bool(pool.failure),
        "failure": pool.failure,
        "epoch": pool.ownership.epoch,
        "pages": index.table.count,
        "orphans": sum(len(slots) for _, slots in index.table.waiting()),
        "pinned_pages": _pinned(pool),
        "live_bytes": index.table.live_bytes,
        "pending_bytes": pending_bytes,
        "disk_bytes": disk_bytes,
        "dead_bytes": max(disk_bytes - index.table.live_bytes - pending_bytes, 0),
        "capacity_bytes": space.config.capacity_bytes,
        "limit_bytes": space.limit_bytes,
        "live_bytes_max": space.live_bytes_max(_page_bytes(pool)),
        "segments": len(index.segments.by_id),
        "segment_states": segments,
        "ttl_s": space.ttl_s(),
        "leases": len(pool.leases),
        "reservations": pool.reservations,
        "tenants": tenants,
        "counts": {**msgspec.to_builtins(pool.counts), **asdict(space.counts)},
    }


def _page_bytes(pool: Pool) -> int:
    """Of a usual page: that of the first kind, or what pages have on average."""
    fixed = pool.namespace.kinds[0].payload_bytes
    table = pool.index.table
    return fixed or (table.live_bytes // table.count - HEADER_BYTES if table.count else 0)


def _pinned(pool: Pool) -> int:
    table = pool.index.table
    until_s, parent = np.asarray(table.pinned_s, np.float64), np.asarray(table.parent, np.int32)
    return int(np.count_nonzero((until_s > pool.space.stamp_s()) & (parent != FREE)))
