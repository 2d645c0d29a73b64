"""Whose rows are whose: everything that the bits of a row depend on, as fields of a page's namespace.

Rows of other weights, another dtype or another layout are another model's. So are those of other code: whoever changes
what a row's bits are adds one to REVISION. In batch-invariant mode a hit promises the bits of a cold run, and pages are
shared by what has the same bits only: the tag says which torch, processor or device and loops in C there are, and how
many threads. Without it rows agree to 2e-5 anyway, and the tag leaves all that out.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import torch
from emberkv import Kind, Namespace

from ..cache.spec import PAGE_TOKENS
from ..kernels import native
from ..model.model import Model
from ..weights.fingerprint import fingerprint
from .layout import Layout

REVISION = 2
"""Of the code that makes rows, and of how they lie in a page."""
CPUINFO = Path("/proc/cpuinfo")
CPU_FIELDS = {
    *("vendor_id", "cpu family", "model", "model name", "stepping", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "Features"),
}
"""Of x86 and of Arm; the others are of the moment (MHz) or of one core."""
DISPATCH_VARIABLES = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_CPU_ISA_HINTS", "DNNL_CPU_ISA_HINTS"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"),
    *("MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE"),
)
"""By which oneDNN and MKL are told to choose other loops."""


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
        capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
        where = f"{platform.machine()} {capability} {_processor()} {loops} threads {threads}"
    else:
        where = f"{device.type} {torch.get_device_module(device).get_device_name(device)}"
    return f"invariant torch {torch.__version__} {where}"


def _processor() -> str:
    """A digest of what oneDNN and MKL choose their loops by: they tell more processors apart than ATen does."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        facts = {platform.processor()}
    else:
        facts = {line for line in lines if line.partition(":")[0].strip() in CPU_FIELDS}
    told = [(name, os.environ[name]) for name in DISPATCH_VARIABLES if name in os.environ]
    return hashlib.sha256(repr((sorted(facts), told)).encode()).hexdigest()[:12]
