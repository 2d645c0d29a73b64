"""What hits on a trace are worth: prefill that was not computed, and money. For `kv simulate` and `kv replay`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from emberkv.models import Model
    from emberkv.trace import Trace

dtype_option = click.option("--dtype", type=click.Choice(["bf16", "fp8"]), help="Of the KV; else what is usual.")
active_option = click.option(
    "--active-params",
    type=float,
    metavar="N",
    help="Parameters that compute each token, as in 37e9, for a config.json.",
)
model_option = click.option(
    "--model", metavar="MODEL", help="A name or config.json, as for `kv size`: for bytes and FLOPs."
)
price_miss_option = click.option(
    "--price-miss", type=click.FloatRange(min=0), metavar="P", help="Of a million tokens that missed."
)
price_hit_option = click.option(
    "--price-hit", type=click.FloatRange(min=0), default=0.0, metavar="P", help="Of a million that hit."
)


def model_of(name: str, dtype: str | None, active_params: float | None) -> Model:
    """By its name, or by the path of its config.json or of the directory that holds it."""
    import msgspec
    from emberkv.models import known_model, model_from_config

    path = Path(name)
    if not path.exists():
        return known_model(name, dtype=dtype)
    path = path / "config.json" if path.is_dir() else path
    try:
        config = msgspec.json.decode(path.read_bytes(), type=dict)
    except msgspec.DecodeError as error:
        raise click.ClickException(f"{path} is no config of a model: {error}") from error
    label = path.parent.name if path.name == "config.json" else path.stem
    return model_from_config(config, name=label, dtype=dtype or "bf16", active_params=active_params)


@dataclass(frozen=True, kw_only=True, slots=True)
class Worth:
    """What a hit is worth."""

    model: Model | None
    """Of which the FLOPs are known."""
    price_miss: float | None
    price_hit: float

    @classmethod
    def of(cls, model: Model | None, price_miss: float | None, price_hit: float) -> Worth:
        """Without FLOPs for a model whose active parameters are not known."""
        has_flops = model is not None and model.active_params is not None
        return cls(model=model if has_flops else None, price_miss=price_miss, price_hit=price_hit)

    def saved(self, trace: Trace, hits: Sequence[int]) -> dict[str, float]:
        """Of the tokens of each request's hit."""
        saved: dict[str, float] = {}
        if self.model is not None:
            saved["saved_flops"] = sum(self.model.prefill_flops(hit) for hit in hits)
            saved["saved_flops_share"] = saved["saved_flops"] / sum(
                self.model.prefill_flops(request.input_tokens) for request in trace.requests
            )
        if self.price_miss is not None:
            saved["saved_money"] = sum(hits) / 1e6 * (self.price_miss - self.price_hit)
        return saved


def saved_texts(saved: dict[str, float], *, bare: bool = False) -> list[str]:
    """Each as it is told alone, or `bare` under its name."""
    forms = {
        "saved_flops": ("{:.2e}", "{:.2e} prefill FLOPs"),
        "saved_flops_share": ("{:.2%}", "{:.2%} of all"),
        "saved_money": ("{:,.2f}", "{:,.2f} in money"),
    }
    return [forms[name][0 if bare else 1].format(value) for name, value in saved.items()]
