"""Short runs from the command line to the final model: every method on the tiny model, and on the paper's data and
tokenizer."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import data
import edge_grpo
import engine
from data import download

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QWEN, UPSTREAM = SHARED / "tokenizers" / "Qwen2.5-Math-1.5B", SHARED / "upstream"
SMALL = (
    "--steps 3 --questions-per-step 2 --group-size 4 --max-new-tokens 16 --correction-tokens 8 "
    "--micro-batch-tokens 512 --eval-tasks tiny:1:validation --eval-limit 4 --eval-max-new-tokens 8"
).split()
KEYS = set(
    "step loss grad_norm lr reward accuracy accuracy_corrected format mixed_groups mixed_groups_corrected "
    "advantage_variance advantage_variance_eda entropy entropy_sampled response_tokens truncated reflected "
    "answered referenced reflect_fixed logprob_gap tokens_per_second seconds_sample seconds_grade "
    "seconds_correct seconds_update peak_memory_gib skipped_updates".split()
)
UNDEFINED_FOR_SFT = set(
    "accuracy format mixed_groups entropy_sampled response_tokens truncated logprob_gap".split()
)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "nine.jsonl"
    rows = [
        dict(problem=p.question, answer=p.answers[0], solution=p.solution)
        for p in data.load("tiny:1-2")[:9]
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_run(out, steps, rows_per_step):
    """What every run must leave; returns its metrics and samples."""
    metrics, samples = lines(out / "metrics.jsonl"), lines(out / "samples.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, steps + 1)) and all(
        KEYS <= set(m) for m in metrics
    )
    assert all(v is None or math.isfinite(v) for m in metrics for v in m.values())
    assert all(m["skipped_updates"] == 0 and m["peak_memory_gib"] > 0 for m in metrics)
    assert len(samples) == steps * rows_per_step
    config = json.loads((out / "config.json").read_text())
    assert {"flags", "versions", "commit", "device"} <= set(config)
    lr = config["flags"]["lr"]
    assert [m["lr"] for m in metrics] == pytest.approx([lr * (1 - k / steps) for k in range(steps)])
    model = AutoModelForCausalLM.from_pretrained(out / "final")
    assert AutoTokenizer.from_pretrained(out / "final").chat_template
    saved = AutoModelForCausalLM.from_pretrained(out / "checkpoints" / f"step-{steps}").state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in model.state_dict().items())
    return metrics, samples, model.state_dict()


METHODS = {  # correction, EDA, SFT
    "edge-grpo": ("guided", True, False),
    "force-r-eda": ("reflect", True, False),
    "force-r": ("reflect", False, False),
    "grpo": ("none", False, False),
    "sft": ("none", False, True),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_its_flag_to_its_model(tmp_path, problems, capsys, method):
    out = tmp_path / "run"
    assert edge_grpo.main([*SMALL, "--method", method, "--data", problems, "--out", str(out)]) == 0
    metrics, samples, after = check_run(out, 3, 2 if method == "sft" else 8)
    flags = json.loads((out / "config.json").read_text())["flags"]
    assert (flags["correction"], flags["eda"], flags["sft"]) == METHODS[method]
    total = {k: sum(m[k] for m in metrics) for k in ("reflected", "answered", "referenced")}
    assert all(0 < m["entropy"] < math.log(308) for m in metrics)
    if method == "sft":
        assert (
            all(m[k] is None for m in metrics for k in UNDEFINED_FOR_SFT)
            and total["referenced"] == 6
        )
        assert all(m["loss"] > 0 for m in metrics)
    else:
        wrong = sum(round(8 * (1 - m["accuracy"])) for m in metrics)
        assert sum(total.values()) == (0 if method == "grpo" else wrong) and wrong > 0
        assert (total["answered"] > 0) == (total["referenced"] > 0) == (method == "edge-grpo")
        assert all(m["logprob_gap"] < 1e-4 for m in metrics)
        assert all(
            (m["advantage_variance"] == m["advantage_variance_eda"])
            for m in metrics
            if not flags["eda"]
        )
    before = engine.load_policy("tiny", "cpu").model.state_dict()
    moved = any(not torch.equal(v, before[k]) for k, v in after.items())
    assert moved == any(m["grad_norm"] > 0 for m in metrics) and (
        moved or method in ("grpo", "force-r", "force-r-eda")
    )
    evals = lines(out / "evals.jsonl")
    assert [e["step"] for e in evals] == [0, 3] and all(e["problems"] == 4 for e in evals)
    printed = capsys.readouterr()
    assert "held-out tiny:1:validation: accuracy" in printed.out and not printed.err


def test_the_ablations_that_no_table_of_the_paper_has(tmp_path, problems):
    """GEC alone, EDA alone, the other losses, KL, several updates, masked injections, EDA's gradient."""
    for k, flags in enumerate(
        [
            "--no-eda --injected-weight 0",
            "--correction none --eda-clamp 0.5 2",
            "--loss token --kl 0.1 --eda-grad",
            "--loss constant --updates-per-rollout 2 "
            "--format-weight 1 --top-p 0.9 --gradient-checkpointing",
        ]
    ):
        out = tmp_path / str(k)
        argv = [
            *SMALL,
            "--data",
            problems,
            "--steps",
            "2",
            "--out",
            str(out),
            "--eval-tasks",
            *flags.split(),
        ]
        assert edge_grpo.main(argv) == 0, flags
        check_run(out, 2, 8)


