"""What happens to runs outside a laboratory: consoles, machines, interruptions and damage as users met them."""

import errno
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_distributed import Launch
from test_resume import (
    ROOT,
    RUN,
    fingerprint,
    metrics,
    result,
    run,
    said,
    server,  # noqa: F401
    signal_at_step,
    start,
)

import edge_grpo
import engine
from engine import checkpoints, console, folder, processes
from engine.checkpoints import checkpoint_folders
from engine.run import LOGS


def printed(out) -> str:
    return Path(f"{out}.out").read_text()


def names(out) -> list[str]:
    return [f.name for f in checkpoint_folders(out / "checkpoints")]


# --- two processes ---------------------------------------------------------------------------------------------------


def forbid_reading(out: Path) -> None:
    """From now on this process may open nothing below `out`, but for the tensors of a checkpoint."""

    def watch(event: str, args: tuple) -> None:
        if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith(str(out)):
            raise AssertionError(f"process {engine.processes.rank()}: {event} {args}")

    sys.addaudithook(watch)


def work(out: Path) -> None:
    """Several runs in one group of processes, of which the second may read nothing that the first writes."""
    processes.start_processes("cpu")
    processes.dist.destroy_process_group = lambda: None  # the group is for all runs
    if processes.rank():
        forbid_reading(out)
    for k, flags in enumerate(
        ("--eval-every 1 --keep 2", "--seed 1", "--method sft --keep 1", "--resume --keep 1")
    ):
        name = str(k % 3)  # the last goes on with the first
        argv = [
            *json.loads(os.environ["RUN"]),
            "--device",
            "cpu",
            "--out",
            str(out / name),
            *flags.split(),
        ]
        assert edge_grpo.main(argv + ["--eval-every", "1"] * (k == 3)) == 0, flags


def test_what_the_first_process_writes_only_it_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("RUN", json.dumps(RUN))
    launch = Launch(2, tmp_path / "logs", __file__, tmp_path / "runs")
    assert launch.wait() == 0, launch
    assert "process 1:" not in str(launch)


# --- consoles --------------------------------------------------------------------------------------------------------


