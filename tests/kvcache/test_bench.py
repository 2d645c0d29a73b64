"""`emberline kv bench`: it finds what it put, tells its rate, and leaves nothing.

Run: pytest tests/kvcache/test_bench.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from emberkv.operator import Operator

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.serving import Server


def test_several_processes_put_match_and_read(serve: Callable[..., Server]) -> None:
    address = serve().address
    small = ("--page", "16KiB", "--data", "2MiB", "--seconds", "0.2")
    rows = {row["phase"]: row for row in emberline_json("kv", "bench", address, *small)}
    assert rows["put"]["count"] == 2 * 128
    assert rows["get"]["bytes_per_s"] == rows["get"]["per_s"] * 16384 > 0
    assert rows["match"]["count"] == 64 * rows["match"]["calls"] > 0
    with Operator(address) as operator:
        (figures,) = operator.stat()["namespaces"].values()
    assert figures["live_bytes"] == 0
    assert figures["counts"]["matched_pages"] == figures["counts"]["asked_pages"]


def test_what_has_no_room_and_what_is_not_there_is_said(serve: Callable[..., Server]) -> None:
    server = serve(capacity_bytes=4 << 20)
    said = emberline("kv", "bench", server.address, "--processes", "1", "--page", "16KiB", "--data", "8MiB",
                     "--seconds", "0.1")  # fmt: skip
    assert "put pages" in said.stdout
    message = emberline("kv", "bench", server.address, "--processes", "2", "--page", "1MiB", code=1).stderr
    assert "LimitExceeded: a page of 1048576 bytes" in message


def test_an_interrupted_one_says_so_and_leaves_nothing(serve: Callable[..., Server]) -> None:
    address = serve().address
    command = [sys.executable, "-m", "emberline", "kv", "bench", address, "--data", "1MiB", "--seconds", "600"]
    bench = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    with Operator(address) as operator:
        while not any(each["counts"]["matches"] for each in operator.stat()["namespaces"].values()):
            pass
        os.killpg(bench.pid, signal.SIGINT)  # As a terminal does.
        said = bench.communicate(timeout=60)[1]
        (figures,) = operator.stat()["namespaces"].values()
    assert bench.returncode == 130 and figures["live_bytes"] == 0
    assert "Traceback" not in said and said.endswith("interrupted\n")
