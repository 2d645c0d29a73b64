"""Writing datasets: layouts, modes, and what a failure leaves. Run: pytest tests/dataflow"""

from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from emberflow import DataFrame, DatasetExists, InvalidArgument, QueryError, Session
from emberflow.files import FileSink, Format
from fsspec.core import url_to_fs


def files(url: str) -> list[str]:
    """What lies under `url`, hidden files too, relative to it."""
    fs, path = url_to_fs(url)
    return sorted(name[len(path) :].lstrip("/") for name in fs.find(path))


def test_one_file_and_a_directory_of_files(session: Session, numbers: DataFrame, root: str) -> None:
    report = numbers.write_parquet(f"{root}/a b/one.parquet")
    assert (report.num_rows, report.num_files) == (1000, 1)
    numbers.write_parquet(f"{root}/many")
    assert files(f"{root}/a b") == ["one.parquet"]
    assert all(name.startswith("part-") and name.endswith(".parquet") for name in files(f"{root}/many"))
    for url in (f"{root}/a b/one.parquet", f"{root}/many"):
        assert session.read_parquet(url).to_arrow().sort_by("n") == numbers.to_arrow()


def test_partitions_read_back_by_everyone(session: Session, numbers: DataFrame, root: str) -> None:
    report = numbers.write_parquet(f"{root}/out", partition_by="k")
    assert report.num_files == 3
    assert {name.split("/")[0] for name in files(f"{root}/out")} == {"k=k0", "k=k1", "k=k2"}
    back = session.read_parquet(f"{root}/out", columns=["n", "k", "t"])
    assert back.to_arrow().sort_by("n") == numbers.to_arrow()
    fs, path = url_to_fs(f"{root}/out")
    dataset = ds.dataset(path, filesystem=fs, partitioning="hive")
    assert dataset.count_rows(filter=ds.field("k") == "k1") == 333
    assert session.read_parquet(f"{root}/out", recursive=False).query.text.endswith("/out/*.parquet'])")


def test_partitions_are_the_same_bytes_each_time_and_their_row_groups_are_not_small(tmp_path: Path) -> None:
    numbers = pa.table({"k": [n % 5 for n in range(400_000)], "n": [f"{n:032}" for n in range(400_000)]})
    found = []
    for name in ("one", "other"):
        sink = FileSink(url=f"{tmp_path}/{name}", format="parquet", partition_by=("k",))
        batches = iter(numbers.to_batches(max_chunksize=16_384))
        written = sink.write(batches, numbers.schema, stem="part", options={}, use_threads=False)
        found.append({file.path: Path(file.staged_url).read_bytes() for file in written})
        groups = [pq.read_metadata(file.staged_url).num_row_groups for file in written]
        assert max(groups) <= 80_000 // 16_000
    assert len(found[0]) == 5
    if int(pa.__version__.partition(".")[0]) > 20:
        assert found[0] == found[1]


def test_partition_values_with_odd_characters(session: Session, root: str) -> None:
    frame = session.from_items([{"k": k, "n": i} for i, k in enumerate(["a/b", "x=1", "ü %", "'q'"])])
    frame.write_parquet(f"{root}/odd", partition_by=["k"])
    assert session.read_parquet(f"{root}/odd").select("k", "n").to_arrow().sort_by("n") == frame.to_arrow()


def test_mode_error_refuses_and_leaves_the_target(session: Session, numbers: DataFrame, root: str) -> None:
    for target in (f"{root}/out", f"{root}/out.parquet"):
        numbers.write_parquet(target)
        before = files(root)
        with pytest.raises(DatasetExists, match="overwrite"):
            numbers.limit(1).write_parquet(target)
        with pytest.raises(FileExistsError):
            numbers.limit(1).write_parquet(target, mode="error")
        assert files(root) == before
        assert session.read_parquet(target).count() == 1000


def test_overwrite_replaces_even_what_it_reads(session: Session, numbers: DataFrame, root: str) -> None:
    numbers.write_parquet(f"{root}/out", partition_by="k")
    some = session.read_parquet(f"{root}/out").filter("k <> 'k1' and n < 10")
    report = some.write_parquet(f"{root}/out", partition_by="k", mode="overwrite")
    assert report.num_rows == 7
    assert {name.split("/")[0] for name in files(f"{root}/out")} == {"k=k0", "k=k2"}
    assert session.read_parquet(f"{root}/out").count() == 7
    assert files(root) == [f"out/{name}" for name in files(f"{root}/out")]
    some.write_parquet(f"{root}/out", mode="overwrite")
    assert session.read_parquet(f"{root}/out").count() == 7


