"""`emberline jobs`: what is known of the jobs that keep their work under a root.

Invariant: what is imported here loads neither DuckDB nor Arrow, so that `--help` does not wait for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from emberfs.cli.output import (
    human_bytes,
    human_time,
    iso_time,
    json_option,
    note,
    one_line,
    plural,
    print_columns,
    print_fields,
    print_json,
    print_line,
)

if TYPE_CHECKING:
    from emberflow.job.history import JobInfo
    from emberflow.job.tally import StageTally

HELP = """Jobs of emberflow: what runs, what went wrong, what may go.

A session keeps its jobs' work and records under its data_root, any fsspec URL. Name it with --root, or once in
EMBERFLOW_ROOT.

\b
Examples:
  export EMBERFLOW_ROOT=ember:///srv/store/!/flow
  emberline jobs ls
  emberline jobs show 3f2a9c41d07b-1
  emberline jobs report 3f2a9c41d07b-1 -o job.html
  emberline jobs gc --dry-run

A job whose driver was not heard of for 30 seconds is lost: run the program again, and it goes on from what was done.
"""

_root_option = click.option(
    "--root", metavar="URL", envvar="EMBERFLOW_ROOT", help="Where jobs are kept: the data_root of their session."
)


@click.group(help=HELP, short_help="Jobs: list them, look into one, end one, clean up.", no_args_is_help=True)
def jobs() -> None:
    pass


def _root(root: str | None) -> str:
    if not root:
        raise click.UsageError(
            "where are the jobs? Give the data_root of their session: --root URL, or EMBERFLOW_ROOT=URL. "
            "(A session without a data_root keeps its jobs in a temporary directory, and removes them with itself.)"
        )
    return root


@jobs.command()
@_root_option
@click.option("--state", type=click.Choice(["running", "done", "failed", "cancelled", "lost"]), help="Only these.")
@json_option
def ls(root: str | None, state: str | None, as_json: bool) -> None:
    """List jobs, the latest first.

    \b
    Examples:
      emberline jobs ls --root /data/flow
      emberline jobs ls --state failed --json
    """
    from emberflow.job import history
    from emberflow.quantities import seconds_text

    found = [info for info in history.jobs(_root(root)) if state in (None, info.state)]
    if as_json:
        for info in found:
            print_json(_fields(info))
    elif not found:
        note(f"no jobs under {root}")
    else:
        rows = [("id", "state", "started", "took", "tasks", "name")]
        for info in found:
            took, tasks = seconds_text(info.last_s - info.started_s), f"{info.tasks_done}/{info.tasks}"
            rows.append((info.id, info.state, human_time(info.started_s), took, tasks, one_line(info.name)))
        print_columns(rows, right=(3, 4))


@jobs.command()
@click.argument("id")
@_root_option
@json_option
def show(id: str, root: str | None, as_json: bool) -> None:
    """Show job ID: its state, stages, errors, query and plan.

    \b
    Examples:
      emberline jobs show 3f2a9c41d07b-1
      emberline jobs show 3f2a9c41d07b-1 --json
    """
    from emberflow.job import history
    from emberflow.job.tally import Tally

    record = history.show(_root(root), id)
    tally = Tally(record.events)
    if as_json:
        print_json({**_fields(record.info), "stages": [_stage_fields(stage) for stage in tally.stages.values()]})
        return
    print_fields(_told(record.info))
    if tally.stages:
        print_line("")
        heads = ("tasks", "reused", "rows", "bytes", "median", "longest", "skew", "retries", "stage")
        print_columns([heads, *map(_stage_row, tally.stages.values())], right=range(8))
    if tally.troubles:
        print_line("")
        rows = [(f"{event.at_s:.1f} s", event.kind, tally.name_of(event), one_line(str(event.data.get("error", ""))))
                for event in tally.troubles]  # fmt: skip
        print_columns(rows, right=(0,))
    for title, text in (("query", record.info.query), ("plan", record.explain), ("error", record.info.error)):
        if text:
            print_line("")
            print_line(f"{title}:")
            for line in text.splitlines():
                print_line(f"  {line}")


def _fields(info: JobInfo) -> dict[str, object]:
    times = {name: iso_time(getattr(info, name)) for name in ("started_s", "seen_s", "ended_s")}
    fields = {name: getattr(info, name) for name in info.__struct_fields__ if name not in times}
    return {**fields, **{name.removesuffix("_s"): time for name, time in times.items()}}


def _told(info: JobInfo) -> list[tuple[str, str]]:
    from emberflow.quantities import seconds_text

    told = [
        ("job", info.id),
        ("name", one_line(info.name)),
        ("state", info.state),
        ("started", human_time(info.started_s)),
        ("last heard of" if info.ended_s is None else "ended", human_time(info.last_s)),
        ("took", seconds_text(info.last_s - info.started_s)),
        ("driver", f"process {info.pid} on {info.host}"),
        ("writes", one_line(info.target or "")),
        ("with", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
    ]
    return [(name, value) for name, value in told if value]


def _stage_fields(stage: StageTally) -> dict[str, object]:
    names = ("id", "label", "tasks", "done", "reused", "inputs", "rows", "size_bytes", "spilled_bytes")
    more = ("cpu_s", "median_s", "max_s", "skew", "retries", "recomputed", "speculated")
    return {name: getattr(stage, name) for name in (*names, *more)}


def _stage_row(stage: StageTally) -> tuple[str, ...]:
    from emberflow.quantities import seconds_text

    return (
        f"{stage.done}/{stage.tasks}",
        str(stage.reused),
        f"{stage.rows:,}",
        human_bytes(stage.size_bytes),
        "-" if stage.median_s is None else seconds_text(stage.median_s),
        "-" if stage.max_s is None else seconds_text(stage.max_s),
        "-" if stage.skew is None else f"{stage.skew:.1f}x",
        str(stage.retries),
        one_line(f"{stage.id} {stage.label}"),
    )


@jobs.command()
@click.argument("id")
@_root_option
@json_option
def logs(id: str, root: str | None, as_json: bool) -> None:
    """Print what the tasks of job ID printed.

    \b
    Example:
      emberline jobs logs 3f2a9c41d07b-1 | grep '^.map 3.7.'
    """
    from emberflow.job import history

    for text in history.logs(_root(root), id):
        for line in text.splitlines():
            print_json({"line": line}) if as_json else print_line(line)


@jobs.command()
@click.argument("id")
@_root_option
@json_option
def cancel(id: str, root: str | None, as_json: bool) -> None:
    """Ask job ID to end. What it has done stays, and a later run goes on from there.

    Its driver sees the request with its next heartbeat, within some seconds.

    \b
    Example:
      emberline jobs cancel 3f2a9c41d07b-1
    """
    from emberflow.job import history

    history.cancel(_root(root), id)
    if as_json:
        print_json({"id": id, "asked_to_end": True})
    else:
        note(f"asked job {id} to end")


@jobs.command()
@_root_option
@click.option("--keep-days", type=click.FloatRange(min=0), default=7.0, show_default=True, metavar="N",
              help="Keep steps and records for so long after their last use.")  # fmt: skip
@click.option("--max-size", metavar="SIZE", help='Keep at most so much of steps, as in "10GiB"; the latest used stay.')
@click.option("--dry-run", is_flag=True, help="Tell what would go, and remove nothing.")
@json_option
def gc(root: str | None, keep_days: float, max_size: str | None, dry_run: bool, as_json: bool) -> None:
    """Remove what no job needs any more.

    That is: what failed attempts left, steps and records not used for --keep-days, then the longest unused steps until
    the rest is under --max-size, and half-written datasets of lost jobs. What a running job uses stays. It may run at
    any time, from any machine, also twice at once.

    \b
    Examples:
      emberline jobs gc --dry-run
      emberline jobs gc --keep-days 2 --max-size 500GiB
    """
    from emberflow.job.sweep import sweep
    from emberflow.quantities import bytes_of

    swept = sweep(
        _root(root),
        retention_s=keep_days * 86_400,
        size_bytes_max=None if max_size is None else bytes_of(max_size),
        dry_run=dry_run,
    )
    kinds = {"attempts": "attempt", "steps": "step", "stagings": "half-written dataset", "records": "record"}
    if as_json:
        lists = {name: getattr(swept, name) for name in (*kinds, "errors")}
        print_json({"dry_run": dry_run, **lists, "size_bytes": swept.size_bytes, "kept_bytes": swept.kept_bytes})
    else:
        for name, noun in kinds.items():
            for what in getattr(swept, name):
                print_line(f"{noun}  {what}")
        counts = ", ".join(plural(len(getattr(swept, name)), noun) for name, noun in kinds.items())
        verb = "would remove" if dry_run else "removed"
        note(f"{verb} {counts}: {human_bytes(swept.size_bytes)}; {human_bytes(swept.kept_bytes)} of steps stay")
    if swept.errors:
        raise click.ClickException(one_line("not everything could be removed: " + "; ".join(swept.errors)))


@jobs.command()
@click.argument("id")
@_root_option
@click.option("-o", "--output", metavar="FILE", required=True, help="The HTML file to write; - for standard output.")
def report(id: str, root: str | None, output: str) -> None:
    """Write job ID as one HTML page.

    It shows the plan, a timeline, rows, bytes, skew, retries, errors and what was printed.

    The page needs nothing else and no network: send it to whoever should see it.

    \b
    Example:
      emberline jobs report 3f2a9c41d07b-1 -o job.html
    """
    from emberflow.job import history
    from emberflow.job.report import report as page

    text = page(history.show(_root(root), id))
    with click.open_file(output, "w", encoding="utf-8") as file:
        file.write(text)
    if output != "-":
        note(f"wrote {output}")
