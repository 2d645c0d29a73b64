"""The tenants of a namespace, written apart from its index: pages know their tenant by its number only.

    tenants/EPOCH    names and quotas by number, as the owner of that epoch has them; the last one counts

Does not know: pages.
"""

from __future__ import annotations

import msgspec

from .files import Files


class Roster(msgspec.Struct, frozen=True):
    """By number."""

    tenants: list[str]
    quotas: list[int]


async def read_roster(files: Files, directory: str) -> Roster:
    """Of the namespace in a directory. Empty if none was written."""
    names = await files.names(f"{directory}/tenants")
    if not names:
        return Roster([], [])
    return msgspec.json.decode(await files.get(f"{directory}/tenants/{max(names)}"), type=Roster)


async def write_roster(files: Files, directory: str, epoch: int, roster: Roster) -> None:
    """As the owner of `epoch`."""
    await files.put(f"{directory}/tenants/{epoch:08d}", msgspec.json.encode(roster))


async def trim_rosters(files: Files, directory: str, epoch: int) -> None:
    """Remove those of earlier owners."""
    for name in await files.names(f"{directory}/tenants"):
        if int(name) < epoch:
            await files.remove(f"{directory}/tenants/{name}")
