"""engine/flags.py. What each flag of edge_grpo.py means stands in test_edge_grpo.py, what none may
be in test_bad_input.py."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import edge_grpo
from engine.flags import MAY_CHANGE, flag, make_parser


@dataclass
class Flags:
    steps: int = flag(1000, "training steps", low=1, section="The run")
    lr: float = flag(1e-6, "learning rate, 100% of it")
    top_p: float = flag(1.0, "nucleus", low=0, high=1, section="Sampling")
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas", names=("B1", "B2"))


def test_only_what_changes_no_number_may_change_on_resume():
    assert MAY_CHANGE == set(
        "resume overwrite device out save_every keep log mirror max_rows drafts "
        "micro_batch_tokens gradient_checkpointing offload_optimizer save_tokens "
        "trust_remote_code".split()
    )


def test_help_has_sections_and_shows_the_default_in_force_beside_the_papers():
    parser = make_parser(Flags, dict(steps=60, betas=[0.9, 0.99]), "", "")
    text = " ".join(parser.format_help().split())
    assert "training steps [60 (paper: 1000)]" in text
    assert "100% of it [1e-06]" in text
    assert "--betas B1 B2 AdamW's betas [0.9 0.99 (paper: 0.9 0.999)]" in text
    assert text.index("The run:") < text.index("--lr") < text.index("Sampling:")
    assert text.index("Sampling:") < text.index("--top-p")
    assert parser.parse_args(["--lr", "1"]).steps == 60


def test_help_of_the_default_command_shows_both_profiles():
    parser = make_parser(edge_grpo.Flags, edge_grpo.TINY, "", "")
    text = " ".join(parser.format_help().split()).replace("- ", "-")
    assert "(paper: deepscaler-hard-1k)]" in text and "[60 (paper: 1000)]" in text


OUTS = {
    "": "tiny-edge-grpo-seed42",
    "--seed 7": "tiny-edge-grpo-seed7",
    "--no-eda": "tiny-edge-grpo-eda-False-seed42",
    "--kl 0.1": "tiny-edge-grpo-kl-0.1-seed42",
    "--kl 0.2": "tiny-edge-grpo-kl-0.2-seed42",
    "--method grpo": "tiny-grpo-seed42",
    "--method grpo --eda": "tiny-grpo-eda-True-seed42",
    "--eda-clamp 0.5 2": "tiny-edge-grpo-eda_clamp-0.5-2.0-seed42",
    "--eval-tasks": "tiny-edge-grpo-eval_tasks-seed42",
    "--model Qwen/Qwen2.5-Math-7B": "Qwen2.5-Math-7B-edge-grpo-seed42",
    "--model .": f"{Path().resolve().name}-edge-grpo-seed42",
    "--model tests/..": f"{Path().resolve().name}-edge-grpo-seed42",
    "--model /": "model-edge-grpo-seed42",
    "--resume": "tiny-edge-grpo-seed42",  # no other experiment
    "--keep 3 --device cpu --micro-batch-tokens 99": "tiny-edge-grpo-seed42",
}


@pytest.mark.parametrize("flags", OUTS)
def test_every_experiment_has_a_folder_of_its_own(flags):
    assert edge_grpo.parse_flags(flags.split()).out == f"runs/{OUTS[flags]}"
    assert edge_grpo.parse_flags([*flags.split(), "--out", "here"]).out == "here"


@pytest.mark.parametrize("argv, code", [(["--stepz", "3"], 2), (["--help"], 0)])
def test_flags_are_read_before_torch_is_imported(argv, code):
    command = [sys.executable, "-X", "importtime", "edge_grpo.py", *argv]
    folder = Path(edge_grpo.__file__).parent
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == code and "torch" not in run.stderr
    assert "did you mean --steps?" in run.stderr or "training steps" in run.stdout
