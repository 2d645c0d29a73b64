"""Whose rows are whose: everything that the bits of a row depend on, as fields of a page's namespace.

Rows of other weights, another dtype or another layout are another model's. So are those of other code: whoever changes
what a row's bits are adds one to REVISION. In batch-invariant mode a hit promises the bits of a cold run, and pages are
shared by what has the same bits only: the tag says which torch, device and loops in C there are, and how many threads.
Without it rows agree to 2e-5 anyway, and the tag leaves all that out.
"""

from __future__ import annotations

import hashlib
import platform

import torch
from emberkv import Kind, Namespace

from ..cache.spec import PAGE_TOKENS
from ..kernels import native
from ..model.model import Model
from ..weights.fingerprint import fingerprint
from .layout import Layout

REVISION = 1
"""Of the code that makes rows, and of how they lie in a page."""


def namespace_of(
    model: Model, layout: Layout, *, name: str, revision: str, keeps_states: bool, batch_invariant: bool
) -> Namespace:
    """Of pages of a model as it is now. Without a `revision` its weights are read and stand for it."""
    weight = model.embed.weight
    kinds = [Kind("rows", layout.rows_bytes)]
    if keeps_states:
        kinds.append(Kind("states", layout.states_bytes, "trailing:1"))
    shape = hashlib.sha256(repr(model.config).encode()).hexdigest()[:16]
    return Namespace(
        model=name or model.config.family,
        revision=revision or fingerprint(model),
        dtype=str(weight.dtype).removeprefix("torch."),
        layout=f"emberline-{REVISION} {shape} {numerics(weight.device, batch_invariant)}",
        page_tokens=PAGE_TOKENS,
        kinds=tuple(kinds),
    )


def numerics(device: torch.device, batch_invariant: bool) -> str:
    """What else the bits depend on."""
    if not batch_invariant:
        return "free"
    if device.type == "cpu":
        loops = "loops" if native is not None else "plain"
        where = (
            f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {loops} threads {torch.get_num_threads()}"
        )
    else:
        where = f"{device.type} {torch.get_device_module(device).get_device_name(device)}"
    return f"invariant torch {torch.__version__} {where}"
