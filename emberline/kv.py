"""`emberline kv`: the KV cache of inference nodes: how large one has to be, what it would hit, and the service.

Invariant: what is imported here does not load `emberkv`, so that `--help` does not wait for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click
from emberfs.cli.output import human_bytes, json_option, note, print_columns, print_fields, print_json, print_line

from . import kvbench, kvcopy, kvdoctor, kvpages, kvrebuild, kvreplay, kvservice, kvtop
from .kvworth import (
    Worth,
    active_option,
    dtype_option,
    model_of,
    model_option,
    price_hit_option,
    price_miss_option,
    saved_texts,
)

if TYPE_CHECKING:
    from emberkv.models import Model
    from emberkv.simulate import Outcome
    from emberkv.trace import Trace
    from emberkv.units import UnitRule

HELP = """KV pages of prompts on the store, for inference nodes.

\b
Examples:
  emberline kv serve --store ember:///srv/store --capacity 2TiB
  emberline kv stat --address 127.0.0.1:7400
  emberline kv size deepseek-v3 --capacity 100TiB --tokens-per-s 1e6
  emberline kv simulate conversation_trace.jsonl --policy lru --policy s3fifo --plot curve.svg
"""


@click.group(
    help=HELP, short_help="KV cache of inference nodes: serve it, size one, simulate one.", no_args_is_help=True
)
def kv() -> None:
    pass


for _command in (
    kvservice.serve, kvservice.stat, kvpages.ls, kvpages.match, kvpages.verify, kvpages.pin, kvpages.unpin,
    kvcopy.export_, kvcopy.import_, kvbench.bench, kvdoctor.doctor,
    kvreplay.replay, kvtop.top, kvservice.gc, kvservice.quota, kvservice.ttl, kvservice.erase, kvservice.drop,
    kvrebuild.rebuild,
):  # fmt: skip
    kv.add_command(_command)


# ---- size


@kv.command()
@click.argument("model")
@dtype_option
@click.option("--page-tokens", type=click.IntRange(1, 65_536), default=64, show_default=True, metavar="N")
@click.option("--capacity", metavar="SIZE", help='Of the cache, as in "100TiB".')
@click.option("--tokens-per-s", type=click.FloatRange(min=0, min_open=True), metavar="N",
              help="New tokens a second: prompts that missed, and what was generated.")  # fmt: skip
@click.option("--interval", type=click.IntRange(min=1), default=8192, show_default=True, metavar="TOKENS",
              help="Window states are kept every so many tokens.")  # fmt: skip
@json_option
def size(
    model: str, dtype: str | None, page_tokens: int, capacity: str | None, tokens_per_s: float | None, interval: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Tell how large the KV of MODEL is, and how long a cache of some capacity keeps it.

    MODEL is a name (deepseek-v3, deepseek-v3.2, deepseek-v4-flash, deepseek-v4-pro, deepseek-v4.1-flash, kimi-k2,
    llama-3.1-8b, llama-3.1-70b, qwen3-32b, qwen3-235b-a22b) or the path of a config.json. Each byte is counted once:
    ranks that hold the same share it, and replicas of the store are apart.

    \b
    Examples:
      emberline kv size deepseek-v4-flash
      emberline kv size deepseek-v3 --dtype fp8 --capacity 100TiB --tokens-per-s 1e6
      emberline kv size ./Qwen3-8B/config.json --json
    """
    known = model_of(model, dtype, None)
    states = known.state_bytes / interval
    per_token = known.bytes_per_token + states
    fields: dict[str, object] = {
        "model": known.name,
        "dtype": known.dtype,
        "bytes_per_token": known.bytes_per_token,
        "parts": {part.name: part.bytes_per_token for part in known.parts},
        "page_tokens": page_tokens,
        "page_bytes": known.page_bytes(page_tokens),
        "state_bytes": known.state_bytes,
        "state_bytes_per_token": states,
    }
    told = [
        ("model", f"{known.name}, KV in {known.dtype}"),
        ("a token", f"{known.bytes_per_token:,.0f} bytes: {_parts_text(known)}"),
        ("a page", f"{human_bytes(known.page_bytes(page_tokens))}, {page_tokens} tokens"),
    ]
    if known.state_bytes:
        told.append(("window states", f"{human_bytes(known.state_bytes)} at each place they are kept; "
                                      f"{states:,.0f} bytes a token, every {interval:,}"))  # fmt: skip
    if capacity is not None:
        tokens = kvservice.size_bytes_of(capacity) / per_token
        fields |= {"capacity_bytes": int(kvservice.size_bytes_of(capacity)), "capacity_tokens": int(tokens)}
        told.append(("fits", f"{_count_text(tokens)} tokens in {capacity}"))
        if tokens_per_s is not None:
            hours = tokens / tokens_per_s / 3600
            fields |= {"tokens_per_s": tokens_per_s, "kept_hours": hours}
            told.append(("is kept", f"{hours:,.1f} hours at {tokens_per_s:,.0f} new tokens a second "
                                    f"({human_bytes(tokens_per_s * per_token)}/s to write)"))  # fmt: skip
    elif tokens_per_s is not None:
        day_bytes = tokens_per_s * per_token * 86_400
        fields |= {"tokens_per_s": tokens_per_s, "day_bytes": day_bytes}
        told.append(("a day", f"{human_bytes(day_bytes)} at {tokens_per_s:,.0f} new tokens a second"))
    if as_json:
        print_json(fields)
    else:
        print_fields(told)


