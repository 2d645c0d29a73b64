"""A checkpoint on disk: `config.json`, and tensors in one or many safetensors files.

Files are mapped, not read: a tensor's bytes come in when it is looked at and go when `forget` is called, so that what a
checkpoint takes in memory is one tensor. Headers are believed only as far as they can be checked: every tensor must lie
inside its file and be as long as its shape says.

It does not know what the names mean.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"

HEADER_BYTES_MAX = 100_000_000
"""As in the safetensors library."""

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F4": torch.uint8,
    "BOOL": torch.bool,
}
"""In the order in which the safetensors library lays tensors out. F4 is two numbers a byte; torch sees the bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    file: str
    kind: str
    """Its dtype in safetensors' words."""
    shape: tuple[int, ...]
    """As the bytes are seen here: an F4 tensor is half as wide as it says."""
    begin: int
    """Its first byte, from the beginning of the file."""
    size_bytes: int


class Folder:
    """A folder with a checkpoint, or one safetensors file. Raises WeightsError."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.entries: dict[str, Entry] = {}
        self.headers: dict[str, bytes] = {}
        """By file: everything before its tensors."""
        self._maps: dict[str, mmap.mmap] = {}
        for name in self._files():
            self._open(name)

    @property
    def root(self) -> Path:
        """The folder, also where the path is a file in it."""
        return self.path if self.path.is_dir() else self.path.parent

    def _files(self) -> list[str]:
        if self.path.is_file():
            return [self.path.name]
        if not self.path.is_dir():
            raise WeightsError(f"there is no checkpoint at {self.path}")
        if (self.path / INDEX).exists():
            files = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(files, Mapping) or not all(isinstance(name, str) for name in files.values()):
                raise WeightsError(f"{self.path / INDEX} has no weight_map of names to files")
            names = sorted(set(files.values()))
            if missing := [name for name in names if Path(name).name != name or not (self.path / name).is_file()]:
                raise WeightsError(f"{self.path} lacks {len(missing)} of its {len(names)} files, {missing[0]} first")
            return names
        names = sorted(file.name for file in self.path.glob("*.safetensors"))
        if len(names) != 1:
            raise WeightsError(f"{self.path} holds {len(names)} safetensors files and no {INDEX}")
        return names

    def _open(self, name: str) -> None:
        path = self.root / name
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else size
            if length > min(size - 8, HEADER_BYTES_MAX):
                raise WeightsError(f"{path} is damaged or cut short: its header is said to have {length} bytes")
            text = file.read(length)
            # Private pages that torch may call writable; nothing here writes them.
            self._maps[name] = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        try:
            header = json.loads(text)
        except ValueError as error:
            raise WeightsError(f"{path} is damaged: its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise WeightsError(f"{path} is damaged: its header is not a table of tensors")
        self.headers[name] = length.to_bytes(8, "little") + text
        header.pop("__metadata__", None)
        for tensor, fields in header.items():
            self.entries[tensor] = _entry(name, path, tensor, fields, 8 + length, size)

    def tensor(self, name: str) -> Tensor:
        """The tensor as it stands in the file, not copied."""
        entry = self.entries[name]
        dtype = DTYPES[entry.kind]
        if entry.size_bytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._maps[entry.file], dtype=torch.uint8, count=entry.size_bytes, offset=entry.begin)
        if entry.begin % dtype.itemsize:
            flat = flat.clone()  # other writers do not align
        return flat.view(dtype).view(entry.shape)

    def forget(self, name: str) -> None:
        """Let go of the pages of a tensor. It may be asked for again."""
        entry = self.entries[name]
        page = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
        if entry.size_bytes >= mmap.PAGESIZE and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, page, entry.begin + entry.size_bytes - page)

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        path = self.root / CONFIG
        if not path.is_file():
            raise WeightsError(f"{self.root} has no {CONFIG}: say which model the weights are of")
        return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return value


def _entry(file: str, path: Path, name: str, fields: Any, data: int, size: int) -> Entry:
    try:
        kind, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise WeightsError(f"{path} is damaged: what its header says of {name} makes no sense") from None
    if kind not in DTYPES:
        raise WeightsError(f"{path}: {name} is of dtype {kind}; known here: {', '.join(DTYPES)}")
    if kind == "F4":
        shape = (*shape[:-1], shape[-1] // 2)
    if end - begin != math.prod(shape) * DTYPES[kind].itemsize or data + end > size:
        raise WeightsError(f"{path} is damaged or cut short: {name} is not where its header says")
    return Entry(file, kind, shape, data + begin, end - begin)
