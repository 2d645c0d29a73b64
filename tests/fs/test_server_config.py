"""What a server process is told, and what it says to a wrong word. Run: pytest tests/fs/test_server_config.py"""

from __future__ import annotations

from pathlib import Path

import pytest
from emberfs.cli.server import CONFIGURATIONS
from emberfs.errors import InvalidPath
from emberfs.routing import Role
from emberfs.server import ServerConfig, read_config, write_config
from emberfs.server.config import ManagerSection, StorageSection, TlsConfig

from tests.fs.cli_run import emberline, start_emberline

STORAGE = """
name = "storage-1"
role = "storage"
listen = "127.0.0.1:0"
managers = ["127.0.0.1:1"]
directory = "{directory}"
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_what_is_written_is_read(path: Path) -> None:
    config = ServerConfig(
        name="storage-1",
        role=Role.STORAGE,
        listen="127.0.0.1:7401",
        managers=["a:1", "[::1]:2"],
        directory='/srv/"odd" \\ grüße',
        rack="r1",
        drain_s=0.5,
        tls=TlsConfig(directory="/etc/tls", insecure=True),
        storage=StorageSection(reserve_bytes=1),
        manager=ManagerSection(authority="/ca"),
    )
    write_config(path, config)
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "name"),
        ("name = ", "config.toml"),
        (
            STORAGE.replace("listen", "lisen"),
            "unknown name 'lisen'; did you mean listen?; there are name, role, listen,",
        ),
        (STORAGE + "[storag]\n", "did you mean storage?"),
        (STORAGE + "[storage]\nreserve = 1\n", "unknown name 'reserve' in [storage]; did you mean reserve_bytes?"),
        (STORAGE + "[tls]\nrack = 'a'\n", "unknown name 'rack' in [tls]; it belongs above the first [table]"),
        (STORAGE + "[storage]\ndirectory = 'a'\n", "unknown name 'directory' in [storage]; it belongs above"),
        (STORAGE + "reserve_bytes = 1\n", "unknown name 'reserve_bytes'; it belongs in [storage]"),
        (STORAGE + "[tls]\nxyz = 1\n", "unknown name 'xyz' in [tls]; there are directory, insecure"),
        (STORAGE.replace('"storage"', '"boss"'), "boss"),
        (STORAGE.replace('"storage-1"', '"my storage"'), "a word"),
        (STORAGE.replace('managers = ["127.0.0.1:1"]', ""), "needs managers"),
        (STORAGE.replace('"127.0.0.1:1"', '"127.0.0.1"'), "host:port"),
        (STORAGE.replace('directory = "{directory}"', ""), "needs directory"),
        (STORAGE.replace('"storage"', '"meta"'), "needs kv"),
        (STORAGE + 'log_level = "loud"\n', "loud"),
        (STORAGE + "[storage]\nreserve_bytes = 'all'\n", "reserve_bytes"),
        (STORAGE + "[storage]\ntombstone_s = 5\n", "`emberline cluster config set tombstone_s=VALUE`"),
    ],
)
def test_a_mistake_names_the_file_and_the_field(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(InvalidPath) as caught:
        read_config(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    result = emberline("server", "--config", path, code=1)
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_refuses_another_role(path: Path) -> None:
    path.write_text(STORAGE)
    assert "is of the role storage, not meta" in emberline("server", "meta", "--config", path, code=2).stderr


def test_a_server_needs_tls_where_others_reach_it(path: Path, tmp_path: Path) -> None:
    path.write_text(STORAGE.format(directory=tmp_path / "data").replace('"127.0.0.1:0"', '"0.0.0.0:0"'))
    with start_emberline("server", "--config", path) as process:
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output == b""
    assert b"needs TLS" in errors.splitlines()[-1]
    assert b"Traceback" not in errors


def test_a_server_says_that_it_is_ready_and_leaves_when_told(path: Path, tmp_path: Path) -> None:
    text = STORAGE.format(directory=tmp_path / "data").replace("storage", "kv").replace('["127.0.0.1:1"]', "[]")
    path.write_text(text)
    with start_emberline("server", "kv", "--config", path) as process:
        assert process.stdout is not None
        assert b'"ready": true' in process.stdout.readline()
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert b"serves at" in errors


# ---- what is shown to the reader

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "fs/deploy/config").glob("*.toml"))


def test_there_is_an_example_of_each_role_and_it_is_loaded() -> None:
    configs = {file.stem: read_config(file) for file in SHIPPED}
    assert {name: config.name for name, config in configs.items()} == {name: name for name in configs}
    assert {config.role for config in configs.values()} == set(Role)
    assert len({config.address for config in configs.values()}) == len(configs)
    managers = {tuple(config.managers) for config in configs.values()}
    assert managers == {(configs["manager-1"].address, "10.0.0.3:7301")}
    assert {configs[name].kv for name in ("manager-1", "meta-1")} == {f"kv://{configs['kv-1'].address}"}


def test_the_operators_page_has_the_same_examples() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for file in SHIPPED:
        assert f"```toml\n{file.read_text()}```" in page


def test_the_examples_of_the_help_are_loaded(path: Path) -> None:
    roles = set()
    for text in CONFIGURATIONS:
        path.write_text(text.partition("\n")[2])
        roles.add(read_config(path).role)
        assert text.splitlines()[-1] in emberline("server", "--help").stdout
    assert roles == {Role.KV, Role.MANAGER, Role.STORAGE}
