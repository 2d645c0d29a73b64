"""What a user gets from pip: sdist -> wheel -> an environment that never saw the source tree.

Run: pytest tests/test_packaging.py. Needs no network: the wheel is installed without its dependencies, which are lent
from the environment the tests run in.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(1200)  # The first test waits for a compiler, several times.

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "emberline": ROOT / "emberline",
    "emberfs": ROOT / "fs" / "emberfs",
    "emberflow": ROOT / "dataflow" / "emberflow",
    "emberkv": ROOT / "kvcache" / "emberkv",
    "embertrain": ROOT / "trainer" / "embertrain",
}

IMPORT_ALL = """
import importlib, json, sys
files = {name: importlib.import_module(name).__file__ for name in sys.argv[1:]}
print(json.dumps({"files": files, "torch": "torch" in sys.modules}))
"""

SMOKE = """
import sys, emberfs
with emberfs.connect(f"ember://{sys.argv[1]}/store") as store:
    store.put("/greeting", b"hello")
with emberfs.connect(f"ember://{sys.argv[1]}/store") as store:
    assert bytes(store.get("/greeting")) == b"hello"
"""


def run(*command: object, cwd: Path) -> str:
    """Run to the end and return stdout; a failure shows both outputs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EMBERLINE"))}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, not from the tree."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    assert len(list(out.glob("emberline-*.tar.gz"))) == 1
    (built,) = out.glob("emberline-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a fresh environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # Appended, so the wheel's packages win; the editable install's own .pth is not followed from here.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.suffix in {".py", ".pyi", ".toml"} or path.name == "py.typed"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    if shutil.which("cc") and sys.platform == "linux":
        expected |= {"emberfs/lane/_native.abi3.so", "embertrain/kernels/_loops.any.so"}
        more = ("v3", "v4", "v4-bf16") if platform.machine() == "x86_64" else ()
        expected |= {f"embertrain/kernels/_loops.{name}.so" for name in more}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert ("py3-none-any" in wheel.name) == ("emberfs/lane/_native.abi3.so" not in expected)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_packages_come_from_the_wheel_and_import_without_torch(bin_folder: Path) -> None:
    report = json.loads(run(bin_folder / "python", "-c", IMPORT_ALL, *PACKAGES, cwd=bin_folder))
    for name, file in report["files"].items():
        assert Path(file).is_relative_to(bin_folder.parent), f"{name} was imported from {file}"
    assert not report["torch"], "importing the packages loads torch, which only the train extra installs"


def test_the_installed_command_says_its_version(bin_folder: Path, wheel: Path) -> None:
    version = wheel.name.split("-")[1]
    assert version in run(bin_folder / "emberline", "--version", cwd=bin_folder)


def test_the_installed_store_keeps_an_object(bin_folder: Path, tmp_path: Path) -> None:
    run(bin_folder / "python", "-c", SMOKE, tmp_path, cwd=tmp_path)
