"""Weights into safetensors files, one tensor at a time, all or nothing.

Files are written into a folder beside the place they are meant for, flushed, and the folder is renamed: whoever looks
finds a whole checkpoint or none. What a killed process left is thrown away by the next call.

Bytes are laid out as the safetensors library does, larger dtypes first and then by name, so that the same weights are
the same file. With `like`, a checkpoint they were loaded from, every weight is written in the form it has there, and
one that has not changed since with the very bytes: codes and scales survive as long as the weight they stand for.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import WeightsError
from ..model.config import ModelConfig
from ..model.published import to_published
from . import blocks
from .folder import CONFIG, DTYPES, INDEX, SINGLE
from .names import Piece, Weight, weights
from .source import Source

Quantised = Literal["fp8", "fp4"]
"""fp8: matrices and experts. fp4: experts, and matrices in fp8."""

SHARD_BYTES = 5_000_000_000

_KINDS = {dtype: kind for kind, dtype in DTYPES.items() if kind != "F4"}


@dataclass(frozen=True, slots=True)
class _Form:
    """How a piece is written."""

    kind: str
    """Its dtype, or that of its codes, in safetensors' words."""
    scales: str | None = None
    scale_name: str | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    """A piece that is to be written, under one of its names."""

    weight: Weight
    piece: Piece
    name: str
    form: _Form

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape as `Entry` has it) of what it takes."""
        if self.form.scales is None or self.form.scale_name is None:
            return {self.name: (self.form.kind, self.piece.shape)}
        rows, columns = self.piece.shape
        fp4 = self.form.kind != "F8_E4M3"
        codes = (rows, columns // 2) if fp4 else (rows, columns)
        scale = blocks.scale_shape((rows, columns), fp4=fp4)
        return {self.name: (self.form.kind, codes), self.form.scale_name: (self.form.scales, scale)}


def save(
    state: nn.Module | Mapping[str, Tensor] | Source,
    path: Path | str,
    config: ModelConfig,
    *,
    names: Literal["official", "transformers"] = "official",
    dtype: torch.dtype | None = None,
    quantised: Quantised | None = None,
    like: Source | None = None,
    shard_size_bytes: int | None = None,
    beside: Iterable[Path] = (),
) -> None:
    """Write all weights of a model, and its config.json, to the folder `path`, which must not exist, or be empty.

    `state` is the model, its tensors by our names, or another checkpoint. Floating-point weights are written in
    `dtype`, or the one they have; those that are published in fp32 (sinks, biases, hyper-connections) always in fp32.
    Files are those of `like`, or of at most `shard_size_bytes` (`SHARD_BYTES` if not said). Those `beside` are copied.

    Raises WeightsError where a weight is missing or has another shape, NotFinite where one cannot be quantised,
    FileExistsError.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"there is something at {path} already")
    if names == "transformers" and (quantised or (like and like.quantised)):
        raise WeightsError("quantised weights have official names: save them so, or without `like` and in bf16")
    plan = _Plan(config, names, dtype, quantised, like, state if isinstance(state, Source) else _Tensors(state, config))
    items = plan.items()
    same = like if like and shard_size_bytes is None and _fits(items, like) else None
    shards = _same_shards(items, same) if same else _shards(items, shard_size_bytes or SHARD_BYTES)
    partial = path.parent / f".{path.name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        for shard in shards:
            _write_shard(partial / shard.file, shard, plan)
        if index := _index(shards, same):
            _write_file(partial / INDEX, index)
        _write_file(partial / CONFIG, _config(config, items, like))
        for other in beside:
            _write_file(partial / other.name, other.read_bytes())
        _sync_folder(partial)
    except BaseException:
        shutil.rmtree(partial)
        raise
    if path.exists():
        path.rmdir()
    partial.rename(path)
    _sync_folder(path.parent)


# ---- what is written, and how


