"""A process that saves the states of test_checkpoint_faults one after the other until it is killed.

    python -m tests.trainer.save_probe URL

It goes on after the latest there is, asynchronously every other time, and prints a line when a save was acknowledged.
"""

from __future__ import annotations

import sys

import torch
from embertrain.checkpoint import Checkpoints


def numbers(step: int) -> dict[str, torch.Tensor]:
    """What is saved at a step."""
    generator = torch.Generator().manual_seed(step)
    return {f"w{i}": torch.rand(1 + i * 100_000, generator=generator) for i in range(4)}


def main() -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(sys.argv[1], keep=2)
    step = (checkpoints.latest() or 0) + 1
    print("ready", flush=True)
    while True:
        state = {"model": numbers(step), "step": step}
        if step % 2:
            checkpoints.save(step, state)
        else:
            checkpoints.save_async(step, state)
            checkpoints.wait()
        print(step, flush=True)
        step += 1


if __name__ == "__main__":
    main()
