"""The hash of partitions that outlive a job. Its vectors are in docs/formats.md too, and never change."""

from __future__ import annotations

import decimal
import struct
import uuid
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from emberflow.errors import UnsupportedType
from emberflow.exchange import SETTINGS, hash_columns, partition_of
from emberflow.exchange.hashing import NULL_HASH, xxh64
from hypothesis import example, given, settings
from hypothesis import strategies as st

# Of the reference implementation, xxHash 0.8.
XXH64 = [
    (b"", 0xEF46DB3751D8E999),
    (b"a", 0xD24EC4F1A98C6E5B),
    (b"abc", 0x44BC2CF5AD770999),
    (b"Nobody inspects the spammish repetition", 0xFBCEA83C8A378BF1),
    (bytes(range(64)), 0xF7C67301DB6713F0),
    (bytes(range(100)), 0x6AC1E58032166597),
]

VECTORS: list[tuple[list[tuple[pa.DataType, Any]], int]] = [
    ([(pa.int64(), 0)], 0x34C96ACDCADB1BBB),
    ([(pa.int64(), 1)], 0x9F29CB17A2A49995),
    ([(pa.int8(), -1)], 0x85D136ADB773C6C9),
    ([(pa.int64(), 2**63 - 1)], 0xFF70CC60366E770C),
    ([(pa.uint64(), 2**64 - 1)], 0x85D136ADB773C6C9),
    ([(pa.bool_(), True)], 0x9F29CB17A2A49995),
    ([(pa.decimal128(3, 2), Decimal("1.00"))], 0x9F29CB17A2A49995),
    ([(pa.decimal128(9, 3), Decimal("1.500"))], 0xB6489E4B241B238E),
    ([(pa.decimal128(4, 2), Decimal("-0.07"))], 0x9D13BB8778879B15),
    ([(pa.decimal128(38, 2), Decimal("12345678901234567890.12"))], 0xC6D20791A63B39E5),
    ([(pa.decimal128(38, 2), Decimal("12345678901234567890.00"))], 0xDBE8C2F2673720E3),
    ([(pa.decimal128(38, 0), Decimal(2**64))], 0x5522E3E91134A8FB),
    ([(pa.decimal128(38, 0), Decimal(-(2**64)))], 0x6538869068B9A265),
    ([(pa.float64(), -0.0)], 0x34C96ACDCADB1BBB),
    ([(pa.float32(), 1.5)], 0x49F7B96B6B5CCAF9),
    ([(pa.float64(), float("nan"))], 0xE9ADB09FEE122AAC),
    ([(pa.string(), "ünï ☃")], 0xD52477E4FDBD4453),
    ([(pa.date32(), date(2020, 2, 29))], 0x3DCEBBF96CD88B2B),
    ([(pa.timestamp("s"), datetime(2020, 2, 29))], 0x3DCEBBF96CD88B2B),
    ([(pa.timestamp("us"), datetime(1969, 12, 31, 23, 59, 59, 999_999))], 0x85D136ADB773C6C9),
    ([(pa.time64("us"), time(12, 34, 56, 500_000))], 0x1999F1C50DAF1E9F),
    ([(pa.binary(16), uuid.UUID("00112233-4455-6677-8899-aabbccddeeff").bytes)], 0x13C6635F71500F92),
    ([(pa.null(), None)], 0x9E3779B97F4A7C15),
    ([(pa.int32(), 1), (pa.string(), "a")], 0x709062132786B2BE),
    ([(pa.int32(), None), (pa.string(), "a")], 0x21A8A2830016E5DA),
    ([(pa.int32(), None), (pa.string(), None)], 0xDC5CCC52BA536D6D),
]


def hashes_of(values: list[Any], type_: pa.DataType) -> list[int]:
    hashes: list[int] = hash_columns([pa.array(values, type_)]).tolist()
    return hashes


@pytest.mark.parametrize(("value", "expected"), XXH64)
def test_bytes_hash_as_the_reference_says(value: bytes, expected: int) -> None:
    assert xxh64(value) == expected
    assert hashes_of([value, b"other", value], pa.binary())[::2] == [expected, expected]


@pytest.mark.parametrize(("row", "expected"), VECTORS, ids=str)
def test_published_vectors(row: list[tuple[pa.DataType, Any]], expected: int) -> None:
    assert hash_columns([pa.array([value], type_) for type_, value in row]).tolist() == [expected]


@given(st.lists(st.none() | st.binary(max_size=150), max_size=60), st.integers(0, 10))
@settings(max_examples=50, deadline=None)
def test_every_length_takes_the_same_way_as_one_by_one(values: list[bytes | None], start: int) -> None:
    expected = [NULL_HASH if value is None else xxh64(value) for value in values]
    for type_ in (pa.binary(), pa.large_binary(), pa.binary_view()):
        assert hash_columns([pa.array(values, type_).slice(start)]).tolist() == expected[start:]


def integer_bytes(value: int) -> bytes:
    return (
        (value % 2**64).to_bytes(8, "little")
        if -(2**63) <= value < 2**64
        else value.to_bytes(16, "little", signed=True)
    )


