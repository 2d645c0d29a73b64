"""TPC-H: its tables as Parquet, and the texts of its 22 queries. Fetched and made when first asked for, then kept.

Both come from packages that are unpacked into a folder of their own and never installed: the tables from
`tpchgen-cli`, a program; the texts from DuckDB's extension `tpch`, which fits DuckDB 1.4.4 only and so is asked in a
process that has that one.

Invariant: what is there is complete, since it is made beside its place and moved there.

Does not know: who runs the queries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".bench" / "tpch"
PACKAGES = ("tpchgen-cli==4.0.0", "duckdb==1.4.4", "duckdb-ext-tpch==1.4.4.20260205")
FETCH_TIMEOUT_S = 120
TABLES = ("customer", "lineitem", "nation", "orders", "part", "partsupp", "region", "supplier")
PARTS = 8

_ASK_FOR_TEXTS = """
import duckdb, json, sys
from pathlib import Path
extension = next(Path(sys.argv[1]).glob("duckdb_ext/extensions/*/*/tpch.duckdb_extension"))
connection = duckdb.connect(config={"allow_unsigned_extensions": "true"})
connection.execute(f"LOAD '{extension}'")
print(json.dumps(connection.execute("SELECT query_nr, query FROM tpch_queries() ORDER BY query_nr").fetchall()))
"""


class CannotFetch(Exception):
    """The packages that TPC-H is made with did not come."""


def queries() -> dict[int, str]:
    """The texts by their numbers, 1 to 22, in DuckDB's SQL. Raises CannotFetch."""

    def make(place: Path) -> None:
        packages = _packages()
        command = [sys.executable, "-S", "-c", _ASK_FOR_TEXTS, str(packages)]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(packages)}, check=True, stdout=subprocess.PIPE
        )
        place.write_bytes(done.stdout)

    return {int(number): text for number, text in json.loads(_kept("queries.json", make).read_text())}


def data(scale_factor: float, *, parts: int = PARTS) -> dict[str, list[str]]:
    """Paths of the Parquet files of each table, `parts` of them but for nation and region, which have one.

    1 is 6 million rows of lineitem, 350 MB in sum. Raises CannotFetch.
    """

    def make(place: Path) -> None:
        program = _packages() / "bin" / "tpchgen-cli"
        options = ["--scale-factor", f"{scale_factor:g}", "--parts", str(parts), "--output-dir", str(place)]
        subprocess.run([program, "parquet", "--quiet", *options], check=True)

    directory = _kept(f"sf{scale_factor:g}-{parts}", make)
    files = {table: [str(path) for path in sorted((directory / table).iterdir())] for table in TABLES}
    assert all(files.values()), f"a table without files in {directory}"
    return files


def _packages() -> Path:
    """The folder with the unpacked packages."""

    def make(place: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            subprocess.run(
                [*command, "--target", str(place), *PACKAGES],
                check=True,
                capture_output=True,
                text=True,
                timeout=FETCH_TIMEOUT_S,
            )
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            what = f"TPC-H needs {', '.join(PACKAGES)} from the package index, and pip could not fetch them"
            raise CannotFetch(f"{what}: {error.stderr!s}") from None

    return _kept("packages", make)


def _kept(name: str, make: Callable[[Path], None]) -> Path:
    """`CACHE / name`, made first if it is not there. Two who make it at once each make it, and the first one counts."""
    place = CACHE / name
    if not place.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=CACHE) as beside:
            made = Path(beside) / name
            make(made)
            try:
                made.rename(place)
            except OSError:
                if not place.exists():
                    raise
    return place
