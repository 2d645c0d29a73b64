"""The second half: a model out of the corpus, by the commands that a user would type.

A job in SQL leaves out copies and what is too short; a tokenizer is trained on the rest, which becomes token shards; a
small V4 is trained on them, killed in the middle and gone on with; its weights are exported; it goes on from a prompt
twice, the second time with the prompt's beginning from disk. Each check compares numbers, to the last bit.

Training and generation are processes of their own: a kill is a kill, and what the second one knows it has from the
store.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import emberflow
from emberflow.tokens import train_tokenizer
from fsspec.core import url_to_fs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .corpus import QuickstartError

VOCAB_SIZE = 2048
SAVES = 4
"""Checkpoints of a run. It is killed between the second and the third."""
LAST = 50
"""Steps over which the load of experts is summed."""
PROMPT_CHARACTERS = 2800
NEW_TOKENS = 40

_MARK = "# Written by the quickstart."
"""What the file of its run begins with."""

_CLEAN = """
    select path, text from (
        select *, row_number() over (partition by sha256 order by path) as copy from '{raw}/*.parquet'
    )
    where copy = 1 and suffix = 'py' and bytes between 1000 and 200000 and path not like '%test%'
    order by sha256
"""
"""Python without its tests. The order is one that says nothing, so that the end is as good as any part."""


@dataclass(kw_only=True, slots=True)
class ModelReport:
    """What became of the corpus. Losses are of steps, in nats a token."""

    documents: int = 0
    clean_bytes: int = 0
    clean_s: float = 0.0
    tokens: int = 0
    tokenize_s: float = 0.0
    steps: int = 0
    parameters: int = 0
    losses: list[float] = field(default_factory=list)
    train_s: float = 0.0
    tokens_per_s: float = 0.0
    killed_after: int = 0
    resumed_from: int = 0
    steps_repeated: int = 0
    """Steps that both runs did, and in which every loss and norm has the same bits."""
    load_max_over_mean: dict[str, float] = field(default_factory=dict)
    """By layer that chooses: the fullest expert's tokens of the last steps over the mean."""
    model_folder: str = ""
    text: str = ""
    cached_tokens: int = 0
    prompt_tokens: int = 0
    first_token_s: dict[str, float] = field(default_factory=dict)
    """Cold, and with the prompt's beginning from disk."""


def run(raw: str, work: Path, steps: int, report: ModelReport, console: Console) -> None:
    """All of it; `raw` is the corpus, `work` a local folder for what is no data. Raises QuickstartError."""
    store = raw.removesuffix("/corpus/raw")
    config, folder = work / "run.toml", work / "model"
    _refuse_others(store, work)
    work.mkdir(parents=True, exist_ok=True)
    console.print("[bold]5[/] cleaning the corpus with SQL, training a tokenizer, writing token shards")
    tokens = prepare(raw, store, report)
    console.print(f"[bold]6[/] training a small V4 for {steps} steps; it is killed on the way, and goes on")
    configure(config, store, tokens, work, steps)
    train(config, work, steps, report, console)
    console.print("[bold]7[/] going on from a prompt, and once more with its beginning from disk")
    report.model_folder = str(folder)
    if folder.exists():
        shutil.rmtree(folder)
    _command("checkpoint", "export", f"{store}/run/checkpoints", str(folder))
    _download(f"{store}/tokenizer.json", folder / "tokenizer.json")
    generate(raw, store, folder, work, report)


def prepare(raw: str, store: str, report: ModelReport) -> str:
    """Token shards of the corpus without copies; their URL."""
    clean, tokenizer, tokens = f"{store}/corpus/clean", f"{store}/tokenizer.json", f"{store}/tokens"
    start = time.perf_counter()
    with emberflow.init() as session:
        written = session.sql(_CLEAN.replace("{raw}", raw)).write_parquet(clean, mode="overwrite")
        frame = session.read_parquet(clean)
        row = session.sql(
            f"select count(*) as n, sum(strlen(text))::bigint as size from '{clean}/*.parquet'"
        ).take_all()[0]
        report.documents, report.clean_bytes = int(row["n"]), int(row["size"] or 0)
        if not written.num_rows:
            raise QuickstartError("the job left no text to train on")
        report.clean_s = time.perf_counter() - start
        start = time.perf_counter()
        train_tokenizer(frame, tokenizer, vocab_size=VOCAB_SIZE, mode="overwrite")
        report.tokens = emberflow.tokenize(frame, tokens, tokenizer=tokenizer, mode="overwrite").tokens
        report.tokenize_s = time.perf_counter() - start
    return tokens


