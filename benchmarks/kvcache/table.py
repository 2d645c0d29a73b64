"""The index of a service with 1M pages, without the pages: its memory, and how long it takes to find a prefix in it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from ..runner import Row

if TYPE_CHECKING:
    from .rows import Size


def table_rows(size: Size) -> list[Row]:
    """For information: there is no goal."""
    command = [sys.executable, "-m", "benchmarks.kvcache.table_probe", str(size.table_pages)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    among = f"{size.table_pages:,} pages"
    return [
        Row(row=f"memory of a page among {among}, bytes", ours=found["page_bytes"]),
        Row(row=f"match of 128 pages among {among}, median us", ours=found["median_us"]),
        Row(row=f"match of 128 pages among {among}, p99 us", ours=found["p99_us"]),
    ]
