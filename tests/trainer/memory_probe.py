"""One measurement of memory in a process of its own: `python -m tests.trainer.memory_probe WHAT ARGUMENTS`, JSON out.

Memory is what the kernel counts (resident, and its peak), read before and after.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from embertrain.cache.cache import Cache
from embertrain.cache.spec import PAGE_TOKENS, CacheSpec
from embertrain.engine import Engine, EngineConfig
from embertrain.model.config import Hybrid
from embertrain.model.model import Model
from embertrain.model.presets import preset


def status_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def prefill(length: int) -> dict[str, object]:
    """A prompt in chunks through a model of one CSA and one HCA layer with 32 index heads x 32."""
    micro = preset("micro")
    layers = tuple(x for x in micro.layers if isinstance(x.attention, Hybrid) and x.attention.ratio)
    model = Model(replace(micro, layers=layers, mtp=()), mtp=False)
    model.reset_parameters(torch.Generator().manual_seed(0), std=0.1)
    pages = -(-(length + 1) // PAGE_TOKENS)
    engine = Engine(model, config=EngineConfig(sequences=1, pages=pages, step_tokens=512))
    for layer, rows in enumerate(engine.cache.spec.layers):
        for row in rows:
            engine.cache.pool(layer, row.kind).fill_(0)
    engine.generate([[1, 2, 3]], max_new_tokens=2)  # what torch loads at its first use is not the prompt's
    ids = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    request = engine.submit(ids, max_new_tokens=1)
    before = status_bytes("VmRSS")
    seconds = []
    while request.finish is None:
        begin_s = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begin_s)
    return {"bytes": status_bytes("VmHWM") - before, "seconds": seconds, "cache_bytes": engine.cache.nbytes}


def cache(name: str, tokens: int) -> dict[str, object]:
    """A cache of one sequence, every row of it written: what is resident, and what is its pools'."""
    spec = CacheSpec.of(preset(name), torch.bfloat16)
    torch.ones(1024).fill_(1)
    before = status_bytes("VmRSS")
    held = Cache(spec, sequences=1, pages=tokens // PAGE_TOKENS)
    for layer, rows in enumerate(spec.layers):
        for row in rows:
            held.pool(layer, row.kind).fill_(1)
    return {"bytes": status_bytes("VmRSS") - before, "pools": held.nbytes, "rings": spec.sequence_bytes(0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    found = prefill(int(arguments[0])) if what == "prefill" else cache(arguments[0], int(arguments[1]))
    print(json.dumps(found))
