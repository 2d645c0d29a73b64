"""`Checkpoints`: the state of a training, saved now and then, and found again.

    checkpoints = Checkpoints("ember:///srv/store/run-1/checkpoints", keep=3)
    step = checkpoints.load(state) if checkpoints.latest() is not None else 0
    ...
    checkpoints.save_async(step, state)   # returns when the state may change again
    ...
    checkpoints.close()                   # waits for the last one, and raises what went wrong with it

Invariants:
  - A save that did not end leaves what was current before it current (see `catalog`).
  - One process (or group of ranks) at a time saves at a URL; which is not the last to do so raises Superseded.
  - One save at a time: a second one waits for the first, and raises what that one raised.
  - `save`, `save_async`, `load`, `wait` and `close` are collective: every rank of the default process group calls them,
    in the same order. Everything else is for any one process, without torch.

A state is a nested dict of tensors, DTensors and plain values (see `tree` and `values`); at its top there may be
objects with `state_dict` and `load_state_dict`. Names that two ranks share must stand for the same tensor or value on
both: one of them is saved. What differs by rank needs a name of its own.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from ..errors import Damaged, StateError
from .catalog import Catalog, Entry, Retention
from .check import problems
from .place import open_place

if TYPE_CHECKING:
    import torch

    from ..model.config import ModelConfig
    from ..weights.save import Quantised
    from .ranks import Ranks
    from .staging import Staging

log = logging.getLogger("emberline.checkpoint")

THREADS = 2


class Checkpoints:
    """The checkpoints at a URL or local path, which need not be there yet.

    `keep` of the last published stay (None: all), and every one whose step is a multiple of `keep_every`. `config`, the
    model's, is written beside each one and makes `export` know the model. `threads` write and read files on each rank.
    `storage_options` are fsspec's. `clock`: Unix time in seconds.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        config: ModelConfig | None = None,
        threads: int = THREADS,
        storage_options: dict[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads is at least 1: {threads}")
        self.catalog = Catalog(
            open_place(url, storage_options), Retention(keep=keep, keep_every=keep_every), clock=clock
        )
        self._config = config
        self._threads = threads
        self._clock = clock
        self._job: _Job | None = None
        self._ranks: Ranks | None = None
        self._staging: Staging | None = None

    # ---- finding

    def steps(self) -> list[int]:
        """The steps there are checkpoints of, ascending."""
        return sorted({entry.step for entry in self.catalog.published()})

    def latest(self) -> int | None:
        """The step of the one published last, or None."""
        entry = self.catalog.latest()
        return entry.step if entry else None

    # ---- saving

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save, and return when it is published.

        Raises StateError, Superseded, RankFailed, and what the file system raises.
        """
        self.wait()
        _check(step)
        self._save(step, state, None)

    def save_async(self, step: int, state: dict[str, Any]) -> None:
        """Save in the background. When this returns the state may change.

        Before, it waits for the save before it, and raises what that one raised. Raises StateError; what else goes
        wrong, at whichever moment, is raised by the next call, on all ranks.
        """
        self.wait()
        _check(step)
        if self._staging is None:
            from .staging import Staging

            self._staging = Staging()
        self._collective()
        job = self._job = _Job(lambda staged: self._save(step, state, staged))
        job.start()
        job.staged.wait()
        if job.is_refused:
            self.wait()

    @property
    def saving(self) -> bool:
        """Whether an asynchronous save is under way."""
        return self._job is not None and self._job.is_alive()

    def wait(self) -> None:
        """Return when no save is under way; raise what the last asynchronous one raised, once."""
        job, self._job = self._job, None
        if job is not None:
            job.join()
            if job.error is not None:
                raise job.error

    def close(self) -> None:
        """Wait, and let go of the staging memory."""
        try:
            self.wait()
        finally:
            self._staging = None
            if self._ranks is not None:
                self._ranks.close()
                self._ranks = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collective(self) -> Ranks:
        if self._ranks is None:
            from .ranks import Ranks

            self._ranks = Ranks()
        return self._ranks

    def _save(self, step: int, state: dict[str, Any], staged: Callable[[], None] | None) -> None:
        """One save, `staged` being told when the state may change; None: it does not before this returns."""
        from torch.distributed.checkpoint.api import CheckpointException

        # Its public twin warns at every save in one process that there is no process group.
        from torch.distributed.checkpoint.state_dict_saver import _save_state_dict

        from .image import Image
        from .planner import SavePlanner
        from .writer import Writer

        def stage(image: Image) -> Image:
            if staged is None:
                return image
            assert self._staging is not None
            copy = self._staging.take(image)
            staged()
            return copy

        ranks = self._collective()
        writer = Writer(
            self.catalog,
            step,
            threads=self._threads,
            config=self._described(),
            stage=stage,
            told=ranks.told,
            now=self._clock,
        )
        try:
            _save_state_dict(
                _state_dicts(state), writer, process_group=ranks.group, no_dist=ranks.alone, planner=SavePlanner()
            )
        except CheckpointException as failed:
            raise ranks.cause(failed) from None
        finally:
            if writer.attempt is not None:
                self.catalog.abandon(writer.attempt)
        if ranks.rank == 0:
            self.catalog.tidy()

    def _described(self) -> dict[str, Any] | None:
        if self._config is None:
            return None
        from ..model.published import to_published

        return to_published(self._config)

    # ---- checking and exporting

    def verify(self, step: int | None = None, *, progress: Callable[[int], object] = lambda _: None) -> list[str]:
        """Read every byte of the checkpoint of `step`, or the latest, and tell what is damaged.

        Raises NoCheckpoint, also for one that is removed meanwhile, as a run that goes on may do.
        `progress` is called with the number of bytes just read.
        """
        entry = self.catalog.find(step)
        found = [str(problem) for problem in problems(self.catalog, entry, progress)]
        if found:
            self.catalog.check_there(entry)
        return found

    def export(
        self,
        step: int | None,
        url: str | os.PathLike[str],
        *,
        config: ModelConfig | None = None,
        names: Literal["official", "transformers"] = "official",
        dtype: torch.dtype | None = None,
        quantised: Quantised | None = None,
        storage_options: dict[str, Any] | None = None,
    ) -> int:
        """Write state["model"] as safetensors with a config.json to a new folder at any URL; return the step.

        `config` is that of the checkpoint if not said; the rest is as in `embertrain.weights.save`. The model has to
        fit into memory and, if the URL is not a local path, on a temporary disk too. Raises NoCheckpoint, Damaged,
        StateError, WeightsError, FileExistsError.
        """
        from .export import config_of, model_of, write

        entry = self.catalog.find(step)
        marker = self.catalog.marker(entry)
        model = model_of(self.catalog.index(entry, marker))
        shape = config or config_of(marker)
        self.load({"model": model}, entry.step, partial=True)
        write(model, url, shape, storage_options, names=names, dtype=dtype, quantised=quantised)
        return entry.step

    # ---- loading

    def load(
        self, state: dict[str, Any], step: int | None = None, *, partial: bool = False, fallback: bool = False
    ) -> int:
        """Fill `state` from the checkpoint of `step`, or the latest, and return its step.

        Tensors are filled where they are, whatever number of ranks saved them and fill them. Values are replaced, and
        those that the state has not are added. The names, shapes and dtypes of tensors must be the same on both sides;
        `partial` takes only what the state has a place for.

        A damaged checkpoint raises Damaged, and may have filled some of the tensors. With `fallback` the one published
        before it is tried then, and so on. Raises NoCheckpoint, also for one that is removed meanwhile, and StateError.
        """
        self.wait()
        ranks = self._collective()
        choice = ranks.told(lambda: self._choice(step, fallback))
        for older, entry in enumerate(choice, 1):
            try:
                self._load(entry, state, partial)
                return entry.step
            except Damaged as damaged:
                ranks.told(functools.partial(self.catalog.check_there, entry))
                if older == len(choice):
                    raise
                log.warning("%s: taking the one before it", damaged)
        raise AssertionError("a choice is never empty")

    def _choice(self, step: int | None, fallback: bool) -> list[Entry]:
        first = self.catalog.find(step)
        if not fallback:
            return [first]
        return [entry for entry in reversed(self.catalog.published()) if entry <= first]

    def _load(self, entry: Entry, state: dict[str, Any], partial: bool) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        from .planner import LoadPlanner
        from .reader import Reader

        ranks = self._collective()
        index = ranks.told(lambda: self.catalog.index(entry, self.catalog.marker(entry)))
        planner = LoadPlanner(index, partial=partial)
        reader = Reader(self.catalog.place, entry.folder, entry.step, index, threads=self._threads)
        found = _state_dicts(state)
        try:
            _load_state_dict(found, reader, process_group=ranks.group, no_dist=ranks.alone, planner=planner)
        except CheckpointException as failed:
            raise ranks.cause(failed) from None
        planner.finish(found)
        for key, value in state.items():
            if hasattr(value, "load_state_dict"):
                value.load_state_dict(found[key])
        state.update({key: value for key, value in found.items() if not hasattr(state.get(key), "load_state_dict")})


class _Job(threading.Thread):
    """A save in the background. It is no daemon: an interpreter that ends waits for it."""

    def __init__(self, save: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(name="emberline-checkpoint")
        self._save = save
        self.staged = threading.Event()
        """Set when the state may change: it is copied, or the save has failed before that."""
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._save(self.staged.set)
        except BaseException as error:
            # Whoever never waits is told all the same.
            log.error("a checkpoint was not written: %s", error)
            self.error = error
        finally:
            self.staged.set()

    @property
    def is_refused(self) -> bool:
        """Whether the state cannot be saved, now or later: it is looked at before it is copied."""
        return isinstance(self.error, StateError)


def _check(step: int) -> None:
    if step < 0:
        raise ValueError(f"a step is 0 or more: {step}")


def _state_dicts(state: dict[str, Any]) -> dict[str, Any]:
    """A state in which the objects at the top are their state dicts."""
    return {key: value.state_dict() if hasattr(value, "state_dict") else value for key, value in state.items()}
