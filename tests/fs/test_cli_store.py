"""The command line on a store: copies in and out, trash, upkeep, backup. Run: pytest tests/fs/test_cli_store.py"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import emberfs
import pytest

from tests.fs.cli_run import emberline, emberline_json


@pytest.fixture
def store(tmp_path: Path) -> str:
    """The URL of a store with a few files."""
    url = f"ember://{tmp_path}/store"
    with emberfs.connect(url) as client:
        client.mkdir("/books")
        client.put("/books/faust.txt", b"habe nun, ach")
        client.put("/large", os.urandom(10 << 20))
    return url


def tree(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("url", ["{store}/!/books/faust.txt", "{store}/books/faust.txt"])
def test_a_path_inside_a_store_is_a_url(store: str, url: str) -> None:
    assert emberline("fs", "cat", url.format(store=store)).stdout_bytes == b"habe nun, ach"


@pytest.mark.parametrize("path", ["books/faust.txt", "/books/faust.txt", "ember://books/faust.txt"])
def test_the_environment_names_the_store(store: str, path: str) -> None:
    assert emberline("fs", "cat", path, store=store).stdout_bytes == b"habe nun, ach"


def test_without_the_environment_a_bare_path_is_refused() -> None:
    assert "set EMBERLINE_URL" in emberline("fs", "cat", "books/faust.txt", code=2).stderr
    assert "EMBERLINE_URL, which is not set" in emberline("fs", "ls", "ember://books", code=2).stderr
    assert "name a store" in emberline("fs", "fsck", code=2).stderr


def test_reading_makes_no_store(tmp_path: Path) -> None:
    for command in (["ls"], ["fsck"], ["du"], ["trash", "ls"], ["get", "-r"]):
        place = [str(tmp_path / "copy")] if command[0] == "get" else []
        result = emberline("fs", *command, f"ember://{tmp_path}/typo", *place, code=1)
        assert "no store here" in result.stderr
    command = ("fs", "put", "--dry-run", __file__, f"ember://{tmp_path}/typo/!/x")
    assert "no store here" in emberline(*command, code=1).stderr
    assert not (tmp_path / "typo").exists()


def test_writing_makes_a_store_and_says_so(tmp_path: Path) -> None:
    result = emberline("fs", "put", "-", f"ember://{tmp_path}/new/!/a/b", stdin=b"x")
    assert f"making a new store at {tmp_path}/new" in result.stderr
    assert emberline("fs", "cat", f"ember://{tmp_path}/new/!/a/b").stdout_bytes == b"x"


def test_a_tree_goes_in_and_comes_out_unchanged(tmp_path: Path, store: str) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "zero").touch()
    (source / "large").write_bytes(os.urandom(20 << 20))
    (source / "deep" / "a b[1]*\n.txt").write_bytes(b"odd name")
    (source / "deep" / "er" / "grüße").write_bytes(b"hello")
    (source / "zero").chmod(0o755)
    emberline("fs", "put", "-r", "--checksum", source, "in", store=store)
    summary = emberline_json("fs", "put", "-r", source, "in", store=store)[-1]
    assert (summary["copied"], summary["skipped"]) == (0, 4)
    emberline("fs", "get", "-r", "in", tmp_path / "out", store=store)
    assert tree(tmp_path / "out") == tree(source)
    assert (tmp_path / "out" / "zero").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "large").stat().st_mtime == pytest.approx((source / "large").stat().st_mtime)


def test_a_mirror_deletes_into_the_trash(tmp_path: Path, store: str) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "new").write_bytes(b"new")
    emberline("fs", "sync", "--delete", f"file://{tmp_path}/source", "ember://books", store=store)
    assert emberline("fs", "ls", "books", store=store).stdout == "new\n"
    assert [row["path"] for row in emberline_json("fs", "trash", "ls", store=store)] == ["/books/faust.txt"]


def test_copies_inside_one_store_however_it_is_written(store: str) -> None:
    emberline("fs", "cp", "-r", f"{store}/!/books", "copy", store=store)
    assert emberline("fs", "ls", "copy", store=store).stdout == "faust.txt\n"
    assert "lies inside" in emberline("fs", "cp", "-r", f"{store}/!/books", "books/x", store=store, code=1).stderr


def test_mv_renames_files_and_trees(store: str) -> None:
    emberline("fs", "mv", "books", "texts", store=store)
    emberline("fs", "mv", "large", "texts/", store=store)
    assert emberline("fs", "ls", "-R", store=store).stdout.splitlines() == ["texts/", "texts/faust.txt", "texts/large"]
    assert "lies inside" in emberline("fs", "mv", "texts", "texts/x/y", store=store, code=1).stderr


def test_removed_files_come_back(store: str) -> None:
    (removed,) = emberline_json("fs", "rm", "-r", "books", store=store)
    (entry,) = emberline_json("fs", "trash", "ls", store=store)
    assert (entry["id"], entry["path"], entry["type"]) == (removed["trash_id"], "/books", "directory")
    emberline("fs", "trash", "restore", entry["id"], "--to", "/again", store=store)
    assert emberline("fs", "cat", "again/faust.txt", store=store).stdout_bytes == b"habe nun, ach"
    assert emberline_json("fs", "trash", "ls", store=store) == []
    assert emberline("fs", "trash", "restore", "nonsense", store=store, code=1).stderr.startswith("Error: ")


def test_rm_says_how_to_get_it_back(store: str) -> None:
    note = emberline("fs", "rm", "large", store=store).stderr
    (entry,) = emberline_json("fs", "trash", "ls", store=store)
    assert f"emberline fs trash restore {entry['id']} {store}" in note
    emberline("fs", "trash", "restore", entry["id"], store)
    many = emberline("fs", "rm", "-r", "large", "books", store=store)
    assert "moved 2 to the trash" in many.stderr
    assert many.stdout == ""
    emberline("fs", "put", __file__, "file", store=store)
    assert emberline("fs", "rm", "--permanent", "file", store=store).stderr == ""
    emberline("fs", "put", __file__, "file", store=store)
    assert emberline("fs", "rm", "--json", "file", store=store).stderr == ""


def test_gc_says_what_frees_the_rest(store: str) -> None:
    emberline("fs", "rm", "--permanent", "large", store=store)
    assert "gc --now" in emberline("fs", "gc", store).stderr
    done = emberline("fs", "gc", "--now", store)
    assert "0 waiting" in done.stdout
    assert done.stderr == ""


def test_stat_shows_where_the_bytes_are(store: str) -> None:
    (small, large, folder) = emberline_json("fs", "stat", "books/faust.txt", "large", "books", store=store)
    assert small["layout"] == {"kind": "inline"}
    assert large["layout"] == {"kind": "chunks", "chunk_size_bytes": 4 << 20, "chunks": 3, "chains": [1]}
    assert "layout" not in folder
    assert isinstance(large["details"]["ctime"], float)
    fields = dict(line.split(maxsplit=1) for line in emberline("fs", "stat", "large", store=store).stdout.splitlines())
    assert fields["layout"] == "3 chunks of at most 4.0 MiB, on chains 1"
    assert fields["ctime"].endswith("Z")


def test_permanent_removal_and_gc_free_the_space(store: str) -> None:
    used = emberline_json("fs", "df", store=store)[0]["used_bytes"]
    emberline("fs", "rm", "--permanent", "large", store=store)
    emberline("fs", "gc", "--now", store=store)
    assert emberline_json("fs", "df", store=store)[0]["used_bytes"] < used
    emberline("fs", "rm", "-r", "/*", store=store)
    assert emberline_json("fs", "trash", "empty", "--older", "1d", store=store)[0]["left"] == 1
    assert emberline_json("fs", "trash", "empty", store=store)[0] == {"action": "empty", "removed": 1, "left": 0}
    assert "root is not removed" in emberline("fs", "rm", "-r", "/", store=store, code=1).stderr


def test_upkeep_of_a_sound_store(store: str) -> None:
    assert emberline_json("fs", "fsck", store) == [{"clean": True, "findings": 0, "repaired": 0}]
    (summary,) = emberline_json("fs", "scrub", store)
    assert summary["clean"]
    assert summary["read_bytes"] >= 10 << 20
    (facts,) = emberline_json("fs", "info", store)
    assert facts["usage"]["files"] == 2


def test_a_flipped_byte_is_found_and_never_copied_out(store: str, tmp_path: Path) -> None:
    content = emberline("fs", "cat", "large", store=store).stdout_bytes
    for file in (tmp_path / "store" / "target-1").iterdir():
        if file.is_file() and (offset := file.read_bytes().find(content[1000:1100])) >= 0:
            with open(file, "r+b") as block:
                block.seek(offset)
                block.write(bytes([content[1000] ^ 1]))
    result = emberline("fs", "get", "large", tmp_path / "copy", store=store, code=1)
    assert "/large" in result.stderr
    assert not (tmp_path / "copy").exists()
    (finding, summary) = emberline_json("fs", "scrub", store=store, code=1)
    assert finding["path"] == "/large"
    assert not summary["clean"]


def test_metadata_comes_back_from_a_dump(store: str, tmp_path: Path) -> None:
    emberline("fs", "dump", tmp_path / "backup.jsonl", store)
    assert emberline("fs", "dump", "-", store).stdout == (tmp_path / "backup.jsonl").read_text()
    assert "metadata already" in emberline("fs", "load", tmp_path / "backup.jsonl", store, code=1).stderr
    shutil.rmtree(tmp_path / "store" / "meta")
    emberline("fs", "load", tmp_path / "backup.jsonl", store)
    assert emberline("fs", "cat", "books/faust.txt", store=store).stdout_bytes == b"habe nun, ach"
    assert emberline_json("fs", "fsck", store)[0]["clean"]


def test_doctor_passes_a_sound_store_and_names_what_is_wrong(store: str, tmp_path: Path) -> None:
    lines = {line["name"]: line for line in emberline_json("doctor", store)}
    assert {lines[name]["state"] for name in ("python", "libraries", "store", "owner", "fsck")} == {"OK"}
    superblock = tmp_path / "store" / "superblock.json"
    superblock.write_bytes(superblock.read_bytes().replace(b'"targets": 1', b'"targets": 2'))
    lines = {line["name"]: line for line in emberline_json("doctor", store, code=1)}
    assert lines["store"]["state"] == "FAIL"
    assert lines["store"]["advice"]
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "file").touch()
    (line,) = (line for line in emberline_json("doctor") if line["name"] == "store")
    assert (line["state"], "none was given" in line["detail"]) == ("SKIP", True)
    assert "EMBERLINE_URL" in line["advice"]
    assert "holds something else" in emberline("doctor", f"ember://{tmp_path}/strange", code=1).stdout
