"""`emberline corpus`: texts to token shards, a tokenizer for them, and a look at what is there.

Invariant: what is imported here loads neither DuckDB nor Arrow, so that `--help` does not wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import click
from emberfs.cli.output import human_bytes, json_option, note, plural, print_fields, print_json, print_line

if TYPE_CHECKING:
    from emberflow import Session
    from emberflow.tokens import TokenGroup

HELP = """Corpora for training: texts to token shards, which trainers read at random.

\b
Examples:
  emberline corpus train-tokenizer 'pages/*.parquet' ember://./store/bpe --vocab-size 32000
  emberline corpus tokenize 'pages/*.parquet' ember://./store/tokens --tokenizer ember://./store/bpe/tokenizer.json
  emberline corpus info ember://./store/tokens
  emberline corpus verify ember://./store/tokens

Token shards are a zarr group: `tokens` (uint32) and `offsets` (int64) of the documents in them.
"""

Mode = Literal["error", "overwrite"]

_column_option = click.option("--text-column", default="text", show_default=True, help="The column with the texts.")
_mode_option = click.option(
    "--mode",
    type=click.Choice(["error", "overwrite"]),
    default="error",
    show_default=True,
    help="When there is something at URL.",
)


@click.group(help=HELP, short_help="Corpora: texts to token shards, tokenizers.", no_args_is_help=True)
def corpus() -> None:
    pass


def _session_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a job may be told."""
    for option in (
        click.option("--executor", type=click.Choice(["auto", "inline", "local", "ray"]), default="auto",
                     show_default=True, help="What runs the tasks."),
        click.option("--workers", type=click.IntRange(min=1), help="Local worker processes. By default one per core."),
        click.option("--memory-limit", metavar="SIZE", help='Of all workers together, as in "4GB".'),
        click.option("--root", metavar="URL", envvar="EMBERFLOW_ROOT",
                     help="Where jobs keep their work: a run that died goes on from there. Or EMBERFLOW_ROOT."),
    ):  # fmt: skip
        command = option(command)
    return command


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the block are told in a sentence, in the words of the command line."""
    from emberflow import FlowError

    try:
        yield
    except (FlowError, OSError, ImportError) as error:
        message = str(error).replace('mode="overwrite"', "--mode overwrite").replace("(eos=, --eos)", "(--eos)")
        raise click.ClickException(message) from error


@contextmanager
def _session(options: dict[str, Any]) -> Iterator[Session]:
    from emberflow import init

    root = options.pop("root")
    with _told(), init(data_root=root, **options) as session:
        yield session


@corpus.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("url")
@click.option("--tokenizer", required=True, metavar="NAME", help="byte, v4 (DeepSeek-V4's), or a tokenizer.json.")
@click.option("--eos", metavar="TOKEN", help="What ends a document, if no tokenizer_config.json says it.")
@_column_option
@_mode_option
@_session_options
@json_option
def tokenize(
    sources: tuple[str, ...], url: str, tokenizer: str, eos: str | None, text_column: str, mode: Mode, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Write the texts of SOURCE (Parquet or JSON lines: files, patterns, directories) as token shards at URL.

    Documents keep their order; each ends with the tokenizer's eos token, which nothing in a text can become. URL is
    there when all of it is. Run again with the same --root, a run that died does only what is left.

    \b
    Examples:
      emberline corpus tokenize 'pages/*.jsonl.zst' ember://./store/tokens --tokenizer v4
      emberline corpus tokenize pages/ tokens/ --tokenizer ./bpe/tokenizer.json --text-column body --root ./flow
    """
    from emberflow.tokens import load_tokenizer
    from emberflow.tokens import tokenize as write

    with _session(options) as session:
        words = load_tokenizer(tokenizer, eos=eos)
        report = write(list(sources), url, tokenizer=words, text_column=text_column, mode=mode, session=session)
    if as_json:
        print_json(asdict(report))
        return
    note(f"{url}: {plural(report.documents, 'document')}, {plural(report.tokens, 'token')}")
    if report.skipped:
        note(f"{plural(report.skipped, 'row')} had no text")


