"""From texts to token shards: order, tokenizers, and runs that die. Run: pytest tests/dataflow/test_tokenize.py"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import emberflow
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from emberflow import DatasetExists, InvalidArgument, TokenDataset, tokenize
from emberflow.tokens import load_tokenizer, open_group, train_tokenizer
from emberflow.tokens.tokenizer import ByteTokenizer, FileTokenizer, v4_tokenizer
from fsspec.core import url_to_fs

from emberline.cli import main

WORDS = ["the", "ember", "glows", "naïve", "中文", "😀", "<|endoftext|>", "\n", "<｜end▁of▁sentence｜>"]


def texts(count: int) -> list[str | None]:
    random = np.random.default_rng(0)
    made: list[str | None] = [" ".join(random.choice(WORDS, random.integers(1, 80))) for _ in range(count)]
    made[3], made[count // 2] = None, ""
    return made


def documents(count: int) -> list[str]:
    return [text for text in texts(count) if text]


@pytest.fixture
def pages(tmp_path: Path) -> str:
    """400 texts in 4 Parquet files, in row groups of 20."""
    folder = tmp_path / "pages"
    folder.mkdir()
    for number in range(4):
        table = pa.table({"id": range(100), "text": texts(400)[100 * number : 100 * (number + 1)]})
        pq.write_table(table, folder / f"{number}.parquet", row_group_size=20)
    return str(folder)


def tokens_of(url: str) -> list[int]:
    """All of them, by way of one sample."""
    with TokenDataset(url, sequence_tokens=open_group(url).tokens.length - 1) as dataset:
        assert not list(dataset.verify())
        return [int(token) for token in dataset.read([0]).tokens[0]]


def bytes_of(texts: list[str]) -> list[int]:
    return list(b"".join(text.encode() + b"\xff" for text in texts))


def file_bytes(url: str) -> dict[str, bytes]:
    filesystem, path = url_to_fs(url)
    return {name[len(path) :]: filesystem.cat_file(name) for name in filesystem.find(path)}


# ---- documents


def test_documents_keep_their_order_and_lose_nothing(pages: str, root: str) -> None:
    report = tokenize(pages, f"{root}/tokens", tokenizer="byte")
    assert (report.documents, report.skipped, report.tokens) == (398, 2, len(bytes_of(documents(400))))
    assert tokens_of(f"{root}/tokens") == bytes_of(documents(400))
    group = open_group(f"{root}/tokens")
    assert (group.vocabulary.tokenizer, group.vocabulary.vocab_size, group.vocabulary.eos_id) == ("byte", 256, 255)


@pytest.mark.parametrize(
    "settings",
    [
        {"executor": "inline", "threads": 2},
        {"executor": "local", "workers": 1, "partition_bytes": 4000},
        {"executor": "local", "workers": 2, "partition_bytes": 2000, "shuffle": "always"},
    ],
    ids=str,
)
def test_the_files_do_not_depend_on_who_made_them(pages: str, tmp_path: Path, settings: dict[str, Any]) -> None:
    tokenize(pages, f"{tmp_path}/plain", tokenizer="byte")
    with emberflow.init(**settings) as session:
        tokenize(pages, f"{tmp_path}/other", tokenizer="byte", session=session)
        assert settings["executor"] == "inline" or sum(event.kind == "finished" for event in session.jobs.last) > 4
    assert file_bytes(f"{tmp_path}/plain") == file_bytes(f"{tmp_path}/other")


def test_sources_of_every_kind(pages: str, tmp_path: Path) -> None:
    expected = bytes_of(documents(400))
    lines = tmp_path / "lines"
    lines.mkdir()
    for number in range(2):
        some = texts(400)[200 * number : 200 * (number + 1)]
        (lines / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    sources = [f"{pages}/*.parquet", [f"{pages}/{n}.parquet" for n in range(4)], str(lines), f"{lines}/*.jsonl"]
    for number, source in enumerate(sources):
        tokenize(source, f"{tmp_path}/{number}", tokenizer="byte")
        assert tokens_of(f"{tmp_path}/{number}") == expected
    with emberflow.init() as session:
        frame = session.read_parquet(pages).map(lambda row: {"body": row["text"] and row["text"].upper()})
        tokenize(frame, f"{tmp_path}/frame", tokenizer="byte", text_column="BODY")
        assert tokens_of(f"{tmp_path}/frame") == bytes_of([text.upper() for text in documents(400)])
        with emberflow.init() as other, pytest.raises(InvalidArgument, match="another session"):
            tokenize(frame, f"{tmp_path}/no", tokenizer="byte", session=other)


def test_what_is_no_corpus_is_refused_and_leaves_nothing(pages: str, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.bin").write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([None, ""], pa.string())}), tmp_path / "empty.parquet")
    bare = tmp_path / "tokenizer.json"
    train_tokenizer(pages, str(bare), vocab_size=260)
    (tmp_path / "tokenizer_config.json").unlink()
    url = str(tmp_path / "out")
    for source, options, message in (
        (pages, {"text_column": "body"}, "no column 'body': the columns are id, text"),
        (pages, {"text_column": "id"}, "of type BIGINT, not text"),
        (str(tmp_path / "odd"), {}, "neither Parquet nor JSON"),
        ([pages, "x.jsonl"], {}, "one kind"),
        ([], {}, "one kind"),
        (str(tmp_path / "empty.parquet"), {}, "no documents"),
        (pages, {"tokenizer": str(bare)}, "does not say which token ends a document"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            tokenize(source, url, **{"tokenizer": "byte"} | options)
    with pytest.raises(InvalidArgument, match="no special token 'the'"):
        load_tokenizer(str(bare), eos="the").vocabulary()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".emberflow*"))
    tokenize(pages, url, tokenizer="byte")
    with pytest.raises(DatasetExists):
        tokenize("nothing/*.parquet", url, tokenizer="byte")


def dying(call: Callable[..., None], steps: Iterator[int], last: int) -> Callable[..., None]:
    """`call`, but no more from the step `last` on."""

    def step(*paths: str, **options: object) -> None:
        if next(steps) >= last:
            raise KeyboardInterrupt
        call(*paths, **options)

    return step


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_corpus_is_whole_wherever_publishing_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    """Where files are moved one by one, each a copy and a removal, and at any of these the process dies."""
    for number, text in enumerate(("first", "second and longer", "third")):
        pq.write_table(pa.table({"text": [text]}), tmp_path / f"{number}.parquet")
    memory = fsspec.filesystem("memory")
    with emberflow.init() as session:
        for cut in itertools.count(1):
            parent = f"/{uuid.uuid4().hex}"
            url = f"memory:/{parent}/tokens"

            def write(number: int, mode: Literal["error", "overwrite"], url: str = url) -> None:
                tokenize(f"{tmp_path}/{number}.parquet", url, tokenizer="byte", mode=mode, session=session)

            if overwrites:
                write(0, "overwrite")
            with monkeypatch.context() as patch:
                steps = itertools.count(1)
                for name in ("cp_file", "rm_file"):
                    patch.setattr(memory, name, dying(getattr(memory, name), steps, cut))
                with contextlib.suppress(KeyboardInterrupt):
                    write(1, "overwrite")
            if next(steps) <= cut:
                break
            with pytest.raises(DatasetExists, match="has files already"):
                write(2, "error")
            assert tokens_of(url) in (bytes_of(["second and longer"]), *([bytes_of(["first"])] * overwrites))
            write(2, "overwrite")
            assert tokens_of(url) == bytes_of(["third"])
            assert set(memory.find(parent)) == set(memory.find(f"{parent}/tokens"))
            memory.rm(parent, recursive=True)
        assert cut > 10


# ---- tokenizers


def test_a_text_never_becomes_the_token_that_ends_it(pages: str, tmp_path: Path) -> None:
    trained = train_tokenizer(pages, str(tmp_path / "bpe"), vocab_size=400)
    for tokenizer in (ByteTokenizer(), v4_tokenizer(), trained):
        (eos,) = tokenizer.stop_ids
        flat, lengths = tokenizer.pack(documents(50))
        ends = np.cumsum(lengths) - 1
        assert np.array_equal(np.flatnonzero(flat == eos), ends)
        back = [tokenizer.decode(part.tolist()) for part in np.split(flat, ends + 1)[:-1]]
        assert back == documents(50)
        assert tokenizer.pack([])[0].size == 0
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.vocabulary() == tokenizer.vocabulary() and np.array_equal(again.pack(documents(50))[0], flat)


def test_a_trained_tokenizer_is_the_same_each_time(pages: str, root: str) -> None:
    code = (
        "import sys; from emberflow.tokens import train_tokenizer\n"
        "train_tokenizer(sys.argv[1], sys.argv[2], vocab_size=500, progress=False)"
    )
    trained = train_tokenizer(pages, f"{root}/bpe", vocab_size=500)
    assert trained.vocab_size <= 500 and trained.vocabulary().eos_id == 0
    if root.startswith("memory:"):
        return
    subprocess.run(
        [sys.executable, "-c", code, pages, f"{root}/bpe2"], check=True, env={**os.environ, "RAYON_NUM_THREADS": "1"}
    )
    assert file_bytes(f"{root}/bpe") == file_bytes(f"{root}/bpe2")
    with pytest.raises(DatasetExists, match="overwrite"):
        train_tokenizer(pages, f"{root}/bpe", vocab_size=500)
    train_tokenizer(pages, f"{root}/bpe/tokenizer.json", vocab_size=500, eos="<end>", mode="overwrite")
    again = load_tokenizer(f"{root}/bpe/tokenizer.json")
    assert again.decode([*again.encode("naïve"), 0]) == "naïve"
    assert again.vocabulary().tokenizer_hash != trained.vocabulary().tokenizer_hash
    with pytest.raises(InvalidArgument, match="at least 257"):
        train_tokenizer(pages, f"{root}/bpe3", vocab_size=256)


def test_settings_of_another_tokenizer_are_kept(pages: str, tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": "</s>", "chat_template": "{{ it }}"}')
    with pytest.raises(DatasetExists, match=r"tokenizer_config\.json exists"):
        train_tokenizer(pages, str(tmp_path), vocab_size=260)
    train_tokenizer(pages, str(tmp_path), vocab_size=260, eos="<end>", mode="overwrite")
    assert json.loads(settings.read_text()) == {"eos_token": "<end>", "chat_template": "{{ it }}"}
    settings.write_text("[]")
    with pytest.raises(InvalidArgument, match="something else"):
        train_tokenizer(pages, str(tmp_path), vocab_size=260, mode="overwrite")


def test_a_trained_tokenizer_makes_a_corpus(pages: str, tmp_path: Path) -> None:
    trained = train_tokenizer(pages, str(tmp_path / "bpe"), vocab_size=400)
    tokenize(pages, str(tmp_path / "tokens"), tokenizer=str(tmp_path / "bpe" / "tokenizer.json"))
    with TokenDataset(
        str(tmp_path / "tokens"), sequence_tokens=100, tokenizer_hash=trained.vocabulary().tokenizer_hash
    ) as dataset:
        assert dataset.vocab_size == trained.vocab_size and dataset.documents_count == 398
    assert trained.decode(tokens_of(str(tmp_path / "tokens"))) == "".join(documents(400))


def test_names_of_tokenizers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_tokenizer("byte").vocabulary().tokenizer == "byte"
    assert load_tokenizer("v4").vocabulary().eos_id == 1
    with pytest.raises(InvalidArgument, match="of its own"):
        load_tokenizer("byte", eos="x")
    with pytest.raises(FileNotFoundError):
        load_tokenizer(str(tmp_path / "missing.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="emberline\\[text\\]"):
        FileTokenizer("tokenizer.json")


# ---- runs that die

RUN = """
import sys, emberflow
from emberflow.tokens import group
adds = int(sys.argv[4])
def add(self, *documents, to=group.GroupWriter.add):
    global adds
    adds -= 1
    if adds == 0:
        import os; os.kill(os.getpid(), 9)
    to(self, *documents)
