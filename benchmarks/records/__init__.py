"""Records of 100 bytes to sort, and the proof that they are sorted: what gensort and valsort are to Sort Benchmark."""

from .dataset import Dataset, make_dataset
from .files import read_records, write_records
from .generator import KEY_BYTES, RECORD_BYTES, Keys, make_records
from .summary import Summary, processes_for, summarize, summarize_records

__all__ = [
    "KEY_BYTES",
    "RECORD_BYTES",
    "Dataset",
    "Keys",
    "Summary",
    "make_dataset",
    "make_records",
    "processes_for",
    "read_records",
    "summarize",
    "summarize_records",
    "write_records",
]
