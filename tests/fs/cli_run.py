"""How the tests of the command line call it: in this process, or as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from click.testing import CliRunner, Result

from emberline.cli import main

PROGRAM = (sys.executable, "-c", "from emberline.cli import main; main()")


def emberline(*arguments: object, store: str | None = None, stdin: bytes = b"", code: int | None = 0) -> Result:
    """Run a command line in this process; `store` becomes EMBERLINE_URL. Fails unless it exits with `code`, if any."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(main, words, env={"EMBERLINE_URL": store, "EMBERLINE_LOG": None}, input=stdin)
    assert code in (None, result.exit_code), (
        f"{words}\nexit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    )
    return result


def emberline_json(*arguments: object, store: str | None = None, code: int = 0) -> list[Any]:
    """The objects that a command prints with --json."""
    output = emberline(*arguments, "--json", store=store, code=code).stdout
    return [json.loads(line) for line in output.splitlines()]


def start_emberline(*arguments: object, store: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """The command line as a process, outputs piped."""
    environment = {**os.environ, "EMBERLINE_URL": store}
    words = [*PROGRAM, *(str(argument) for argument in arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