class _Tensors:
    """Weights by our names, to be read as a `Source` is."""

    def __init__(self, state: nn.Module | Mapping[str, Tensor], config: ModelConfig) -> None:
        tensors: Mapping[str, Tensor] = state.state_dict() if isinstance(state, nn.Module) else state
        self._tensors = dict(tensors)
        if config.tied and "embed.weight" in self._tensors:
            self._tensors.setdefault("head.weight", self._tensors["embed.weight"])
        wrong = []
        for name, weight in weights(config).items():
            shape = tuple(self._tensors[name].shape) if name in self._tensors else None
            if shape != weight.shape:
                wrong.append(f"{name} {'is missing' if shape is None else f'{list(shape)}, not {list(weight.shape)}'}")
        if wrong:
            raise WeightsError(f"{len(wrong)} weights are not those of the model: {', '.join(wrong[:5])}")

    def dtype(self, weight: Weight) -> torch.dtype:
        return self._tensors[weight.name].dtype

    def piece(self, weight: Weight, piece: Piece) -> Tensor:
        return piece.of(self._tensors[weight.name])


class _Plan:
    """Which form every piece is written in, and the bytes of it."""

    def __init__(
        self,
        config: ModelConfig,
        names: Literal["official", "transformers"],
        dtype: torch.dtype | None,
        quantised: Quantised | None,
        like: Source | None,
        state: Source | _Tensors,
    ) -> None:
        self.config, self.dtype, self.quantised, self.like, self.state = config, dtype, quantised, like, state
        self.weights = weights(config, names)

    def items(self) -> list[_Item]:
        items = []
        for weight in self.weights.values():
            for piece in weight.pieces:
                held = self._held(weight, piece)
                if not weight.required and not held:  # a tied head
                    continue
                form = self._form(weight, piece, held)
                copies = [name for name in weight.copies if self.like is None or name in self.like.folder.entries]
                items += [_Item(weight, piece, name, form) for name in (piece.name, *copies)]
        return items

    def _held(self, weight: Weight, piece: Piece) -> Piece | None:
        return self.like.holds(weight, piece) if self.like else None

    def _form(self, weight: Weight, piece: Piece, held: Piece | None) -> _Form:
        if self.like and held:
            kind, scales = self.like.codec(held)
            return _Form(kind, scales, self._scale_name(piece) if scales else None)
        if weight.form == "table":
            return _Form("I32")
        if weight.form == "fp32":
            return _Form("F32")
        if self.quantised and weight.form in ("matrix", "expert"):
            fp4 = self.quantised == "fp4" and weight.form == "expert"
            scales = "F8_E8M0" if fp4 or self.config.family == "v4" else "F32"
            return _Form("I8" if fp4 else "F8_E4M3", scales, self._scale_name(piece))
        return _Form(_KINDS[self.dtype or self.state.dtype(weight)])

    def _scale_name(self, piece: Piece) -> str:
        if self.config.family == "v4":
            return f"{piece.name.removesuffix('weight')}scale"
        return f"{piece.name}_scale_inv"

    def data(self, item: _Item) -> dict[str, Tensor]:
        """The tensors of an item, as they go into the file."""
        tensor = self.state.piece(item.weight, item.piece).detach().cpu()
        held = self._held(item.weight, item.piece)
        if self.like and held:
            codes, scale = self.like.raw(held)
            was = codes if scale is None else blocks.dequantise(codes, scale, torch.empty_like(tensor))
            unchanged = torch.equal(was.to(tensor.dtype), tensor)
            if unchanged:
                is_copy = item.name != item.piece.name and item.name in self.like.folder.entries
                return _named(item, self.like.folder.tensor(item.name) if is_copy else codes, scale)
        if item.form.scales is None:
            return _named(item, tensor.to(DTYPES[item.form.kind]), None)
        if item.form.kind != "F8_E4M3":
            codes, scale = blocks.quantise_fp4(tensor)
        else:
            codes, scale = blocks.quantise_fp8(tensor, "fp32" if item.form.scales == "F32" else "e8m0")
        return _named(item, codes, scale)

    def forget(self, item: _Item) -> None:
        """Let go of what `data` mapped."""
        for source in (self.like, self.state):
            if isinstance(source, Source) and (held := source.holds(item.weight, item.piece)):
                source.forget(held)


