"""Waiting for something that servers do, so that whoever watches hears what is missing."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..errors import Unavailable

POLL_S = 0.1
SAY_AGAIN_S = 5.0

Say = Callable[[str], object]
"""Is told what is being done."""


def wait_until(
    look: Callable[[], tuple[bool, str]],
    *,
    say: Say,
    said: str = "",
    timeout_s: float | None = None,
    again_s: float = SAY_AGAIN_S,
    poll_s: float = POLL_S,
) -> None:
    """Return when `look` returns (True, words). Its words are said when they change (`said` were already), and again
    after each `again_s`. Raises Unavailable with the last of them after `timeout_s`.
    """
    begin_s = said_s = time.monotonic()
    while True:
        is_done, words = look()
        now_s = time.monotonic()
        if words != said:
            if words:
                say(words)
            said, said_s = words, now_s
        elif not is_done and now_s - said_s >= again_s:
            say(f"{words} (waiting for {now_s - begin_s:.0f} s)")
            said_s = now_s
        if is_done:
            return
        if timeout_s is not None and now_s - begin_s > timeout_s:
            raise Unavailable(f"{words}, and that for {timeout_s:.0f} s")
        time.sleep(poll_s)
