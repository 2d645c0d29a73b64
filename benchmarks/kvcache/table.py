"""The index of a service with 1M pages and more, without the pages: its memory, and how long a look-up takes."""

from __future__ import annotations

import json
import subprocess
import sys

from ..runner import Row


def table_rows(pages: int) -> list[Row]:
    """For information: there is no goal."""
    command = [sys.executable, "-m", "benchmarks.kvcache.table_probe", str(pages)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    among = f"{pages:,} pages"
    return [
        Row(row=f"memory of a page among {among}, bytes", ours=found["page_bytes"]),
        Row(row=f"match of 128 pages among {among}, median us", ours=found["median_us"]),
        Row(row=f"match of 128 pages among {among}, p99 us", ours=found["p99_us"]),
    ]
