"""Run the jobs of steps 1 and 2 in worker processes, as many as cores and memory allow."""
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyllm.cli import UserError, kill_child_processes
from tinyllm.machine import available_cores, free_memory

BYTES_PER_WORKER = 400_000_000          # memory of a worker, including its imports
MAX_WORKERS = 60                        # Windows cannot wait for more processes
JOBS_AHEAD = 4                          # jobs per worker that run ahead; their results wait on disk


def choose_num_workers(requested: int, n_jobs: int) -> int:
    """Return the number of workers: as requested, or one per core if memory allows; at most one per job."""
    if requested < 0:
        raise UserError(f"num_workers must be 0 (one per core) or more, got {requested}")
    num_workers = requested or available_cores()
    memory = free_memory()
    if memory is not None and not requested:
        num_workers = min(num_workers, memory // BYTES_PER_WORKER)
    return max(1, min(num_workers, n_jobs, MAX_WORKERS))


def run_jobs(function: Callable[[Any, Callable[[int], None]], Any], jobs: list[Any], num_workers: int, total: int,
             label: str) -> Iterator[tuple[Any, Any]]:
    """Yield each job and the result of function(job, progress), in the order of the jobs.

    The function calls progress(count) with the number of bytes read. With one worker, this process does the jobs. After
    an error no further job starts, and the results of running jobs are yielded before the error is raised. total,
    label: bytes and title of the progress bar.
    """
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        if num_workers > 1:
            yield from _run_in_pool(function, jobs, num_workers, bar)
        else:
            for job in jobs:
                yield job, function(job, bar.update)


def _run_in_pool(function: Callable, jobs: list[Any], num_workers: int, bar: tqdm) -> Iterator[tuple[Any, Any]]:
    context = get_context("spawn")
    n_bytes_read = context.Value("q", 0)        # sum over all workers
    error = None
    waiting = iter(jobs)
    started: deque[tuple[Any, Future]] = deque()
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as result_dir,
          ProcessPoolExecutor(num_workers, context, _start_worker, (n_bytes_read, result_dir)) as executor):
        try:
            while True:
                with ignore_ctrl_c():
                    for job in islice(waiting, JOBS_AHEAD * num_workers - len(started)):
                        started.append((job, _submit(executor, function, job)))
                if not started:
                    break
                job, future = started.popleft()
                while not future.done():
                    wait([future], timeout=0.2)
                    bar.update(n_bytes_read.get_obj().value - bar.n)    # without its lock, which a dead worker may hold
                if future.cancelled():
                    continue
                if future.exception():
                    error = error or future.exception()
                    waiting = iter(())
                    for _, other in started:
                        other.cancel()
                else:
                    yield job, pickle.loads(future.result().read_bytes())
                    future.result().unlink()
        except BaseException:                   # Ctrl-C, or an error in the code that uses the results
            kill_child_processes()
            raise
    if isinstance(error, BrokenProcessPool):
        raise UserError("a worker process was killed, most likely because memory ran out\n       run the same command "
                        "again with --num_workers 1")
    if error:
        raise error


def _submit(executor: ProcessPoolExecutor, function: Callable, job: Any) -> Future:
    """Start a job. If a worker has died, the future holds the error."""
    try:
        return executor.submit(_run_job, function, job)
    except BrokenProcessPool as error:
        future: Future = Future()
        future.set_exception(error)
        return future


@contextmanager
def ignore_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C here and in processes that start in the block, which would print tracebacks of their imports."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


_n_bytes_read: Any = None       # sum over all workers
_result_dir = ""                # folder for the results of all workers


def _start_worker(n_bytes_read: Any, result_dir: str) -> None:
    global _n_bytes_read, _result_dir
    _n_bytes_read = n_bytes_read
    _result_dir = result_dir
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a worker without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)                 # otherwise a worker would outlive a killed parent and continue to write


def _run_job(function: Callable, job: Any) -> Path:
    """Do a job and write its result to a file. Returns the path.

    A pipe would be less safe: if a worker is killed while it sends a long result, the parent waits forever.
    """
    result = function(job, _add_bytes_read)
    with tempfile.NamedTemporaryFile(dir=_result_dir, delete=False) as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name)


def _add_bytes_read(n_bytes: int) -> None:
    with _n_bytes_read.get_lock():
        _n_bytes_read.value += n_bytes
