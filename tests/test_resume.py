"""A run that cannot be lost: killed at any moment and resumed, it is, byte for byte, the run that was never killed.

The runs here are processes of their own, forked from one that has imported torch already (that saves seconds each).
"""

import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import data
import edge_grpo
import engine
import eval as evaluation
from engine import folder
from engine.checkpoints import checkpoint_folders, newest_checkpoint, sha256
from engine.models import load_model
from engine.run import LOGS
from engine.trainer import Trainer

ROOT = Path(__file__).parents[1]
RUN = (
    "--steps 4 --save-every 1 --keep 2 --questions-per-step 1 --group-size 4 --max-new-tokens 16 "
    "--correction-tokens 8 --micro-batch-tokens 512 --eval-max-new-tokens 8"
).split()  # + --data and --eval-tasks, by the fixture `server`
TIMES = ("seconds_", "tokens_per_second", "peak_memory_gib")


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory):
    """The process that the runs are forked from: one thread, and all imported that a run imports."""
    for name, rows in (
        ("train", data.load("tiny:1-2")[:9]),
        ("held-out", data.load("tiny:1:validation")[:2]),
    ):
        path = tmp_path_factory.mktemp("data") / f"{name}.jsonl"
        path.write_text(
            "".join(
                json.dumps(dict(problem=p.question, answer=p.answers[0], solution=p.solution))
                + "\n"
                for p in rows
            )
        )
        RUN.extend(["--data" if name == "train" else "--eval-tasks", str(path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{Path(__file__).parent}")
        forkserver.set_forkserver_preload(
            ["edge_grpo", "transformers.models.qwen2.modeling_qwen2", "torch._dynamo"]
        )
        forkserver.ensure_running()


def child(argv, log, prepare, arguments):
    os.dup2(os.open(f"{log}.out", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(os.open(f"{log}.err", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    torch.set_num_threads(1)
    if prepare:
        prepare(*arguments)
    raise SystemExit(edge_grpo.main(argv))


def start(out, *argv, prepare=None, arguments=()):
    context = multiprocessing.get_context("forkserver")
    process = context.Process(
        target=child, args=([*RUN, "--out", str(out), *argv], str(out), prepare, arguments)
    )
    process.start()
    return process


def run(out, *argv, **options):
    """The exit code of a run; negative: ended by that signal."""
    process = start(out, *argv, **options)
    process.join(120)
    assert process.exitcode is not None, "the run hangs"
    return process.exitcode


def said(out) -> str:
    return Path(f"{out}.err").read_text()


def metrics(out) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines
    ]


def fingerprint(out) -> dict[str, str]:
    return {str(f.relative_to(out)): sha256(f) for f in sorted(out.rglob("*")) if f.is_file()}


def result(out) -> dict:
    """All that a run leaves, but for its times and what tells them (flags, the size of the log, the report)."""
    timed = ("metrics.jsonl", "config.json.unfinished", "checkpoint.json", "report.md")
    files = {
        k: v
        for k, v in fingerprint(out).items()
        if not k.endswith(timed) and k != "config.json" and not k.startswith("figures")
    }
    return dict(metrics=metrics(out), files=files)


@pytest.fixture(scope="module")
def reference(tmp_path_factory, server):
    out = tmp_path_factory.mktemp("reference") / "run"
    assert run(out) == 0, said(out)
    return result(out)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, server):
    """A run ended after its third step, with checkpoints of steps 2 and 3."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert run(out, prepare=signal_at_step, arguments=(3, [signal.SIGTERM])) == 143, said(out)
    return out


@pytest.fixture
def copy(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


# --- killed ----------------------------------------------------------------------------------------------------------

FILE_EVENTS = (
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
)


def kill_at_file_operation(k, out):
    """SIGKILL before the k-th operation on the run's files."""
    import sys

    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in FILE_EVENTS and (
            str(out) in str(arguments[0]) or event in ("os.remove", "os.rmdir")
        ):
            count += 1
            if count == k:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def tear(out):
    """The killed process may have been writing a line."""
    for name in LOGS:
        if (out / name).exists():
            with open(out / name, "a") as f:
                f.write('{"step": 3, "loss": 0.1')


def test_two_runs_with_the_same_flags_are_the_same_run(tmp_path, reference):
    out = tmp_path / "run"
    assert run(out) == 0
    assert result(out) == reference
    assert [m["step"] for m in metrics(out)] == [1, 2, 3, 4]
    assert len({m["loss"] for m in metrics(out)}) > 1  # and the numbers are those of a real run


def test_another_seed_is_another_run(tmp_path, reference):
    out = tmp_path / "run"
    assert run(out, "--seed", "1") == 0
    assert metrics(out) != reference["metrics"]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_file_operations_and_resumed_it_is_the_same_run(tmp_path, reference, seed):
    """From the first file on: a run has about 250 operations, of which about 50 in every checkpoint."""
    out, dice, kills = tmp_path / "run", random.Random(seed), 0
    while (
        code := run(
            out, "--resume", prepare=kill_at_file_operation, arguments=(dice.randint(1, 140), out)
        )
    ) != 0:
        assert code == -signal.SIGKILL, said(out)
        kills += 1
        tear(out)
    assert kills >= 2
    assert result(out) == reference
    assert not said(out)


def test_killed_at_random_times_and_resumed_it_is_the_same_run(tmp_path, reference):
    out, dice = tmp_path / "run", random.Random(5)
    for _ in range(4):
        process = start(out, "--resume")
        time.sleep(dice.uniform(0.1, 1.2))
        process.kill()
        process.join()
    assert run(out, "--resume") == 0
    assert result(out) == reference


def die_in_save_file(step):
    """SIGKILL when half of a checkpoint's optimizer state is written."""
    save_file = engine.checkpoints.save_file

    def half(tensors, path):
        save_file(tensors, path)
        if path.parent.name == f".step-{step}.unfinished":
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    engine.checkpoints.save_file = half


@pytest.mark.parametrize("step", [1, 3])
def test_killed_while_a_checkpoint_is_written_and_resumed_it_is_the_same_run(
    tmp_path, reference, step
):
    out = tmp_path / "run"
    assert run(out, prepare=die_in_save_file, arguments=(step,)) == -signal.SIGKILL
    assert [f.name for f in checkpoint_folders(out / "checkpoints")] == [
        f"step-{n}" for n in (2, 1) if n < step
    ]
    assert run(out, "--resume") == 0, said(out)
    assert result(out) == reference


# --- signals ---------------------------------------------------------------------------------------------------------


def signal_at_step(step, numbers):
    """The process gets these signals while it grades the responses of a step."""
    grade, sample, now = edge_grpo.grade, edge_grpo.sample, [0]

    def count(policy, batch, flags, k, *again):
        now[0] = k + 1
        return sample(policy, batch, flags, k, *again)

    def graded(*arguments):
        if now[0] == step:
            now[0] = 0
            for number in numbers:
                os.kill(os.getpid(), number)
        return grade(*arguments)

    edge_grpo.grade, edge_grpo.sample = graded, count


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(tmp_path, reference, number, code):
    out = tmp_path / "run"
    assert run(out, "--save-every", "0", prepare=signal_at_step, arguments=(2, [number])) == code
    assert said(out).strip() == "finishing the step, then saving; once more to stop at once"
    assert [f.name for f in checkpoint_folders(out / "checkpoints")] == ["step-2"]
    assert len(metrics(out)) == 2 and not (out / "final").exists()
    assert run(out, "--resume") == 0
    assert result(out) == reference


def test_a_second_signal_ends_the_process_at_once(tmp_path, reference):
    out = tmp_path / "run"
    code = run(
        out,
        "--save-every",
        "0",
        prepare=signal_at_step,
        arguments=(2, [signal.SIGTERM, signal.SIGTERM]),
    )
    assert code == -signal.SIGTERM  # which a shell shows as 143
    assert len(metrics(out)) == 1 and not checkpoint_folders(out / "checkpoints")
    assert run(out, "--resume") == 0
    assert {f: v for f, v in result(out)["files"].items() if "step-3" not in f} == {
        f: v for f, v in reference["files"].items() if "step-3" not in f
    }


def test_ctrl_c_before_the_first_step_is_no_traceback(monkeypatch, capsys, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "load_policy", interrupted)
    assert edge_grpo.main([*RUN, "--out", str(tmp_path / "run")]) == 130
    assert capsys.readouterr().err == "stopped; go on with --resume\n"


# --- damage ----------------------------------------------------------------------------------------------------------


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    file.write_bytes(content)


def cut_off(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, cut_off, os.remove, lambda file: file.write_bytes(b"")],
    ids=["altered", "truncated", "removed", "emptied"],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_used(copy, capsys, damage):
    newest = copy / "checkpoints" / "step-3"
    for file in sorted(newest.iterdir()):
        before = file.read_bytes()
        damage(file)
        found, manifest = newest_checkpoint(copy / "checkpoints")
        assert found.name == "step-2" and manifest["step"] == 2, file
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and str(newest) in said and file.name in said
        file.write_bytes(before)
    assert newest_checkpoint(copy / "checkpoints")[0] == newest


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"files": {}}',
        '{"files": []}',
        "\0",
        "null",
        '"files"',
        '{"files": {"model.safetensors": {}}, "sha256": "x"}',
    ],
)
def test_a_checkpoint_json_of_any_other_content_is_refused(copy, text):
    (copy / "checkpoints" / "step-3" / "checkpoint.json").write_text(text)
    assert newest_checkpoint(copy / "checkpoints")[0].name == "step-2"


def test_a_run_resumed_from_before_a_damaged_checkpoint_is_the_same_run_and_replaces_it(
    copy, reference
):
    cut_off(copy / "checkpoints" / "step-3" / "optimizer-0.safetensors")
    assert run(copy, "--resume") == 0
    assert "step-3" in said(copy) and said(copy).count("\n") == 1
    assert result(copy) == reference


def test_a_damaged_checkpoint_never_pushes_out_a_whole_one(copy):
    """Resumed from step 2 beside damaged steps 3 and 9, with --keep 1: after the next save that one is kept, and the one
    before it until a step was sampled from the new one."""
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "step-3", checkpoints / "step-9")
    for name in ("step-3", "step-9"):
        os.remove(checkpoints / name / "checkpoint.json")
    assert (
        run(
            copy, "--resume", "--keep", "1", prepare=signal_at_step, arguments=(3, [signal.SIGTERM])
        )
        == 143
    )
    assert [f.name for f in checkpoint_folders(checkpoints)] == ["step-3", "step-2"]
    assert [engine.checkpoints.verified(f)["step"] for f in checkpoint_folders(checkpoints)] == [
        3,
        2,
    ]


def test_with_no_whole_checkpoint_left_nothing_is_touched(copy, capsys):
    for saved in checkpoint_folders(copy / "checkpoints"):
        cut_off(saved / "model.safetensors")
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    assert "no whole checkpoint is left" in capsys.readouterr().err
    assert fingerprint(copy) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "evals.jsonl"])
