"""Cores and memory of this machine, or of the container around this process."""
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")         # where Linux writes a container's limits


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
    except OSError:
        return cores
    return cores if quota == "max" else min(cores, -(-int(quota) // int(period)))


def free_memory() -> int | None:
    """Return the bytes that Linux can still give, also inside a container; None on other systems."""
    try:
        meminfo = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    free = int(meminfo.partition("MemAvailable:")[2].split()[0]) * 1024
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="utf-8").strip()
        used = int((CGROUP / "memory.current").read_text(encoding="utf-8"))
        details = (CGROUP / "memory.stat").read_text(encoding="utf-8")
    except OSError:
        return free
    file_cache = int(details.partition("inactive_file ")[2].split()[0])       # Linux drops it when memory is needed
    return free if limit == "max" else min(free, max(int(limit) - used + file_cache, 0))
