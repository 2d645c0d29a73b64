"""A unit test of the source tree: what linters cannot see, and what holds the five packages apart.

Run: pytest tests/test_tidy.py. Each rule is a function from one source file to the places where it is broken. Each is
tried on every file of the tree, and on a small bad sample, so that a rule that finds nothing is known to be able to.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
INIT_LINES_MAX = 60

SOURCE_ROOTS = {
    "emberline": "emberline",
    "emberfs": "fs/emberfs",
    "emberflow": "dataflow/emberflow",
    "emberkv": "kvcache/emberkv",
    "embertrain": "trainer/embertrain",
}
"""Package -> its folder."""

MAY_IMPORT = {
    "emberfs": set(),
    "emberflow": {"emberfs"},
    "emberkv": {"emberfs"},
    "embertrain": {"emberkv", "emberflow", "emberfs"},
    "emberline": {"embertrain", "emberkv", "emberflow", "emberfs"},
}
"""The layers: imports point down only."""

SERVICES = ("emberfs", "emberkv")
"""Packages whose code is handed its clock, randomness, network, disk and concurrency."""

REACHES_OUT = {
    "fs/emberfs/runtime.py": "is the seam of time, randomness and concurrency",
    "fs/emberfs/ledger.py": "is a face: the caller's threads note their calls",
    "fs/emberfs/meter.py": "is read by the thread of the metrics page too",
    "fs/emberfs/portal.py": "drives calls from the caller's own thread",
    "fs/emberfs/disk.py": "is the disk seam",
    "fs/emberfs/kv/lmdb.py": "wraps a library that does its own system calls, on its one writer thread",
    "fs/emberfs/superblock.py": "makes a directory a store",
    "fs/emberfs/sharing/": "is how processes of a host come to one owner: lock file, socket, server process",
    "fs/emberfs/stores.py": "holds the stores that this process has open",
    "fs/emberfs/cluster/": "wires clients and local clusters together: runtime, network, processes",
    "fs/emberfs/server/": "wires a server together: signals, runtime, network, disk",
    "fs/emberfs/transport/": "is the network seam",
    "fs/emberfs/lane/": "goes past the seams, for whoever runs outside a simulation; testing.sim has a twin",
    "fs/emberfs/client/attachment.py": "is a face: several of the caller's threads may find out that they forked",
    "fs/emberfs/client/handle.py": "is a face: the caller's threads share a handle",
    "fs/emberfs/client/io_queue.py": "is a face: the caller's threads wait for completions",
    "fs/emberfs/cli/": "is a face: the user's terminal and local files",
    "fs/emberfs/testing/": "runs in other people's tests",
    "kvcache/emberkv/adapters/": "runs in the threads of engines, on their clock",
    "kvcache/emberkv/breaker.py": "is the face's: the caller's threads share it",
    "kvcache/emberkv/caller.py": "is the face's: the caller's threads share a connection",
    "kvcache/emberkv/client.py": "is a face: the caller's threads share a cache",
    "kvcache/emberkv/direct_way.py": "is the face's: the caller's threads take turns with a connection",
    "kvcache/emberkv/prefetch.py": "is the face's: a thread of the caller's process reads while it goes on",
    "kvcache/emberkv/putting.py": "is the face's: the caller's threads put by turns",
    "kvcache/emberkv/opening.py": "is the face's: threads of the caller's process open what they will write to",
    "kvcache/emberkv/writing.py": "is the face's: threads of the caller's process write what it put",
}
"""File or folder/ -> why it may reach past the seams. A row that is not needed is a failure too."""

REACHING_MODULES = {"random", "secrets", "threading", "socket", "concurrent", "multiprocessing", "subprocess"}
REACHING_NAMES = {
    *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter", "time.sleep"),
    *("datetime.now", "datetime.utcnow", "datetime.datetime.now", "uuid.uuid1", "uuid.uuid4"),
    *("os.urandom", "os.open", "os.getrandom", "io.open", "open", "hash", "id"),
    *("asyncio.create_task", "asyncio.ensure_future", "asyncio.sleep", "asyncio.to_thread", "asyncio.run"),
    *("asyncio.get_event_loop", "asyncio.get_running_loop", "asyncio.new_event_loop"),
}
"""Calls that a simulation cannot replay. `hash` and `id` differ from run to run."""


@dataclass(frozen=True)
class Source:
    """One text file of the tree."""

    path: PurePosixPath
    text: str

    @property
    def package(self) -> str | None:
        """Which of the five packages holds the file, if one does."""
        for package, folder in SOURCE_ROOTS.items():
            if self.path.is_relative_to(folder):
                return package
        return None

    @property
    def is_python(self) -> bool:
        return self.path.suffix == ".py"

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(self.module))

    @cached_property
    def module(self) -> ast.Module:
        return ast.parse(self.text, filename=str(self.path))


Finding = tuple[int, str]
"""(line, what is wrong there)"""


# ---- shape


def modules_are_short(source: Source) -> Iterator[Finding]:
    lines = source.text.count("\n")
    if source.is_python and lines > MODULE_LINES_MAX:
        yield MODULE_LINES_MAX + 1, f"{lines} lines, at most {MODULE_LINES_MAX}: split the module by noun"


def functions_fit_a_screen(source: Source) -> Iterator[Finding]:
    for node in source.nodes if source.is_python else []:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield node.lineno, f"{node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}"


def modules_are_named_by_a_noun(source: Source) -> Iterator[Finding]:
    if source.path.name in {"utils.py", "util.py", "helpers.py", "misc.py"}:
        yield 1, "a module named for nothing: put each function beside the noun it serves"


def modules_say_what_they_are(source: Source) -> Iterator[Finding]:
    if source.is_python and source.package and not ast.get_docstring(source.module):
        yield 1, "no module docstring"


def inits_hold_only_the_public_names(source: Source) -> Iterator[Finding]:
    if source.path.name != "__init__.py":
        return
    lines = source.text.count("\n")
    if lines > INIT_LINES_MAX:
        yield INIT_LINES_MAX + 1, f"{lines} lines, at most {INIT_LINES_MAX}"
    for node in source.module.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_dunder = isinstance(node, ast.Assign) and all(_dotted(target).startswith("__") for target in node.targets)
        if not (is_docstring or is_dunder or isinstance(node, ast.Import | ast.ImportFrom)):
            yield node.lineno, "an __init__.py imports and lists names; logic goes into a module"


# ---- habits


def open_ends_have_an_owner(source: Source) -> Iterator[Finding]:
    if not source.is_python:
        return
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"\b(TODO|FIXME|XXX)\b(?!\(#\d+\))", token.string):
            yield token.start[0], "an open end without an issue: write it as TODO(#12), or do it"


def libraries_do_not_print(source: Source) -> Iterator[Finding]:
    if not (source.is_python and source.package) or source.path.stem in {"cli", "quickstart"}:
        return
    for node in source.nodes:
        if isinstance(node, ast.Call) and _dotted(node.func) == "print":
            yield node.lineno, "a library does not print: log, return or raise"


def no_machine_is_named(source: Source) -> Iterator[Finding]:
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"(?<![\w.])/(?:work|root)/", line):
            yield number, "an absolute path of somebody's machine"


# ---- layers and seams


def imports_point_down(source: Source) -> Iterator[Finding]:
    if not (source.is_python and source.package):
        return
    allowed = MAY_IMPORT[source.package] | {source.package}
    for line, name in _absolute_imports(source):
        top = name.split(".")[0]
        if top in {*SOURCE_ROOTS, "tests", "benchmarks"} - allowed:
            yield line, f"{source.package} does not import {top}"


def imports_inside_a_package_are_relative(source: Source) -> Iterator[Finding]:
    if not (source.is_python and source.package):
        return
    for line, name in _absolute_imports(source):
        if name.split(".")[0] == source.package:
            yield line, f"import {name} relatively"


def services_are_handed_the_world(source: Source) -> Iterator[Finding]:
    if source.package in SERVICES and source.is_python and not _allowance(source):
        yield from _reaches(source)


def trainers_name_no_vendor(source: Source) -> Iterator[Finding]:
    """The same code runs on a CPU and on any accelerator; what is one vendor's own is in kernels/."""
    if source.package != "embertrain" or not source.is_python or "kernels" in source.path.parts:
        return
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(r"(cuda|nccl)(:.*)?", node.value):
                yield node.lineno, f"names {node.value}: ask torch.accelerator, or take the device as it is handed in"
        elif isinstance(node, ast.Attribute) and node.attr == "cuda":
            yield node.lineno, "asks for cuda: ask torch.accelerator, or move to the device that is handed in"


