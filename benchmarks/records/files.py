"""Records in files: Parquet with the text columns `key` and `payload`, or the bare 100 bytes one after the other.

Files are named by paths or by fsspec URLs; those whose name ends in `.raw` are bare. Parquet may hold other columns
beside the two (a partition's number), which are not records' business.

Does not know: what is in a record, or in which order they should be.
"""

from __future__ import annotations

from collections.abc import Iterator

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..runner import verify
from .generator import KEY_BYTES, NULL_KEY, RECORD_BYTES, Records

BATCH_RECORDS = 1 << 18
"""In memory at a time, when files are read: 25 MiB."""
PAYLOAD_BYTES = RECORD_BYTES - KEY_BYTES
COLUMNS = {"key": KEY_BYTES, "payload": PAYLOAD_BYTES}


def write_records(path: str, batches: Iterator[Records]) -> None:
    """One file, compressed with snappy if it is Parquet."""
    if path.endswith(".raw"):
        with fsspec.open(path, "wb") as file:
            for records in batches:
                file.write(records.tobytes())
        return
    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    # A dictionary of keys that are all different would only be thrown away.
    with (
        fsspec.open(path, "wb") as file,
        pq.ParquetWriter(file, schema, compression="snappy", use_dictionary=False) as writer,
    ):
        for records in batches:
            writer.write_table(_table(records, schema))


def read_records(path: str) -> Iterator[Records]:
    """The records of a file, in its order, batch by batch. Raises WrongResult if a column is not of its length."""
    if path.endswith(".raw"):
        with fsspec.open(path, "rb") as file:
            while found := file.read(BATCH_RECORDS * RECORD_BYTES):
                verify(len(found) % RECORD_BYTES == 0, f"{path} ends within a record")
                yield np.frombuffer(found, np.uint8).reshape(-1, RECORD_BYTES)
        return
    with fsspec.open(path, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(BATCH_RECORDS, columns=list(COLUMNS)):
            records = np.empty((len(batch), RECORD_BYTES), np.uint8)
            records[:, :KEY_BYTES] = _characters(batch.column("key"), KEY_BYTES, NULL_KEY)
            records[:, KEY_BYTES:] = _characters(batch.column("payload"), PAYLOAD_BYTES, None)
            yield records


def _table(records: Records, schema: pa.Schema) -> pa.Table:
    columns, begin = [], 0
    for width in COLUMNS.values():
        characters = np.ascontiguousarray(records[:, begin : begin + width])
        ends = np.arange(0, characters.size + 1, width, dtype=np.int32)
        columns.append(pa.StringArray.from_buffers(len(records), pa.py_buffer(ends), pa.py_buffer(characters)))
        begin += width
    is_null = (records[:, :KEY_BYTES] == np.frombuffer(NULL_KEY, np.uint8)).all(axis=1)
    if is_null.any():
        valid = pa.py_buffer(np.packbits(~is_null, bitorder="little"))
        buffers = columns[0].buffers()
        columns[0] = pa.StringArray.from_buffers(len(records), buffers[1], buffers[2], valid)
    return pa.Table.from_arrays(columns, schema=schema)


def _characters(column: pa.Array, width: int, null: bytes | None) -> Records:
    """A column of texts of `width` bytes as rows. Text comes as string, large_string or string_view, by its writer."""
    texts = column.cast(pa.large_binary())
    if texts.null_count:
        verify(null is not None, "a payload is NULL")
        texts = texts.fill_null(null)
    ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    verify(bool((np.diff(ends) == width).all()), f"a text is not of {width} bytes")
    data = texts.buffers()[2] or b""
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].reshape(-1, width)
