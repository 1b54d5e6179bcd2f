"""Jobs for test_workers.py, in a module that imports nothing large, so that worker processes start quickly."""
import os
import sys
import time

from tinyllm.cli import UserError


def double(job: int, progress) -> int:
    progress(1)
    time.sleep(0.005 if job else 0.05)          # the first job ends late, and the others not before an error is known
    if job < 0:
        raise UserError(f"{job} is no job")
    return 2 * job


def killed_at_5(job: int, progress) -> int:
    if job == 5:
        os._exit(1)
    time.sleep(0.02)
    return job


def import_steps(job: int, progress) -> list[str]:
    """Import steps 1 and 2, as their worker processes do, and return the large packages that they load."""
    import preprocess  # noqa: F401
    import train_vocab  # noqa: F401
    return [name for name in ("torch", "extras", "requests") if name in sys.modules]
