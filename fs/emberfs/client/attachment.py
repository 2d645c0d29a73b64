"""A client's hold on a store of this process: what `Client` and `AsyncClient` share."""

from __future__ import annotations

import threading

from ..errors import StoreClosed
from ..stores import Config, Store, acquire, release, resolve
from .core import Core


class Attachment:
    """A client's hold on a store of this process: what both doors share."""

    def __init__(self, url: str | None, config: Config | None, *, creates: bool = True) -> None:
        self.url = resolve(url)
        """What `connect` takes to come here again."""
        self.config = config
        self.store: Store = acquire(self.url, config, creates=creates)
        self.core: Core = self.store.core()
        self.closed = False
        self._lock = threading.Lock()

    def live(self) -> Core:
        """The core to use now: a new one if this process is a fork. Raises StoreClosed."""
        if self.closed or (self.store.closed and not self.store.forked):
            raise StoreClosed("the client is closed")
        if self.store.forked:
            with self._lock:
                if self.store.forked:
                    self.store = acquire(self.url, self.config)
                    self.core = self.store.core()
        return self.core

    def close(self) -> None:
        """Let go of the store; the last client of this process closes it."""
        with self._lock:
            was_closed, self.closed = self.closed, True
        if not was_closed:
            release(self.store)


class LazyAttachment:
    """An attachment made at its first use, once, whichever thread comes first; made again after a close."""

    def __init__(self, url: str | None, config: Config | None) -> None:
        self._url = url
        self._config = config
        self._attachment: Attachment | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The store's URL, opened or not."""
        attachment = self._attachment
        return resolve(self._url) if attachment is None or attachment.closed else attachment.url

    def get(self, *, creates: bool) -> Attachment:
        """The attachment to use now. Raises what opening a store raises; NotFound for none, unless `creates`."""
        attachment = self._attachment
        if attachment is None or attachment.closed:
            with self._lock:
                attachment = self._attachment
                if attachment is None or attachment.closed:
                    attachment = self._attachment = Attachment(self._url, self._config, creates=creates)
        return attachment

    def close(self) -> None:
        """Let go of the store, if it was used at all."""
        if self._attachment is not None:
            self._attachment.close()
