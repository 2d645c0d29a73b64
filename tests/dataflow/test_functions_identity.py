"""A function's digest: the same in every process, another for every change of meaning, none for what cannot be told.

Run: pytest tests/dataflow/test_functions_identity.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from emberflow.functions.identity import Identity, identity, identity_of

BASE = """
import dataclasses, decimal, enum, functools, json, math, pathlib, re
import numpy as np
import pyarrow as pa

LIMIT = 3
TABLE = {"a": [1, 2], "b": {"x", "y", "z"}}
PATTERN = re.compile("a+b")
ARRAY = np.arange(4)
ROWS = pa.table({"n": [1, 2]})
PLACE = pathlib.Path("/some/where")
RATE = decimal.Decimal("1.50")

class Color(enum.Enum):
    RED = 1
    BLUE = 2

@dataclasses.dataclass(frozen=True)
class Config:
    scale: int = 2
    names: tuple = ("p", "q")

class Base:
    weight = 10
    def value(self):
        return self.weight + 1

class Model(Base):
    def __init__(self):
        self.state = [1]
    @property
    def size(self):
        return super().value()
    @staticmethod
    def helper(x):
        return x * 2

CONFIG = Config()
MODEL = Model()

@functools.lru_cache
def cached(n):
    return n + 1

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

def join(sep, n):
    return sep + str(n)

def scaled(by):
    def inner(n, extra=7, *, flag=False):
        return n * by + extra
    return inner

comma = functools.partial(join, ",")

def f(row, unit=1):
    import json.decoder
    if row["n"] in {"one", "two", "three"} or PATTERN.match(row["t"]):
        return LIMIT
    names = [c for c in row if c in TABLE["b"] and len(c) < CONFIG.scale]
    inner = scaled(5)
    return (math.sqrt(unit), names, ARRAY, ROWS, PLACE, Color.RED, MODEL.size, cached(1), even(4), comma(2), RATE,
            json.dumps(row), Model.helper, (lambda q: q + 1)(2))
"""

CHANGES = {
    "a constant": ("LIMIT = 3", "LIMIT = 4"),
    "the type of a constant": ("LIMIT = 3", "LIMIT = 3.0"),
    "a value deep in a dict": ("[1, 2], ", "[1, 3], "),
    "an element of a set": ('"y", "z"}', '"y", "w"}'),
    "a literal set in the code": ('"two", "three"', '"two", "four"'),
    "a pattern": ('"a+b"', '"a+c"'),
    "an array": ("np.arange(4)", "np.arange(5)"),
    "an array's type": ("np.arange(4)", "np.arange(4, dtype='int32')"),
    "an Arrow table": ('{"n": [1, 2]}', '{"n": [1, 3]}'),
    "a path": ("/some/where", "/some/where/else"),
    "a decimal": ("1.50", "1.5"),
    "an enum": ("RED = 1", "RED = 3"),
    "a dataclass": ('("p", "q")', '("p", "r")'),
    "a dataclass instance": ("CONFIG = Config()", "CONFIG = Config(scale=5)"),
    "an attribute of a base class": ("weight = 10", "weight = 11"),
    "a method of a base class": ("self.weight + 1", "self.weight + 2"),
    "a property": ("return super().value()", "return super().value() + 1"),
    "a static method": ("return x * 2", "return x * 3"),
    "the state of an object": ("self.state = [1]", "self.state = [2]"),
    "a cached function": ("def cached(n):\n    return n + 1", "def cached(n):\n    return n + 2"),
    "the other of two that call each other": ("return n != 0 and", "return n == 1 and"),
    "the bound argument of a partial": ('join, ","', 'join, ";"'),
    "the function of a partial": ("return sep + str(n)", "return str(n) + sep"),
    "a nested function": ("return n * by + extra", "return n * by - extra"),
    "a default of a nested function": ("extra=7", "extra=8"),
    "a keyword default": ("flag=False", "flag=True"),
    "a default": ("unit=1", "unit=2"),
    "an argument's name": ("def f(row, unit=1)", "def f(row, *, unit=1)"),
    "a lambda": ("q + 1", "q + 2"),
    "a called name": ("len(c) <", "ord(c) <"),
    "an attribute": ("math.sqrt", "math.exp"),
    "an operator": ("< CONFIG", "> CONFIG"),
}


def loaded(source: str, name: str = "flow_identity_sample") -> types.ModuleType:
    """`source` as a module of the user's."""
    module = types.ModuleType(name)
    module.__file__ = os.path.join(os.getcwd(), f"{name}.py")
    sys.modules[name] = module
    try:
        exec(compile(source, module.__file__, "exec"), vars(module))
    finally:
        del sys.modules[name]
    return module


