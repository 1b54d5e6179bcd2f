"""Worker processes for steps 1 and 2: as many as cores and memory allow; they end with their parent, and quietly."""
import math
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyllm import documents
from tinyllm.cli import UserError, kill_child_processes
from tinyllm.machine import available_cores, free_memory, peak_memory

BYTES_PER_WORKER = 400_000_000    # bytes that a worker takes at most, with its imports
MAX_WORKERS = 60               # processes; Windows cannot wait for more
STOPS = (signal.SIGINT, signal.SIGTERM)
PROBE_BYTES = 2_000_000       # bytes of text that are tried, to tell how long all of it takes


def choose_num_workers(asked: int, jobs: int) -> tuple[int, str]:
    """The number of processes, and why: what was asked for, else one per core, job and MEMORY that is free."""
    if asked < 0:
        raise UserError(f"num_workers must be 0 (one per core) or more, not {asked}")
    limits = {"as asked": asked} if asked else {f"{available_cores()} core{'s' * (available_cores() > 1)}": available_cores()}
    limits |= {f"{jobs} part{'s' * (jobs > 1)} of text": jobs, f"{MAX_WORKERS} at most": MAX_WORKERS}
    if not asked and (free := free_memory()) is not None:
        limits[f"{free / 1e9:.1f} GB of free memory"] = free // BYTES_PER_WORKER
    reason = min(limits, key=limits.get)
    count = max(limits[reason], 1)
    return count, f"{count} process{'es' * (count > 1)} ({reason})"


def measure_throughput(files: Iterable[Path], work: Callable[[list[bytes]], None], encoding: str = "") -> tuple[int, float]:
    """Try `work` on the first texts of files; returns the bytes of the files that were read, and the seconds."""
    read, tried, began = [], 0, time.perf_counter()
    try:
        for batch in documents.text_batches(text for path in files for text in documents.read_documents(path, read.append, encoding)):
            work(batch)
            tried += sum(map(len, batch))
            if tried > PROBE_BYTES:
                break
    except UserError:           # the process whose job it is will tell
        pass
    return max(sum(read), 1), time.perf_counter() - began


def format_eta(seconds: float, processes: int) -> str:
    """The time that work of so many seconds takes with so many processes, in words."""
    return f"about {timedelta(seconds=math.ceil(seconds / min(processes, available_cores())))}"


def format_bytes(size: float) -> str:
    """A number of bytes, in words."""
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def format_throughput(text_bytes: int, seconds: float, peak: int) -> str:
    """How fast it went and what it took, in words."""
    memory = f", {peak / 1e6:,.0f} MB of memory per process" if peak else ""
    return f"{text_bytes / 1e6 / seconds:,.1f} MB/s{memory}"


def run_jobs(function: Callable[[Any, Callable[[int], None]], Any], jobs: list[Any], workers: int, total: int, label: str,
        ahead: int = sys.maxsize) -> Iterator[tuple[Any, int]]:
    """Do function(job, progress) for all jobs, here or in worker processes; progress takes the bytes that were read.

    After an error nothing new is begun, and what is under way is finished and yielded before the
    error is raised.

    Args:
        workers: 1 means here.
        total, label: of the progress bar.
        ahead: how many jobs may be begun after one that has not ended.
    Yields:
        as each job ends: what the function returned, and the peak memory of the process that did it.
    """
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        if workers > 1:
            yield from _run_in_pool(function, jobs, workers, bar, ahead)
        else:
            for job in jobs:
                yield function(job, bar.update), peak_memory()


def _run_in_pool(function: Callable, jobs: list[Any], workers: int, bar: tqdm, ahead: int
                 ) -> Iterator[tuple[Any, int]]:
    context, failure = get_context("spawn"), None
    counter, left = context.Value("q", 0), deque(range(len(jobs)))      # the numbers of the jobs to be begun
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          ProcessPoolExecutor(workers, context, _start_worker, (counter, folder)) as pool):
        running: dict[Future, int] = {}     # and of those that are
        try:
            while running or left and not failure:
                if not failure:
                    failure = _hand_out(lambda number: pool.submit(_work, function, jobs[number]), left, running,
                                        2 * workers, ahead)
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(counter.get_obj().value - bar.n)      # without its lock, which a worker may have died with
                for future in done:
                    del running[future]
                    if future.cancelled():
                        continue
                    if error := future.exception():
                        failure = failure or error
                        for other in running:
                            other.cancel()
                    else:
                        yield _load_result(future)
        except BaseException:               # Ctrl-C, or no room for what was yielded: nothing more is wanted
            kill_child_processes()
            raise
    if isinstance(failure, BrokenProcessPool):
        raise UserError("a worker process was killed, most likely for want of memory\n       run this again with "
                        "--num_workers 1; it continues with what is missing")
    if failure:
        raise failure


def _hand_out(submit: Callable[[int], Future], left: deque[int], running: dict[Future, int], most: int, ahead: int
              ) -> BrokenProcessPool | None:
    """Begin jobs until `most` are running, or one is `ahead` of the oldest; an error when no more can be begun."""
    try:
        with defer_signals():
            while left and len(running) < most and left[0] < min(running.values(), default=left[0]) + ahead:
                number = left.popleft()
                running[submit(number)] = number
    except BrokenProcessPool as error:
        return error
    return None


def _load_result(future: Future) -> tuple[Any, int]:
    """The result that `_work` left in a file, which goes away, and the peak memory."""
    path, peak = future.result()
    result = pickle.loads(path.read_bytes())
    path.unlink()
    return result, peak


@contextmanager
def defer_signals() -> Iterator[None]:
    """Ctrl-C and a polite kill have to wait, also in processes that begin here: else these end in tracebacks."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in STOPS}
    _mask_ctrl_c("SIG_BLOCK")           # is inherited; here it would not do, for other threads may get the signal
    try:
        yield
    finally:
        _mask_ctrl_c("SIG_UNBLOCK")
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _mask_ctrl_c(how: str) -> None:
    """how: "SIG_BLOCK" keeps Ctrl-C from this thread and what it begins, "SIG_UNBLOCK" lets it through again."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, how), {signal.SIGINT})


_counter: Any = None    # in a worker process: the bytes read by all of them,
_folder = ""            # and where it leaves its results


def _start_worker(counter: Any, folder: str) -> None:
    global _counter, _folder
    _counter, _folder = counter, folder
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a worker without a traceback
    _mask_ctrl_c("SIG_UNBLOCK")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)                                         # else a worker would outlive a killed parent, and go on writing


def _work(function: Callable, job: Any) -> tuple[Path, int]:
    """Do a job; its result goes into a file. A worker that is killed while a long result is in the pipe would leave
    the parent waiting for the rest, for ever."""
    result = function(job, _count)
    with tempfile.NamedTemporaryFile(dir=_folder, delete=False) as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name), peak_memory()


def _count(size: int) -> None:
    with _counter.get_lock():
        _counter.value += size
