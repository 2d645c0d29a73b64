"""`emberline kv ls`, `match`, `verify`, `pin`, `unpin`: what lies in a service, as operators and tenants see it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click
from emberfs.cli.output import (
    human_bytes,
    json_option,
    note,
    plural,
    print_columns,
    print_json,
    print_line,
    progress_bar,
)

from .kvservice import address_option, operator_of, tls_option, token_option

if TYPE_CHECKING:
    from emberkv import KVCache, Namespace

tenant_option = click.option("--tenant", default="default", show_default=True, metavar="NAME", help="Whose pages.")
_salt_option = click.option("--salt", default="", metavar="TEXT", help="What the tenant's keys depend on, too.")
_keys_option = click.option("--keys", "are_keys", is_flag=True, help="FILE has keys, 64 hex digits each, not tokens.")


class Door:
    """A service: its figures, and caches of namespaces by their names."""

    def __init__(self, address: str, token: str, tls: Path | None, tenant: str | None = None) -> None:
        self._address, self._token, self._tls, self._tenant = address, token, tls, tenant

    @cached_property
    def figures(self) -> dict[str, Any]:
        """As they were when they were first asked for."""
        with operator_of(self._address, self._token, self._tls) as operator:
            return operator.stat(tenant=self._tenant or "")

    @property
    def namespaces(self) -> dict[str, Any]:
        """Name -> figures, of those that the token may look into."""
        return {name: each for name, each in self.figures["namespaces"].items() if "namespace" in each}

    def name(self, wanted: str | None) -> str:
        """Of the one namespace that begins so; without a beginning there must be one only."""
        names = [name for name in self.namespaces if name.startswith(wanted or "")]
        if wanted in names:
            return wanted
        if len(names) == 1:
            return names[0]
        there = ", ".join(self.namespaces) or "none"
        raise click.ClickException(
            f"no namespace is called {wanted!r}: there are {there}" if wanted and not names
            else f"name one of the namespaces: {there}"
        )  # fmt: skip

    def namespace(self, name: str) -> Namespace:
        """What it is."""
        import msgspec
        from emberkv import Namespace

        return msgspec.convert(self.namespaces[name]["namespace"], Namespace)

    def tenants(self, name: str, only: str | None) -> list[str]:
        """Those that are in a namespace."""
        there = list(self.namespaces[name]["tenants"])
        if only is not None and only not in there:
            raise click.ClickException(f"tenant {only!r} has nothing in {name}; there are {', '.join(there) or 'none'}")
        return there if only is None else [only]

    @contextmanager
    def cache(self, namespace: Namespace, tenant: str, salt: str = "") -> Iterator[KVCache]:
        """The pages of a tenant."""
        import emberkv

        with emberkv.connect(
            self._address, namespace, tenant=tenant, salt=salt.encode(), token=self._token, tls=self._tls,
            timeout_s=30.0,
        ) as cache:  # fmt: skip
            yield cache


def keys_in(file: BinaryIO, cache: KVCache, *, are_keys: bool) -> list[bytes]:
    """Of a file of token ids (a JSON list, or numbers with spaces, commas or lines between them), or of keys."""
    words = file.read().decode("ascii", "replace").replace("[", " ").replace("]", " ").replace(",", " ").split()
    try:
        if are_keys:
            keys = [bytes.fromhex(word) for word in words]
            if any(len(key) != 32 for key in keys):
                raise ValueError("a key has 64 hex digits")
            return keys
        return cache.keys([int(word) for word in words])
    except ValueError as error:
        what = "keys" if are_keys else "token ids"
        raise click.ClickException(f"{getattr(file, 'name', '-')} is no file of {what}: {error}") from error


# ---- ls


@click.command()
@click.argument("namespace", required=False)
@click.option("--tenant", metavar="NAME", help="Whose token it is, if it is no operator's.")
@address_option
@token_option
@tls_option
@json_option
def ls(namespace: str | None, tenant: str | None, address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """List namespaces with their pages, bytes and tenants; with NAMESPACE the tenants of that one.

    \b
    Examples:
      emberline kv ls --address 127.0.0.1:7400
      emberline kv ls deepseek-v3 --json
    """
    door = Door(address, token, tls, tenant)
    if namespace is not None:
        _list_tenants(door, door.name(namespace), as_json=as_json)
        return
    rows = [["namespace", "model", "revision", "dtype", "layout", "page", "pages", "live", "on disk", "of", "tenants"]]
    for name, figures in door.namespaces.items():
        about = figures["namespace"]
        if as_json:
            print_json({"name": name, **{key: value for key, value in figures.items() if key != "counts"}})
            continue
        sizes = [human_bytes(figures[key]) if key in figures else "-" for key in _SIZES]
        said = [str(about[key]) or "-" for key in ("model", "revision", "dtype", "layout", "page_tokens")]
        rows.append([name, *said, f"{figures['pages']:,}" if "pages" in figures else "-", *sizes,
                     f"{len(figures['tenants']):,}"])  # fmt: skip
    if not as_json:
        print_columns(rows, right=range(5, 11))


_SIZES = ("live_bytes", "disk_bytes", "capacity_bytes")


def _list_tenants(door: Door, name: str, *, as_json: bool) -> None:
    rows = [["tenant", "pages", "bytes", "quota"]]
    for tenant, held in sorted(door.namespaces[name]["tenants"].items(), key=lambda row: -row[1]["bytes"]):
        if as_json:
            print_json({"namespace": name, "tenant": tenant, **held})
        quota = human_bytes(held["quota_bytes"]) if held["quota_bytes"] else "-"
        rows.append([tenant, f"{held['pages']:,}", human_bytes(held["bytes"]), quota])
    if not as_json:
        print_columns(rows, right=(1, 2, 3))


# ---- match


@click.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--namespace", metavar="NAME", help="Which one, or how it begins. Not needed if there is one only.")
@tenant_option
@_salt_option
@_keys_option
@address_option
@token_option
@tls_option
@json_option
def match(
    file: BinaryIO, namespace: str | None, tenant: str, salt: str, are_keys: bool, address: str, token: str,
    tls: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Tell how much of a prompt hits, and why it is no more. No page is read, and none is leased.

    FILE has the prompt's token ids, as a JSON list or with anything between them; - is the standard input. Exit code 1
    if nothing hits.

    \b
    Examples:
      emberline kv match prompt.json --address 127.0.0.1:7400
      echo 1 2 3 4 | emberline kv match - --namespace deepseek-v3 --tenant acme --json
    """
    door = Door(address, token, tls, tenant)
    about = door.namespace(door.name(namespace))
    with door.cache(about, tenant, salt) as cache:
        keys = keys_in(file, cache, are_keys=are_keys)
        if not keys:
            raise click.ClickException(f"that is not one whole page: a page has {about.page_tokens} tokens")
        hit = cache.match(keys, lease_s=0)
    found: dict[str, Any] = {"namespace": about.name, "asked_pages": len(keys)}
    found |= {"pages": hit.pages, "tokens": hit.tokens, "reason": hit.reason}
    if hit.known_pages > hit.pages:
        found |= {"known_pages": hit.known_pages, "parts_at": hit.parts_at}
    if hit.pages < len(keys):
        found["next_key"] = keys[hit.pages].hex()
    if as_json:
        print_json(found)
    else:
        rest = "" if hit.pages == len(keys) else f"; page {hit.pages + 1} is {hit.reason} ({found['next_key'][:16]}...)"
        print_line(f"{hit.pages:,} of {plural(len(keys), 'page')} hit, {hit.tokens:,} tokens{rest}")
        if hit.known_pages > hit.pages:
            parts = "; there it parts from another one: states are worth keeping" if hit.parts_at else ""
            print_line(f"{plural(hit.known_pages, 'page')} are there, and no states to go on from{parts}")
    if not hit.pages:
        sys.exit(1)


