"""The loops in C: which of them this processor and this call can use.

Without a compiler the package has no C part and does everything by torch alone. What was built is one library for each
of four generations of x86-64 processors, or one for any other; torch has asked the processor which it is
(ATEN_CPU_CAPABILITY=default or avx2 has both take an earlier one).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor, nn

TYPES = {torch.bfloat16: 0, torch.float32: 1}
"""As the loops number them."""
AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
"""Whether torch uses it. What has it mostly multiplies bf16 numbers faster than one by one."""
# Measured on two cores with AVX2, and with AVX-512 and bf16 instructions.
FEW = 16
"""Rows up to which loops are the faster ones."""
FEW_SLOW = 64
"""The same of bf16 rows without bf16 instructions."""
FEW_NUMBERS = 1 << 16
"""The same of each expert's rows, in numbers: torch is called twice for each, and has to sort rows first. It bounds the
memory that a loop takes for them, too."""
GROUP_ROWS = 512
"""Rows of the fullest expert up to which loops for all experts are faster than a call of torch for each."""

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "product": (_P, _P, _P, *(_L,) * 9, _I, _I),
    "norm": (_P, _P, _P, _F, _P, _L, _L, _I, _L, _L, _I, _I),
    "attend": (_P, _P, _P, _P, _L, _P, _P, _L, _P, _L, _L, _L, _L, _F, _I, _I),
    "choose": (_P, _P, _P, _L, _L, _L, _I),
    "grouped": (_I, _P, _P, _P, _P, *(_L,) * 3, _I, _I),
    "swiglu": (_P, _P, _P, _L, _L, _F, _I, _I),
    "experts": (_P, _P, _P, _P, _L, _L, _P, _P, _P, *(_L,) * 5, _F, _I, _I),
    "route": (*(_P,) * 8, *(_L,) * 6, _I, _I, _F, _F, _F, _I),
    "hyper_mix": (_P, _P, _P, _L, _I, _I, _F, _P, _P, _P),
    "hyper_begin": (_P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _I, _F, _F, _I, _I),
    "expand": (_P, _P, _P, _P, _P, _L, _L, _L, _I, _I),
}


def generation() -> str:
    """This processor's."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX512"):
        return "v3" if capability == "AVX2" else "any"
    multiplies_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "v4-bf16" if multiplies_bf16() else "v4"


def load(generation: str) -> ctypes.CDLL | None:
    """The loops built for a generation, if they were: v4-bf16, v4, v3 or any."""
    built = Path(__file__).with_name(f"_loops.{generation}.so")
    if not built.exists():
        return None
    library = ctypes.CDLL(str(built))
    try:
        for name, arguments in _ARGUMENTS.items():
            function = library[f"emberline_{name}"]
            function.argtypes = arguments
            setattr(library, name, function)
    except AttributeError:  # It was built from other sources, and is as good as none.
        return None
    # The OpenMP that torch has loaded, if it is there by the name that GCC's code calls.
    process = ctypes.CDLL(None)
    try:
        threads = [process[f] for f in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")]
    except AttributeError:
        return library
    library["emberline_threads"](*(ctypes.cast(f, _P) for f in threads))
    return library


native = load(generation())
"""None where no loops were built."""
MULTIPLIES_PAIRS = generation() == "v4-bf16"
"""Whether products of the loops, not of their gradients, use bf16 instructions: then they outdo torch's."""


def loops(x: Tensor) -> bool:
    """Whether loops can be used on x: on the CPU, without gradients, in a type they know, and not for torch.compile."""
    if native is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype in TYPES and x.device.type == "cpu"


def loops_for_few(x: Tensor, weight: Tensor) -> bool:
    """Whether x [rows, in], or [rows, groups, in], has so few rows that a loop multiplies them faster with a weight."""
    slow_bf16 = x.dtype == torch.bfloat16 and not AVX512
    return x.shape[0] <= (FEW_SLOW if slow_bf16 else FEW) and _can_multiply(x, weight)


def loops_for_experts(x_TH: Tensor, weight_EIH: Tensor, top_k: int) -> bool:
    """Whether a loop is faster with T tokens that choose `top_k` of E experts each."""
    rows_each = x_TH.shape[0] * top_k / weight_EIH.shape[0]
    fast_bf16 = x_TH.dtype == torch.bfloat16 and AVX512 and not MULTIPLIES_PAIRS
    return rows_each <= (FEW if fast_bf16 else FEW_NUMBERS / x_TH.shape[1]) and _can_multiply(x_TH, weight_EIH)


def loops_for_groups(
    rows: Tensor, weights: Tensor, counts: tuple[int, ...], fullest: int = 0, *, gradient: bool = False
) -> bool:
    """Whether loops are faster with rows sorted by expert, so many of each, and weights [E, O, I], or other rows.
    `fullest`: count an expert of so many rows, too."""
    fast_bf16 = rows.dtype == torch.bfloat16 and AVX512 and (gradient or not MULTIPLIES_PAIRS)
    is_narrow = any(width % 32 for width in weights.shape[1:])
    return not fast_bf16 and not is_narrow and max(*counts, fullest) <= GROUP_ROWS and _can_multiply(rows, weights)


def _can_multiply(x: Tensor, weight: Tensor) -> bool:
    return (
        loops(x)
        and type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == x.dtype
        and x.shape[-1] % 32 == 0
        and x.stride(-1) == 1
        and weight.is_contiguous()
    )
