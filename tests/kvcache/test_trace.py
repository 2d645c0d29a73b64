"""Reading a trace: what is in it, and what is wrong with a bad one. Run: pytest tests/kvcache/test_trace.py"""

from __future__ import annotations

import pickle

import pytest
from emberkv.errors import TraceFormat
from emberkv.trace import Request, read_trace, trace_lines

from tests.kvcache.traces import chat_requests, conversations

LINE = '{"timestamp": 27000, "input_length": 1030, "output_length": 52, "hash_ids": [46, 47, 48], "type": "chat"}'


def test_a_line_is_a_request() -> None:
    trace = read_trace([LINE, "\n", b'{"timestamp":27018,"input_length":512,"output_length":0,"hash_ids":[46]}'])
    assert trace.requests[0] == Request(27000, 1030, 52, (46, 47, 48))
    assert (trace.pages, trace.unique_pages, trace.input_tokens, trace.output_tokens) == (4, 3, 1542, 52)
    assert trace.span_s == 0.018
    assert trace.requests[0].whole_pages(512) == 2
    assert [trace.requests[0].tokens_of(pages, 512) for pages in range(4)] == [0, 512, 1024, 1030]


def test_a_trace_that_was_written_reads_the_same() -> None:
    requests = chat_requests(seed=1, requests=50)
    assert list(read_trace(trace_lines(requests)).requests) == requests


def test_pages_may_have_another_size() -> None:
    line = '{"timestamp": 0, "input_length": 33, "output_length": 1, "hash_ids": [1, 2, 3]}'
    assert read_trace([line], page_tokens=16).pages == 3


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nonsense", "line 2: JSON is malformed"),
        (b"\xff", "line 2: "),
        ("[]", "line 2: Expected `object`"),
        ('{"timestamp": 30000, "input_length": 1, "output_length": 1}', "missing required field `hash_ids`"),
        (LINE.replace("48", '"x"'), "line 2: Expected `int`"),
        (LINE.replace("1030", "1600"), "line 2: 1,600 tokens are 4 pages of 512, and there are 3 hash_ids"),
        (LINE.replace("1030", "0"), "input_length from 1"),
        (LINE.replace("48", "-1"), "line 2: hash id -1 is negative"),
        (LINE.replace("[46, 47, 48]", "[46, 48, 47]"), "hash id 48 is after 46 here, and was after 47 before"),
        (LINE.replace("[46, 47, 48]", "[47, 46, 48]"), "hash id 47 is at the start here, and was after 46 before"),
        (LINE.replace("27000", "26999"), "timestamp 26999 is before"),
    ],
)
def test_a_bad_line_is_named(line: str | bytes, complaint: str) -> None:
    with pytest.raises(TraceFormat) as caught:
        read_trace([LINE, line])
    assert complaint in str(caught.value)
    assert caught.value.line == 2
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line) == (str(caught.value), 2)


def test_no_request_is_no_trace() -> None:
    with pytest.raises(TraceFormat, match="no request in 1 lines"):
        read_trace(["\n"])


def test_the_conversation_trace_is_one() -> None:
    trace = conversations()
    assert (len(trace.requests), trace.pages, trace.unique_pages) == (12_031, 288_500, 182_790)