# ---- verify


@click.command()
@click.argument("namespace", required=False)
@click.option("--tenant", metavar="NAME", help="Only this one's pages; without it those of all.")
@click.option("--sample", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="SHARE",
              help="Read only so many of the pages, chosen at random.")  # fmt: skip
@address_option
@token_option
@tls_option
@json_option
def verify(
    namespace: str | None, tenant: str | None, sample: float, address: str, token: str, tls: Path | None, as_json: bool
) -> None:
    """Read the pages of NAMESPACE from the store, and tell which are damaged: header, key, place and checksum.

    What is damaged is taken out, as if an engine had read it. Exit code 1 if there was any, or if pages could not be
    read. Pages that went meanwhile are no damage. Pages are leased while they are read, a minute at most.

    \b
    Examples:
      emberline kv verify --address 127.0.0.1:7400
      emberline kv verify deepseek-v3 --sample 0.01 --json
    """
    from emberkv.verify import Verified
    from emberkv.verify import verify as read_all

    door = Door(address, token, tls, tenant)
    name = door.name(namespace)
    total = Verified()
    tenants = door.tenants(name, tenant)
    live = sum(door.namespaces[name]["tenants"][each]["bytes"] for each in tenants)
    chance = random.Random()
    with progress_bar("reading", int(live * sample), quiet=as_json) as advance:
        for each in tenants:
            with door.cache(door.namespace(name), each) as cache:
                found = read_all(cache, takes=lambda: sample == 1 or chance.random() < sample, advance=advance)
            total.pages += found.pages
            total.read_bytes += found.read_bytes
            total.gone += found.gone
            total.unread += found.unread
            total.damaged += found.damaged
            for key, kind in found.damaged:
                if not as_json:
                    note(f"damaged: {kind} page {key.hex()} of tenant {each}")
    if as_json:
        damaged = [{"key": key.hex(), "kind": kind} for key, kind in total.damaged]
        print_json({"namespace": name, **asdict(total), "damaged": damaged})
    else:
        print_line(f"{plural(total.pages, 'page')}, {human_bytes(total.read_bytes)}: {len(total.damaged)} damaged, "
                   f"{total.unread} could not be read, {total.gone} went meanwhile")  # fmt: skip
    if total.damaged or total.unread:
        sys.exit(1)


