"""A job's record, as its driver writes it: see `history.py` for where and what.

Any fsspec filesystem will do, and most cannot append: the latest file of events is written anew until it is full.

Invariants: only the driver writes `job.json`, and every state of it is a whole one. A record never fails its job: what
cannot be written is told once, as a warning.

Does not know: what runs the job, or what steps hold.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

import msgspec

from ..errors import CallCancelled
from ..sources import StorageOptions
from .event import Event
from .history import LEASE_S, JobInfo, check_id, jobs_at, load, names, remove_file, replace_file, seen

_HEARTBEAT_S = 5.0
_QUERY_CHARS_MAX = 8_192
_TEXT_CHARS_MAX = 4_096
# A file is rewritten at each heartbeat until it has so many bytes: few files for a long job, little written twice.
_CHUNK_BYTES = 1 << 20
# Of a job's events, and of what it prints; the rest is dropped.
_KEPT_BYTES_MAX = 64 << 20

assert 3 * _HEARTBEAT_S <= LEASE_S

_log = logging.getLogger(__name__)


def start_thread(beat: Callable[[], None], every_s: float) -> Callable[[], None]:
    """Calls `beat` again and again from a thread of its own; gives back what stops that, and waits for it."""
    stopped = threading.Event()

    def run() -> None:
        while not stopped.wait(every_s):
            beat()

    thread = threading.Thread(target=run, name="emberflow-heartbeat", daemon=True)
    thread.start()

    def stop() -> None:
        stopped.set()
        if thread is not threading.current_thread():
            thread.join()

    return stop


class Record:
    """The driver's side of a record, for the length of a `with` block. Safe to use from many threads.

    `on_cancel` is called once, from the heartbeat's thread, when somebody asks for the job's end.
    """

    def __init__(
        self,
        root: str,
        info: JobInfo,
        *,
        explain: str = "",
        storage_options: StorageOptions | None = None,
        on_cancel: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.time,
        start: Callable[[Callable[[], None], float], Callable[[], None]] = start_thread,
        heartbeat_s: float = _HEARTBEAT_S,
    ) -> None:
        check_id(info.id)
        self.info = info
        info.query = _cut(info.query, _QUERY_CHARS_MAX)
        self._explain = explain
        self._fs, self._jobs = jobs_at(root, storage_options or {})
        self._on_cancel = on_cancel
        self._now = now
        self._start = start
        self._heartbeat_s = heartbeat_s
        self._stop: Callable[[], None] = lambda: None
        self._lock = threading.Lock()
        # Held while `job.json` is written: an older state must not come after a newer one.
        self._saving = threading.Lock()
        self._events = _Chunks("events-{:05d}.jsonl")
        self._output = _Chunks("output-{:05d}.log")
        self._lines: dict[tuple[int, int], str] = {}
        self._labels: dict[int, str] = {}
        self._shown: set[int] = set()
        self._is_cancelled = False
        self._has_warned = False

    @property
    def _path(self) -> str:
        return f"{self._jobs}/{self.info.id}"

    # ---- its life

    def __enter__(self) -> Record:
        self.info.started_s = self.info.seen_s = self._now()
        self.info.host, self.info.pid = socket.gethostname(), os.getpid()
        with self._quietly():
            self._take_over()
            self._fs.makedirs(self._path, exist_ok=True)
            if self._explain:
                replace_file(self._fs, f"{self._path}/explain.txt", _utf8(self._explain))
        self._save()
        self._stop = self._start(self.beat, self._heartbeat_s)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()
        with self._lock:
            for key in list(self._lines):
                self._print(key, "\n")
            self.info.ended_s = self.info.seen_s = self._now()
            self.info.state = "done"
            if error is not None:
                ended = self._is_cancelled or isinstance(error, CallCancelled | KeyboardInterrupt)
                self.info.state = "cancelled" if ended else "failed"
                told = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
                self.info.error = _cut("\n".join(told), _TEXT_CHARS_MAX)
        self._flush()
        self._save()

    def _take_over(self) -> None:
        """Makes room: an earlier job of this name has ended, or is lost, and is gone on with; or it runs, and this
        one takes another name."""
        if not self._fs.isdir(self._path):
            return
        earlier = load(self._fs, self._path)
        if earlier is not None and seen(earlier, self._now(), LEASE_S).state == "running":
            self.info.id = f"{self.info.id}-{uuid.uuid4().hex[:4]}"
            return
        for name in names(self._fs, self._path):
            remove_file(self._fs, f"{self._path}/{name}")

    def beat(self) -> None:
        """Renews the lease, writes what there is to write, and sees whether the job is to end."""
        with self._lock:
            self.info.seen_s = self._now()
        self._save()
        self._flush()
        with self._quietly():
            self._fs.invalidate_cache(self._path)
            if not self._is_cancelled and self._fs.exists(f"{self._path}/cancel"):
                self._is_cancelled = True
                self._on_cancel()

    def use(self, identity: str) -> None:
        """Names a step of the job. When this returns no sweep will take the step away: call it before looking at
        what the step has."""
        with self._lock:
            if identity in self.info.steps:
                return
            self.info.steps.append(identity)
        self._save()

    # ---- what happens

    def note(self, event: Event) -> None:
        """Keeps an event. Writes nothing yet."""
        with self._lock:
            if event.kind == "output":
                self._print((event.stage, event.task), str(event.data.get("text", "")))
            elif event.kind != "rows":
                self._count(event)
                self._events.add(msgspec.json.encode(self._short(event), enc_hook=str) + b"\n")

    def _count(self, event: Event) -> None:
        if event.kind == "stage":
            self._labels[event.stage] = str(event.data.get("label", ""))
            self.info.stages += 1
            self.info.tasks += int(event.data.get("tasks", 0))
            self.info.tasks_done += int(event.data.get("reused", 0))
        elif event.kind == "finished":
            self.info.tasks_done += 1
        elif event.kind == "recompute":
            self.info.tasks_done -= 1

    def _short(self, event: Event) -> Event:
        """The event with long texts cut, and the SQL only of a stage's first task: the others' is alike."""
        data = {key: _cut(value, _TEXT_CHARS_MAX) if isinstance(value, str) else value
                for key, value in event.data.items()}  # fmt: skip
        if event.kind == "task":
            if event.stage in self._shown:
                data.pop("sql", None)
            self._shown.add(event.stage)
        return Event(event.kind, event.stage, event.task, event.at_s, data)

    def _print(self, key: tuple[int, int], text: str) -> None:
        """Adds whole lines to the output; what a task has not ended with a line feed waits."""
        *lines, rest = (self._lines.pop(key, "") + text).split("\n")
        if len(rest) > _TEXT_CHARS_MAX:
            lines, rest = [*lines, rest], ""
        if rest:
            self._lines[key] = rest
        stage, task = key
        name = f"{self._labels.get(stage, 'stage')} {stage}.{task}"
        self._output.add(b"".join(_utf8(f"[{name}] {line}\n") for line in lines))

    # ---- writing

    def _save(self) -> None:
        with self._saving, self._quietly():
            with self._lock:
                data = msgspec.json.encode(self.info)
            replace_file(self._fs, f"{self._path}/job.json", data)

    def _flush(self) -> None:
        with self._saving:
            for chunks in (self._events, self._output):
                with self._quietly():
                    self._write(chunks)

    def _write(self, chunks: _Chunks) -> None:
        with self._lock:
            name, data = chunks.name, bytes(chunks.data)
        if len(data) == chunks.written_bytes:
            return
        replace_file(self._fs, f"{self._path}/{name}", data)
        with self._lock:
            chunks.wrote(len(data))

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_warned:
                self._has_warned = True
                _log.warning("the record of job %s is incomplete: %s: %s", self.info.id, type(error).__name__, error)


class _Chunks:
    """Lines on their way to numbered files: those of the latest file, which may be written already in part."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._index = 0
        self.data = bytearray()
        self.written_bytes = 0
        self._sum_bytes = 0

    @property
    def name(self) -> str:
        return self._pattern.format(self._index)

    def add(self, lines: bytes) -> None:
        self._sum_bytes += len(lines)
        if self._sum_bytes <= _KEPT_BYTES_MAX:
            self.data += lines

    def wrote(self, size_bytes: int) -> None:
        """The first bytes of `data` are in the file; more may have come since."""
        self.written_bytes = size_bytes
        if size_bytes >= _CHUNK_BYTES:
            del self.data[:size_bytes]
            self.written_bytes = 0
            self._index += 1


def _cut(text: str, chars_max: int) -> str:
    # What a user's program prints or raises may hold halves of characters, which JSON does not take.
    text = _utf8(text).decode()
    return text if len(text) <= chars_max else f"{text[:chars_max]} ..."


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")
