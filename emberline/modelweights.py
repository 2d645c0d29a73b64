"""`emberline model weights`: look at a checkpoint, check it, write it in another form.

Invariant: what is imported here does not load torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
from emberfs.cli.output import human_bytes, json_option, note, plural, print_columns, print_json, print_line

from .kvservice import size_bytes_of

HELP = """Weights in safetensors files, under DeepSeek's or transformers' names.

\b
Examples:
  emberline model weights ls ./DeepSeek-V4-Flash
  emberline model weights verify ./DeepSeek-V4-Flash
  emberline model weights convert ./DeepSeek-V4-Flash ./flash-bf16 --names transformers --dtype bf16
"""


@click.group(help=HELP, short_help="Weights in safetensors files: look, check, convert.", no_args_is_help=True)
def weights() -> None:
    pass


_folder = click.argument("folder", type=click.Path(exists=True, path_type=Path))


@weights.command()
@_folder
@json_option
def ls(folder: Path, as_json: bool) -> None:
    """List the tensors of FOLDER, or of one safetensors file, as they stand there.

    \b
    Example:
      emberline model weights ls ./DeepSeek-V4-Flash
    """
    from embertrain.weights.folder import Folder

    entries = Folder(folder).entries
    if as_json:
        for name, entry in entries.items():
            print_json({"name": name, "dtype": entry.kind, "shape": entry.shape, "bytes": entry.size_bytes,
                        "file": entry.file})  # fmt: skip
        return
    print_columns([(entry.kind, str(list(entry.shape)), human_bytes(entry.size_bytes), name)
                   for name, entry in entries.items()], right=(2,))  # fmt: skip
    total = sum(entry.size_bytes for entry in entries.values())
    note(f"{plural(len(entries), 'tensor')}, {human_bytes(total)}")


@weights.command()
@_folder
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Check every name, shape and number of the checkpoint in FOLDER against its config.json.

    Exits with 1 if anything is wrong.

    \b
    Example:
      emberline model weights verify ./DeepSeek-V4-Flash
    """
    from embertrain.weights import Source
    from embertrain.weights import verify as problems

    source = Source(folder)
    found = 0
    for problem in problems(source):
        found += 1
        if as_json:
            print_json({"problem": problem})
        else:
            print_line(problem)
    entries = source.folder.entries
    note(
        f"{plural(len(entries), 'tensor')} under {source.names} names: {plural(found, 'problem') if found else 'sound'}"
    )
    if found:
        raise click.exceptions.Exit(1)


@weights.command()
@_folder
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--names", type=click.Choice(["official", "transformers"]), default="official", show_default=True,
              help="Whose names the new files have.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["bf16", "fp32"]), help="Write whole numbers of this sort, dequantised.")
@click.option("--quantise", "quantised", type=click.Choice(["fp8", "fp4"]),
              help="Write matrices in fp8; with fp4, experts in fp4.")  # fmt: skip
@click.option("--shard-size", metavar="SIZE", help='Of a file at most, as in "4GiB".')
def convert(
    folder: Path, target: Path, names: Literal["official", "transformers"], dtype: str | None,
    quantised: Literal["fp8", "fp4"] | None, shard_size: str | None,
) -> None:  # fmt: skip
    """Write the checkpoint in FOLDER to the new folder TARGET, under other names or in another form.

    Without --dtype and --quantise every weight keeps the form and the bytes it has. The other files of FOLDER (the
    tokenizer) are copied. TARGET appears when it is whole.

    \b
    Example:
      emberline model weights convert ./DeepSeek-V4-Flash ./flash-bf16 --names transformers --dtype bf16
    """
    import torch
    from embertrain.weights import Source, save
    from embertrain.weights.folder import CONFIG

    if dtype and quantised:
        raise click.UsageError("--dtype and --quantise exclude each other")
    source = Source(folder)
    source.check()
    kept = not (dtype or quantised)
    others = [
        path
        for path in (sorted(folder.iterdir()) if folder.is_dir() else ())
        if path.is_file() and path.name != CONFIG and ".safetensors" not in path.name and not path.name.startswith(".")
    ]
    save(
        source,
        target,
        source.config,
        names=names,
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or ""),
        quantised=quantised,
        like=source if kept else None,
        shard_size_bytes=size_bytes_of(shard_size) if shard_size else None,
        beside=others,
    )
    note(f"{target}: {plural(sum(weight.form != 'table' for weight in source.weights.values()), 'weight')} written")
