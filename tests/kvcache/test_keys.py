"""The keys of pages: the published vectors, and what is part of a key. Run: pytest tests/kvcache/test_keys.py

`vectors.json` is made by `written_from_the_page_of_formats` below, which shares no line with emberkv:
python -m tests.kvcache.test_keys > tests/kvcache/vectors.json
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from emberfs.errors import LimitExceeded
from emberkv.errors import InvalidNamespace
from emberkv.keys import ROOT, opaque_keys, page_keys
from emberkv.namespace import Kind, Namespace
from hypothesis import given
from hypothesis import strategies as st

VECTORS = json.loads((Path(__file__).parent / "vectors.json").read_text()) if __name__ != "__main__" else {}

NAMESPACES: dict[str, dict[str, Any]] = {
    "small": {"model": "m", "revision": "", "dtype": "bf16", "layout": "mla", "page_tokens": 2,
              "kinds": [["kv", 0, "all"]]},
    "v3": {"model": "deepseek-ai/DeepSeek-V3", "revision": "r1", "dtype": "bf16", "layout": "mla", "page_tokens": 64,
           "kinds": [["kv", 4_497_408, "all"]]},
    "v4": {"model": "DeepSeek-V4 ünï", "revision": "2026-04", "dtype": "fp8", "layout": "c4,c128", "page_tokens": 256,
           "kinds": [["kv", 227_840, "all"], ["indexer", 8_448, "all"], ["window", 0, "trailing:1"]]},
}  # fmt: skip

CHAINS: list[tuple[str, str, bytes, bytes, list[int]]] = [
    ("small", "default", b"", bytes(32), []),
    ("small", "default", b"", bytes(32), [0]),
    ("small", "default", b"", bytes(32), [0, 0]),
    ("small", "default", b"", bytes(32), [1, 2, 3, 4, 5]),
    ("small", "default", b"", bytes(range(32)), [1, 2]),
    ("small", "zoë", b"", bytes(32), [1, 2]),
    ("small", "default", b"pepper", bytes(32), [1, 2]),
    ("small", "", b"", bytes(32), [2**32 - 1, 2**31]),
    ("v3", "default", b"", bytes(32), [(7 * n) % 129_280 for n in range(200)]),
    ("v4", "default", b"", bytes(32), [(31 * n) % 129_280 for n in range(512)]),
]

ENGINE_KEYS = [b"", b"a", bytes(range(36))]


def written_from_the_page_of_formats() -> dict[str, Any]:
    """The vectors, by nothing but hashlib and struct."""

    def sha(*fields: bytes) -> bytes:
        return hashlib.sha256(b"".join(struct.pack("<I", len(field)) + field for field in fields)).digest()

    digests = {}
    for name, n in NAMESPACES.items():
        fields = [b"ekns1", n["model"].encode(), n["revision"].encode(), n["dtype"].encode(), n["layout"].encode()]
        fields += [struct.pack("<I", n["page_tokens"]), struct.pack("<I", len(n["kinds"]))]
        for kind, payload_bytes, policy in n["kinds"]:
            fields += [kind.encode(), struct.pack("<Q", payload_bytes), policy.encode()]
        digests[name] = sha(*fields)
    chains = []
    for name, tenant, salt, parent, tokens in CHAINS:
        size, keys, before = NAMESPACES[name]["page_tokens"], [], parent
        for start in range(0, len(tokens) - size + 1, size):
            page = struct.pack(f"<{size}I", *tokens[start : start + size])
            before = sha(b"ek1", digests[name], tenant.encode(), salt, before, page)
            keys.append(before.hex())
        chains.append({"namespace": name, "tenant": tenant, "salt": salt.hex(), "parent": parent.hex(),
                       "tokens": tokens, "keys": keys})  # fmt: skip
    opaque = [
        {"namespace": "small", "tenant": "default", "salt": salt.hex(), "engine_key": key.hex(),
         "key": sha(b"ek1o", digests["small"], b"default", salt, key).hex()}
        for salt in (b"", b"pepper") for key in ENGINE_KEYS
    ]  # fmt: skip
    namespaces = {name: {**fields, "digest": digests[name].hex()} for name, fields in NAMESPACES.items()}
    return {"namespaces": namespaces, "tokens": chains, "opaque": opaque}


def namespace(fields: dict[str, Any]) -> Namespace:
    known = {name: value for name, value in fields.items() if name not in ("kinds", "digest")}
    return Namespace(**known, kinds=tuple(Kind(*kind) for kind in fields["kinds"]))


SMALL = namespace(NAMESPACES["small"])
V3 = namespace(NAMESPACES["v3"])


# ---- the vectors


def test_the_vectors_are_those_of_the_page_of_formats() -> None:
    assert written_from_the_page_of_formats() == VECTORS


@pytest.mark.parametrize("name", NAMESPACES)
def test_the_digest_of_a_namespace_is_its_vector(name: str) -> None:
    assert namespace(VECTORS["namespaces"][name]).digest.hex() == VECTORS["namespaces"][name]["digest"]


@pytest.mark.parametrize("number", range(len(CHAINS)))
def test_keys_of_tokens_are_their_vectors(number: int) -> None:
    vector = VECTORS["tokens"][number]
    keys = page_keys(
        namespace(VECTORS["namespaces"][vector["namespace"]]),
        vector["tokens"],
        tenant=vector["tenant"],
        salt=bytes.fromhex(vector["salt"]),
        parent=bytes.fromhex(vector["parent"]),
    )
    assert [key.hex() for key in keys] == vector["keys"]


def test_opaque_keys_are_their_vectors() -> None:
    for vector in VECTORS["opaque"]:
        (key,) = opaque_keys(
            namespace(VECTORS["namespaces"][vector["namespace"]]),
            [bytes.fromhex(vector["engine_key"])],
            tenant=vector["tenant"],
            salt=bytes.fromhex(vector["salt"]),
        )
        assert key.hex() == vector["key"]


def test_the_formats_page_shows_the_vectors() -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for fields in VECTORS["namespaces"].values():
        assert fields["digest"] in page
    assert VECTORS["tokens"][3]["keys"][1] in page
    assert VECTORS["opaque"][1]["key"] in page


# ---- what is in a key


def test_keys_are_the_same_in_every_process() -> None:
    script = "from tests.kvcache.test_keys import V3, page_keys; print(page_keys(V3, list(range(64)))[0].hex())"
    found = set()
    for seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True,
                              text=True, cwd=Path(__file__).parents[2])  # fmt: skip
        found.add(done.stdout.strip())
    assert found == {page_keys(V3, range(64))[0].hex()}


def test_tokens_come_in_any_form() -> None:
    torch = pytest.importorskip("torch")
    tokens = [(7 * n) % 129_280 for n in range(200)]
    keys = page_keys(V3, tokens)
    assert len(keys) == 3
    forms: list[Any] = [tuple(tokens), range(200), memoryview(np.array(tokens, np.uint32)), torch.tensor(tokens)]
    forms += [np.array(tokens, dtype) for dtype in ("<i4", ">i4", "<u4", ">u4", "<i8", ">u8")]
    forms += [np.array([tokens, tokens])[0], np.repeat(tokens, 2)[::2], [np.int64(token) for token in tokens]]
    for form in forms:
        expected = page_keys(V3, list(range(200))) if isinstance(form, range) else keys
        assert page_keys(V3, form) == expected


@pytest.mark.parametrize("tokens", [[1.0, 2.0], ["1", "2"], [[1, 2]], np.zeros((2, 2), int), np.zeros(2), "ab", None])
def test_what_are_no_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(TypeError):
        page_keys(SMALL, tokens)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_32_bits_do_not_hold_is_refused(token: int) -> None:
    for tokens in ([0, token], np.array([0, token])):
        with pytest.raises(LimitExceeded, match="4294967295"):
            page_keys(SMALL, tokens)


def test_no_tokens_have_no_keys() -> None:
    for tokens in ([], (), np.array([]), np.array([], np.uint32), [1]):
        assert page_keys(SMALL, tokens) == []


def test_a_parent_is_a_key() -> None:
    with pytest.raises(LimitExceeded, match="32 bytes"):
        page_keys(SMALL, [1, 2], parent=b"short")


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 20))
def test_a_chain_can_be_continued_at_any_page(tokens: list[int], pages: int) -> None:
    keys = page_keys(SMALL, tokens)
    before = keys[:pages]
    assert before + page_keys(SMALL, tokens[len(before) * 2 :], parent=before[-1] if before else ROOT) == keys


@given(
    st.tuples(st.text(max_size=4), st.binary(max_size=4), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
    st.tuples(st.text(max_size=4), st.binary(max_size=4), st.lists(st.integers(0, 3), min_size=2, max_size=2)),
)
def test_keys_are_equal_only_where_everything_is(
    one: tuple[str, bytes, list[int]], other: tuple[str, bytes, list[int]]
) -> None:
    keys = [page_keys(SMALL, tokens, tenant=tenant, salt=salt) for tenant, salt, tokens in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_the_two_modes_share_no_key() -> None:
    engine_key = ROOT + struct.pack("<III", 8, 1, 2)
    assert page_keys(SMALL, [1, 2]) != opaque_keys(SMALL, [engine_key])


# ---- namespaces


@pytest.mark.parametrize(
    "change",
    [
        {"model": "m2"},
        {"revision": "2"},
        {"dtype": "fp8"},
        {"layout": "mla0"},
        {"page_tokens": 3},
        {"kinds": (Kind("kv", 1),)},
        {"kinds": (Kind("kw"),)},
        {"kinds": (Kind("kv"), Kind("window", policy="trailing:1"))},
        {"kinds": (Kind("kv"), Kind("window", policy="trailing:2"))},
        {"dtype": "bf16m", "layout": "la"},
    ],
)
def test_another_field_is_another_namespace(change: dict[str, Any]) -> None:
    other = msgspec.structs.replace(SMALL, **change)
    assert other.digest != SMALL.digest
    assert other.name != SMALL.name
    assert page_keys(other, [1, 2, 3]) != page_keys(SMALL, [1, 2, 3])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model": ""}, "model is 1 to 256"),
        ({"dtype": "x" * 257}, "dtype is 1 to 256"),
        ({"layout": "a\nb"}, "layout is"),
        ({"page_tokens": 0}, "page_tokens is 1 to"),
        ({"kinds": ()}, "1 to 16 kinds"),
        ({"kinds": (Kind("kv"), Kind("kv"))}, "same name"),
        ({"kinds": (Kind("window", policy="trailing:1"),)}, "the first kind"),
    ],
)
def test_fields_that_make_no_namespace_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidNamespace, match=complaint):
        Namespace(**{**msgspec.structs.asdict(SMALL), **change})


@pytest.mark.parametrize(
    "fields", [("K V",), ("",), ("kv", -1), ("kv", 2**27), ("kv", 0, "trailing:0"), ("kv", 0, "some"),
               ("kv", 0, "trailing:01")]
)  # fmt: skip
def test_fields_that_make_no_kind_are_refused(fields: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidNamespace):
        Kind(*fields)


def test_a_policy_says_how_many_pages_need_the_kind() -> None:
    assert Kind("kv").trailing is None
    assert Kind("window", policy="trailing:12").trailing == 12


def test_a_namespace_travels() -> None:
    for fields in NAMESPACES.values():
        sent = namespace(fields)
        for codec in (msgspec.json, msgspec.msgpack):
            got = codec.decode(codec.encode(sent), type=Namespace)
            assert got == sent
            assert got.digest == sent.digest
    with pytest.raises(msgspec.ValidationError, match="page_tokens is 1 to"):
        msgspec.json.decode(msgspec.json.encode(SMALL).replace(b'"page_tokens":2', b'"page_tokens":0'), type=Namespace)


def test_the_name_of_a_namespace_is_safe_in_a_path() -> None:
    assert V3.name == f"deepseek-ai-deepseek-v3-{V3.digest.hex()[:16]}"
    assert msgspec.structs.replace(SMALL, model="../模型").name.startswith("model-")


if __name__ == "__main__":
    print(json.dumps(written_from_the_page_of_formats(), ensure_ascii=False))
