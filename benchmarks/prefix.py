"""Prefix reuse: how long a prompt waits for its first token when its pages are on disk, and what is read for that.

    python -m benchmarks prefix --quick

`bench-v4` in fp32 on two threads, with random weights. A prompt is computed once by an engine that keeps its pages, in
each of the three ways to keep windows, and then asked for again, beside an engine that keeps nothing. All but the last
page of the prompt is a hit, and that one is computed in every pass; zero windows replay 128 tokens a layer besides,
periodic ones what follows the last multiple of 1,024. The service and the storage server are processes of their own.
Bytes are payloads, beside what the model's shape says that they are; headers are 96 bytes a page.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from embertrain import info
from embertrain.cache.spec import PAGE_TOKENS
from embertrain.engine import Engine, EngineConfig
from embertrain.model.config import Hybrid, ModelConfig
from embertrain.model.model import Model
from embertrain.model.presets import preset
from embertrain.prefix import Prefixes

from .kvcache.serving import serving
from .runner import OURS, Row, compare, verify

THREADS = 2
COLD = "cold"
GOALS = {"full": 0.15, "periodic": None, "zero": 0.35}
"""Of cold, at GOALS_AT tokens."""
GOALS_AT = 4096
BYTES_GOAL = 0.02
"""Of the bytes that the shape says, so many may be missing or too many."""
CAPACITY_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How long it takes."""

    prompts: tuple[int, ...]
    """Tokens."""
    rounds: int
    model: str = "bench-v4"
    interval_tokens: int = 1024
    """Of periodic windows."""


FULL = Size(prompts=(4096, 32_768), rounds=3)
QUICK = Size(prompts=(4096,), rounds=1)


def run(directory: Path, size: Size) -> list[Row]:
    """All rows. Raises WrongResult where a hit says another token, or computes others than it should."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model = Model(preset(size.model), mtp=False)
        model.reset_parameters(torch.Generator().manual_seed(0))
        with serving(directory / "store", capacity_bytes=CAPACITY_BYTES) as served:
            return [row for tokens in size.prompts for row in _rows(model, served.address, tokens, size)]
    finally:
        torch.set_num_threads(before)


def _rows(model: Model, address: str, tokens: int, size: Size) -> list[Row]:
    prompt = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(tokens))
    ids: list[int] = prompt.tolist()
    with ExitStack() as stack:
        sides = {}
        for windows in ("full", f"periodic:{size.interval_tokens}", "zero"):
            side = stack.enter_context(closing(_Side(model, ids, address, windows)))
            sides[side.name] = side
        cold = Engine(model, config=_config(tokens))

        def compute(first: bool) -> float:
            if not first:  # Who stored the pages has computed it before.
                cold.generate([ids], max_new_tokens=1)
            return 1.0

        found = compare(
            f"{tokens:,} tokens",
            sides["full"].ask,
            peers={COLD: compute, "periodic": sides["periodic"].ask, "zero": sides["zero"].ask},
            rounds=size.rounds,
        )
        return [row for side in sides.values() for row in (_waited(found, side, tokens), _read(found, side, model))]


def _config(tokens: int) -> EngineConfig:
    return EngineConfig(sequences=1, pages=tokens // PAGE_TOKENS + 1)


class _Side:
    """An engine, and a prompt whose pages are stored."""

    def __init__(self, model: Model, ids: list[int], address: str, windows: str) -> None:
        self.name = windows.partition(":")[0]
        self._model, self._ids = model, ids
        self._engine = Engine(
            model, config=_config(len(ids)), prefixes=Prefixes(address, windows=windows, salt=windows, timeout_s=30)
        )
        assert self._engine.reuse is not None
        self._reuse = self._engine.reuse
        (request,) = self._engine.generate([ids], max_new_tokens=1)
        self._reuse.flush()
        verify(request.cached_tokens == 0 and self._reuse.counts.refused_pages == 0, f"{windows}: not stored")
        self._token = request.new_ids[0]
        self._usable = (len(ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
        self._replayed = PAGE_TOKENS * len(model.config.layers) if windows == "zero" else 0
        self.cached_tokens = self.read_bytes = 0
        """Of the last request."""

    def ask(self, first: bool) -> float:
        """For the prompt's first token, with the pages of before."""
        before, computed = self._reuse.counts.read_bytes, []
        hook = self._model.register_forward_pre_hook(lambda _, given: computed.append(len(given[0])))
        try:
            (request,) = self._engine.generate([self._ids], max_new_tokens=1)
        finally:
            hook.remove()
        self.read_bytes = self._reuse.counts.read_bytes - before
        verify(request.new_ids == [self._token], f"{self.name} windows: another token than the first time")
        self.cached_tokens = request.cached_tokens
        verify(
            self._usable == self.cached_tokens or (self.name == "periodic" and self.cached_tokens > 0),
            f"{self.name} windows: {self.cached_tokens} tokens from disk, of {self._usable}",
        )
        wanted = len(self._ids) - self.cached_tokens + self._replayed
        verify(sum(computed) == wanted, f"{self.name} windows: {sum(computed)} tokens computed, not {wanted}")
        return 1.0

    def close(self) -> None:
        self._engine.close()


def _waited(found: Row, side: _Side, tokens: int) -> Row:
    """Seconds to the first token."""
    name = OURS if side.name == "full" else side.name
    hits, colds = (tuple(1 / rate for rate in found.rounds[each]) for each in (name, COLD))
    return Row(
        row=f"{side.name} windows, {found.row}: s to the first one",
        ours=statistics.median(hits),
        peers={COLD: statistics.median(colds)},
        ratio=statistics.median(hit / cold for hit, cold in zip(hits, colds, strict=True)),
        baseline=COLD,
        goal=GOALS[side.name] if tokens == GOALS_AT else None,
        at_most=True,
        seconds={OURS: found.seconds[name], COLD: found.seconds[COLD]},
        rounds={OURS: hits, COLD: colds},
    )


def _read(found: Row, side: _Side, model: Model) -> Row:
    """How far the bytes read are from those that the shape says."""
    formula = bytes_of(model.config, side.cached_tokens, with_windows=side.name != "zero")
    return Row(
        row=f"{side.name} windows, {found.row}: bytes read, off the formula",
        ours=abs(side.read_bytes / formula - 1),
        peers={"formula": formula},
        goal=BYTES_GOAL,
        at_most=True,
    )


def bytes_of(config: ModelConfig, tokens: int, *, with_windows: bool) -> int:
    """Of a hit's entries, and the windows at its end with the 4 tokens that CSA's next entries overlap, in fp32."""
    sizes = info.kv_row_bytes(config, "bf16")
    total = 0
    for layer in config.layers:
        attention = layer.attention
        assert isinstance(attention, Hybrid)
        index = sizes["index"] if attention.index else 0
        if attention.ratio:
            total += tokens // attention.ratio * 2 * (sizes["csa"] + index)
        if with_windows:
            total += attention.window * 2 * sizes["window"]
            if attention.overlaps:  # two series of values and of gates, of entries and of the indexer's keys
                total += 4 * 4 * 2 * (sizes["csa"] + index)
    return total
