"""engine/trainer.py: fp32 masters, offload, recomputed activations, its state. That an update is
that of its loss is pinned in test_update.py, on several processes in test_distributed.py."""

import copy
import math

import pytest
import torch
from helpers import SHAPE, backward, random_rows, small_policy, train_steps
from torch.optim import AdamW
from transformers import AutoConfig, AutoModelForCausalLM

import engine
from engine.forward import response_logprobs
from engine.models import load_model
from engine.trainer import Trainer


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_steps_equal_torchs_adamw_with_clipping():
    policy = small_policy()
    model = copy.deepcopy(policy.model)
    how = dict(betas=(0.8, 0.95), weight_decay=0.1)
    trainer, optimizer = Trainer(policy, 200, **how), AdamW(model.parameters(), lr=1e-2, **how)
    for clip, size in ((1.0, 1e-3), (1.0, 1.0), (0, 1.0), (1.0, 1e-5)):
        for p, own in zip(trainer.params.values(), model.parameters(), strict=True):
            p.grad = size * torch.randn_like(p)
            own.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
        optimizer.step()
        assert trainer.step(1e-2, clip) == pytest.approx(norm.item())
    for p, own in zip(trainer.params.values(), model.parameters()):
        assert torch.allclose(p, own, atol=1e-6)


def test_a_hundred_steps_at_1e_6_move_bf16_weights_as_fp32_training_does():
    start, fp32 = small_policy(torch.bfloat16), small_policy(torch.bfloat16)
    before = {name: p.detach().float() for name, p in start.model.named_parameters()}
    fp32.model.float()
    moves = []
    for policy in (start, fp32):
        masters = train_steps(policy, 100, 1e-6, rows=2).masters
        moves.append(torch.cat([(masters[name] - before[name]).flatten() for name in before]))
        for name, p in policy.model.named_parameters():  # the masters, rounded
            assert torch.equal(p, masters[name].to(p.dtype))
    assert torch.cosine_similarity(*moves, dim=0) > 0.95
    assert moves[0].norm() == pytest.approx(moves[1].norm().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_no_offload_bit_for_bit(dtype):
    plain, offloaded = small_policy(dtype), small_policy(dtype)
    train_steps(plain, 5, 1e-3)
    trainer = train_steps(offloaded, 5, 1e-3, offload=True)
    for master, p in zip(trainer.masters.values(), trainer.params.values()):
        assert master.data_ptr() != p.data_ptr()
    blocks = {g.untyped_storage().data_ptr() for g in trainer.offload.host_grads.values()}
    assert len(blocks) == 1  # each would be rounded up to a power of two, if pinned
    assert same(plain.model.parameters(), offloaded.model.parameters())


def test_gradient_checkpointing_changes_nothing_and_is_in_force(monkeypatch):
    plain, recomputed, calls = small_policy(), small_policy(), []
    batches = list(train_steps(plain, 2, 1e-3).micro_batches(*random_rows(12)))
    layer = type(plain.model.model.layers[0].mlp)
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: calls.append(1) or forward(self, x))
    train_steps(recomputed, 2, 1e-3, checkpointing=True)
    for x, y in zip(plain.model.parameters(), recomputed.model.parameters()):
        assert torch.allclose(x, y, atol=1e-6)
    assert not recomputed.model.training  # only while it recomputes
    assert len(calls) == 2 * 2 * 2 * len(batches)  # layers x steps x (forward, recomputed)


DROPOUTS = {
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, n_embd=32, n_layer=2, n_head=4),
    "opt": dict(dropout=0.3, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=32),
    "falcon": dict(hidden_dropout=0.3),  # reads its config as it runs
    "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3, num_key_value_heads=2),
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
    model = load_model(str(tmp_path), torch.device("cpu"), torch.float32)
    policy = engine.Policy(model, None, None, {0}, 0, 60, torch.device("cpu"), "qwen")
    rows = random_rows(6, vocab=60)
    expected = response_logprobs(model, *rows, 0.7, 60, 100)
    trainer = Trainer(policy, 100, temperature=0.7, checkpointing=True)
    for ours in (backward(trainer, *rows), trainer.logprobs(*rows)):
        for row, wanted in zip(ours, expected, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(row, wanted))


def test_a_gradient_that_is_not_finite_makes_no_step_of_the_optimizer():
    trainer = Trainer(small_policy(), 512)
    for p in trainer.params.values():
        p.grad = torch.full_like(p, float("inf"))
    assert trainer.step(1.0, 1.0) == float("inf") and trainer.adam_steps == 0
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
    saved = {name: p.detach().clone() for name, p in trainer.params.items()} | dict(trainer.state())
    again.load_state(saved.get, trainer.adam_steps)
    assert not again.adam[untouched].state and again.adam_steps == 2
    assert dict(again.state()).keys() == dict(trainer.state()).keys()
    for one in (trainer, again):
        backward(one, *random_rows(4))
        one.step(1e-2, 1.0)
    assert same(trainer.params.values(), again.params.values())
