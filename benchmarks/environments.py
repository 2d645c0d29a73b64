"""Environments of their own for peers that cannot be installed beside ours, under `.bench/venvs`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

VENVS = Path(__file__).resolve().parent.parent / ".bench" / "venvs"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Made by `python -m benchmarks --setup`; a benchmark goes without what is not there."""

    name: str
    requirements: tuple[str, ...]
    imports: str
    """The module whose import shows that it works."""
    needs: str = ""
    """What the machine must have besides."""

    @property
    def directory(self) -> Path:
        """Where it is, or would be."""
        return VENVS / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.directory / "bin" / "python"

    def is_there(self) -> bool:
        """It was set up, and can be imported."""
        if not self.python.exists():
            return False
        command = [str(self.python), "-c", f"import {self.imports}"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    def set_up(self, say: Callable[[str], None]) -> None:
        """Make it, if it is not there."""
        if not self.is_there():
            subprocess.run([sys.executable, "-m", "venv", str(self.directory)], check=True)
            pip = [str(self.python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            if subprocess.run([*pip, *self.requirements], check=False).returncode:
                say(f"{self.name} cannot be installed here: the benchmarks go without it")
                return
        if self.is_there():
            say(f"{self.name} is there, in an environment of its own")
        else:
            say(f"{self.name} cannot be imported{f': it needs {self.needs}' if self.needs else ''}")
