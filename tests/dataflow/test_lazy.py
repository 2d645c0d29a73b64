"""The names that `import emberflow` gives. Run: pytest tests/dataflow"""

from __future__ import annotations

import ast
from pathlib import Path

import emberflow
import pytest


def test_every_name_is_there_and_said_to_be() -> None:
    stub = ast.parse(Path(emberflow.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    (listed,) = (node.value for node in stub.body if isinstance(node, ast.Assign))
    assert emberflow.__all__ == dir(emberflow) == sorted(ast.literal_eval(listed))
    for name in emberflow.__all__:
        assert getattr(emberflow, name).__module__.startswith("emberflow.")


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'emberflow' has no attribute 'Sesion'"):
        _ = emberflow.Sesion  # type: ignore[attr-defined]
