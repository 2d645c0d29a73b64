"""`emberline kv rebuild` on a store whose index is gone. Run: pytest tests/kvcache/test_cli_rebuild.py"""

from __future__ import annotations

import signal
from collections.abc import Callable

import emberfs
import emberkv

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.serving import Server
from tests.kvcache.test_cli_pages import NAMESPACE, filled, page

Serve = Callable[..., Server]
PROMPTS = 12


def check_all(cache: emberkv.KVCache, keys: list[list[bytes]]) -> None:
    for prompt, chain in enumerate(keys):
        hit = cache.match(chain)
        assert hit.pages == 20
        assert cache.get(hit) == [page(100 * prompt + each) for each in range(20)]
        assert cache.get(hit, kind="state")[-1] == page(prompt)[:3200]


def test_a_namespace_without_an_index_is_rebuilt_from_its_pages(serve: Serve, store: str) -> None:
    server = serve()
    with emberkv.connect(server.address, NAMESPACE, tenant="acme") as cache:
        keys = [filled(cache, prompt, 20) for prompt in range(PROMPTS)]
        check_all(cache, keys)
    directory, name = f"/kv/{NAMESPACE.name}", NAMESPACE.name
    there = emberline("kv", "rebuild", name, "--store", store, code=1)
    assert "there is nothing to rebuild" in there.stderr
    served = emberline("kv", "rebuild", name, "--store", store, "--force", code=None)
    assert served.exit_code and "is served at" in served.stderr + str(served.exception)
    server.end(signal.SIGKILL)
    with emberfs.connect(store) as client:
        client.remove(f"{directory}/index", recursive=True, trash=False)
    (report,) = emberline_json("kv", "rebuild", "test", "--store", store, "--dry-run")
    assert report["pages"] == 21 * PROMPTS and not report["is_written"]
    with emberfs.connect(store) as client:
        assert not client.exists(f"{directory}/index")
    text = emberline("kv", "rebuild", "test", "--store", store).stdout
    assert f"{21 * PROMPTS} pages" in text and f"acme {20 * PROMPTS}" in text
    with emberkv.connect(serve().address, NAMESPACE, tenant="acme") as cache:
        check_all(cache, keys)
        assert filled(cache, 99, 3)


def test_a_service_says_what_to_do_about_an_index_that_is_gone(serve: Serve, store: str) -> None:
    server = serve()
    with emberkv.connect(server.address, NAMESPACE) as cache:
        keys = filled(cache, 1, 20)
    server.end()
    with emberfs.connect(store) as client:
        client.remove(f"/kv/{NAMESPACE.name}/index", recursive=True, trash=False)
        before = [name for name, _ in client.list(f"/kv/{NAMESPACE.name}/segments")]
    server = serve()
    server.process.communicate(timeout=60)
    assert server.process.returncode, "it ends, and removes no page"
    with emberfs.connect(store) as client:
        assert [name for name, _ in client.list(f"/kv/{NAMESPACE.name}/segments")] == before
    emberline("kv", "rebuild", "test", "--store", store)
    with emberkv.connect(serve().address, NAMESPACE) as cache:
        assert cache.match(keys).pages == 20


def test_which_namespace_has_to_be_said(serve: Serve, store: str) -> None:
    emberfs.connect(store).close()
    assert "no one namespace begins with 'x'" in emberline("kv", "rebuild", "x", "--store", store, code=1).stderr
