"""Changes of the cluster's configuration: what may be set, and how leases become shorter. Pure functions.

A lease is as long as the reply says that grants it, five sixths of `dead_after_s`; and nobody is taken for dead before
`waits_s`. Invariants:
  - Every lease that may still be valid was granted under a `dead_after_s` of at most `waits_s`, whoever was primary: a
    longer one is in the row before the first lease goes by it, and a shorter one leaves `waits_s` alone at first.
  - `waits_s` is lowered by a primary that has acted for `waits_s` since it lowered `dead_after_s`, or took over.

Does not know: who waits.
"""

from __future__ import annotations

from msgspec.structs import replace

from ..errors import Conflict
from ..messages import SetConfig
from ..settings import Settings, check_together, checked, known
from .rows import ConfigRow


def after_request(row: ConfigRow, request: SetConfig) -> ConfigRow | None:
    """The row with what is asked for; None: it says so already, maybe since an earlier attempt.

    Raises Conflict (somebody else has changed it), NotFound, LimitExceeded.
    """
    for name in request.unset:
        known(name)
    values = {name: value for name, value in row.values.items() if name not in request.unset}
    values |= {name: checked(name, value) for name, value in request.values.items()}
    if values == row.values:
        return None
    if request.version != row.version:
        raise Conflict(f"the configuration is at version {row.version} by now, not {request.version}: look again")
    settings = Settings.of(values)
    check_together(settings)
    return ConfigRow(row.version + 1, values, max(row.waits_s, settings.dead_after_s))


def after_wait(row: ConfigRow, *, now_s: float, since_s: float) -> ConfigRow | None:
    """The row once no lease is left that was granted under a longer `dead_after_s`; None: not yet, or there is none.

    `since_s`: since when this primary alone grants leases, and goes by the row.
    """
    dead_after_s = Settings.of(row.values).dead_after_s
    if row.waits_s <= dead_after_s or now_s - since_s < row.waits_s:
        return None
    return replace(row, version=row.version + 1, waits_s=dead_after_s)
