"""A trace against a service with bytes hits what is simulated for its room. Run: pytest tests/kvcache/test_replay.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import emberkv
import pytest
from emberkv.operator import Operator
from emberkv.replay import replay_namespace
from emberkv.trace import Trace, trace_lines

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.serving import Server
from tests.kvcache.traces import CONVERSATIONS, chat_requests

PAGE = 4096
REQUESTS = 130


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"".join(trace_lines(chat_requests(seed=7, requests=REQUESTS))))
    return path


def room_for(pages: int, page_bytes: int) -> int:
    """A capacity whose live share has room for so many pages."""
    return (pages * (page_bytes + 96) * 10) // 9 + 10


def test_with_room_for_all_it_hits_all_that_can(serve: Callable[..., Server], trace: Path) -> None:
    address = serve().address
    told, simulated = (
        *emberline_json("kv", "replay", trace, address, "--page", PAGE, "--model", "deepseek-v3", "--price-miss", "1"),
        *emberline_json("kv", "simulate", trace, "--model", "deepseek-v3", "--price-miss", "1"),
    )
    end = simulated["infinite"]
    for name in ("pages", "hit_pages", "tokens", "hit_tokens", "hit_requests", "saved_flops", "saved_money"):
        assert told[name] == end[name]
    assert (told["lost_pages"], told["wrong_pages"], told["evicted_pages"]) == (0, 0, 0)
    assert told["puts"] == {"stored": end["stored"]}
    assert told["read_bytes"] == end["hit_pages"] * PAGE
    assert told["latency"]["match"]["calls"] == REQUESTS
    with Operator(address) as operator:
        (figures,) = operator.stat()["namespaces"].values()
    assert figures["pages"] == 0, "it takes out what it put"


def test_with_less_room_it_hits_what_is_simulated(serve: Callable[..., Server], trace: Path) -> None:
    # Of 400 pages that there are. Smaller ones leave more of a segment empty than is thought of for live pages.
    address = serve(capacity_bytes=room_for(200, 16384)).address
    (told,) = emberline_json("kv", "replay", trace, address, "--page", "16384")
    simulated = told["simulated"]
    assert simulated["evicted"] > 100 and told["evicted_pages"] > 100
    assert abs(told["page_rate"] - simulated["page_rate"]) <= 0.005
    assert abs(told["token_rate"] - simulated["token_rate"]) <= 0.005
    assert (told["lost_pages"], told["wrong_pages"]) == (0, 0)


def test_it_is_told_for_people(serve: Callable[..., Server], trace: Path) -> None:
    address = serve().address
    said = emberline("kv", "replay", trace, address, "--page", PAGE, "--requests", "50", "--price-miss", "1").stdout
    for part in ("hit ", "simulated ", "0 lost, 0 wrong", "evicted ", "in money", "p99"):
        assert part in said
    namespace = replay_namespace(Trace((), 512), PAGE)
    with emberkv.connect(address, namespace) as cache:
        cache.put(cache.keys(range(512)), [bytes(PAGE)])
        cache.flush()
        message = emberline("kv", "replay", trace, address, "--page", PAGE, code=1).stderr
        assert f"pages of another replay: emberline kv drop {namespace.name}" in message


def test_an_excerpt_of_the_published_trace(serve: Callable[..., Server], tmp_path: Path) -> None:
    if not CONVERSATIONS.exists():
        pytest.skip("the conversation trace is not beside the repository")
    address = serve(capacity_bytes=room_for(1000, 16384)).address
    (told,) = emberline_json("kv", "replay", CONVERSATIONS, address, "--requests", "150")
    assert told["simulated"]["capacity"] == 1000 and told["simulated"]["evicted"] > 2000
    assert abs(told["page_rate"] - told["simulated"]["page_rate"]) <= 0.005
    assert (told["lost_pages"], told["wrong_pages"]) == (0, 0)
