"""`emberline model`: a model's cost by arithmetic, and its weights on disk.

Invariant: what is imported here does not load torch, so that `info` does not wait for it; nor does `--help`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import human_bytes, json_option, note, print_columns, print_json, print_line

from . import modelweights

if TYPE_CHECKING:
    from embertrain.info import Count
    from embertrain.model.config import ModelConfig

HELP = """The MoE model: what it costs, and its weights.

\b
Examples:
  emberline model info v4-flash
  emberline model info ./DeepSeek-V3/config.json --context 4096 --context 131072 --json
"""


@click.group(help=HELP, short_help="The MoE model: what it costs, and its weights.", no_args_is_help=True)
def model() -> None:
    pass


model.add_command(modelweights.weights)


def config_of(name: str) -> ModelConfig:
    """The model that a preset's name, a config.json or a folder with one stands for."""
    from embertrain.model.presets import NAMES, preset
    from embertrain.model.published import from_published

    path = Path(name)
    if name in NAMES and not path.exists():
        return preset(name)
    if path.is_dir():
        path /= "config.json"
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        known = ", ".join(NAMES)
        raise click.UsageError(
            f"{name} is neither a file, nor a folder with a config.json, nor one of {known}"
        ) from None
    except ValueError as error:
        raise click.ClickException(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, Mapping):
        raise click.ClickException(f"{path} holds no JSON object")
    return from_published(fields)


@model.command()
@click.argument("config")
@click.option("--context", "asked", type=click.IntRange(min=1), multiple=True, metavar="N",
              help="Tokens in sight. May be given several times; some up to the model's longest, if not.")  # fmt: skip
@json_option
def info(config: str, asked: tuple[int, ...], as_json: bool) -> None:
    """Tell the parameters of CONFIG, its FLOPs a token and its KV bytes.

    CONFIG is a name (v4-pro, v4-flash, v3.2, v3, tiny and others), a config.json, or a folder with one. FLOPs are those
    of the last token of a context, 2 for each multiply and add; the dense equivalent has every expert work and every
    token attend to all before it. KV is that of one sequence, without paging.

    \b
    Examples:
      emberline model info v4-pro
      emberline model info v4-flash --context 1048576 --json
      emberline model info ./checkpoint
    """
    from embertrain import info as costs

    shape = config_of(config)
    parts, mtp = costs.parameters(shape), costs.mtp_parameters(shape)
    contexts = costs.contexts(shape, asked)
    if as_json:
        print_json(_fields(config, shape, contexts))
        return
    whole = costs.whole(parts)
    print_line(f"{config}: {_kinds(shape)}")
    print_line("")
    counts = [*sorted(parts.items(), key=_largest), ("all", whole)]
    if mtp:
        counts.append(("MTP layers, beside", costs.whole(mtp)))
    rows = [(name, _amount(count.total), _amount(count.active)) for name, count in counts]
    print_columns([("parameters", "total", "active"), *rows], right=(1, 2))
    print_line("")
    _print_flops(shape, contexts)
    print_line("")
    _print_kv(shape, contexts)
    _print_published(shape, whole)


def _largest(part: tuple[str, Count]) -> int:
    return -part[1].total


def _kinds(shape: ModelConfig) -> str:
    """How many layers of each kind, and how large."""
    from embertrain.model.config import Hybrid

    counts: dict[str, int] = {}
    for layer in shape.layers:
        attention = layer.attention
        if isinstance(attention, Hybrid):
            kind = {0: "window", 4: "CSA", 128: "HCA"}[attention.ratio]
        else:
            kind = "MLA, indexed" if attention.index else "MLA"
        counts[kind] = counts.get(kind, 0) + 1
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return f"{len(shape.layers)} layers ({kinds}), hidden size {shape.hidden_size:,}, {shape.positions_max:,} positions"


