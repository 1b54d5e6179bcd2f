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
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tinyllm.cli import UserError, kill_child_processes
from tinyllm.documents import read_batches
from tinyllm.machine import available_cores, free_memory, peak_memory

BYTES_PER_WORKER = 400_000_000          # memory of a worker, with its imports
MAX_WORKERS = 60                        # Windows cannot wait for more processes
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
PROBE_BYTES = 2_000_000                 # text that is tried to estimate the time for all of it


def choose_num_workers(requested: int, n_jobs: int) -> tuple[int, str]:
    """Return the number of processes and its reason: the requested one, else limited by cores, jobs and free memory."""
    if requested < 0:
        raise UserError(f"num_workers must be 0 (one per core) or more, not {requested}")
    cores, memory = available_cores(), free_memory()
    limits = [(requested, "as requested")] if requested else [(cores, format_count(cores, "core"))]
    limits += [(n_jobs, f"{format_count(n_jobs, 'part')} of text"), (MAX_WORKERS, f"{MAX_WORKERS} at most")]
    if not requested and memory is not None:
        limits.append((memory // BYTES_PER_WORKER, f"{memory / 1e9:.1f} GB of free memory"))
    limit, reason = min(limits, key=lambda pair: pair[0])
    num_workers = max(limit, 1)
    return num_workers, f"{format_count(num_workers, 'process')} ({reason})"


def measure_throughput(files: list[Path], work: Callable[[list[bytes]], None], encoding: str = "") -> tuple[int, float]:
    """Do `work` on the first texts of the files. Returns the number of bytes read from the files, and the seconds."""
    sizes: list[int] = []
    n_bytes, start = 0, time.perf_counter()
    try:
        for texts in read_batches(files, sizes.append, encoding):
            work(texts)
            n_bytes += sum(map(len, texts))
            if n_bytes > PROBE_BYTES:
                break
    except UserError:           # the worker that reads this file will report it
        pass
    return max(sum(sizes), 1), time.perf_counter() - start


def format_count(count: int, noun: str) -> str:
    """Return e.g. '1 file', '1,234 files', '2 processes'."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else ending}"


def format_eta(seconds: float, num_workers: int) -> str:
    """Return how long `seconds` of work take when several processes share it."""
    return f"about {timedelta(seconds=math.ceil(seconds / min(num_workers, available_cores())))}"


def format_bytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def format_throughput(text_bytes: int, seconds: float, peak: int) -> str:
    memory = f", {peak / 1e6:,.0f} MB of memory per process" if peak else ""
    return f"{text_bytes / 1e6 / seconds:,.1f} MB/s{memory}"


def run_jobs(function: Callable[[Any, Callable[[int], None]], Any], jobs: list[Any], num_workers: int, total: int,
             label: str, max_lead: int = sys.maxsize) -> Iterator[tuple[Any, int]]:
    """Do function(job, progress) for all jobs; progress takes the number of bytes that were read.

    After an error no job is started; the running ones finish and are yielded before the error is raised.

    Args:
        num_workers: 1 does the jobs in this process.
        total, label: of the progress bar.
        max_lead: how many jobs may start after one that has not ended.
    Yields:
        as each job ends: its result, and the peak memory of its process.
    """
    with tqdm(total=total, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        if num_workers > 1:
            yield from _run_in_pool(function, jobs, num_workers, bar, max_lead)
        else:
            for job in jobs:
                yield function(job, bar.update), peak_memory()


def _run_in_pool(function: Callable, jobs: list[Any], num_workers: int, bar: tqdm, max_lead: int
                 ) -> Iterator[tuple[Any, int]]:
    context = get_context("spawn")
    counter = context.Value("q", 0)                             # bytes read by all workers
    with (tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
          ProcessPoolExecutor(num_workers, context, _start_worker, (counter, folder)) as executor):
        queue = _JobQueue(executor, function, jobs, 2 * num_workers, max_lead)
        try:
            while queue.start_jobs():
                done, _ = wait(queue.running, timeout=0.2, return_when=FIRST_COMPLETED)
                bar.update(counter.get_obj().value - bar.n)     # without its lock, which a dead worker may hold
                for future in done:
                    yield from queue.take_result(future)
        except BaseException:               # Ctrl-C, or a full disk where a result is used
            kill_child_processes()
            raise
    if isinstance(queue.error, BrokenProcessPool):
        raise UserError("a worker process was killed, most likely because memory ran out\n       run this again with "
                        "--num_workers 1; it continues with the missing parts")
    if queue.error:
        raise queue.error


class _JobQueue:
    """The jobs of a pool, numbered; after an error no more are started."""

    def __init__(self, executor: ProcessPoolExecutor, function: Callable, jobs: list[Any], max_running: int,
                 max_lead: int):
        self.executor, self.function, self.jobs = executor, function, jobs
        self.max_running, self.max_lead = max_running, max_lead
        self.pending = deque(range(len(jobs)))
        self.running: dict[Future, int] = {}
        self.error: BaseException | None = None

    def start_jobs(self) -> bool:
        """Start jobs up to the limits. True if any is running."""
        try:
            with defer_signals():
                while self._may_start():
                    number = self.pending.popleft()
                    self.running[self.executor.submit(_work, self.function, self.jobs[number])] = number
        except BrokenProcessPool as error:
            self._fail(error)
        return bool(self.running)

    def _may_start(self) -> bool:
        if not self.pending or len(self.running) >= self.max_running:
            return False
        oldest = min(self.running.values(), default=self.pending[0])
        return self.pending[0] < oldest + self.max_lead

    def _fail(self, error: BaseException) -> None:
        self.error = self.error or error
        self.pending.clear()
        for future in self.running:
            future.cancel()

    def take_result(self, future: Future) -> Iterator[tuple[Any, int]]:
        """Yield the result of a job that has ended, and the peak memory, unless it failed or was cancelled."""
        del self.running[future]
        if future.cancelled():
            return
        if future.exception():
            self._fail(future.exception())
            return
        path, peak = future.result()
        result = pickle.loads(path.read_bytes())
        path.unlink()
        yield result, peak


@contextmanager
def defer_signals() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM, here and in processes that start in the block: they would end in tracebacks."""
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number)) for number in STOP_SIGNALS}
    _mask_ctrl_c("SIG_BLOCK")           # new processes inherit the mask; handlers are needed too, for other threads
    try:
        yield
    finally:
        _mask_ctrl_c("SIG_UNBLOCK")
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


def _mask_ctrl_c(action: str) -> None:
    """Block Ctrl-C in this thread and the processes it starts ("SIG_BLOCK"), or unblock it ("SIG_UNBLOCK")."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(getattr(signal, action), {signal.SIGINT})

_counter: Any = None    # bytes read by all workers
_folder = ""            # where the workers leave their results


def _start_worker(counter: Any, folder: str) -> None:
    global _counter, _folder
    _counter, _folder = counter, folder
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C ends a worker without a traceback
    _mask_ctrl_c("SIG_UNBLOCK")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)                 # otherwise a worker would outlive a killed parent and continue to write


def _work(function: Callable, job: Any) -> tuple[Path, int]:
    """Do a job. Returns the file of its result, and the peak memory.

    A pipe would not do: if a worker is killed in the middle of a long result, the parent waits for the rest forever.
    """
    result = function(job, _count)
    with tempfile.NamedTemporaryFile(dir=_folder, delete=False) as file:
        pickle.dump(result, file, pickle.HIGHEST_PROTOCOL)
    return Path(file.name), peak_memory()


def _count(n_bytes: int) -> None:
    with _counter.get_lock():
        _counter.value += n_bytes