@given(st.lists(st.integers(-(10**30) + 1, 10**30 - 1) | st.integers(-(10**5), 10**5), min_size=1), st.integers(0, 8))
@example([2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 2**64 - 1, 0, 10], 0)
@settings(max_examples=50, deadline=None)
def test_decimals_hash_by_value(digits: list[int], scale: int) -> None:
    with decimal.localcontext(prec=60):
        values = [Decimal(d).scaleb(-scale) for d in digits]
        expected = []
        for value in values:
            normal = value.normalize().as_tuple()
            exponent = min(int(normal.exponent), 0)
            scaled = int(value.scaleb(-exponent))
            tail = b"" if exponent == 0 else bytes([-exponent])
            expected.append(xxh64(scaled.to_bytes(16, "little", signed=True) + tail if tail else integer_bytes(scaled)))
        assert hashes_of(values, pa.decimal128(38, scale)) == expected


@given(st.lists(st.floats(width=32), min_size=1))
@settings(max_examples=30, deadline=None)
def test_floats_of_both_widths_meet(values: list[float]) -> None:
    assert hashes_of(values, pa.float32()) == hashes_of(values, pa.float64())
    expected = [xxh64(struct.pack("<d", value + 0.0)) for value in values if value == value]
    assert hashes_of([value for value in values if value == value], pa.float64()) == expected


def test_integers_of_all_widths_meet() -> None:
    values = [0, 1, None, 100, 127]
    types = [
        f(bits)
        for bits in (8, 16, 32, 64)
        for f in (lambda b: getattr(pa, f"int{b}")(), lambda b: getattr(pa, f"uint{b}")())
    ]
    assert len({tuple(hashes_of(values, type_)) for type_ in types}) == 1


def test_every_nan_is_one() -> None:
    bits = np.array([0x7FF8000000000000, 0xFFF8000000000001, 0x7FF0000000000001], np.uint64)
    assert len(set(hash_columns([pa.array(bits.view(np.float64))]).tolist())) == 1


def test_what_duckdb_sends_has_a_hash() -> None:
    with duckdb.connect(config=dict(SETTINGS)) as connection:
        query = """SELECT 5::HUGEINT AS a, 5::UHUGEINT AS b, 5::TINYINT AS c, 5.00::DECIMAL(18, 2) AS d, true AS e,
            (-7)::HUGEINT AS f, -7 AS g,
            'infinity'::DATE AS h, 'infinity'::TIMESTAMP AS i, 'infinity'::TIMESTAMP_S AS j,
            '"x"'::JSON AS k, '"x"' AS l, uuid() AS m, 1 AS n"""
        relation = connection.sql(query)
        table = relation.to_arrow_table() if hasattr(relation, "to_arrow_table") else relation.fetch_arrow_table()
    h = {name: hash_columns([table[name]]).tolist() for name in table.column_names}
    assert h["a"] == h["b"] == h["c"] == h["d"]
    assert h["e"] == h["n"]
    assert h["f"] == h["g"]
    assert h["h"] == h["i"] == h["j"]
    assert h["k"] == h["l"]


def test_pieces_and_chunks_change_nothing() -> None:
    numbers = pa.array([None if n % 7 == 0 else n for n in range(100_000)])
    texts = pa.array([None if n % 5 == 0 else str(n) for n in range(100_000)])
    whole = hash_columns([numbers, texts])
    chunked = [pa.chunked_array([c.slice(0, 41), c.slice(41, 70_000), c.slice(70_041)]) for c in (numbers, texts)]
    assert (hash_columns(chunked) == whole).all()
    assert (hash_columns([numbers.slice(99_000), texts.slice(99_000)]) == whole[99_000:]).all()
    dictionary = texts.dictionary_encode()
    assert (hash_columns([numbers, dictionary]) == whole).all()
    assert len(hash_columns([pa.chunked_array([], pa.int8())])) == 0


@pytest.mark.parametrize("type_", [pa.list_(pa.int8()), pa.struct([("a", pa.int8())]), pa.month_day_nano_interval()])
def test_a_type_without_a_normal_form_is_refused(type_: pa.DataType) -> None:
    with pytest.raises(UnsupportedType, match="no hash is defined"):
        hashes_of([None], type_)


def test_partitions_are_the_upper_bits() -> None:
    hashes = np.array([0, 0xEF46DB3751D8E999, 2**64 - 1, NULL_HASH], np.uint64)
    assert partition_of(hashes, 1).tolist() == [0, 0, 0, 0]
    assert partition_of(hashes, 3).tolist() == [0, 2, 2, 1]
    assert partition_of(hashes, 16).tolist() == [0, 14, 15, 9]
    assert partition_of(hashes, 1000).tolist() == [0, 934, 999, 618]


def test_partitions_are_even() -> None:
    counts = np.bincount(partition_of(hash_columns([pa.array(np.arange(100_000))]), 10), minlength=10)
    assert counts.min() > 9_600
    assert counts.max() < 10_400
