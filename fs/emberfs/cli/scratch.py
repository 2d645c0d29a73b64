"""A directory of a command's own in a store: made at the beginning, gone at the end, whatever ends the command.

Invariant: an interrupt (Ctrl-C) ends what is measured and never what cleans up; a second one is not heard meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ..client.sync import Client
from ..embedded import EmbeddedStore
from ..errors import NotFound
from .output import note


@contextmanager
def scratch_directory(client: Client, purpose: str) -> Iterator[str]:
    """Yields its path. The space of what was in it is free at once if this process owns the store, else when the
    store next collects its garbage."""
    path = f"/.emberline-{purpose}-{os.urandom(6).hex()}"
    try:
        client.mkdir(path)
        yield path
    except KeyboardInterrupt:
        note(f"interrupted: removing {path}")
        raise
    finally:
        with uninterrupted():
            with contextlib.suppress(NotFound):
                client.remove(path, recursive=True, trash=False)
            store = client.store
            if isinstance(store, EmbeddedStore) and store.services is not None:
                client.collect_garbage(force=True)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """SIGINT is not heard meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
