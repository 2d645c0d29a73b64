"""Names of chunk updates, below that of the client: (channel, sequence).

Replicas apply a name once, so that an update may be sent again. Names go on when the client gets another session: an
update that is sent again under the new one shares its name with none of that one.
"""

from __future__ import annotations


class Channels:
    """Hands out names."""

    def __init__(self) -> None:
        self._sequences: list[int] = []
        """Last sequence number by channel."""
        self._idle: list[int] = []

    def take(self) -> tuple[int, int]:
        """(channel, sequence) for an update: a channel is one call's at a time, and its sequence only grows."""
        if not self._idle:
            self._idle.append(len(self._sequences))
            self._sequences.append(0)
        channel = self._idle.pop()
        self._sequences[channel] += 1
        return channel, self._sequences[channel]

    def end(self, channel: int) -> None:
        """Its update is not sent again."""
        self._idle.append(channel)
