"""`kv doctor` against vLLM's own answers: its routers, its configuration and its metrics, behind a socket."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import emberkv
import prometheus_client
import torch
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, VllmConfig
from vllm.entrypoints.openai.models.api_router import router as models_router
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry
from vllm.entrypoints.serve.dev.server_info.api_router import attach_router
from vllm.v1.metrics.loggers import PrometheusStatLogger

from tests.adapters.asgi import serving
from tests.adapters.conftest import Service
from tests.adapters.doctor import doctor

MODEL = "/models/Qwen3-8B"
TIER = {"type": "EmberTier", "module_path": "emberkv.adapters.vllm", "address": "127.0.0.1:7400", "revision": "r1"}


def model_config() -> ModelConfig:
    """With what is told of it only: a whole one needs the files of a model."""
    found = ModelConfig.__new__(ModelConfig)
    for field in dataclasses.fields(ModelConfig):
        is_given = field.default_factory is dataclasses.MISSING
        default = field.default if is_given else field.default_factory()  # type: ignore[misc]
        setattr(found, field.name, None if default is dataclasses.MISSING else getattr(default, "default", default))
    found.model, found.served_model_name, found.dtype = MODEL, "qwen", torch.bfloat16
    return found


def vllm_config(*tiers: dict[str, Any]) -> VllmConfig:
    config = VllmConfig(cache_config=CacheConfig(block_size=16))
    config.model_config = model_config()
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="OffloadingConnector", kv_role="kv_both",
        kv_connector_extra_config={"spec_name": "TieringOffloadingSpec", "secondary_tiers": list(tiers)},
    )  # fmt: skip
    return config


def app_of(config: VllmConfig, *, is_dev: bool) -> FastAPI:
    app = FastAPI()
    app.state.vllm_config = config
    app.include_router(models_router)
    app.state.openai_serving_models = OpenAIModelRegistry(
        SimpleNamespace(max_model_len=4096),
        [BaseModelPath(name="qwen", model_path=MODEL)],  # type: ignore[arg-type]
    )
    registry = prometheus_client.CollectorRegistry()

    def gauge(name: str, documentation: str, multiprocess_mode: str, labelnames: Any) -> prometheus_client.Gauge:
        return prometheus_client.Gauge(name, documentation, labelnames, registry=registry)

    told = SimpleNamespace(_gauge_cls=gauge, engine_indexes=[0])
    PrometheusStatLogger.log_metrics_info(told, "cache_config", config.cache_config)  # type: ignore[arg-type]

    @app.get("/metrics")
    def metrics() -> PlainTextResponse:
        return PlainTextResponse(prometheus_client.generate_latest(registry).decode())

    if is_dev:
        attach_router(app)
    return app


def test_doctor_reads_a_live_vllm(service: Service) -> None:
    namespace = emberkv.Namespace(
        model=MODEL, revision="r1", dtype="bfloat16", layout="vllm-0", page_tokens=16, kinds=(emberkv.Kind("kv"),)
    )
    emberkv.connect(service.address, namespace).close()
    with serving(app_of(vllm_config(TIER), is_dev=True)) as url:
        told = doctor(service.address, url)
        states = {name: line["state"] for name, line in told.items()}
        same = dict.fromkeys(("hash seed", "adapter", "model", "page size", "dtype", "revision"), "OK")
        assert same.items() <= states.items()
        assert "vllm is set to 127.0.0.1:7400" in told["adapter"]["detail"]
    with serving(app_of(vllm_config({**TIER, "revision": "r2"}), is_dev=True)) as url:
        assert doctor(service.address, url, code=1)["revision"]["state"] == "FAIL"
    with serving(app_of(vllm_config({"type": "fs"}), is_dev=True)) as url:
        assert doctor(service.address, url)["adapter"]["state"] == "WARN"


def test_doctor_reads_a_vllm_that_is_not_in_development(service: Service) -> None:
    """Its models and its metrics are all that it tells."""
    namespace = emberkv.Namespace(
        model=MODEL, dtype="bfloat16", layout="vllm-0", page_tokens=24, kinds=(emberkv.Kind("kv"),)
    )
    emberkv.connect(service.address, namespace).close()
    with serving(app_of(vllm_config(TIER), is_dev=False)) as url:
        told = doctor(service.address, url, code=1)
    assert (told["hash seed"]["state"], told["model"]["state"], told["page size"]["state"]) == ("OK", "OK", "FAIL")
    assert told["page size"]["advice"] == "set --block-size 24"
    assert told["dtype"]["state"] == told["revision"]["state"] == "SKIP" and "adapter" not in told