def _parts_text(model: Model) -> str:
    return ", ".join(f"{part.name} {part.bytes_per_token:,.0f}" for part in model.parts)


def _count_text(count: float) -> str:
    """1.2e9 -> "1.2 G"."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"


# ---- simulate


@kv.command()
@click.argument("trace", type=click.File("rb"))
@click.option("--page-tokens", type=click.IntRange(min=1), default=512, show_default=True, metavar="N",
              help="Tokens of a page of the trace.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, default=["lru"],
              type=click.Choice(["lru", "second-use", "fifo", "s3fifo"]), show_default=True,
              help="May be given several times. lru and second-use are the service's.")  # fmt: skip
@click.option("--capacity", "capacities", multiple=True, metavar="N|SIZE",
              help='Pages, or with --model a size as in "10TiB". May be given several times.')  # fmt: skip
@model_option
@dtype_option
@active_option
@click.option("--units", is_flag=True, help="Also with window states at ends, intervals and common prefixes only.")
@click.option("--interval", type=click.IntRange(min=1), default=8192, show_default=True, metavar="TOKENS",
              help="With --units: every so many tokens.")  # fmt: skip
@click.option("--no-common", is_flag=True, help="With --units: not where requests part.")
@click.option("--replay", is_flag=True, help="Also with no window states: the last window of a hit is computed again.")
@price_miss_option
@price_hit_option
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE",
              help="Write the curve as FILE.svg, or with its numbers as FILE.html.")  # fmt: skip
@json_option
def simulate(
    trace: BinaryIO, page_tokens: int, policies: tuple[str, ...], capacities: tuple[str, ...], model: str | None,
    dtype: str | None, active_params: float | None, units: bool, interval: int, no_common: bool, replay: bool,
    price_miss: float | None, price_hit: float, plot: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Tell what caches of some capacities and policies would hit on TRACE.

    TRACE is a file in Mooncake's format (JSON Lines of timestamp, input_length, output_length, hash_ids), or - for
    the standard input. Each hash_id is a page, the short last one too. A cache without end is always told; without
    --capacity there is a curve.

    \b
    Examples:
      emberline kv simulate conversation_trace.jsonl
      emberline kv simulate conversation_trace.jsonl --capacity 10000 --capacity 50000 --policy lru --policy fifo
      emberline kv simulate conversation_trace.jsonl --model deepseek-v4-flash --units --replay
      emberline kv simulate conversation_trace.jsonl --price-miss 0.15 --price-hit 0.003
      emberline kv simulate conversation_trace.jsonl --plot curve.html --json
    """
    from emberkv.simulate import capacities_for
    from emberkv.trace import read_trace
    from emberkv.units import UnitRule

    if plot is not None and plot.suffix not in (".svg", ".html"):
        raise click.UsageError(f"--plot writes .svg or .html, not {plot.name}")
    known = None if model is None else model_of(model, dtype, active_params)
    requests = read_trace(trace, page_tokens=page_tokens)
    page_bytes = known.page_bytes(page_tokens) if known else None
    pages = [_pages(text, page_bytes) for text in capacities] or capacities_for(requests)
    worth = Worth.of(known, price_miss, price_hit)
    whole = _run(worth, requests, "lru", None)
    found = [_run(worth, requests, policy, n) for policy in dict.fromkeys(policies) for n in sorted(set(pages))]
    rules = {}
    if units:
        rules["units"] = UnitRule(page_tokens=page_tokens, interval_tokens=interval, sees_common=not no_common)
    if replay:
        rules["replay"] = UnitRule(page_tokens=page_tokens, replays=True)
    if as_json:
        print_json(_simulated_fields(requests, known, whole, found, rules))
    else:
        _print_simulated(requests, known, whole, found, rules)
    if plot is not None:
        _draw(plot, trace.name, [outcome for outcome, _ in found], whole[0])


