"""What is said when no manager is the primary. Run: pytest tests/fs/test_client_managers.py"""

from __future__ import annotations

from typing import Any

import pytest
from emberfs.client.managers import Managers
from emberfs.errors import StaleRouting, Unavailable
from emberfs.messages import GetRouting, RoutingReply
from emberfs.testing.sim.loop import SimRuntime, run


class Network:
    """Address -> what a call to it raises."""

    def __init__(self, errors: dict[str, Exception]) -> None:
        self.errors = errors

    def connection(self, address: str) -> Any:
        return Connection(self.errors[address])


class Connection:
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def call(self, request: object) -> None:
        raise self.error


def said(errors: dict[str, Exception]) -> str:
    async def main(sim: SimRuntime) -> str:
        network: Any = Network(errors)
        with pytest.raises(Unavailable) as caught:
            await Managers(sim, network, list(errors)).ask(GetRouting(), RoutingReply, timeout_s=1.0)
        return str(caught.value)

    return run(0, main)


def test_one_who_lives_is_quoted_and_not_the_dead() -> None:
    errors = {"a:1": Unavailable("a:1: Connection refused"), "b:1": StaleRouting("no key-value store")}
    for order in (errors, dict(reversed(errors.items()))):
        words = said(order)
        assert words.startswith("no manager is the primary (")
        assert words.endswith("): no key-value store")


def test_a_primary_that_the_url_does_not_name_is_a_hint() -> None:
    elsewhere = StaleRouting("the primary manager is at b:1")
    assert said({"a:1": elsewhere}).endswith("is at b:1; a URL should name all managers")
    assert said({"a:1": elsewhere, "b:1": Unavailable("gone")}).endswith("is at b:1")


def test_silence_is_told_as_such() -> None:
    assert said({"a:1": Unavailable("Connection refused")}) == "no manager answered (a:1): Connection refused"
