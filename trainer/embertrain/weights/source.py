"""The weights of a checkpoint, by our names, one at a time.

A `Source` finds out how the files name the weights, says all that is wrong with them at once, and reads any weight or
piece of one into any dtype, dequantised where it is quantised. It keeps nothing but the mapped files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import WeightsError
from ..model.config import ModelConfig
from ..model.published import from_published
from . import blocks
from .folder import CONFIG, Folder
from .names import Names, Piece, Weight, weights

NAMES: tuple[Names, ...] = ("official", "transformers", "saved")
_TOLD_MAX = 5
"""Names of one sort that a message holds."""
_IGNORED = ("rotary_emb.inv_freq", "mtp.0.embed.weight", "mtp.0.head.weight", "mtp.0.emb.tok_emb.weight")
"""What some files hold besides, and no model needs."""

_PACKED = ("I8", "U8", "F4")
"""Dtypes of fp4 codes, two a byte."""

Key = tuple[str, int | None, tuple[int, int] | None]
"""Our name, expert, rows: what a piece is, whatever it is called."""


class Source:
    """A checkpoint of the model `config`. Raises WeightsError.

    If not said, that is the model its config.json describes, without MTP layers where the files have none: transformers
    counts them in the config and does not save them, and V4's later releases have another drafter under their names.
    """

    def __init__(self, path: Path | str, config: ModelConfig | None = None) -> None:
        self.folder = Folder(path)
        entries = self.folder.entries
        self.config = config or from_published(self.folder.config())
        joints = (name for name in _mtp_names(weights(self.config)) if name.endswith(".enorm.weight"))
        if config is None and entries.keys().isdisjoint(joints):
            self.config = replace(self.config, mtp=())
        tables = {names: weights(self.config, names) for names in NAMES}
        self.names: Names = max(NAMES, key=lambda names: sum(n in entries for n in _file_names(tables[names])))
        self.weights = {name: self._found(weight) for name, weight in tables[self.names].items()}
        self._pieces: dict[Key, Piece] = {
            (weight.name, piece.expert, piece.rows): piece
            for weight in self.weights.values()
            for piece in weight.pieces
        }

    def _found(self, weight: Weight) -> Weight:
        """A weight by the names in the files: what transformers writes depends on what it had read."""
        entries = self.folder.entries
        pieces = tuple(
            replace(piece, name=other)
            if piece.name not in entries and (other := _renamed(piece.name)) in entries
            else piece
            for piece in weight.pieces
        )
        return replace(weight, pieces=pieces)

    # ---- what is wrong

    def check(self, wanted: Mapping[str, Tensor] | None = None, *, partial: bool = False) -> None:
        """WeightsError that tells every name that is missing, unexpected or of another shape.

        `wanted` are the weights to be filled; without them it is the whole model. With `partial` the files may hold
        more than that.
        """
        names = self.weights if wanted is None else wanted
        strangers = [name for name in names if name not in self.weights]
        chosen = [self.weights[name] for name in names if name in self.weights]
        missing = self._missing(chosen, wanted)
        unexpected = [] if partial else self._unexpected(chosen)
        misshapen = list(self._misshapen(chosen, wanted))
        told = [
            _told("weight of the model is not in its config", "weights of the model are not in its config", strangers),
            _told("weight is missing", "weights are missing", missing),
            _told("name means nothing here", "names mean nothing here", unexpected),
            _told("weight has another shape", "weights have other shapes", misshapen),
        ]
        if wrong := [text for text in told if text]:
            hint = self._hint(missing or strangers, unexpected, misshapen)
            raise WeightsError(f"{self.folder.path} does not fit the model: {'; '.join(wrong)}. {hint}")

    def _missing(self, chosen: Collection[Weight], wanted: Mapping[str, Tensor] | None) -> list[str]:
        entries = self.folder.entries
        missing = []
        for weight in chosen:
            if weight.name == "head.weight" and self.config.tied and (wanted is None or "embed.weight" in wanted):
                continue
            missing += [piece.name for piece in weight.pieces if piece.name not in entries]
            missing += [f"the scales of {piece.name}" for piece in weight.pieces if self._lacks_scales(piece.name)]
        return missing

    def _lacks_scales(self, name: str) -> bool:
        entry = self.folder.entries.get(name)
        return entry is not None and entry.kind.startswith("F8") and self._scale_name(name) is None

    def _unexpected(self, chosen: Collection[Weight]) -> list[str]:
        known = {name for weight in chosen for name in (*(piece.name for piece in weight.pieces), *weight.copies)}
        return [
            name
            for name in self.folder.entries
            if name not in known and _scaled(name) not in known and not name.endswith(_IGNORED)
        ]

    def _misshapen(self, chosen: Collection[Weight], wanted: Mapping[str, Tensor] | None) -> Iterable[str]:
        for weight in chosen:
            if wanted is not None and (shape := tuple(wanted[weight.name].shape)) != weight.shape:
                yield f"{weight.name} {list(shape)} in the model and {list(weight.shape)} by its config"
            for piece in weight.pieces:
                found, scale = self._shape(piece.name), self._scale_name(piece.name)
                if found is not None and self._is_whole(piece.name) != (weight.form == "table"):
                    yield f"{piece.name} is of {self.folder.entries[piece.name].kind} in the files"
                elif found is not None and found != piece.shape:
                    yield f"{piece.name} {list(found)} in the files and {list(piece.shape)} in the model"
                elif scale and len(piece.shape) == 2:
                    fp4 = self.folder.entries[piece.name].kind in _PACKED
                    there, due = self.folder.entries[scale].shape, blocks.scale_shape(piece.shape, fp4=fp4)
                    if there != due:
                        yield f"{scale} {list(there)} in the files and {list(due)} for a weight of {list(piece.shape)}"

    def _is_whole(self, name: str) -> bool:
        """Whether a tensor of the files is one of whole numbers."""
        kind = self.folder.entries[name].kind
        return kind != "BF16" and kind[0] in "IUB" and self._scale_name(name) is None

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """Of the weight that a tensor of the files stands for."""
        entry = self.folder.entries.get(name)
        if entry is None:
            return None
        packed = entry.kind in _PACKED and self._scale_name(name) is not None
        return (*entry.shape[:-1], 2 * entry.shape[-1]) if packed else entry.shape

    def _hint(self, missing: list[str], unexpected: list[str], misshapen: list[str]) -> str:
        mtp = set(_mtp_names(self.weights))
        if missing and not misshapen and all(name in mtp or name.startswith("mtp.") for name in missing):
            return "The files have no MTP layers: build the model without (mtp=() in its config)."
        if any("embed" in name for name in misshapen):
            return "Is the vocabulary another one? Compare vocab_size of config.json with the model's."
        if unexpected and not missing and not misshapen:
            return "To leave them out, load with partial=True."
        return "Are they of another model? Compare config.json with the model's."

    # ---- reading

    @property
    def described(self) -> ModelConfig | None:
        """The model that the checkpoint's own config.json describes, if it has one."""
        has = (self.folder.root / CONFIG).is_file()
        return from_published(self.folder.config()) if has else None

    @property
    def quantised(self) -> bool:
        """Whether any weight is."""
        return any(self._scale_name(name) for name in self.folder.entries)

    def holds(self, weight: Weight, piece: Piece) -> Piece | None:
        """The tensor of these files that is that piece, under whatever name."""
        held = self._pieces.get((weight.name, piece.expert, piece.rows))
        return held if held and held.name in self.folder.entries else None

    def codec(self, piece: Piece) -> tuple[str, str | None]:
        """(dtype of the tensor, dtype of its scales or None), in safetensors' words."""
        scale = self._scale_name(piece.name)
        entries = self.folder.entries
        return entries[piece.name].kind, entries[scale].kind if scale else None

    def raw(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        """A tensor as it stands in the files, and its scales."""
        scale = self._scale_name(piece.name)
        return self.folder.tensor(piece.name), self.folder.tensor(scale) if scale else None

    def read(self, weight: Weight, out: Tensor) -> None:
        """A whole weight, into a tensor of any dtype."""
        for piece in self.weights[weight.name].pieces:
            self._read(piece, piece.of(out))

    def dtype(self, weight: Weight) -> torch.dtype:
        """That of the files, or the one in which a quantised weight is exact."""
        codes, scale = self.raw(self.weights[weight.name].pieces[0])
        return codes.dtype if scale is None else blocks.exact_dtype(scale)

    def piece(self, weight: Weight, piece: Piece) -> Tensor:
        """A piece, in the dtype of its weight."""
        held = self.holds(weight, piece)
        if held is not None:
            codes, scale = self.raw(held)
            return codes if scale is None else blocks.dequantise(codes, scale)
        # Experts that are one tensor in these files and many in others, or the other way round.
        whole = self.weights[weight.name]
        if len(whole.pieces) == 1:
            return piece.of(self.folder.tensor(whole.pieces[0].name))
        out = torch.empty(whole.shape, dtype=self.dtype(weight))
        self.read(weight, out)
        return out

    def _read(self, piece: Piece, out: Tensor) -> None:
        codes, scale = self.raw(piece)
        if scale is None:
            if codes.is_floating_point() != out.is_floating_point():
                raise WeightsError(f"{piece.name} is of {codes.dtype}, and the model's is of {out.dtype}")
            out.copy_(codes)
        else:
            blocks.dequantise(codes, scale, out)
        self.forget(piece)

    def forget(self, piece: Piece) -> None:
        """Let go of what `raw` or `piece` mapped."""
        for name in (piece.name, self._scale_name(piece.name)):
            if name:
                self.folder.forget(name)

    def _scale_name(self, name: str) -> str | None:
        """V3: `weight_scale_inv` beside `weight`. V4: `scale` in its place."""
        if not name.endswith(".weight"):
            return None
        for scale in (f"{name}_scale_inv", f"{name.removesuffix('weight')}scale"):
            if scale in self.folder.entries:
                return scale
        return None


def _file_names(table: Mapping[str, Weight]) -> Iterable[str]:
    return (piece.name for weight in table.values() for piece in weight.pieces)


def _mtp_names(table: Mapping[str, Weight]) -> Iterable[str]:
    return _file_names({name: weight for name, weight in table.items() if name.startswith("mtp.")})


def _renamed(name: str) -> str:
    """transformers calls V4's `norm` `kv_norm` once it has read it, and writes `norm` for what it had read so too."""
    return f"{name.removesuffix('kv_norm.weight')}norm.weight" if name.endswith(".kv_norm.weight") else name


def _scaled(name: str) -> str:
    """The weight whose scales have that name, or the name."""
    if name.endswith(".weight_scale_inv"):
        return name.removesuffix("_scale_inv")
    return f"{name.removesuffix('scale')}weight" if name.endswith(".scale") else name


def _told(one: str, many: str, names: Collection[str]) -> str:
    """ "2 weights are missing (a, b)"; nothing of nothing."""
    if not names:
        return ""
    some = ", ".join(list(names)[:_TOLD_MAX])
    return f"{len(names)} {one if len(names) == 1 else many} ({some}{', ...' if len(names) > _TOLD_MAX else ''})"