def test_a_log_shorter_than_every_checkpoint_says_is_refused(copy, capsys, name):
    os.truncate(copy / name, 10)
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    assert f"{name} is shorter" in capsys.readouterr().err
    assert fingerprint(copy) == before


def test_loading_a_checkpoint_unpickles_nothing_and_reads_only_what_was_verified(copy, monkeypatch):
    policy = engine.load_policy("tiny", "cpu")
    trainer = Trainer(policy, 512)
    found = newest_checkpoint(copy / "checkpoints")
    (found[0] / "zzz.safetensors").write_bytes(b"not what it seems")

    def refused(*_, **__):
        raise AssertionError("unpickled")

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refused)
    engine.checkpoints.load_checkpoint(trainer, *found)
    assert trainer.adam_steps == found[1]["adam_steps"] == 3
    saved = load_model(str(found[0]), torch.device("cpu"), torch.float32).state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in policy.model.state_dict().items())


# --- the disk --------------------------------------------------------------------------------------------------------


def newest_is_whole(out, name):
    newest = checkpoint_folders(out / "checkpoints")[0]
    return newest.name == name and bool(engine.checkpoints.verified(newest))


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_cannot_be_written_whole_is_one_sentence(tmp_path):
    """A real failure in the middle of a native write: no file may grow beyond 100 kB, the weights are larger."""
    out = tmp_path / "run"
    assert run(out, prepare=limit_file_size, arguments=(100_000,)) == 2
    assert (
        said(out).count("\n") == 1 and said(out).startswith("error: ") and "--resume" in said(out)
    )
    assert not checkpoint_folders(out / "checkpoints")
    assert run(out, "--resume") == 0


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")],
    ids=["python", "native"],
)
def test_a_full_disk_while_saving_leaves_the_newest_checkpoint(copy, capsys, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr(engine.checkpoints, "save_file", full)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "--resume" in said
    assert newest_is_whole(copy, "step-3")


def test_a_full_disk_while_logging_leaves_the_newest_checkpoint(copy, capsys, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def writelines(self, lines):
            raise OSError(
                28, "No space left on device"
            )  # as a write tells it: without the file's name

    monkeypatch.setattr(
        folder,
        "open",
        lambda path, mode, **how: Full() if mode == "a" else open(path, mode, **how),
        raising=False,
    )
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "metrics.jsonl" in said
    assert newest_is_whole(copy, "step-3")


def test_space_is_checked_before_a_checkpoint_is_written(copy, capsys, monkeypatch, reference):
    usage = shutil.disk_usage(copy)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
        assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the disk has 0.00 GiB left" in said
    assert newest_is_whole(copy, "step-3") and not list((copy / "checkpoints").glob(".*"))
    assert run(copy, "--resume") == 0
    assert result(copy) == reference


# --- starting over, other flags --------------------------------------------------------------------------------------


def test_a_run_is_not_started_over_by_accident(copy, capsys):
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--resume" in said and "--overwrite" in said
    assert fingerprint(copy) == before


def test_overwrite_starts_over_and_deletes_only_what_a_run_writes(copy, reference):
    (copy / "notes.txt").write_text("mine")
    (copy / "eval" / "n8").mkdir(parents=True)
    (copy / "eval" / "n8" / "summary.json").write_text("{}")  # of the model that goes
    assert run(copy, "--overwrite") == 0
    assert (copy / "notes.txt").read_text() == "mine"
    os.remove(copy / "notes.txt")
    assert result(copy) == reference


@pytest.mark.parametrize(
    "flag",
    ["--lr 1e-5", "--seed 7", "--steps 9", "--method grpo", "--data tiny:1-2", "--eda-clamp 0.5 2"],
)
def test_resume_with_flags_of_another_run_is_refused(copy, capsys, flag):
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume", *flag.split()]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and flag.split()[0].replace("--method", "--correction") in said
    assert fingerprint(copy) == before


def test_a_run_whose_checkpoints_were_deleted_is_not_started_again(copy, capsys):
    shutil.rmtree(copy / "checkpoints")
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    assert "no whole checkpoint is left" in capsys.readouterr().err
    assert fingerprint(copy) == before


def test_a_resumed_run_keeps_the_reference_of_its_kl_penalty(tmp_path):
    """The model as it was before the first step, not as it was when the run went on."""
    flags = ("--kl", "0.5", "--lr", "0.01")
    assert run(tmp_path / "whole", *flags) == 0, said(tmp_path / "whole")
    out = tmp_path / "run"
    assert run(out, *flags, prepare=signal_at_step, arguments=(2, [signal.SIGTERM])) == 143
    assert run(out, "--resume", *flags) == 0
    assert result(out) == result(tmp_path / "whole")


def test_a_tokenizer_that_writes_a_folder_is_saved_and_resumed(tmp_path):
    """With several chat templates the others come in a folder of their own."""
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(ROOT / "data" / "tiny_model", model)
    (model / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja"):
        (model / name).write_text("{{ messages[-1].content }}")
    argv = ("--model", str(model))
    assert run(out, *argv, prepare=signal_at_step, arguments=(2, [signal.SIGTERM])) == 143, said(
        out
    )
    saved = json.loads((out / "checkpoints" / "step-2" / "checkpoint.json").read_text())["files"]
    assert "additional_chat_templates/tools.jinja" in saved
    assert run(out, "--resume", *argv) == 0, said(out)


def test_two_runs_do_not_share_a_folder(tmp_path, reference):
    """A job that was started anew while its last attempt still finishes a step."""
    out = tmp_path / "run"
    first = start(out, prepare=slow_steps)
    while not (out / "metrics.jsonl").exists():
        time.sleep(0.05)
    for flag in ("--resume", "--overwrite"):
        assert run(out, flag) == 2 and "another process is at work in it" in said(out)
    first.join(120)
    assert result(out)["metrics"] == reference["metrics"]


def slow_steps():
    update = edge_grpo.update
    edge_grpo.update = lambda *args, **more: time.sleep(3) or update(*args, **more)


def no_evaluation(*_):
    raise torch.cuda.OutOfMemoryError("CUDA out of memory")


def fail_at_the_last_evaluation():
    plain = evaluation.while_training

    def evaluate(policy, tasks, flags, step):
        return (no_evaluation if step == 4 else plain)(policy, tasks, flags, step)

    evaluation.while_training = evaluate


def test_an_evaluation_that_fails_loses_no_step(tmp_path, reference):
    """The whole run with one checkpoint at the end: it stands before the last evaluation begins."""
    out = tmp_path / "run"
    assert run(
        out, "--save-every", "0", prepare=fail_at_the_last_evaluation
    ) == 2 and "out of memory" in said(out)
    assert (out / "checkpoints" / "step-4").exists() and len(
        (out / "evals.jsonl").read_text().splitlines()
    ) > 0
    assert run(out, "--resume", "--save-every", "0") == 0
    assert result(out)["metrics"] == reference["metrics"]
    assert result(out)["files"]["evals.jsonl"] == reference["files"]["evals.jsonl"]


def test_what_only_moves_memory_may_change_on_resume(tmp_path, reference):
    """As the out-of-memory messages advise: the same run, up to rounding."""
    out = tmp_path / "run"
    assert run(out, prepare=fail_at_the_last_evaluation) == 2
    shutil.rmtree(out / "checkpoints" / "step-4")
    assert (
        run(
            out,
            "--resume",
            "--micro-batch-tokens",
            "300",
            "--offload-optimizer",
            "--gradient-checkpointing",
        )
        == 0
    )
    for a, b in zip(metrics(out), reference["metrics"], strict=True):
        assert a["reward"] == b["reward"] and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


def without_git(path):
    os.environ["PATH"] = path


def test_a_machine_without_git_trains(tmp_path):
    out = tmp_path / "run"
    assert run(out, "--steps", "1", prepare=without_git, arguments=(str(tmp_path),)) == 0, said(out)
    assert json.loads((out / "config.json").read_text())["commit"] == "unknown"


@pytest.mark.parametrize(
    "change",
    [
        lambda problems: problems[::-1],
        lambda problems: [replace(p, question=p.question + " ") for p in problems],
        lambda problems: [replace(p, answers=("1",)) for p in problems],
        lambda problems: [replace(p, solution=p.solution + " ") for p in problems],
    ],
)
def test_resume_with_other_problems_under_the_same_name_is_refused(
    copy, capsys, monkeypatch, change
):
    load = edge_grpo.data.load
    monkeypatch.setattr(edge_grpo.data, "load", lambda *argv: change(load(*argv)))
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "other problems" in said


@pytest.mark.parametrize("text", [None, "", "[]", '{"flags": 3}', '{"flags": {}}', '{"fl'])
def test_resume_without_a_readable_config_is_refused(copy, capsys, text):
    if text is None:
        os.remove(copy / "config.json")
    else:
        (copy / "config.json").write_text(text)
    before = fingerprint(copy)
    assert edge_grpo.main([*RUN, "--out", str(copy), "--resume"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("config.json" in said or "other flags" in said)
    assert fingerprint(copy) == before


def test_resume_with_nothing_there_starts_and_says_so(tmp_path, reference):
    out = tmp_path / "run"
    assert run(out, "--resume") == 0
    assert result(out) == reference
    assert "starting at the first step" in Path(f"{out}.out").read_text()


def test_resume_of_a_run_that_has_ended_changes_nothing(tmp_path, reference):
    out = tmp_path / "run"
    assert run(out) == 0 and run(out, "--resume") == 0
    assert result(out) == reference
    assert run(out, "--resume", "--keep", "1") == 0
    assert (
        result(out)["metrics"] == reference["metrics"]
        and len(list((out / "checkpoints").iterdir())) == 1
    )


def test_the_newest_checkpoints_are_kept(tmp_path, reference):
    kept = {name.split("/")[1] for name in reference["files"] if name.startswith("checkpoints/")}
    assert kept == {"step-3", "step-4"}  # --keep 2
    out = tmp_path / "run"
    assert run(out, "--keep", "1") == 0
    assert [f.name for f in (out / "checkpoints").iterdir()] == ["step-4"]


def test_a_checkpoint_is_a_model_folder(copy):
    policy = engine.load_policy(str(copy / "checkpoints" / "step-3"), "cpu")
    tiny = engine.load_policy("tiny", "cpu")
    assert (
        policy.prompt_ids("How many?") == tiny.prompt_ids("How many?")
        and policy.end_ids == tiny.end_ids
    )
    assert (
        hashlib.sha256(repr(sorted(policy.tokenizer.get_vocab().items())).encode()).digest()
        == hashlib.sha256(repr(sorted(tiny.tokenizer.get_vocab().items())).encode()).digest()
    )
