"""`emberline kv doctor`: whether a service is well, and whether an engine will find in it what others put."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import click
from emberfs.cli.doctor import Line, lines_of, print_finding
from emberfs.cli.output import human_bytes, human_time, json_option

from .kvservice import address_option, operator_of, tls_option, token_option

if TYPE_CHECKING:
    from emberkv.engines import Engine

_TIMEOUT_S = 5.0
_CLOCK_S_MAX = 5.0
_ANSWER_BYTES_MAX = 64 << 20
_LOOPBACK = ("127.", "localhost", "[::1]", "unix:")


@click.command()
@click.option("--engine", metavar="URL|FILE", help="Of a live vLLM, SGLang or LMCache, or a file of its settings.")
@click.option("--engine-key", envvar="EMBERLINE_ENGINE_KEY", default="", metavar="KEY", help="API key of the engine.")
@click.option(
    "--pid", type=int, metavar="PID", help="Of the engine, on this host: reads its PYTHONHASHSEED and LMCACHE_*."
)
@address_option
@token_option
@tls_option
@json_option
def doctor(
    engine: str | None, engine_key: str, pid: int | None, address: str, token: str, tls: Path | None, as_json: bool
) -> None:
    """Check a service (reach, clock, room, hits), and what an engine is set to against the pages that are there.

    The engine is asked at URL, its own address, or LMCache at that of its server or of its port in the engine. vLLM
    tells the model, and by /metrics its page size and hash; all with VLLM_SERVER_DEV_MODE=1 only. A FILE is LMCache's
    YAML, or a JSON object of what you know: model, revision, dtype, layout, page_tokens, hash_algorithm,
    PYTHONHASHSEED, name (vllm, sglang, lmcache). Each finding names the setting to change. Exit code 1 if something
    fails.

    \b
    Examples:
      emberline kv doctor --address 127.0.0.1:7400
      emberline kv doctor --engine http://127.0.0.1:8000 --pid 4711
      emberline kv doctor --engine settings.json --json | jq 'select(.state != "OK")'
    """
    figures: dict[str, Any] = {}

    def reach() -> Iterator[Line]:
        yield from _reach(figures, address, token, tls)

    checks: list[Callable[[], Iterator[Line]]] = [
        reach, lambda: _open_door(figures, address, tls), lambda: _room(figures), lambda: _namespaces(figures),
    ]  # fmt: skip
    if engine is not None or pid is not None:
        checks.append(lambda: _engine(figures, engine, engine_key, pid))
    failed = False
    for check, name in zip(checks, ("service", "access", "store", "namespaces", "engine"), strict=False):
        for line in lines_of(check, name):
            failed = failed or line.state == "FAIL"
            print_finding(line, as_json=as_json)
        if not figures:
            break  # Nobody answers: nothing else can be looked at.
    if failed:
        sys.exit(1)


def _reach(figures: dict[str, Any], address: str, token: str, tls: Path | None) -> Iterator[Line]:
    with operator_of(address, token, tls) as operator:
        took_s = []
        for _ in range(5):
            began_s, before = time.perf_counter(), time.time()
            try:
                told = operator.stat()
            except PermissionError as error:
                yield Line("FAIL", "service", f"{error}", "give an operator's --token, and --tls if it has TLS")
                return
            took_s.append(time.perf_counter() - began_s)
    figures.update(told)
    yield Line("OK", "service", f"{address} answers within {statistics.median(took_s) * 1000:.1f} ms")
    off_s = told["wall_s"] - (before + took_s[-1] / 2)
    detail = f"that of the service is {human_time(told['wall_s'])}, {off_s:+.1f} s to ours"
    if abs(off_s) > _CLOCK_S_MAX:
        yield Line(
            "WARN", "clock", detail, "run a time service on both: pins and ages outlive a takeover by another host"
        )
    else:
        yield Line("OK", "clock", detail)


def _open_door(figures: Mapping[str, Any], address: str, tls: Path | None) -> Iterator[Line]:
    is_near = address.startswith(_LOOPBACK)
    if not is_near:
        with operator_of(address, "no such token", tls) as stranger:
            try:
                stranger.stat()
            except PermissionError:
                yield Line("OK", "access", "a token is asked for")
            else:
                yield Line(
                    "WARN", "access", "whoever reaches the port may do all", "serve with --tenants FILE and --tls DIR"
                )
        if figures["store"].startswith("ember:///"):
            yield Line("FAIL", "access", f"pages are in {figures['store']}, which other hosts cannot reach",
                       "serve a store of servers: ember://HOST:PORT")  # fmt: skip
    else:
        yield Line("SKIP", "access", "looked at for services that other hosts reach")


def _room(figures: Mapping[str, Any]) -> Iterator[Line]:
    import emberfs

    with emberfs.connect(figures["store"]) as client:
        free_bytes = client.space()["free_bytes"]
    wanted = sum(max(each["capacity_bytes"] - each["disk_bytes"], 0) for each in figures["namespaces"].values()
                 if "capacity_bytes" in each)  # fmt: skip
    detail = (
        f"{human_bytes(free_bytes)} free in {figures['store']}, and namespaces may still take {human_bytes(wanted)}"
    )
    if wanted > free_bytes:
        yield Line("WARN", "store", detail, "a larger store: below --capacity the cache evicts, lest it be full")
    else:
        yield Line("OK", "store", detail)


def _namespaces(figures: Mapping[str, Any]) -> Iterator[Line]:
    if not figures["namespaces"]:
        yield Line("WARN", "namespaces", "there are none: nobody has opened one yet")
    for name, each in figures["namespaces"].items():
        if "counts" not in each:
            yield Line("SKIP", name, "only an operator's token sees more")
            continue
        yield from _namespace(name, each, each["counts"])


def _namespace(name: str, each: Mapping[str, Any], counts: Mapping[str, Any]) -> Iterator[Line]:
    asked = counts["asked_pages"] + counts["looked_up_pages"]
    hits = counts["matched_pages"] + counts["found_pages"]
    rate = f"{hits / asked:.1%} of {asked:,} pages hit" if asked else "nothing was asked for"
    detail = (
        f"{each['pages']:,} pages, {human_bytes(each['live_bytes'])} of {human_bytes(each['live_bytes_max'])}; {rate}"
    )
    reasons = {reason: counts["stops"].get(reason, 0) + counts["misses"].get(reason, 0)
               for reason in {**counts["stops"], **counts["misses"]} if reason != "whole"}  # fmt: skip
    worst = max(reasons, key=lambda reason: reasons[reason], default="")
    if not each["is_owned"]:
        yield Line("WARN", name, "another server has taken it over", "give clients the addresses of all, with commas")
    elif each.get("is_read_only"):
        yield Line("FAIL", name, f"the store does not take its index, so it takes no pages: {each['failure']}",
                   "give the store room: it goes on by itself")  # fmt: skip
    elif asked and not hits and each["pages"]:
        yield Line("FAIL", name, f"{detail}; they end as {worst}",
                   "do all engines hash alike? emberline kv doctor --engine URL for each")  # fmt: skip
    else:
        yield Line("OK", name, f"{detail}{f'; most misses are {worst}' if worst else ''}")
    if refused := counts["puts"].get("refused", 0):
        yield Line("WARN", name, f"{refused:,} pages were refused: no room that is not leased or pinned",
                   "a larger --capacity, or shorter leases")  # fmt: skip
    if counts["damaged_pages"]:
        yield Line("WARN", name, f"{counts['damaged_pages']:,} damaged pages were found by readers",
                   f"emberline kv verify {name}, and emberline fs scrub")  # fmt: skip
    if each["orphans"] > each["pages"] / 10:
        yield Line("WARN", name, f"{each['orphans']:,} pages wait for the page before them",
                   "put the pages of a prompt in their order")  # fmt: skip


# ---- the engine


def _engine(figures: Mapping[str, Any], where: str | None, key: str, pid: int | None) -> Iterator[Line]:
    import msgspec
    from emberkv import Namespace
    from emberkv.engines import Engine, look, merged

    try:
        known = Engine() if where is None else _ask_engine(where, key)
        if pid is not None:
            known = merged(_environment_of(pid), known)
    except (OSError, ValueError) as error:
        asked = " and ".join([*([where] if where else []), *([f"process {pid}"] if pid is not None else [])])
        yield Line("FAIL", "engine", f"{asked}: {error}", "see `emberline kv doctor --help` for what is asked of them")
        return
    namespaces = [
        msgspec.convert(each["namespace"], Namespace) for each in figures["namespaces"].values() if "namespace" in each
    ]
    for finding in look(known, namespaces):
        yield Line(*finding)


def _ask_engine(where: str, key: str) -> Engine:
    from emberkv.engine_documents import PATHS, engine_at, engine_of_text
    from emberkv.engines import Engine, merged

    if not where.startswith(("http://", "https://")):
        return engine_of_text(Path(where).read_text("utf-8"))
    parts = urlsplit(where)
    paths: tuple[str, ...] = PATHS
    base = where.rstrip("/")
    if parts.path not in ("", "/"):
        paths, base = (f"{parts.path}{'?' if parts.query else ''}{parts.query}",), f"{parts.scheme}://{parts.netloc}"
    found, refused = Engine(), []
    for path in paths:
        request = Request(base + path, headers={"Authorization": f"Bearer {key}"} if key else {})
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:
                found = merged(found, engine_at(path, answer.read(_ANSWER_BYTES_MAX).decode()))
        except HTTPError as error:
            refused.append(f"{request.full_url} says {error.code} {error.reason}")
        except ValueError as error:
            refused.append(f"{request.full_url} is not read: {error}")
    if found == Engine():
        raise click.ClickException("; ".join(refused))
    return found


def _environment_of(pid: int) -> Engine:
    from emberkv.engine_documents import engine_of_environment, engine_of_text
    from emberkv.engines import merged

    entries = [entry.partition(b"=") for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    variables = {name.decode(errors="replace"): value.decode(errors="replace") for name, _, value in entries}
    found = engine_of_environment(variables)
    if file := variables.get("LMCACHE_CONFIG_FILE"):
        found = merged(found, engine_of_text(Path(file).read_text("utf-8")))
    return found
