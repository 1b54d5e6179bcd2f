"""Worker processes: their number, the order of results, and failures."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from worker_jobs import double, import_steps, killed_at_5

from tinyllm import machine, workers
from tinyllm.cli import UserError


@pytest.mark.parametrize("free, jobs, requested, expected", [
    (None, 99, 0, 8), (10**10, 99, 0, 8), (10**10, 3, 0, 3), (10**9, 99, 0, 2), (10**7, 99, 0, 1), (10**7, 99, 5, 5),
    (None, 0, 0, 1), (None, 3, 5, 3), (None, 1, 2, 1), (None, 99, 99, 60)])
def test_processes_follow_cores_parts_and_memory(monkeypatch, free, jobs, requested, expected):
    monkeypatch.setattr(workers, "available_cores", lambda: 8)
    monkeypatch.setattr(workers, "free_memory", lambda: free)
    assert workers.choose_num_workers(requested, jobs) == expected
    with pytest.raises(UserError, match="num_workers must be"):
        workers.choose_num_workers(-1, 1)


def test_memory_is_known_on_linux():
    if Path("/proc/meminfo").exists():
        total = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1]) * 1024
        assert 0 < machine.free_memory() <= total and 10**7 < machine.peak_memory() < total


@pytest.mark.parametrize("share, want", [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1),
                                         ("9900000 100000", 8)])
def test_a_container_has_its_share_of_the_cores(monkeypatch, tmp_path, share, want):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: range(8), raising=False)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.available_cores() == 8
    (tmp_path / "cpu.max").write_text(share + "\n", encoding="utf-8")
    assert machine.available_cores() == want


@pytest.mark.parametrize("count", [1, 2])
def test_every_job_is_done_once(count):
    jobs = list(range(80))          # more than may run at once
    results = list(workers.run_jobs(double, jobs, count, len(jobs), "counting"))
    assert results == [(job, 2 * job) for job in jobs]
    assert list(workers.run_jobs(double, [], count, 0, "nothing")) == []


@pytest.mark.parametrize("count", [1, 2])
def test_no_job_starts_after_an_error(count):
    found = []
    with pytest.raises(UserError, match="-1 is no job"):
        for _, result in workers.run_jobs(double, [-1, *range(1, 80)], count, 80, "counting"):
            found.append(result)
    assert len(found) < 20          # a second worker may finish jobs that started before the error


def test_worker_processes_do_not_import_torch():
    assert list(workers.run_jobs(import_steps, [1, 2], 2, 2, "importing"))[0][1] == []


def test_killed_worker_is_reported_and_results_are_kept():
    found = []
    with pytest.raises(UserError, match="a worker process was killed.*\n.*--num_workers 1"):
        for _, result in workers.run_jobs(killed_at_5, list(range(80)), 2, 80, "counting"):
            found.append(result)
            time.sleep(0.05)            # so that the next one is submitted after the kill
    assert len({0, 1, 2, 3, 4} & set(found)) >= 4 and len(found) < 20       # the other process may be at one of them


TALKATIVE = """
import sys
from tinyllm import workers

def talk(job, progress):
    return bytes(30_000_000)

if __name__ == "__main__":
    for number, _ in enumerate(workers.run_jobs(talk, list(range(10_000)), 2, 10_000, "talking")):
        print(number, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to a process")
def test_ctrl_c_during_a_long_result(tmp_path):
    """Ctrl-C kills the workers too, as in a terminal; no process may wait for their unfinished results."""
    (tmp_path / "talkative.py").write_text(TALKATIVE, encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-W", "ignore", tmp_path / "talkative.py"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               start_new_session=True)
    for _ in range(3):
        process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    try:
        assert process.wait(30) != 0
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None


def test_processes_start_with_ctrl_c_ignored():
    before = signal.getsignal(signal.SIGINT)
    with workers.ignore_ctrl_c():
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before
