"""torchrun with 1, 2 and 3 processes: the rollouts, metrics, weights and checkpoints of one, and
clean ends.

This file is also the program that torchrun starts: one launch does several runs (`work`, at the
end), because importing torch takes longer than a run of the tiny model."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import backward, equal, json_lines, one_batch, random_rows, refusal, small_policy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import edge_grpo
import eval as evaluation
from engine import processes
from engine.checkpoints import newest_checkpoint
from engine.forward import ForwardPass
from engine.modelfiles import TINY_MODEL
from engine.processes import leave, rank, spread, start_processes, world_size
from engine.sharding import whole
from engine.trainer import Trainer

ROOT = Path(__file__).parents[1]
COMMON = (
    "--device cpu --steps 2 --questions-per-step 2 --max-new-tokens 48 --correction-tokens 24 "
    "--micro-batch-tokens 700 --save-every 0 --eval-tasks"
).split()
RUNS = {  # G = 8 unless it says otherwise
    "base": "--steps 3 --save-every 2 --keep 9",
    "one row": "--method sft --questions-per-step 1",  # fewer rows than processes
    "two rows": "--questions-per-step 1 --group-size 2 --steps 4",  # at times none of them goes on
    "nothing to correct": "--method grpo --data tiny:1-3 --group-size 7 --loss token "
    "--format-weight 1",
    "eda-grad": "--eda-grad",
    "kl": "--kl 3 --lr 5e-4",
    "two updates": "--updates-per-rollout 2 --loss constant",
    "offload": "--offload-optimizer --gradient-checkpointing",
}
THREE = ("base", "one row", "two rows", "nothing to correct")
EVAL = (
    "--device cpu --model tiny --tasks tiny:1-3:validation --limit 7 --n 3 --temperature 1 "
    "--max-new-tokens 48 --entropy --reflect"
).split()
slow = pytest.mark.slow


def run_of(name: str, out: Path, *more: str) -> list[str]:
    return [*COMMON, *RUNS[name].split(), "--out", str(out), *more]


class Launch:
    """torchrun on this machine at a free port; what each process prints is kept apart."""

    def __init__(self, processes: int, logs: Path, *program):
        self.logs = logs
        logs.mkdir(parents=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = (
            "-m torch.distributed.run --standalone --redirects 3 "
            f"--nproc-per-node {processes} --log-dir {logs / 'ranks'}"
        ).split()
        command = [sys.executable, *command, *map(str, program)]
        with open(logs / "torchrun", "w") as f:
            self.process = subprocess.Popen(command, stdout=f, stderr=f, env=env, cwd=ROOT)

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"torchrun hangs:\n{self}")

    def wait_for_a_step(self, out: Path) -> None:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_bytes():
            assert self.process.poll() is None and time.monotonic() < deadline, self
            time.sleep(0.1)

    def text(self, rank: int, stream: str) -> str:
        files = self.logs.glob(f"ranks/*/attempt_0/{rank}/{stream}.log")
        return "".join(f.read_text() for f in files)

    def errors(self) -> str:
        return self.text(0, "stderr") + self.text(1, "stderr")

    def __str__(self) -> str:
        files = [f for f in sorted(self.logs.rglob("*")) if f.is_file()]
        return "\n".join(f"--- {f.relative_to(self.logs)}\n{f.read_text()}" for f in files)

    def ended_by_itself(self) -> bool:
        """No process had to be killed after torchrun's 30 seconds of patience, and nothing timed
        out."""
        text = str(self)
        timed_out = "Timed out" in text or "timeout" in text.lower().replace("_timeout", "")
        return "forcefully" not in text and not timed_out


def launch_work(processes: int, folder: Path, jobs: list) -> Launch:
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return Launch(processes, folder / "logs", __file__, folder)


def metrics(run: Path) -> list[dict]:
    lines = json_lines(run / "metrics.jsonl")
    times = ("seconds_", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in line.items() if not k.startswith(times)} for line in lines]


def weights(run: Path) -> dict:
    return load_file(run / "final" / "model.safetensors")


def assert_close(a: dict, b: dict) -> None:
    """The same numbers, rounding aside (which EDA makes larger where it divides by entropies near
    0), and the same texts."""
    assert a.keys() == b.keys()
    for key, value in b.items():
        if isinstance(value, float):
            value = pytest.approx(value, abs=1e-5, rel=5e-5)
        elif isinstance(value, list) and value and isinstance(value[0], float):
            value = pytest.approx(value, abs=1.1e-3)  # written with three places
        assert a[key] == value, (key, a, b)


def assert_same(run: Path, expected: Path) -> None:
    """The same numbers and texts, and the same weights within 1e-5, but for one in a hundred."""
    ours = metrics(run) + json_lines(run / "samples.jsonl")
    theirs = metrics(expected) + json_lines(expected / "samples.jsonl")
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    ours, theirs = weights(run), weights(expected)
    start = load_file(TINY_MODEL / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in ours:  # AdamW makes a full step of a gradient that is rounding alone: a few entries
        off = (ours[name] - theirs[name]).abs()
        assert (off > 1e-5).double().mean() < 0.01 and off.max() < 1e-4, (name, off.max())
    # Else there was nothing to get wrong.
    assert any((theirs[name] - start[name]).abs().max() > 2e-5 for name in theirs)


def stopped_at_step_2(run: Path, to: Path) -> Path:
    """A copy of a run of 3 steps as it was when step 3 was under way."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-3")
    shutil.rmtree(to / "final")
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


