from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import emberflow
import fsspec
import pyarrow as pa
import pytest
from emberfs.filesystem import EmberFileSystem

from benchmarks import tpch


@pytest.fixture(autouse=True)
def stores_are_let_go() -> Iterator[None]:
    """An open store takes a TiB of addresses, and a process has 128."""
    yield
    for filesystem in list(EmberFileSystem._cache.values()):
        filesystem.close()


@pytest.fixture(autouse=True, scope="session")
def runtime_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """These tests' jobs wait for each other, not for what else runs on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield


@pytest.fixture(autouse=True, scope="session")
def arrow_has_threads() -> None:
    """Whatever OMP_NUM_THREADS is set to for torch: an order must not rest on there being one."""
    pa.set_cpu_count(2)


@pytest.fixture(autouse=True)
def partitions_are_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each partition that is asked for is a task, even without rows: else what tests are about, rows that meet from
    several tasks, would be in one. How it is outside of tests, test_tpch looks at, and test_shares."""
    monkeypatch.setattr("emberflow.jobs.TOGETHER_BYTES", -1)


@pytest.fixture
def session() -> Iterator[emberflow.Session]:
    with emberflow.init(threads=2) as session:
        yield session


@pytest.fixture(params=["path", "file", "memory", "ember"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A fresh directory, once per kind of URL."""
    if request.param == "memory":
        name = f"/{uuid.uuid4().hex}"
        yield f"memory:/{name}"
        memory = fsspec.filesystem("memory")
        if memory.exists(name):
            memory.rm(name, recursive=True)
        return
    if request.param == "ember":
        yield f"ember://{tmp_path}/store/!/root"
        return
    yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


@pytest.fixture
def numbers(session: emberflow.Session) -> emberflow.DataFrame:
    """1000 rows: n = 0..999, k = n % 3 as text, and a text."""
    return session.sql("select range n, 'k' || (range % 3) k, md5(range::varchar) t from range(1000)")


@pytest.fixture(scope="session")
def tpch_tables() -> dict[str, list[str]]:
    """TPC-H at scale factor 0.1: the Parquet files of each table, in 8 parts. Made when first asked for, then kept."""
    return tpch.data(0.1)


@pytest.fixture(scope="session")
def tpch_queries() -> dict[int, str]:
    """The texts of TPC-H's queries by their numbers."""
    return tpch.queries()
