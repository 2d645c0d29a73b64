"""The documents tell the truth: links resolve, headings exist, commands shown to the reader are there.

Run: pytest tests/test_docs.py, or make docs.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    """Every Markdown page of the tree, hidden folders apart."""
    pages = ROOT.rglob("*.md")
    return sorted(page for page in pages if not any(part.startswith(".") for part in page.relative_to(ROOT).parts))


def links(text: str) -> list[str]:
    """The targets of the Markdown links outside code."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The fragments that the headings of a page make, by GitHub's rule."""
    titles = re.findall(r"^#+ +(.+?)\s*$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path) -> Iterator[str]:
    for link in links(page.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists():
            yield f"{link}: no such file"
        elif fragment and fragment not in anchors(target.read_text()):
            yield f"{link}: no such heading"


def commands(text: str) -> list[list[str]]:
    """The command lines of the bash blocks, split into words; the comment after a command is not part of it."""
    lines = "\n".join(body for language, body in FENCE.findall(text) if language == "bash").replace("\\\n", " ")
    return [words for line in lines.splitlines() if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def unknown_part(words: list[str], cli: click.Command) -> str | None:
    """What of a command line does not exist in this tree, or None."""
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
    program, arguments = words[0].rsplit("/", 1)[-1], words[1:]
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return next((word for word in arguments if word not in targets and "=" not in word), None)
    if arguments[:2] == ["-m", "benchmarks"]:
        names = [word for word in arguments[2:] if re.fullmatch(r"[a-z_]+", word) and word != "all"]
        return next((name for name in names if not (ROOT / "benchmarks" / f"{name}.py").exists()), None)
    if program == "emberline":
        for word in arguments:
            if not isinstance(cli, click.Group):
                return None
            if not word.startswith("-"):
                found = cli.get_command(click.Context(cli), word)
                if found is None:
                    return word
                cli = found
    return None


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_resolves(page: Path) -> None:
    assert not list(broken_links(page))


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# One title\n[a](#one-title) [b](page.md#two) [c](gone.md) [d](https://example.org) `[e](f)`\n")
    assert list(broken_links(page)) == ["page.md#two: no such heading", "gone.md: no such file"]


def test_every_page_is_in_the_index() -> None:
    """A page that no other page leads to is never read."""
    docs = ROOT / "docs"
    listed = {(docs / link.partition("#")[0]).resolve() for link in links((docs / "README.md").read_text())}
    assert not set(docs.rglob("*.md")) - {docs / "README.md"} - listed


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    """All of it in one program, in order: a later block may use what an earlier one made."""
    blocks = [body for language, body in FENCE.findall((ROOT / "README.md").read_text()) if language == "python"]
    command = [sys.executable, "-W", "error", "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "b'hello' ['hello.txt', 'log']" in done.stdout


def test_every_command_shown_exists() -> None:
    from emberline.cli import main

    shown = [(page, words) for page in documents() for words in commands(page.read_text())]
    unknown = [f"{page.relative_to(ROOT)}: {words}" for page, words in shown if unknown_part(words, main)]
    assert not unknown, "\n".join(["", *unknown])


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        ("emberline fs ls ember:///tmp/s", None),
        ("EMBERLINE_URL=x make tset", "tset"),
        (".venv/bin/emberline fs fly", "fly"),
        ("make coffee  # soon", "coffee"),
        ("python -m benchmarks nothing_at_all", "nothing_at_all"),
    ],
)
def test_an_unknown_command_is_found(line: str, missing: str | None) -> None:
    cli = click.Group(commands={"fs": click.Group(commands={"ls": click.Command("ls")})})
    (words,) = commands(f"```bash\n{line}\n```\n")
    assert unknown_part(words, cli) == missing