# --- One launch in the default tests --------------------------------------------------------------


def test_two_processes_train_evaluate_and_end_as_one_does(folder):
    """Started as a user does; with held-out problems, because the others must not read those
    results."""
    here = folder / "smoke"
    argv = (
        *("--steps", "2", "--save-every", "1", "--eval-limit", "4", "--eval-max-new-tokens", "4"),
        *("--eval-tasks", "tiny:1-3:validation", "tiny:5:validation"),
    )
    launch = Launch(2, here / "logs", ROOT / "edge_grpo.py", *run_of("base", here / "2", *argv))
    assert edge_grpo.main(run_of("base", here / "1", *argv)) == 0
    assert launch.wait() == 0, launch
    assert_same(here / "2", here / "1")
    evals = [(run / "evals.jsonl").read_text() for run in (here / "1", here / "2")]
    assert evals[0] == evals[1] and evals[0].count("\n") == 4
    config = json.loads((here / "2" / "config.json").read_text())
    assert config["processes"] == 2
    assert launch.text(0, "stdout").count("held-out tiny:5:validation: accuracy") == 2
    assert "Traceback" not in str(launch) and not launch.text(1, "stdout"), launch


# --- Environments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device, environment, sentence",
    [
        ("cpu", "WORLD_SIZE=2", "not started by torchrun"),
        ("cpu", "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost", "not started by torchrun"),
        ("cpu", "WORLD_SIZE=many", "not started by torchrun"),
        ("cuda:1", "WORLD_SIZE=2 RANK=0 MASTER_ADDR=x MASTER_PORT=1", "same GPU"),
        ("cpu", "WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=0", "did not join"),
        ("cpu", "WORLD_SIZE=2 RANK=first MASTER_ADDR=localhost MASTER_PORT=0", "did not join"),
    ],
)
def test_an_environment_that_torchrun_did_not_make_is_one_sentence(
    monkeypatch, capfd, tmp_path, device, environment, sentence
):
    monkeypatch.setattr(processes, "JOINING", processes.timedelta(seconds=1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    text = refusal(capfd, edge_grpo.main, ["--device", device, "--out", tmp_path / "run"])
    assert sentence in text and "torchrun" in text


def test_torchrun_with_one_process_is_the_plain_path(folder, monkeypatch):
    assert edge_grpo.main(run_of("one row", folder / "plain")) == 0
    environment = dict(WORLD_SIZE=1, RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1)
    for name, value in environment.items():  # nobody listens at that port
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    argv = run_of("one row", folder / "alone")
    assert edge_grpo.main(argv) == 0 and not dist.is_initialized()
    assert equal(weights(folder / "plain"), weights(folder / "alone"))
    assert edge_grpo.main(argv) == 2  # a run is there already: said at once


# --- The same numbers on any number of processes --------------------------------------------------


@pytest.fixture(scope="module")
def one(folder):
    """Every run by one process, without a launcher."""
    for name in RUNS:
        assert edge_grpo.main(run_of(name, folder / "1" / name)) == 0
    assert evaluation.main([*EVAL, "--out", str(folder / "1" / "eval")]) == 0
    return folder / "1"


@pytest.fixture(scope="module")
def two(folder, one):
    """The same by two, and what only a group of processes can show."""
    here = folder / "2"
    stopped_at_step_2(one / "base", here / "from 1")
    jobs = [
        ["check", "spread"],
        ["check", "gradients"],
        *[["train", 0, *run_of(name, here / name)] for name in RUNS],
        ["train", 0, *run_of("base", here / "from 1", "--resume")],
        ["interrupt", 130, *run_of("base", here / "interrupted")],
        ["train", 0, *run_of("base", here / "interrupted", "--resume")],
        ["eval", 0, *EVAL, "--out", str(here / "eval")],
        ["train", 2, *run_of("eda-grad", here / "never", "--eda-clamp", "2", "1")],
    ]
    launch = launch_work(2, here, jobs)
    assert launch.wait() == 0, launch
    return here, launch


@pytest.fixture(scope="module")
def three(folder, two):
    here = folder / "3"
    stopped_at_step_2(two[0] / "base", here / "from 2")
    jobs = [
        ["check", "spread"],
        *[["train", 0, *run_of(name, here / name)] for name in THREE],
        ["train", 0, *run_of("base", here / "from 2", "--resume")],
    ]
    launch = launch_work(3, here, jobs)
    assert launch.wait() == 0, launch
    return here, launch


@slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(one, two, name):
    assert_same(two[0] / name, one / name)


@slow
@pytest.mark.parametrize("name", THREE)
def test_three_processes_give_what_one_gives(one, three, name):
    assert_same(three[0] / name, one / name)


@slow
def test_the_runs_compared_do_what_their_names_say(one):
    """Else the tests above would compare nothing."""
    lines = {name: metrics(one / name) for name in RUNS}
    assert all(max(m["grad_norm"] for m in lines[name]) > 0 for name in RUNS)
    assert any(m["mixed_groups_corrected"] and m["reflected"] > 3 for m in lines["base"])
    assert {m["reflected"] for m in lines["two rows"]} & {0, 1}
    assert not any(m["reflected"] for m in lines["nothing to correct"])
    assert len(json_lines(one / "one row" / "samples.jsonl")) == 2
    names = ("base", "eda-grad", "kl", "two updates")
    assert len({lines[name][1]["grad_norm"] for name in names}) == 4


@slow
def test_a_checkpoint_resumes_on_another_number_of_processes(folder, one, two, three):
    assert_same(two[0] / "from 1", one / "base")
    assert_same(three[0] / "from 2", one / "base")
    out = stopped_at_step_2(two[0] / "base", folder / "from 2")
    assert edge_grpo.main(run_of("base", out, "--resume")) == 0
    assert_same(out, one / "base")


@slow
def test_a_signal_to_one_process_saves_once_and_the_run_goes_on_from_there(one, two):
    assert_same(two[0] / "interrupted", one / "base")
    saved = sorted(f.name for f in (two[0] / "interrupted" / "checkpoints").iterdir())
    assert saved == ["step-1", "step-2", "step-3"]


@slow
def test_eval_uses_the_processes_and_gives_the_same(one, two):
    ours, theirs = (json_lines(run / "eval" / "responses.jsonl") for run in (two[0], one))
    assert any(row["phrase"] for row in ours)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)
    assert (two[0] / "eval" / "summary.json").exists()


@slow
def test_only_the_first_process_prints_and_an_error_of_all_is_told_once(two, three):
    """That it alone reads and writes the folder is watched inside, by `forbid_files`."""
    for _, launch in (two, three):
        assert "going on from" in launch.text(0, "stdout")
        for other in (1, 2):
            lines = (launch.text(other, "stdout") + launch.text(other, "stderr")).splitlines()
            assert all("--eda-clamp" in line or "[Gloo]" in line for line in lines), lines
    assert two[1].errors().count("error: --eda-clamp") == 1


# --- Ends -----------------------------------------------------------------------------------------


@slow
def test_an_error_of_one_process_ends_the_run_with_that_error_alone(folder):
    launch = launch_work(2, folder / "crash", [["crash", 0, *run_of("base", folder / "crashed")]])
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    assert "LookupError: injected into process 1" in launch.text(1, "stderr"), launch
    assert "Traceback" not in launch.text(0, "stderr"), launch


@slow
def test_a_mistake_that_only_the_first_process_sees_ends_the_run(folder):
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    argv = run_of("base", folder / "taken")
    launch = Launch(2, folder / "mistake", ROOT / "edge_grpo.py", *argv)
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    assert launch.errors().count("error: ") == 1, launch
    assert "holds a run already" in launch.errors() and "Traceback" not in launch.errors()


@slow
def test_a_process_that_is_killed_ends_the_run_in_one_sentence_and_it_goes_on(folder):
    out = folder / "killed"
    argv = run_of("base", out, "--steps", "1000", "--save-every", "1")
    launch = Launch(2, folder / "kill", ROOT / "edge_grpo.py", *argv)
    launch.wait_for_a_step(out)
    children = Path(f"/proc/{launch.process.pid}/task/{launch.process.pid}/children").read_text()
    for child in children.split():
        if "RANK=1\0" in Path(f"/proc/{child}/environ").read_text().replace("LOCAL_RANK", "LOCAL"):
            os.kill(int(child), signal.SIGKILL)
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    lines = [line for line in launch.text(0, "stderr").splitlines() if "finishing" not in line]
    assert [line for line in lines if line] == [
        "error: another process has ended, so this one cannot continue; go on with --resume"
    ], launch


@slow
def test_sigterm_to_torchrun_saves_once_and_ends(folder):
    out = folder / "terminated"
    argv = run_of("base", out, "--steps", "1000", "--save-every", "0")
    launch = Launch(2, folder / "sigterm", ROOT / "edge_grpo.py", *argv)
    launch.wait_for_a_step(out)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    [saved] = (out / "checkpoints").iterdir()
    path, manifest = newest_checkpoint(out / "checkpoints")
    assert path == saved and manifest["step"] == len(metrics(out))
    assert launch.errors().count("finishing the step") == 1 and "Traceback" not in launch.errors()
    assert launch.text(1, "stderr") == ""


# --- What torchrun starts -------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Do the jobs of folder/jobs.json in one group of processes."""
    start_processes("cpu")
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # the group is for all jobs
    jobs = json.loads((folder / "jobs.json").read_text())
    if rank() > 0:
        forbid_files(folder)
    programs = dict(
        train=edge_grpo.main, eval=evaluation.main, interrupt=interrupted, crash=crashed
    )
    for kind, *job in jobs:
        if kind == "check":
            {"spread": check_spread, "gradients": check_gradients}[job[0]]()
            continue
        expected, argv = job[0], job[1:]
        try:
            code = programs[kind](argv)
        except SystemExit:
            if kind == "crash":
                raise
            code = 2  # the second to meet the same mistake
        assert code == expected, (argv, code)
    destroy()


def forbid_files(folder: Path) -> None:
    """From now on this process may open, list or change nothing below `folder`: the first one may
    still be writing there. (Tensors of a checkpoint are read by safetensors, which this does not
    see.)"""
    events = "open os.listdir os.scandir os.mkdir os.rename os.remove os.rmdir os.truncate".split()

    def watch(event: str, args: tuple) -> None:
        path = str(args[0]) if args else ""
        if event in events and path.startswith(str(folder)) and "/logs/" not in path:
            raise AssertionError(f"process {rank()}: {event} {args}")

    sys.addaudithook(watch)


def interrupted(argv: list[str]) -> int:
    """A run whose last process alone gets Ctrl-C in the first step, twice, as from a job manager
    and then from torchrun."""
    plain = edge_grpo.Run.log

    def log(*args):
        edge_grpo.Run.log = plain
        if rank() == world_size() - 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    edge_grpo.Run.log = log
    return edge_grpo.main(argv)


def crashed(argv: list[str]) -> int:
    """A run whose process 1 fails at its second grading, while the others wait for its results."""
    plain, calls = edge_grpo.reward.score_all, []

    def score_all(*args):
        calls.append(1)
        if rank() == 1 and len(calls) == 2:
            raise LookupError("injected into process 1")
        return plain(*args)

    edge_grpo.reward.score_all = score_all
    return edge_grpo.main(argv)


def check_spread() -> None:
    for n in range(8):
        squares = spread(list(range(n)), lambda share: [x * x for x in share])
        assert squares == [x * x for x in range(n)]


def check_gradients() -> None:
    """A sharded step against autograd on the whole model: tied and untied, fp32 and bf16,
    recomputed or not, rows that do not divide by the processes, and a last process without any
    row."""
    for dtype, tied, checkpointing in (
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
    ):
        case = (dtype, tied, checkpointing)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        policy = small_policy(dtype, vocab=61, tied=tied)
        alone = ForwardPass(copy.deepcopy(policy.model))
        prompts, responses = random_rows(1, vocab=61)
        logp = alone(one_batch(prompts, responses), 0.7, 61)[0]
        logp.mean().backward()

        trainer = Trainer(policy, 1000, temperature=0.7, checkpointing=checkpointing)
        rows = backward(trainer, prompts, responses, 1 / len(responses[0]))
        [(sharded, _)] = processes.gather(rows)[0]  # the first process has the only row
        assert torch.equal(sharded, logp)  # the trainer computes what the sampler's model does
        for name, expected in alone.model.named_parameters():
            p = trainer.params[name]
            assert isinstance(p, DTensor) and p.grad.dtype == p.dtype == torch.float32
            expected = expected.grad.float()
            error = (p.grad.full_tensor() - expected).norm() / expected.norm()
            assert error < tolerance, (case, name, error)
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in alone.parameters()]).item()
        assert abs(trainer.step(1e-2, 1.0) / norm - 1) < tolerance
        for name, weight in policy.model.named_parameters():  # the replica is the masters, rounded
            master = whole(trainer.masters[name], trainer.params[name])
            assert weight.dtype == dtype and torch.equal(weight, master.to(dtype))
            assert not torch.equal(weight, alone.model.get_parameter(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
    leave(0)
