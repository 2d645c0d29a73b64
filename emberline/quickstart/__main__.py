"""The whole story on real text: `python -m emberline.quickstart`.

A corpus into a store, SQL over it, token shards, a small model trained, killed and gone on with, and text from it.
What it wrote stays for the user to look around in; running it again replaces that and nothing else. Exits with 1 when a
check fails. Without torch (the `train` extra) it ends after the corpus.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict
from pathlib import Path

import click
import emberflow
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from . import corpus, model
from .corpus import MB, CorpusReport, QuickstartError
from .model import ModelReport

_DEFAULT_STORE = "ember://./quickstart-store"
_STEPS = 54


@click.command()
@click.option("--store", default=_DEFAULT_STORE, show_default=True, help="Any fsspec URL, or a directory.")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), default="quickstart-run", show_default=True,
              help="A local folder for the run's file, its metrics and the exported model.")  # fmt: skip
@click.option("--source", type=click.Path(exists=True, file_okay=False), help="Text to take in, instead of Python's.")
@click.option("--steps", type=click.IntRange(min=0), default=_STEPS, show_default=True, envvar="STEPS",
              help="Of training, 4 or more; 0: the corpus only. Or set STEPS.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(store: str, work: Path, source: str | None, steps: int, as_json: bool) -> None:
    """Take real text into a store, run SQL over it, train a model on it, and check every byte and every bit."""
    console = Console(stderr=as_json)
    store = store.rstrip("/")
    if store.startswith("ember://") and "/!" not in store:
        # Says where the store's directory ends, also when there is no store there yet.
        store += "/!"
    root = Path(source or sysconfig.get_paths()["stdlib"])
    report, trained = CorpusReport(store=store), ModelReport()
    if 0 < steps < model.SAVES:
        raise click.UsageError(f"--steps {steps}: it takes {model.SAVES} to be killed on the way; 0 is the corpus only")
    missing = [name for name in ("torch", "safetensors", "tokenizers") if importlib.util.find_spec(name) is None]
    if steps and missing:
        console.print(
            f"no {' and no '.join(missing)} here: for the model's half of the story pip install "
            "'emberline[quickstart,train]'", style="yellow", markup=False,
        )  # fmt: skip
        steps = 0
    start = time.perf_counter()
    try:
        corpus.run(root, report, console)
        if steps:
            model.run(f"{store}/corpus/raw", work, steps, trained, console)
    except (QuickstartError, emberflow.FlowError, OSError) as error:
        raise click.ClickException(str(error)) from error
    whole_s = time.perf_counter() - start
    if as_json:
        told = asdict(report) | report.rates() | {"whole_s": whole_s}
        click.echo(json.dumps(told | ({"model": asdict(trained)} if steps else {}), indent=2))
        return
    _print(report, console)
    if steps:
        _print_model(trained, console)
    console.print(f"[bold green]All checks passed[/] in {whole_s:.0f} s.\n")
    _print_commands(report.store, trained if steps else None, work, console)


def _print(report: CorpusReport, console: Console) -> None:
    for title, rows in report.results.items():
        table = Table(title=f"{title} ({report.query_s[title]:.2f} s)", title_justify="left", header_style="bold")
        for name, value in (rows[0] if rows else {"none": ""}).items():
            table.add_column(name, justify="right" if isinstance(value, int) else "left", overflow="fold")
        for row in rows:
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
        console.print(table)
    rates = report.rates()
    mb = report.text_bytes / MB
    console.print(
        f"[bold]Corpus:[/] {report.files:,} files, {mb:.1f} MB of text in {report.parts} Parquet files"
        f" ({report.stored_bytes / MB:.1f} MB); {report.skipped_files:,} files were not text.\n"
        f"  ingest     {rates['ingest_mb_per_s']:8.1f} MB/s   in {report.ingest_s:.1f} s\n"
        f"  SQL        {rates['sql_rows_per_s']:8,.0f} rows/s in {sum(report.query_s.values()):.1f} s,"
        f" {len(report.query_s)} queries\n"
        f"  partition  {rates['partition_mb_per_s']:8.1f} MB/s   in {report.partition_s:.1f} s,"
        f" {report.partitions} files\n"
        f"  read back  {rates['verify_mb_per_s']:8.1f} MB/s   in {report.verify_s:.1f} s,"
        f" with {' and '.join(report.checked_with)}\n"
    )


def _print_model(report: ModelReport, console: Console) -> None:
    first, last = report.losses[0], statistics.fmean(report.losses[-10:])
    loads = report.load_max_over_mean.values()
    cold, warm = report.first_token_s["cold"], report.first_token_s["from disk"]
    console.print(
        f"[bold]Model:[/] {report.documents:,} documents ({report.clean_bytes / MB:.1f} MB) in {report.clean_s:.1f} s,"
        f" {report.tokens:,} tokens in {report.tokenize_s:.1f} s\n"
        f"  loss       {first:8.3f} at first, {last:.3f} over the last 10 of {report.steps} steps"
        f" ({report.train_s:.0f} s, {report.tokens_per_s:,.0f} tokens/s)\n"
        f"  kill -9    after step {report.killed_after}; gone on with from {report.resumed_from}:"
        f" {report.steps_repeated} steps again, each to the same bits\n"
        f"  experts    {max(loads, default=0):8.2f} times the mean load has the fullest, over the last steps\n"
        f"  prefix     {report.cached_tokens} of {report.prompt_tokens} tokens from disk: the first token"
        f" after {warm:.2f} s instead of {cold:.2f} s, and the same text"
    )
    console.print(Panel(Text(report.text), title="from the model", title_align="left"))


def _print_commands(store: str, trained: ModelReport | None, work: Path, console: Console) -> None:
    # Now that the store is there its URL needs no mark, which an interactive shell would take for history.
    store = store.removesuffix("/!")
    inside = f"{store}/corpus"
    console.print("Look around:")
    program = "emberline" if shutil.which("emberline") else os.path.relpath(Path(sys.executable).with_name("emberline"))
    commands = [
        f"{program} fs ls {inside}/by_suffix",
        f"{program} fs du {store}",
        f"{program} sql \"select path, lines from '{inside}/raw/*.parquet' where text like '%yield from%' limit 10\"",
    ]
    if trained is not None:
        commands += [
            f"{program} corpus info {store}/tokens",
            f"{program} checkpoint ls {store}/run/checkpoints",
            f"{program} train {work / 'run.toml'} --set schedule.steps={4 * trained.steps}",
            f"{program} generate --model {trained.model_folder} --prompt 'import os' --temperature 0.7",
        ]
    for command in commands:
        console.print(f"  {command}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
