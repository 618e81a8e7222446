"""torchrun with 1, 2 and 3 processes: the same rollouts, metrics, weights and checkpoints as one, and clean ends.

This file is also the program that torchrun starts: one launch does several runs (`work`, at the end), because importing
torch takes longer than a run of the tiny model.
"""

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
from helpers import Weights, random_rows, small_policy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import edge_grpo
import eval as evaluation
from engine.checkpoints import newest_checkpoint
from engine.forward import Scorer, micro_batches
from engine.modelfiles import TINY_MODEL
from engine.processes import leave, rank, spread, start_processes, world_size
from engine.run import LOGS
from engine.sharding import whole
from engine.trainer import Trainer
from errors import UserError

ROOT = Path(__file__).parents[1]
COMMON = (
    "--device cpu --steps 2 --questions-per-step 2 --max-new-tokens 48 --correction-tokens 24 "
    "--micro-batch-tokens 700 --save-every 0 --eval-tasks"
).split()
RUNS = {  # G = 8 unless it says otherwise
    "base": "--steps 3 --save-every 2 --keep 9",
    "one row": "--method sft --questions-per-step 1",  # fewer rows than processes
    "two rows": "--questions-per-step 1 --group-size 2 --steps 4",  # and sometimes one or none of them to go on with
    "nothing to correct": "--method grpo --data tiny:1-3 --group-size 7 --format-weight 1 --loss token",
    "eda-grad": "--eda-grad",
    "kl": "--kl 3 --lr 5e-4",
    "two updates": "--updates-per-rollout 2 --loss constant",
    "offload": "--offload-optimizer --gradient-checkpointing",
}
THREE = ("base", "one row", "two rows", "nothing to correct")
EVAL = (
    "--device cpu --model tiny --tasks tiny:1-3:validation --limit 7 --n 3 --temperature 1 --max-new-tokens 48 "
    "--entropy"
).split()


def run_of(name: str, out: Path, *more: str) -> list[str]:
    return [*COMMON, *RUNS[name].split(), "--out", str(out), *more]


class Launch:
    """torchrun on this machine at a free port; what each process printed is kept apart."""

    def __init__(self, processes: int, logs: Path, *program):
        self.logs = logs
        logs.mkdir(parents=True)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            "--redirects",
            "3",
            "--log-dir",
            str(logs / "ranks"),
            *map(str, program),
        ]
        with open(logs / "torchrun", "w") as f:
            self.process = subprocess.Popen(
                [sys.executable, *command], stdout=f, stderr=f, env=env, cwd=ROOT
            )

    def wait(self, seconds: float = 240) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"torchrun hangs:\n{self}")

    def text(self, rank: int, stream: str) -> str:
        return "".join(
            f.read_text() for f in self.logs.glob(f"ranks/*/attempt_0/{rank}/{stream}.log")
        )

    def __str__(self) -> str:
        files = [f for f in sorted(self.logs.rglob("*")) if f.is_file()]
        return "\n".join(f"--- {f.relative_to(self.logs)}\n{f.read_text()}" for f in files)

    def ended_by_itself(self) -> bool:
        """No process had to be killed after torchrun's 30 seconds of patience, and nothing timed out."""
        text = str(self)
        timed_out = "Timed out" in text or "timeout" in text.lower().replace("_timeout", "")
        return "forcefully" not in text and not timed_out


def launch_work(processes: int, folder: Path, jobs: list) -> Launch:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return Launch(processes, folder / "logs", __file__, folder)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    volatile = ("seconds_", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in line.items() if not k.startswith(volatile)} for line in lines]