def test_append_adds_files_and_never_renames_old_ones(session: Session, numbers: DataFrame, root: str) -> None:
    for _ in range(2):
        numbers.write_parquet(f"{root}/out", partition_by="k", mode="append")
    first = files(f"{root}/out")
    numbers.filter("k = 'k0'").write_parquet(f"{root}/out", partition_by="k", mode="append")
    assert set(first) < set(files(f"{root}/out"))
    assert session.read_parquet(f"{root}/out").count() == 2334
    with pytest.raises(InvalidArgument, match="file"):
        numbers.write_parquet(f"{root}/one.parquet")
        numbers.write_parquet(f"{root}/one.parquet", mode="append")


@pytest.mark.parametrize("mode", ["error", "overwrite", "append"])
def test_a_failed_write_leaves_nothing_new(session: Session, numbers: DataFrame, root: str, mode: str) -> None:
    if mode != "error":
        numbers.write_parquet(f"{root}/out")
    else:
        numbers.write_parquet(f"{root}/other")
    before = files(root)
    broken = session.sql("select range n, case when range = 900000 then error('late') end x from range(1000000)")
    for target in ("out", "out.parquet"):
        with pytest.raises(QueryError, match="late"):
            broken.write_parquet(f"{root}/{target}", mode=mode)  # type: ignore[arg-type]
    assert files(root) == before


