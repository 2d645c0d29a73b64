"""`kv doctor` against LMCache's own routers: of its server, and of its port in an engine."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import emberkv
import pytest
import torch
from fastapi import FastAPI
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig
from lmcache.v1.internal_api_server.common.env_api import router as env_router
from lmcache.v1.internal_api_server.vllm.conf_api import router as conf_router
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.multiprocess.config import MPServerConfig
from lmcache.v1.multiprocess.http_apis.config_api import router as config_router

from tests.adapters.asgi import serving
from tests.adapters.conftest import Service
from tests.adapters.doctor import doctor


def namespace(**fields: Any) -> emberkv.Namespace:
    usual = {"model": "tiny", "revision": "r1", "dtype": "bfloat16", "layout": "lmcache", "page_tokens": 256}
    return emberkv.Namespace(**{**usual, "kinds": (emberkv.Kind("kv"),), **fields})


def test_doctor_reads_a_live_lmcache_server(service: Service) -> None:
    emberkv.connect(service.address, namespace()).close()
    params = {"address": service.address, "revision": "r1", "dtype": "bfloat16", "layout": "lmcache"}
    plugin = PluginL2AdapterConfig("emberkv.adapters.lmcache", "EmberL2Adapter", params)
    memory = L1MemoryManagerConfig(1 << 30, True)
    storage = StorageManagerConfig(L1ManagerConfig(memory), EvictionConfig("LRU"), L2AdaptersConfig([plugin]))
    app = FastAPI()
    app.state.configs = {"mp": MPServerConfig(hash_algorithm="builtin"), "storage_manager": storage}
    app.include_router(config_router)
    with serving(app) as url:
        told = doctor(service.address, url)
    assert told["hash seed"]["state"] == "WARN" and "blake3" in told["hash seed"]["advice"]
    assert told["adapter"]["detail"] == f"lmcache is set to {service.address}"
    assert told["model"]["state"] == "SKIP", "models are told by the engines that come to it"


def test_doctor_reads_a_live_lmcache_in_an_engine(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    emberkv.connect(service.address, namespace(page_tokens=128)).close()
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=256, pre_caching_hash_algorithm="builtin",
        extra_config={"emberkv": {"address": service.address, "revision": "r1"}},
    )  # fmt: skip
    metadata = LMCacheMetadata("tiny", 1, 1, 0, 0, torch.bfloat16, (2, 2, 256, 2, 16))
    app = FastAPI()
    app.state.lmcache_adapter = SimpleNamespace(config=config, lmcache_engine_metadata=metadata)
    app.include_router(conf_router)
    app.include_router(env_router)
    for seed, state in (("0", "OK"), (None, "FAIL")):
        if seed is None:
            monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        else:
            monkeypatch.setenv("PYTHONHASHSEED", seed)
        with serving(app) as url:
            told = doctor(service.address, url, code=1)
        assert told["hash seed"]["state"] == state
        assert (told["model"]["state"], told["dtype"]["state"], told["revision"]["state"]) == ("OK", "OK", "OK")
        assert told["page size"]["advice"] == "set chunk_size 128"


def test_doctor_reads_the_environment_of_a_process(service: Service) -> None:
    emberkv.connect(service.address, namespace()).close()
    environment = {"LMCACHE_CHUNK_SIZE": "64", "LMCACHE_PRE_CACHING_HASH_ALGORITHM": "builtin"}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=environment, stdin=subprocess.PIPE) as process:
        app = FastAPI()
        app.get("/v1/models")(lambda: {"data": [{"id": "tiny", "owned_by": "somebody"}]})
        with serving(app) as url:
            told = doctor(service.address, url, "--pid", str(process.pid), code=1)
        process.communicate(b"\n")
    assert told["hash seed"]["state"] == "FAIL"
    assert told["page size"]["advice"] == "set chunk_size 256"
