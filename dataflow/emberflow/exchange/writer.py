"""Writes an exchange file: rows come in with the partition each belongs to, and go out as blocks of one partition.

Rows are held until there are `buffer_bytes` of them, then put in order of partition (a radix sort of 8 or 16-bit
numbers, one `take`) and written. So the rows of one partition keep the order they came in, a block is as large as the
buffer allows, and memory is bounded: the rows held, their sorted copy, and one block.

Batches larger than the buffer are cut before anything is copied. `take` and `concat` therefore never see more than
the buffer, or one row, and cannot overflow the 32-bit offsets of Arrow's short strings, lists and maps.

Does not know: how partitions are chosen, nor when the file gets its name; opening and closing it is its owner's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from emberfs.checksum import crc32c
from numpy.typing import NDArray

from ..errors import InvalidArgument
from ..plan.nodes import Column
from .format import ALIGNMENT_BYTES, HEAD, PARTITIONS_MAX, Block, ExchangeIndex, encode_footer, pack_blocks

Compression: TypeAlias = Literal["lz4"]

BUFFER_BYTES_MIN, BUFFER_BYTES = 16 * 1024 * 1024, 64 * 1024 * 1024
"""Of the rows that are held: fewer are put into order nearer to the processor, more make larger blocks."""
PARTITION_BYTES = 1024 * 1024
"""What a partition may have of them; a block of so much is read about as fast as a larger one."""
BLOCK_BYTES_MAX = 16 * 1024 * 1024
"""Of the rows in memory. A reader holds a few blocks; beyond this size larger ones are not faster."""
WRITE_BYTES = 256 * 1024
"""Smaller blocks go out together: a call of the file costs more than to copy them."""
BUFFER_BYTES_MAX = 1024 * 1024 * 1024
assert BUFFER_BYTES_MAX < 2**31, "what is sorted at once has to fit 32-bit offsets"


class ExchangeWriter:
    """Writes one exchange file. Not for several threads at once."""

    def __init__(
        self,
        file: IO[bytes],
        *,
        schema: pa.Schema,
        columns: Sequence[Column],
        num_partitions: int,
        compression: Compression | None = None,
        buffer_bytes: int | None = None,
    ) -> None:
        """`schema` is that of the batches, `columns` what they were in DuckDB before `types.sent`. `buffer_bytes` of
        rows are held; None: as many as suit the number of partitions."""
        assert len(columns) == len(schema)
        if not 1 <= num_partitions <= PARTITIONS_MAX:
            raise InvalidArgument(f"an exchange has 1 to {PARTITIONS_MAX} partitions, not {num_partitions}")
        if buffer_bytes is None:
            buffer_bytes = min(max(BUFFER_BYTES_MIN, num_partitions * PARTITION_BYTES), BUFFER_BYTES)
        if not 1 <= buffer_bytes <= BUFFER_BYTES_MAX:
            raise InvalidArgument(f"buffer_bytes is from 1 to {BUFFER_BYTES_MAX}, not {buffer_bytes}")
        if any(_has_dictionary(field.type) for field in schema):
            raise InvalidArgument("an exchange holds no Arrow dictionaries: decode them first")
        self._file = file
        self._schema = schema
        self._columns = tuple(columns)
        self._num_partitions = num_partitions
        self._buffer_bytes = buffer_bytes
        # One thread: a task has the CPUs it was given, and its siblings the others.
        self._options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
        self._schema_message: bytes = schema.serialize().to_pybytes()
        # numpy's radix sort is for numbers of up to 16 bits.
        self._partition_type = np.uint8 if num_partitions <= 256 else np.uint16
        self._held: list[tuple[pa.RecordBatch, NDArray[Any]]] = []
        self._held_bytes = 0
        self._blocks: list[Block] = []
        self._offset = len(HEAD)
        self._waiting: list[bytes | pa.Buffer] = [HEAD]
        self._waiting_bytes = len(HEAD)

    def write(self, batch: pa.RecordBatch, partitions: NDArray[Any] | pa.Array | None) -> None:
        """Adds rows. `partitions` has a number below `num_partitions` for each; None is partition 0 for all."""
        assert batch.schema.equals(self._schema), f"{batch.schema} is not {self._schema}"
        numbers = self._partition_numbers(batch.num_rows, partitions)
        start = 0
        for piece in _cut(batch, self._buffer_bytes):
            size_bytes = piece.nbytes
            if self._held_bytes + size_bytes > self._buffer_bytes:
                self._flush()
            self._held.append((piece, numbers[start : start + piece.num_rows]))
            self._held_bytes += size_bytes
            start += piece.num_rows

    def close(self) -> ExchangeIndex:
        """Writes what is held and the footer. The file is complete, but not closed."""
        self._flush()
        index = ExchangeIndex(
            schema=self._schema_message,
            columns=self._columns,
            num_partitions=self._num_partitions,
            packed_blocks=pack_blocks(self._blocks),
        )
        self._put(encode_footer(index))
        self._write_waiting()
        return index

    def _partition_numbers(self, num_rows: int, partitions: NDArray[Any] | pa.Array | None) -> NDArray[Any]:
        if partitions is None:
            return np.zeros(num_rows, dtype=self._partition_type)
        if isinstance(partitions, pa.Array):
            assert partitions.null_count == 0
            # Unlike Array.to_numpy, and pa.array below, it does not import pandas: half a second of a new worker.
            partitions = np.from_dlpack(partitions)
        assert len(partitions) == num_rows
        if num_rows and not (partitions.min() >= 0 and partitions.max() < self._num_partitions):
            raise InvalidArgument(
                f"partition numbers are from 0 to {self._num_partitions - 1}, not {partitions.min()} to "
                f"{partitions.max()}"
            )
        return partitions.astype(self._partition_type)

    def _flush(self) -> None:
        """Writes the rows held, partition by partition."""
        held, self._held, self._held_bytes = self._held, [], 0
        held = [(batch, numbers) for batch, numbers in held if batch.num_rows]
        if not held:
            return
        batch = pa.concat_batches([batch for batch, _ in held]) if len(held) > 1 else held[0][0]
        numbers = np.concatenate([numbers for _, numbers in held])
        del held  # The copy is enough; this halves what a flush needs.
        counts = np.bincount(numbers)
        present = np.flatnonzero(counts)
        if len(present) > 1:
            order = pa.py_buffer(np.argsort(numbers, kind="stable").astype(np.int64, copy=False))
            batch = batch.take(pa.Array.from_buffers(pa.int64(), len(numbers), [None, order]))
        start = 0
        for partition in present.tolist():
            count = int(counts[partition])
            for piece in _cut(batch.slice(start, count), BLOCK_BYTES_MAX):
                self._write_block(partition, piece)
            start += count

    def _write_block(self, partition: int, rows: pa.RecordBatch) -> None:
        sink = pa.BufferOutputStream()
        stream = pa.ipc.new_stream(sink, self._schema, options=self._options)
        stream.write_batch(rows)
        # A stream begins with the schema, which is in the footer. Its end is not written: the index has the length.
        length = sink.tell() - len(self._schema_message)
        sink.write(bytes(-length % ALIGNMENT_BYTES))
        block = sink.getvalue()[len(self._schema_message) :]
        self._blocks.append(Block(partition, rows.num_rows, self._offset, len(block), crc32c(block)))
        self._offset += len(block)
        self._put(block)

    def _put(self, piece: bytes | pa.Buffer) -> None:
        """Writes it, at the latest when the file is complete."""
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes >= WRITE_BYTES:
            self._write_waiting()

    def _write_waiting(self) -> None:
        small, self._waiting, self._waiting_bytes = self._waiting, [], 0
        large = small.pop() if small and len(small[-1]) >= WRITE_BYTES else None
        if small:
            self._file.write(b"".join(map(memoryview, small)))
        if large is not None:
            self._file.write(memoryview(large))


def _cut(batch: pa.RecordBatch, bytes_max: int) -> Iterator[pa.RecordBatch]:
    """The rows in pieces of at most `bytes_max`, or of one row."""
    if batch.num_rows <= 1 or batch.nbytes <= bytes_max:
        yield batch
        return
    half = batch.num_rows // 2
    yield from _cut(batch.slice(0, half), bytes_max)
    yield from _cut(batch.slice(half), bytes_max)


def _has_dictionary(type_: pa.DataType) -> bool:
    if isinstance(type_, pa.BaseExtensionType):
        return _has_dictionary(type_.storage_type)
    if pa.types.is_dictionary(type_):
        return True
    return any(_has_dictionary(type_.field(i).type) for i in range(type_.num_fields))
