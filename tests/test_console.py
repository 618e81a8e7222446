"""engine/console.py and engine/processes.py: what is printed, and errors that become sentences.
Every sentence that a user can meet stands in test_bad_input.py."""

import errno
import itertools
import signal
import sys

import pytest
import torch

import edge_grpo
from engine import console, processes


def test_every_way_to_say_that_memory_is_short_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (
        caught.value,
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: out of memory"),  # when pinning
    ):
        assert console.is_out_of_memory(error)
    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        assert not console.is_out_of_memory(error)


def test_what_the_system_refuses_is_one_sentence(capsys):
    def work():
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    assert console.exit_code(work, "go on with --resume", "") == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "No space left" in text and "--resume" in text


def test_a_line_at_the_first_and_the_last_step_and_every_ten_seconds_between(monkeypatch, capsys):
    clock = itertools.count(0.0, 3.0)
    monkeypatch.setattr(console.time, "perf_counter", lambda: next(clock))
    progress = console.Progress(100, 10, {"loss": "loss", "kl": "KL"})
    for step in range(11, 101):
        progress.show(dict(step=step, loss=0.25, kl=None, tokens_per_second=3210.4))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 11/100: loss 0.25, 3210 tok/s, ")
    assert lines[0].endswith(" min left") and lines[-1].startswith("step 100/100")
    assert 10 < len(lines) < 40


@pytest.mark.parametrize("columns, holds", [(80, "mixed"), (200, "tok/s"), (40, "acc")])
def test_the_bar_can_be_read_on_any_terminal(monkeypatch, capsys, columns, holds):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = console.Progress(1000, 0, edge_grpo.SHOWN)
    progress.bar.mininterval = 0
    progress.bar.ncols = columns  # which tqdm asks the terminal
    line = dict.fromkeys(edge_grpo.SHOWN, 0.25) | dict(tokens_per_second=3210.0)
    for step in range(1, 800):
        progress.show(line | dict(step=step))
    progress.bar.close()
    last = [part for part in capsys.readouterr().err.split("\r") if "799/1000" in part][-1]
    assert len(last.rstrip()) <= columns
    assert holds in last and "left" in last and last.count("|") == 2


@pytest.mark.parametrize(
    "parameters, set_by_user, asked", [(10**5, "", [1]), (10**9, "", []), (10**5, "3", [])]
)
def test_a_small_model_gets_one_thread_unless_the_user_says_more(
    monkeypatch, parameters, set_by_user, asked
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    calls = []
    monkeypatch.setattr(torch, "set_num_threads", calls.append)
    processes.choose_threads(parameters)
    assert calls == asked


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = console.Stop()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == stop.ask