group.GroupWriter.add = add
if __name__ == "__main__":
    with emberflow.init(executor="local", workers=1, partition_bytes=2000, data_root=sys.argv[3]) as session:
        emberflow.tokenize(sys.argv[1], sys.argv[2], tokenizer="byte", session=session)
"""


@pytest.mark.parametrize("dies_when", ["3 tasks are done", "20 batches are packed"])
def test_a_run_that_was_killed_goes_on(pages: str, tmp_path: Path, dies_when: str) -> None:
    script, url, flow = tmp_path / "run.py", str(tmp_path / "tokens"), tmp_path / "flow"
    script.write_text(RUN)
    adds = 20 if "packed" in dies_when else 0
    command = [sys.executable, str(script), pages, url, str(flow), str(adds)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while not adds and process.poll() is None and len(list(flow.glob("steps/*/*.won"))) < 3:
            time.sleep(0.01)
        if not adds:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    done = len(list(flow.glob("steps/*/*.won")))
    assert done >= 3 and not Path(url).exists()
    with emberflow.init(executor="local", workers=2, partition_bytes=2000, data_root=str(flow)) as session:
        tokenize(pages, url, tokenizer="byte", session=session)
        reused = sum(event.data.get("reused", 0) for event in session.jobs.last if event.kind == "stage")
    assert reused >= min(done, 3)
    assert tokens_of(url) == bytes_of(documents(400))
    assert not list(tmp_path.glob(".emberflow*"))


# ---- the commands


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["corpus", *arguments])


def test_commands(pages: str, tmp_path: Path) -> None:
    url, bpe = f"ember://{tmp_path}/store/!/tokens", str(tmp_path / "bpe")
    trained = run("train-tokenizer", pages, bpe, "--vocab-size", "300", "--sample", "0.5", "--json")
    assert json.loads(trained.output)["eos_id"] == 0
    made = run("tokenize", pages, url, "--tokenizer", f"{bpe}/tokenizer.json", "--json", "--root", f"{tmp_path}/flow")
    assert json.loads(made.stdout)["documents"] == 398
    again = run("tokenize", pages, url, "--tokenizer", "byte")
    assert again.exit_code == 1 and "--mode overwrite" in again.output
    info = json.loads(run("info", url, "--json").output)
    assert (info["documents"], info["vocab_size"]) == (398, 300)
    assert "tokenizer hash" in run("info", url).output
    sound = run("verify", url, "--tokenizer", f"{bpe}/tokenizer.json")
    assert sound.exit_code == 0 and "sound" in sound.output
    other = run("verify", url, "--tokenizer", "byte", "--json")
    assert other.exit_code == 1 and "not of byte" in json.loads(other.stdout)["problem"]
    for command in ("info", "verify"):
        missing = run(command, str(tmp_path / "nothing"))
        assert missing.exit_code == 1 and missing.output.startswith("Error: no token shards at")
