"""Which checkpoints a place holds: one is begun, published, superseded, removed, and found.

The one rule: **a checkpoint exists if and only if its marker file does**, which is written last and whole. Until then
its folder is an attempt, that nobody looks at. So a crash at any moment leaves current what was current before, and no
file system needs to be able to rename.

A folder is `step-<step>.<number>.<token>`. The number is one more than any that is there: publications are in its
order, and `latest` is the last one published. (The highest step would be wrong for who went back to an earlier step and
trained on from there.) The token keeps the files of two jobs apart that should not write here at the same time but do.

One process at a time writes here, and the one that published last is it: another that has begun to before raises
Superseded when it begins or publishes next. It finds that out by looking, since not every file system can exclude:
two that publish in the same moment may both succeed, and then one of them is told at its next save.

Removal takes the marker first. What else lies in the place is left alone. It does not know torch.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from ..errors import Damaged, NoCheckpoint, Superseded
from .index import ATTEMPT, INDEX, MARKER, Index, Marker, decode_index, decode_marker
from .place import Place, is_lost

log = logging.getLogger("emberline.checkpoint")

DEAD_AFTER_S = 86_400.0
"""An attempt of a process that cannot be asked is dead when nothing in it has changed for so long."""

_FOLDER = re.compile(r"step-(\d+)\.(\d+)\.([0-9a-f]{8})")


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """One folder; in order of publication."""

    number: int
    step: int
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """Which checkpoints stay. The one published last always does."""

    keep: int | None = 3
    """So many of the last published; None: all."""
    keep_every: int | None = None
    """And every one whose step is a multiple of this."""

    def __post_init__(self) -> None:
        for name, value in (("keep", self.keep), ("keep_every", self.keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is at least 1, or None: {value}")

    def superfluous(self, entries: Iterable[Entry]) -> list[Entry]:
        """Of the published, those that may go; one that was saved again at the same step is among them."""
        newest = {entry.step: entry for entry in sorted(entries)}
        order = sorted(newest.values(), reverse=True)
        last = order if self.keep is None else order[: self.keep]
        kept = {entry for entry in order if self.keep_every and entry.step % self.keep_every == 0}.union(last)
        return [entry for entry in entries if entry not in kept]


class Owner(msgspec.Struct, frozen=True):
    """`attempt.json`: the process that is at an attempt."""

    host: str
    """This boot of this machine, and the processes that see each other's ids: only there does a pid mean something."""
    pid: int
    started: int
    """When, in the kernel's ticks since boot: a pid is used again."""

    @classmethod
    def this(cls) -> Owner:
        """The process that asks."""
        return cls(_host(), os.getpid(), _started(os.getpid()) or 0)

    @property
    def ended(self) -> bool | None:
        """Whether it has; None of a process elsewhere, of which nobody here knows."""
        return _started(self.pid) != self.started if self.host == _host() != "" else None


def _host() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19])
    except OSError:
        return None


