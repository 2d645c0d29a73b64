"""The first thing a newcomer runs, on a small corpus. Run: pytest tests/e2e/test_quickstart.py"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import emberflow
import pytest
from click.testing import CliRunner, Result

from emberline.quickstart import __main__ as quickstart
from emberline.quickstart import corpus


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Seven texts (two alike, one empty, one without a suffix, CRLF and unicode) and three files that do not count."""
    root = tmp_path / "corpus dir"
    for name, data in {
        "abc.py": b"import abc\n" * 50,
        "pkg/a.py": b"one two three\r\n",
        "pkg/b.py": b"one two three\r\n",
        "pkg/sub/notes.rst": "Grüße, 世界\n".encode(),
        "pkg/empty.txt": b"",
        "pkg/LICENSE": b"do what you want",
        "pkg/typed.pyi": b"x: int\n",
        "pkg/binary.so": b"\x7fELF\0\0",
        "pkg/latin.txt": b"caf\xe9",
        "site-packages/other.py": b"not part of it\n",
    }.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return root


def run(store: str, source: Path, *arguments: str) -> Result:
    return CliRunner().invoke(quickstart.main, ["--store", store, "--source", str(source), "--steps", "0", *arguments])


def report_of(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.stdout)
    return report


def test_the_whole_job_and_again(source: Path, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    report = report_of(run(store, source, "--json"))
    assert (report["files"], report["skipped_files"], report["parts"], report["partitions"]) == (7, 2, 1, 5)
    assert report["checked_with"] == ["pyarrow", "pandas"]
    assert report["results"]["Exact duplicates"] == [{"copies": 2, "one_of_them": "pkg/a.py", "bytes": 15}]
    assert report["results"]["Longest files"][0] == {"path": "abc.py", "lines": 50, "bytes": 550}
    assert report["results"]["Words per kind of file"][0] == {"suffix": "py", "files": 3, "words": 106}
    (source / "pkg" / "more.md").write_text("# more\n")
    assert report_of(run(store, source, "--json"))["files"] == 8
    with emberflow.init() as session:
        assert session.read_parquet(f"{store}/corpus/raw").count() == 8
        assert session.read_parquet(f"{store}/corpus/by_suffix").filter("suffix = 'md'").count() == 1


def test_many_parts(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_PART_BYTES", 30)
    assert report_of(run("memory://quickstart-parts", source, "--json"))["parts"] > 2


def test_the_report_for_people(source: Path, tmp_path: Path) -> None:
    result = run(str(tmp_path / "store"), source)
    assert result.exit_code == 0, result.output
    for text in ("All checks passed", "MB/s", "rows/s", "Exact duplicates", 'emberline sql "select'):
        assert text in result.stdout


def test_a_wrong_byte_fails_the_run(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row_of = corpus._row

    def lying(path: Path, data: bytes) -> dict[str, Any] | None:
        row = row_of(path, data)
        if row is not None and path.name == "b.py":
            row["text"] = "one two thRee\r\n"
        return row

    monkeypatch.setattr(corpus, "_row", lying)
    result = run(str(tmp_path / "store"), source)
    assert result.exit_code == 1
    assert "checksum" in result.stderr


def test_it_replaces_only_its_own_output(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "store" / "corpus" / "raw" / "diary.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("dear")
    result = run(str(tmp_path / "store"), source)
    assert result.exit_code == 1
    assert "diary.txt" in result.stderr
    assert mine.read_text() == "dear"


def test_a_source_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = run(str(tmp_path / "store"), tmp_path / "empty")
    assert result.exit_code == 1
    assert "no text" in result.stderr


@pytest.mark.timeout(1200)  # A dozen processes, one after the other, most of which import torch.
def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some files of the library: a model is trained, killed, gone on with, and asked twice."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Threads that wait for each other busily, beside others that do.
    source = tmp_path / "library"
    source.mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.glob("[a-e]*.py")):
        shutil.copy(file, source)
    (source / "test_prompt.py").write_text((library / "this.py").read_text() * 3)
    arguments = ["--store", f"ember://{tmp_path}/store", "--source", str(source), "--work", str(tmp_path / "run")]
    result = CliRunner().invoke(quickstart.main, [*arguments, "--steps", "8", "--json"])
    model = report_of(result)["model"]
    assert model["steps"] == 8 and len(model["losses"]) == 8
    # The save of step 4 may or may not be there when the kill of step 5 comes.
    assert model["killed_after"] >= 5 and model["resumed_from"] in (2, 4, 6)
    assert model["steps_repeated"] == max(0, model["killed_after"] - model["resumed_from"])
    assert 0 < model["cached_tokens"] < model["prompt_tokens"]
    assert set(model["first_token_s"]) == {"cold", "from disk"}


def test_a_run_of_the_users_own_is_not_replaced(source: Path, tmp_path: Path) -> None:
    work = tmp_path / "run"
    work.mkdir()
    (work / "run.toml").write_text("seed = 1")
    arguments = ["--store", f"file://{tmp_path}/store", "--source", str(source), "--work", str(work), "--steps", "8"]
    result = CliRunner().invoke(quickstart.main, arguments)
    assert result.exit_code == 1 and "will not replace" in result.stderr
    assert (work / "run.toml").read_text() == "seed = 1"
