"""The first minutes on a GPU, prepared: tests, benchmarks, then an experiment, most valuable first.

    python tests/gpu_session.py --out OUT                     # about twelve minutes on one H200
    python tests/gpu_session.py --out OUT --skip tests bench  # only the experiment
    python tests/gpu_session.py --out OUT --rehearse          # tiny shapes on a CPU, two minutes

Every part writes OUT/PART.txt while it runs and its results below OUT as soon as they exist, so a
session that is cut off loses only the part it was in. A part that exceeds its time is ended, and
the next one begins. OUT/summary.json says what each part did and how long it took.

The experiment asks whether EDA's factor shrinks with the size of the model (P/mean of references:
.02 to .14 with 0.1M parameters, .9 with 135M). A tiny-world model of --hidden x --layers is
pretrained on the spot. Then GRPO, EDGE-GRPO and "no EDA, references x 5" run side by side, seed by
seed, so that a cut leaves whole seeds.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARMS = {
    "grpo": "--method grpo --lr {grpo_lr}",
    "edge": "--method edge-grpo --lr {edge_lr}",
    "references-x5": "--method edge-grpo --no-eda --correction-factors 1 1 5 --lr {edge_lr}",
}


def python(line: str) -> list[str]:
    return [sys.executable, *line.split()]


def benchmarks(rehearse: bool) -> list[tuple[str, float, str]]:
    """(part, most seconds, command)"""
    if rehearse:
        step = "tests/bench_step.py --shape small --rows 4 --tokens 16 --steps 1 --pairs 1"
        return [
            ("tests", 60, "-m pytest -q --cuda tests/test_cuda.py"),
            ("bench-step", 60, step),
            ("bench-step-offload", 60, f"{step} --offload"),
            ("bench-entropy", 60, "tests/bench_entropy.py --hidden 64 --tokens 64 --rounds 1"),
        ]
    step = "tests/bench_step.py --device cuda --shape 7b --rows 8 --steps 2"
    entropy = "tests/bench_entropy.py --device cuda --dtype bfloat16 --hidden 3584 --tokens 8192"
    return [
        ("tests", 120, "-m pytest -q --cuda"),
        ("bench-step", 60, step),
        ("bench-rollout", 90, "tests/bench_rollout.py --device cuda --shape 7b --rows 8,64,256"),
        (
            "bench-rollout-drafts",
            60,
            "tests/bench_rollout.py --device cuda --shape 7b --rows 8,16,32 --drafts 4",
        ),
        ("bench-step-no-recompute", 60, f"{step} --no-checkpointing --micro-batch-tokens 2048"),
        ("bench-entropy", 30, entropy),
        ("bench-step-offload", 150, f"{step} --steps 1 --offload"),
    ]


def run_part(name: str, seconds: float, command: list[str], out: Path) -> dict:
    """Runs one command with its output in OUT/NAME.txt; ends it after so many seconds."""
    started = time.perf_counter()
    with open(out / f"{name}.txt", "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            code = "ended: out of time"
    took = round(time.perf_counter() - started, 1)
    print(f"{name}: {code} after {took} s", flush=True)
    return {"part": name, "exit": code, "seconds": took, "command": " ".join(command[1:])}


def run_seed(seed: int, args: argparse.Namespace, out: Path, until: float) -> list[dict]:
    """Trains and evaluates all arms of one seed side by side. Keeps their logs, not the weights."""
    running = {}
    for arm, flags in ARMS.items():
        folder = out / "runs" / f"{arm}-seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        train = (
            f"edge_grpo.py --model {args.world} --profile tiny --temperature 0.6 "
            f"--steps {args.steps} --questions-per-step {args.questions} --seed {seed} "
            f"--save-every 0 --eval-every 0 "
            f"--eval-limit 64 --no-save-tokens --device {args.device} --max-rows 64 --overwrite "
            f"--out {folder} {flags.format(grpo_lr=args.grpo_lr, edge_lr=args.edge_lr)}"
        )
        evaluate = (
            f"eval.py --model {folder}/final --tasks tiny:5-8:test --limit {args.problems} --n 8 "
            f"--temperature 0.6 --max-new-tokens 160 --device {args.device} --out {folder}/eval"
        )
        lines = [" ".join(python(line)) for line in (train, evaluate)]
        with open(out / f"{arm}-seed{seed}.txt", "w") as file:
            running[arm] = subprocess.Popen(
                ["bash", "-ec", "\n".join(lines)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its children end with it
            )
    rows = []
    for arm, process in running.items():
        try:
            code = process.wait(timeout=max(1.0, until - time.perf_counter()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = "ended: out of time"
        folder = out / "runs" / f"{arm}-seed{seed}"
        for weights in ("final", "checkpoints"):
            shutil.rmtree(folder / weights, ignore_errors=True)
        rows.append({"part": f"{arm}-seed{seed}", "exit": code})
        print(f"{arm}, seed {seed}: {code}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--skip", nargs="*", default=[], help="of: tests, bench, experiment")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--seconds", type=float, default=480, help="for the experiment [480]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--problems", type=int, default=1000, help="evaluated, 8 samples each")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--grpo-lr", type=float, default=3e-5)
    parser.add_argument("--edge-lr", type=float, default=3e-5)
    args = parser.parse_args()
    args.device = "cuda"
    if args.rehearse:
        args.device, args.seeds, args.steps, args.questions, args.problems = "cpu", 1, 2, 1, 4
        args.hidden, args.layers = 64, 1
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    done = []

    def note(rows: list[dict]) -> None:
        done.extend(rows)
        (out / "summary.json").write_text(json.dumps(done, indent=1))

    for name, seconds, line in benchmarks(args.rehearse):
        if name.split("-")[0] not in args.skip:
            note([run_part(name, seconds, python(line), out)])
    if "experiment" in args.skip:
        return
    until = time.perf_counter() + args.seconds
    args.world = out / "world"
    make = f"-m results.make_tiny_model --out {args.world} --device {args.device}"
    make += f" --hidden {args.hidden} --layers {args.layers}"
    if args.rehearse:
        make += " --share 0.002"
    note([run_part("world", args.seconds / 3, python(make), out)])
    for seed in range(1, args.seeds + 1):
        if time.perf_counter() < until:
            note(run_seed(seed, args, out, until))
    shutil.rmtree(args.world, ignore_errors=True)


if __name__ == "__main__":
    main()