def test_without_reflections_all_becomes_right_and_the_run_says_what_that_means(
    tmp_path, problems, capsys
):
    out, argv = tmp_path / "run", [*SMALL, "--data", problems, "--guided-probs", "0", ".5", ".5"]
    assert edge_grpo.main([*argv, "--out", str(out)]) == 0
    assert "note: without reflections" in capsys.readouterr().out
    metrics, samples, _ = check_run(out, 3, 8)
    assert all(
        m["accuracy_corrected"] == 1 and m["mixed_groups_corrected"] == m["grad_norm"] == 0
        for m in metrics
    )
    assert {row.get("correction") for row in samples} >= {"answer", "reference"}
    assert edge_grpo.main([*SMALL, "--data", problems, "--out", str(tmp_path / "other")]) == 0
    assert "without reflections" not in capsys.readouterr().out


def test_evaluations_during_training_and_samples_that_can_be_read(tmp_path, problems):
    out = tmp_path / "run"
    assert edge_grpo.main([*SMALL, "--data", problems, "--out", str(out), "--eval-every", "2"]) == 0
    assert [e["step"] for e in lines(out / "evals.jsonl")] == [0, 2, 3]
    argv = [
        *SMALL,
        "--data",
        problems,
        "--out",
        str(tmp_path / "four"),
        "--eval-every",
        "2",
        "--steps",
        "4",
    ]
    assert edge_grpo.main(argv) == 0
    assert [e["step"] for e in lines(tmp_path / "four" / "evals.jsonl")] == [
        0,
        2,
        4,
    ]  # the last step once
    samples = lines(out / "samples.jsonl")
    corrected = [s for s in samples if "correction" in s]
    assert corrected and {s["correction"] for s in corrected} <= {"reflect", "answer", "reference"}
    for s in corrected:
        if s["correction"] != "reference":
            assert (
                s["corrected"].startswith(s["response"])
                and "Wait! Something is wrong here." in s["corrected"]
            )
    assert all(s["source"].startswith(problems) for s in samples)


def test_evaluations_during_training_are_sampled_as_the_eval_flags_say(
    tmp_path, problems, monkeypatch
):
    seen, evaluate = [], edge_grpo.evaluation.evaluate
    monkeypatch.setattr(
        edge_grpo.evaluation,
        "evaluate",
        lambda *args, **how: seen.append((len(args[1]), how)) or evaluate(*args, **how),
    )
    assert (
        edge_grpo.main(
            [
                *SMALL,
                "--data",
                problems,
                "--out",
                str(tmp_path / "run"),
                "--steps",
                "1",
                "--seed",
                "7",
                "--temperature",
                "0.9",
                "--eval-temperature",
                "0.4",
                "--eval-n",
                "2",
            ]
        )
        == 0
    )
    assert seen == [(4, dict(n=2, temperature=0.4, max_new_tokens=8, seed=7))] * 2


