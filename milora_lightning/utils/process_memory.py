"""Memory used by this process and available on the machine, as reported by the system."""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such module
    resource = None  # type: ignore[assignment]

_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
"""Files with a container's memory limit, usage and statistics, for both versions of control groups."""


def resident() -> int | None:
    """Return the memory of this process in bytes; None if the system does not report it."""
    return _kilobytes(_STATUS, "VmRSS")


def peak_resident() -> int | None:
    """Return the peak memory of this process in bytes; None if the system does not report it.

    On Linux, ``ru_maxrss`` is not used, because a process inherits it from its parent.
    """
    peak = _kilobytes(_STATUS, "VmHWM")
    if peak is not None or resource is None:
        return peak
    reported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return reported if sys.platform == "darwin" else 1024 * reported


def total() -> int | None:
    """Return the memory of the machine in bytes; None if the system does not report it."""
    return _kilobytes(_MEMINFO, "MemTotal")


def available() -> int | None:
    """Return the available memory in bytes, within this container if there is one; None if it is unknown."""
    free = _kilobytes(_MEMINFO, "MemAvailable")
    for limit, used, details in _LIMITS:
        try:
            most, now = int(Path(limit).read_text()), int(Path(used).read_text())
            cached = dict(line.split() for line in Path(details).read_text().splitlines()).get("inactive_file", 0)
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
        left = max(0, most - now + int(cached))  # the system drops cached files first
        free = left if free is None else min(free, left)
    return free


def _kilobytes(file: Path, name: str) -> int | None:
    """Read an entry such as ``VmRSS:   1632 kB`` in bytes; None if it is not there."""
    try:
        lines = file.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
