"""What engines say of themselves, and what is found in it. Run: pytest tests/kvcache/test_engines.py"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import emberkv
import pytest
from emberkv.engine_documents import engine_at, engine_of, engine_of_environment, engine_of_text
from emberkv.engines import Engine, look, merged
from emberkv.namespace import Kind, Namespace

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.serving import Server

OURS = Namespace(
    model="Qwen3-8B", revision="r1", dtype="torch.bfloat16", layout="sglang-page_first", page_tokens=64,
    kinds=(Kind("kv"),),
)  # fmt: skip
SGLANG = {
    "model_path": "/models/Qwen3-8B", "served_model_name": "Qwen3-8B", "revision": "r1", "dtype": "bfloat16",
    "kv_cache_dtype": "auto", "page_size": 64, "hicache_mem_layout": "page_first", "disable_radix_cache": False,
    "hicache_storage_backend": "dynamic",
    "hicache_storage_backend_extra_config": json.dumps({"emberkv": {"address": "kv:7400", "revision": "r1"}}),
}  # fmt: skip
VLLM = {
    "vllm_config": {
        "model_config": {"model": "Qwen/Qwen3-8B", "served_model_name": None, "dtype": "torch.bfloat16"},
        "cache_config": {"block_size": 16, "cache_dtype": "auto", "prefix_caching_hash_algo": "sha256",
                         "enable_prefix_caching": True},
    },
    "vllm_env": {},
}  # fmt: skip
MODELS = {"object": "list", "data": [{"id": "Qwen3-8B", "owned_by": "vllm", "root": "Qwen/Qwen3-8B"}]}


def found(engine: Engine, *namespaces: Namespace) -> dict[str, tuple[str, str, str]]:
    return {each.name: (each.state, each.detail, each.advice) for each in look(engine, namespaces)}


def with_cache(**settings: object) -> dict[str, Any]:
    config = VLLM["vllm_config"]
    return {"vllm_config": {**config, "cache_config": {**config["cache_config"], **settings}}}  # type: ignore[dict-item]


def test_an_engine_like_the_others_finds_their_pages() -> None:
    states = {name: state for name, (state, _, _) in found(engine_of(SGLANG), OURS).items()}
    assert states == dict.fromkeys(("hash seed", "adapter", "model", "page size", "dtype", "revision", "layout"), "OK")
    told = found(engine_of(VLLM), OURS)
    assert told["page size"][0] == told["dtype"][0] == told["hash seed"][0] == "OK"
    assert told["layout"][0] == told["revision"][0] == "SKIP"


def test_what_differs_is_named_with_its_setting() -> None:
    told = found(engine_of({**SGLANG, "page_size": 1, "kv_cache_dtype": "fp8_e4m3",
                            "hicache_storage_backend_extra_config": '{"emberkv": {"address": "kv"}}',
                            "hicache_mem_layout": "layer_first", "disable_radix_cache": True}), OURS)  # fmt: skip
    assert told["page size"] == (
        "FAIL", "1 tokens; namespaces have 64: nothing of theirs is found", "set --page-size 64"
    )  # fmt: skip
    assert told["dtype"][0] == "FAIL" and "--kv-cache-dtype" in told["dtype"][2]
    assert told["revision"][0] == "FAIL" and "adapter" in told["revision"][2]
    assert told["layout"][0] == "FAIL" and "--hicache-mem-layout" in told["layout"][2]
    assert told["prefix cache"][0] == "FAIL" and "--disable-radix-cache" in told["prefix cache"][2]
    assert found(engine_of(with_cache(block_size=48)), OURS)["page size"][2] == "set --block-size 64"
    assert found(engine_of({**SGLANG, "served_model_name": "gpt"}), OURS)["model"][0] == "WARN"
    assert found(Engine(), OURS)["model"][0] == "SKIP"


@pytest.mark.parametrize(
    ("algorithm", "seed", "state"),
    [
        ("sha256", None, "OK"), ("sha256", "", "OK"), ("xxhash", "", "FAIL"), ("xxhash", None, "WARN"),
        ("builtin", "0", "OK"), ("builtin", "random", "FAIL"), (None, None, "SKIP"), (None, "", "WARN"),
        (None, "7", "OK"),
    ],
)  # fmt: skip
def test_the_seed_of_the_hash(algorithm: str | None, seed: str | None, state: str) -> None:
    told = found(Engine(name="vllm", hash_algorithm=algorithm, hash_seed=seed), OURS)["hash seed"]
    assert told[0] == state
    if state == "FAIL":
        assert "export PYTHONHASHSEED=0" in told[2] and "--prefix-caching-hash-algo sha256" in told[2]


def test_namespaces_of_one_model_that_share_nothing_are_told() -> None:
    other = emberkv.Namespace(model="qwen3-8b", dtype="fp8", layout=OURS.layout, page_tokens=32, kinds=OURS.kinds)
    state, detail, _ = found(engine_of(SGLANG), OURS, other)["sharing"]
    assert state == "WARN"
    assert "dtype (fp8, torch.bfloat16)" in detail and "page_tokens (32, 64)" in detail and "layout" not in detail


def test_one_namespace_must_have_it_all() -> None:
    def named(dtype: str, page_tokens: int) -> Namespace:
        return emberkv.Namespace(model="qwen3-8b", dtype=dtype, layout="l", page_tokens=page_tokens, kinds=OURS.kinds)

    engine = Engine(name="sglang", model="qwen3-8b", dtype="fp8_e4m3", page_tokens=64)
    told = found(engine, named("bfloat16", 64), named("fp8_e4m3", 32))
    assert {told["dtype"][0], told["page size"][0]} == {"OK", "FAIL"}
    told = found(engine, named("bfloat16", 64), named("fp8_e4m3", 32), named("fp8_e4m3 as uint8", 64))
    assert told["dtype"][0] == told["page size"][0] == "OK"
    assert found(engine, named("fp8", 64))["dtype"][0] == found(engine, named("fp8_e5m2", 64))["dtype"][0] == "FAIL"


def test_settings_in_a_file_are_checked() -> None:
    assert engine_of({"model": "m", "page_tokens": 64, "PYTHONHASHSEED": 0}).hash_seed == "0"
    assert engine_of(MODELS) == Engine(name="vllm", model="Qwen/Qwen3-8B")
    assert merged(engine_of(MODELS), engine_of(VLLM)).page_tokens == 16
    for bad in ({}, {"page_tokens": "many"}, {"something": 1}):
        with pytest.raises(ValueError, match=r"setting that is known|number of tokens"):
            engine_of(bad)


METRICS = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{block_size="16",cache_dtype="fp8",enable_prefix_caching="False",HASH} 1.0
""".replace("HASH", 'engine="0",note="a \\"b\\"",prefix_caching_hash_algo="xxhash"')