def _named(item: _Item, codes: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
    named = {item.name: codes}
    if scale is not None and item.form.scale_name is not None:
        named[item.form.scale_name] = scale
    return named


# ---- files


@dataclass(frozen=True, slots=True)
class _Shard:
    """One file."""

    file: str
    header: bytes
    """Everything before the tensors."""
    begins: Mapping[str, int]
    """Where each tensor begins in the file."""
    items: Sequence[_Item]


def _shards(items: Sequence[_Item], size_bytes: int) -> list[_Shard]:
    """Items in order, a new file where the last would grow above the size."""
    parts: list[list[_Item]] = [[]]
    filled = 0
    for item in items:
        size = sum(_size(kind, shape) for kind, shape in item.tensors().values())
        if parts[-1] and filled + size > size_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += size
    if len(parts) == 1:
        return [_laid_out(SINGLE, parts[0])]
    return [_laid_out(f"model-{i:05d}-of-{len(parts):05d}.safetensors", part) for i, part in enumerate(parts, 1)]


def _laid_out(file: str, items: Sequence[_Item]) -> _Shard:
    tensors = {name: form for item in items for name, form in item.tensors().items()}
    order = list(DTYPES)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    # Larger dtypes first, and so every tensor begins at a multiple of its dtype's size.
    for name in sorted(tensors, key=lambda name: (order.index(tensors[name][0]), name)):
        kind, shape = tensors[name]
        begins[name], end = end, end + _size(kind, shape)
        told = (*shape[:-1], 2 * shape[-1]) if kind == "F4" else shape
        header[name] = {"dtype": kind, "shape": told, "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data_at = 8 + len(text)
    header_bytes = len(text).to_bytes(8, "little") + text
    return _Shard(file, header_bytes, {name: data_at + begin for name, begin in begins.items()}, items)


def _fits(items: Sequence[_Item], like: Source) -> bool:
    """Whether the files of `like` are made of exactly these tensors."""
    tensors = {name: form for item in items for name, form in item.tensors().items()}
    entries = {name: (entry.kind, entry.shape) for name, entry in like.folder.entries.items()}
    return tensors == entries


def _same_shards(items: Sequence[_Item], like: Source) -> list[_Shard]:
    """The files of a checkpoint once more. A weight's scales may be in another file than its codes."""
    shards = []
    for file, header in like.folder.headers.items():
        begins = {name: entry.begin for name, entry in like.folder.entries.items() if entry.file == file}
        shards.append(
            _Shard(file, header, begins, [item for item in items if not begins.keys().isdisjoint(item.tensors())])
        )
    return shards


def _size(kind: str, shape: Iterable[int]) -> int:
    """F4 shapes are those of the bytes here."""
    return math.prod(shape) * DTYPES[kind].itemsize


def _write_shard(path: Path, shard: _Shard, plan: _Plan) -> None:
    with path.open("wb") as file:
        file.write(shard.header)
        for item in shard.items:
            sizes = {name: _size(kind, shape) for name, (kind, shape) in item.tensors().items()}
            for name, tensor in plan.data(item).items():
                if name in shard.begins:
                    file.seek(shard.begins[name])
                    written = file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
                    assert written == sizes[name]
            plan.forget(item)
        file.flush()
        os.fsync(file.fileno())


def _index(shards: Sequence[_Shard], same: Source | None) -> bytes | None:
    """Which file holds which tensor; None for one file that needs none."""
    if same and (same.folder.root / INDEX).is_file():
        return (same.folder.root / INDEX).read_bytes()
    if len(shards) == 1:
        return None
    total, files = 0, {}
    for shard in shards:
        for item in shard.items:
            for name, (kind, shape) in item.tensors().items():
                if name in shard.begins:
                    total += _size(kind, shape)
                    files[name] = shard.file
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})


def _config(config: ModelConfig, items: Sequence[_Item], like: Source | None) -> bytes:
    """What DeepSeek writes beside the shape; of a model that was loaded and kept its shape, what stood there."""
    if like and like.described == config:
        return (like.folder.root / CONFIG).read_bytes()
    fields = to_published(config)
    kinds = {item.form.kind for item in items}
    fields["torch_dtype"] = "float32" if kinds <= {"F32", "I32"} else "bfloat16"
    if "F8_E4M3" in kinds:
        fields["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(blocks.FP8_BLOCK),
        }
        if config.family == "v4":
            fields["quantization_config"]["scale_fmt"] = "ue8m0"
        if kinds & {"I8", "U8", "F4"}:
            fields["expert_dtype"] = "fp4"
    return _json(fields)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
