"""Traces for tests: a small one made from a seed, and the published one where it lies beside the repository."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
from emberkv.trace import PAGE_TOKENS, Request, Trace, read_trace

CONVERSATIONS = Path(__file__).parents[3] / "shared" / "data" / "traces" / "conversation_trace.jsonl"
"""12,031 requests of Mooncake's conversation trace. Not in the repository."""


def chat_requests(seed: int, *, requests: int = 400, page_tokens: int = PAGE_TOKENS) -> list[Request]:
    """Conversations of several turns, each turn with all before it, over a few system prompts."""
    rng = random.Random(seed)
    ids: dict[tuple[int, tuple[int, ...]], int] = {}
    chats: list[list[int]] = []
    found = []
    for number in range(requests):
        if not chats or rng.random() < 0.4:
            chats.append([-1 - rng.randrange(3)] * 2 * page_tokens)
        chat = chats[-1 - min(int(rng.expovariate(0.3)), len(chats) - 1)]
        chat += [number] * rng.randrange(1, 4 * page_tokens)
        pages: list[int] = []
        for start in range(0, len(chat), page_tokens):
            prefix = (pages[-1] if pages else -1, tuple(chat[start : start + page_tokens]))
            pages.append(ids.setdefault(prefix, len(ids)))
        output = rng.randrange(1, page_tokens)
        found.append(Request(number * 100, len(chat), output, tuple(pages)))
        chat += [number] * output
    return found


def chat_trace(seed: int, *, requests: int = 400) -> Trace:
    return Trace(tuple(chat_requests(seed, requests=requests)), PAGE_TOKENS)


@cache
def conversations() -> Trace:
    if not CONVERSATIONS.exists():
        pytest.skip("the conversation trace is not beside the repository")
    with CONVERSATIONS.open("rb") as file:
        return read_trace(file)