def samples(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def assert_same(run: Path, expected: Path) -> None:
    """The same numbers, rounding aside (which EDA makes larger where it divides by entropies near 0), the same texts,
    and the same weights within 1e-5, but for one in a hundred."""
    for read in (metrics, samples):
        ours, theirs = read(run), read(expected)
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs):
            assert a.keys() == b.keys()
            for key in a:
                wanted = b[key]
                if isinstance(wanted, float):
                    wanted = pytest.approx(wanted, abs=1e-5, rel=5e-5)
                elif isinstance(wanted, list) and isinstance(
                    (wanted or [""])[0], float
                ):  # written with three places
                    wanted = pytest.approx(wanted, abs=1.1e-3)
                assert a[key] == wanted, (key, a, b)
    ours, theirs = (load_file(r / "final" / "model.safetensors") for r in (run, expected))
    start = load_file(TINY_MODEL / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name in (
        ours
    ):  # AdamW makes a step of full length of a gradient that is rounding alone: a few entries
        off = (ours[name] - theirs[name]).abs()
        assert (off > 1e-5).double().mean() < 0.01 and off.max() < 1e-4, (
            name,
            (off > 1e-5).sum(),
            off.max(),
        )
    assert any(
        (theirs[name] - start[name]).abs().max() > 2e-5 for name in theirs
    )  # there was something to get wrong


def stopped_at_step_2(run: Path, to: Path) -> Path:
    """A copy of a run of 3 steps as it was when step 3 was under way."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step-3")
    shutil.rmtree(to / "final")
    return to


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


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


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_what_one_gives(one, two, name):
    assert_same(two[0] / name, one / name)


@pytest.mark.parametrize("name", THREE)
def test_three_processes_give_what_one_gives(one, three, name):
    assert_same(three[0] / name, one / name)


def test_the_runs_compared_do_what_their_names_say(one):
    """Else the tests above would compare nothing."""
    lines = {name: metrics(one / name) for name in RUNS}
    assert all(max(m["grad_norm"] for m in lines[name]) > 0 for name in RUNS)
    assert any(m["mixed_groups_corrected"] and m["reflected"] > 3 for m in lines["base"])
    assert {m["reflected"] for m in lines["two rows"]} & {0, 1}
    assert not any(m["reflected"] for m in lines["nothing to correct"])
    assert len(samples(one / "one row")) == 2
    assert (
        len({lines[name][1]["grad_norm"] for name in ("base", "eda-grad", "kl", "two updates")})
        == 4
    )


def test_several_processes_do_not_share_one_gpu_by_a_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="under torchrun"):
        start_processes("cuda:1")


def test_torchrun_with_one_process_is_the_plain_path(folder, one, monkeypatch):
    for name, value in dict(
        WORLD_SIZE=1, RANK=0, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1
    ).items():
        monkeypatch.setenv(name, str(value))  # what torchrun sets; nobody listens at that port
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert edge_grpo.main(run_of("one row", folder / "alone")) == 0 and not dist.is_initialized()
    ours, theirs = (
        load_file(run / "final" / "model.safetensors")
        for run in (folder / "alone", one / "one row")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (
        edge_grpo.main(run_of("one row", folder / "alone")) == 2
    )  # a run is there already: told at once


def test_a_checkpoint_of_one_process_resumes_on_two(one, two):
    assert_same(two[0] / "from 1", one / "base")


def test_a_checkpoint_of_two_processes_resumes_on_three(one, three):
    assert_same(three[0] / "from 2", one / "base")


def test_a_checkpoint_of_two_processes_resumes_on_one(folder, one, two):
    out = stopped_at_step_2(two[0] / "base", folder / "from 2")
    assert edge_grpo.main(run_of("base", out, "--resume")) == 0
    assert_same(out, one / "base")


def test_a_signal_to_one_process_saves_once_and_the_run_goes_on_from_there(one, two):
    assert_same(two[0] / "interrupted", one / "base")
    assert sorted(f.name for f in (two[0] / "interrupted" / "checkpoints").iterdir()) == [
        "step-1",
        "step-2",
        "step-3",
    ]


def test_eval_uses_the_processes_and_gives_the_same(one, two):
    ours, theirs = (
        [json.loads(row) for row in (r / "eval" / "responses.jsonl").read_text().splitlines()]
        for r in (two[0], one)
    )
    assert len(ours) == len(theirs) == 21
    for a, b in zip(ours, theirs):
        assert a == {
            k: pytest.approx(v, abs=1e-5) if isinstance(v, float) else v for k, v in b.items()
        }
    assert (two[0] / "eval" / "summary.json").exists()


def test_only_the_first_process_prints(two, three):
    """(That it alone writes, and reads what it writes, is watched inside, by `forbid_writing`.)"""
    for _, launch in (two, three):
        assert "going on from" in launch.text(0, "stdout")
        for other in (1, 2):
            told = (launch.text(other, "stdout") + launch.text(other, "stderr")).splitlines()
            assert [
                line for line in told if "--eda-clamp" not in line and "[Gloo]" not in line
            ] == []  # torch 2.9's


def test_an_error_that_every_process_meets_is_told_once(two):
    assert (two[1].text(0, "stderr") + two[1].text(1, "stderr")).count(
        "error: --eda-clamp 2.0 1.0"
    ) == 1


def test_an_error_of_one_process_ends_the_run_with_that_error_alone(folder):
    here = folder / "crash"
    here.mkdir()
    launch = launch_work(2, here, [["crash", 0, *run_of("base", here / "run")]])
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    assert "LookupError: injected into process 1" in launch.text(1, "stderr"), launch
    assert "Traceback" not in launch.text(0, "stderr"), launch


def test_a_users_mistake_that_only_the_first_process_sees_ends_the_run(folder, one):
    launch = Launch(2, folder / "mistake", ROOT / "edge_grpo.py", *run_of("base", one / "base"))
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    told = launch.text(0, "stderr") + launch.text(1, "stderr")
    assert (
        told.count("error: ") == 1 and "holds a run already" in told and "Traceback" not in told
    ), launch


@pytest.mark.parametrize("launched", range(2))
def test_a_whole_run_with_held_out_problems_ends_with_exit_code_0(folder, launched):
    """Every time: in half of the launches, processes met what the first was still writing of its evaluations."""
    out = folder / f"evaluated {launched}"
    launch = Launch(
        2,
        folder / f"launch {launched}",
        ROOT / "edge_grpo.py",
        *run_of(
            "base",
            out,
            "--steps",
            "1",
            "--eval-tasks",
            "tiny:1-3:validation",
            "tiny:5:validation",
            "--eval-limit",
            "4",
            "--eval-max-new-tokens",
            "4",
        ),
    )
    assert launch.wait() == 0, launch
    evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evals] == [0, 0, 1, 1] and (
        out / "final" / "model.safetensors"
    ).exists()
    told = launch.text(0, "stdout")
    assert (
        told.count("held-out tiny:5:validation: accuracy") == 2
        and "held-out accuracy, tiny:5:validation" in told
    )
    assert "Traceback" not in str(launch) and not launch.text(1, "stdout"), launch


def test_sigterm_to_torchrun_saves_once_and_ends(folder):
    out = folder / "terminated"
    launch = Launch(
        2,
        folder / "sigterm",
        ROOT / "edge_grpo.py",
        *run_of("base", out, "--steps", "1000", "--save-every", "0"),
    )
    deadline = time.monotonic() + 120
    while not (
        (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n")
    ):
        assert launch.process.poll() is None and time.monotonic() < deadline, launch
        time.sleep(0.1)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.wait() != 0 and launch.ended_by_itself(), launch
    [saved] = (out / "checkpoints").iterdir()
    path, manifest = newest_checkpoint(out / "checkpoints")
    assert path == saved and manifest["step"] == len(metrics(out))
    assert launch.text(0, "stderr").count(
        "finishing the step"
    ) == 1 and "Traceback" not in launch.text(0, "stderr")
    assert launch.text(1, "stderr") == ""


# --- What torchrun starts --------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """Do the jobs of folder/jobs.json in one group of processes."""
    start_processes("cpu")
    destroy, dist.destroy_process_group = (
        dist.destroy_process_group,
        lambda: None,
    )  # the group is for all jobs
    if rank() > 0:
        forbid_writing(folder)
    for kind, *job in json.loads((folder / "jobs.json").read_text()):
        if kind == "check":
            {"spread": check_spread, "gradients": check_gradients}[job[0]]()
            continue
        program = {
            "train": edge_grpo.main,
            "eval": evaluation.main,
            "interrupt": interrupted,
            "crash": crashed,
        }[kind]
        expected, argv = job[0], job[1:]
        try:
            code = program(argv)
        except SystemExit:
            if kind == "crash":
                raise
            code = 2  # the second to meet the same mistake
        assert code == expected, (argv, code)
    destroy()


def forbid_writing(folder: Path) -> None:
    """From now on, any attempt of this process to change something below `folder` raises, or to read what another may
    still be writing there: a run's logs."""

    def watch(event: str, args: tuple) -> None:
        wrong = event in (
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "os.truncate",
            "shutil.rmtree",
        )
        if event == "open":
            wrong = bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or str(
                args[0]
            ).endswith(LOGS)
        if wrong and str(args[0]).startswith(str(folder)) and "/logs/" not in str(args[0]):
            raise AssertionError(f"process {rank()} writes, or reads a log: {event} {args}")

    sys.addaudithook(watch)


def interrupted(argv: list[str]) -> int:
    """A run whose last process alone gets Ctrl-C in the first step, twice, as from a job manager and then torchrun."""
    plain = edge_grpo.measure

    def measure(*args):
        edge_grpo.measure = plain
        if rank() == world_size() - 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    edge_grpo.measure = measure
    return edge_grpo.main(argv)


def crashed(argv: list[str]) -> int:
    """A run whose process 1 fails at its second grading, while the others wait for its scores."""
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
        assert spread(list(range(n)), lambda mine: [x * x for x in mine]) == [
            x * x for x in range(n)
        ]


def check_gradients() -> None:
    """A sharded step against autograd on the whole model: tied and untied, fp32 and bf16, recomputed or not, rows that
    do not divide by the processes, and a last process without any row."""
    for dtype, tied, checkpointing in (
        (torch.float32, True, False),
        (torch.float32, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
    ):
        policy = small_policy(dtype, vocab=61, tied=tied)
        alone, (prompts, responses) = Scorer(copy.deepcopy(policy.model)), random_rows(1, vocab=61)
        [batch] = micro_batches(prompts, responses, 1000, "cpu")
        logp = alone(batch, 0.7, 61)[0]
        logp.mean().backward()

        trainer = Trainer(policy, 1000, temperature=0.7, checkpointing=checkpointing)
        means = [Weights(torch.full((len(r),), 1 / len(r))) for r in responses]
        loss, [sharded], _ = trainer.forward_backward(
            prompts, responses, means, lambda p, _, t: (t.weights * p).sum()
        )
        assert torch.equal(sharded, logp)  # the trainer computes what the sampler's model does
        assert abs(loss - logp.mean().item()) < 1e-4  # of the whole step, on every process
        for name, expected in alone.model.named_parameters():
            p = trainer.params[name]
            assert isinstance(p, DTensor) and p.grad.dtype == p.dtype == torch.float32
            error = (
                p.grad.full_tensor() - expected.grad.float()
            ).norm() / expected.grad.float().norm()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), (
                dtype,
                tied,
                checkpointing,
                name,
                error,
            )
        norm = torch.nn.utils.get_total_norm([p.grad.float() for p in alone.parameters()]).item()
        assert abs(trainer.step(1e-2, 1.0) / norm - 1) < (1e-5 if dtype == torch.float32 else 1e-2)
        for name, weight in policy.model.named_parameters():  # the replica is the masters, rounded
            master = whole(trainer.masters[name], trainer.params[name])
            assert weight.dtype == dtype and torch.equal(weight, master.to(dtype))
            assert not torch.equal(weight, alone.model.get_parameter(name))


if __name__ == "__main__":
    torch.set_num_threads(1)
    work(Path(sys.argv[1]))
    leave(0)
