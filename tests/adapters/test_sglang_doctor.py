"""`kv doctor` against what SGLang's server tells of itself. Its application is not importable here, its answer is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import emberkv
from fastapi import FastAPI
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.common import build_server_info, msgspec_to_builtins

from tests.adapters.asgi import serving
from tests.adapters.conftest import Service
from tests.adapters.doctor import doctor

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 128,
    "max_position_embeddings": 512, "torch_dtype": "bfloat16",
}  # fmt: skip


def app_of(path: Path, *, route: str, **settings: Any) -> FastAPI:
    """As `sglang.srt.entrypoints.http_server.server_info` answers."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG))
    args = ServerArgs(
        model_path=str(path), served_model_name="tiny", device="cpu", skip_tokenizer_init=True, **settings
    )
    app = FastAPI()

    @app.get(route)
    async def server_info() -> Any:
        return msgspec_to_builtins({**build_server_info(args, {"max_total_num_tokens": 1}), "internal_states": [{}]})

    return app


def test_doctor_reads_a_live_sglang(service: Service, tmp_path: Path) -> None:
    namespace = emberkv.Namespace(
        model="tiny", revision="r1", dtype="fp8_e4m3", layout="sglang-page_first", page_tokens=64,
        kinds=(emberkv.Kind("kv"),),
    )  # fmt: skip
    emberkv.connect(service.address, namespace).close()
    extra = {"backend_name": "emberkv", "emberkv": {"address": service.address, "revision": "r1"}}
    hicache: dict[str, Any] = {
        "enable_hierarchical_cache": True, "hicache_storage_backend": "dynamic", "hicache_mem_layout": "page_first",
        "hicache_storage_backend_extra_config": json.dumps(extra), "kv_cache_dtype": "fp8_e4m3",
    }  # fmt: skip
    for route in ("/server_info", "/get_server_info"):
        with serving(app_of(tmp_path / "tiny", route=route, page_size=64, **hicache)) as url:
            told = doctor(service.address, url)
        states = {name: line["state"] for name, line in told.items()}
        same = ("hash seed", "adapter", "model", "page size", "dtype", "revision", "layout")
        assert dict.fromkeys(same, "OK").items() <= states.items()
    with serving(app_of(tmp_path / "tiny", route="/server_info", page_size=32)) as url:
        told = doctor(service.address, url, code=1)
    assert told["page size"]["advice"] == "set --page-size 64"
    assert (told["adapter"]["state"], told["dtype"]["state"]) == ("WARN", "SKIP")
