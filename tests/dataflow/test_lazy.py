"""The names that `import emberflow` gives. Run: pytest tests/dataflow"""

from __future__ import annotations

import ast
from pathlib import Path

import emberflow
import pytest


def test_type_checkers_are_told_what_is_there() -> None:
    stub = ast.parse(Path(emberflow.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    told = {alias.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) and node.level
            for alias in node.names}  # fmt: skip
    assert sorted(told) == emberflow.__all__ == dir(emberflow)
    for name, module in told.items():
        found = getattr(emberflow, name)
        assert found.__module__ == f"emberflow.{module}"


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'emberflow' has no attribute 'Sesion'"):
        _ = emberflow.Sesion  # type: ignore[attr-defined]
