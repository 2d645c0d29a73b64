"""Long contexts: what a prompt needs besides weights and cache, and what a cache needs for a token.

Run: pytest tests/trainer/test_long_context.py. EMBERLINE_LONG=1 adds the sizes that are too large for every day: 11 GiB
of memory, and some minutes.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20
long = pytest.mark.skipif(not os.environ.get("EMBERLINE_LONG"), reason="EMBERLINE_LONG=1 runs it")


def probe(*arguments: str, timeout_s: float = 250) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainer.memory_probe", *arguments],
        cwd=ROOT, check=True, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_long_prompt_needs_little_besides_its_cache() -> None:
    found = probe("prefill", "16384")
    assert found["bytes"] <= 512 * MIB
    assert len(found["seconds"]) == 32


@long
@pytest.mark.timeout(3600)
def test_a_prompt_of_131072_tokens_needs_no_more_than_one_of_32768() -> None:
    short, full = (probe("prefill", str(n), timeout_s=3000) for n in (32_768, 131_072))
    assert full["bytes"] <= 512 * MIB
    assert full["bytes"] <= 1.05 * short["bytes"]
    seconds = full["seconds"]
    quarters = [sum(seconds[i : i + 64]) for i in range(0, 256, 64)]
    steps = [b - a for a, b in itertools.pairwise(quarters)]
    assert max(steps) < 2 * max(min(steps), 0.05 * quarters[0]), "a chunk's time grows faster than its position"


@pytest.mark.parametrize(
    ("name", "tokens", "token_bytes"),
    [
        ("v4-pro", 32_768, 9856),
        ("v4-flash", 32_768, 6885),
        ("v3.2", 4096, 85_888),
        pytest.param("v4-pro", 1_048_576, 9856, marks=long),
        pytest.param("v4-flash", 1_048_576, 6885, marks=long),
        pytest.param("v3.2", 65_536, 85_888, marks=long),
    ],
)
def test_a_cache_takes_the_published_bytes_a_token(name: str, tokens: int, token_bytes: float) -> None:
    found = probe("cache", name, str(tokens))
    assert (found["pools"] - found["rings"]) / tokens == pytest.approx(token_bytes, rel=0.001)
    rings = 0 if tokens >= 65_536 else found["rings"]  # of a sequence, however long
    assert (found["bytes"] - rings) / tokens == pytest.approx(token_bytes, rel=0.02)
