"""What a CPU can show of the path that a GPU takes: fused functions, capacity, the prepared
session. Fixed slots and offload have their cases in test_rollout.py and test_trainer.py."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LLAMA_FAMILY, one_batch, random_model, shared_rows, small_policy

import rollout
from engine.forward import ForwardPass
from rollout import Sampler


@pytest.mark.parametrize("name", LLAMA_FAMILY)
def test_fused_norms_score_and_learn_as_the_models_own(name, monkeypatch):
    """Also in a copy of the model, which has weights of its own: the KL penalty's, or the sharded
    one."""
    model = random_model(name, noise=0.1)
    batch = one_batch(*shared_rows())
    results = []
    for device, fused in (("cpu", 0), ("cuda", 9 if name == "qwen3" else 5)):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", torch.device(device))
            forward_pass = ForwardPass(copy.deepcopy(model))
        modules = copy.deepcopy(forward_pass).modules()
        norms = [module for module in modules if "forward" in vars(module)]
        assert len(norms) == fused
        assert all(norm.forward.args[0] is norm for norm in norms)
        logp, entropy = forward_pass(batch, 0.7, 60, True)
        (logp.sum() + entropy.sum()).backward()
        gradients = [p.grad for p in forward_pass.parameters()]
        results.append([logp, entropy, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "room, slots, capacity",
    [
        (None, 2, 128),
        (10_000, 2, 2048),
        (1000, 2, 384),
        (300, 2, 128),
        (200, 1, 128),
    ],
)
def test_a_fixed_cache_has_room_for_longer_rows_where_that_costs_none(
    monkeypatch, room, slots, capacity
):
    """None: a CPU, which would read the whole cache at every token."""
    if room:
        monkeypatch.setattr(rollout, "tokens_that_fit", lambda model, wanted: room)
    sampler = Sampler(small_policy().model, {0})
    sampler.fixed = True
    sampler.sample([[1, 2, 3]], 2, 20, 1.0, seed=0)
    assert sampler.last_slots == slots
    assert sampler.slots.capacity == capacity


def test_an_adapter_is_not_passed_by():
    """A projection of another class is called as it is, also where plain ones are joined."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = small_policy(torch.float32, tied=False).model
    call = [[1, 2, 3]], 4, 20, 1.0, 0
    [plain] = Sampler(model, set()).sample(*call)
    for layer in model.model.layers:
        layer.self_attn.k_proj.__class__ = Adapter
    [adapted] = Sampler(model, set()).sample(*call)
    fixed = Sampler(model, set())
    fixed.fixed = True
    [again] = fixed.sample(*call)
    assert [s.ids for s in again] == [s.ids for s in adapted]
    assert fixed.slots.joined is None
    assert plain != adapted


def test_what_is_fused_on_a_gpu_can_be_compiled_and_computes_the_same():
    """Whole, for any number of rows, writing into the cache in place: traced here, but not made
    into kernels."""

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    plain = rollout.rotate_and_store, rollout.add_and_norm
    fused = compiled(plain[0]), compiled(plain[1])
    with torch.inference_mode():
        for rows, new in ((8, 1), (4, 1), (1, 1), (8, 5), (4, 3)):  # new: tokens of a row
            qkv_cos_sin = [torch.randn(rows, new, heads, 16) for heads in (4, 2, 2, 1, 1)]
            at = torch.arange(rows)[:, None]
            position = torch.randint(0, 4, (rows, 1)) + torch.arange(new)
            x, y = torch.randn(2, rows, new, 16)
            results = []
            for store, add in (plain, fused):
                keys, values = torch.zeros(2, 8, 9, 2, 16).transpose(2, 3)
                q = store(*qkv_cos_sin, keys, values, at, position)
                total, norm = add(x, y, torch.ones(16), 1e-6)
                results.append([q, keys, values, total, norm])
            for a, b in zip(*results):
                assert torch.equal(a, b)
                assert a.any()


def test_cudnn_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.slow
def test_the_prepared_session_of_a_gpu_runs_on_a_cpu_with_tiny_shapes(tmp_path):
    script = Path(__file__).with_name("gpu_session.py")
    command = [sys.executable, str(script), "--out", str(tmp_path), "--rehearse", "--skip", "tests"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    parts = json.loads((tmp_path / "summary.json").read_text())
    assert len(parts) == 7
    assert all(part["exit"] == 0 for part in parts)
    for arm in ("grpo", "edge", "references-x5"):
        folder = tmp_path / "runs" / f"{arm}-seed1"
        assert (folder / "metrics.jsonl").exists()
        assert (folder / "eval" / "summary.json").exists()
