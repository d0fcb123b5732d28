"""What `dsgpt doctor --distributed` found, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsgpt.units import format_bytes

if TYPE_CHECKING:
    from dsgpt.probe import Report

SHOWN_EDGES = 6  # the slowest ones


def print_probe(report: Report) -> None:
    """The nodes, the all-reduce by size, the slowest links, and what is wrong."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)

    def show(heading: str, columns: list[str], rows: list[list[str]]) -> None:
        if not rows:
            return
        table = Table(box=None, pad_edge=False, title=heading, title_justify="left")
        for column in columns:
            table.add_column(column, overflow="fold", justify="left" if column in ("hosts", "link") else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    console.print(report.nodes.text(), markup=False)
    for entry in report.nodes.groups:
        interfaces = ", ".join(entry["interfaces"]) or "none"
        offset = entry["clock_offset_seconds"]
        text = f"  {entry['hosts']}: {entry['addresses'] or 'no address'} on {interfaces}, clock off by at most "
        text += f"{abs(offset['worst']):.3f} s ({offset['host']}), "
        text += f"memory {format_bytes(entry['available_memory_bytes']['worst'])} available"
        console.print(text, markup=False)
    console.print(
        f"rendezvous {report.rendezvous['seconds']:.1f} s, last came {report.rendezvous['last']}", markup=False
    )
    if report.world_size == 1:
        console.print("one rank: nothing to exchange", markup=False)
    else:
        console.print(
            f"latency    {1e6 * report.latency_seconds:.0f} us for an all-reduce of 4 bytes over {report.world_size} ranks"
        )
    rows = [
        [
            format_bytes(one["bytes"]),
            f"{1e3 * one['seconds']:.2f}",
            *(f"{one[key] / 1e9:.3f}" for key in ("algorithm", "bus")),
        ]
        for one in report.all_reduce
    ]
    show("\nall-reduce", ["size", "ms", "algorithm GB/s", "bus GB/s"], rows)
    links = [
        [f"{edge.one} - {edge.other}", f"{1e3 * edge.seconds:.1f}", f"{edge.bytes / edge.seconds / 1e9:.3f}"]
        for edge in report.edges[:SHOWN_EDGES]
    ]
    show(f"\nlinks, the slowest of {len(report.edges)}", ["link", "ms", "GB/s each way"], links)
    for text in report.warnings:
        console.print(f"warning: {text}", markup=False)
    for text in report.problems:
        console.print(f"problem: {text}", markup=False)
    console.print(f"\n{len(report.problems)} problems, {len(report.warnings)} warnings")