def test_ctrl_c_while_the_hidden_directory_is_removed_leaves_none(
    session: Session, numbers: DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem = fsspec.filesystem("file")
    remove, came = filesystem.rm, list[str]()

    def interrupted(path: str, **options: bool) -> None:
        if not came:
            came.append(path)
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(filesystem, "rm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        numbers.write_parquet(f"{tmp_path}/out")
    assert came and [each.name for each in tmp_path.iterdir()] == ["out"]
    assert session.read_parquet(f"{tmp_path}/out").count() == numbers.count()


def test_a_failed_move_puts_the_old_files_back(
    session: Session, numbers: DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers.write_parquet(f"{tmp_path}/out")
    before = files(str(tmp_path))
    local = type(fsspec.filesystem("file"))
    move = local.mv

    def refuse_the_new_files(self: object, source: str, target: str, **kwargs: object) -> None:
        if source.endswith("/new"):
            raise OSError(28, "No space left on device")
        move(self, source, target, **kwargs)

    monkeypatch.setattr(local, "mv", refuse_the_new_files)
    with pytest.raises(OSError, match="No space"):
        numbers.limit(1).write_parquet(f"{tmp_path}/out", mode="overwrite")
    assert files(str(tmp_path)) == before
    assert session.read_parquet(f"{tmp_path}/out").count() == 1000


def test_an_append_that_fails_half_way_adds_nothing(
    session: Session, numbers: DataFrame, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers.write_parquet(f"{root}/out", partition_by="k")
    before = files(root)
    filesystem = type(fsspec.core.url_to_fs(root)[0])
    move = filesystem.mv
    moved = []

    def refuse_the_second(self: object, source: str, target: str, **kwargs: object) -> None:
        if moved:
            raise OSError(28, "No space left on device")
        moved.append(target)
        move(self, source, target, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "mv", refuse_the_second)
        with pytest.raises(OSError, match="No space"):
            numbers.write_parquet(f"{root}/out", partition_by="k", mode="append")
    assert moved
    assert files(root) == before
    numbers.write_parquet(f"{root}/out", partition_by="k", mode="append")
    assert session.read_parquet(f"{root}/out").count() == 2000


def test_overwrite_keeps_its_hands_off_other_files(session: Session, numbers: DataFrame, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InvalidArgument, match=r"thesis\.tex"):
        numbers.write_parquet(f"{tmp_path}/out", mode="overwrite")
    assert files(f"{tmp_path}/out") == ["thesis.tex"]


def test_no_rows(session: Session, numbers: DataFrame, root: str) -> None:
    none = numbers.filter("false")
    none.write_parquet(f"{root}/empty.parquet")
    assert session.read_parquet(f"{root}/empty.parquet").to_arrow() == none.to_arrow()
    numbers.write_parquet(f"{root}/out", partition_by="k")
    report = none.write_parquet(f"{root}/out", partition_by="k", mode="overwrite")
    assert (report.num_files, files(f"{root}/out")) == (0, [])


def test_csv_and_json_round_trips(session: Session, numbers: DataFrame, root: str) -> None:
    for suffix in ("csv", "csv.gz"):
        numbers.write_csv(f"{root}/out.{suffix}")
        assert session.read_csv(f"{root}/out.{suffix}").to_arrow() == numbers.to_arrow()
    numbers.write_csv(f"{root}/many-csv")
    text_only = session.read_csv(f"{root}/many-csv", schema={"n": "VARCHAR", "k": "VARCHAR", "t": "VARCHAR"}, delim=",")
    assert set(text_only.schema.values()) == {"VARCHAR"}
    assert text_only.count() == 1000
    for suffix in ("jsonl", "json.zst"):
        numbers.write_json(f"{root}/out.{suffix}")
        assert session.read_json(f"{root}/out.{suffix}").to_arrow() == numbers.to_arrow()
    assert session.read_json(f"{root}/out.jsonl", schema={"n": "INTEGER"}).schema == {"n": "INTEGER"}


def test_bad_arguments(session: Session, numbers: DataFrame, root: str) -> None:
    with pytest.raises(InvalidArgument, match="mode"):
        numbers.write_parquet(f"{root}/x", mode="replace")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="partition by nope"):
        numbers.write_parquet(f"{root}/x", partition_by="nope")
    with pytest.raises(InvalidArgument, match="root"):
        numbers.write_parquet("memory://")
    assert files(root) == []


def test_a_progress_bar_when_asked(numbers: DataFrame, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers.write_parquet(f"{root}/quiet.parquet")
    assert capsys.readouterr() == ("", "")
    numbers.write_parquet(f"{root}/loud.parquet", progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1,000 rows" in captured.err
    numbers.write_csv(f"{root}/loud.csv", progress=True)
    assert "1,000 rows" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_queries_that_fail_half_way_leave_nothing_and_do_not_hang(session: Session, root: str, suffix: str) -> None:
    # DuckDB 2.0's own COPY hangs after a handful of these.
    failing = session.sql("select if(n < 90000, n, error('broken')) as n from range(100000) as t(n)")
    write = {"csv": failing.write_csv, "json": failing.write_json, "parquet": failing.write_parquet}[suffix]
    for _ in range(15):
        with pytest.raises(QueryError, match="broken"):
            write(f"{root}/failed.{suffix}")
    assert files(root) == []


def test_csv_and_json_of_types_they_have_no_form_for(session: Session, root: str) -> None:
    frame = session.sql(
        "select [1, 2] as l, {'a': 1, 'b': 'x'} as s, 'q\"q,' as t, null::int as n, 1.50::decimal(9,2) as d"
    )
    frame.write_csv(f"{root}/types.csv")
    frame.write_json(f"{root}/types.json")
    csv = session.read_csv(f"{root}/types.csv", schema=dict.fromkeys("lstnd", "VARCHAR"))
    assert list(csv.to_arrow().to_pylist()[0].values()) == ["[1, 2]", "{'a': 1, 'b': x}", 'q"q,', None, "1.50"]
    row = session.read_json(f"{root}/types.json").to_arrow().to_pylist()[0]
    assert (row["l"], row["s"], row["t"], row["n"]) == ([1, 2], {"a": 1, "b": "x"}, 'q"q,', None)


def test_rows_with_nan_are_found_again(session: Session, tmp_path: Path) -> None:
    session.sql("select 0.5 v union all select 'nan'::double").write_parquet(f"{tmp_path}/out")
    assert session.read_parquet(f"{tmp_path}/out").filter("v > 1").count() == 1


@pytest.mark.parametrize("format_", ["parquet", "csv"])
def test_a_file_has_rows_however_small_it_should_be(
    session: Session, numbers: DataFrame, tmp_path: Path, format_: Format
) -> None:
    sink = FileSink(url=f"{tmp_path}/d", format=format_, file_size_bytes=1)
    reader = numbers.to_batches(100)
    files = sink.write(iter(reader), reader.schema, stem="f", options={})
    assert sum(file.rows for file in files) == 1000
    assert all(file.rows for file in files)
