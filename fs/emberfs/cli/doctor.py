"""`doctor`: whether this machine and a store are well, and what to do if not.

Each check is a function that returns its lines; a check that itself fails is a FAIL line, never a traceback.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import click
import msgspec

from ..client.sync import Client
from ..embedded import StoreConfig
from ..errors import StoreBusy
from ..urls import SUPERBLOCK, cluster_addresses
from .location import STORE_VARIABLE
from .output import human_bytes, json_option, plural, print_json, safe
from .store import directory_of

_PYTHON_MIN = (3, 11)
_LIBRARIES = ("awscrt", "click", "duckdb", "fsspec", "lmdb", "msgspec", "pyarrow", "rich", "sortedcontainers")
_OPEN_FILES_MIN = 1024
_FREE_BYTES_WARN = 1 << 30
_MEMORY_BYTES_WARN = 1 << 30
_COLOURS = {"OK": "green", "SKIP": "blue", "WARN": "yellow", "FAIL": "red"}


class Line(msgspec.Struct, frozen=True):
    """The answer of one check."""

    state: str
    """OK, SKIP (not asked for), WARN or FAIL."""
    name: str
    detail: str
    advice: str = ""
    """What to do about it."""


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline doctor\n"
    "  emberline doctor ember:///srv/store\n"
    "  emberline doctor --json | jq 'select(.state != \"OK\")'"
)
@click.argument("url", required=False)
@json_option
def doctor(url: str | None, as_json: bool) -> None:
    """Check this machine and the store at URL (or EMBERLINE_URL). Exit code 1 if something fails."""
    given = url or os.environ.get(STORE_VARIABLE, "")
    if url is None and cluster_addresses(given):
        given = ""  # This machine is checked all the same.
    directory = directory_of(given) if given else None
    checks: list[Callable[[], Iterator[Line]]] = [_python, _libraries, _open_files, _memory]
    place = _existing_parent(directory or Path.cwd())
    checks += [lambda: _disk(place), lambda: _preallocation(place), lambda: _cached_reads(place)]
    checks.append(_no_store if directory is None else lambda: _store(directory))
    failed = False
    for check in checks:
        for line in lines_of(check, check.__name__.strip("_<>")):
            failed = failed or line.state == "FAIL"
            print_finding(line, as_json=as_json)
    if failed:
        sys.exit(1)


def lines_of(check: Callable[[], Iterator[Line]], name: str) -> Iterator[Line]:
    """What a check finds. That it fails itself is a finding called `name`."""
    try:
        yield from check()
    except Exception as error:
        yield Line("FAIL", name, f"{error}", "EMBERLINE_LOG=debug with `emberline fs info` tells more")


def print_finding(line: Line, *, as_json: bool) -> None:
    """As people read it, what to do on a line below; or as JSON."""
    if as_json:
        print_json(line)
        return
    colour = None if os.environ.get("NO_COLOR") else _COLOURS[line.state]
    state = click.style(f"{line.state:<4}", fg=colour) if colour else f"{line.state:<4}"
    click.echo(f"{state}  {line.name:<16}  {safe(line.detail)}")
    if line.advice:
        click.echo(f"{'':<24}-> {safe(line.advice)}")


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


# ---- the machine


def _python() -> Iterator[Line]:
    found = (
        f"{platform.python_implementation()} {platform.python_version()} on {platform.system()} {platform.machine()}"
    )
    if sys.version_info < _PYTHON_MIN:
        yield Line("FAIL", "python", found, "install Python 3.11 or newer")
    elif sys.platform != "linux":
        yield Line("WARN", "python", found, "Linux is where everything works; here the embedded store and SQL do")
    else:
        yield Line("OK", "python", found)


def _libraries() -> Iterator[Line]:
    found, missing = [], []
    for name in _LIBRARIES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        names = " ".join(missing)
        yield Line("FAIL", "libraries", f"missing: {names}", f"python -m pip install {names}")
    else:
        yield Line("OK", "libraries", ", ".join(found))


def _open_files() -> Iterator[Line]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _OPEN_FILES_MIN:
        yield Line("WARN", "open files", f"at most {soft}", f"ulimit -n {min(hard, 65536)}")
    else:
        yield Line("OK", "open files", f"at most {soft}")


def _memory() -> Iterator[Line]:
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return
    available = next(int(line.split()[1]) << 10 for line in facts.read_text().splitlines() if "MemAvailable:" in line)
    if available < _MEMORY_BYTES_WARN:
        yield Line("WARN", "memory", f"{human_bytes(available)} available", "large SQL will spill to disk")
    else:
        yield Line("OK", "memory", f"{human_bytes(available)} available")


# ---- the disk


def _disk(place: Path) -> Iterator[Line]:
    status = os.statvfs(place)
    free_bytes = status.f_bavail * status.f_frsize
    detail = f"{human_bytes(free_bytes)} free of {human_bytes(status.f_blocks * status.f_frsize)} at {place}"
    reserve_bytes = StoreConfig().reserve_bytes
    if free_bytes <= reserve_bytes:
        yield Line(
            "FAIL", "disk space", detail, "free space: a store refuses new data here; removing and gc still work"
        )
    elif free_bytes < _FREE_BYTES_WARN:
        yield Line("WARN", "disk space", detail, f"free space: below {human_bytes(reserve_bytes)} new data is refused")
    else:
        yield Line("OK", "disk space", detail)
    if not os.access(place, os.W_OK):
        yield Line("FAIL", "permission", f"{place} is not writable", f"run as its owner, or chown {place}")


def _preallocation(place: Path) -> Iterator[Line]:
    keep_size_and_punch = 0x01 | 0x02  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with tempfile.TemporaryFile(dir=place) as file:
        if libc.fallocate(file.fileno(), 0, 0, 1 << 20) != 0:
            what = os.strerror(ctypes.get_errno())
            yield Line("WARN", "preallocation", what, "slower growth; ext4, xfs and btrfs preallocate at once")
        elif libc.fallocate(file.fileno(), keep_size_and_punch, 0, 1 << 20) != 0:
            what = f"no holes: {os.strerror(ctypes.get_errno())}"
            yield Line("WARN", "preallocation", what, "freed space stays with the store; use ext4, xfs or btrfs")
        else:
            yield Line("OK", "preallocation", "fallocate and holes work")


def _cached_reads(place: Path) -> Iterator[Line]:
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(b"x" * 4096)
        file.flush()
        try:
            os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except (AttributeError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EAGAIN:
                yield Line("OK", "RWF_NOWAIT", "works")
            else:
                yield Line("WARN", "RWF_NOWAIT", str(error), "async reads go through a thread; ext4 and xfs do better")
        else:
            yield Line("OK", "RWF_NOWAIT", "works")


# ---- the store


def _no_store() -> Iterator[Line]:
    how = f"emberline doctor ember:///store/dir, or set {STORE_VARIABLE}"
    yield Line("SKIP", "store", "none was given; this machine and the disk of this directory were checked", how)


def _store(directory: Path) -> Iterator[Line]:
    if not (directory / SUPERBLOCK).exists():
        strangers = directory.is_dir() and any(directory.iterdir())
        if strangers:
            yield Line("FAIL", "store", f"{directory} holds something else", "give an empty or a new directory")
        else:
            yield Line("WARN", "store", f"nothing at {directory} yet", "the first write makes a store there")
        return
    try:
        client = Client(f"ember://{directory}")
    except StoreBusy as error:
        advice = f"for the other checks stop process {error.pid} first" if error.pid else "find it with `fuser -v`"
        yield Line("WARN", "store", str(error), advice)
        return
    except (OSError, ValueError) as error:
        yield Line(
            "FAIL", "store", str(error), "restore the directory from a backup, or upgrade emberline if it is newer"
        )
        return
    with client:
        facts = client.maintenance.info()
        yield Line("OK", "store", f"format {facts['format']}, id {facts['store']}, at {directory}")
        owner = facts["owner"]
        shared = f"process {owner}, a server that others use too: fsck sees what they are just doing"
        alone = f"this process ({owner}); nobody else has it open"
        yield Line("OK", "owner", alone if owner == os.getpid() else shared)
        space = client.space()
        sizes = f"{human_bytes(space['used_bytes'])} used, {human_bytes(space['free_bytes'])} free for new data"
        low = space["free_bytes"] < _FREE_BYTES_WARN
        advice = "remove files, then emberline fs trash empty and emberline fs gc --now" if low else ""
        yield Line("WARN" if low else "OK", "space", sizes, advice)
        usage = client.usage()
        counts = f"{plural(usage.files, 'file')}, {plural(usage.directories, 'directory')}"
        yield Line("OK", "content", f"{counts}, {human_bytes(usage.length_bytes)}, {usage.trash_entries} in the trash")
        report = client.maintenance.fsck()
        if report.findings:
            first = report.findings[0]
            found = f"{plural(len(report.findings), 'finding')}, first: {first.kind} {first.path}: {first.detail}"
            yield Line("FAIL", "fsck", found, f"emberline fs fsck --repair {client.url}")
        else:
            yield Line("OK", "fsck", "clean (emberline fs scrub reads every byte as well)")
