"""What is said while servers are waited for. Run: pytest tests/fs/test_cluster_waiting.py"""

from __future__ import annotations

import pytest
from emberfs.cluster.waiting import wait_until
from emberfs.errors import Unavailable


def heard(looks: list[tuple[bool, str]], *, said: str = "", again_s: float = 1e9) -> list[str]:
    lines: list[str] = []
    wait_until(iter(looks).__next__, say=lines.append, said=said, again_s=again_s, poll_s=0.0)
    return lines


def test_what_changes_is_said_once() -> None:
    assert heard([(False, "2 left"), (False, "2 left"), (False, "1 left"), (True, "0 left")]) == [
        "2 left",
        "1 left",
        "0 left",
    ]
    assert heard([(False, "2 left"), (True, "2 left")], said="2 left") == []
    assert heard([(False, "2 left"), (True, "")]) == ["2 left"]


def test_a_long_wait_is_said_again() -> None:
    lines = heard([(False, "2 left")] * 3 + [(True, "2 left")], again_s=0.0)
    assert lines == ["2 left", *["2 left (waiting for 0 s)"] * 2]


def test_the_end_of_patience_says_what_was_missing() -> None:
    with pytest.raises(Unavailable, match="2 left, and that for 0 s"):
        wait_until(lambda: (False, "2 left"), say=lambda _: None, timeout_s=0.0, poll_s=0.0)
