"""The settings of a cluster: what they may be, and how a change is decided. Run: pytest tests/fs/test_settings.py"""

from __future__ import annotations

import math

import pytest
from emberfs.errors import Conflict, LimitExceeded, NotFound
from emberfs.manager.rows import ConfigRow, decode, encode
from emberfs.manager.settings import after_request, after_wait
from emberfs.messages import SetConfig
from emberfs.settings import SETTINGS, Settings, check_together, checked
from emberfs.storage.node import BEAT_REST_S


def test_all_defaults_are_allowed() -> None:
    settings = Settings()
    check_together(settings)
    assert all(checked(name, value) == value for name, value in settings.values().items())
    assert set(settings.values()) == set(SETTINGS)
    assert settings.lease_s == 2.5


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("dead_after_s", 0.5, "2.0 to 60.0, not 0.5"),
        ("dead_after_s", math.nan, "2.0 to 60.0"),
        ("trash_s", math.inf, "trash_s is"),
        ("moves_max", 2.5, "a whole number"),
        ("heartbeat_s", BEAT_REST_S - 0.01, "heartbeat_s is"),
        ("resync_bytes_per_s", 0, "resync_bytes_per_s is"),
        ("scrub_bytes_per_s", 1, "scrub_bytes_per_s is 1048576 to"),
    ],
)
def test_a_value_has_bounds(name: str, value: float, says: str) -> None:
    with pytest.raises(LimitExceeded, match=says):
        checked(name, value)


def test_a_name_is_known() -> None:
    with pytest.raises(NotFound, match="did you mean tombstone_s"):
        checked("tombstones_s", 1)


def test_a_value_has_the_type_of_its_setting() -> None:
    assert repr(checked("dead_after_s", 4)) == "4.0"
    assert repr(checked("moves_max", 4.0)) == "4"


def test_names_of_a_newer_release_mean_nothing_and_are_kept() -> None:
    row = ConfigRow(3, {"colour": 7, "moves_max": 9})
    assert Settings.of(row.values) == Settings(moves_max=9)
    after = after_request(row, SetConfig(3, {"trash_s": 1}, ["moves_max"]))
    assert after == ConfigRow(4, {"colour": 7, "trash_s": 1.0})
    assert decode(encode(after), ConfigRow, key=b"") == after


def test_a_change_names_the_version_that_it_changes() -> None:
    row = ConfigRow(3, {"moves_max": 9})
    with pytest.raises(Conflict, match="at version 3 by now, not 2"):
        after_request(row, SetConfig(2, {"moves_max": 8}))
    assert after_request(row, SetConfig(2, {"moves_max": 9})) is None, "an earlier attempt did it"
    assert after_request(row, SetConfig(2, {}, ["trash_s"])) is None
    with pytest.raises(NotFound):
        after_request(row, SetConfig(3, {}, ["colour"]))
    with pytest.raises(LimitExceeded, match="is less than dead_after_s"):
        after_request(row, SetConfig(3, {"tombstone_s": 2}))
    with pytest.raises(LimitExceeded, match="before a second heartbeat"):
        after_request(row, SetConfig(3, {"dead_after_s": 2, "heartbeat_s": 1}))


def test_a_longer_lease_is_waited_for_at_once_and_a_shorter_one_when_the_longer_is_over() -> None:
    row = after_request(ConfigRow(), SetConfig(1, {"dead_after_s": 10}))
    assert row is not None and row.waits_s == 10.0
    row = after_request(row, SetConfig(2, {"dead_after_s": 5}))
    assert row is not None and row.waits_s == 10.0
    assert after_wait(row, now_s=109.9, since_s=100.0) is None
    shorter = after_wait(row, now_s=110.0, since_s=100.0)
    assert shorter == ConfigRow(4, {"dead_after_s": 5.0}, 5.0)
    assert after_wait(shorter, now_s=1e9, since_s=0.0) is None
    back = after_request(row, SetConfig(3, {}, ["dead_after_s"]))
    assert back is not None and back.waits_s == 10.0