def test_vllms_metrics_tell_of_its_cache() -> None:
    told = engine_at("/metrics", METRICS)
    assert told == Engine(
        name="vllm", dtype="fp8", page_tokens=16, hash_algorithm="xxhash", caches_prefixes=False
    )  # fmt: skip
    assert engine_at("/metrics", METRICS.replace('"fp8"', '"auto"').replace('"16"', '"None"')).page_tokens is None
    with pytest.raises(ValueError, match="among the metrics"):
        engine_at("/metrics", "python_info 1.0")
    with pytest.raises(ValueError, match="no JSON object but list"):
        engine_at("/config", "[]")


def test_what_is_not_told_is_not_judged() -> None:
    nothing = found(engine_of({**SGLANG, "kv_cache_dtype": "auto", "dtype": "auto"}), OURS)
    assert nothing["dtype"][0] == "SKIP"
    for backend, extra, state in (
        ("dynamic", "@/etc/file.toml", None), ("dynamic", "{}", "WARN"), ("lmcache", None, None), (None, None, "WARN"),
        ("dynamic", '{"emberkv": {"address": "kv:7400"}}', "OK"),
    ):  # fmt: skip
        settings = {"hicache_storage_backend": backend, "hicache_storage_backend_extra_config": extra}
        assert found(engine_of({**SGLANG, **settings}), OURS).get("adapter", (None,))[0] == state
    for transfer, state in (
        (None, "WARN"), ({"kv_connector": "LMCacheMPConnector"}, None),
        ({"kv_connector": "OffloadingConnector"}, "WARN"),
    ):  # fmt: skip
        config = {**VLLM["vllm_config"], "kv_transfer_config": transfer}
        assert found(engine_of({"vllm_config": config}), OURS).get("adapter", (None,))[0] == state


