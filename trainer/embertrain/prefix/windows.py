"""What is kept on disk of sliding windows, which are several times as large as compressed entries.

    full          their states at every page: a hit goes on at once
    periodic:N    every N tokens, at the end of a prompt, and where prompts part: what follows the last place that has
                  states is computed again
    zero          none: the last tokens of a hit are computed again, as many as it takes for every layer's window to
                  come out right, from compressed entries that are read and not written

How many those are. The tokens begin with empty windows. In the first layer all rows of keys and values are right, as
they depend on their own token; its output is right once a query sees a whole window, 127 tokens later; so are the rows
of the second layer, and so on. In the last of L layers rows are right from 127 (L - 1) tokens on, and the 128 before
the end are what is wanted: 128 L tokens are enough. Rows that come out wrong before that are in windows only, which
have forgotten them by the end. Pages are multiples of 128 tokens, at whose ends no compressor's window is open; the
states of the last 4 tokens, which overlapping windows need, come out as the rows do.
(arXiv 2606.19348; the same choices for other engines: `emberkv.units`)
"""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.spec import PAGE_TOKENS, CacheSpec
from ..errors import ConfigError


@dataclass(frozen=True, slots=True)
class Windows:
    """One of the three."""

    interval_tokens: int | None
    """States are kept every so many tokens; None: nowhere."""

    def __post_init__(self) -> None:
        every = self.interval_tokens
        if every is not None and (every < PAGE_TOKENS or every % PAGE_TOKENS):
            raise ConfigError(f"windows: states are kept every {PAGE_TOKENS} tokens or a multiple, not every {every}")

    @classmethod
    def read(cls, text: str) -> Windows:
        """Of "full", "periodic:4096" or "zero". Raises ConfigError."""
        name, _, number = text.partition(":")
        if name == "periodic" and number.isdecimal():
            return cls(int(number))
        if text not in ("full", "zero"):
            raise ConfigError(f'windows: "full", "zero", or "periodic:" and a number of tokens, not {text!r}')
        return cls(PAGE_TOKENS if text == "full" else None)

    def replay_tokens(self, spec: CacheSpec) -> int:
        """How many tokens are computed again to have windows that are kept nowhere, a multiple of the page."""
        if self.interval_tokens is not None:
            return 0
        rows = sum(row.trailing for rows in spec.layers for row in rows if row.kind == "window" and row.trailing)
        return -(-rows // PAGE_TOKENS) * PAGE_TOKENS