def digest(source: str) -> str:
    found: Identity = identity_of(loaded(source).f)
    assert found.digest is not None, found.reason
    return found.digest


def made(source: str, **names: Any) -> Callable[..., Any]:
    """`f` of a small piece of source, with `names` as its globals."""
    space = {"__name__": "flow_identity_piece", **names}
    exec(textwrap.dedent(source), space)
    function: Callable[..., Any] = space["f"]
    return function


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_meaning_changes_it(change: str) -> None:
    before, after = CHANGES[change]
    assert BASE.count(before) == 1
    assert digest(BASE.replace(before, after)) != digest(BASE)


def test_lines_comments_and_files_do_not_change_it() -> None:
    moved = "# A comment.\n\n\n" + BASE.replace("    inner = scaled(5)", "\n    # Another one.\n    inner = scaled(5)")
    assert digest(moved) == digest(BASE)


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "sample.py").write_text(BASE)
    program = "import sample; from emberflow.functions.identity import identity; print(identity(sample.f))"
    seen = set()
    # The third run loads what the first compiled.
    for seed in ("1", "2", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout.strip())
    assert len(seen) == 1
    assert len(seen.pop()) == 32


def test_names_of_one_meaning_are_one() -> None:
    assert identity(made("f = lambda row: row['a'] + 1")) == identity(made("def f(row):\n    return row['a'] + 1"))


def test_the_users_own_module_is_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = loaded("import math\nA = 1\nB = 2\ndef g(n):\n    return n + A\n", "flow_helpers")
    monkeypatch.setitem(sys.modules, "flow_helpers", helpers)
    at_top = made("def f(row):\n    return helpers.g(row['n'])", helpers=helpers)
    inside = made("def f(row):\n    import flow_helpers\n    return flow_helpers.g(row['n'])")
    before = identity(at_top), identity(inside)
    assert None not in before
    monkeypatch.setattr(helpers, "B", 5)
    assert (identity(at_top), identity(inside)) == before
    monkeypatch.setattr(helpers, "A", 5)
    after = identity(at_top), identity(inside)
    assert after[0] != before[0]
    assert after[1] != before[1]


def test_an_installed_thing_is_its_name_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from emberflow.functions import identity as identities

    function = made("def f(row):\n    return pa.scalar(row['n'])", pa=pa)
    before = identity(function)
    assert before is not None
    monkeypatch.setattr(identities, "version", lambda name: "another")
    assert identity(function) not in (None, before)


def test_chunks_of_arrow_data_do_not_matter() -> None:
    whole = pa.table({"n": [1, 2, 3]})
    cut = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    source = "def f(row):\n    return data"
    assert identity(made(source, data=whole)) == identity(made(source, data=cut))
    assert identity(made(source, data=whole)) != identity(made(source, data=whole.slice(1)))


def test_bound_methods_carry_their_object() -> None:
    texts = ["ab", "cd"]
    assert identity(texts[0].join) != identity(texts[1].join)
    assert identity(str.upper) != identity(str.lower)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (threading.Lock(), "f uses 'value': a _thread.lock"),
        ((n for n in range(3)), "a generator"),
        ([{"deep": iter(())}, threading.local()], "a _thread._local"),
    ],
    ids=["lock", "generator", "deep"],
)
def test_what_cannot_be_told_has_a_reason(value: object, words: str) -> None:
    found = identity_of(made("def f(row):\n    return value", value=value))
    assert found.digest is None
    assert found.reason is not None and words in found.reason


def test_an_open_file_has_a_reason(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as value:
        found = identity_of(made("def f(row):\n    return value", value=value))
    assert found.reason is not None and "TextIOWrapper" in found.reason


def test_data_nested_too_deep_have_a_reason() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    found = identity_of(made("def f(row):\n    return value", value=value))
    assert found == Identity(None, "it refers to data that are nested too deep")
    while value:
        value = value[0]


def test_a_version_stands_for_the_meaning() -> None:
    with_lock = made("def f(row):\n    return value", value=threading.Lock())
    assert identity(with_lock, version="1") == identity(made("def f(row):\n    return 2"), version="1")
    assert identity(with_lock, version="1") != identity(with_lock, version="2")
