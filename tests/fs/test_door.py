"""The names of `emberfs`: all there, and what opens a store is not imported for those who want none."""

from __future__ import annotations

import subprocess
import sys

import emberfs
import emberfs.opening
import pytest


def imported_by(code: str) -> str:
    program = f"import sys\n{code}\nprint([each for each in ('awscrt', 'emberfs.client') if each in sys.modules])"
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.strip()


def test_every_name_is_there() -> None:
    names: dict[str, object] = {}
    exec("from emberfs import *", names)
    assert set(emberfs.__all__) == set(dir(emberfs)) <= names.keys()
    assert emberfs.connect is emberfs.opening.connect
    with pytest.raises(AttributeError, match="module 'emberfs' has no attribute 'conect'"):
        _ = emberfs.conect


@pytest.mark.parametrize("code", ["import emberfs.checksum", "from emberfs import EmberError, Inode"])
def test_who_wants_no_store_does_not_import_what_opens_one(code: str) -> None:
    assert "emberfs.client" not in imported_by(code)
    assert "emberfs.client" in imported_by(f"{code}; from emberfs import connect")


@pytest.mark.parametrize("module", ["client.core", "embedded", "filesystem", "opening", "sharing.attached", "stores"])
def test_a_module_may_be_the_first_one_that_is_imported(module: str) -> None:
    subprocess.run([sys.executable, "-c", f"import emberfs.{module}"], check=True)