def _allowance(source: Source) -> str | None:
    """The row of `REACHES_OUT` that covers the file."""
    for row in REACHES_OUT:
        if str(source.path) == row or (row.endswith("/") and source.path.is_relative_to(row)):
            return row
    return None


def _reaches(source: Source) -> Iterator[Finding]:
    for line, name in _absolute_imports(source):
        if name.split(".")[0] in REACHING_MODULES or name in REACHING_NAMES:
            yield line, f"imports {name}: ask the runtime, disk or transport instead"
    for node in source.nodes:
        if isinstance(node, ast.Call) and _dotted(node.func) in REACHING_NAMES:
            yield node.lineno, f"calls {_dotted(node.func)}: ask the runtime, disk or transport instead"


def _absolute_imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of each absolute import; `from a import b` is a.b. Those inside functions count too."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names, or "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)):
        return f"{before}.{node.attr}"
    return ""


# ---- the tests

Rule = Callable[[Source], Iterator[Finding]]

BAD_SAMPLES: dict[Rule, tuple[str, str]] = {
    modules_are_short: ("tests/long.py", "x = 1\n" * (MODULE_LINES_MAX + 1)),
    functions_fit_a_screen: ("tests/long.py", "async def f():\n" + "    pass\n" * FUNCTION_LINES_MAX),
    modules_are_named_by_a_noun: ("fs/emberfs/utils.py", ""),
    modules_say_what_they_are: ("kvcache/emberkv/page.py", "x = 1\n"),
    inits_hold_only_the_public_names: ("fs/emberfs/__init__.py", "def f(): ...\n"),
    open_ends_have_an_owner: ("tests/test_x.py", "x = 1  # TODO: later\n"),
    libraries_do_not_print: ("dataflow/emberflow/plan.py", "print(1)\n"),
    no_machine_is_named: ("README.md", "see " + "/" + "root/store\n"),
    imports_point_down: ("dataflow/emberflow/plan.py", "def f():\n    from emberkv.page import Page\n"),
    imports_inside_a_package_are_relative: ("fs/emberfs/client.py", "from emberfs.errors import NotFound\n"),
    trainers_name_no_vendor: ("trainer/embertrain/engine.py", 'device = "cuda:0"\n'),
    services_are_handed_the_world: ("fs/emberfs/meta/gc.py", "import time\nnow = time.monotonic()\n"),
}
"""Every rule, with a file that breaks it."""


