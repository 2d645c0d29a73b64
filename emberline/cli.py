"""The one command line. It knows where each command lives and how a failure is told; the work is in the components.

A failure is one sentence on the standard error and exit code 1 (2 for a wrong command line); EMBERLINE_LOG=debug adds
the traceback. Ctrl-C says `interrupted` and exits with 130.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Any

import click

from . import __version__
from .lazy import LazyCommand, LazyGroup

HELP = """A chunk store for datasets, checkpoints and KV caches, and SQL over what is in it.

\b
Examples:
  emberline doctor ember:///srv/store
  export EMBERLINE_URL=ember:///srv/store
  emberline fs cp -r file:///data/books books
  emberline sql "select count(*) from 'ember://books/*.parquet'"

\b
Environment:
  EMBERLINE_URL   the store that bare paths are in
  EMBERLINE_LOG   debug, info, warning or error; debug shows tracebacks
  NO_COLOR        no colours
"""


class _CommandLine(LazyGroup):
    """The outermost group: every failure of a command passes here."""

    def invoke(self, ctx: click.Context) -> Any:
        _start_log(os.environ.get("EMBERLINE_LOG", ""))
        # A local file name may hold bytes that are not UTF-8: they go out as they came in.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="surrogateescape")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of our output went away; click ends quietly
            if os.environ.get("EMBERLINE_LOG", "").lower() == "debug":
                raise
            raise click.ClickException(_sentence(error)) from error


def _start_log(level: str) -> None:
    if not level:
        return
    if level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
        raise click.UsageError(f"EMBERLINE_LOG is debug, info, warning or error, not {level!r}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("emberline").setLevel(level.upper())


def _sentence(error: Exception) -> str:
    """What went wrong, on one line, for somebody who does not know the code."""
    from emberfs.cli.output import one_line

    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed, and this needs it (python -m pip install {error.name})"
    text = str(error)
    if isinstance(error, OSError) and error.errno and error.strerror and text.startswith("[Errno"):
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    elif isinstance(error, FileNotFoundError) and not error.errno:  # fsspec's: only the path
        text = f"no such file or directory: {text}"
    elif isinstance(error, ImportError) and "s3fs" in text:
        text = "S3 needs s3fs: pip install 'emberline[s3]'"
    if isinstance(error, OSError | ValueError | ImportError) and text:
        return one_line(text)
    return one_line(f"{type(error).__name__}: {text} (EMBERLINE_LOG=debug shows where)")


main = _CommandLine(
    "emberline",
    help=HELP,
    no_args_is_help=True,
    lazy={
        "fs": LazyCommand("emberline.fs:fs", "Files in a store, and between stores."),
        "sql": LazyCommand("emberline.sql:sql", "Run SQL over files of a store, or of any URL."),
        "corpus": LazyCommand("emberline.corpus:corpus", "Corpora for training: texts to token shards, tokenizers."),
        "jobs": LazyCommand("emberline.jobs:jobs", "Jobs of emberflow: list, look into one, end one, clean up."),
        "kv": LazyCommand("emberline.kv:kv", "KV cache of inference nodes: serve it, size one, simulate one."),
        "model": LazyCommand("emberline.model:model", "The MoE model: what it costs, and its weights."),
        "train": LazyCommand("emberline.train:train", "Train a model from a TOML file."),
        "checkpoint": LazyCommand("emberline.checkpoint:checkpoint", "Checkpoints of a training: list, check, export."),
        "generate": LazyCommand("emberline.generate:generate", "Text from a model."),
        "cluster": LazyCommand("emberfs.cli.cluster:cluster", "A store of several servers: start one, look after it."),
        "server": LazyCommand("emberfs.cli.server:server", "Run one server of a cluster in this process."),
        "sim": LazyCommand("emberfs.cli.sim:sim", "Simulate a cluster under faults, by seeds, and check it."),
        "stats": LazyCommand("emberfs.cli.stats:stats", "Show what the servers of a store serve, and how fast."),
        "profile": LazyCommand("emberfs.cli.profile:profile", "Show where the time of requests goes."),
        "bench": LazyCommand("emberfs.cli.bench:bench", "Measure a store on this machine, beside its ceilings."),
        "doctor": LazyCommand("emberfs.cli.doctor:doctor", "Check this machine and a store, and say what to do."),
    },
    context_settings={"help_option_names": ["-h", "--help"]},
)
click.version_option(__version__, "--version", prog_name="emberline", message="%(prog)s %(version)s")(main)
