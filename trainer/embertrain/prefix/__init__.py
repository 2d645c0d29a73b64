"""Prefix reuse: pages of prompts on disk, found again by whoever has the same prompt to go on from."""

from .prefixes import Prefixes
from .reuse import PrefixCounts, Reuse
from .trail import Trail
from .windows import Windows

__all__ = ["PrefixCounts", "Prefixes", "Reuse", "Trail", "Windows"]
