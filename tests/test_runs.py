"""Runs from their first file to their last: killed, stopped, damaged, resumed, refused, and whole.

The central promise: a run that is killed at any moment and resumed is, byte for byte, the run that
was never killed. The runs here are processes of their own, forked from one that has imported torch
already."""

import errno
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from helpers import equal, json_lines, refusal, write_problems
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import data
import edge_grpo
import engine
import eval as evaluation
from data import download
from engine import checkpoints, folder
from engine.checkpoints import checkpoint_folders, newest_checkpoint, sha256, verified
from engine.folder import append, claim, read_json, read_lines
from engine.modelfiles import TINY_MODEL
from engine.models import load_model
from engine.run import LOGS
from engine.trainer import Trainer
from errors import UserError

ROOT = Path(__file__).parents[1]
RUN = (
    "--steps 4 --save-every 1 --keep 2 --questions-per-step 1 --group-size 4 --max-new-tokens 16 "
    "--correction-tokens 8 --micro-batch-tokens 512 --eval-max-new-tokens 8"
).split()  # and --data and --eval-tasks, by the fixture `server`
TIMES = ("seconds_", "tokens_per_second", "peak_memory_gib")
forks = multiprocessing.get_context("forkserver")
slow = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """The process that runs are forked from: one thread, and everything imported that a run
    imports."""
    here = tmp_path_factory.mktemp("data")
    train, held_out = data.load("tiny:1-2")[:9], data.load("tiny:1:validation")[:2]
    for option, problems in (("--data", train), ("--eval-tasks", held_out)):
        path = write_problems(here / f"{option}.jsonl", problems)
        RUN.extend([option, str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        forkserver.set_forkserver_preload(
            ["edge_grpo", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"]
        )
        forkserver.ensure_running()


def child(argv, log, prepare, arguments):
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
    torch.set_num_threads(1)
    if prepare:
        prepare(*arguments)
    raise SystemExit(edge_grpo.main(argv))


def run(out, *argv, prepare=None, arguments=()):
    """The exit code of a run; negative: ended by that signal. Its process prepares itself, for
    example to be killed somewhere, and then runs edge_grpo.py."""
    argv = [*RUN, "--out", str(out), *argv]
    process = forks.Process(target=child, args=(argv, str(out), prepare, arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def errors(out) -> str:
    return Path(f"{out}.err").read_text()


def printed(out) -> str:
    return Path(f"{out}.out").read_text()


def metrics(out) -> list[dict]:
    rows = json_lines(out / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def names(out) -> list[str]:
    return [path.name for path in checkpoint_folders(out / "checkpoints")]


def hashes(out) -> dict[str, str]:
    found = {}
    for path in sorted(out.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(out))] = sha256(path)
    return found


def result(out) -> dict:
    """All that a run leaves, but for times and for the files that hold them."""
    files = hashes(out)
    for name in list(files):
        own = name in ("metrics.jsonl", "config.json", "report.md")
        if own or name.endswith(("checkpoint.json", ".png")):
            del files[name]
    return dict(metrics=metrics(out), files=files)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, server):
    out = tmp_path_factory.mktemp("reference") / "run"
    assert run(out) == 0, errors(out)
    return result(out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, server):
    """A run ended after its third step, with checkpoints of steps 2 and 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert run(out, prepare=signal_at_step, arguments=(3, signal.SIGTERM)) == 143, errors(out)
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def refused(capfd, *argv) -> str:
    return refusal(capfd, edge_grpo.main, [*RUN, *argv])


# --- Killed ---------------------------------------------------------------------------------------

FILE_EVENTS = "open os.rename os.remove os.rmdir os.mkdir os.truncate shutil.rmtree".split()


def kill_at_file_operation(k, out):
    """SIGKILL before the k-th operation on the run's files."""
    count = itertools.count(1)

    def hook(event, arguments):
        if event not in FILE_EVENTS:
            return
        if str(out) in str(arguments[0]) or event in ("os.remove", "os.rmdir"):
            if next(count) == k:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("seed", [0, *[pytest.param(n, marks=slow) for n in (1, 2)]])
def test_killed_at_random_file_operations_and_resumed_it_is_the_same_run(tmp_path, reference, seed):
    """From the first file on: a run has about 250 operations, about 50 of them in each
    checkpoint."""
    out, dice, kills = tmp_path / "run", random.Random(seed), 0
    while True:
        at = (dice.randint(1, 140), out)
        code = run(out, "--resume", prepare=kill_at_file_operation, arguments=at)
        if code == 0:
            break
        assert code == -signal.SIGKILL, errors(out)
        kills += 1
        for name in LOGS:  # it may have been writing a line
            if (out / name).exists():
                with open(out / name, "a") as file:
                    file.write('{"step": 3, "loss": 0.1')
    assert kills >= 2
    assert result(out) == reference and not errors(out)
    assert [m["step"] for m in metrics(out)] == [1, 2, 3, 4]
    assert len({m["loss"] for m in metrics(out)}) > 1


def die_in_save_file(step, out):
    """SIGKILL when half of a checkpoint's optimizer state is written."""
    save = checkpoints.save_file

    def half(tensors, path):
        save(tensors, path)
        if path.parent.name == f".step-{step}.unfinished":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.save_file = half


def lose_power_after(step, out):
    """SIGKILL once the checkpoint of a step has its name. Of every file only what was flushed
    remains."""
    flushed, fsync, prune = {}, os.fsync, engine.run.prune

    def note(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        path = path.replace(".config.json.unfinished", "config.json")
        flushed[path] = os.fstat(descriptor).st_size
        fsync(descriptor)

    def killed(*arguments):
        if (out / "checkpoints" / f"step-{step}").exists():
            for name in (*LOGS, "config.json"):
                os.truncate(out / name, flushed.get(str(out / name), 0))
            os.kill(os.getpid(), signal.SIGKILL)
        prune(*arguments)

    folder.os.fsync, engine.run.prune = note, killed


@slow
@pytest.mark.parametrize(
    "prepare, step, whole",
    [
        (die_in_save_file, 1, []),
        (die_in_save_file, 3, ["step-2", "step-1"]),
        (lose_power_after, 2, ["step-2", "step-1"]),
    ],
)
def test_killed_while_saving_and_resumed_it_is_the_same_run(
    tmp_path, reference, prepare, step, whole
):
    out = tmp_path.resolve() / "run"
    assert run(out, prepare=prepare, arguments=(step, out)) == -signal.SIGKILL
    assert names(out) == whole
    assert run(out, "--resume") == 0, errors(out)
    assert result(out) == reference


# --- Stopped --------------------------------------------------------------------------------------


def signal_at_step(step, *numbers):
    """Signals in one of the steps, after the update and before it is logged."""
    log = engine.run.Run.log

    def logged(self, k, *args):
        if k + 1 == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        log(self, k, *args)

    engine.run.Run.log = logged


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=slow),
        pytest.param(signal.SIGHUP, 129, marks=slow),
    ],
)
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, reference, number, code):
    out = tmp_path / "run"
    arguments = (2, number)
    assert run(out, "--save-every", "0", prepare=signal_at_step, arguments=arguments) == code
    assert errors(out).strip() == "finishing the step, then saving; once more to stop at once"
    last = printed(out).splitlines()[-1]
    assert "step 2" in last and "saved" in last and "--resume" in last
    assert names(out) == ["step-2"] and len(metrics(out)) == 2 and not (out / "final").exists()
    assert run(out, "--resume") == 0
    assert result(out) == reference


@slow
def test_a_second_signal_ends_the_process_at_once(tmp_path, reference):
    out = tmp_path / "run"
    arguments = (2, signal.SIGTERM, signal.SIGTERM)
    code = run(out, "--save-every", "0", prepare=signal_at_step, arguments=arguments)
    assert code == -signal.SIGTERM  # which a shell shows as 143
    assert len(metrics(out)) == 1 and not names(out)
    assert run(out, "--resume") == 0 and metrics(out) == reference["metrics"]


def test_ctrl_c_before_the_first_step_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load_policy", interrupted)
    assert edge_grpo.main([*RUN, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "stopped; go on with --resume\n"


# --- Damaged --------------------------------------------------------------------------------------


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_off(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_off, os.remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(copy, capsys, damage):
    newest = copy / "checkpoints" / "step-3"
    for file in sorted(newest.iterdir()):
        before = file.read_bytes()
        damage(file)
        found, manifest = newest_checkpoint(copy / "checkpoints")
        assert found.name == "step-2" and manifest["step"] == 2, file
        sentence = capsys.readouterr().err
        assert sentence.count("\n") == 1 and str(newest) in sentence
        assert file.name in sentence or file.name == "checkpoint.json"
        file.write_bytes(before)
    for text in ("", "[]", "{}", "\0", "null", '{"files": {}}', '{"files": {"config.json": {}}}'):
        (newest / "checkpoint.json").write_text(text)
        assert newest_checkpoint(copy / "checkpoints")[0].name == "step-2"


def test_resumed_from_before_a_damaged_checkpoint_it_is_the_same_run(copy, reference):
    """It replaces the damaged one and forgets what was logged since, also if that is damaged."""
    cut_off(copy / "checkpoints" / "step-3" / "optimizer-0.safetensors")
    shutil.copytree(copy / "checkpoints" / "step-3", copy / "checkpoints" / "step-9")
    for name in LOGS:
        with open(copy / name, "ab") as file:
            file.write(b'{"step": 4, "lo\n' + b"\0" * 100 + b"\n{}\n")
    assert run(copy, "--resume") == 0
    assert errors(copy).count("\n") == 2 and "going on from" in printed(copy)
    assert result(copy) == reference


@pytest.mark.parametrize("name", LOGS)
def test_a_log_shorter_than_a_checkpoint_says_leads_to_the_one_before(copy, capfd, name):
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    found = newest_checkpoint(copy / "checkpoints")
    if name == "evals.jsonl":  # written before the first step only
        assert not found
    else:
        assert found[0].name == "step-2"
    assert f"{name} is shorter" in capfd.readouterr().err


def write_config(text):
    return lambda out: (out / "config.json").write_text(text)


def other_fingerprint(key):
    def damage(out):
        config = read_json(out / "config.json")
        assert config[key]
        write_config(json.dumps(config | {key: "another"}))(out)

    return damage


@pytest.mark.parametrize(
    "change, flags, sentence",
    [
        (None, "", "--overwrite"),  # a run is there
        (lambda out: os.remove(out / "config.json"), "--resume", "config.json"),
        (write_config(""), "--resume", "config.json:1: not valid JSON; restore"),
        (write_config("[]"), "--resume", "config.json:1: "),
        (write_config('{"flags": 3}'), "--resume", "config.json:1: "),
        (other_fingerprint("model_fingerprint"), "--resume", "has other weights or another chat"),
        (
            other_fingerprint("tasks_fingerprint"),
            "--resume",
            "--eval-tasks have other problems now",
        ),
        (None, "--resume --lr 1e-5", "--lr was 0.0001, is 1e-05"),
        (None, "--resume --seed 7", "--seed"),
        (None, "--resume --steps 9", "--steps"),
        (None, "--resume --method grpo", "--correction"),
        (None, "--resume --data tiny:1-2", "--data"),
        (None, "--resume --eda-clamp 0.5 2", "--eda-clamp"),
    ],
)
def test_a_run_that_cannot_go_on_is_refused_and_nothing_is_touched(
    copy, capfd, change, flags, sentence
):
    if change:
        change(copy)
    before = hashes(copy)
    assert sentence in refused(capfd, "--out", copy, *flags.split())
    assert hashes(copy) == before


def test_a_run_of_older_code_goes_on(copy):
    """Its config.json has no fingerprint of the model and of the evaluation's problems."""
    config = read_json(copy / "config.json")
    del config["model_fingerprint"], config["tasks_fingerprint"]
    write_config(json.dumps(config))(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 0


def test_a_run_without_a_whole_checkpoint_is_refused(copy, capfd):
    for path in checkpoint_folders(copy / "checkpoints"):
        cut_off(path / "model.safetensors")
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    *damaged, sentence = capfd.readouterr().err.splitlines()
    assert len(damaged) == 2
    assert sentence.startswith("error: ") and "no whole checkpoint is left" in sentence


@pytest.mark.parametrize(
    "change",
    [
        lambda problems: problems[::-1],
        lambda problems: [replace(p, question=p.question + " ") for p in problems],
        lambda problems: [replace(p, answers=("1",)) for p in problems],
        lambda problems: [replace(p, solution=p.solution + " ") for p in problems],
    ],
    ids=["order", "question", "answer", "solution"],
)
def test_other_problems_under_the_same_name_are_another_run(copy, capfd, monkeypatch, change):
    load = data.load
    monkeypatch.setattr(data, "load", lambda *argv: change(load(*argv)))
    assert "other problems" in refused(capfd, "--out", copy, "--resume")


def change_a_weight(model):
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 0.5
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def change_the_template(model):
    text = AutoTokenizer.from_pretrained(model).chat_template
    (model / "chat_template.jinja").write_text(text + "So: ")


@pytest.mark.parametrize(
    "change", [change_a_weight, pytest.param(change_the_template, marks=slow), None]
)
def test_a_model_folder_that_was_changed_is_another_run(tmp_path, capfd, change):
    """Compared is the model before its first step, with the one that the same --model loads now."""
    model, out = Path(shutil.copytree(TINY_MODEL, tmp_path / "model")), tmp_path / "run"
    argv = ["--model", str(model), "--steps", "1", "--lr", "0.01", "--method", "sft"]
    assert run(out, *argv) == 0, errors(out)
    weights = [load_file(path / "model.safetensors") for path in (model, out / "final")]
    assert not equal(*weights)
    if change:
        change(model)
        sentence = refused(capfd, "--out", out, *argv, "--resume")
        assert "other weights or another chat" in sentence
    else:
        assert run(out, *argv, "--resume") == 0, errors(out)


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
    with pytest.raises(UserError, match=rf"x\.json:{line}: .*; restore the file"):
        read_json(file, step=int)
    if not text.endswith(b"}"):  # that would be another object
        file.write_bytes(b'{"step": 1}\n' + text + b'\n{"step": 2}\n')
        with pytest.raises(UserError, match=r"x\.json:2: "):
            read_lines(file)


def test_not_even_a_nan_makes_a_line_that_is_no_json(tmp_path):
    file = tmp_path / "x.jsonl"
    append(file, [dict(a=math.nan, b=-math.inf, c=1.5, d="NaN", e=None, f=[0.5, math.nan])])
    row = dict(a=None, b=None, c=1.5, d="NaN", e=None, f=[0.5, None])
    assert json_lines(file) == [row]
    with open(file, "a") as opened:
        opened.write('{"a": 3')  # cut off by an interruption
    assert read_lines(file)[0] == [row]


def test_overwrite_deletes_links_and_not_what_they_point_to(copy, tmp_path):
    shutil.move(copy / "checkpoints", tmp_path / "theirs")
    (copy / "checkpoints").symlink_to(tmp_path / "theirs")
    before = hashes(tmp_path / "theirs")
    assert run(copy, "--steps", "1", "--overwrite") == 0, errors(copy)
    assert hashes(tmp_path / "theirs") == before and not (copy / "checkpoints").is_symlink()


def deny(path):
    """What a file or folder of mode 000 is to everyone but root."""

    def hook(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

    sys.addaudithook(hook)


@pytest.mark.parametrize(
    "name",
    [
        "checkpoints",
        pytest.param("config.json", marks=slow),
        pytest.param("metrics.jsonl", marks=slow),
        pytest.param("checkpoints/step-3/model.safetensors", marks=slow),
    ],
)
def test_what_cannot_be_read_is_not_absent(copy, reference, name):
    before = hashes(copy / "checkpoints")
    assert run(copy, "--resume", prepare=deny, arguments=(copy / name,)) == 2
    assert errors(copy).count("\n") == 1 and "Permission denied" in errors(copy)
    assert name in errors(copy) and "--resume" in errors(copy)
    assert hashes(copy / "checkpoints") == before
    assert run(copy, "--resume") == 0 and result(copy) == reference


def test_loading_a_checkpoint_unpickles_nothing_and_reads_only_what_was_verified(copy, monkeypatch):
    policy = engine.load_policy("tiny", "cpu")
    trainer = Trainer(policy, 512)
    path, manifest = newest_checkpoint(copy / "checkpoints")
    (path / "zzz.safetensors").write_bytes(b"not what it seems")
    for module, name in ((pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, None)
    checkpoints.load_checkpoint(trainer, path, manifest)
    assert trainer.adam_steps == manifest["adam_steps"] == 3
    saved = load_model(str(path), torch.device("cpu"), torch.float32)
    assert equal(policy.model.state_dict(), saved.state_dict())


def test_a_model_is_saved_in_files_of_bounded_size(tmp_path, policy, monkeypatch):
    size = (TINY_MODEL / "model.safetensors").stat().st_size
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", size // 3)
    checkpoints.save_model(policy, tmp_path)
    sizes = [f.stat().st_size for f in tmp_path.glob("*.safetensors")]
    assert len(sizes) >= 3 and max(sizes) < size / 2
    again = engine.load_policy(str(tmp_path), "cpu")
    assert equal(policy.model.state_dict(), again.model.state_dict())


# --- The disk -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, count", [("--save-every 1 --keep 2", 3), ("--save-every 0", 1), ("--save-every 3", 2)]
)
def test_the_disk_is_checked_before_the_first_step(tmp_path, capfd, monkeypatch, flags, count):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    sentence = refused(capfd, "--out", tmp_path / "run", *flags.split())
    assert f": {count} checkpoints to come" in sentence and "--save-every 0" in sentence
    assert "the disk has 0.00 GiB left" in sentence
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_while_saving_leaves_the_newest_checkpoint(copy, capfd, monkeypatch, kind):
    """The error of Python's own writing, and that of the native one."""

    def full(*_):
        raise kind("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    sentence = refused(capfd, "--out", copy, "--resume")
    assert "No space left" in sentence and "--resume" in sentence
    assert names(copy)[0] == "step-3" and verified(copy / "checkpoints" / "step-3")


def full_at_the_last_step():
    save = checkpoints.save_file

    def full(tensors, path):
        if path.parent.name == ".step-4.unfinished":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path)

    checkpoints.save_file = full


@slow
def test_the_final_model_needs_no_room_for_the_last_checkpoint(tmp_path, reference):
    out, flags = tmp_path / "run", ("--save-every", "3")
    assert run(out, *flags, prepare=full_at_the_last_step) == 2 and "No space" in errors(out)
    weights = "final/model.safetensors"
    assert sha256(out / weights) == reference["files"][weights]
    assert run(out, *flags, "--resume") == 0  # the last step once more
    assert metrics(out) == reference["metrics"] and names(out)[0] == "step-4"


# --- Failed, shared, started over -----------------------------------------------------------------


def fail_at_the_last_evaluation():
    plain = evaluation.while_training

    def evaluate(policy, tasks, flags, step):
        if step == 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return plain(policy, tasks, flags, step)

    evaluation.while_training = evaluate


@slow
def test_an_evaluation_that_fails_loses_no_step_and_memory_flags_may_change_on_resume(
    tmp_path, reference
):
    out = tmp_path / "run"
    assert run(out, prepare=fail_at_the_last_evaluation) == 2 and "out of memory" in errors(out)
    assert names(out)[0] == "step-4" and len(json_lines(out / "evals.jsonl")) == 1
    again = Path(shutil.copytree(out, tmp_path / "again"))
    assert run(out, "--resume") == 0
    assert result(out) == reference
    shutil.rmtree(again / "checkpoints" / "step-4")
    flags = "--micro-batch-tokens 300 --offload-optimizer --gradient-checkpointing".split()
    assert run(again, "--resume", *flags) == 0
    for a, b in zip(metrics(again), reference["metrics"], strict=True):
        assert a["reward"] == b["reward"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def hold(out):
    lock = claim(out)
    (out / "held").touch()
    time.sleep(60)
    lock.close()


def test_two_processes_do_not_share_a_folder(tmp_path, capfd):
    """A job that was started anew while its last attempt still finishes a step."""
    out = tmp_path / "run"
    first = forks.Process(target=hold, args=(out,))
    first.start()
    while not (out / "held").exists():
        time.sleep(0.02)
    evaluate = "--model tiny --tasks tiny:1:validation --out".split()
    for sentence in (
        refused(capfd, "--out", out, "--resume"),
        refused(capfd, "--out", out, "--overwrite"),
        refusal(capfd, evaluation.main, [*evaluate, out]),
    ):
        assert "another process is at work in it" in sentence
    first.kill()


@slow
def test_overwrite_starts_over_and_deletes_only_what_a_run_writes(copy, reference):
    (copy / "notes.txt").write_text("mine")
    (copy / "eval").mkdir()
    (copy / "eval" / "summary.json").write_text("{}")  # of the model that goes
    assert run(copy, "--overwrite") == 0
    assert (copy / "notes.txt").read_text() == "mine"
    os.remove(copy / "notes.txt")
    assert result(copy) == reference


@slow
def test_resume_where_nothing_is_starts_and_where_all_is_done_changes_nothing(tmp_path, reference):
    out = tmp_path / "run"
    assert run(out, "--resume") == 0
    assert result(out) == reference and "starting at the first step" in printed(out)
    assert run(out, "--resume") == 0
    assert result(out) == reference and names(out) == ["step-4", "step-3"]
    assert run(out, "--resume", "--keep", "1") == 0
    assert metrics(out) == reference["metrics"] and names(out) == ["step-4"]


@slow
def test_a_resumed_run_keeps_the_reference_of_its_kl_penalty(tmp_path):
    """The model as it was before the first step, not as it was when the run went on."""
    flags = ("--kl", "0.5", "--lr", "0.01")
    assert run(tmp_path / "whole", *flags) == 0, errors(tmp_path / "whole")
    out = tmp_path / "run"
    assert run(out, *flags, prepare=signal_at_step, arguments=(2, signal.SIGTERM)) == 143
    assert run(out, "--resume", *flags) == 0
    assert result(out) == result(tmp_path / "whole")


# --- Whole runs -----------------------------------------------------------------------------------

SMALL = (
    "--steps 3 --questions-per-step 2 --group-size 4 --max-new-tokens 16 --correction-tokens 8 "
    "--micro-batch-tokens 512 --eval-tasks tiny:1:validation --eval-limit 4 --eval-max-new-tokens 8"
).split()
KEYS = """step loss grad_norm lr reward accuracy accuracy_corrected format mixed_groups
    mixed_groups_corrected advantage_variance advantage_variance_eda entropy entropy_sampled
    response_tokens truncated reflected answered referenced reflect_fixed logprob_gap
    tokens_per_second seconds_sample seconds_grade seconds_correct seconds_update peak_memory_gib
    skipped_updates"""
UNDEFINED_FOR_SFT = (
    "accuracy format mixed_groups entropy_sampled response_tokens logprob_gap".split()
)
METHODS = {  # correction, EDA, SFT
    "edge-grpo": ("guided", True, False),
    "force-r-eda": ("reflect", True, False),
    "force-r": ("reflect", False, False),
    "grpo": ("none", False, False),
    "sft": ("none", False, True),
}


@pytest.fixture
def problems():
    return RUN[RUN.index("--data") + 1]


def check_run(out, steps, rows_per_step):
    """What every run must leave; returns its metrics, samples and final weights."""
    rows, samples = json_lines(out / "metrics.jsonl"), json_lines(out / "samples.jsonl")
    assert [m["step"] for m in rows] == list(range(1, steps + 1))
    assert all(set(KEYS.split()) <= m.keys() for m in rows)
    assert all(v is None or math.isfinite(v) for m in rows for v in m.values())
    assert all(m["skipped_updates"] == 0 and m["peak_memory_gib"] > 0 for m in rows)
    assert len(samples) == steps * rows_per_step
    config = read_json(out / "config.json")
    assert {"flags", "versions", "commit", "device", "cpu", "cpu_capability"} <= set(config)
    lr = config["flags"]["lr"]
    assert [m["lr"] for m in rows] == pytest.approx([lr * (1 - k / steps) for k in range(steps)])
    final = AutoModelForCausalLM.from_pretrained(out / "final").state_dict()
    assert AutoTokenizer.from_pretrained(out / "final").chat_template
    saved = load_file(out / "checkpoints" / f"step-{steps}" / "model.safetensors")
    assert all(torch.equal(final[name], weight) for name, weight in saved.items())
    return rows, samples, final


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_its_flag_to_its_model(tmp_path, problems, capsys, method):
    out = tmp_path / "run"
    assert edge_grpo.main([*SMALL, "--method", method, "--data", problems, "--out", str(out)]) == 0
    rows, _, after = check_run(out, 3, 2 if method == "sft" else 8)
    flags = read_json(out / "config.json")["flags"]
    assert (flags["correction"], flags["eda"], flags["sft"]) == METHODS[method]
    assert all(row["seconds_update"] > 0 for row in rows)
    total = {k: sum(m[k] for m in rows) for k in ("reflected", "answered", "referenced")}
    assert all(0 < m["entropy"] < math.log(308) for m in rows)
    if method == "sft":
        assert all(m[k] is None for m in rows for k in UNDEFINED_FOR_SFT)
        assert total["referenced"] == 6 and all(m["loss"] > 0 for m in rows)
    else:
        wrong = sum(round(8 * (1 - m["accuracy"])) for m in rows)
        assert sum(total.values()) == (0 if method == "grpo" else wrong) and wrong > 0
        assert (total["answered"] > 0) == (total["referenced"] > 0) == (method == "edge-grpo")
        assert all(m["logprob_gap"] < 1e-4 for m in rows)
        if not flags["eda"]:
            assert all(m["advantage_variance"] == m["advantage_variance_eda"] for m in rows)
    moved = not equal(after, engine.load_policy("tiny", "cpu").model.state_dict())
    assert moved == any(m["grad_norm"] > 0 for m in rows)
    assert moved or method in ("grpo", "force-r", "force-r-eda")
    evals = json_lines(out / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 3] and all(e["problems"] == 4 for e in evals)
    captured = capsys.readouterr()
    assert "held-out tiny:1:validation: accuracy" in captured.out and not captured.err


def test_without_reflections_all_becomes_right_and_the_run_says_what_that_means(
    tmp_path, problems, capsys
):
    out = tmp_path / "run"
    argv = [*SMALL, "--data", problems, "--out", str(out), "--guided-probs", "0", ".5", ".5"]
    assert edge_grpo.main(argv) == 0
    assert "little is learned" in capsys.readouterr().out
    for m in check_run(out, 3, 8)[0]:
        assert m["accuracy_corrected"] == 1
        assert m["mixed_groups_corrected"] == m["grad_norm"] == 0


def test_one_reference_in_an_all_wrong_group_mixes_it(tmp_path, problems, capsys):
    argv = [*SMALL, "--data", problems, "--out", str(tmp_path / "run"), "--steps", "1"]
    argv += "--correction reference --guide all-wrong --guide-at-most 1".split()
    assert edge_grpo.main(argv) == 0
    assert "little is learned" not in capsys.readouterr().out


@pytest.mark.parametrize("steps, evaluated", [(3, [0, 2, 3]), (4, [0, 2, 4])])
def test_evaluations_are_at_their_steps_and_sampled_as_the_eval_flags_say(
    tmp_path, problems, monkeypatch, steps, evaluated
):
    calls, evaluate = [], evaluation.evaluate

    def noted(policy, rows, **how):
        calls.append((len(rows), how))
        return evaluate(policy, rows, **how)

    monkeypatch.setattr(evaluation, "evaluate", noted)
    flags = f"--steps {steps} --seed 7 --eval-every 2 --eval-temperature 0.4 --eval-n 2".split()
    argv = [*SMALL, "--data", problems, "--out", str(tmp_path / "run"), *flags]
    assert edge_grpo.main(argv) == 0
    assert [e["step"] for e in json_lines(tmp_path / "run" / "evals.jsonl")] == evaluated
    assert calls == [(4, dict(n=2, temperature=0.4, max_new_tokens=8, seed=7))] * 3
    for s in json_lines(tmp_path / "run" / "samples.jsonl"):
        assert s["source"].startswith(problems)
        if s.get("correction") in ("reflect", "answer"):
            assert s["corrected"].startswith(s["response"]) and "Wait! Something" in s["corrected"]


def test_the_command_line_from_another_folder_without_git_on_a_console_that_is_not_utf8(tmp_path):
    """No --out, no OMP_NUM_THREADS, and a standard output that has no ±: started as a user does."""
    env = dict(os.environ, PYTHONIOENCODING="ascii", PATH=str(tmp_path))
    env.pop("OMP_NUM_THREADS", None)
    argv = [*RUN, "--kl", "0.1", "--no-eda"]
    for option in ("--data", "--eval-tasks"):  # short names, because the folder's name has them
        at = argv.index(option) + 1
        argv[at] = Path(shutil.copy(argv[at], tmp_path / f"{option[2:]}.jsonl")).name
    command = [sys.executable, str(ROOT / "edge_grpo.py"), *argv]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    first = done.stdout.split("step 0:")[0].splitlines()
    assert len(first) == 3 and "memory" not in done.stdout
    assert "CPU threads: 1;" in first[0]  # of a model this small
    assert " kl=0.1 " in first[1] and " eda=False " in first[1] and " temperature" not in first[1]
    assert first[2].startswith("prompt of the first problem: '<|im_start|>")
    assert " ? " in done.stdout  # accuracy ± error
    [out] = (tmp_path / "runs").iterdir()
    assert out.name.startswith("tiny-edge-grpo-") and out.name.endswith("-seed42")
    assert "-eda-False-" in out.name and "-kl-0.1-" in out.name
    assert read_json(out / "config.json")["commit"] == "unknown"
    check_run(out, 4, 4)


def test_the_sampler_takes_as_many_rows_as_preflight_allows(tmp_path, monkeypatch):
    """The others wait in its queue, and draw what they would have drawn all together."""
    policies, tokens, load = [], [], engine.load_policy

    def noted(*args):
        policies.append(load(*args))
        return policies[-1]

    monkeypatch.setattr(engine, "load_policy", noted)
    for rows in (None, 3):
        out = tmp_path / str(rows)
        monkeypatch.setattr(edge_grpo, "preflight", lambda *_, rows=rows, **__: rows)
        assert edge_grpo.main([*SMALL, "--device", "cpu", "--out", str(out)]) == 0
        tokens.append([m["response_tokens"] for m in json_lines(out / "metrics.jsonl")])
    assert [policy.sampler.max_rows for policy in policies] == [None, 3]
    assert tokens[0] == tokens[1]


# --- The paper's data and tokenizer ---------------------------------------------------------------

SHARED = ROOT.parent / "shared"
QWEN, UPSTREAM = SHARED / "tokenizers" / "Qwen2.5-Math-1.5B", SHARED / "upstream"
QWEN_RUN = (
    "--steps 2 --questions-per-step 2 --group-size 3 --max-new-tokens 8 --correction-tokens 4 "
    "--max-corrected-tokens 120 --micro-batch-tokens 1024 --lr 1e-3 --save-every 0 --data "
    "deepscaler-hard-1k"
).split()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen2 of two narrow layers with the paper's vocabulary (151936 rows) and
    tokenizer."""
    if not QWEN.is_dir() or not UPSTREAM.is_dir():
        pytest.skip("needs the real tokenizer and data in ../shared/tokenizers and upstream")
    model = tmp_path_factory.mktemp("qwen")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QWEN / name, model)
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=151643,
        bos_token_id=151643,
    )
    Qwen2ForCausalLM(config).save_pretrained(model)
    return model


@slow
@pytest.mark.parametrize("method", ["edge-grpo", "sft"])
def test_the_papers_data_with_its_tokenizer(tmp_path, monkeypatch, qwen, method):
    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")
    out = tmp_path / "run"
    argv = ["--model", str(qwen), "--mirror", str(UPSTREAM), "--method", method, "--out", str(out)]
    assert edge_grpo.main([*QWEN_RUN, *argv]) == 0
    rows, samples, _ = check_run(out, 2, 2 if method == "sft" else 6)
    config = read_json(out / "config.json")
    assert config["problems"] == 1000 and config["problems_left_out"] == []
    assert all(s["source"].startswith("deepscaler-hard-1k:") for s in samples)
    if method == "edge-grpo":
        for m in rows:
            assert m["logprob_gap"] < 1e-4 and m["response_tokens"] <= 8
            assert m["reflected"] + m["answered"] + m["referenced"] == 6
            assert m["entropy_sampled"] <= math.log(151665)  # no padding


def test_metrics_are_logged_live_where_the_package_is(tmp_path, monkeypatch, capsys):
    seen = []

    class Wandb:
        def init(self, **settings):
            assert settings["name"] == "run"
            return self

        def log(self, line, step):
            seen.append((step, line["loss"]))

    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    argv = ["--steps", "2", "--eval-tasks", "--out", str(tmp_path / "run"), "--log", "wandb"]
    assert edge_grpo.main(argv) == 0
    lines = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert seen == [(m["step"], m["loss"]) for m in lines]
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it fails
    assert edge_grpo.main([*argv, "--overwrite"]) == 2
    assert "pip install wandb" in capsys.readouterr().err


def test_a_data_module_of_the_users_own_is_named_and_not_taken_for_ours(tmp_path):
    (tmp_path / "data.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-c", "import engine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "hides this project's own data/" in done.stderr