@corpus.command("train-tokenizer")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.argument("url")
@click.option("--vocab-size", type=click.IntRange(min=257), required=True, help="Tokens in all, eos among them.")
@click.option("--eos", metavar="TOKEN", default="<|endoftext|>", show_default=True, help="What ends a document.")
@click.option("--sample", type=click.FloatRange(0, 1, min_open=True), metavar="FRACTION",
              help="Of the texts, by their hash. All different words of what is read are held in memory.")  # fmt: skip
@_column_option
@_mode_option
@_session_options
@json_option
def train_tokenizer(
    sources: tuple[str, ...], url: str, vocab_size: int, eos: str, sample: float | None, text_column: str, mode: Mode,
    as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Train a byte-level BPE tokenizer on the texts of SOURCE, and write URL/tokenizer.json (or URL, if it ends so).

    The same texts make the same file.

    \b
    Examples:
      emberline corpus train-tokenizer 'pages/*.parquet' ./bpe --vocab-size 32000
      emberline corpus train-tokenizer pages/ ember://./store/bpe --vocab-size 128000 --sample 0.05
    """
    from emberflow.tokens import train_tokenizer as train

    with _session(options) as session:
        tokenizer = train(
            list(sources), url, vocab_size=vocab_size, text_column=text_column, eos=eos, sample=sample, mode=mode,
            session=session,
        )  # fmt: skip
    words = tokenizer.vocabulary()
    if as_json:
        print_json(asdict(words))
    else:
        note(f"{words.tokenizer}: {plural(words.vocab_size, 'token')}, {eos} is {words.eos_id}")


@corpus.command()
@click.argument("url")
@json_option
def info(url: str, as_json: bool) -> None:
    """Show what the token shards at URL are: tokens, documents, tokenizer.

    \b
    Example:
      emberline corpus info ember://./store/tokens
    """
    from emberflow.tokens import open_group

    with _told():
        fields = _fields(open_group(url))
    if as_json:
        print_json(fields)
        return
    fields["bytes"] = human_bytes(fields["bytes"])
    print_fields([(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else value)
                  for name, value in fields.items()])  # fmt: skip


@corpus.command()
@click.argument("url")
@click.option("--tokenizer", metavar="NAME", help="Check too that this one made them: byte, v4, or a tokenizer.json.")
@click.option("--eos", metavar="TOKEN", help="What ends a document, if no tokenizer_config.json says it.")
@json_option
def verify(url: str, tokenizer: str | None, eos: str | None, as_json: bool) -> None:
    """Read all of the token shards at URL: checksums, offsets, eos tokens, vocabulary. Exits with 1 if any is wrong.

    \b
    Examples:
      emberline corpus verify ember://./store/tokens
      emberline corpus verify tokens/ --tokenizer v4
    """
    from emberflow.progress import row_progress
    from emberflow.tokens import load_tokenizer, open_group
    from emberflow.tokens.verify import problems

    found = []
    with _told(), row_progress(f"verifying {url}", show=None, unit="tokens") as advance:
        group = open_group(url)
        if tokenizer is not None:
            asked = load_tokenizer(tokenizer, eos=eos).vocabulary()
            if asked.tokenizer_hash != group.vocabulary.tokenizer_hash:
                found.append(f"the tokens are of the tokenizer {group.vocabulary.tokenizer}, not of {tokenizer}")
        found += problems(group, advance=advance)
    for problem in found:
        print_json({"problem": problem}) if as_json else print_line(problem)
    note(f"{plural(group.tokens.length, 'token')}: {plural(len(found), 'problem') if found else 'sound'}")
    if found:
        raise click.exceptions.Exit(1)


def _fields(group: TokenGroup) -> dict[str, Any]:
    words = group.vocabulary
    return {
        "tokens": group.tokens.length,
        "documents": group.documents,
        "bytes": group.size_bytes,
        "tokenizer": words.tokenizer,
        "tokenizer_hash": words.tokenizer_hash,
        "vocab_size": words.vocab_size,
        "eos_id": words.eos_id,
        "content_hash": group.content_hash,
    }
