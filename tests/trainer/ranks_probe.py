"""What processes do that save and load sharded states together, for test_checkpoint_ranks.

Every tensor is what `numbers` says by its name, whatever number of ranks holds it.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from embertrain.checkpoint import Checkpoints
from embertrain.checkpoint.image import Image
from embertrain.checkpoint.staging import Staging
from embertrain.errors import Damaged, RankFailed, StateError
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


class Net(nn.Module):
    """Sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(13, 37)
        self.b = nn.Linear(37, 3, bias=False)
        self.one = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.one


def numbers(name: str, shape: torch.Size) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def job(ranks: int) -> dict[str, Any]:
    """A state in every way of sharding, with numbers in it that are not those of `numbers`."""
    mesh = init_device_mesh("cpu", (ranks,))
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    if ranks > 1:
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    columns = distribute_tensor(torch.zeros(5, 11), mesh, [Shard(1)])
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "more": {
            "columns": columns,
            "rows": distribute_tensor(torch.zeros(21 << 10, 25), mesh, [Shard(0)]),
            "same": distribute_tensor(torch.zeros(7), mesh, [Replicate()]),
            "plain": torch.zeros(1000),
        },
        "step": 0,
    }
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        state["more"]["columns"] = distribute_tensor(torch.zeros(5, 11), square, [Shard(1), Shard(0)])
    return state


def tensors(value: Any, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(name, value)]
    inner = value.items() if isinstance(value, dict) else ()
    return [found for key, each in inner for found in tensors(each, f"{name}.{key}")]


def fill(state: dict[str, Any]) -> None:
    for name, tensor in tensors(state):
        full = numbers(name, tensor.shape)
        with torch.no_grad():
            tensor.copy_(
                distribute_tensor(full, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else full
            )
    state["step"] = 7


def check(state: dict[str, Any]) -> None:
    for name, tensor in tensors(state):
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        assert torch.equal(full, numbers(name, tensor.shape)), name
    assert state["step"] == 7
    assert len(tensors(state)) == 4 + 3 * 4 + 4


class Odd(Exception):
    """As libraries have them: it can be pickled, and not unpickled."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(what)


class Full(Staging):
    """No memory is left for a copy."""

    def take(self, image: Image) -> Image:
        raise MemoryError("no room")


def fail(url: str, rank: int, state: dict[str, Any]) -> None:
    """The last rank cannot write, then fails in a way that cannot be sent; the first one cannot make the folder; the
    last has no room for its copy, then does not see what the first made, then cannot even say what it holds: every rank
    hears of it, and saves go on."""
    checkpoints = Checkpoints(url)
    place, last = checkpoints.catalog.place, rank == dist.get_world_size() - 1
    works = place.write

    def broken(*_: object) -> None:
        raise OSError("this disk is gone")

    if last:
        place.write = broken  # type: ignore[method-assign]
    try:
        checkpoints.save(8, state)
    except (OSError, RankFailed) as error:
        assert isinstance(error, RankFailed) is not last and "this disk is gone" in str(error)
    else:
        raise AssertionError("the save of a rank that cannot write succeeded")

    def oddly(*_: object) -> None:
        raise Odd("no such bucket", 404)

    if last:
        place.write = oddly  # type: ignore[method-assign]
    try:
        checkpoints.save(8, state)
    except RankFailed as error:
        assert "Odd: no such bucket" in str(error)
    else:
        raise AssertionError("the save of a rank that cannot write succeeded")
    place.write = works  # type: ignore[method-assign]
    makes = place.make
    if rank == 0:
        place.make = broken  # type: ignore[method-assign]
    try:
        checkpoints.save(8, state)
    except OSError as error:
        assert "this disk is gone" in str(error)
    else:
        raise AssertionError("there is no folder")
    place.make = makes  # type: ignore[method-assign]
    if last:
        checkpoints._staging = Full()
    checkpoints.save_async(8, state)
    try:
        checkpoints.wait()
    except (MemoryError, RankFailed) as error:
        assert isinstance(error, RankFailed) is not last and "no room" in str(error)
    else:
        raise AssertionError("the save of a rank that has no copy succeeded")
    checkpoints._staging = None
    with Checkpoints(f"{url}-{rank}") as apart:
        try:
            apart.save(8, state)
        except (FileNotFoundError, RankFailed) as error:
            assert isinstance(error, RankFailed) is (rank == 0) and "No such file" in str(error)
        else:
            raise AssertionError("the ranks write to places of their own")
        assert apart.latest() is None
    try:
        checkpoints.save_async(9, state | ({"lock": object()} if last else {}))
    except StateError as error:
        assert "lock holds a builtins.object" in str(error)
    else:
        raise AssertionError("a state that cannot be saved was")
    assert checkpoints.latest() is None
    checkpoints.save(10, state)
    assert checkpoints.steps() == [10]
    checkpoints.close()


def fallback(checkpoints: Checkpoints, rank: int, state: dict[str, Any]) -> None:
    """What one rank reads of the latest is damaged: all of them raise it, or take the one before together. So they do
    where another rank cannot read at all for the moment."""
    fill(state)
    checkpoints.save(7, state)
    checkpoints.save(8, state | {"step": 8})
    if rank == 0:
        (file,) = Path(checkpoints.catalog.place.url).glob("step-000000008.*/rank-00001-0.bin")
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    dist.barrier()
    try:
        checkpoints.load(job(dist.get_world_size()))
    except Damaged as error:
        assert (error.step, error.file) == (8, "rank-00001-0.bin")
    else:
        raise AssertionError("damage was loaded")
    place, works = checkpoints.catalog.place, checkpoints.catalog.place.open

    def away(name: str) -> Any:
        if name.startswith("step-000000008"):
            raise TimeoutError("no answer")
        return works(name)

    for opens in (works, away):
        if rank == 0:
            place.open = opens  # type: ignore[method-assign]
        target = job(dist.get_world_size())
        assert checkpoints.load(target, fallback=True) == 7
        check(target)


def run(task: str, url: str) -> None:
    """This rank's part of a task."""
    rank, state = dist.get_rank(), job(dist.get_world_size())
    if task == "fail":
        fill(state)
        fail(url, rank, state)
    with Checkpoints(url) as checkpoints:
        if task == "save":
            fill(state)
            checkpoints.save_async(7, state)
            for _, tensor in tensors(state):
                with torch.no_grad():
                    tensor.zero_()
            checkpoints.wait()
        elif task == "fallback":
            fallback(checkpoints, rank, state)
        elif task == "load":
            assert checkpoints.load(state) == 7
            check(state)
