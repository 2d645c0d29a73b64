"""A store of many machines: what a client has of it, and a whole one on this host."""

from .store import ClientConfig, ClusterStore

__all__ = ["ClientConfig", "ClusterStore"]