def _pages(text: str, page_bytes: int | None) -> int:
    """Of a capacity, as the user gave it."""
    if text.replace("_", "").replace(",", "").isdigit():
        return int(text.replace(",", ""))
    if page_bytes is None:
        raise click.UsageError(f"--capacity {text} is in bytes: say of which --model")
    return int(kvservice.size_bytes_of(text) // page_bytes)


_Found = tuple["Outcome", dict[str, float]]


def _run(worth: Worth, trace: Trace, policy: str, capacity: int | None) -> _Found:
    """An outcome, and what it saved."""
    from emberkv.simulate import simulate as run

    hits: list[int] = []
    outcome = run(trace, policy, capacity, on_hit=hits.append)
    return outcome, worth.saved(trace, hits)


def _simulated_fields(
    trace: Trace, model: Model | None, whole: _Found, found: list[_Found], rules: dict[str, UnitRule]
) -> dict[str, object]:
    from emberkv.simulate import simulate_units

    names = ("page_tokens", "pages", "unique_pages", "input_tokens", "output_tokens", "span_s")
    page_bytes = {"page_bytes": model.page_bytes(trace.page_tokens)} if model else {}
    return {
        "trace": {"requests": len(trace.requests), **{name: getattr(trace, name) for name in names}, **page_bytes},
        "infinite": {**whole[0].fields(), **whole[1]},
        "curve": [{**outcome.fields(), **saved} for outcome, saved in found],
        **{name: simulate_units(trace, rule).fields() for name, rule in rules.items()},
    }


def _print_simulated(
    trace: Trace, model: Model | None, whole: _Found, found: list[_Found], rules: dict[str, UnitRule]
) -> None:
    from emberkv.simulate import simulate_units

    outcome, saved = whole
    told = [
        ("trace", f"{len(trace.requests):,} requests in {trace.span_s / 60:,.0f} minutes: {trace.pages:,} pages of "
                  f"{trace.page_tokens} tokens, {trace.unique_pages:,} of them different"),
        ("without end", f"{outcome.page_rate:.2%} of pages and {outcome.token_rate:.2%} of tokens hit; "
                        f"{outcome.hit_requests / outcome.requests:.2%} of requests hit something"),
    ]  # fmt: skip
    if saved:
        told.append(("it saves", ", ".join(saved_texts(saved))))
    if model is not None:
        per_page = model.page_bytes(trace.page_tokens)
        told.append(("it holds", f"{human_bytes(per_page * outcome.stored)}, {human_bytes(per_page)} a page"))
    for name, rule in rules.items():
        unit = simulate_units(trace, rule)
        text = f"{unit.unit_rate:.2%} of pages hit, of {unit.page_rate:.2%} with states at every whole page"
        if rule.replays:
            text += f"; {unit.recomputed_tokens / unit.hit_tokens if unit.hit_tokens else 0:.2%} of hit tokens computed"
        else:
            text += f"; states of {unit.states:,} of {unit.stored_pages:,} pages"
            text += f", {human_bytes(unit.states * model.state_bytes)}" if model and model.state_bytes else ""
        told.append((name, text))
    print_fields(told)
    print_line("")
    size_heads = ("size",) if model else ()
    rows = [("policy", "pages", *size_heads, "page hits", "token hits", "written", "evicted", *saved)]
    for outcome, saved in found:
        assert outcome.capacity is not None
        sizes = (human_bytes(outcome.capacity * model.page_bytes(trace.page_tokens)),) if model else ()
        rates = (f"{outcome.page_rate:.2%}", f"{outcome.token_rate:.2%}")
        written = human_bytes(outcome.stored * model.page_bytes(trace.page_tokens)) if model else f"{outcome.stored:,}"
        rows.append(
            (
                outcome.policy,
                f"{outcome.capacity:,}",
                *sizes,
                *rates,
                written,
                f"{outcome.evicted:,}",
                *saved_texts(saved, bare=True),
            )
        )
    heads = [name.replace("_", " ") for name in rows[0]]
    print_columns([heads, *rows[1:]], right=range(1, len(heads)))


def _draw(path: Path, name: str, outcomes: list[Outcome], whole: Outcome) -> None:
    from emberkv.drawing import curve_page, curve_svg

    draw = curve_svg if path.suffix == ".svg" else curve_page
    path.write_text(draw(f"Pages that hit: {Path(name).name}", outcomes, whole), encoding="utf-8")
    note(f"wrote {path}")
