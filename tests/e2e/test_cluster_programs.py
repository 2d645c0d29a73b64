"""The programs people bring, on a cluster: the command line, pandas, pyarrow, DuckDB, and the quickstart's job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import duckdb
import emberfs
import fsspec
import pandas
import pyarrow.dataset
import pytest
from click.testing import CliRunner
from emberfs import Client

from emberline.quickstart import __main__ as quickstart
from tests.fs.cli_run import emberline, emberline_json

DEADLINE_S = 30.0


@pytest.fixture
def frame() -> pandas.DataFrame:
    """Real text: modules of the standard library."""
    paths = sorted(Path(json.__file__).parent.glob("*.py"))
    return pandas.DataFrame({"name": [path.name for path in paths], "text": [path.read_text() for path in paths]})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with an empty file, one that lies with its name and one in several chunks."""
    folder = tmp_path / "tree"
    (folder / "deep").mkdir(parents=True)
    (folder / "empty").touch()
    (folder / "deep" / "small").write_bytes(b"hello")
    (folder / "deep" / "large").write_bytes(bytes(range(256)) * (9 << 12))
    return folder


def test_pandas(url: str, frame: pandas.DataFrame) -> None:
    frame.to_parquet(f"{url}/tables/sources.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(f"{url}/tables/sources.parquet"), frame)


def test_pyarrow(url: str, frame: pandas.DataFrame) -> None:
    fs, root = fsspec.url_to_fs(f"{url}/set")
    table = pyarrow.Table.from_pandas(frame)
    partitions = pyarrow.dataset.partitioning(pyarrow.schema([("name", pyarrow.string())]), flavor="hive")
    pyarrow.dataset.write_dataset(table, root, filesystem=fs, format="parquet", partitioning=partitions)
    found = pyarrow.dataset.dataset(root, filesystem=fs, partitioning="hive").to_table()
    assert sorted(found["text"].to_pylist()) == sorted(frame["text"])


def test_duckdb(url: str, frame: pandas.DataFrame) -> None:
    fs = fsspec.filesystem("ember", url=url)
    frame.to_csv(f"{url}/sources.csv", index=False)
    with duckdb.connect() as connection:
        connection.register_filesystem(fs)
        found = connection.execute("select sum(length(text)) from 'ember:///sources.csv'").fetchone()
    assert found == (frame["text"].str.len().sum(),)


def test_the_quickstart(url: str, tmp_path: Path) -> None:
    source = tmp_path / "corpus"
    (source / "pkg").mkdir(parents=True)
    (source / "abc.py").write_text("import abc\n" * 50)
    (source / "pkg" / "notes.rst").write_text("Grüße, 世界\n")
    result = CliRunner().invoke(quickstart.main, ["--store", url, "--source", str(source), "--steps", "0", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["files"], report["partitions"], report["checked_with"]) == (2, 2, ["pyarrow", "pandas"])


def test_files_go_in_and_come_out(url: str, tree: Path, tmp_path: Path) -> None:
    emberline("fs", "put", "-r", tree, "/in", store=url)
    assert [row["size_bytes"] for row in emberline_json("fs", "ls", "-R", "/in/deep", store=url)] == [9 << 20, 5]
    emberline("fs", "cp", "-r", "/in", "/copy", store=url)
    emberline("fs", "mv", "/copy/deep/small", "/copy/moved", store=url)
    emberline("fs", "get", "-r", "/copy", tmp_path / "out", store=url)
    assert (tmp_path / "out" / "moved").read_bytes() == b"hello"
    assert (tmp_path / "out" / "deep" / "large").read_bytes() == (tree / "deep" / "large").read_bytes()


def test_sync_copies_only_what_changed(url: str, tree: Path) -> None:
    command = ("fs", "sync", f"file://{tree}", f"{url}/mirror")
    assert emberline_json(*command)[-1]["copied"] == 3
    (tree / "deep" / "small").write_bytes(b"hello again")
    (tree / "empty").unlink()
    assert emberline_json(*command, "--delete")[-1]["copied"] == 1
    with emberfs.connect(url) as client:
        assert client.get("/mirror/deep/small") == b"hello again"
        assert [name for name, _ in client.list("/mirror")] == ["deep"]


def test_what_was_removed_comes_back_from_the_trash(url: str, client: Client) -> None:
    client.put("/kept", b"x" * 100_000)
    emberline("fs", "rm", "/kept", store=url)
    assert not client.exists("/kept")
    (entry,) = emberline_json("fs", "trash", "ls", store=url)
    emberline("fs", "trash", "restore", entry["id"], store=url)
    assert client.get("/kept") == b"x" * 100_000
    emberline("fs", "rm", "/kept", store=url)
    emberline("fs", "trash", "empty", store=url)
    assert emberline_json("fs", "gc", "--now", store=url)[0]["pending"] == 0


def test_df_counts_the_replicas(url: str, client: Client) -> None:
    client.collect_garbage(force=True)
    before = settled_space(client, 0)
    client.put("/data", bytes(4 << 20))
    after = settled_space(client, before["used_bytes"] + (4 << 20))
    assert after["disk_used_bytes"] - before["disk_used_bytes"] == 3 * (4 << 20)
    (row,) = emberline_json("fs", "df", store=url)
    assert row["replicas"] == 3
    assert row["length_bytes"] == 4 << 20
    # Each of the three disks takes a copy of all: together they have three times of what new data may take.
    assert row["free_bytes"] == pytest.approx(row["disk_free_bytes"] / 3, rel=0.1)
    assert "disk free" in emberline("fs", "df", store=url).stdout
    (facts,) = emberline_json("fs", "info", store=url)
    assert facts["usage"]["files"] == 1
    assert "3 of each chunk" in emberline("fs", "info", store=url).stdout


def settled_space(client: Client, used_bytes: int) -> dict[str, int]:
    """What the cluster says once all nodes have told of `used_bytes` in all replicas."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        space = client.space()
        if (space["used_bytes"], space["disk_used_bytes"]) == (used_bytes, 3 * used_bytes):
            return space
        assert time.monotonic() < deadline_s, space
        time.sleep(0.05)


@pytest.mark.parametrize("command", [("fs", "fsck", "--repair"), ("doctor",)])
def test_what_is_not_for_clusters_says_so(url: str, command: tuple[str, ...]) -> None:
    result = emberline(*command, url, code=2)
    assert "is a cluster" in result.stderr
