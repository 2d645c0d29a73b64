"""Loops that Python calls too slowly, in C, each beside its plain torch version."""

from .few import attend, experts, norm, product, product_by_group, route, swiglu
from .hyper import expand, hyper_begin, hyper_mix
from .library import FEW, loops, loops_for_experts, loops_for_few, native

__all__ = [
    "FEW",
    "attend",
    "expand",
    "experts",
    "hyper_begin",
    "hyper_mix",
    "loops",
    "loops_for_experts",
    "loops_for_few",
    "native",
    "norm",
    "product",
    "product_by_group",
    "route",
    "swiglu",
]
