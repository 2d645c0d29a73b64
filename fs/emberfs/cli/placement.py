"""`cluster placement`: try a shape of cluster before it is bought: how evenly would a lost machine be recovered?"""

from __future__ import annotations

from dataclasses import asdict

import click

from ..errors import LimitExceeded
from .output import json_option, plural, print_fields, print_json

HOSTS_MAX = 2000
DISKS_MAX = 256


@click.command(epilog="\b\nExample:\n  emberline cluster placement --nodes 200 --disks 16 --targets 6 --replicas 3")
@click.option("--nodes", type=click.IntRange(1, HOSTS_MAX), required=True, help="Machines.")
@click.option("--disks", type=click.IntRange(1, DISKS_MAX), default=1, show_default=True, help="Disks of each.")
@click.option("--targets", type=click.IntRange(min=1), default=6, show_default=True, help="Targets on a disk.")
@click.option("--replicas", type=click.IntRange(min=1), default=3, show_default=True, help="Of each chain.")
@click.option(
    "--racks", type=click.IntRange(min=1), help="Racks that the machines are in, in turn. Default: not known."
)
@json_option
def placement(nodes: int, disks: int, targets: int, replicas: int, racks: int | None, as_json: bool) -> None:
    """Place the chains of a cluster that is not there, and say how evenly a lost machine would be recovered."""
    from ..manager.chains import REPLICAS_MAX, TARGETS_PER_DISK_MAX, DiskSlot
    from ..manager.placement import place
    from ..manager.placement_report import placement_report

    if replicas > REPLICAS_MAX or targets > TARGETS_PER_DISK_MAX:
        raise click.UsageError(f"at most {REPLICAS_MAX} replicas, and {TARGETS_PER_DISK_MAX} targets on a disk")
    slots = [
        DiskSlot(f"node-{node}-disk-{disk}", f"node-{node}", f"rack-{node % racks}" if racks else "")
        for node in range(nodes)
        for disk in range(disks)
    ]
    try:
        report = placement_report(place(slots, replicas, targets))
    except LimitExceeded as error:
        raise click.UsageError(str(error)) from error
    unused = len(slots) * targets - report.chains * replicas
    if as_json:
        row = asdict(report)
        del row["hosts"]
        print_json({**row, "unused_targets": unused})
        return
    fewest, most = report.disk_targets
    in_rack = f", at most {report.rack_replicas_max} of a chain in a rack" if racks else ""
    print_fields(
        [
            ("chains", f"{report.chains} of {plural(replicas, 'replica')}{in_rack}"),
            ("targets", f"{fewest} to {most} on a disk, {unused} unused"),
            ("lost machine", f"the busiest of the others has {plural(report.peer_load_max, 'chain')} of it"),
            ("bound", f"{plural(report.bound, 'chain')}: {report.ratio:.2f} times that"),
        ]
    )
