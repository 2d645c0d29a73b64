"""Memory of batches is used again, and never while anybody has some of it.

Run: pytest tests/dataflow/test_token_memory.py
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from emberflow.tokens.memory import KEPT_BYTES_MAX, KEPT_MAX, Memory


def address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def test_what_nobody_has_is_used_again() -> None:
    memory = Memory()
    first = memory.take(3, 5)
    place = address(first)
    second = memory.take(3, 5)
    assert address(second) != place
    del first
    assert address(memory.take(3, 5)) == place
    assert memory.take(5, 3).shape == (5, 3)
    assert address(memory.take(2, 5)) not in (place, address(second))


@pytest.mark.parametrize(
    "part",
    [
        lambda array: array[1:2, 3:],
        lambda array: array.reshape(-1).view("u1")[::2],
        lambda array: memoryview(array)[1:],
        lambda array: array[0].data.cast("B"),
        lambda array: iter(array),
        lambda array: np.from_dlpack(array),
        lambda array: pytest.importorskip("torch").from_numpy(array.view("i4"))[0],
    ],
)
def test_a_part_holds_all_of_it(part: Callable[[Any], Any]) -> None:
    memory = Memory()
    first = memory.take(3, 5)
    place, held = address(first), part(first)
    del first
    assert address(memory.take(3, 5)) != place
    del held
    assert place in {address(each) for each in [memory.take(3, 5) for _ in range(2)]}


def test_little_is_kept() -> None:
    memory = Memory()
    many = [memory.take(1, 10) for _ in range(3 * KEPT_MAX)]
    many.clear()
    assert len(memory._blocks) == KEPT_MAX
    memory.clear()
    memory.take(1, KEPT_BYTES_MAX)
    assert not memory._blocks


def test_threads_never_share_a_block() -> None:
    memory, wrong = Memory(), []

    def work(number: int) -> None:
        rng, held = random.Random(number), []
        for step in range(3000):
            array = memory.take(2, 4)
            array[:] = number * 10_000 + step
            held.append((array, number * 10_000 + step))
            if len(held) > rng.randrange(4):
                array, value = held.pop(0)
                if not (array == value).all():
                    wrong.append(value)
            del array

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_samples_begin_somewhat_behind_a_pages_beginning() -> None:
    memory = Memory()
    held = [memory.take(rows, width) for rows, width in ((16, 16_385), (1, 3), (64, 4097), (3, 5))]
    assert {address(each) % 4096 for each in held} == {64}
