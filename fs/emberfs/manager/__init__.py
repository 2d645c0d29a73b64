"""The cluster manager: membership, leases, chain states, client sessions. See `service` and docs/replication.md."""

from .chains import DiskSlot, place_round_robin
from .config import ManagerConfig
from .service import ManagerService
from .states import describe, next_chain

__all__ = ["DiskSlot", "ManagerConfig", "ManagerService", "describe", "next_chain", "place_round_robin"]