@cache
def tree() -> list[Source]:
    """The text files that are, or are about to be, under version control; every file of an unpacked sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
        paths = sorted({ROOT / name for name in names if name})
    else:
        paths = sorted(path for path in ROOT.rglob("*") if "__pycache__" not in path.parts)
        paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]
    # A tracked file may have been deleted in the working tree, and a golden store is not text.
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return [
        Source(PurePosixPath(path.relative_to(ROOT)), content.decode())
        for path, content in contents.items()
        if b"\0" not in content[:8192]
    ]


@pytest.mark.parametrize("rule", BAD_SAMPLES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: Rule) -> None:
    broken = [f"{source.path}:{line}: {what}" for source in tree() for line, what in rule(source)]
    assert not broken, "\n".join(["", *broken])


@pytest.mark.parametrize("rule", BAD_SAMPLES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_a_bad_sample(rule: Rule) -> None:
    path, text = BAD_SAMPLES[rule]
    assert len(list(rule(Source(PurePosixPath(path), text)))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "import random",
        "from time import monotonic",
        "from concurrent.futures import ThreadPoolExecutor",
        "token = os.urandom(8)",
        "task = asyncio.create_task(work())",
        "file = open(path)",
        "bucket = hash(name) % 16",
    ],
)
def test_each_way_past_the_seams_is_seen(line: str) -> None:
    assert list(services_are_handed_the_world(Source(PurePosixPath("fs/emberfs/meta/gc.py"), line)))


@pytest.mark.parametrize(
    ("path", "line", "count"),
    [
        ("trainer/embertrain/engine.py", "x = x.cuda()", 1),
        ("trainer/embertrain/engine.py", "torch.cuda.synchronize()", 1),
        ("trainer/embertrain/engine.py", "backend = 'nccl'", 1),
        ("trainer/embertrain/engine.py", "'cuda is one of them'", 0),
        ("trainer/embertrain/kernels/attend.py", "torch.cuda.synchronize()", 0),
        ("tests/trainer/test_x.py", "torch.cuda.synchronize()", 0),
    ],
)
def test_each_way_to_name_a_vendor_is_seen(path: str, line: str, count: int) -> None:
    assert len(list(trainers_name_no_vendor(Source(PurePosixPath(path), line)))) == count


def test_the_tree_is_seen_whole() -> None:
    paths = {str(source.path) for source in tree()}
    assert {"Makefile", "pyproject.toml", "tests/test_tidy.py", "fs/emberfs/runtime.py"} <= paths
    assert {source.package for source in tree()} == {*SOURCE_ROOTS, None}


def test_every_allowance_is_needed() -> None:
    used = {_allowance(source) for source in tree() if source.is_python and any(_reaches(source))}
    assert not set(REACHES_OUT) - used, "rows of REACHES_OUT that nothing needs"
