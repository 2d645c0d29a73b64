"""A profiler's trace of some steps, as chrome://tracing and Perfetto read it."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import profile, supported_activities


class Trace:
    """`folder`/trace-<first step>.json, of `steps` steps from step `first` on, 1 being the first of the run."""

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._path = folder / f"trace-{first}.json"
        self._first, self._last = first, first + steps - 1
        self._profile: profile | None = None
        self._over = False

    def step(self, done: int) -> None:
        """A step has ended."""
        if self._profile is not None and done >= self._last:
            self.close()
        elif self._profile is None and not self._over and self._first - 1 <= done < self._last:
            self._profile = profile(activities=supported_activities())
            self._profile.__enter__()

    def close(self) -> None:
        """Writes what there is."""
        recorder, self._profile = self._profile, None
        if recorder is not None:
            self._over = True
            recorder.__exit__(None, None, None)
            recorder.export_chrome_trace(str(self._path))
