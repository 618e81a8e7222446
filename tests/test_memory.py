"""engine/memory.py: the plan is what a run really takes, and preflight says what to change."""

import gc
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import backward, one_batch, random_model, random_rows, small_policy
from transformers import Qwen2Config

import edge_grpo
from engine.forward import ForwardPass
from engine.memory import GIB, describe, memory_plan, preflight, rows_that_fit
from engine.trainer import Trainer

ROOT = Path(__file__).parents[1]


def status(name: str) -> int:
    """Bytes of a line of this process's status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", text, re.M)[1])


def measure(checkpointing: bool, dtype: torch.dtype) -> int:
    """Bytes that two steps of a small model add to this process, which is one of its own. The
    second time counts: the first one loads libraries, which keep their buffers."""
    torch.set_num_threads(1)
    rows = random_rows(4, vocab=4096, prompt=(100, 100), response=(28, 28))
    for steps in (1, 2):  # the moments come with the first step
        Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the most from here on
        base = status("VmRSS")
        trainer = Trainer(
            small_policy(dtype, hidden=256, layers=8, vocab=4096, inner=1024),
            512,
            checkpointing=checkpointing,
        )
        for _ in range(steps):
            backward(trainer, *rows)
            trainer.step(1e-3, 1.0)
        added = status("VmHWM") - base
        del trainer
        gc.collect()
    return added


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory as Linux reports it")
@pytest.mark.parametrize(
    "checkpointing, dtype", [(False, "float32"), (True, "float32"), (True, "bfloat16")]
)
def test_memory_plan_is_what_a_small_model_takes_and_not_much_more(checkpointing, dtype):
    """Measured as resident memory, where the C library returns what is freed at once."""
    own = dict(PYTHONPATH=str(ROOT), MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(2**17))
    env = os.environ | own
    command = [sys.executable, __file__, str(checkpointing), dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    measured = float(done.stdout.strip() or pytest.fail(done.stderr))
    small = dict(hidden_size=256, num_hidden_layers=8, vocab_size=4096, intermediate_size=1024)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    config = Qwen2Config(**small, **heads, tie_word_embeddings=True)
    plan = memory_plan(config, 0, 0, 512, 2 if dtype == "bfloat16" else 4, False, checkpointing)
    # All responses are in one block of logits.
    planned = sum(plan.values()) - plan["output layer"] + 3 * 4 * 112 * 4096
    # 1.1 with torch 2.13 and transformers 5.24; .94 without activations
    assert 0.97 < planned / measured < 1.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])  # Qwen3: wider heads, each normalised
def test_the_plans_activations_are_what_autograd_keeps(name, dtype):
    model = random_model(name, num_hidden_layers=8).to(dtype)
    forward_pass = ForwardPass(model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}
    prompts, responses = [[i] * 50 for i in range(8)], [[1] * 50] * 8
    batch = one_batch(prompts, responses)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_pass(batch, 1.0, 60)
    size = 0
    for address, tensor in kept.items():
        if address not in weights:
            size += tensor.untyped_storage().nbytes()
    plan = memory_plan(model.config, 0, 0, 800, dtype.itemsize, False, False)
    assert 0.9 < plan["activations"] / size < 1.3


def test_memory_plans_of_7b_are_those_of_docs_gpus():
    config = Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        intermediate_size=18944,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
    plan = memory_plan(config, 8, 1792, 8192, 2, False, True)
    assert_gib(plan, weights=14.2, gradients=14.2, optimizer=85.1, cache=0.8)
    assert_gib(plan, **{"activations": 5.1, "output layer": 1.8})
    offloaded = memory_plan(config, 8, 1792, 8192, 2, True, True)
    assert_gib(offloaded, **{"weights": 14.2, "gradients": 14.2, "host optimizer": 101})
    assert "optimizer" not in offloaded
    sharded = memory_plan(config, 1, 1792, 8192, 2, False, True, processes=8)
    assert_gib(sharded, **{"optimizer": 10.6, "gradients": 3.5, "gathered weights": 8.1})


def assert_gib(plan: dict, **expected: float) -> None:
    """Within a tenth: the promise is a fifth."""
    for item, size in expected.items():
        assert plan[item] / GIB == pytest.approx(size, rel=0.1), item


def test_preflight_says_which_flag_to_change(monkeypatch):
    line = describe({"weights": 2.0**30, "optimizer": 2.0**60}, torch.device("cpu"))
    assert "--offload-optimizer" in line
    assert "fit" not in describe({"weights": 2.0**20}, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    assert "fit" not in describe(
        {"weights": 2.0**30, "host optimizer": 2.0**20}, torch.device("cuda")
    )
    line = describe({"weights": 2.0**30, "host optimizer": 2.0**60}, torch.device("cuda"))
    assert "CPU memory. It will probably not fit" in line


def test_rows_leave_room_for_what_comes_after_the_cache(monkeypatch, capsys):
    """A GPU's free memory is not all the cache's: gradients and moments do not exist yet when it
    is made."""
    plan = dict(weights=10.0, gradients=10.0, optimizer=40.0, cache=64.0)
    plan["host optimizer"] = 1e6
    assert [rows_that_fit(plan, 32, free) for free in (1000.0, 100.0, 70.0, 5.0)] == [32, 15, 1, 1]
    assert rows_that_fit({**plan, "cache": 0.0}, 32, 5.0) == 32  # a model without attention
    flags = edge_grpo.parse_flags(["--model", "tiny", "--group-size", "512"])
    for free, all_fit in ((2**40, True), (2**28, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        rows = preflight(flags, torch.device("cuda"), 8 * 512, 768)
        line = capsys.readouterr().out
        assert (
            rows is None if all_fit else f"sampling {rows} of 4096 rows" in line and 1 < rows < 4096
        )
        assert "not fit" not in line


def test_the_plan_is_that_of_the_dtype(tmp_path, monkeypatch, capsys):
    Qwen2Config(vocab_size=2**19, hidden_size=2**11, num_hidden_layers=1).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    weights = []
    for dtype in ("auto", "float32", "bfloat16"):
        flags = edge_grpo.parse_flags(["--model", str(tmp_path), "--dtype", dtype])
        preflight(flags, torch.device("cuda"), 8, 768)
        weights.append(float(re.search(r"weights ([\d.]+)", capsys.readouterr().out)[1]))
    assert weights[0] == weights[2]
    assert weights[1] == pytest.approx(2 * weights[0], abs=0.1)
    assert weights[0] > 2


if __name__ == "__main__":
    print(measure(sys.argv[1] == "True", getattr(torch, sys.argv[2])))