def test_the_first_screen_and_a_console_that_is_not_utf8(tmp_path):
    """No --out, no OMP_NUM_THREADS, and a standard output that has no ±."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {
        "PYTHONIOENCODING": "ascii"
    }
    command = [sys.executable, str(ROOT / "edge_grpo.py"), *RUN, "--kl", "0.1", "--no-eda"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    first = done.stdout.split("step 0:")[0].splitlines()
    assert len(first) == 3 and "memory" not in done.stdout
    assert "CPU threads: 1;" in first[0]  # of a model this small
    assert (
        " kl=0.1 " in first[1]
        and " eda=False " in first[1]
        and "temperature" not in first[1].replace("eval_t", "")
    )
    assert " ? " in done.stdout  # accuracy ± error
    [out] = (tmp_path / "runs").iterdir()
    assert (
        out.name.startswith("tiny-edge-grpo-")
        and "-eda-False-" in out.name
        and "-kl-0.1-" in out.name
    )
    assert json.loads((out / "config.json").read_text())["flags"]["temperature"] == 0.6


def test_a_bar_of_80_columns_can_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = edge_grpo.SHOWN
    for columns, holds in ((80, "mixed"), (200, "tok/s"), (40, "acc")):
        monkeypatch.setenv("COLUMNS", str(columns))
        progress = console.Progress(1000, 0, shown)
        monkeypatch.setattr(progress.bar, "mininterval", 0)
        progress.bar.ncols = columns
        for step in range(1, 800):
            progress.show(dict.fromkeys(shown, 0.25) | dict(step=step, tokens_per_second=3210.0))
        progress.bar.refresh()
        last = [
            line
            for line in capsys.readouterr().err.replace("\n", "\r").split("\r")
            if "799/1000" in line
        ][-1]
        assert (
            len(last.rstrip()) <= columns
            and holds in last
            and "left" in last
            and last.count("|") == 2
        ), last
        progress.bar.close()
        capsys.readouterr()


def test_no_speed_where_nothing_is_sampled(capsys):
    """SFT: not 0 tokens a second, and no division by its time."""
    for speed in (0.0, 3210.0):
        console.Progress(1, 0, {"loss": "loss"}).show(
            dict(step=1, loss=0.5, tokens_per_second=speed)
        )
        assert ("tok/s" in capsys.readouterr().out) == (speed > 0)


def test_ctrl_c_says_that_the_step_is_saved_and_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    assert run(out, prepare=signal_at_step, arguments=(2, [signal.SIGINT])) == 130
    last = printed(out).splitlines()[-1]
    assert "step 2" in last and "saved" in last and "--resume" in last


@pytest.mark.parametrize(
    "parameters, set_by_user, threads", [(1e5, None, 1), (1e9, None, 3), (1e5, "3", 3)]
)
def test_a_small_model_gets_one_thread_unless_the_user_says_more(
    monkeypatch, parameters, set_by_user, threads
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    now = [3]
    monkeypatch.setattr(torch, "set_num_threads", lambda n: now.__setitem__(0, n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: now[0])
    processes.choose_threads(int(parameters))
    assert now[0] == threads


# --- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("--lerning-rate", "--lr"),
        ("--learning_rate", "--lr"),
        ("--group_size", "--group-size"),
        ("--stepz", "--steps"),
        ("--max-tokens", "--max-new-tokens"),
        ("--no-edaa", "--no-eda"),
        ("--over-write", "--overwrite"),
    ],
)
def test_an_unknown_flag_gets_a_suggestion(typed, meant):
    with pytest.raises(edge_grpo.UserError, match=f"{typed}.*; {meant} may be meant"):
        edge_grpo.parse_flags([typed, "3"])


def test_an_unknown_flag_like_no_other_gets_none():
    with pytest.raises(edge_grpo.UserError, match=r"--xyzzyq 3 \(--help lists every flag\)"):
        edge_grpo.parse_flags(["--xyzzyq", "3"])


def test_every_ablation_has_a_folder_of_its_own():
    argvs = [
        "",
        "--no-eda",
        "--seed 7",
        "--kl 0.1",
        "--kl 0.2",
        "--method grpo",
        "--method grpo --eda",
        "--lr 1e-5",
        "--eda-clamp 0.5 2",
        "--data tiny:4-6:train:terse",
        "--model Qwen2.5-Math-7B",
        "--eval-tasks",
    ]
    outs = [edge_grpo.parse_flags(argv.split()).out for argv in argvs]
    assert len(set(outs)) == len(outs)
    assert outs[0] == "runs/tiny-edge-grpo-seed42" and outs[2] == "runs/tiny-edge-grpo-seed7"
    assert outs[1] == "runs/tiny-edge-grpo-eda-False-seed42" and outs[5] == "runs/tiny-grpo-seed42"
    assert (
        outs[10] == "runs/Qwen2.5-Math-7B-edge-grpo-seed42"
        and outs[4] == "runs/tiny-edge-grpo-kl-0.2-seed42"
    )
    assert all(Path(out).parent == Path("runs") for out in outs)
    for same in (
        "--resume",
        "--keep 3 --device cpu",
        "--micro-batch-tokens 99",
    ):  # no other experiment
        assert edge_grpo.parse_flags(same.split()).out == outs[0]
    assert edge_grpo.parse_flags(["--kl", "0.1", "--out", "here"]).out == "here"


# --- what the system refuses -----------------------------------------------------------------------------------------


def refused(capsys, *argv) -> str:
    assert edge_grpo.main([*RUN, *map(str, argv)]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("error: ") and "Traceback" not in text, text
    return text


def test_each_error_of_the_system_has_its_own_advice(capsys):
    texts = []
    for code in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EEXIST, errno.ENOENT, errno.EIO):

        def work(code=code):
            raise OSError(code, os.strerror(code), "x")

        assert console.exit_code(work, "go on with --resume", "") == 2
        texts.append(capsys.readouterr().err.split(";", 1)[1])
        assert "--resume" in texts[-1] and ("make room" in texts[-1]) == (code == errno.ENOSPC)
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("where", ["file", "file/below", "link"])
def test_an_out_that_is_no_folder(tmp_path, capsys, where):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    text = refused(capsys, "--out", tmp_path / where)
    assert "link to nothing" in text and "make room" not in text and str(tmp_path / where) in text
    assert (tmp_path / "file").read_text() == "in the way" and not (tmp_path / "nothing").exists()


def test_overwrite_removes_a_linked_folder_and_not_what_it_leads_to(copy, tmp_path, reference):
    for name in ("checkpoints", "samples.jsonl"):
        shutil.move(copy / name, tmp_path / name)
        (copy / name).symlink_to(tmp_path / name)
    before = fingerprint(tmp_path / "checkpoints")
    assert run(copy, "--overwrite") == 0, said(copy)
    assert (
        fingerprint(tmp_path / "checkpoints") == before and not (copy / "checkpoints").is_symlink()
    )
    assert result(copy) == reference


def deny(path):
    """What a file or folder of mode 000 is to everyone but root."""

    def hook(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "metrics.jsonl",
        "evals.jsonl",
        "samples.jsonl",
        "checkpoints",
        "checkpoints/step-3/checkpoint.json",
        "checkpoints/step-3/model.safetensors",
    ],
)
def test_what_cannot_be_read_is_not_absent(copy, reference, name):
    before = fingerprint(copy / "checkpoints")
    assert run(copy, "--resume", prepare=deny, arguments=(copy / name,)) == 2
    assert said(copy).count("\n") == 1 and "Permission denied" in said(copy) and name in said(copy)
    assert "--overwrite" not in said(copy) and "allow this user" in said(copy)
    assert fingerprint(copy / "checkpoints") == before
    assert run(copy, "--resume") == 0 and result(copy) == reference


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, line",
    [
        (b"", 1),
        (b"{", 1),
        (b"[]", 1),
        (b"null", 1),
        (b"\xff\xfe{", 1),
        (b"\0" * 99, 1),
        (b"[" * 99999, 1),
        (b"{}", 1),
        (b'{"step": "3"}', 1),
        (b'{"step": 3,\n"loss" 3}', 2),
    ],
)
def test_damaged_json_is_one_sentence_with_file_and_line(tmp_path, text, line):
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(engine.folder.UserError, match=rf"x\.json:{line}: .*; restore the file"):
        folder.read_json(file, step=int)
    if b"\n" not in text:
        file.write_bytes(b'{"step": 1}\n' + text + b'\n{"step": 2}\n')
        with pytest.raises(engine.folder.UserError, match=r"x\.json:2: "):
            folder.read_lines(file, step=int)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "evals.jsonl"])
@pytest.mark.parametrize("text", [b"{}", b"\0\0\0", b'["x"]'])
def test_a_run_with_a_damaged_file_ends_in_that_sentence(copy, capsys, name, text):
    content = (copy / name).read_bytes()
    new = (
        text
        if name == "config.json"
        else text.ljust(content.index(b"\n")) + content[content.index(b"\n") :]
    )
    (copy / name).write_bytes(new)
    assert f"{copy / name}:1: " in refused(capsys, "--out", copy, "--resume")
    (copy / name).write_bytes(content)
    assert run(copy, "--resume") == 0


def test_what_a_power_loss_leaves_behind_the_last_checkpoint_does_not_matter(copy, reference):
    for name in LOGS:
        with open(copy / name, "ab") as f:
            f.write(b'{"step": 4, "lo\n' + b"\0" * 100 + b"\n{}\n")
    assert run(copy, "--resume") == 0, said(copy)
    assert result(copy) == reference


def lose_power_after(step, out):
    """SIGKILL once the checkpoint of a step has its name. Of every file only so much is left as was flushed, as on a
    disk that loses its power."""
    flushed, fsync, flush = {}, os.fsync, checkpoints.flush

    def note(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        flushed[path.replace(".config.json.unfinished", "config.json")] = os.fstat(
            descriptor
        ).st_size
        fsync(descriptor)

    def killed(path):
        flush(path)
        if (out / "checkpoints" / f"step-{step}").exists():
            for name in (*LOGS, "config.json"):
                os.truncate(out / name, flushed.get(str(out / name), 0))
            os.kill(os.getpid(), signal.SIGKILL)

    folder.os.fsync, checkpoints.flush = note, killed


def test_a_run_survives_a_power_loss_right_after_a_checkpoint(tmp_path, reference):
    out = tmp_path.resolve() / "run"
    assert run(out, prepare=lose_power_after, arguments=(2, out)) == -signal.SIGKILL
    assert names(out) == ["step-2", "step-1"]
    assert run(out, "--resume") == 0, said(out)
    assert result(out) == reference


def test_a_log_shorter_than_the_newest_checkpoint_says_leads_to_the_one_before(copy, reference):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert run(copy, "--resume") == 0
    assert "step-3 is not used: metrics.jsonl is shorter" in said(
        copy
    ) and "going on from" in printed(copy)
    assert result(copy) == reference


def test_a_learning_rate_that_breaks_the_model_is_named_and_nothing_broken_is_saved(tmp_path):
    out = tmp_path / "run"
    for more in ((), ("--resume",)):
        assert run(out, "--lr", "1e12", "--method", "sft", *more) == 2
    assert (
        said(out).count("\n") == 2
        and said(out).count("--lr") == 2
        and "none was saved yet" in said(out)
    )
    assert names(out) == [] and not (out / "final").exists()


def break_after_saving(step):
    """The weights of a step can be saved, but with them the next step cannot be sampled."""
    save = engine.run.Run._save

    def broken(self, trainer, at):
        with torch.no_grad():
            sample = self.policy.sample
            if at == step:
                self.policy.sample = lambda *_: []
                next(self.policy.model.parameters()).fill_(float("nan"))
            save(self, trainer, at)
            self.policy.sample = sample

    engine.run.Run._save = broken


def test_a_checkpoint_that_cannot_be_sampled_replaces_no_good_one(tmp_path):
    out = tmp_path / "run"
    assert run(out, "--keep", "1", prepare=break_after_saving, arguments=(3,)) == 2
    assert names(out) == ["step-3", "step-2"] and checkpoints.verified(
        out / "checkpoints" / "step-2"
    )
    assert "--lr" in said(out) and str(out / "checkpoints" / "step-2") in said(out)
    assert run(out, "--keep", "1", "--resume") == 2  # and after it is told again
    assert said(out).count(str(out / "checkpoints" / "step-2")) == 2 and names(out) == [
        "step-3",
        "step-2",
    ]


# --- the disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, more", [("--save-every 1 --keep 2", 3), ("--save-every 0", 1), ("--save-every 3", 2)]
)
def test_the_disk_is_checked_before_the_first_step(tmp_path, capsys, monkeypatch, flags, more):
    out, usage = tmp_path / "run", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=more * 32 * 2**20))
    text = refused(capsys, "--out", out, *flags.split())
    assert f": {more} checkpoints to come" in text and "--save-every 0" in text and "--keep" in text
    assert not (out / "config.json").exists() and not (out / "metrics.jsonl").read_bytes()
    monkeypatch.undo()
    assert run(out, "--resume", *flags.split()) == 0


def full_at_the_last_step():
    save_file = checkpoints.save_file

    def full(tensors, path):
        if path.parent.name == ".step-4.unfinished":
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    checkpoints.save_file = full


@pytest.mark.parametrize("save_every", ["0", "3"])
def test_the_final_model_needs_no_room_for_the_last_checkpoint(tmp_path, reference, save_every):
    out, flags = tmp_path / "run", ("--save-every", save_every)
    assert run(out, *flags, prepare=full_at_the_last_step) == 2 and "make room" in said(out)
    final = {k: v for k, v in reference["files"].items() if k.startswith("final/")}
    assert {f"final/{k}": v for k, v in fingerprint(out / "final").items()} == final
    assert run(out, *flags, "--resume") == 0  # the last steps once more, or all of them
    assert metrics(out) == reference["metrics"] and names(out)[0] == "step-4"


# --- signals ---------------------------------------------------------------------------------------------------------


def on_terminal(path):
    """The process leads a session on a terminal of its own, and its second step waits for that to be closed."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # if the tests run under nohup
    terminal = os.open(path, os.O_RDWR)  # the first that it opens is its terminal
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.close(terminal)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    update, steps = edge_grpo.update, itertools.count()

    def slow(*args, **more):
        for _ in range(600 * (next(steps) == 1)):
            time.sleep(0.05 * os.isatty(1))
        return update(*args, **more)

    edge_grpo.update = slow


def test_a_terminal_that_is_closed_saves_the_step(tmp_path, reference):
    out = tmp_path / "run"
    master, slave = pty.openpty()
    process = start(out, "--save-every", "0", prepare=on_terminal, arguments=(os.ttyname(slave),))
    os.close(slave)
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_bytes():
        assert process.is_alive(), os.read(master, 9999).decode()
        time.sleep(0.05)
    os.close(master)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGHUP
    [saved] = names(out)
    assert saved == f"step-{len(metrics(out))}"
    assert run(out, "--resume") == 0 and result(out)["metrics"] == reference["metrics"]


def test_nohup_is_respected(monkeypatch):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        stop = console.Stop()
        assert (
            signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            and signal.getsignal(signal.SIGTERM) == stop.ask
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ctrl_c_while_modules_are_imported_is_no_traceback(tmp_path):
    program = subprocess.Popen(
        [sys.executable, "edge_grpo.py", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{program.pid}/maps").read_text():
        time.sleep(0.01)
    program.send_signal(signal.SIGINT)
    assert program.communicate(timeout=60) == ("", "")
    assert program.returncode == -signal.SIGINT  # which a shell shows as 130


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
    processes.leave(0)
