"""What a serving engine says of itself, and whether it will meet the pages of others: model, page, dtype, layout, seed.

Does not know: how an engine tells it (`engine_documents`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from .namespace import Namespace

SEED_VARIABLE = "PYTHONHASHSEED"
_SEEDED_HASHES = ("builtin", "xxhash", "xxhash_cbor")
"""Of LMCache and vLLM: they differ from process to process unless the seed is set."""
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float8_e4m3fn": "fp8_e4m3",
           "float8_e5m2": "fp8_e5m2"}  # fmt: skip
"""Words for one thing. "fp8" is none of them: a namespace of that dtype is another one than one of "fp8_e4m3"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Settings that decide which pages an engine finds. None: it does not say."""

    name: str = "engine"
    """vllm, sglang, lmcache, or what it is called."""
    model: str | None = None
    revision: str | None = None
    dtype: str | None = None
    """Of the KV."""
    layout: str | None = None
    page_tokens: int | None = None
    hash_algorithm: str | None = None
    hash_seed: str | None = None
    """PYTHONHASHSEED; "" for certainly not set."""
    caches_prefixes: bool | None = None
    cache_address: str | None = None
    """Of the service that our adapter in it is set to; "" for certainly none."""


def merged(engine: Engine, more: Engine) -> Engine:
    """What `more` says counts where `engine` says nothing."""
    said = {each.name: getattr(more, each.name) for each in fields(Engine) if getattr(engine, each.name) is None}
    return replace(engine, **said, name=more.name if engine.name == "engine" else engine.name)


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: str
    """OK, WARN or FAIL; SKIP: it is not known."""
    name: str
    detail: str
    advice: str = ""


def look(engine: Engine, namespaces: Sequence[Namespace]) -> Iterator[Finding]:
    """What will and will not be found by this engine in a service with these namespaces."""
    yield _seed(engine)
    if engine.caches_prefixes is False:
        yield Finding(
            "FAIL", "prefix cache", f"{engine.name} does not cache prefixes", _CACHE_ADVICE.get(engine.name, "")
        )
    if engine.cache_address == "":
        yield Finding("WARN", "adapter", f"no adapter of emberkv is in {engine.name}'s configuration",
                      "see docs/kvcache-adapters.md for that of each engine")  # fmt: skip
    elif engine.cache_address is not None:
        yield Finding("OK", "adapter", f"{engine.name} is set to {engine.cache_address}")
    if engine.model is None:
        yield Finding("SKIP", "model", f"{engine.name} does not say which model it serves")
        return
    same = [each for each in namespaces if _model(each.model) == _model(engine.model)]
    if not same:
        there = ", ".join(sorted({each.model for each in namespaces})) or "none"
        yield Finding(
            "WARN", "model", f"{engine.model}: no namespace is of it; there are {there}",
            "it is made at the first put; if pages should be there, give the engine the others' --served-model-name",
        )  # fmt: skip
        return
    yield Finding("OK", "model", f"{engine.model}: {', '.join(each.name for each in same)}")
    # One namespace with the dtype and another one with the page size are none for this engine.
    fitting = [each for each in same if not _differing(engine, each)]
    yield from _fields(engine, fitting or [min(same, key=lambda each: _differing(engine, each))])
    yield from apart(same)


_HASH_ADVICE = {
    "vllm": ", or use --prefix-caching-hash-algo sha256",
    "lmcache": ", or set pre_caching_hash_algorithm to sha256_cbor (--hash-algorithm blake3 of its server)",
}
_CACHE_ADVICE = {"vllm": "start it with --enable-prefix-caching", "sglang": "start it without --disable-radix-cache"}


def _seed(engine: Engine) -> Finding:
    algorithm, seed = engine.hash_algorithm, engine.hash_seed
    seed_told = "not told" if seed is None else repr(seed) if seed else "not set"
    told = f"{algorithm or 'hash not told'}, {SEED_VARIABLE} {seed_told}"
    advice = f"export {SEED_VARIABLE}=0 before every engine that shares the cache, and restart them"
    advice += _HASH_ADVICE.get(engine.name, "")
    if seed and seed.isdigit():
        return Finding("OK", "hash seed", f"{told}: the same number must be set everywhere")
    if seed == "random":
        return Finding("FAIL", "hash seed", f"{told}: no process finds what another one put", advice)
    if algorithm in _SEEDED_HASHES:
        if seed is None:
            return Finding(
                "WARN", "hash seed", told, f"on its host: emberline kv doctor --pid PID; if it is not set, {advice}"
            )
        return Finding("FAIL", "hash seed", f"{told}: no process finds what another one put", advice)
    if algorithm is not None:
        detail = f"{told}: alike everywhere"
        if engine.name == "vllm" and not seed:
            return Finding("OK", "hash seed", f"{detail} from vLLM 0.32 on; an older one needs {SEED_VARIABLE}")
        return Finding("OK", "hash seed", detail)
    if seed == "":
        return Finding("WARN", "hash seed", told, f"needed by some hashes: {advice}")
    return Finding("SKIP", "hash seed", told, "on its host: emberline kv doctor --pid PID")


def _differing(engine: Engine, namespace: Namespace) -> int:
    """How many settings, of those that the engine tells, the namespace has otherwise."""
    said = [(getattr(engine, name), getattr(namespace, name)) for name in ("dtype", "revision", "layout")]
    fits = [_alike(mine, theirs) for mine, theirs in said if mine is not None]
    if engine.page_tokens is not None:
        fits.append(_fits(engine, namespace.page_tokens))
    return fits.count(False)


def _fits(engine: Engine, page_tokens: int) -> bool:
    """vLLM offloads several blocks as one page."""
    tokens = engine.page_tokens
    return page_tokens == tokens or (engine.name == "vllm" and bool(tokens) and page_tokens % (tokens or 1) == 0)


def _fields(engine: Engine, same: Sequence[Namespace]) -> Iterator[Finding]:
    pages = sorted({each.page_tokens for each in same})
    tokens = engine.page_tokens
    if tokens is None:
        yield Finding("SKIP", "page size", f"{engine.name} does not tell; namespaces have {pages}")
    else:
        fits = any(_fits(engine, page) for page in pages)
        option = {"vllm": "--block-size", "sglang": "--page-size", "lmcache": "chunk_size"}.get(
            engine.name, "page_tokens"
        )
        detail = f"{tokens} tokens; namespaces have {', '.join(map(str, pages))}"
        yield (
            Finding("OK", "page size", detail) if fits
            else Finding("FAIL", "page size", f"{detail}: nothing of theirs is found", f"set {option} {pages[0]}")
        )  # fmt: skip
    for name, setting in (
        ("dtype", {"vllm": "--kv-cache-dtype", "sglang": "--kv-cache-dtype"}.get(engine.name, "dtype")),
        ("revision", "revision, in the engine and in the adapter's settings,"),
        ("layout", {"sglang": "--hicache-mem-layout"}.get(engine.name, "layout")),
    ):
        mine = getattr(engine, name)
        theirs = sorted({str(getattr(each, name)) for each in same})
        if mine is None:
            yield Finding("SKIP", name, f"{engine.name} does not tell; namespaces have {', '.join(theirs) or 'none'}")
        elif any(_alike(mine, each) for each in theirs):
            yield Finding("OK", name, mine or "none")
        else:
            there = ", ".join(each or "none" for each in theirs)
            yield Finding("FAIL", name, f"{mine}; namespaces have {there}: nothing of theirs is found",
                          f"set {setting} to that of the others, if it should be the same")  # fmt: skip


def apart(same: Sequence[Namespace]) -> Iterator[Finding]:
    """Of several namespaces of one model: in what they differ, since their engines share nothing."""
    if len(same) < 2:
        return
    names = ("revision", "dtype", "layout", "page_tokens", "kinds")
    found = []
    for name in names:
        values = {str([kind.name for kind in each.kinds] if name == "kinds" else getattr(each, name)) for each in same}
        if len(values) > 1:
            found.append(f"{name} ({', '.join(sorted(value or 'none' for value in values))})")
    yield Finding(
        "WARN", "sharing", f"{len(same)} namespaces of {same[0].model} share no page: they differ in "
        f"{' and '.join(found) or 'the sizes of their payloads'}",
        "set it alike in all engines, if they run the same model",
    )  # fmt: skip


def _model(name: str) -> str:
    """What a path, a repository and a served name have in common."""
    return name.rstrip("/").rpartition("/")[2].lower()


def _alike(mine: str, theirs: str) -> bool:
    one, two = (text.lower().removeprefix("torch.") for text in (mine, theirs))
    return one == two or _DTYPES.get(one, one) == _DTYPES.get(two, two) or two.startswith(f"{one} ")
