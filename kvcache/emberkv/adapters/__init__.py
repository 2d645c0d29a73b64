"""Adapters: how serving engines come to use the cache. Each module is loaded by its engine, and imports it.

    lmcache.py           LMCache's L2 adapter, for its server process
    lmcache_storage.py   LMCache's storage plug-in, for engines that have LMCache in their own process
    vllm.py              a secondary tier of vLLM's offloading connector
    sglang.py            a storage backend of SGLang's HiCache

They share `door.py` (calls that never raise, and end in time), `workers.py` (threads) and `settings.py`. Nothing of
them is imported with `emberkv`. Configurations: docs/kvcache-adapters.md.
"""
