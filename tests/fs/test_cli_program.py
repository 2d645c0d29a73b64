"""The command line as a program: exit codes, interrupts, pipes, help. Run: pytest tests/fs/test_cli_program.py"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import emberfs
import pytest

from emberline import __version__
from emberline.cli import main
from tests.fs.cli_run import PROGRAM, emberline, start_emberline


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command of the tree, by its words."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*words, name)
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))


@pytest.mark.parametrize("words", list(commands(main)), ids=" ".join)
def test_every_help_shows_an_example(words: tuple[str, ...]) -> None:
    text = emberline(*words, "--help").stdout
    assert "Usage: emberline" in text
    assert f"emberline {' '.join(words)}" in text.split("\n", 1)[1]


def test_help_loads_no_store() -> None:
    script = "import sys; from emberline.cli import main; main(standalone_mode=False); print('emberfs' in sys.modules)"
    for words in (["--help"], ["fs", "--help"]):
        done = subprocess.run([PROGRAM[0], "-c", script, *words], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("False\n")


def test_no_help_loads_sql(tmp_path: Path) -> None:
    script = """
import sys
from click.testing import CliRunner
from emberline.cli import main
for words in sys.stdin.read().splitlines():
    assert CliRunner().invoke(main, [*words.split(), "--help"]).exit_code == 0, words
print(sorted({"duckdb", "pyarrow", "emberflow", "rich"} & sys.modules.keys()))
"""
    lines = "\n".join(map(" ".join, commands(main)))
    done = subprocess.run([PROGRAM[0], "-c", script], input=lines, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("words", [words for words in commands(main) if words[0] == "fs"], ids=" ".join)
def test_every_help_says_what_a_bare_path_is(words: tuple[str, ...]) -> None:
    text = emberline(*words, "--help").stdout
    assert "EMBERLINE_URL" in text or "COMMAND" in text


def test_the_version() -> None:
    assert emberline("--version").stdout == f"emberline {__version__}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fs", "cat", "file:///no/such/file"], "Error: No such file or directory: /no/such/file\n"),
        (["fs", "ls", "nothing://x"], "Protocol not known: nothing"),
        (["fs", "cp", "file:///no/such", "memory://x"], "/no/such"),
    ],
)
def test_a_failure_is_one_sentence(words: list[str], sentence: str) -> None:
    result = emberline(*words, code=1)
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


def test_the_debug_level_shows_the_traceback(tmp_path: Path) -> None:
    command = [*PROGRAM, "fs", "cat", f"file://{tmp_path}/gone"]
    environment = {**os.environ, "EMBERLINE_LOG": "debug"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_unknown_log_level_is_refused() -> None:
    done = subprocess.run(
        [*PROGRAM, "fs", "ls", "memory://"],
        env={**os.environ, "EMBERLINE_LOG": "loud"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert b"not 'loud'" in done.stderr


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(8 << 20))
    process = start_emberline("fs", "cat", f"file://{tmp_path}/large")
    assert process.stdout is not None
    assert process.stdout.read(10) == bytes(10)
    process.stdout.close()
    process.stdout = None
    assert process.communicate()[1] == b""
    assert process.returncode != 0


def test_an_interrupt_leaves_the_store_usable_and_no_half_file(tmp_path: Path) -> None:
    store = f"ember://{tmp_path}/store"
    with emberfs.connect(store) as client:
        client.put("/there", b"x")
    process = start_emberline("fs", "put", "-", "ember://half", store=store, stdin=subprocess.PIPE)
    assert process.stdin is not None
    # More than the pipe holds: when this returns, the command is reading.
    process.stdin.write(bytes(5 << 20))
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    output, complaint = process.communicate()
    assert (process.returncode, output, complaint) == (130, b"", b"interrupted\n")
    assert emberline("fs", "ls", store=store).stdout == "there\n"
    emberline("fs", "fsck", store)


def test_a_command_looks_into_a_store_that_a_program_has_open(tmp_path: Path) -> None:
    with emberfs.connect(f"ember://{tmp_path}/store") as client:
        client.put("/notes", b"mine")
        process = start_emberline("fs", "cat", f"ember://{tmp_path}/store/!/notes")
        assert process.communicate()[0] == b"mine"
        assert process.returncode == 0
        doctor = start_emberline("doctor", "--json", f"ember://{tmp_path}/store")
        lines = {line["name"]: line for line in map(json.loads, doctor.communicate()[0].splitlines())}
        assert lines["store"]["state"] == "OK"
        client.put("/notes", b"still mine")
