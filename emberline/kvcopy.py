"""`emberline kv export` and `import`: pages out of a service into files, and back into the same or another one."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote

import click
from emberfs.cli.output import human_bytes, json_option, note, plural, print_json, print_line, progress_bar
from emberfs.errors import Corruption

from .kvpages import Door, keys_in
from .kvservice import address_option, tls_option, token_option

if TYPE_CHECKING:
    from emberkv.archive import About, Archive

SUFFIX = ".ekv"
PART = ".part"
"""Of a file that is not whole yet."""


@click.command("export")
@click.argument("target")
@click.option("--namespace", metavar="NAME", help="Which one, or how it begins. Not needed if there is one only.")
@click.option("--tenant", metavar="NAME", help="Only this one's pages; without it those of all.")
@click.option("--prompt", type=click.File("rb"), metavar="FILE", help="Only the pages of these token ids.")
@click.option("--salt", default="", metavar="TEXT", help="With --prompt: what the keys depend on, too.")
@address_option
@token_option
@tls_option
@json_option
def export_(
    target: str, namespace: str | None, tenant: str | None, prompt: BinaryIO | None, salt: str, address: str,
    token: str, tls: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Copy pages into the file TARGET, or a file for each tenant into the directory TARGET; - is the standard output.

    Every page has its checksum in the file. A file is called TARGET.part until it is whole; the same command again goes
    on where it ended. Pages that are evicted meanwhile are left out and counted. Nothing is pinned.

    \b
    Examples:
      emberline kv export pages.ekv --namespace deepseek-v3 --tenant acme --address 127.0.0.1:7400
      emberline kv export /backup/ --address 127.0.0.1:7400
      emberline kv export - --tenant acme | ssh elsewhere emberline kv import -
    """
    door = Door(address, token, tls, tenant)
    name = door.name(namespace)
    tenants = door.tenants(name, tenant)
    into_directory = target.endswith("/") or Path(target).is_dir()
    if len(tenants) > 1 and (prompt is not None or not into_directory):
        raise click.UsageError(f"{name} has {len(tenants)} tenants: give --tenant, or a directory for a file of each")
    Path(target).mkdir(parents=True, exist_ok=True) if into_directory else None
    for each in tenants:
        path = Path(target) / f"{name}.{quote(each, safe='')}{SUFFIX}" if into_directory else Path(target)
        report = _export(door, name, each, path, prompt=prompt, salt=salt, as_json=as_json)
        _say(report, f"{report['pages']:,} payloads, {human_bytes(report['written_bytes'])} of {each} in {path}"
             + (f"; {report['missing']:,} could not be had any more" if report["missing"] else ""),
             as_json=as_json, to_stdout=str(path) == "-")  # fmt: skip


def _say(report: dict[str, Any], text: str, *, as_json: bool, to_stdout: bool = False) -> None:
    if to_stdout:
        note(text)
    elif as_json:
        print_json(report)
    else:
        print_line(text)


def _export(
    door: Door, name: str, tenant: str, path: Path, *, prompt: BinaryIO | None, salt: str, as_json: bool
) -> dict[str, Any]:
    from emberkv.archive import About, Archive
    from emberkv.carry import all_pages, export_pages, prefix_pages

    about = About(door.namespace(name), tenant)
    to_stdout = str(path) == "-"
    part = path.with_name(path.name + PART)
    written = 0
    with door.cache(about.namespace, tenant, salt) as cache:
        pages = all_pages(cache) if prompt is None else prefix_pages(cache, keys_in(prompt, cache, are_keys=False))
        goes_on = not to_stdout and part.exists() and part.stat().st_size > 0
        with sys.stdout.buffer if to_stdout else part.open("r+b" if goes_on else "wb") as file:
            archive, done = _resumed(file, about, part) if goes_on else (Archive.begin(file, about), set())
            if done:
                note(f"{part} has {plural(len(done), 'payload')}: going on")
            total = door.namespaces[name]["tenants"][tenant]["bytes"] if prompt is None else None
            with progress_bar(tenant, total, quiet=as_json) as advance:

                def count(size: int) -> None:
                    nonlocal written
                    written += size
                    advance(size)

                missing = export_pages(cache, archive, pages, done=done, advance=count)
            whole = archive.end()
            if not to_stdout:
                os.fsync(file.fileno())
    if not to_stdout:
        part.replace(path)
    return {"namespace": name, "tenant": tenant, "file": str(path), "pages": whole, "written_bytes": written,
            "missing": missing}  # fmt: skip


def _resumed(file: BinaryIO, about: About, part: Path) -> tuple[Archive, set[tuple[bytes, int]]]:
    from emberkv.archive import Archive

    try:
        return Archive.resume(file, about)
    except (Corruption, ValueError) as error:
        raise click.ClickException(f"{part} is there, and {error}: remove it, or choose another TARGET") from error


@click.command("import")
@click.argument("source", nargs=-1, required=True)
@address_option
@token_option
@tls_option
@json_option
def import_(source: Sequence[str], address: str, token: str, tls: Path | None, as_json: bool) -> None:
    """Put the pages of files that `kv export` made; of a directory all in it; - is the standard input.

    They come into the namespace and to the tenant that they were of, for these are in every key. What is there already
    is not written again, so an import that ended too soon is simply done again. Exit code 1 if a file is damaged or cut
    off (its good pages are in by then) or is no archive, or if there was no room for all.

    \b
    Examples:
      emberline kv import pages.ekv --address 127.0.0.1:7400
      emberline kv import /backup/ --address 127.0.0.1:7400
    """
    door = Door(address, token, tls)
    paths = [each for name in source for each in (sorted(Path(name).glob(f"*{SUFFIX}")) if Path(name).is_dir()
                                                  else [Path(name)])]  # fmt: skip
    if not paths:
        raise click.ClickException(f"there is no *{SUFFIX} in {', '.join(source)}")
    is_bad = False
    for path in paths:
        try:
            outcomes, is_whole = _import(door, path, quiet=as_json)
        except Corruption as error:
            is_bad = True
            _say({"file": str(path), "is_whole": False, "error": str(error)}, f"{path}: {error}", as_json=as_json)
            continue
        told = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items())) or "no pages"
        cut = "" if is_whole else ": damaged or cut off after them"
        _say({"file": str(path), "is_whole": is_whole, **outcomes}, f"{path}: {told}{cut}", as_json=as_json)
        is_bad = is_bad or not is_whole or bool(outcomes["refused"])
    if is_bad:
        sys.exit(1)


def _import(door: Door, path: Path, *, quiet: bool) -> tuple[Counter[str], bool]:
    from emberkv.archive import ArchiveReader
    from emberkv.carry import import_pages

    from_stdin = str(path) == "-"
    with sys.stdin.buffer if from_stdin else path.open("rb") as file:
        archive = ArchiveReader(file)
        total = None if from_stdin else path.stat().st_size
        with (
            door.cache(archive.about.namespace, archive.about.tenant) as cache,
            progress_bar(path.name, total, quiet=quiet) as advance,
        ):
            return import_pages(cache, archive, advance=advance), archive.is_whole