# ---- pins


def _pin(
    file: BinaryIO, namespace: str | None, tenant: str, salt: str, are_keys: bool, address: str, token: str,
    tls: Path | None, for_s: float,
) -> None:  # fmt: skip
    door = Door(address, token, tls, tenant)
    with door.cache(door.namespace(door.name(namespace)), tenant, salt) as cache:
        keys = keys_in(file, cache, are_keys=are_keys)
        count = cache.pin(keys, for_s)
        cache.flush()
    print_line(f"{count:,} of {plural(len(keys), 'page')} {'pinned' if for_s else 'unpinned'}")
    if not count:
        sys.exit(1)


_pin_options = (
    click.argument("file", type=click.File("rb"), default="-"),
    click.option("--namespace", metavar="NAME", help="Which one, or how it begins. Not needed if there is one only."),
    tenant_option, _salt_option, _keys_option, address_option, token_option, tls_option,
)  # fmt: skip


def _with_pin_options(command: Any) -> Any:
    for option in reversed(_pin_options):
        command = option(command)
    return command


@click.command()
@_with_pin_options
@click.option("--for", "duration", default="24h", show_default=True, metavar="TIME", help='As in "90m" or "7d".')
def pin(duration: str, **where: Any) -> None:
    """Keep the pages of a prompt, and those before them, for some time whatever happens. FILE is as in `kv match`.

    \b
    Example:
      emberline kv pin system-prompt.json --for 7d --address 127.0.0.1:7400
    """
    from emberfs.cli.find import age_s

    _pin(**where, for_s=age_s(duration))


@click.command()
@_with_pin_options
def unpin(**where: Any) -> None:
    """Let the pages of a prompt go when their time comes. FILE is as in `kv match`.

    \b
    Example:
      emberline kv unpin system-prompt.json --address 127.0.0.1:7400
    """
    _pin(**where, for_s=0.0)
