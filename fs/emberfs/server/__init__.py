"""One role in a process of its own: `emberline server ROLE --config FILE`."""

from .config import ServerConfig, read_config, write_config

__all__ = ["ServerConfig", "read_config", "write_config"]
