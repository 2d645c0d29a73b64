"""Traces of requests: what was asked when, and which of its pages it had in common with others. No texts.

The format is Mooncake's (FAST'25), JSON Lines: `timestamp` in milliseconds, `input_length` and `output_length` in
tokens, and `hash_ids`, a number for each page of the input, the short last one too. More fields are allowed.

Invariant of a trace that was read: ids are of chained prefixes, that is, each has one and the same id before it
wherever it occurs. Two requests then share a prefix exactly as far as their ids are equal.

Does not know: files; it is handed lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import msgspec

from .errors import TraceFormat

PAGE_TOKENS = 512
"""Of Mooncake's traces."""

_FIRST = -1
"""Stands before the first page of a request. No id is negative."""


class Request(msgspec.Struct, frozen=True, rename={"at_ms": "timestamp", "input_tokens": "input_length",
                                                   "output_tokens": "output_length", "pages": "hash_ids"}):  # fmt: skip
    """One request."""

    at_ms: float
    input_tokens: int
    output_tokens: int
    pages: tuple[int, ...]

    def whole_pages(self, page_tokens: int) -> int:
        """How many of its pages are full."""
        return self.input_tokens // page_tokens

    def tokens_of(self, pages: int, page_tokens: int) -> int:
        """The tokens in its first `pages` pages."""
        return min(pages * page_tokens, self.input_tokens)


@dataclass(frozen=True)
class Trace:
    """Requests in the order of their arrival."""

    requests: tuple[Request, ...]
    page_tokens: int

    @cached_property
    def pages(self) -> int:
        return sum(len(request.pages) for request in self.requests)

    @cached_property
    def unique_pages(self) -> int:
        return len({page for request in self.requests for page in request.pages})

    @cached_property
    def input_tokens(self) -> int:
        return sum(request.input_tokens for request in self.requests)

    @cached_property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.requests)

    @property
    def span_s(self) -> float:
        """From the first request to the last."""
        return (self.requests[-1].at_ms - self.requests[0].at_ms) / 1000 if self.requests else 0.0


def read_trace(lines: Iterable[bytes | str], *, page_tokens: int = PAGE_TOKENS) -> Trace:
    """The trace in `lines`; empty ones are passed over. Raises TraceFormat with the number of the line."""
    decoder = msgspec.json.Decoder(Request)
    before: dict[int, int] = {}
    requests: list[Request] = []
    number = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            request = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise TraceFormat(str(error), number) from error
        _check(request, page_tokens, number)
        _check_chain(request.pages, before, number)
        if requests and request.at_ms < requests[-1].at_ms:
            raise TraceFormat(f"timestamp {request.at_ms:g} is before that of the request above it", number)
        requests.append(request)
    if not requests:
        raise TraceFormat(f"there is no request in {number} lines")
    return Trace(tuple(requests), page_tokens)


def _check(request: Request, page_tokens: int, number: int) -> None:
    if request.at_ms < 0 or request.input_tokens < 1 or request.output_tokens < 0:
        raise TraceFormat("timestamp and output_length are from 0, input_length from 1", number)
    expected = -(-request.input_tokens // page_tokens)
    if len(request.pages) != expected:
        raise TraceFormat(
            f"{request.input_tokens:,} tokens are {expected:,} pages of {page_tokens}, and there are "
            f"{len(request.pages):,} hash_ids: does this trace have other pages?",
            number,
        )


def _check_chain(pages: tuple[int, ...], before: dict[int, int], number: int) -> None:
    previous = _FIRST
    for page in pages:
        if page < 0:
            raise TraceFormat(f"hash id {page} is negative", number)
        known = before.setdefault(page, previous)
        if known != previous:
            places = ["at the start" if id == _FIRST else f"after {id}" for id in (previous, known)]
            raise TraceFormat(
                f"hash id {page} is {places[0]} here, and was {places[1]} before: not of a prefix", number
            )
        previous = page


def trace_lines(requests: Iterable[Request]) -> Iterator[bytes]:
    """The lines of a trace of these requests."""
    encoder = msgspec.json.Encoder()
    for request in requests:
        yield encoder.encode(request) + b"\n"