class Catalog:
    """The checkpoints of one place. `clock`: Unix time in seconds."""

    def __init__(
        self, place: Place, retention: Retention | None = None, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.place = place
        self._retention = retention or Retention()
        self._clock = clock
        self._mine: set[str] = set()
        """Folders that were begun here."""
        self._before: Entry | None = None
        """Which was the latest when the first of them was."""

    # ---- finding

    def published(self) -> list[Entry]:
        """In order of publication."""
        return [entry for entry in self._folders() if self._is_published(entry)]

    def latest(self) -> Entry | None:
        """Published last."""
        return next((entry for entry in reversed(self._folders()) if self._is_published(entry)), None)

    def find(self, step: int | None) -> Entry:
        """That of a step, or the latest. Raises NoCheckpoint."""
        entry = self.latest() if step is None else self._of_step(step)
        if entry is None:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NoCheckpoint(f"there is {what} at {self.place.url}")
        return entry

    def _of_step(self, step: int) -> Entry | None:
        folders = [entry for entry in self._folders() if entry.step == step]
        return next((entry for entry in reversed(folders) if self._is_published(entry)), None)

    def _folders(self) -> list[Entry]:
        found = (_FOLDER.fullmatch(name) for name in self.place.folders())
        return sorted(Entry(int(match[2]), int(match[1]), match[0]) for match in found if match)

    def _is_published(self, entry: Entry) -> bool:
        return self.place.exists(f"{entry.folder}/{MARKER}")

    def check_there(self, entry: Entry) -> None:
        """Raises NoCheckpoint if one that was found is removed since: what it lacks now is no damage."""
        if not self._is_published(entry):
            raise NoCheckpoint(f"the checkpoint of step {entry.step} at {self.place.url} was removed while it was read")

    def marker(self, entry: Entry) -> Marker:
        """Raises Damaged, NoCheckpoint."""
        return decode_marker(self._read(entry, MARKER), entry.step)

    def index(self, entry: Entry, marker: Marker) -> Index:
        """Raises Damaged, NoCheckpoint."""
        return decode_index(self._read(entry, INDEX), marker)

    def _read(self, entry: Entry, file: str) -> bytes:
        try:
            return self.place.read(f"{entry.folder}/{file}")
        except OSError as error:
            if not is_lost(error):
                raise
            self.check_there(entry)
            raise Damaged(entry.step, file, f"cannot be read: {error}") from error

    # ---- changing

    def begin(self, step: int) -> str:
        """The name of a folder for an attempt: nothing is written yet. Raises Superseded."""
        if self._mine:
            self._check_alone()
        else:
            self._before = self.latest()
        number = max((entry.number for entry in self._folders()), default=0) + 1
        folder = f"step-{step:09d}.{number:06d}.{secrets.token_hex(4)}"
        self._mine.add(folder)
        return folder

    def make(self, folder: str) -> None:
        """Make the folder of an attempt, and say in it whose it is."""
        self.place.make(folder)
        self.place.put(f"{folder}/{ATTEMPT}", msgspec.json.encode(Owner.this()))

    def publish(self, folder: str, index: bytes, marker: Marker) -> None:
        """Make an attempt, all of whose other files are there, a checkpoint. Raises Superseded."""
        self.place.write(f"{folder}/{INDEX}", [memoryview(index)])
        self.place.settle(folder)
        self._check_alone()
        self.place.put(f"{folder}/{MARKER}", marker.encode())

    def _check_alone(self) -> None:
        latest = self.latest()
        if latest and latest.folder not in self._mine and (self._before is None or latest > self._before):
            raise Superseded(
                f"another process has published step {latest.step} at {self.place.url} since this one began to save "
                "there, and that is what is gone on from: end one of the two, or give it a URL of its own"
            )

    def abandon(self, folder: str) -> None:
        """Remove an attempt that failed, as far as that goes."""
        try:
            # First the marker: who failed to hear that it was written may have written it.
            if self.place.exists(f"{folder}/{MARKER}"):
                self.place.remove(f"{folder}/{MARKER}")
            self.place.remove(folder)
        except Exception as error:
            log.warning("%s/%s is left behind: %s", self.place.url, folder, error)

    def tidy(self) -> None:
        """Remove what retention lets go, and attempts that are surely dead. What does not go is left for next time."""
        try:
            folders = self._folders()
            published = [entry for entry in folders if self._is_published(entry)]
            for entry in self._retention.superfluous(published):
                self.place.remove(f"{entry.folder}/{MARKER}")
                self.place.remove(entry.folder)
            for entry in set(folders).difference(published):
                if self._is_dead(entry):
                    self.place.remove(entry.folder)
        except Exception as error:  # whatever it is: the save is good, and the other ranks have been told so
            log.warning("old checkpoints of %s are left behind: %s", self.place.url, error)

    def _is_dead(self, entry: Entry) -> bool:
        try:
            owner = msgspec.json.decode(self.place.read(f"{entry.folder}/{ATTEMPT}"), type=Owner)
        except (FileNotFoundError, msgspec.MsgspecError):
            owner = None  # it died before it could say, or this is what a removal left
        if owner and (ended := owner.ended) is not None:
            return ended
        return self._clock() - self.place.touched_s(entry.folder) > DEAD_AFTER_S
