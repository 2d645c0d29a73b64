"""`emberline kv replay`: a trace of requests against a service, with bytes, beside what is simulated for it."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from emberfs.cli.output import (
    human_bytes,
    json_option,
    note,
    print_columns,
    print_fields,
    print_json,
    print_line,
    progress_bar,
)
from emberfs.cli.stats import human_seconds

from .kvservice import operator_of, size_bytes_of, tls_option, token_option
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
    from emberkv.replay import Replayed
    from emberkv.simulate import Outcome


@click.command()
@click.argument("trace", type=click.File("rb"))
@click.argument("address", envvar="EMBERLINE_KV")
@click.option("--page", "page_size", default="16KiB", show_default=True, metavar="SIZE", help="Of each page's payload.")
@click.option("--page-tokens", type=click.IntRange(min=1), default=512, show_default=True, metavar="N",
              help="Tokens of a page of the trace.")  # fmt: skip
@click.option("--requests", "count", type=click.IntRange(min=1), metavar="N", help="Only the first so many.")
@model_option
@dtype_option
@active_option
@price_miss_option
@price_hit_option
@click.option("--tenant", default="default", show_default=True, metavar="NAME", help="Whose pages they are.")
@token_option
@tls_option
@json_option
def replay(
    trace: BinaryIO, address: str, page_size: str, page_tokens: int, count: int | None, model: str | None,
    dtype: str | None, active_params: float | None, price_miss: float | None, price_hit: float, tenant: str, token: str,
    tls: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Let the service at ADDRESS serve TRACE, and tell what it hit, moved and evicted, and how long that took.

    TRACE is as for `kv simulate`. Each request matches its pages, reads those that hit, comparing every byte, and puts
    the others; requests follow each other without a pause. The pages are in a namespace of their own, which is to be
    empty, and are taken out at the end. With a token of an operator the same trace is simulated for the room that the
    service has, and evictions are told. Exit code 1 if a page was read that is not the one that was put.

    \b
    Examples:
      emberline kv replay conversation_trace.jsonl 127.0.0.1:7400
      emberline kv replay conversation_trace.jsonl 127.0.0.1:7400 --requests 1000 --model deepseek-v3 --json
    """
    import emberkv
    from emberkv.replay import Replay, replay_namespace
    from emberkv.trace import Trace, read_trace

    known = None if model is None else model_of(model, dtype, active_params)
    requests = read_trace(trace, page_tokens=page_tokens)
    if count is not None:
        requests = Trace(requests.requests[:count], page_tokens)
    page_bytes = size_bytes_of(page_size)
    namespace = replay_namespace(requests, page_bytes)
    with operator_of(address, token, tls) as operator:
        operator.stat(tenant=tenant)  # Who is not there is told now, and not when a client loses its patience.
    with emberkv.connect(
        address, namespace, tenant=tenant, token=token, tls=tls, salt=os.urandom(8), timeout_s=60.0
    ) as cache:
        before = _figures(cache.stat(), namespace.name)
        if before and before["pages"]:
            raise click.ClickException(f"there are pages of another replay: emberline kv drop {namespace.name}")
        run = Replay(cache, requests, page_bytes, now_s=time.perf_counter)
        began_s = time.perf_counter()
        try:
            with progress_bar("replaying", requests.pages * page_bytes, quiet=as_json) as advance:
                found = run.run(advance)
            took_s = time.perf_counter() - began_s
            cache.flush()
            after = _figures(cache.stat(), namespace.name)
        finally:
            with contextlib.suppress(emberkv.KvError):  # Another error is the one to tell.
                run.remove()
    outcome = _simulated(requests, after, page_bytes)
    saved = Worth.of(known, price_miss, price_hit).saved(requests, found.hits)
    fields = _fields(found, before, after, took_s) | saved
    if outcome is not None:
        fields["simulated"] = outcome.fields()
    if as_json:
        print_json(fields)
    else:
        _print(found, fields, outcome, saved)
    if found.wrong_pages:
        sys.exit(1)


