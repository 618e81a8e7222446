"""What a CPU can show of the path that a GPU takes: offload, fused norms, out of memory in CUDA's
words, capacity."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MODELS, backward, one_batch, random_rows, shared_rows, small_policy

import rollout
from engine.forward import ForwardPass, response_logprobs
from engine.trainer import Trainer
from rollout import Sampler


def test_offload_fetches_gradients_that_the_last_micro_batch_did_not_touch():
    """As those of an expert that no token of it chose. Bit for bit, over several steps."""
    weights, missed = [], 0
    for offload in (False, True):
        policy = small_policy(torch.bfloat16, tied=False)
        trainer, layer = (
            Trainer(policy, 60, offload=offload),
            policy.model.model.layers[0].self_attn.q_proj,
        )
        layer.forward = lambda x, layer=layer: (
            F.linear(  # short micro-batches do not use this weight
                x, layer.weight if x.shape[1] > 40 else layer.weight.detach(), layer.bias
            )
        )
        for seed in range(3):
            prompts, responses = random_rows(6, seed)
            backward(
                trainer, [*prompts, [1] * 30, [1, 2]], [*responses, [5] * 30, [3]], factor=-1 / 100
            )
            missed += len(trainer.params.keys() - trainer.offload.copied) if offload else 0
            trainer.step(1e-2, 1.0)
        weights.append([p.detach().clone() for p in policy.model.parameters()])
    assert missed == 3 and all(torch.equal(a, b) for a, b in zip(*weights))


@pytest.mark.parametrize("name", [name for name, (_, _, packed) in MODELS.items() if packed])
def test_fused_norms_score_and_learn_as_the_models_own(name, monkeypatch):
    """Also in a copy of the model, which has weights of its own: the KL penalty's, or the sharded
    one."""
    kind, config, _ = MODELS[name]
    torch.manual_seed(0)
    model, told = kind(config).eval(), []
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    batch = one_batch(*shared_rows())
    for device in ("cpu", "cuda"):
        with monkeypatch.context() as patch:
            patch.setattr(kind, "device", torch.device(device))
            forward_pass = ForwardPass(copy.deepcopy(model))
        norms = [norm for norm in copy.deepcopy(forward_pass).modules() if "forward" in vars(norm)]
        assert len(norms) == (0 if device == "cpu" else 9 if name == "qwen3" else 5)
        assert all(norm.forward.args[0] is norm for norm in norms)
        logp, entropy = forward_pass(batch, 0.7, 60, True)
        (logp.sum() + entropy.sum()).backward()
        told.append([logp.detach(), entropy.detach(), *(p.grad for p in forward_pass.parameters())])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*told))


@pytest.mark.parametrize(
    "room, slots, capacity",
    [(None, 2, 128), (10_000, 2, 2048), (1000, 2, 384), (300, 2, 128), (200, 1, 128)],
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
    assert (sampler.last_slots, sampler.slots.capacity) == (slots, capacity)


def test_joined_projections_compute_the_same_and_are_told_of_updates():
    model = small_policy(torch.float32, tied=False).model
    x, attn = torch.randn(3, model.config.hidden_size), model.model.layers[0].self_attn
    with torch.no_grad():
        joined = rollout.join_projections(model)
        for _ in range(2):
            apart = torch.cat([part(x) for part in (attn.q_proj, attn.k_proj, attn.v_proj)], 1)
            assert torch.allclose(F.linear(x, *joined[0]), apart, atol=1e-6)
            attn.k_proj.weight.mul_(2)  # as an optimizer does, in place
            assert rollout.join_projections(model, joined)[0][0] is joined[0][0]


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
def test_an_adapter_is_not_passed_by(name):
    """A projection of another class is called as it is, also where plain ones are joined."""

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    policy = small_policy(torch.float32, tied=False)
    for layer in policy.model.model.layers:
        getattr(layer.self_attn, name).__class__ = Adapter
    samplers = [Sampler(policy.model, set()) for _ in range(2)]
    samplers[1].fixed = True
    first, second = (
        [s.ids for s in sampler.sample([[1, 2, 3]], 4, 20, 1.0, seed=0)[0]] for sampler in samplers
    )
    assert first == second and samplers[1].slots.joined is None


def test_what_is_fused_on_a_gpu_can_be_compiled_and_computes_the_same():
    """Whole, for any number of rows, writing into the cache in place: traced here, but not made
    into kernels."""

    def compiled(function):
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    store, add = compiled(rollout.rotate_and_store), compiled(rollout.add_and_norm)
    with torch.inference_mode():
        for rows, new in ((8, 1), (4, 1), (1, 1), (8, 5), (4, 3)):  # new: tokens of a row
            q, k, v, cos, sin = (torch.randn(rows, new, heads, 16) for heads in (4, 2, 2, 1, 1))
            at = torch.arange(rows)[:, None]
            position = torch.randint(0, 4, (rows, 1)) + torch.arange(new)
            caches = [
                [torch.zeros(8, 9, 2, 16).transpose(1, 2) for _ in range(2)] for _ in range(2)
            ]
            expected, found = (
                function(q, k, v, cos, sin, *cache, at, position)
                for function, cache in zip((rollout.rotate_and_store, store), caches)
            )
            assert torch.equal(expected, found) and expected.any()
            assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*caches))
            args = torch.randn(rows, new, 16), torch.randn(rows, new, 16), torch.randn(16), 1e-6
            assert all(map(torch.equal, rollout.add_and_norm(*args), add(*args)))


def test_cudnn_attention_is_off():
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_id_beyond_the_vocabulary_is_told_before_a_gpu_sees_it():
    with pytest.raises(ValueError, match="id 63"):
        response_logprobs(small_policy().model, [[1]], [[2, 63]], 1.0, 60, 100)


@pytest.mark.slow
def test_the_prepared_session_of_a_gpu_runs_on_a_cpu_with_tiny_shapes(tmp_path):
    script = Path(__file__).with_name("gpu_session.py")
    command = [sys.executable, str(script), "--out", str(tmp_path), "--rehearse", "--skip", "tests"]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    parts = json.loads((tmp_path / "summary.json").read_text())
    assert all(part["exit"] == 0 for part in parts) and len(parts) == 7
    for arm in ("grpo", "edge", "references-x5"):
        folder = tmp_path / "runs" / f"{arm}-seed1"
        assert (folder / "metrics.jsonl").exists() and (folder / "eval" / "summary.json").exists()
