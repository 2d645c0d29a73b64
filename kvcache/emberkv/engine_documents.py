"""What serving engines tell of themselves, read: the answers of their own ports, their environment and configuration.

    vLLM      /server_info?config_format=json (with VLLM_SERVER_DEV_MODE=1 only), /v1/models, /metrics
    SGLang    /server_info, or /get_server_info of older ones, /v1/models
    LMCache   /config of its server; /conf, /meta and /env of its port in an engine; LMCACHE_*; its YAML

Of an environment only what decides on pages is looked at, and kept. Nothing is imported from an engine.

Does not know: how a document was come by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from .engines import SEED_VARIABLE, Engine, merged

PATHS = ("/server_info?config_format=json", "/get_server_info", "/config", "/conf", "/meta", "/env", "/v1/models",
         "/metrics")  # fmt: skip
"""Where engines tell something. What an earlier one says counts more."""

_OURS = "emberkv.adapters."
_CACHE_INFO = "vllm:cache_config_info{"
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_LINE = re.compile(r"\s*([\w.]+):[ \t]+(.*?)\s*(?: #.*)?")


def engine_at(path: str, text: str) -> Engine:
    """Of what an engine answered at one of `PATHS`. Raises ValueError for what tells nothing."""
    if path == "/metrics":
        return _vllm_metrics(text.splitlines())
    document = json.loads(text)
    if not isinstance(document, dict):
        raise ValueError(f"no JSON object but {type(document).__name__}")
    return engine_of_environment(document) if path == "/env" else engine_of(document)


def engine_of(document: Mapping[str, Any]) -> Engine:
    """Of what an engine answered, or of a flat object by the names of `Engine`. Raises ValueError."""
    if isinstance(document.get("vllm_config"), Mapping):
        return _vllm(document["vllm_config"])
    if "model_path" in document and "page_size" in document:
        return _sglang(document)
    if isinstance(document.get("mp"), Mapping) and "hash_algorithm" in document["mp"]:
        return _lmcache_server(document)
    if "pre_caching_hash_algorithm" in document:
        return _lmcache(document)
    if "model_name" in document and "kv_dtype" in document:
        return Engine(name="lmcache", model=_text(document["model_name"]), dtype=_dtype(document["kv_dtype"]))
    if isinstance(document.get("data"), Sequence) and document["data"]:
        return _models(document["data"][0])
    return _flat(document)


def engine_of_text(text: str) -> Engine:
    """Of a file: a JSON object as `engine_of` takes it, or LMCache's YAML, of whose lines the flat ones are read."""
    if text.lstrip().startswith("{"):
        document = json.loads(text)
        assert isinstance(document, dict)
        return engine_of(document)
    said = {found[1]: found[2].strip("\"'") for line in text.splitlines() if (found := _LINE.fullmatch(line))}
    given: dict[str, Any] = {"pre_caching_hash_algorithm": said.get("pre_caching_hash_algorithm", "builtin")}
    given["chunk_size"] = said.get("chunk_size", "256")
    if "emberkv" in said:
        given["extra_config"] = {"emberkv": json.loads(said["emberkv"])}
    if not said.keys() & {"chunk_size", "pre_caching_hash_algorithm", "local_cpu", "max_local_cpu_size"}:
        raise ValueError("neither JSON nor a configuration of LMCache")
    return _lmcache(given)


def engine_of_environment(variables: Mapping[str, str]) -> Engine:
    """Of the environment of an engine's process."""
    engine = Engine(hash_seed=variables.get(SEED_VARIABLE, ""))
    names = {"chunk_size": "LMCACHE_CHUNK_SIZE", "pre_caching_hash_algorithm": "LMCACHE_PRE_CACHING_HASH_ALGORITHM"}
    said = {name: variables[variable] for name, variable in names.items() if variable in variables}
    if not said:
        return engine
    return merged(engine, _lmcache({"pre_caching_hash_algorithm": "builtin", "chunk_size": "256", **said}))


def _flat(document: Mapping[str, Any]) -> Engine:
    known = {each.name for each in fields(Engine)}
    given: dict[str, Any] = {key: value for key, value in document.items() if key in known and value is not None}
    if SEED_VARIABLE in document:
        given["hash_seed"] = _text(document[SEED_VARIABLE])
    if not given:
        raise ValueError(f"no setting that is known here: {', '.join(sorted(known))}, {SEED_VARIABLE}")
    if type(given.get("page_tokens", 1)) is not int:
        raise ValueError(f"page_tokens is a number of tokens, not {given['page_tokens']!r}")
    return Engine(**given)


