"""The programs people bring, each on real data through `ember://`: one short test a program."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pandas
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch
import zarr
from emberfs.client.core import Core
from emberfs.filesystem import EmberFileSystem
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors


@pytest.fixture
def fs(tmp_path: Path) -> Iterator[EmberFileSystem]:
    filesystem = fsspec.filesystem("ember", url=f"ember://{tmp_path}/store", skip_instance_cache=True)
    yield filesystem
    filesystem.close()


@pytest.fixture
def url(fs: EmberFileSystem, tmp_path: Path) -> str:
    """The store as a URL prefix; the instance that fsspec makes for it shares the store with `fs`."""
    prefix = f"ember://{tmp_path}/store/!"
    fs.makedirs("/made")
    return prefix


@pytest.fixture
def sources() -> pandas.DataFrame:
    """Real text: modules of the standard library."""
    paths = sorted(Path(json.__file__).parent.parent.glob("[a-z]*.py"))[:60]
    return pandas.DataFrame(
        {
            "name": [p.name for p in paths],
            "size": [p.stat().st_size for p in paths],
            "text": [p.read_text() for p in paths],
        }
    )


def test_pandas_parquet_and_csv(url: str, sources: pandas.DataFrame) -> None:
    sources.to_parquet(f"{url}/tables/sources.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(f"{url}/tables/sources.parquet"), sources)
    sources.to_csv(f"{url}/tables/sources.csv", index=False)
    pandas.testing.assert_frame_equal(pandas.read_csv(f"{url}/tables/sources.csv"), sources)
    sources.to_json(f"{url}/tables/sources.jsonl", orient="records", lines=True)
    assert len(pandas.read_json(f"{url}/tables/sources.jsonl", lines=True)) == len(sources)


def test_pyarrow_dataset(fs: EmberFileSystem, sources: pandas.DataFrame) -> None:
    table = pyarrow.Table.from_pandas(sources).append_column("letter", [[name[0] for name in sources["name"]]])
    pyarrow.dataset.write_dataset(table, "/set", filesystem=fs, format="parquet", partitioning=["letter"])
    dataset = pyarrow.dataset.dataset("/set", filesystem=fs, format="parquet", partitioning=["letter"])
    assert dataset.count_rows() == len(sources)
    only_a = dataset.to_table(filter=pyarrow.dataset.field("letter") == "a")
    assert only_a.num_rows == sum(name.startswith("a") for name in sources["name"])


def test_duckdb_reads_and_writes(fs: EmberFileSystem, sources: pandas.DataFrame) -> None:
    for number, part in enumerate(np.array_split(np.arange(len(sources)), 4)):
        with fs.open(f"/sql/part-{number}.parquet", "wb") as file:
            sources.iloc[part].to_parquet(file)
    connection = duckdb.connect()
    connection.register_filesystem(fs)
    count, size = connection.execute("select count(*), sum(size) from 'ember:///sql/*.parquet'").fetchall()[0]
    assert (count, size) == (len(sources), sources["size"].sum())
    connection.execute("copy (select name from 'ember:///sql/*.parquet') to 'ember:///sql/names.csv' (header)")
    assert fs.cat_file("/sql/names.csv").splitlines()[1:] == [name.encode() for name in sources["name"]]
    connection.close()


def test_one_handle_read_from_many_threads(fs: EmberFileSystem) -> None:
    data = np.random.default_rng(1).bytes(3 << 20)
    fs.pipe_file("/shared", data)
    with fs.open("/shared") as file, ThreadPoolExecutor(4) as pool:

        def check(seed: int) -> bool:
            random = np.random.default_rng(seed)
            for _ in range(50):
                offset, size = int(random.integers(0, len(data))), int(random.integers(1, 200_000))
                file.seek(offset)
                if file.read(size) != data[offset : offset + size]:
                    return False
            return True

        assert all(pool.map(check, range(4)))


def test_zarr_array(url: str) -> None:
    array = zarr.create_array(f"{url}/grid.zarr", shape=(300, 200), chunks=(100, 100), dtype="f4")
    array[:] = np.arange(60_000, dtype="f4").reshape(300, 200)
    again = zarr.open_array(f"{url}/grid.zarr", mode="r")
    assert again[150:152, 10].tolist() == [150 * 200 + 10, 151 * 200 + 10]


def test_torch_save_and_load(fs: EmberFileSystem) -> None:
    state = {"weight": torch.arange(100_000, dtype=torch.float32), "step": 7}
    with fs.open("/model.pt", "wb") as file:
        torch.save(state, file)
    with fs.open("/model.pt", "rb") as file:
        loaded = torch.load(file, weights_only=True)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weight"], state["weight"])


def test_torch_tensor_as_a_buffer(fs: EmberFileSystem) -> None:
    weights = torch.randn(1000, 100).to(torch.bfloat16)
    with fs.client as client:
        client.put("/weights", weights)
        landed = torch.empty_like(weights)
        assert client.batch_read([("/weights", 0, weights.nbytes)], into=[landed]) == [weights.nbytes]
    assert torch.equal(landed, weights)


def test_safetensors(fs: EmberFileSystem) -> None:
    tensors = {"a": torch.ones(500, 3), "b": torch.arange(10)}
    fs.pipe_file("/model.safetensors", save_safetensors(tensors))
    loaded = load_safetensors(fs.cat_file("/model.safetensors"))
    assert torch.equal(loaded["a"], tensors["a"])
    assert torch.equal(loaded["b"], tensors["b"])


@pytest.mark.filterwarnings("ignore")  # datasets and its dependencies warn about themselves
def test_hugging_face_load_dataset(
    url: str, sources: pandas.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    sources.to_parquet(f"{url}/hf/train.parquet")
    # datasets puts "ember://" before a path it was listed, so the store has to come from elsewhere.
    monkeypatch.setenv("EMBERLINE_URL", f"ember://{tmp_path}/store")
    loaded = datasets.load_dataset(
        "parquet", data_files={"train": "ember://hf/train.parquet"}, cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert loaded["name"][:] == list(sources["name"])


def test_ranges_of_a_file_ask_for_it_once(fs: EmberFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("/one", "/two"):
        fs.pipe_file(name, name.encode() * 50_000)
    asked: list[str] = []
    file = Core.file

    async def counted(core: Core, path: str) -> Any:
        asked.append(path)
        return await file(core, path)

    monkeypatch.setattr(Core, "file", counted)
    paths = ["/one", "/two", "/one", "/none"]
    found = fs.cat_ranges(paths, [0, 4, 4, 0], [4, 8, 8, 1])
    assert found[:3] == [b"/one", b"/two", b"/one"] and isinstance(found[3], FileNotFoundError)
    assert asked == ["/one", "/two", "/none"]
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 1, on_error="raise")
    assert fs.cat_ranges(paths, 0, 1, on_error="omit") == [b"/"] * 3


def test_cat_ranges_append_and_transaction(fs: EmberFileSystem) -> None:
    fs.pipe_file("/log", b"0123456789" * 1000)
    with fs.open("/log", "ab") as file:
        file.write(b"end")
    assert fs.cat_ranges(["/log", "/log", "/none"], [0, -3, 0], [4, None, 1])[:2] == [b"0123", b"end"]
    assert isinstance(fs.cat_ranges(["/none"], [0], [1])[0], FileNotFoundError)
    with fs.transaction:
        fs.pipe_file("/in/transaction", b"x")
        assert not fs.exists("/in/transaction")
    assert fs.cat_file("/in/transaction") == b"x"
    with pytest.raises(RuntimeError), fs.transaction:
        fs.pipe_file("/in/vain", b"x")
        raise RuntimeError
    assert not fs.exists("/in/vain")


def test_asynchronous(tmp_path: Path) -> None:
    async def main() -> None:
        fs = EmberFileSystem(url=f"ember://{tmp_path}/store", asynchronous=True, skip_instance_cache=True)
        await asyncio.gather(*[fs._pipe_file(f"/dir/{number}", b"x" * number) for number in range(20)])
        assert len(await fs._ls("/dir", detail=False)) == 20
        assert await fs._cat_file("/dir/7") == b"x" * 7
        file = await fs.open_async("/dir/7")
        assert await file.read() == b"x" * 7
        await file.close()
        await fs._rm("/dir", recursive=True)
        assert not await fs._exists("/dir/7")
        fs.close()

    asyncio.run(main())


def test_a_listing_shows_links_in_a_circle(tmp_path: Path) -> None:
    fs = EmberFileSystem(url=f"ember://{tmp_path / 'store'}")
    with fs.client as client:
        client.symlink("/b", "/a")
        client.symlink("/a", "/b")
    assert [(entry["name"], entry["islink"]) for entry in fs.ls("/", detail=True)] == [("/a", True), ("/b", True)]
    fs.close()
