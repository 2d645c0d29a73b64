"""`emberline server`: one role in this process, for a service manager or a container."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(
    epilog="\b\nExamples:\n"
    "  emberline server storage --config /etc/emberline/storage-1.toml\n"
    "  emberline server --config /srv/ember/manager-1/config.toml\n\n"
    "\b\nA configuration:\n"
    '  name = "storage-1"\n'
    '  role = "storage"\n'
    '  listen = "10.0.0.5:7401"\n'
    '  managers = ["10.0.0.2:7301", "10.0.0.3:7301"]\n'
    '  directory = "/srv/disk1"\n'
    "  [tls]\n"
    '  directory = "/etc/emberline/tls"'
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
