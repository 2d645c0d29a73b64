"""Which attempt of a task counts, whoever else tries. Run: pytest tests/dataflow/test_step_places.py."""

from __future__ import annotations

import threading

import fsspec
from emberflow.job.steps import Output, Place, new_attempt
from emberflow.sources import open_url


def made(place: Place, index: int) -> Output:
    """An attempt's output, with its data written."""
    attempt = new_attempt()
    url = place.data_url(index, attempt)
    filesystem, path = open_url(url, {})
    filesystem.pipe_file(path, attempt.encode())
    return Output(attempt=attempt, rows=1, size_bytes=len(attempt), url=url)


def exists(url: str) -> bool:
    filesystem, path = open_url(url, {})
    return bool(filesystem.exists(path))


def test_the_first_to_publish_counts_and_the_second_takes_its_data_away(root: str) -> None:
    place = Place(f"{root}/step")
    place.prepare()
    assert place.winner(3) is None
    first, second = made(place, 3), made(place, 3)
    assert place.publish(3, first).attempt == first.attempt
    assert place.publish(3, second).attempt == first.attempt
    assert place.publish(3, first).attempt == first.attempt
    assert exists(first.url)
    assert not exists(second.url)
    assert {index: output.attempt for index, output in place.winners().items()} == {3: first.attempt}


def test_of_many_at_once_one_counts_and_all_are_told_which(root: str) -> None:
    place = Place(f"{root}/step")
    place.prepare()
    attempts = [made(place, 0) for _ in range(8)]
    together = threading.Barrier(len(attempts))
    told: list[str] = []

    def publish(output: Output) -> None:
        together.wait()
        told.append(place.publish(0, output).attempt)

    threads = [threading.Thread(target=publish, args=(output,)) for output in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = place.winner(0)
    assert winner is not None
    assert told == [winner.attempt] * len(attempts)
    assert [output.attempt for output in attempts if exists(output.url)] == [winner.attempt]


def test_what_is_dropped_no_longer_counts(root: str) -> None:
    place = Place(f"{root}/step")
    place.prepare()
    first = place.publish(0, made(place, 0))
    place.drop(0)
    place.drop(0)
    assert place.winner(0) is None
    second = place.publish(0, made(place, 0))
    assert second.attempt != first.attempt


def test_a_manifest_that_is_no_manifest_counts_for_nothing(root: str) -> None:
    place = Place(f"{root}/step")
    place.prepare()
    filesystem, path = open_url(f"{root}/step/00000.won", {})
    filesystem.pipe_file(path, b"\xc1 cut short")
    assert place.winner(0) is None
    output = made(place, 0)
    assert place.publish(0, output).attempt == output.attempt


def test_a_step_that_was_never_begun_has_no_winners() -> None:
    assert Place("memory://emberflow-nowhere/step").winners() == {}
    assert not fsspec.filesystem("memory").exists("/emberflow-nowhere")
