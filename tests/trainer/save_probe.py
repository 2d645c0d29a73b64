"""A process that saves the states of test_checkpoint_faults one after the other until it is killed."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch
from embertrain.checkpoint import Checkpoints


def numbers(step: int) -> dict[str, torch.Tensor]:
    """What is saved at a step."""
    generator = torch.Generator().manual_seed(step)
    return {f"w{i}": torch.rand(1 + i * 100_000, generator=generator) for i in range(4)}


def save_until_killed(url: str, said: Connection) -> None:
    """Go on after the latest there is, asynchronously every other time; say so when a save was acknowledged."""
    checkpoints = Checkpoints(url, keep=2)
    step = (checkpoints.latest() or 0) + 1
    said.send("ready")
    while True:
        state = {"model": numbers(step), "step": step}
        if step % 2:
            checkpoints.save(step, state)
        else:
            checkpoints.save_async(step, state)
            checkpoints.wait()
        said.send(step)
        step += 1