def test_the_command_line_from_another_folder(tmp_path, problems):
    """The one test that starts the program as a user does."""
    command = [
        sys.executable,
        str(ROOT / "edge_grpo.py"),
        *SMALL,
        "--data",
        problems,
        "--steps",
        "2",
        "--eval-tasks",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [out] = (tmp_path / "runs").iterdir()  # its name holds the flags that are no defaults
    assert out.name.startswith("tiny-edge-grpo-") and out.name.endswith("-seed42")
    check_run(out, 2, 8)
    assert "prompt of the first problem: '<|im_start|>" in done.stdout and not done.stderr


# --- the paper's data and tokenizer ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A random Qwen2 of two narrow layers with the paper's vocabulary (151936 rows, 151665 tokens) and tokenizer."""
    if not QWEN.is_dir() or not UPSTREAM.is_dir():
        pytest.skip(
            "needs the real tokenizer and data in ../shared/tokenizers and ../shared/upstream"
        )
    folder = tmp_path_factory.mktemp("qwen")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(QWEN / name, folder)
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
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


QWEN_RUN = (
    "--steps 2 --questions-per-step 2 --group-size 3 --max-new-tokens 8 --correction-tokens 4 "
    "--max-corrected-tokens 120 --micro-batch-tokens 1024 --lr 1e-3 --save-every 0"
).split()


@pytest.mark.parametrize("method", ["edge-grpo", "sft"])
def test_the_papers_data_with_its_tokenizer_and_vocabulary(
    tmp_path, monkeypatch, capsys, qwen, method
):
    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")
    out = tmp_path / "run"
    argv = [
        *QWEN_RUN,
        "--model",
        str(qwen),
        "--data",
        "deepscaler-hard-1k",
        "--mirror",
        str(UPSTREAM),
        "--method",
        method,
        "--out",
        str(out),
    ]
    assert edge_grpo.main(argv) == 0, capsys.readouterr().err
    metrics, samples, _ = check_run(out, 2, 2 if method == "sft" else 6)
    config = json.loads((out / "config.json").read_text())
    assert config["problems"] == 1000 and config["problems_left_out"] == []
    said = capsys.readouterr().out.splitlines()
    prompt = next(line for line in said if line.startswith("prompt of the first problem"))
    assert (
        r"<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>"
        r"\n<|im_start|>user\n"
    ) in prompt
    assert prompt.endswith(r"<|im_end|>\n<|im_start|>assistant\n'")
    if method == "edge-grpo":
        assert all(m["logprob_gap"] < 1e-4 and m["response_tokens"] <= 8 for m in metrics)
        assert sum(m["reflected"] + m["answered"] + m["referenced"] for m in metrics) == 12
        assert all(
            m["entropy_sampled"] <= math.log(151665) for m in metrics
        )  # the embedding's padding has no share
    assert all(s["source"].startswith("deepscaler-hard-1k:") for s in samples)


def test_the_sampler_takes_as_many_rows_as_preflight_allows(tmp_path, monkeypatch):
    """Rows wait in its queue then, and draw what they would have drawn all together."""
    policies, lines, load = [], [], engine.load_policy
    monkeypatch.setattr(
        engine, "load_policy", lambda *args: policies.append(load(*args)) or policies[-1]
    )
    for rows in (None, 3):
        monkeypatch.setattr(edge_grpo, "preflight", lambda *_: rows)
        assert edge_grpo.main([*SMALL, "--device", "cpu", "--out", str(tmp_path / str(rows))]) == 0
        lines.append(
            [
                json.loads(line)
                for line in (tmp_path / str(rows) / "metrics.jsonl").read_text().splitlines()
            ]
        )
    assert [policy.sampler.max_rows for policy in policies] == [None, 3]
    assert [m["response_tokens"] for m in lines[0]] == [m["response_tokens"] for m in lines[1]]
