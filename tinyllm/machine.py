"""What this machine, or the container around this process, gives: cores and memory."""
import os
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")         # where Linux writes a container's limits


def available_cores() -> int:
    """The cores that this process may use: of the machine, or what a container has of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, of = (CGROUP / "cpu.max").read_text(encoding="utf-8").split()
    except OSError:
        return count
    return count if share == "max" else min(count, -(-int(share) // int(of)))


def free_memory() -> int | None:
    """Bytes that Linux can still give, also inside a container; None elsewhere."""
    try:
        known = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    free = int(known.partition("MemAvailable:")[2].split()[0]) * 1024
    try:
        limit, used, parts = ((CGROUP / name).read_text(encoding="utf-8").strip()
                              for name in ("memory.max", "memory.current", "memory.stat"))
    except OSError:
        return free
    cached = int(parts.partition("inactive_file ")[2].split()[0])       # files that were read, and can be forgotten
    return free if limit == "max" else min(free, max(int(limit) - int(used) + cached, 0))


def peak_memory() -> int:
    """The most bytes that this process has taken so far, with its imports; 0 where that is not known (Windows)."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
