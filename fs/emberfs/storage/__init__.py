"""The storage service: chunks of several chains, served from the targets of one node. See `service`."""

from .service import StorageService

__all__ = ["StorageService"]
