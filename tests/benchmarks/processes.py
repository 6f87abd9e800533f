"""What a process and those it has started have used. Standard library alone: peers import it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def processor_seconds() -> float:
    """Of this process and all that descend from it, living or waited for."""
    return sum(spent for _, spent in _family().values())


def disk_bytes() -> int:
    """Read from disks, not from the page cache, by this process and the living that descend from
    it."""
    total = 0
    for process in _family():
        for line in Path("/proc", str(process), "io").read_text().splitlines():
            name, _, value = line.partition(": ")
            total += int(value) if name == "read_bytes" else 0
    return total


def end(root: int) -> None:
    """SIGKILL a process of ours and all that descend from it, however deep (Ray opens
    sessions)."""
    for process in _tree(_all(), root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def _family() -> dict[int, tuple[int, float]]:
    """Process -> (its parent, processor seconds), of this one and its living descendants."""
    known = _all()
    return {process: known[process] for process in _tree(known, os.getpid())}


def _tree(known: dict[int, tuple[int, float]], root: int) -> set[int]:
    tree = {root}
    while more := {child for child, (parent, _) in known.items() if parent in tree} - tree:
        tree |= more
    return tree


def _all() -> dict[int, tuple[int, float]]:
    known: dict[int, tuple[int, float]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone since
            fields = Path("/proc", entry, "stat").read_text().rsplit(")", 1)[1].split()
            spent = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            known[int(entry)] = int(fields[1]), spent
    return known
