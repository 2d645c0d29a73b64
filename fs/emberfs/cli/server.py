"""`emberline server`: one role in this process, for a service manager or a container."""

from __future__ import annotations

from pathlib import Path

import click

CONFIGURATIONS = (
    """A configuration of a storage server:
  name = "storage-1"
  role = "storage"
  listen = "10.0.0.5:7401"
  managers = ["10.0.0.2:7301", "10.0.0.3:7301"]
  directory = "/srv/disk1"
  [tls]
  directory = "/etc/emberline/tls/storage\"""",
    """Of a kv server:
  name = "kv-1"
  role = "kv"
  listen = "10.0.0.2:7201"
  managers = ["10.0.0.2:7301", "10.0.0.3:7301"]
  directory = "/srv/ember-kv"
  [tls]
  directory = "/etc/emberline/tls/kv\"""",
    """Of a cluster manager; a metadata server has no [manager]:
  name = "manager-1"
  role = "manager"
  listen = "10.0.0.2:7301"
  managers = ["10.0.0.2:7301", "10.0.0.3:7301"]
  kv = "kv://10.0.0.2:7201"
  [tls]
  directory = "/etc/emberline/tls/manager"
  [manager]
  authority = "/etc/emberline/ca\"""",
)
"""What `--help` shows: a line that says of what, and TOML."""


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline server storage --config /etc/emberline/storage-1.toml\n"
    "  emberline server --config /srv/ember/manager-1/config.toml\n\n"
    + "\n\n".join(f"\b\n{text}" for text in CONFIGURATIONS)
)
@click.argument("role", required=False, type=click.Choice(["kv", "manager", "meta", "storage"]))
@click.option("--config", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML.")
def server(role: str | None, config: Path) -> None:
    """Serve one role until SIGTERM. ROLE, if given, must be that of the configuration.

    Prints one line of JSON to the standard output when it serves, and logs JSON lines to the standard error. After
    SIGTERM it takes no new call, lets those in the air end, and exits with 0.
    """
    from ..server import read_config
    from ..server.process import run_server

    settings = read_config(config)
    if role is not None and role != settings.role:
        raise click.UsageError(f"{config} is of the role {settings.role}, not {role}")
    run_server(settings)
