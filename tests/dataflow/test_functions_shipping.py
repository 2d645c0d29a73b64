"""Functions travel: what a worker without the user's files can run, and what cannot be sent.

Run: pytest tests/dataflow/test_functions_shipping.py.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from pathlib import Path

import cloudpickle
import pytest
from emberflow.errors import InvalidArgument
from emberflow.functions import modules, shipping

LOCK = threading.Lock()

RECEIVER = "import sys; from emberflow.functions.shipping import loads; print(loads(sys.stdin.buffer.read())(20))"


def called_elsewhere(data: bytes, tmp_path: Path) -> str:
    """What the function in `data` gives for 20, in a process that has none of this one's files."""
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run([sys.executable, "-c", RECEIVER], input=data, capture_output=True, cwd=empty, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


def uses_a_lock(n: int) -> int:
    with LOCK:
        return n


def calls_it(n: int) -> int:
    return uses_a_lock(n) + 1


def test_a_lambda_and_its_closure_travel(tmp_path: Path) -> None:
    offset = 22
    assert called_elsewhere(shipping.dumps(lambda n: n + offset), tmp_path) == "42"


def test_a_module_of_the_users_travels_with_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "flowpkg").mkdir(parents=True)
    (home / "flowpkg" / "__init__.py").write_text("")
    (home / "flowpkg" / "inner.py").write_text("FACTOR = 2\ndef twice(n):\n    return n * FACTOR\n")
    (home / "flowmain.py").write_text(
        "import flowpkg.inner\nfrom flowpkg.inner import twice\n"
        "class Adder:\n    def __init__(self, n):\n        self.n = n\n"
        "    def __call__(self, n):\n        return flowpkg.inner.twice(n) + twice(self.n)\n"
    )
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.chdir(home)
    try:
        import flowmain  # type: ignore[import-not-found]

        data = shipping.dumps(flowmain.Adder(1))
    finally:
        for name in ("flowmain", "flowpkg", "flowpkg.inner"):
            sys.modules.pop(name, None)
    assert called_elsewhere(data, tmp_path) == "42"
    assert not cloudpickle.list_registry_pickle_by_value()


def test_what_is_local_is_looked_at_again_where_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another working directory, and when another module has the name."""
    name = "flow_looked_at"
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.py").write_text("")
    local = modules.LocalModules()

    def found() -> bool:
        return name in [module.__name__ for module in local()]

    monkeypatch.syspath_prepend(str(tmp_path / "one"))
    importlib.import_module(name)
    assert not found()
    monkeypatch.chdir(tmp_path / "one")
    assert found() and found()
    monkeypatch.syspath_prepend(str(tmp_path / "two"))
    del sys.modules[name]
    importlib.import_module(name)
    assert not found()
    del sys.modules[name]


def test_an_installed_function_travels_by_name() -> None:
    import json

    data = shipping.dumps(json.dumps)
    assert len(data) < 100
    assert shipping.loads(data) is json.dumps


@pytest.mark.parametrize(("installer", "local"), [("pip", False), (None, True)])
def test_a_package_is_installed_wherever_pip_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installer: str | None, local: bool
) -> None:
    name = f"flow_installed_{installer}".lower()
    (tmp_path / f"{name}.py").write_text("")
    information = tmp_path / f"{name}-1.5.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    if installer:
        (information / "INSTALLER").write_text(installer)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    assert (modules.is_installed(module), modules.is_local(module)) == (not local, local)
    assert modules.version(name) == "1.5"
    del sys.modules[name]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (uses_a_lock, "uses_a_lock uses 'LOCK', which is a _thread.lock"),
        (calls_it, "uses_a_lock uses 'LOCK'"),
    ],
)
def test_what_cannot_travel_is_named(function: object, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        shipping.dumps(function)


def test_a_captured_file_is_named(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        with pytest.raises(InvalidArgument, match=r"uses 'log', which is a _io\.TextIOWrapper"):
            shipping.dumps(lambda n: log.write(str(n)))
        with pytest.raises(InvalidArgument, match="cannot be sent to workers"):
            shipping.dumps([log])


def test_a_missing_package_is_named_on_arrival() -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        shipping.loads(b"cflow_not_installed\nf\n.")
    assert "must be installed where jobs run" in caught.value.__notes__[0]