def test_lmcache_is_read_from_its_environment_and_file() -> None:
    environment = {"PYTHONHASHSEED": "0", "LMCACHE_CHUNK_SIZE": "64", "SECRET": "x"}
    assert engine_of_environment(environment) == Engine(
        name="lmcache", hash_seed="0", hash_algorithm="builtin", page_tokens=64
    )  # fmt: skip
    assert engine_of_environment({"SECRET": "x"}) == Engine(hash_seed="")
    text = """
chunk_size: 128  # tokens
pre_caching_hash_algorithm: "sha256_cbor"
storage_plugins: ["emberkv"]
extra_config:
  storage_plugin.emberkv.module_path: emberkv.adapters.lmcache_storage
  emberkv: {"address": "kv:7400", "revision": "r1"}
"""
    told = engine_of_text(text)
    assert told == Engine(
        name="lmcache", hash_algorithm="sha256_cbor", page_tokens=128, revision="r1", cache_address="kv:7400"
    )  # fmt: skip
    with pytest.raises(ValueError, match="neither JSON nor"):
        engine_of_text("something: else")
    server = {"mp": {"chunk_size": 256, "hash_algorithm": "builtin"}, "storage_manager": {}}
    seed = found(engine_of(server), OURS)["hash seed"]
    assert seed[0] == "WARN" and "--hash-algorithm blake3" in seed[2]


# ---- the command


@pytest.fixture
def engine() -> Iterator[Callable[[dict[str, Any]], str]]:
    """Answers GET by path."""
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def start(pages: dict[str, Any]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                page = pages.get(self.path)
                self.send_response(404 if page is None else 200)
                self.end_headers()
                self.wfile.write((page if isinstance(page, str) else json.dumps(page)).encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def doctor(*arguments: object, code: int = 0) -> dict[str, dict[str, str]]:
    return {line["name"]: line for line in emberline_json("kv", "doctor", *arguments, code=code)}


def test_doctor_looks_at_service_and_engine(
    serve: Callable[..., Server], engine: Callable[[dict[str, Any]], str], tmp_path: Path
) -> None:
    server = serve()
    with emberkv.connect(server.address, OURS) as cache:
        cache.put(cache.keys(range(128)), [b"x" * 1000] * 2, durable="committed")
        told = doctor("--address", server.address)
        assert {line["state"] for line in told.values()} == {"OK", "SKIP"}
        assert "2 pages" in told[OURS.name]["detail"] and "free in ember://" in told["store"]["detail"]
        url = engine({"/server_info?config_format=json": SGLANG})
        told = doctor("--address", server.address, "--engine", url)
        assert told["page size"]["state"] == told["model"]["state"] == "OK"
        metered = engine({"/v1/models": MODELS, "/metrics": METRICS})
        told = doctor("--address", server.address, "--engine", metered, code=1)
        assert told["prefix cache"]["state"] == "FAIL" and told["page size"]["state"] == "OK"
        vllm = engine({"/v1/models": MODELS})
        told = doctor("--address", server.address, "--engine", f"{vllm}/v1/models")
        assert told["model"]["state"] == "OK"
        told = doctor("--address", server.address, "--engine", vllm)
        assert told["model"]["state"] == "OK" and told["page size"]["state"] == "SKIP"
        assert doctor("--address", server.address, "--engine", engine({}), code=1)["engine"]["state"] == "FAIL"
        for environment, state in (({"PYTHONHASHSEED": "3"}, "OK"), ({}, "WARN")):
            base = {key: value for key, value in os.environ.items() if key != "PYTHONHASHSEED"}
            with subprocess.Popen(
                [sys.executable, "-c", "input()"], env={**base, **environment}, stdin=subprocess.PIPE
            ) as process:  # fmt: skip
                told = doctor("--address", server.address, "--engine", vllm, "--pid", process.pid)
                assert told["hash seed"]["state"] == state
                process.communicate(b"\n")
        cache.match(cache.keys(range(1000, 1128)))
        told = doctor("--address", server.address, code=1)
        assert told[OURS.name]["state"] == "FAIL" and "they end as absent" in told[OURS.name]["detail"]
        settings = tmp_path / "settings.json"
        settings.write_text(json.dumps({"model": "Qwen3-8B", "page_tokens": 32, "name": "sglang"}))
        said = emberline("kv", "doctor", "--address", server.address, "--engine", settings, code=1).stdout
        assert "-> set --page-size 64" in said
        settings.write_text("[1]")
        for where in ("--engine", settings), ("--engine", tmp_path / "none"), ("--engine", "http://127.0.0.1:9"):
            told = doctor("--address", server.address, *where, code=1)
            assert str(where[1]) in told["engine"]["detail"] and "--help" in told["engine"]["advice"]
    server.end()
    assert doctor("--address", server.address, code=1)["service"]["state"] == "FAIL"
