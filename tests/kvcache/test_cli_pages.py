"""`emberline kv ls`, `match`, `verify`, `pin`, `export` and `import` on a service.

Run: pytest tests/kvcache/test_cli_pages.py
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import emberfs
import emberkv
import pytest
from emberkv.carry import all_pages
from emberkv.keys import ROOT
from emberkv.page import places_of
from emberkv.verify import verify

from tests.fs.cli_run import emberline, emberline_json
from tests.kvcache.serving import Server

PAGE = 20_000
NAMESPACE = emberkv.Namespace(
    model="test", dtype="bf16", layout="mla", page_tokens=4,
    kinds=(emberkv.Kind("kv"), emberkv.Kind("state", policy="trailing:1")),
)  # fmt: skip
PLAIN = emberkv.Namespace(model="plain", dtype="bf16", layout="mla", page_tokens=4, kinds=(emberkv.Kind("kv"),))
Serve = Callable[..., Server]


def page(seed: int) -> bytes:
    return hashlib.sha256(b"%d" % seed).digest() * (PAGE // 32)


def prompt(seed: int, pages: int) -> list[int]:
    return [seed * 1000 + each for each in range(4 * pages)]


def filled(cache: emberkv.KVCache, seed: int, pages: int) -> list[bytes]:
    keys = cache.keys(prompt(seed, pages))
    assert cache.put(keys, [page(seed * 100 + each) for each in range(pages)]) == ["stored"] * pages
    if len(cache.namespace.kinds) > 1:
        cache.put(keys[-1:], [page(seed)[:3200]], parent=keys[-2], kind="state")
    cache.flush()
    return keys


def damage(store: str, cache: emberkv.KVCache, key: bytes) -> None:
    """The payload of a page is another one, with right checksums of the store."""
    seat, place = cache._caller.seated(), places_of(cache.lookup([key])[0].places[0])[0]
    with emberfs.connect(store) as client, client.open(f"{seat.segments}/{place.segment:08x}", "r+b") as file:
        file.seek(place.offset + 500)
        file.write(b"damage")


def test_ls_and_match(serve: Serve, tmp_path: Path) -> None:
    address = serve().address
    with (
        emberkv.connect(address, PLAIN) as plain, emberkv.connect(address, NAMESPACE, tenant="acme") as acme,
    ):  # fmt: skip
        filled(plain, 1, 5)
        filled(acme, 1, 3)
        said = emberline("kv", "ls", "--address", address).stdout
        assert PLAIN.name in said and NAMESPACE.name in said
        rows = {row["name"]: row for row in emberline_json("kv", "ls", "--address", address)}
        assert rows[PLAIN.name]["pages"] == 5 and rows[PLAIN.name]["live_bytes"] == 5 * (PAGE - PAGE % 32 + 96)
        (row,) = emberline_json("kv", "ls", "test", "--address", address)
        assert (row["tenant"], row["pages"]) == ("acme", 3)
        assert "acme" in emberline("kv", "ls", NAMESPACE.name, "--address", address).stdout
        assert "name one of" in emberline("kv", "match", "--address", address, code=1, stdin=b"1").stderr
        assert "no namespace is called 'x'" in emberline("kv", "ls", "x", "--address", address, code=1).stderr
        where = ("--address", address, "--namespace", "plain")
        file = tmp_path / "prompt.json"
        file.write_text(json.dumps(prompt(1, 7)))
        (told,) = emberline_json("kv", "match", file, *where)
        assert (told["pages"], told["tokens"], told["reason"]) == (5, 20, "absent")
        assert told["next_key"] == plain.keys(prompt(1, 7))[5].hex()
        assert "5 of 7 pages hit, 20 tokens; page 6 is absent" in emberline("kv", "match", file, *where).stdout
        hex_keys = "\n".join(key.hex() for key in plain.keys(prompt(1, 5))).encode()
        assert "5 of 5" in emberline("kv", "match", *where, "--keys", stdin=hex_keys).stdout
        assert "0 of 1 page hit" in emberline("kv", "match", *where, stdin=b"9 9 9 9", code=1).stdout
        assert "no file of token ids" in emberline("kv", "match", *where, stdin=b"one", code=1).stderr
        assert "64 hex digits" in emberline("kv", "match", *where, "--keys", stdin=b"abcd", code=1).stderr
        assert "not one whole page" in emberline("kv", "match", *where, stdin=b"1 2", code=1).stderr


def test_pinned_pages_stay(serve: Serve) -> None:
    address = serve(capacity_bytes=4 << 20).address
    with emberkv.connect(address, PLAIN) as cache:
        keys = filled(cache, 1, 4)
        text = " ".join(map(str, prompt(1, 4))).encode()
        assert "4 of 4 pages pinned" in emberline("kv", "pin", "--for", "1h", "--address", address, stdin=text).stdout
        assert cache.stat()["namespaces"][PLAIN.name]["pinned_pages"] == 4
        for seed in range(2, 60):
            filled(cache, seed, 4)
        assert cache.match(keys).pages == 4
        assert "4 of 4 pages unpinned" in emberline("kv", "unpin", "--address", address, stdin=text).stdout
        for seed in range(60, 120):
            filled(cache, seed, 4)
        assert cache.stat()["namespaces"][PLAIN.name]["pinned_pages"] == 0
        assert "0 of 1 page pinned" in emberline("kv", "pin", "--address", address, stdin=b"9 9 9 9", code=1).stdout


def test_verify_finds_what_is_damaged_and_takes_it_out(serve: Serve, store: str) -> None:
    address = serve().address
    with emberkv.connect(address, NAMESPACE) as cache, emberkv.connect(address, NAMESPACE, tenant="b") as other:
        keys = filled(cache, 1, 30)
        filled(other, 2, 5)
        assert "37 pages" in emberline("kv", "verify", "--address", address).stdout
        (told,) = emberline_json("kv", "verify", "--address", address, "--tenant", "b")
        assert (told["pages"], told["damaged"], told["gone"], told["unread"]) == (6, [], 0, 0)
        damage(store, cache, keys[11])
        (told,) = emberline_json("kv", "verify", NAMESPACE.name, "--address", address, code=1)
        assert told["damaged"] == [{"key": keys[11].hex(), "kind": "kv"}]
        assert cache.match(keys).pages == 0 and cache.match(keys).reason == "no state"
        assert "0 damaged" in emberline("kv", "verify", "--address", address).stdout
        damage(store, cache, keys[3])
        said = emberline("kv", "verify", "--address", address, code=1)
        assert keys[3].hex() in said.stderr and "1 damaged, 0 could not be read" in said.stdout
        assert verify(cache, takes=iter([True] * 10 + [False] * 1000).__next__).pages == 9  # One of the ten is gone.
        message = emberline("kv", "verify", "--tenant", "x", "--address", address, code=1).stderr
        assert "tenant 'x' has nothing" in message


def test_pages_are_carried_to_another_service(serve: Serve, tmp_path: Path) -> None:
    address = serve().address
    file = tmp_path / "pages.ekv"
    with emberkv.connect(address, NAMESPACE, tenant="acme") as cache:
        keys = filled(cache, 1, 20)
        branch = [*keys[:7], *cache.keys(prompt(2, 5), parent=keys[6])]
        cache.put(branch[7:], [page(each) for each in range(5)], parent=keys[6])
        cache.flush()
        loose = cache.opaque_keys([b"x", b"y", b"z"])
        cache.put(loose, [page(each) for each in (70, 71, 72)], chained=False)
        cache.flush()
        order = all_pages(cache)
        assert len(order) == 28
        known = {ROOT}
        for key, parent in order:
            assert parent in known
            known.add(key)
        (told,) = emberline_json("kv", "export", file, "--address", address)
        assert (told["pages"], told["missing"]) == (29, 0)
        text = json.dumps(prompt(1, 20)).encode()
        (tmp_path / "prompt.json").write_bytes(text)
        some = tmp_path / "some.ekv"
        more = ("--prompt", tmp_path / "prompt.json", "--address", address)
        assert "21 payloads" in emberline("kv", "export", some, *more).stdout
        hit = cache.match(keys)
        pages = cache.get(hit)
        emberline("kv", "erase", "acme", "--address", address)
        assert cache.match(keys).pages == 0
        assert "29 stored" in emberline("kv", "import", file, "--address", address).stdout
        again = cache.match(keys)
        assert again.pages == 20 and cache.get(again) == pages
        assert cache.match(branch).reason == "no state" and cache.exists([*branch, *loose]) == [True] * 15
        (told,) = emberline_json("kv", "import", file, some, "--address", address)[:1]
        assert told["known"] == 29 and told["is_whole"]


def test_an_export_goes_on_and_a_cut_import_says_so(serve: Serve, tmp_path: Path) -> None:
    address = serve().address
    with emberkv.connect(address, PLAIN, tenant="a/b") as cache, emberkv.connect(address, PLAIN, tenant="c") as other:
        filled(cache, 1, 30)
        filled(other, 2, 3)
        message = emberline("kv", "export", tmp_path / "x.ekv", "--address", address, code=2).stderr
        assert "has 2 tenants" in message
        emberline("kv", "export", f"{tmp_path}/all/", "--address", address)
        names = sorted(path.name for path in (tmp_path / "all").iterdir())
        assert names == [f"{PLAIN.name}.a%2Fb.ekv", f"{PLAIN.name}.c.ekv"]
        whole = (tmp_path / "all" / names[0]).read_bytes()
        part = tmp_path / "one.ekv.part"
        part.write_bytes(whole[: len(whole) // 2])
        said = emberline("kv", "export", tmp_path / "one.ekv", "--tenant", "a/b", "--address", address)
        assert "going on" in said.stderr and "30 payloads" in said.stdout
        assert (tmp_path / "one.ekv").read_bytes() == whole and not part.exists()
        emberline("kv", "erase", "a/b", "--address", address)
        cut = tmp_path / "cut.ekv"
        cut.write_bytes(whole[: len(whole) // 2])
        assert "14 stored: damaged or cut off" in emberline("kv", "import", cut, "--address", address, code=1).stdout
        assert "14 known, 16 stored" in emberline("kv", "import", "-", "--address", address, stdin=whole).stdout
        junk = tmp_path / "a.ekv"
        junk.write_bytes(b"junk")
        both = emberline("kv", "import", junk, cut, "--address", address, code=1).stdout.splitlines()
        assert "a.ekv: this is no archive" in both[0] and "14 known" in both[1]
        told = emberline_json("kv", "import", junk, "--address", address, code=1)
        assert told == [{"file": str(junk), "is_whole": False, "error": "this is no archive of KV pages"}]
        (tmp_path / "two.ekv.part").write_bytes(whole[:100])
        wrong = ("kv", "export", tmp_path / "two.ekv", "--tenant", "c", "--address", address)
        assert "two.ekv.part is there, and this is no archive" in emberline(*wrong, code=1).stderr
        (tmp_path / "two.ekv.part").write_bytes(whole)
        assert "two.ekv.part is there, and it has pages of" in emberline(*wrong, code=1).stderr
        empty = tmp_path / "empty"
        empty.mkdir()
        assert "there is no *.ekv" in emberline("kv", "import", empty, "--address", address, code=1).stderr


def test_a_tenant_sees_its_own(serve: Serve, tmp_path: Path) -> None:
    digests = {name: [hashlib.sha256(name.encode()).hexdigest()] for name in ("a", "b")}
    file = tmp_path / "tenants.json"
    file.write_text(json.dumps({"tenants": digests, "operators": []}))
    address = serve(tenants=str(file)).address
    mine = ("--address", address, "--token", "a", "--tenant", "a")
    with (
        emberkv.connect(address, PLAIN, tenant="a", token="a") as cache,
        emberkv.connect(address, NAMESPACE, tenant="b", token="b") as other,
    ):
        filled(cache, 1, 5)
        filled(other, 1, 5)
        assert [row["name"] for row in emberline_json("kv", "ls", *mine)] == [PLAIN.name]
        text = " ".join(map(str, prompt(1, 5))).encode()
        assert "5 of 5" in emberline("kv", "match", *mine, stdin=text).stdout
        assert "5 of 5 pages pinned" in emberline("kv", "pin", *mine, stdin=text).stdout
        assert "5 pages" in emberline("kv", "verify", *mine).stdout
        assert "5 payloads" in emberline("kv", "export", tmp_path / "a.ekv", *mine).stdout
        more = ("--address", address, "--token", "a")
        assert "5 known" in emberline("kv", "import", tmp_path / "a.ekv", *more).stdout
        for arguments in (("ls", *more), ("match", *more, "--tenant", "b"), ("verify", *more, "--tenant", "b")):
            said = emberline("kv", *arguments, code=1, stdin=text).stderr
            assert "does not know this tenant with this token" in said


@pytest.mark.parametrize("command", ["match", "verify", "export", "pin"])
def test_a_service_without_namespaces_says_so(serve: Serve, command: str) -> None:
    arguments = ("x.ekv",) if command == "export" else ()
    said = emberline("kv", command, *arguments, "--address", serve().address, code=1, stdin=b"1 2 3 4")
    assert "name one of the namespaces: none" in said.stderr
