"""`emberline checkpoint`: checkpoints of a training, at any URL: list, check, export.

Invariant: what is imported here does not load torch, and only `export` needs it.
"""

from __future__ import annotations

from typing import Any, Literal

import click
from emberfs.cli.output import (
    human_bytes,
    human_time,
    iso_time,
    json_option,
    note,
    plural,
    print_columns,
    print_json,
    print_line,
    progress_bar,
)

HELP = """Checkpoints of a training: list them, check them, export the model.

\b
Examples:
  emberline checkpoint ls ember:///srv/store/run-1/checkpoints
  emberline checkpoint verify ember:///srv/store/run-1/checkpoints
  emberline checkpoint export ember:///srv/store/run-1/checkpoints ./model
"""


@click.group(help=HELP, short_help="Checkpoints of a training: list, check, export.", no_args_is_help=True)
def checkpoint() -> None:
    pass


_step = click.option("--step", type=click.IntRange(min=0), metavar="N", help="Which one; the latest, if not said.")


@checkpoint.command()
@click.argument("url")
@json_option
def ls(url: str, as_json: bool) -> None:
    """List the checkpoints at URL in the order in which they were published: the last one is the latest.

    \b
    Examples:
      emberline checkpoint ls ember:///srv/store/run-1/checkpoints
      emberline checkpoint ls ./checkpoints --json
    """
    from embertrain.checkpoint import Checkpoints
    from embertrain.errors import Damaged, NoCheckpoint

    catalog = Checkpoints(url).catalog
    rows = [("step", "published", "size", "tensors", "ranks", "")]
    entries = catalog.published()
    for entry in entries:
        fields: dict[str, Any] = {"step": entry.step, "folder": entry.folder, "latest": entry == entries[-1]}
        last = "latest" if entry == entries[-1] else ""
        try:
            marker = catalog.marker(entry)
        except NoCheckpoint:
            continue  # removed since it was listed
        except Damaged as damaged:
            fields["problem"] = str(damaged)
            rows.append((str(entry.step), "-", "-", "-", "-", "damaged"))
        else:
            fields |= {"published": iso_time(marker.time), "bytes": marker.size_bytes, "tensors": marker.tensors,
                       "ranks": marker.ranks, "config": marker.config is not None}  # fmt: skip
            rows.append((str(entry.step), human_time(marker.time), human_bytes(marker.size_bytes), str(marker.tensors),
                         str(marker.ranks), last))  # fmt: skip
        if as_json:
            print_json(fields)
    if not as_json and len(rows) > 1:
        print_columns(rows, right=(0, 2, 3, 4))
    note(plural(len(rows) - 1, "checkpoint"))


@checkpoint.command()
@click.argument("url")
@_step
@json_option
def verify(url: str, step: int | None, as_json: bool) -> None:
    """Read every byte of a checkpoint at URL and compare its checksums. Exits with 1 if anything is damaged.

    \b
    Examples:
      emberline checkpoint verify ember:///srv/store/run-1/checkpoints
      emberline checkpoint verify ./checkpoints --step 1000 --json
    """
    from embertrain.checkpoint import Checkpoints
    from embertrain.errors import Damaged

    checkpoints = Checkpoints(url)
    entry = checkpoints.catalog.find(step)
    try:
        size = checkpoints.catalog.marker(entry).size_bytes
    except Damaged:
        size = 0  # `verify` tells more
    with progress_bar(f"step {entry.step}", size) as advance:
        problems = checkpoints.verify(entry.step, progress=advance)
    for problem in problems:
        if as_json:
            print_json({"step": entry.step, "problem": problem})
        else:
            print_line(problem)
    note(f"step {entry.step}, {human_bytes(size)}: {plural(len(problems), 'problem') if problems else 'sound'}")
    if problems:
        raise click.exceptions.Exit(1)


@checkpoint.command()
@click.argument("url")
@click.argument("out")
@_step
@click.option("--config", metavar="CONFIG", help="The model, as for `model info`; the checkpoint's, if not.")
@click.option("--base", metavar="URL", help="Of adapters: the weights they were trained beside, if no longer where "
              "they were then.")  # fmt: skip
@click.option("--names", type=click.Choice(["official", "transformers"]), default="official", show_default=True,
              help="Whose names the weights have.")  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(["bf16", "fp32"]), help="Write numbers of this sort; that they have, if not."
)
def export(
    url: str, out: str, step: int | None, config: str | None, base: str | None,
    names: Literal["official", "transformers"], dtype: str | None,
) -> None:  # fmt: skip
    """Write the model of a checkpoint at URL as safetensors with its config.json to OUT, a new folder at any URL.

    Adapters are merged into the weights they were trained beside. The whole model is read into memory. A folder
    elsewhere than on this machine is written to a temporary one first, and its config.json comes last: without that it
    is half an export.

    \b
    Examples:
      emberline checkpoint export ember:///srv/store/run-1/checkpoints ./model
      emberline checkpoint export ./checkpoints ember:///srv/store/models/run-1 --step 1000 --dtype bf16
      emberline checkpoint export ./lora ./model --base ./DeepSeek-V3
    """
    import torch
    from embertrain.checkpoint import Checkpoints
    from embertrain.train import export_merged, origin_of

    from .model import config_of

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or "")
    with Checkpoints(url) as checkpoints:
        step = checkpoints.catalog.find(step).step
        if origin_of(checkpoints, step) is not None:
            if config:
                raise click.UsageError("--config: adapters are of the model that their checkpoint tells")
            done = export_merged(checkpoints, step, out, base=base, names=names, dtype=kind)
        elif base:
            raise click.UsageError("--base: the checkpoint holds a whole model, and no adapters")
        else:
            done = checkpoints.export(step, out, config=config_of(config) if config else None, names=names, dtype=kind)
    note(f"{out}: the model of step {done}")
