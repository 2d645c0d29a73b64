"""`emberline kv doctor` as a user runs it, its lines by name."""

from __future__ import annotations

import json
import subprocess
import sys


def doctor(address: str, engine: str, *more: str, code: int = 0) -> dict[str, dict[str, str]]:
    """What it found. Fails unless it exits with `code`."""
    command = [sys.executable, "-m", "emberline", "kv", "doctor", "--address", address, "--engine", engine, "--json"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code, f"{done.stdout}{done.stderr}"
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}
