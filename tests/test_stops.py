"""Signals, a closed terminal and a closed pipe: the run saves and prints how to resume."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, load_state, read_log, start_script

import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to a process")

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_how_to_resume(project, number):
    process = start_script("train", "--data_dir", project, "--out_dir", "out", *TINY, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith("step 3 "):
            process.send_signal(number)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "Traceback" not in rest, rest
    assert "python train.py --init_from resume --out_dir out" in rest
    assert load_state("out")["iter_num"] >= 3 and not Path("out/ckpt.pt").exists()
    assert read_log("out")[-1]["iter"] == load_state("out")["iter_num"]


def test_closed_streams(project):
    def learn(*args):
        command = [sys.executable, ROOT / "train_vocab.py", "--data", project / "stories.jsonl", "--data_dir", "d",
                   *args]
        return subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-", *map(str, command)], timeout=60).returncode
    assert learn("--vocab_size", 512) == 0
    assert Path("d/tok512.model").read_bytes() == (project / "tok512.model").read_bytes()
    assert learn("--vocab_zise", 512) == 1


def test_ctrl_c_before_the_first_step(project):
    process = start_script("train", "--data_dir", project, "--out_dir", "out", *TINY, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("device: "))
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and errors.startswith("\ninterrupted; ") and errors.count("\n") == 2, errors
    assert not Path("out").exists()


def test_a_signal_at_the_last_step_leaves_a_finished_run(train_small, monkeypatch, capsys):
    step = train.train_step

    def interrupted_at_step_3(run, batches):
        metrics = step(run, batches)
        if run.state.iter_num == 3:
            run.local_stop_signal = signal.SIGINT
        return metrics
    monkeypatch.setattr(train, "train_step", interrupted_at_step_3)
    train_small("out", "--max_iters", 3)
    assert load_state("out", "ckpt.pt")["iter_num"] == 3 and "done: 3 steps" in capsys.readouterr().out


IN_A_TERMINAL = ("import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                 "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")


def test_a_closed_terminal_saves(project):
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", IN_A_TERMINAL, ROOT / "train.py", "--data_dir", project, "--out_dir", "out", *TINY]
    process = subprocess.Popen([*map(str, command)], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    seen = b""
    while b"step 3 " not in seen:
        seen += os.read(ours, 1000)
    os.close(ours)
    process.send_signal(signal.SIGHUP)          # and the shell passes it on
    assert process.wait(60) in (128 + signal.SIGHUP, 128 + signal.SIGTERM)     # by the signal, or a line came first
    assert load_state("out")["iter_num"] >= 3 and not Path("out/ckpt.pt").exists()


def test_a_closed_pipe_stops_the_run(project):
    """`| head` closes the pipe; train.py saves the finished steps."""
    process = start_script("train", "--data_dir", project, "--out_dir", "out", *TINY, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE)
    next(line for line in process.stdout if line.startswith("step 3 "))
    process.stdout.close()
    assert process.wait(60) == 128 + signal.SIGTERM and process.stderr.read() == ""
    assert load_state("out")["iter_num"] >= 3


def test_nohup_ignores_a_closed_terminal(project):
    """nohup starts processes with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start_script("train", "--data_dir", project, "--out_dir", "out", *TINY, "--max_iters", 30,
                               stdout=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGHUP, before)
    next(line for line in process.stdout if line.startswith("step 3 "))
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0 and load_state("out")["iter_num"] == 30
