"""What is saved and what is loaded, in torch DCP's terms: its planners, with our names and without its pickles.

DCP decides which rank writes which shard (a replicated tensor is written by one), and which stored boxes overlap the
boxes that a rank wants. What differs here: names and leaves are those of `tree`; plain values are text (`values`) where
DCP pickles; and a load checks everything before it fills anything.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem

from ..errors import StateError
from . import values
from .index import Index
from .tree import Path, flatten, place

_TOLD_MAX = 5
"""Names that a message holds."""


class SavePlanner(DefaultSavePlanner):
    """Plans the save of a nested state."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._paths: dict[str, Path] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Raises StateError for what a checkpoint cannot hold. Values are those of this moment."""
        leaves = flatten(state_dict)
        self._paths = {name: path for name, (path, _) in leaves.items()}
        self.state_dict = {name: _savable(name, leaf) for name, (_, leaf) in leaves.items()}
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data=self._paths)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """The metadata carries the paths of all ranks."""
        paths: dict[str, Path] = {}
        for plan in all_plans:
            for name, path in plan.planner_data.items():
                if paths.setdefault(name, path) != path:
                    raise StateError(f"{name} is at {path} of one rank's state and at {paths[name]} of another's")
        plans, metadata = super().create_global_plan(all_plans)
        return plans, dataclasses.replace(metadata, planner_data=paths)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object if isinstance(object, Tensor) else io.BytesIO(object.encode())


def _savable(name: str, leaf: Any) -> Any:
    """A tensor, or the text of a value."""
    if not isinstance(leaf, Tensor):
        return values.encode(leaf, name)
    if leaf.layout != torch.strided or leaf.is_meta or leaf.is_quantized:
        raise StateError(f"{name} is a {'meta' if leaf.is_meta else leaf.layout} tensor: a checkpoint takes dense ones")
    return leaf


class LoadPlanner(DefaultLoadPlanner):
    """Plans to fill a nested state from the checkpoint of an index."""

    def __init__(self, index: Index, *, partial: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._index = index
        self._partial = partial
        self._paths: dict[str, Path] = {}
        self._values: dict[str, Any] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        leaves = flatten(state_dict)
        # Of an empty dict anything may become.
        leaves = {name: (path, leaf) for name, (path, leaf) in leaves.items() if leaf != {} or isinstance(leaf, Tensor)}
        self._paths = {name: path for name, (path, _) in leaves.items()}
        self.state_dict = {name: leaf for name, (_, leaf) in leaves.items()}
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """Raises StateError that tells what does not fit."""
        assert self.metadata is not None
        wrong = [problem for name, leaf in self.state_dict.items() if (problem := self._problem(name, leaf))]
        if wrong:
            more = f", and {len(wrong) - _TOLD_MAX} more" if len(wrong) > _TOLD_MAX else ""
            raise StateError(f"the checkpoint does not fit the state: {'; '.join(wrong[:_TOLD_MAX])}{more}")
        plan = create_default_local_load_plan(self.state_dict, self.metadata)
        return dataclasses.replace(plan, planner_data=set(self.state_dict))

    def _problem(self, name: str, leaf: Any) -> str | None:
        saved = self._index.tensors.get(name)
        if not isinstance(leaf, Tensor):
            if saved:
                return f"{name} is a tensor in it and none in the state"
            return None if name in self._index.values else f"it has no {name}"
        if saved is None:
            return f"{name} is no tensor in it" if name in self._index.values else f"it has no {name}"
        if saved.shape != tuple(leaf.shape):
            return f"{name} is {list(saved.shape)} in it and {list(leaf.shape)} in the state"
        dtype = str(leaf.dtype).removeprefix("torch.")
        return None if saved.dtype == dtype else f"{name} is {saved.dtype} in it and {dtype} in the state"

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Raises StateError for tensors that no rank has a place for."""
        wanted: set[str] = set().union(*(plan.planner_data for plan in global_plan))
        if not self._partial and (unknown := [name for name in self._index.tensors if name not in wanted]):
            raise StateError(
                f"the state has no place for {len(unknown)} tensors of the checkpoint ({_some(unknown)}): "
                f"load with partial=True to leave them out"
            )
        return global_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        self._values[name] = values.decode(value.getvalue().decode())

    def finish(self, state: dict[str, Any]) -> None:
        """Once all tensors are filled: put the values in. Those that the state has not come in too, unless partial."""
        if not self._partial:
            for name, entry in self._index.values.items():
                if name not in self._values:
                    self._values[name] = values.decode(entry.text)
        for name, value in self._values.items():
            place(state, self._paths.get(name) or self._index.values[name].path, value)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_TOLD_MAX]) + (", ..." if len(listed) > _TOLD_MAX else "")
