"""engine/trainer.py: AdamW on fp32 masters, clipping, offload, recomputed activations, the reference of the KL penalty.

That a step's gradient is that of its loss, at any micro-batch size, is pinned in test_edge_grpo.py; on several
processes in test_distributed.py.
"""

import copy

import pytest
import torch
from helpers import SHAPE, backward, random_rows, small_policy, train_steps
from transformers import AutoConfig, AutoModelForCausalLM

import engine
from engine.forward import micro_batches, response_logprobs
from engine.models import load_model
from engine.trainer import Trainer


def test_one_step_equals_torchs_adamw_with_clipping():
    policy = small_policy()
    model = copy.deepcopy(policy.model)
    train_steps(policy, 3, 1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    prompts, responses = random_rows(12)
    for _ in range(3):
        for p, r in zip(prompts, responses):
            logits = model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1]
            (
                -torch.log_softmax(logits, -1).gather(1, torch.tensor(r)[:, None]).sum() / 100
            ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(policy.model.parameters(), model.parameters()):
        assert torch.allclose(a, b, atol=1e-5)


def test_hundred_steps_at_1e_6_move_bf16_weights_as_fp32_training_does():
    start = small_policy(torch.bfloat16)
    fp32 = small_policy(torch.bfloat16)
    fp32.model.float()
    before = {n: p.detach().float().clone() for n, p in start.model.named_parameters()}
    with_masters, plain = (
        train_steps(start, 100, 1e-6, rows=2),
        train_steps(fp32, 100, 1e-6, rows=2),
    )
    flat = lambda masters: torch.cat([(masters[n] - before[n]).flatten() for n in sorted(before)])
    ours, reference = flat(with_masters.masters), flat(plain.masters)
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=0) > 0.95
    assert ours.norm() == pytest.approx(reference.norm().item(), rel=0.05)
    for name, p in start.model.named_parameters():  # the bf16 weights are the masters, rounded
        assert torch.equal(p, with_masters.masters[name].bfloat16())

    naive = small_policy(torch.bfloat16)  # what would be lost without them
    frozen = {n: p.detach().clone() for n, p in naive.model.named_parameters()}
    optimizer = torch.optim.AdamW(naive.model.parameters(), lr=1e-6)
    for p in naive.model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(100):
        optimizer.step()
    still = [
        torch.eq(p, frozen[n]).float().mean().item()
        for n, p in naive.model.named_parameters()
        if "proj.weight" in n
    ]
    assert sum(still) / len(still) > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_no_offload_bit_for_bit(dtype):
    a, b = small_policy(dtype), small_policy(dtype)
    train_steps(a, 5, 1e-3)
    trainer = train_steps(b, 5, 1e-3, offload=True)
    assert all(
        m.data_ptr() != p.data_ptr()
        for m, p in zip(trainer.masters.values(), trainer.params.values())
    )
    blocks = {g.untyped_storage().data_ptr() for g in trainer.host_grads.values()}
    assert len(blocks) == 1  # each would be rounded up to a power of two, if pinned
    for x, y in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(x, y)


def test_gradient_checkpointing_changes_nothing_and_is_in_force(monkeypatch):
    a, b = small_policy(), small_policy()
    train_steps(a, 2, 1e-3)
    calls = []
    layer = type(b.model.model.layers[0].mlp)
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: calls.append(1) or plain(self, x))
    train_steps(b, 2, 1e-3, checkpointing=True)
    for x, y in zip(a.model.parameters(), b.model.parameters()):
        assert torch.allclose(x, y, atol=1e-6)
    assert not b.model.training  # only while it recomputes
    batches = len(micro_batches(*random_rows(12), 200, "cpu"))
    assert (
        len(calls) == 2 * 2 * 2 * batches
    )  # layers x steps x (forward + recomputed) x micro-batches


