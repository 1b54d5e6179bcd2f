"""Measure the cores and the memory of this machine or container."""
import os
import sys
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
    """Return the free memory in bytes, also in a container; None on systems other than Linux."""
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
    file_cache = int(details.partition("inactive_file ")[2].split()[0])       # Linux frees it when needed
    return free if limit == "max" else min(free, max(int(limit) - used + file_cache, 0))


def peak_memory() -> int:
    """Return the peak memory of this process in bytes, including imports; 0 on Windows, where it is unknown."""
    if sys.platform == "linux":                 # getrusage includes the parent's memory before the start
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