def _models(model: Mapping[str, Any]) -> Engine:
    owner = str(model.get("owned_by", ""))
    name = owner if owner in ("vllm", "sglang") else "engine"
    return Engine(name=name, model=_text(model.get("root") or model.get("id")))


def _vllm(config: Mapping[str, Any]) -> Engine:
    model, cache = config.get("model_config") or {}, config.get("cache_config") or {}
    transfer = config.get("kv_transfer_config", {"kv_connector": None})
    extra = (transfer or {}).get("kv_connector_extra_config") or {}
    has_none = transfer is None or transfer["kv_connector"] == "OffloadingConnector"  # Others may have one below them.
    ours = [tier for tier in extra.get("secondary_tiers") or () if str(tier.get("module_path", "")).startswith(_OURS)]
    return Engine(
        name="vllm",
        model=_text(model.get("model") or model.get("served_model_name")),
        revision=_text(ours[0].get("revision", "")) if ours else None,
        dtype=_dtype(cache.get("cache_dtype")) or _dtype(model.get("dtype")),
        page_tokens=cache.get("block_size"),
        hash_algorithm=_text(cache.get("prefix_caching_hash_algo")),
        caches_prefixes=cache.get("enable_prefix_caching"),
        cache_address=_text(ours[0].get("address")) if ours else "" if has_none else None,
    )


def _vllm_metrics(lines: Iterable[str]) -> Engine:
    """Prometheus' text: vLLM has a gauge with its cache's settings as labels, all of them text."""
    for line in lines:
        if line.startswith(_CACHE_INFO):
            said = dict(_LABEL.findall(line))
            tokens, is_on = said.get("block_size", ""), said.get("enable_prefix_caching")
            return Engine(
                name="vllm",
                dtype=_dtype(said.get("cache_dtype")),
                page_tokens=int(tokens) if tokens.isdigit() else None,
                hash_algorithm=said.get("prefix_caching_hash_algo"),
                caches_prefixes=None if is_on is None else is_on == "True",
            )
    raise ValueError(f"no {_CACHE_INFO.rstrip('{')} among the metrics")


def _sglang(document: Mapping[str, Any]) -> Engine:
    layout, backend = document.get("hicache_mem_layout"), document.get("hicache_storage_backend", "unknown")
    extra = document.get("hicache_storage_backend_extra_config") or "{}"
    # It may name a file of the engine's host instead.
    given = json.loads(extra) if isinstance(extra, str) and extra.lstrip().startswith("{") else None
    ours = given.get("emberkv") if given is not None and backend == "dynamic" else None
    is_told = given is not None if backend == "dynamic" else backend not in ("lmcache", "unknown")
    return Engine(
        name="sglang",
        model=_text(document.get("served_model_name") or document["model_path"]),
        revision=_text(ours.get("revision", "")) if ours else None,
        dtype=_dtype(document.get("kv_cache_dtype")) or _dtype(document.get("dtype")),
        layout=None if layout is None else f"sglang-{layout}",
        page_tokens=document["page_size"],
        hash_algorithm="sha256",  # Of its tokens, without a seed.
        caches_prefixes=not document.get("disable_radix_cache", False),
        cache_address=_text(ours.get("address")) if ours else "" if is_told else None,
    )


def _lmcache_server(document: Mapping[str, Any]) -> Engine:
    settings = document["mp"]
    adapters = ((document.get("storage_manager") or {}).get("l2_adapter_config") or {}).get("adapters") or ()
    ours = [each.get("adapter_params") or {} for each in adapters
            if str(each.get("module_path", "")).startswith(_OURS)]  # fmt: skip
    return Engine(
        name="lmcache",
        page_tokens=settings.get("chunk_size"),
        hash_algorithm=_text(settings["hash_algorithm"]),
        revision=_text(ours[0].get("revision", "")) if ours else None,
        dtype=_dtype(ours[0].get("dtype")) if ours else None,
        layout=_text(ours[0].get("layout")) if ours else None,
        cache_address=_text(ours[0].get("address")) if ours else "" if "storage_manager" in document else None,
    )


def _lmcache(document: Mapping[str, Any]) -> Engine:
    """In the engine's process."""
    ours = (document.get("extra_config") or {}).get("emberkv")
    chunk = document.get("chunk_size")
    return Engine(
        name="lmcache",
        page_tokens=None if chunk is None else int(chunk),
        hash_algorithm=_text(document["pre_caching_hash_algorithm"]),
        revision=_text(ours.get("revision", "")) if ours else None,
        cache_address=_text(ours.get("address")) if ours else "" if "extra_config" in document else None,
    )


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _dtype(value: Any) -> str | None:
    """ "auto" says nothing."""
    return None if value in (None, "auto") else str(value)