DROPOUTS = {
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, n_embd=32, n_layer=2, n_head=4),
    "opt": dict(
        dropout=0.3, attention_dropout=0.3, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=32
    ),
    "falcon": dict(hidden_dropout=0.3, attention_dropout=0.3),  # reads its config as it runs
    "starcoder2": dict(
        residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3, num_key_value_heads=2
    ),
    "mixtral": dict(
        router_jitter_noise=0.3, attention_dropout=0.3, num_key_value_heads=2, num_local_experts=4
    ),
    "qwen2": dict(attention_dropout=0.3, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_nothing_is_dropped_in_training_whatever_the_config_says(name, tmp_path):
    """A scorer that recomputes is in training mode, and must still be the function that samples."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **SHAPE, **DROPOUTS[name])
    ).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.device("cpu"), torch.float32)
    policy = engine.Policy(model, None, None, {0}, 0, 60, torch.device("cpu"), "qwen")
    rows = random_rows(6, vocab=60)
    expected = response_logprobs(model, *rows, 1.0, 60, 100)
    _, told, _ = backward(Trainer(policy, 100, checkpointing=True), *rows)
    for logp, (wanted, _) in zip(told, expected, strict=True):
        assert torch.allclose(logp, wanted, atol=1e-5)


def test_what_a_trainer_scores_is_at_its_temperature_and_within_the_vocabulary():
    policy, rows = small_policy(), random_rows(6, vocab=60)
    policy.vocab_size = 60
    expected = response_logprobs(policy.model, *rows, 0.7, 60, 100)
    trainer = Trainer(policy, 100, temperature=0.7)
    _, logp, entropy = backward(trainer, *rows)
    for scored in (trainer.score(*rows), list(zip(logp, entropy))):
        for told, wanted in zip(scored, expected, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(told, wanted))


def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were():
    trainer = Trainer(engine.load_policy("tiny", "cpu"), 512)
    before = {k: v.detach().clone() for k, v in trainer.params.items()}
    for p in trainer.params.values():
        p.grad = torch.full_like(p, 1.0)
    next(iter(trainer.params.values())).grad.view(-1)[0] = float("inf")
    assert trainer.step(1.0, 1.0) == float("inf")
    assert (
        all(torch.equal(before[k], v) for k, v in trainer.params.items())
        and trainer.adam_steps == 0
    )
    assert all(p.grad is None for p in trainer.params.values())


def test_the_reference_stays_as_the_model_was():
    policy, rows = small_policy(), random_rows(3)
    start = copy.deepcopy(policy.model.state_dict())
    trainer = Trainer(policy, 200, keep_reference=True)
    before = trainer.score(*rows)
    for _ in range(2):
        backward(trainer, *rows, factor=-1 / 100)
        trainer.step(1e-2, 1.0)
    assert not any(p.requires_grad for p in trainer.reference.parameters())
    for name, weight in trainer.reference.state_dict().items():
        assert torch.equal(weight, start[name])
    assert not torch.equal(policy.model.state_dict()[name], start[name])
    for (then, _), (kept, _), (now, _) in zip(
        before, trainer.score(*rows, reference=True), trainer.score(*rows)
    ):
        assert torch.equal(then, kept) and not torch.allclose(then, now)
    assert Trainer(policy, 200).reference is None  # it takes as much memory as the model


def test_a_parameter_that_had_no_gradient_yet_is_saved_and_loaded():
    """An expert that no token went to, say."""
    trainer, again = Trainer(small_policy(), 200), Trainer(small_policy(seed=1), 200)
    backward(trainer, *random_rows(4))
    untouched = next(iter(trainer.params))
    trainer.params[untouched].grad = None
    trainer.step(1e-2, 1.0)
    saved = dict(trainer.state()) | {name: p.detach().clone() for name, p in trainer.params.items()}
    again.load_state(saved.get, trainer.adam_steps)
    assert (
        all(torch.equal(p, again.params[name]) for name, p in trainer.params.items())
        and again.adam_steps == 1
    )
    assert (
        not again.adam[untouched].state
        and dict(again.state()).keys() == dict(trainer.state()).keys()
    )