def _amount(count: float) -> str:
    """13,270,057,000 -> "13.27 G"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f}"


def _rounded(count: float) -> str:
    """A number as its makers rounded it: 1.6e12 -> "1.6 T"."""
    return f"{count / 1e12:g} T" if count >= 1e12 else f"{count / 1e9:g} G"


def _print_flops(shape: ModelConfig, contexts: tuple[int, ...]) -> None:
    from embertrain import info as costs

    rows: list[tuple[str, ...]] = [("FLOPs a token", "weights", "index", "attention", "all", "dense equivalent")]
    for context in contexts:
        f, dense = costs.flops(shape, context), costs.dense_flops(shape, context)
        share = f"{_amount(dense.total)} ({dense.total / f.total:.1f} times)"
        rows.append((f"at {context:,}", *map(_amount, (f.weights, f.scores, f.attention, f.total)), share))
    print_columns(rows, right=(1, 2, 3, 4, 5))


def _print_kv(shape: ModelConfig, contexts: tuple[int, ...]) -> None:
    from embertrain import info as costs

    rows: list[tuple[str, ...]] = [("KV", "bf16 rows", "a token", "fp8 rows", "a token")]
    for context in contexts:
        kept = [costs.kv(shape, context, kind).rows for kind in ("bf16", "fp8")]
        cells = [cell for size in kept for cell in (human_bytes(size), f"{size / context:,.0f} B")]
        rows.append((f"at {context:,}", *cells))
    print_columns(rows, right=(1, 2, 3, 4))
    sizes = [costs.kv_row_bytes(shape, kind) for kind in ("bf16", "fp8")]
    note("rows: " + ", ".join(f"{kind} {size} B, in fp8 {sizes[1][kind]} B" for kind, size in sizes[0].items()))
    if state := costs.kv(shape, contexts[0], "bf16").state:
        note(f"and {human_bytes(state)} a sequence of fp32 state: windows that are not closed yet")


def _print_published(shape: ModelConfig, whole: Count) -> None:
    from embertrain import info as costs

    told = costs.published(shape)
    if told is None:
        return
    print_line("")
    rows = [
        ("published", "there", "here"),
        ("parameters", _rounded(told.total), _amount(whole.total)),
        ("active", _rounded(told.active), _amount(whole.active)),
    ]
    if told.flops_share is not None and told.kv_share is not None:
        here = costs.shares(shape, costs.CONTEXT_PUBLISHED)
        rows += [
            ("KV of V3.2's at 1,048,576, fp8 and fp4 rows", f"{told.kv_share:.0%}", f"{here.kv:.1%}"),
            ("FLOPs of V3.2's at 1,048,576, each counted once", f"{told.flops_share:.0%}", f"{here.flops:.1%}"),
            ("the same in fp8 equivalents: bf16 twice, fp4 half", f"{told.flops_share:.0%}", f"{here.flops_fp8:.1%}"),
        ]
    print_columns(rows, right=(1, 2))


def _fields(name: str, shape: ModelConfig, contexts: tuple[int, ...]) -> dict[str, Any]:
    from embertrain import info as costs

    parts, mtp = costs.parameters(shape), costs.mtp_parameters(shape)
    at = []
    for context in contexts:
        f = costs.flops(shape, context)
        at.append(
            {
                "context": context,
                "flops": asdict(f) | {"total": f.total, "dense_total": costs.dense_flops(shape, context).total},
                "kv_bytes": {kind: costs.kv(shape, context, kind).rows for kind in ("bf16", "fp8")},
                "kv_state_bytes": costs.kv(shape, context, "bf16").state,
                "of_v3.2": asdict(costs.shares(shape, context)),
            }
        )
    told = costs.published(shape)
    return {
        "config": name,
        "family": shape.family,
        "parameters": asdict(costs.whole(parts)) | {"parts": {part: asdict(count) for part, count in parts.items()}},
        "mtp_parameters": asdict(costs.whole(mtp)),
        "kv_row_bytes": {kind: costs.kv_row_bytes(shape, kind) for kind in ("bf16", "fp8")},
        "contexts": at,
        "published": asdict(told) if told else None,
    }