def _figures(numbers: dict[str, Any], name: str) -> dict[str, Any]:
    """Of the namespace; nothing if the token may not see them."""
    figures: dict[str, Any] = numbers["namespaces"].get(name, {})
    return figures if "counts" in figures else {}


def _simulated(trace: Any, figures: dict[str, Any], page_bytes: int) -> Outcome | None:
    """What the service's policy hits in the room that it has."""
    from emberkv.page import HEADER_BYTES
    from emberkv.simulate import simulate

    if not figures:
        return None
    return simulate(trace, "lru", max(1, figures["live_bytes_max"] // (HEADER_BYTES + page_bytes)))


def _fields(found: Replayed, before: dict[str, Any], after: dict[str, Any], took_s: float) -> dict[str, Any]:
    names = ("requests", "pages", "hit_pages", "lost_pages", "wrong_pages", "tokens", "hit_tokens", "hit_requests",
             "page_rate", "token_rate", "read_bytes", "stored_bytes")  # fmt: skip
    fields: dict[str, Any] = {name: getattr(found, name) for name in names}
    fields |= {"puts": dict(found.puts), "reasons": dict(found.reasons), "seconds": took_s}
    fields["latency"] = {
        name: {"calls": each.count, "p50_s": each.quantile_s(0.5), "p99_s": each.quantile_s(0.99), "max_s": each.max_s}
        for name, each in found.seconds.items()
    }
    if before and after:
        for name in ("evicted_pages", "expired_pages", "moved_bytes", "freed_bytes"):
            fields[name] = after["counts"][name] - before["counts"][name]
        fields["disk_bytes"], fields["live_bytes"] = after["disk_bytes"], after["live_bytes"]
    return fields


def _print(found: Replayed, fields: dict[str, Any], outcome: Outcome | None, saved: dict[str, float]) -> None:
    seconds, stored = fields["seconds"], found.stored_bytes
    told = [
        ("hit", f"{found.page_rate:.2%} of {found.pages:,} pages, {found.token_rate:.2%} of {found.tokens:,} tokens; "
                f"{found.hit_requests:,} of {found.requests:,} requests hit something"),
        ("read", f"{human_bytes(found.read_bytes)}, {found.hit_pages:,} pages; {found.lost_pages:,} lost, "
                 f"{found.wrong_pages:,} wrong"),
        ("put", f"{human_bytes(stored)}, " + ", ".join(f"{count:,} {what}" for what, count in found.puts.items())),
        ("took", f"{seconds:,.1f} s: {found.requests / seconds:,.0f} requests and "
                 f"{human_bytes((found.read_bytes + stored) / seconds)} a second"),
        ("matches end", ", ".join(f"{reason} {count:,}" for reason, count in sorted(found.reasons.items()))),
    ]  # fmt: skip
    if outcome is not None:
        off = 100 * (found.page_rate - outcome.page_rate)
        told.insert(1, ("simulated", f"{outcome.page_rate:.2%} of pages, {outcome.token_rate:.2%} of tokens with room "
                                     f"for {outcome.capacity:,} pages: {off:+.2f} points off"))  # fmt: skip
        written = stored + fields["moved_bytes"]
        moved = human_bytes(fields["moved_bytes"])
        told.append(("evicted", f"{fields['evicted_pages']:,} pages; compaction moved {moved}, "
                                f"{written / stored if stored else 1:.2f} bytes written for each"))  # fmt: skip
    if saved:
        told.append(("it saved", ", ".join(saved_texts(saved))))
    print_fields(told)
    print_line("")
    rows = [["call", "calls", "p50", "p99", "max"]]
    for name, each in fields["latency"].items():
        rows.append([name, f"{each['calls']:,}", *(human_seconds(each[key]) for key in ("p50_s", "p99_s", "max_s"))])
    print_columns(rows, right=range(1, 5))
    if found.lost_pages:
        note("lost pages were matched and could not be read: were they evicted in spite of their lease?")
