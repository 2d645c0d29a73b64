"""`emberline fs ls|tree|stat|du|df|find|cat|checksum` over any fsspec URL. Run: pytest tests/fs/test_cli_look.py"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import crc32c
import pytest

from tests.fs.cli_run import emberline, emberline_json


@pytest.fixture
def books(tmp_path: Path) -> Path:
    """Two books and a letter, the letter deeper."""
    folder = tmp_path / "books"
    (folder / "letters" / "1801").mkdir(parents=True)
    (folder / "faust.txt").write_bytes(b"habe nun, ach" * 100)
    (folder / "a b[1]*.txt").write_bytes(b"spaces and brackets")
    (folder / "letters" / "1801" / "june.txt").write_bytes(b"dear")
    return folder


def test_ls_lists_names_in_order(books: Path) -> None:
    assert emberline("fs", "ls", f"file://{books}").stdout.splitlines() == ["a b[1]*.txt", "faust.txt", "letters/"]


def test_ls_takes_bare_paths_in_the_store_of_the_environment(books: Path) -> None:
    assert emberline("fs", "ls", "letters", store=f"file://{books}").stdout == "1801/\n"
    assert emberline("fs", "ls", "/letters/1801", store=f"file://{books}").stdout == "june.txt\n"
    assert "letters/" in emberline("fs", "ls", store=f"file://{books}").stdout


def test_ls_long_shows_mode_and_size(books: Path) -> None:
    (books / "faust.txt").chmod(0o640)
    os.utime(books / "faust.txt", (0, 0))
    lines = emberline("fs", "ls", "-l", f"file://{books}").stdout.splitlines()
    assert lines[1].startswith("-rw-r-----")
    assert "1.3 KiB" in lines[1]
    assert lines[1].endswith("faust.txt")


def test_ls_sorts_by_size_and_recurses(books: Path) -> None:
    rows = emberline_json("fs", "ls", "-R", "--sort", "size", f"file://{books}")
    sizes = [row["size_bytes"] for row in rows if row["type"] == "file"]
    assert sizes == [1300, 19, 4]


def test_every_url_that_ls_prints_can_be_read_back(books: Path) -> None:
    for row in emberline_json("fs", "ls", "-R", f"file://{books}"):
        if row["type"] == "file":
            assert len(emberline("fs", "cat", row["url"]).stdout_bytes) == row["size_bytes"]


def test_a_pattern_is_expanded_and_a_file_named_like_one_is_itself(books: Path) -> None:
    assert emberline("fs", "cat", f"file://{books}/**/j*.txt").stdout_bytes == b"dear"
    assert emberline("fs", "cat", f"file://{books}/a b[1]*.txt").stdout_bytes == b"spaces and brackets"
    assert "nothing matches" in emberline("fs", "cat", f"file://{books}/*.pdf", code=1).stderr


def test_tree_draws_the_branches(books: Path) -> None:
    lines = emberline("fs", "tree", f"file://{books}").stdout.splitlines()
    assert lines[1:] == [
        "├── a b[1]*.txt",
        "├── faust.txt",
        "└── letters/",
        "    └── 1801/",
        "        └── june.txt",
        "",
        "2 directories, 3 files, 1.3 KiB",
    ]
    assert len(emberline_json("fs", "tree", "-L", "1", f"file://{books}")) == 3


def test_stat_tells_what_the_backend_knows(books: Path) -> None:
    (row,) = emberline_json("fs", "stat", f"file://{books}/faust.txt")
    assert (row["type"], row["size_bytes"]) == ("file", 1300)
    assert row["details"]["ino"] == (books / "faust.txt").stat().st_ino


def test_du_sums_every_level(books: Path) -> None:
    rows = {row["url"]: (row["size_bytes"], row["files"]) for row in emberline_json("fs", "du", f"file://{books}")}
    assert rows[f"file://{books}"] == (1323, 3)
    assert rows[f"file://{books}/letters"] == (4, 1)
    assert len(emberline_json("fs", "du", "-s", f"file://{books}")) == 1


def test_df_of_a_disk(books: Path) -> None:
    (row,) = emberline_json("fs", "df", f"file://{books}")
    assert 0 < row["free_bytes"] < row["total_bytes"]
    assert "does not say" in emberline("fs", "df", "memory://", code=2).stderr


@pytest.mark.parametrize(
    ("conditions", "names"),
    [
        (["--name", "*.txt", "--larger", "1k"], ["faust.txt"]),
        (["--type", "d"], ["letters", "1801"]),
        (["--smaller", "5", "--type", "f"], ["june.txt"]),
        (["--older", "1d"], []),
        (["--newer", "1d", "-L", "1", "--type", "f"], ["a b[1]*.txt", "faust.txt"]),
    ],
)
def test_find_keeps_what_meets_every_condition(books: Path, conditions: list[str], names: list[str]) -> None:
    assert [row["name"] for row in emberline_json("fs", "find", f"file://{books}", *conditions)] == names


def test_find_refuses_a_size_it_does_not_understand(books: Path) -> None:
    assert "not a number" in emberline("fs", "find", f"file://{books}", "--larger", "big", code=2).stderr


def test_cat_joins_files_and_cuts_ranges(books: Path) -> None:
    june = f"file://{books}/letters/1801/june.txt"
    assert emberline("fs", "cat", june, june).stdout_bytes == b"deardear"
    assert emberline("fs", "cat", "--offset", 1, "--length", 2, june).stdout_bytes == b"ea"
    assert "is a directory" in emberline("fs", "cat", f"file://{books}", code=1).stderr


def test_checksums_are_the_usual_ones(books: Path) -> None:
    content = (books / "faust.txt").read_bytes()
    url = f"file://{books}/faust.txt"
    assert emberline("fs", "checksum", url).stdout.split()[0] == f"{crc32c.crc32c(content):08x}"
    assert emberline("fs", "checksum", "-a", "sha256", url).stdout.split()[0] == hashlib.sha256(content).hexdigest()
    assert len(emberline_json("fs", "checksum", "-r", f"file://{books}")) == 3
    assert crc32c.crc32c(content) != zlib.crc32(content)


def test_names_survive_whatever_is_in_them(tmp_path: Path) -> None:
    for name in ("new\nline", "grüße 日本", "\x1b[31mred", "\udcff bytes"):
        (tmp_path / os.fsencode(name).decode("utf-8", "surrogateescape")).write_bytes(b"x")
    names = {row["name"] for row in emberline_json("fs", "ls", f"file://{tmp_path}")}
    assert names == {"new\nline", "grüße 日本", "\x1b[31mred", "\udcff bytes"}


def test_a_line_feed_in_a_name_does_not_make_two_lines(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new\nline").write_bytes(b"x")
    url = f"file://{tmp_path}/folder"
    assert emberline("fs", "ls", url).stdout == "new\\nline\n"
    for command in (["find"], ["ls", "-l"], ["checksum", "-r"]):
        (line,) = emberline("fs", *command, url).stdout.splitlines()
        assert line.endswith("new\\nline")
    assert emberline("fs", "find", "-0", url).stdout == f"{url}/new\nline\0"


def test_a_terminal_is_not_sent_control_characters() -> None:
    from emberfs.cli.output import safe

    assert safe("\x1b[31mred\n", terminal=True) == "\\x1b[31mred\\n"
    assert safe("\u202egnp.exe", terminal=True) == "\\u202egnp.exe"
    assert safe("grüße", terminal=True) == "grüße"
