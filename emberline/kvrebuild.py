"""`emberline kv rebuild`: an index from the pages themselves, for a namespace that has lost its own."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from emberfs.cli.output import human_bytes, json_option, note, plural, print_json, print_line, progress_bar

if TYPE_CHECKING:
    from emberkv.files import StoreFiles
    from emberkv.rebuild import Rebuild
    from emberkv.rebuild import Rebuilt as Report


@click.command()
@click.argument("namespace")
@click.option("--store", envvar="EMBERLINE_URL", required=True, metavar="URL",
              help="The store that holds the pages. Or set EMBERLINE_URL.")  # fmt: skip
@click.option("--root", default="/kv", show_default=True, metavar="PATH", help="As the service has it.")
@click.option("--tenant", "tenants", multiple=True, metavar="NAME",
              help="Where the names of tenants are lost too: all of them, in the order of their numbers.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Read and report; write nothing.")
@click.option("--force", is_flag=True, help="Even where the index that is there can be read.")
@json_option
def rebuild(
    namespace: str, store: str, root: str, tenants: tuple[str, ...], dry_run: bool, force: bool, as_json: bool
) -> None:
    """Make the index of NAMESPACE anew from its pages: where its snapshots or logs are lost, or damaged beyond use.

    No service may serve it meanwhile. All of its segments are read, and the checksum of each page is compared. It ends
    with the new index, which the next service finds; before that nothing is changed: it may be ended and begun again.
    What was evicted or removed and not overwritten yet comes back (no page comes back with wrong bytes); pins are gone.
    NAMESPACE may be how its name begins.

    \b
    Examples:
      emberline kv rebuild deepseek-v3 --store ember://10.0.0.1:7300 --dry-run
      emberline kv rebuild deepseek-v3 --store ember://10.0.0.1:7300
    """
    import emberfs
    from emberfs.portal import Portal
    from emberfs.runtime import AsyncioRuntime
    from emberkv.files import StoreFiles

    runtime = AsyncioRuntime("emberkv")
    portal = Portal(runtime)
    client = emberfs.connect_async(store)

    def run(work: Coroutine[Any, Any, Any]) -> Any:
        async def in_loop() -> Any:
            await runtime.enter_loop()
            return await work

        return portal.run(in_loop())

    try:
        name, plan = run(_plan(StoreFiles(client), runtime, root.rstrip("/"), namespace, tenants))
        if not force and not run(plan.is_needed()):
            raise click.ClickException(f"the index of {name} can be read: there is nothing to rebuild (or --force)")
        total = sum(size for _, size in run(plan.segments()))
        with progress_bar(name, total, quiet=as_json) as advance:
            report = run(plan.scan(advance))
        if not dry_run:
            run(plan.write())
    finally:
        run(client.close())
        runtime.stop()
    _tell(name, report, is_written=not dry_run, as_json=as_json)


async def _plan(
    files: StoreFiles, runtime: Any, root: str, wanted: str, tenants: tuple[str, ...]
) -> tuple[str, Rebuild]:
    import msgspec
    from emberfs import NotFound
    from emberkv.namespace import Namespace
    from emberkv.rebuild import Rebuild

    names = await files.names(root)
    found = [name for name in names if name == wanted] or [name for name in names if name.startswith(wanted)]
    if len(found) != 1:
        several = ", ".join(found or names) or "none"
        raise click.ClickException(f"no one namespace begins with {wanted!r} under {root}: there are {several}")
    directory = f"{root}/{found[0]}"
    try:
        namespace = msgspec.json.decode(await files.get(f"{directory}/namespace.json"), type=Namespace)
    except (NotFound, msgspec.MsgspecError) as error:
        raise click.ClickException(
            f"{directory}/namespace.json cannot be read, which says what the pages are: {error}. "
            "A client that opens the namespace makes it again"
        ) from error
    return found[0], Rebuild(files, runtime, directory, namespace, tenants=tenants)


def _tell(name: str, report: Report, *, is_written: bool, as_json: bool) -> None:
    if as_json:
        print_json({"namespace": name, "is_written": is_written, **asdict(report)})
        return
    found = f"{plural(report.pages, 'page')}, {human_bytes(report.live_bytes)}, in {plural(report.segments, 'segment')}"
    tenants = ", ".join(f"{tenant} {count:,}" for tenant, count in report.tenants.items()) or "nobody"
    print_line(f"{name}: {found}; of {tenants}" + ("" if is_written else "; nothing was written"))
    for count, what in (
        (report.orphans, "are out of reach until a page before them is put again"),
        (report.replaced_pages, "have a newer one beside them"),
        (report.damaged_pages, "are damaged, or were never written whole: left out"),
        (report.foreign_pages, "are none of this namespace: left out"),
    ):
        if count:
            note(f"{count:,} {what}")
    if report.nameless:
        told = ", ".join(f"{number}: {plural(count, 'page')}" for number, count in sorted(report.nameless.items()))
        note(f"left out, since nobody knows the names of their tenants ({told}): give --tenant for each, from 0 on")
