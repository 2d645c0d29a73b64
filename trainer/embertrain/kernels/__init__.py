"""Loops that Python calls too slowly, in C, each beside its plain torch version."""

from .loops import hyper_mix, native

__all__ = ["hyper_mix", "native"]
