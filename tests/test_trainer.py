"""engine/trainer.py: fp32 masters, offload, recomputed activations, its state. That an update is
that of its loss is pinned in test_update.py, on several processes in test_launch.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SHAPE, backward, equal, random_rows, small_policy, train_steps
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM

import engine
from engine.forward import response_logprobs
from engine.models import load_model
from engine.trainer import Offload, Trainer


def weights_of(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def test_steps_equal_torchs_adamw_with_clipping():
    policy = small_policy()
    model = copy.deepcopy(policy.model)
    how = dict(betas=(0.8, 0.95), weight_decay=0.1)
    trainer = Trainer(policy, 200, **how)
    optimizer = AdamW(model.parameters(), lr=1e-2, **how)
    for clip, size in [
        (1.0, 1e-3),
        (1.0, 1.0),
        (0, 1.0),
        (1.0, 1e-5),
    ]:
        for p, other in zip(trainer.params.values(), model.parameters(), strict=True):
            p.grad = size * torch.randn_like(p)
            other.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        assert trainer.step(1e-2, clip) == pytest.approx(norm.item())
    for p, other in zip(trainer.params.values(), model.parameters()):
        assert torch.allclose(p, other, atol=1e-6)


def test_a_hundred_steps_at_1e_6_move_bf16_weights_as_fp32_training_does():
    start, fp32 = small_policy(torch.bfloat16), small_policy(torch.bfloat16)
    before = weights_of(start)
    fp32.model.float()
    moves = []
    for policy in (start, fp32):
        masters = train_steps(policy, 100, 1e-6, rows=2).masters
        moved = []
        for name, p in policy.model.named_parameters():
            assert torch.equal(p, masters[name].to(p.dtype))  # the masters, rounded
            moved.append((masters[name] - before[name]).flatten())
        moves.append(torch.cat(moved))
    assert torch.cosine_similarity(*moves, dim=0) > 0.95
    ours, exact = moves
    assert (ours.norm() / exact.norm()).item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_no_offload_bit_for_bit(dtype):
    plain, offloaded = small_policy(dtype), small_policy(dtype)
    train_steps(plain, 5, 1e-3)
    trainer = train_steps(offloaded, 5, 1e-3, offload=True)
    for name, p in trainer.params.items():
        assert trainer.masters[name].data_ptr() != p.data_ptr()
    assert equal(weights_of(plain), weights_of(offloaded))


def test_offload_copies_each_gradient_once_in_an_update(monkeypatch):
    copied = []
    copy = Offload._copy

    def count(self, name):
        copied.append(name)
        copy(self, name)

    monkeypatch.setattr(Offload, "_copy", count)
    trainer = Trainer(small_policy(), 60, offload=True)
    for seed in range(2):
        prompts, responses = random_rows(6, seed)
        backward(trainer, prompts, responses)
        trainer.step(1e-3, 1.0)
        assert sorted(copied) == sorted(trainer.params)
        copied.clear()


def test_offload_fetches_gradients_that_the_last_micro_batch_did_not_touch():
    """As those of an expert that no token of it chose."""
    results = []
    missed = 0
    for offload in (False, True):
        policy = small_policy(torch.bfloat16, tied=False)
        trainer = Trainer(policy, 60, offload=offload)
        layer = policy.model.model.layers[0].self_attn.q_proj

        def forward(x, layer=layer):
            weight = layer.weight
            if x.shape[1] <= 40:  # short micro-batches do not use it
                weight = weight.detach()
            return F.linear(x, weight, layer.bias)

        layer.forward = forward
        for seed in range(3):
            prompts, responses = random_rows(6, seed)
            prompts += [[1] * 30, [1, 2]]
            responses += [[5] * 30, [3]]
            backward(trainer, prompts, responses, factor=-1 / 100)
            if offload:
                missed += len(trainer.params.keys() - trainer.offload.copied)
            trainer.step(1e-2, 1.0)
        results.append(weights_of(policy))
    assert missed == 3
    assert equal(*results)


def test_gradient_checkpointing_changes_nothing_and_is_in_force(monkeypatch):
    plain, recomputed = small_policy(), small_policy()
    batches = list(train_steps(plain, 2, 1e-3).micro_batches(*random_rows(12)))
    layer = type(plain.model.model.layers[0].mlp)
    forward = layer.forward
    calls = []

    def counted(self, x):
        calls.append(1)
        return forward(self, x)

    monkeypatch.setattr(layer, "forward", counted)
    train_steps(recomputed, 2, 1e-3, checkpointing=True)
    for x, y in zip(plain.model.parameters(), recomputed.model.parameters()):
        assert torch.allclose(x, y, atol=1e-6)
    assert not recomputed.model.training  # only while it recomputes
    assert len(calls) == 2 * 2 * 2 * len(batches)  # layers x steps x (forward, recomputed)


DROPOUTS = {
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "opt": dict(dropout=0.3, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=64),
    "falcon": dict(hidden_dropout=0.3),  # reads its config as it runs
    "mixtral": dict(router_jitter_noise=0.3, num_key_value_heads=2, num_local_experts=4),
    "qwen2": dict(num_key_value_heads=2),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_nothing_is_dropped_in_training_whatever_the_config_says(name, tmp_path):
    """A model that recomputes is in training mode, and must still be the one that samples. The
    trainer works at its temperature and within the vocabulary."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SHAPE, attention_dropout=0.3, **DROPOUTS[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    model = load_model(str(tmp_path), cpu, torch.float32)
    policy = engine.Policy(model, None, None, {0}, 0, 60, cpu, "qwen")
    rows = random_rows(6, vocab=60)
    expected = response_logprobs(model, *rows, 0.7, 60, 100)
    trainer = Trainer(policy, 100, temperature=0.7, checkpointing=True)
    for found in (backward(trainer, *rows), trainer.logprobs(*rows)):
        for row, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(row, wanted, rtol=0, atol=1e-5)


def test_a_gradient_that_is_not_finite_makes_no_step_of_the_optimizer():
    trainer = Trainer(small_policy(), 512)
    for p in trainer.params.values():
        p.grad = torch.full_like(p, math.inf)
    assert trainer.step(1.0, 1.0) == math.inf
    assert trainer.adam_steps == 0
    assert all(p.grad is None for p in trainer.params.values())
    assert trainer.initial_model is None  # it takes as much memory as the model


def test_a_state_is_loaded_whole_also_of_a_parameter_that_had_no_gradient_yet():
    """An expert that no token went to, say. The next step is then the same."""
    trainer, again = Trainer(small_policy(), 200), Trainer(small_policy(seed=1), 200)
    untouched = next(iter(trainer.params))
    for _ in range(2):
        backward(trainer, *random_rows(4))
        trainer.params[untouched].grad = None
        trainer.step(1e-2, 1.0)
    saved = weights_of(trainer.policy) | dict(trainer.state())
    again.load_state(saved.get, trainer.adam_steps)
    assert not again.adam[untouched].state
    assert again.adam_steps == 2
    assert equal(dict(again.state()), dict(trainer.state()))
    for one in (trainer, again):
        backward(one, *random_rows(4))
        one.step(1e-2, 1.0)
    assert equal(weights_of(trainer.policy), weights_of(again.policy))
