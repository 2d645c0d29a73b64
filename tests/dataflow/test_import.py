"""`import emberflow` takes no longer than it has to: each small job, and each worker, waits for it."""

from __future__ import annotations

import json
import subprocess
import sys

from emberfs.checksum import HAS_INSTRUCTIONS

PROGRAM = """
import json, sys
import emberflow
with emberflow.init() as session:
    rows = session.sql("SELECT count(*) FROM range(8)").take_all()
slow = {"awscrt", "pandas", "pyarrow.compute", "pyarrow.dataset", "ray"}
print(json.dumps([rows, sorted(slow & sys.modules.keys())]))
"""


def test_a_small_query_imports_nothing_that_is_slow_and_not_needed() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    (row,), slow = json.loads(done.stdout)
    assert list(row.values()) == [8]
    assert slow == ([] if HAS_INSTRUCTIONS else ["awscrt"])
