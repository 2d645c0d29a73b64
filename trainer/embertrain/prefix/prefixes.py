"""`Prefixes`: where an engine keeps pages of prompts, and how. Handed to `Engine`, which opens it for its model."""

from __future__ import annotations

from dataclasses import dataclass

from emberkv.adapters.door import Door
from emberkv.adapters.settings import Settings

from ..cache.spec import CacheSpec
from ..model.model import Model
from .layout import Layout
from .numerics import namespace_of
from .reuse import Reuse
from .windows import Windows


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Raises ConfigError, or InvalidNamespace of emberkv, for what makes no sense."""

    address: str
    """Of a KV-cache service (`emberline kv serve`): host:port, unix:/path, or several with commas."""
    windows: str = "full"
    """What is kept of V4's windows: "full", "periodic:4096" (tokens, a multiple of 128) or "zero" (`windows`)."""
    tenant: str = "default"
    """Whose pages: a tenant finds its own only."""
    token: str = ""
    """The tenant's, where the service asks for one."""
    salt: str = ""
    """More that keys depend on, so that nobody guesses them."""
    model: str = ""
    """The model's name, for people who look at the store; "": its family."""
    revision: str = ""
    """Of its weights: who has others says another one. "": their SHA-256, for which they are read once when the engine
    is made. Weights that change afterwards need a new engine."""
    timeout_s: float = 2.0
    """Seconds within which the service answers, and the storage. What takes longer is a miss."""
    lease_s: float = 10.0
    """Seconds for which pages that were matched stay, to be read."""

    tls: str | None = None
    """Directory with ca.pem, and cert.pem and key.pem if the service asks for them."""
    credentials: str | None = None
    """Directory with those for the store, if they are elsewhere than `emberfs.connect` looks."""
    grants: bool = False
    """Pages are read and written under grants: what credentials of a reader or writer need."""

    def __post_init__(self) -> None:
        Windows.read(self.windows)
        self._settings()

    def open(self, model: Model, spec: CacheSpec, *, batch_invariant: bool) -> Reuse:
        """For a model as it is now, and a cache of its rows.

        A service that is away is a warning, and misses until it is back. Raises AccessDenied, NamespaceMismatch.
        """
        layout, windows = Layout(spec), Windows.read(self.windows)
        namespace = namespace_of(
            model,
            layout,
            name=self.model,
            revision=self.revision,
            keeps_states=bool(layout.states_bytes) and windows.interval_tokens is not None,
            batch_invariant=batch_invariant,
        )
        door = Door(self._settings(), namespace)
        return Reuse(door, namespace, spec, layout, windows, answers=not batch_invariant)

    def _settings(self) -> Settings:
        return Settings(
            address=self.address,
            tenant=self.tenant,
            token=self.token,
            salt=self.salt,
            timeout_s=self.timeout_s,
            lease_s=self.lease_s,
            tls=self.tls,
            credentials=self.credentials,
            grants=self.grants,
        )
