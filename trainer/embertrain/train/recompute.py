"""Activation checkpointing: of a layer only what it takes in is kept, and the rest computed again for the gradient.

What a layer tells beside its output (loads, lessons) is told by its first run. Noise of routers is drawn again as it
was: a generator is put back to where it was before the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..model.layer import Block


def recompute(block: Block) -> None:
    """From now on the block's activations are computed again for the gradient."""
    block.forward = _recomputed(block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args)
        generator = args[-1]
        state = generator.get_state() if isinstance(generator, torch.Generator) else None

        def again(*args: Any) -> Any:
            if state is not None:
                generator.set_state(state)
            return forward(*args)

        return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)

    return run
