"""`emberline fs cp|sync|put|get|mv|rm|mkdir` between any two fsspec URLs. Run: pytest tests/fs/test_cli_copy.py"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from emberfs.cli.entry import get_entry
from emberfs.cli.filecopy import Mismatch, Stopped, copy_file
from emberfs.cli.location import Location
from emberfs.cli.transfer import Plan, Transfer, TransferConfig, plan_copy

from tests.fs.cli_run import emberline, emberline_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tree with an empty file, an empty folder, a large file and odd names."""
    folder = tmp_path / "source"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty folder").mkdir()
    (folder / "zero").touch()
    (folder / "large").write_bytes(os.urandom(9 << 20))
    (folder / "deep" / "a b[1]*.txt").write_bytes(b"brackets")
    (folder / "deep" / "er" / "grüße").write_bytes(b"hello")
    return folder


@pytest.fixture
def memory() -> Iterator[str]:
    """A place in fsspec's memory filesystem, gone afterwards."""
    yield "memory://cli-copy"
    fsspec.filesystem("memory").rm("/cli-copy", recursive=True)


def content(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with its bytes; None for a directory."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def test_cp_copies_a_tree_with_times_and_modes(source: Path, tmp_path: Path) -> None:
    (source / "zero").chmod(0o755)
    os.utime(source / "zero", (1e9, 1e9))
    emberline("fs", "cp", "-r", f"file://{source}", f"file://{tmp_path}/copy")
    assert content(tmp_path / "copy") == content(source)
    assert (tmp_path / "copy" / "zero").stat().st_mtime == 1e9
    assert (tmp_path / "copy" / "zero").stat().st_mode & 0o777 == 0o755


def test_a_second_run_skips_what_is_complete_and_mends_the_rest(source: Path, tmp_path: Path) -> None:
    command = ("fs", "cp", "-r", f"file://{source}", f"file://{tmp_path}/copy")
    emberline(*command)
    (tmp_path / "copy" / "zero").write_bytes(b"not empty")
    (tmp_path / "copy" / "large").unlink()
    summary = emberline_json(*command)[-1]
    assert (summary["copied"], summary["skipped"]) == (2, 2)
    assert content(tmp_path / "copy") == content(source)


def test_through_memory_and_back_nothing_changes(source: Path, tmp_path: Path, memory: str) -> None:
    emberline("fs", "put", "-r", source, memory)
    summary = emberline_json("fs", "put", "-r", source, memory)[-1]
    assert (summary["copied"], summary["skipped"]) == (0, 4)
    emberline("fs", "get", "-r", memory, tmp_path / "back")
    files = {name: data for name, data in content(source).items() if data is not None}
    assert {name: data for name, data in content(tmp_path / "back").items() if data is not None} == files


def test_checksum_sees_a_change_that_size_and_time_hide(source: Path, tmp_path: Path) -> None:
    command = ("fs", "sync", f"file://{source}", f"file://{tmp_path}/copy")
    emberline(*command)
    changed = tmp_path / "copy" / "deep" / "er" / "grüße"
    before = changed.stat()
    changed.write_bytes(b"hellO")
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert emberline_json(*command)[-1]["copied"] == 0
    assert emberline_json(*command, "--checksum")[-1]["copied"] == 1
    assert changed.read_bytes() == b"hello"


def test_dry_run_says_everything_and_does_nothing(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "extra").touch()
    command = ("fs", "sync", "--delete", "--dry-run", f"file://{source}", f"file://{tmp_path}/copy")
    result = emberline(*command)
    assert f"delete file://{tmp_path}/copy/extra" in result.stdout
    assert f"copy file://{source}/zero -> file://{tmp_path}/copy/zero (0 B)" in result.stdout
    assert "would copy 4 files" in result.stderr
    assert content(tmp_path / "copy") == {"extra": b""}


def test_sync_with_delete_makes_both_sides_equal(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "old" / "older").mkdir(parents=True)
    (copy / "old" / "older" / "file").touch()
    (copy / ".emberline-part-0123").write_bytes(b"left by a killed run")
    emberline("fs", "sync", f"file://{source}", f"file://{copy}")
    assert (copy / "old" / "older" / "file").exists()
    emberline("fs", "sync", "--delete", f"file://{source}", f"file://{copy}")
    assert content(copy) == content(source)


def test_sync_deletes_nothing_when_a_copy_failed(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "zero" / "in the way").mkdir(parents=True)
    (copy / "extra").touch()
    result = emberline("fs", "sync", "--delete", f"file://{source}", f"file://{copy}", code=1)
    assert f"a directory is in the way: file://{source}/zero" in result.stderr
    assert (copy / "extra").exists()
    assert (copy / "large").exists(), "one failure does not stop the others"


def test_the_slash_decides_what_goes_where(source: Path, tmp_path: Path) -> None:
    emberline("fs", "cp", "-r", f"file://{source}/deep", f"file://{tmp_path}/to/")
    assert (tmp_path / "to" / "deep" / "er" / "grüße").exists()
    emberline("fs", "cp", f"file://{source}/zero", f"file://{tmp_path}/to")
    assert (tmp_path / "to" / "zero").exists()
    emberline("fs", "cp", f"file://{source}/zero", f"file://{tmp_path}/new/name")
    assert (tmp_path / "new" / "name").exists()
    emberline("fs", "cp", "-r", f"file://{source}/zero", f"file://{source}/deep", f"file://{tmp_path}/two")
    assert (tmp_path / "two" / "deep" / "er" / "grüße").exists()
    emberline("fs", "cp", f"file://{source}/deep/*.txt", f"file://{tmp_path}/texts/")
    assert (tmp_path / "texts" / "a b[1]*.txt").read_bytes() == b"brackets"


def test_a_tree_is_not_copied_into_itself(source: Path) -> None:
    assert "lies inside" in emberline("fs", "cp", "-r", f"file://{source}", f"file://{source}/deep/x", code=1).stderr
    assert "the same" in emberline("fs", "cp", f"file://{source}/zero", f"file://{source}/zero", code=1).stderr
    command = ("fs", "sync", "--delete", f"file://{source}/deep", f"file://{source}")
    assert "would be deleted" in emberline(*command, code=1).stderr
    assert (source / "large").exists()


def test_a_directory_needs_recursive(source: Path, tmp_path: Path) -> None:
    result = emberline("fs", "cp", f"file://{source}", f"file://{tmp_path}/copy", code=1)
    assert "pass -r" in result.stderr


def test_links_to_files_are_followed_and_others_left_out(source: Path, tmp_path: Path) -> None:
    (source / "link").symlink_to("large")
    (source / "loop").symlink_to(".")
    (source / "broken").symlink_to("nowhere")
    os.mkfifo(source / "pipe")
    result = emberline("fs", "cp", "-r", f"file://{source}", f"file://{tmp_path}/copy")
    assert (tmp_path / "copy" / "link").read_bytes() == (source / "large").read_bytes()
    assert "followed 1 symbolic link to files" in result.stderr
    for name in ("loop", "broken", "pipe"):
        assert f"{source}/{name}" in result.stderr
        assert not (tmp_path / "copy" / name).exists()


def test_links_in_a_circle_end_the_copy_into_a_store_with_a_count(source: Path, tmp_path: Path) -> None:
    (source / "deep" / "up").symlink_to("..")
    (source / "self").symlink_to("self")
    (source / "ping").symlink_to("pong")
    (source / "pong").symlink_to("ping")
    for name in ("one", "two"):
        (source / name).symlink_to("zero")
    *copied, summary = emberline_json("fs", "put", "-r", source, f"ember://{tmp_path}/store/!/copy")
    assert (summary["links_followed"], summary["left_out"]) == (2, 4)
    assert len(copied) == len([path for path in source.rglob("*") if path.is_file()])


def test_put_reads_the_standard_input(tmp_path: Path) -> None:
    emberline("fs", "put", "-", f"file://{tmp_path}/a/b", stdin=b"from a pipe")
    assert content(tmp_path / "a") == {"b": b"from a pipe"}


def test_get_into_the_working_directory(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    emberline("fs", "get", "deep/er/grüße", ".", store=f"file://{source}")
    assert content(tmp_path / "here") == {"grüße": b"hello"}


def test_a_file_that_grows_while_it_is_copied_is_reported_and_not_kept(source: Path, tmp_path: Path) -> None:
    local = fsspec.filesystem("file")
    listed = get_entry(local, f"{source}/zero")
    (source / "zero").write_bytes(b"grown")
    target = Location(local, f"{tmp_path}/copy")
    with pytest.raises(Mismatch, match="5 were read"):
        copy_file(
            Location(local, listed.path), listed, target,
            on_bytes=lambda _: None, stop=threading.Event(), verify=False,
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interrupted_copy_leaves_the_old_file_and_no_half_one(source: Path, tmp_path: Path) -> None:
    local = fsspec.filesystem("file")
    target = tmp_path / "copy"
    target.write_bytes(b"old")
    stop = threading.Event()
    with pytest.raises(Stopped):
        copy_file(
            Location(local, f"{source}/large"), get_entry(local, f"{source}/large"), Location(local, str(target)),
            on_bytes=lambda _: stop.set(), stop=stop, verify=False,
        )  # fmt: skip
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "source"]


def test_an_interrupted_transfer_stops_the_files_under_way(source: Path, tmp_path: Path) -> None:
    local = fsspec.filesystem("file")
    plan = Plan()
    plan_copy(plan, Location(local, str(source)), Location(local, f"{tmp_path}/copy"), recursive=True)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Transfer(plan, TransferConfig(jobs=1), on_bytes=interrupt).run())
    assert not [name for name in content(tmp_path / "copy") if ".emberline-part-" in name]


def test_mv_renames_and_crosses_filesystems(source: Path, tmp_path: Path, memory: str) -> None:
    before = content(source)
    emberline("fs", "mv", f"file://{source}", f"file://{tmp_path}/moved")
    assert not source.exists()
    assert content(tmp_path / "moved") == before
    emberline("fs", "mv", f"file://{tmp_path}/moved/deep", f"{memory}/x")
    assert not (tmp_path / "moved" / "deep").exists()
    assert emberline("fs", "cat", f"{memory}/x/er/grüße").stdout_bytes == b"hello"
    command = ("fs", "mv", "-n", f"file://{tmp_path}/moved/zero", f"file://{tmp_path}/moved/large")
    assert "exists already" in emberline(*command, code=1).stderr


def test_rm_takes_names_literally(source: Path) -> None:
    (source / "deep" / "a b1.txt").touch()
    assert "pass -r" in emberline("fs", "rm", f"file://{source}/deep", code=1).stderr
    emberline("fs", "rm", f"file://{source}/deep/a b[1]*.txt")
    assert sorted(path.name for path in (source / "deep").iterdir()) == ["a b1.txt", "er"]
    emberline("fs", "rm", "-r", f"file://{source}/deep", f"file://{source}/z*")
    assert sorted(content(source)) == ["empty folder", "large"]
    assert "no such file" in emberline("fs", "rm", f"file://{source}/gone", code=1).stderr.lower()
    emberline("fs", "rm", "-f", f"file://{source}/gone")


def test_rm_of_a_link_keeps_what_it_leads_to(source: Path) -> None:
    (source / "link").symlink_to("deep")
    emberline("fs", "rm", f"file://{source}/link")
    assert (source / "deep" / "er" / "grüße").exists()
    assert not (source / "link").is_symlink()


def test_mkdir_with_and_without_parents(tmp_path: Path) -> None:
    for url in (f"file://{tmp_path}", f"ember://{tmp_path}/store/!"):
        complaint = emberline("fs", "mkdir", f"{url}/a/b/c", code=1).stderr
        assert complaint.endswith(f"the parent directory is missing (-p makes it): {url}/a\n")
    emberline("fs", "mkdir", "-p", f"file://{tmp_path}/a/b")
    emberline("fs", "mkdir", "-p", f"file://{tmp_path}/a/b")
    assert (tmp_path / "a" / "b").is_dir()
