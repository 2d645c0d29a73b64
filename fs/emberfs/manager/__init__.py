"""The cluster manager: membership, leases, chain states, client sessions. See `service` and docs/replication.md."""

from .chains import DiskSlot
from .config import ManagerConfig
from .placement import place
from .service import ManagerService
from .states import describe, next_chain

__all__ = ["DiskSlot", "ManagerConfig", "ManagerService", "describe", "next_chain", "place"]
