"""Builds the C parts into the package, where there is a compiler: lanes (`fs/emberfs/lane`) and the engine's loops.

Without one the package is pure Python, and does everything more slowly (see `emberfs.lane`, `embertrain.kernels`).
EMBERLINE_NATIVE=require makes that an error, as for wheels that are published.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("crc32c.c", "table.c", "grant.c", "read.c", "words.c", "server.c", "client.c", "stream.c", "module.c")
LANES, LOOPS = "fs/emberfs/lane/_native.abi3.so", "trainer/embertrain/kernels/_loops.{}.so"
LOOP_SOURCES = (
    "threads.c",
    "products.c",
    "attend.c",
    "choose.c",
    "experts.c",
    "grouped.c",
    "route.c",
    "rows.c",
    "hyper.c",
)
GENERATIONS = {
    "v4-bf16": ("-march=x86-64-v4", "-mavx512bf16"),
    "v4": ("-march=x86-64-v4",),
    "v3": ("-march=x86-64-v3",),
    "any": (),
}
"""Of processors, and what has the compiler use them; `embertrain.kernels.library` takes one when it is imported."""
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi")


class NativeHook(BuildHookInterface):
    """See https://hatch.pypa.io/latest/plugins/build-hook/custom/."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        for built, names, flags in parts():
            problem = "not Linux" if sys.platform != "linux" else compile_native(Path(self.root, built), names, flags)
            if problem:
                if os.environ.get("EMBERLINE_NATIVE") == "require":
                    raise RuntimeError(f"{built} cannot be built: {problem}")
                self.app.display_warning(f"emberline without {built}, all else works: {problem}")
                return
            build_data["artifacts"].append(built)
        if version != "editable":
            build_data["pure_python"] = False
            machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"cp311-abi3-{machine}"


def parts() -> list[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    """What is built, from which sources, with which flags."""
    generations = GENERATIONS if platform.machine() == "x86_64" else {"any": ()}
    loops = [(LOOPS.format(name), LOOP_SOURCES, flags) for name, flags in generations.items()]
    return [(LANES, SOURCES, ()), *loops]


def compile_native(built: Path, names: tuple[str, ...], flags: tuple[str, ...] = ()) -> str:
    """Compile sources that lie beside what is built; returns what went wrong, or nothing."""
    sources = [str(built.parent / name) for name in names]
    compiler = shlex.split(os.environ.get("CC", "cc"))
    fresh = built.with_suffix(f".{os.getpid()}.new")
    command = [*compiler, *FLAGS, *flags, f"-I{sysconfig.get_paths()['include']}", *sources, "-o", str(fresh), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler[0]}: {error}"
    if done.returncode:
        fresh.unlink(missing_ok=True)
        return f"{compiler[0]} failed: {done.stderr.strip()[-2000:]}"
    fresh.replace(built)  # Whoever has the old one mapped keeps it.
    return ""
