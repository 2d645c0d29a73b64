"""Loops that Python calls too slowly, in C, each beside its plain torch version."""

from . import grouped
from .few import attend, choose, experts, norm, product, product_by_group, route, swiglu
from .hyper import expand, hyper_begin, hyper_mix
from .library import FEW, loops, loops_for_experts, loops_for_few, loops_for_groups, native
from .memory import large

__all__ = [
    "FEW",
    "attend",
    "choose",
    "expand",
    "experts",
    "grouped",
    "hyper_begin",
    "hyper_mix",
    "large",
    "loops",
    "loops_for_experts",
    "loops_for_few",
    "loops_for_groups",
    "native",
    "norm",
    "product",
    "product_by_group",
    "route",
    "swiglu",
]