def configure(config: Path, store: str, tokens: str, work: Path, steps: int) -> None:
    """A run's file; an earlier quickstart's checkpoints, pages and metrics go."""
    fs, path = url_to_fs(f"{store}/run")
    if fs.exists(path):
        fs.rm(path, recursive=True)
    (work / "metrics.jsonl").unlink(missing_ok=True)
    config.write_text(
        f"""{_MARK} Go on with it: emberline train {config} --set schedule.steps={4 * steps}
seed = 1

[model]
preset = "tiny"
vocab_size = {VOCAB_SIZE}

[data]
url = "{tokens}"
sequence_tokens = 256
batch_samples = 2

[schedule]
kind = "wsd"
lr = 3e-3
steps = {steps}
warmup_steps = {max(1, steps // 20)}
decay_steps = {max(1, steps // 5)}

[losses]
bias_rate = 0.005
balance_weight = 0.3

[checkpoint]
url = "{store}/run/checkpoints"
every_steps = {max(1, steps // SAVES)}

[metrics]
folder = "{work}"
expert_tokens = true
"""
    )


def train(config: Path, work: Path, steps: int, report: ModelReport, console: Console) -> None:
    """Two runs of one training: the first is killed, the second goes on and has to say what the first has said."""
    every = max(1, steps // SAVES)
    kill_after = min(2 * every + every // 2, steps - 1)
    start = time.perf_counter()
    columns = (
        TextColumn("  train"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=steps, told="")

        def show(record: dict[str, Any]) -> None:
            progress.update(task, completed=record["step"], told=f"loss {record['loss']:.3f}")

        first: dict[int, dict[str, Any]] = {}
        with _process("train", str(config), "--json") as process:
            for record in _records(process):
                first[record["step"]] = record
                show(record)
                if record["step"] == kill_after:
                    process.send_signal(signal.SIGKILL)
        if process.returncode != -signal.SIGKILL:
            raise QuickstartError(f"training ended with {process.returncode}, after step {max(first, default=0)}")
        second: dict[int, dict[str, Any]] = {}
        with _process("train", str(config), "--json") as process:
            for record in _records(process):
                second[record["step"]] = record
                show(record)
        if process.returncode or steps not in second:
            raise QuickstartError(f"training ended with {process.returncode}, after step {max(second, default=0)}")
    report.train_s = time.perf_counter() - start
    report.killed_after, report.resumed_from = max(first), min(second) - 1
    both = sorted(first.keys() & second.keys())
    differ = [n for n in both if _numbers(first[n]) != _numbers(second[n])]
    if differ:
        raise QuickstartError(
            f"step {differ[0]} has other numbers after the kill: {first[differ[0]]} {second[differ[0]]}"
        )
    report.steps_repeated = len(both)
    if sorted(first | second) != list(range(1, steps + 1)):
        raise QuickstartError("a step is missing")
    _summarise([(first | second)[n] for n in range(1, steps + 1)], report)
    lines = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    if lines != list(range(1, steps + 1)):
        raise QuickstartError("metrics.jsonl does not hold every step once")


def _numbers(record: dict[str, Any]) -> list[Any]:
    return [
        record[name] for name in ("loss", "mtp_loss", "balance_loss", "index_loss", "gradient_norm", "expert_tokens")
    ]


def _summarise(records: list[dict[str, Any]], report: ModelReport) -> None:
    report.steps = len(records)
    report.losses = [record["loss"] for record in records]
    report.tokens_per_s = statistics.median(record["tokens_per_s"] for record in records)
    last = records[-LAST:]
    for layer in last[-1]["expert_tokens"]:
        experts = [sum(step) for step in zip(*(record["expert_tokens"][layer] for record in last), strict=True)]
        report.load_max_over_mean[layer] = max(experts) / statistics.fmean(experts)
    if len(records) >= LAST and statistics.fmean(report.losses[-10:]) >= statistics.fmean(report.losses[:10]):
        raise QuickstartError("the loss did not fall")


def generate(raw: str, store: str, folder: Path, work: Path, report: ModelReport) -> None:
    """The same prompt twice, by processes that share nothing but the store."""
    prompt = work / "prompt.txt"
    with emberflow.init() as session:
        rows = session.sql(
            f"select text from '{raw}/*.parquet' where suffix = 'py' order by path like '%test%' desc, bytes desc"
        )
        prompt.write_text(rows.take(1)[0]["text"][:PROMPT_CHARACTERS])
    with _service(store) as address:
        answers = [
            json.loads(
                _command(
                    *("generate", "--model", str(folder), "--prompt-file", str(prompt), "--max-new", str(NEW_TOKENS)),
                    *("--dtype", "f32", "--batch-invariant", "--prefixes", address, "--json"),
                )
            )
            for _ in range(2)
        ]
    cold, warm = answers
    if cold["ids"] != warm["ids"]:
        raise QuickstartError("the text is another one when the prompt's beginning comes from disk")
    if cold["cached_tokens"] or not warm["cached_tokens"]:
        raise QuickstartError(f"{cold['cached_tokens']} tokens from disk at first, {warm['cached_tokens']} then")
    report.text, report.cached_tokens = warm["text"], warm["cached_tokens"]
    report.prompt_tokens = len(warm["prompt_ids"])
    report.first_token_s = {"cold": cold["seconds"]["first"], "from disk": warm["seconds"]["first"]}


# ---- other processes


def _line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "emberline", *arguments]


def _command(*arguments: str) -> str:
    """What a command prints. Raises QuickstartError."""
    done = subprocess.run(_line(*arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise QuickstartError(f"emberline {' '.join(arguments)}: {done.stderr.strip()[-1000:]}")
    return done.stdout


@contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that is running; killed if it is still there at the end."""
    process = subprocess.Popen(_line(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def _records(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.endswith("\n"):  # the last one may be cut off by a kill
            yield json.loads(line)
    process.wait()
    if process.returncode > 0:
        assert process.stderr is not None
        raise QuickstartError(f"training failed: {process.stderr.read().strip()[-1000:]}")


@contextmanager
def _service(store: str) -> Iterator[str]:
    """A KV-cache service over the store, and its address. Its pages are part of the run: those of an earlier one, whose
    weights may have been the same to the bit, have gone with it."""
    root = url_to_fs(f"{store}/run/kv")[1]
    with _process(
        "kv", "serve", "--store", store, "--root", root, "--listen", "127.0.0.1:0", "--capacity", "1GiB"
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            process.wait()
            assert process.stderr is not None
            raise QuickstartError(f"the KV-cache service ended: {process.stderr.read().strip()[-1000:]}")
        yield str(json.loads(line)["address"])
        process.terminate()
        process.wait()


def _download(url: str, path: Path) -> None:
    fs, inside = url_to_fs(url)
    path.write_bytes(fs.cat_file(inside))


def _refuse_others(store: str, work: Path) -> None:
    """What an earlier quickstart left may be replaced; a run and a model of the user's own may not.

    Both halves belong together: where `work` holds no file of ours, what is in the store's `run` is somebody else's.
    """
    config = work / "run.toml"
    if config.exists() and config.read_text().startswith(_MARK):
        return
    fs, path = url_to_fs(f"{store}/run")
    taken = [
        str(file) for file in (config, work / "model", work / "metrics.jsonl", work / "prompt.txt") if file.exists()
    ]
    if fs.exists(path):
        taken.append(f"{store}/run")
    if taken:
        raise QuickstartError(
            f"will not replace {taken[0]}: it is not from an earlier run; name another --store or --work"
        )
