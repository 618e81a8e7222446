"""engine.py: the training forward and its micro-batches, AdamW on fp32 masters, offload, the memory plan, prompts."""
import copy
import json
import os
import random
import subprocess
import sys

from pathlib import Path

import pytest
import torch
from transformers import (AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config,
                          GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config,
                          Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)
from transformers.masking_utils import sdpa_mask

import data
import edge_grpo
import engine
from data import UserError
from rollout import Sampler

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
QWEN = SHARED / "tokenizers" / "Qwen2.5-Math-1.5B"


def small_policy(dtype=torch.float32, hidden=32, layers=2, vocab=64, inner=64, seed=0, tied=True):
    torch.manual_seed(seed)
    config = Qwen2Config(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
                         intermediate_size=inner, vocab_size=vocab, tie_word_embeddings=tied,
                         max_position_embeddings=4096)
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    return engine.Policy(model, None, Sampler(model, {0}), {0}, 0, vocab, torch.device("cpu"), "qwen")


def random_rows(n, seed=0, vocab=64, prompt=(3, 20), response=(1, 60)):
    r = random.Random(seed)
    rows = [tuple([r.randrange(1, vocab) for _ in range(r.randint(*length))] for length in (prompt, response))
            for _ in range(n)]
    return [p for p, _ in rows], [x for _, x in rows]


# --- micro-batches and the training forward --------------------------------------------------------------------------

def shared_rows(prompts=5, n=30, seed=1, vocab=60):
    """Rows of which several have the same prompt, not always side by side; one prompt and some responses of one token,
    an empty response, and a long prompt that begins another."""
    few, _ = random_rows(prompts, seed, vocab)
    few[0], few[1], few[2] = few[0][:1], few[1] * 3, few[1] * 3 + few[2]
    _, responses = random_rows(n, seed + 1, vocab)
    responses[3], responses[4] = [], responses[4][:1]
    return sorted((few * n)[:n - 3]) + few[:3], responses


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_hold_every_row_once_within_the_budget_and_with_little_padding(packed):
    prompts, responses = random_rows(64)
    responses[5] = []
    batches = engine.micro_batches(prompts, responses, 300, "cpu", packed)
    assert sorted(i for b in batches for i in b.index) == [i for i in range(64) if i != 5]
    fed = [len(prompts[i]) + len(responses[i]) - 1 for i in range(64) if i != 5]
    padded = [rows.numel() for b in batches for rows in b.rows]
    if packed:
        assert sum(len(b.ids) for b in batches) == sum(fed)                     # what the layers see is not padded
        assert all(sum(len(prompts[i]) + len(responses[i]) for i in b.index) <= 300 for b in batches)
        assert sum(fed) / sum(padded) > 0.9                                     # nor, much, what attention sees
    else:
        assert all(len(b.rows) == 1 and b.rows[0].numel() + len(b.index) <= 300 for b in batches)
        assert sum(fed) / sum(padded) > 0.9
    for b in batches:
        assert torch.equal(b.targets, b.flat(responses).long())
        assert [len(told) for told, in b.by_row(b.targets)] == [len(responses[i]) for i in b.index]


def test_every_row_of_a_batch_reads_as_itself_and_a_prompt_stands_there_once():
    prompts, responses = shared_rows()
    batches = engine.micro_batches(prompts, responses, 300, "cpu")
    assert any(len({tuple(prompts[i]) for i in b.index}) < len(b.index) for b in batches)
    for b in batches:
        of_prompts = sum(len(p) for p in {tuple(prompts[i]) for i in b.index})
        assert len(b.ids) == of_prompts + sum(len(responses[i]) - 1 for i in b.index)
        flat, found = torch.cat([rows.flatten() for rows in b.rows]), iter(b.index)
        assert torch.equal(flat[b.home], torch.arange(len(b.ids)))
        before = iter(b.before.tolist())
        for row in (row for rows in b.rows for row in rows):
            i = next(found)
            row = row[:len(prompts[i]) + len(responses[i]) - 1]
            assert b.ids[row].tolist() == [*prompts[i], *responses[i][:-1]]
            assert b.positions[row].tolist() == list(range(len(row)))
            assert [next(before) for _ in responses[i]] == row[len(prompts[i]) - 1:].tolist()


def test_a_row_longer_than_the_budget_is_alone():
    prompts, responses = [[1] * 5] * 3, [[2] * 50, [3] * 2, [4] * 3]
    for packed in (True, False):
        assert [b.index for b in engine.micro_batches(prompts, responses, 20, "cpu", packed)] == [[0], [2, 1]]


def test_the_budget_is_filled_to_the_last_token():
    for packed in (True, False):
        batches = engine.micro_batches([[1] * 4] * 5, [[2] * 6] * 5, 20, "cpu", packed)
        assert [len(b.index) for b in batches] == [2, 2, 1]


SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64,
             max_position_embeddings=256, pad_token_id=None)
MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, num_key_value_heads=2), True),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16), True),
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, num_key_value_heads=4, rope_parameters=dict(
        rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)), True),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=None), True),
    "window": (MistralForCausalLM, MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8), False),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=256, bos_token_id=None,
                                        eos_token_id=None), False),
}


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_equal_the_models_own_forward_of_each_row_at_any_budget(name):
    """In float64; only the Llama family with full attention is packed."""
    kind, config, packed = MODELS[name]
    torch.manual_seed(0)
    model = kind(config).double().eval()
    if packed:
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2.3          # some models scale by other than 1 / sqrt(D)
    prompts, responses = shared_rows()
    weights = torch.rand(30, 2, generator=torch.Generator().manual_seed(0)).double()
    expected = {}
    for i, (p, r) in enumerate(zip(prompts, responses)):
        if r:
            logp = torch.log_softmax(model(torch.tensor([p + r])).logits[0, len(p) - 1:-1, :60] / 0.7, -1)
            expected[i] = logp.gather(1, torch.tensor(r)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)
    sum((torch.stack([x.sum() for x in told]) * weights[i]).sum() for i, told in expected.items()).backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    for budget in (1, 300, 10_000):
        model.zero_grad()
        scorer = engine.Scorer(model)
        assert scorer.packed == packed
        for b in engine.micro_batches(prompts, responses, budget, "cpu", scorer.packed):
            told = scorer(b, 0.7, 60, entropy_grad=True)
            for i, row in zip(b.index, b.by_row(*told)):
                for mine, own in zip(row, expected[i]):
                    assert torch.allclose(mine, own.float(), atol=1e-6)
            w = weights[torch.tensor(b.index).repeat_interleave(torch.tensor(b.counts))]
            (torch.stack(told, 1) * w).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad - gradient[name]).norm() <= 1e-6 * gradient[name].norm(), name


def test_response_logprobs_are_of_each_row_in_order_and_empty_where_it_is():
    policy = small_policy()
    prompts, responses = shared_rows()
    for p, r, (logp, entropy) in zip(prompts, responses,
                                     engine.response_logprobs(policy.model, prompts, responses, 0.7, 60, 200)):
        assert len(logp) == len(entropy) == len(r)
        if r:
            alone = engine.response_logprobs(policy.model, [p], [r], 0.7, 60, 200)[0]
            assert torch.allclose(logp, alone[0], atol=1e-5) and torch.allclose(entropy, alone[1], atol=1e-5)


def test_packed_scoring_makes_no_mask():
    """It would be N x N. Who else calls the model needs one."""
    policy, made = small_policy(), []
    AttentionMaskInterface.register(engine.ROWS, lambda *a, **k: made.append(1) or sdpa_mask(*a, **k))
    try:
        engine.response_logprobs(policy.model, *shared_rows(), 0.7, 60, 200)
        assert not made
        policy.model(input_ids=torch.ones(2, 9, dtype=torch.long), attention_mask=torch.tensor([[0] + [1] * 8] * 2))
        assert made
    finally:
        AttentionMaskInterface.register(engine.ROWS, sdpa_mask)


def test_who_else_calls_a_scored_model_gets_its_usual_forward_and_its_usual_config(tmp_path):
    model = small_policy().model
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2.3
    ids = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    calls = [dict(), dict(attention_mask=torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [0] + [1] * 8]))]
    before, config = [model(input_ids=ids, **call).logits for call in calls], model.config.to_json_string()
    engine.Scorer(model)
    for call, logits in zip(calls, before):
        assert torch.equal(model(input_ids=ids, **call).logits, logits)
    assert model.config.to_json_string() == config


# --- AdamW on masters ------------------------------------------------------------------------------------------------

def train_steps(policy, steps, lr, offload=False, checkpointing=False, rows=12):
    """Likelihood training on fixed rows; returns the trainer."""
    trainer = engine.Trainer(policy, 200, offload=offload, checkpointing=checkpointing)
    prompts, responses = random_rows(rows)
    for _ in range(steps):
        for batch, last in trainer.in_step(trainer.micro_batches(prompts, responses)):
            logp, _ = trainer.scorer(batch, 1.0, policy.vocab_size)
            trainer.backward(-logp.sum() / 100, last)
        trainer.step(lr, 1.0)
    return trainer


def test_one_step_equals_torchs_adamw_with_clipping():
    policy = small_policy()
    model = copy.deepcopy(policy.model)
    train_steps(policy, 3, 1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    prompts, responses = random_rows(12)
    for _ in range(3):
        for p, r in zip(prompts, responses):
            logits = model(torch.tensor([p + r])).logits[0, len(p) - 1:-1]
            (-torch.log_softmax(logits, -1).gather(1, torch.tensor(r)[:, None]).sum() / 100).backward()
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
    with_masters, plain = train_steps(start, 100, 1e-6, rows=2), train_steps(fp32, 100, 1e-6, rows=2)
    flat = lambda masters: torch.cat([(masters[n] - before[n]).flatten() for n in sorted(before)])
    ours, reference = flat(with_masters.masters), flat(plain.masters)
    assert torch.nn.functional.cosine_similarity(ours, reference, dim=0) > 0.95
    assert ours.norm() == pytest.approx(reference.norm().item(), rel=0.05)
    for name, p in start.model.named_parameters():          # the bf16 weights are the masters, rounded
        assert torch.equal(p, with_masters.masters[name].bfloat16())

    naive = small_policy(torch.bfloat16)                    # what would be lost without them
    frozen = {n: p.detach().clone() for n, p in naive.model.named_parameters()}
    optimizer = torch.optim.AdamW(naive.model.parameters(), lr=1e-6)
    for p in naive.model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(100):
        optimizer.step()
    still = [torch.eq(p, frozen[n]).float().mean().item() for n, p in naive.model.named_parameters()
             if "proj.weight" in n]
    assert sum(still) / len(still) > 0.8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offload_equals_no_offload_bit_for_bit(dtype):
    a, b = small_policy(dtype), small_policy(dtype)
    train_steps(a, 5, 1e-3)
    trainer = train_steps(b, 5, 1e-3, offload=True)
    assert all(m.data_ptr() != p.data_ptr() for m, p in zip(trainer.masters.values(), trainer.params.values()))
    blocks = {g.untyped_storage().data_ptr() for g in trainer.host_grads.values()}
    assert len(blocks) == 1                                 # pinned memory is rounded up to a power of two, block by block
    for x, y in zip(a.model.parameters(), b.model.parameters()):
        assert torch.equal(x, y)


def test_a_model_is_saved_in_files_of_bounded_size(tmp_path, monkeypatch):
    policy = engine.load_policy("tiny", "cpu")
    size = (engine.TINY_MODEL / "model.safetensors").stat().st_size
    monkeypatch.setattr(engine, "SHARD_BYTES", size // 3)
    engine.save_model(policy, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) >= 3 and max(f.stat().st_size for f in files) < size / 2
    again = engine.load_policy(str(tmp_path), "cpu").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in policy.model.state_dict().items())


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
    assert not b.model.training                             # only while it recomputes
    batches = len(engine.micro_batches(*random_rows(12), 200, "cpu"))
    assert len(calls) == 2 * 2 * 2 * batches                # layers x steps x (forward + recomputed) x micro-batches


DROPOUTS = {
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, n_embd=32, n_layer=2, n_head=4),
    "opt": dict(dropout=0.3, attention_dropout=0.3, layerdrop=0.3, ffn_dim=48, word_embed_proj_dim=32),
    "falcon": dict(hidden_dropout=0.3, attention_dropout=0.3),          # reads its config as it runs
    "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3, num_key_value_heads=2),
    "mixtral": dict(router_jitter_noise=0.3, attention_dropout=0.3, num_key_value_heads=2, num_local_experts=4),
    "qwen2": dict(attention_dropout=0.3, num_key_value_heads=2),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_nothing_is_dropped_in_training_whatever_the_config_says(name, tmp_path):
    """A scorer that recomputes is in training mode, and must still be the function that samples."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE, **DROPOUTS[name])).save_pretrained(tmp_path)
    model = engine.load_model(str(tmp_path), torch.device("cpu"), torch.float32)
    policy = engine.Policy(model, None, None, {0}, 0, 60, torch.device("cpu"), "qwen")
    rows = random_rows(6, vocab=60)
    expected = engine.response_logprobs(model, *rows, 1.0, 60, 100)
    trainer = engine.Trainer(policy, 100, checkpointing=True)
    for batch, last in trainer.in_step(trainer.micro_batches(*rows)):
        logp, entropy = trainer.scorer(batch, 1.0, 60)
        trainer.backward(logp.sum(), last)
        for i, (told, _) in zip(batch.index, batch.by_row(logp, entropy)):
            assert torch.allclose(told, expected[i][0], atol=1e-5)


def test_a_frozen_copy_stays_as_the_model_was():
    policy = small_policy()
    reference, start = engine.frozen_copy(policy.model), copy.deepcopy(policy.model.state_dict())
    train_steps(policy, 2, 1e-2)
    assert not any(p.requires_grad for p in reference.parameters())
    for name, weight in reference.state_dict().items():
        assert torch.equal(weight, start[name])
    assert not torch.equal(policy.model.state_dict()[name], start[name])


# --- the memory plan -------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, engine, resource
sys.path.insert(0, sys.argv[1] + "/tests")
from test_engine import small_policy, train_steps, random_rows
checkpointing, dtype = sys.argv[2] == "True", getattr(torch, sys.argv[3])
torch.set_num_threads(1)
train_steps(small_policy(dtype), 1, 1e-3, checkpointing=checkpointing)                         # what is loaded on the way
base = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() // 1024        # now, not at its most
policy = small_policy(dtype, hidden=256, layers=8, vocab=4096, inner=1024)
trainer = engine.Trainer(policy, 2048, checkpointing=checkpointing)
rows = random_rows(8, vocab=4096, prompt=(200, 200), response=(56, 56))
for _ in range(2):                          # the moments come with the first step
    for batch, last in trainer.in_step(trainer.micro_batches(*rows)):
        logp, _ = trainer.scorer(batch, 1.0, policy.vocab_size)
        trainer.backward(logp.sum(), last)
    trainer.step(1e-3, 1.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory as Linux tells it")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_plan_is_what_a_small_model_really_takes_and_not_much_more(checkpointing, dtype):
    """Measured as resident memory, where the C library returns what is freed at once (MALLOC_MMAP_THRESHOLD_)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    run = subprocess.run([sys.executable, "-c", MEASURE, str(ROOT), str(checkpointing), dtype], env=env,
                         capture_output=True, text=True)
    measured = float(run.stdout.strip() or pytest.fail(run.stderr))
    config = Qwen2Config(**{**small_policy().model.config.to_dict(), "hidden_size": 256, "num_hidden_layers": 8,
                            "vocab_size": 4096, "intermediate_size": 1024, "layer_types": None})
    plan = engine.memory_plan(config, 0, 0, 2048, 2 if dtype == "bfloat16" else 4, False, checkpointing)
    planned = sum(plan.values()) - plan["output layer"] + 3 * 4 * 2**22     # a CPU takes smaller blocks than a GPU
    print(checkpointing, dtype, measured / 2**20, planned / 2**20, {k: v / 2**20 for k, v in plan.items()})
    assert 0.85 < planned / measured < 1.75            # 0.9 to 1.6 with torch 2.8 to 2.13 and transformers 5.0 to 5.23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])            # Qwen3: wider heads, each normalised
def test_the_plans_activations_are_what_autograd_keeps(name, dtype):
    kind, config, _ = MODELS[name]
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": 8, "layer_types": None})
    scorer = engine.Scorer(kind(config).to(dtype))
    weights, kept = {p.untyped_storage().data_ptr() for p in scorer.parameters()}, {}
    prompts, responses = [[i] * 50 for i in range(8)], [[1] * 50] * 8
    [batch] = engine.micro_batches(prompts, responses, 800, "cpu")

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor          # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scorer(batch, 1.0, 60)
    size = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in weights)
    plan = engine.memory_plan(config, 0, 0, 800, dtype.itemsize, False, False)
    assert 0.9 < plan["activations"] / size < 1.3


def test_memory_plan_of_7b_is_the_122_gb_of_the_issue():
    config = Qwen2Config(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                         intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)
    plan = engine.memory_plan(config, 8, 1792, 8192, 2, False, True)
    assert sum(plan[k] for k in ("weights", "gradients", "optimizer")) == pytest.approx(122e9, rel=0.01)
    offloaded = engine.memory_plan(config, 8, 1792, 8192, 2, True, True)
    assert sum(v for k, v in offloaded.items() if not k.startswith("host")) < 44 * engine.GIB


def test_every_way_to_say_that_memory_is_short_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, MemoryError(), torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
                  RuntimeError("CUDA error: out of memory")):                                   # the last: pinning
        assert engine.is_out_of_memory(error)
    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        assert not engine.is_out_of_memory(error)


def test_preflight_says_which_flag_to_change(monkeypatch):
    line = engine.preflight({"weights": 2.0**30, "optimizer": 2.0**60}, torch.device("cpu"))
    assert "--offload-optimizer" in line
    assert "fit" not in engine.preflight({"weights": 2.0**20}, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**36, 2**36))
    assert "fit" not in engine.preflight({"weights": 2.0**30, "host optimizer": 2.0**20}, torch.device("cuda"))
    line = engine.preflight({"weights": 2.0**30, "host optimizer": 2.0**60}, torch.device("cuda"))
    assert "CPU memory. It will probably not fit" in line


def test_rows_leave_room_for_what_comes_after_the_cache(monkeypatch):
    """A GPU's free memory is not all the cache's: gradients and moments do not exist yet when it is made."""
    plan = {"weights": 10.0, "gradients": 10.0, "optimizer": 40.0, "cache": 64.0, "host optimizer": 1e6}
    assert [engine.rows_that_fit(plan, 32, free) for free in (1000.0, 100.0, 70.0, 5.0)] == [32, 15, 1, 1]
    assert engine.rows_that_fit({**plan, "cache": 0.0}, 32, 5.0) == 32          # a model without attention
    flags = edge_grpo.parse_flags(["--model", "tiny", "--group-size", "512"])
    monkeypatch.setattr(engine, "start_processes", lambda device: torch.device("cuda"))
    for free, all_fit in ((2**40, True), (2**28, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        line, rows = edge_grpo.preflight(flags)
        assert rows is None if all_fit else f"sampling {rows} of 4096 rows" in line and 1 < rows < 4096
        assert "not fit" not in line


# --- prompts and end tokens ------------------------------------------------------------------------------------------

@pytest.mark.skipif(not QWEN.exists(), reason="../shared is absent: no real tokenizer to test with")
def test_qwen_prompt_is_the_papers_and_both_end_tokens_stop():
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    expected = engine.QWEN_TEMPLATE.replace("{question}", "What is $1+1$?")
    assert engine.prompt_text(tokenizer, "What is $1+1$?", "qwen") == expected
    ids = tokenizer.encode(expected, add_special_tokens=False)
    assert ids[0] == 151644 and tokenizer.decode(ids) == expected
    config = Qwen2Config(**json.loads((QWEN / "config.json").read_text()))
    assert engine.find_end_ids(config, None, tokenizer) == {151643, 151645}
    tokenizer.chat_template = None
    assert engine.prompt_text(tokenizer, "What is $1+1$?", "qwen") == expected


def test_llama_gets_the_instruction_in_the_user_turn():
    class Fake:
        chat_template = "x"

        def apply_chat_template(self, messages, **_):
            return messages
    assert engine.prompt_text(Fake(), "Q", "llama") == [{"role": "user", "content": f"Q {engine.INSTRUCTION}"}]
    Fake.chat_template, Fake.name_or_path = None, "base"
    with pytest.raises(UserError, match="take the Instruct model"):
        engine.prompt_text(Fake(), "Q", "llama")


def test_a_prompt_does_not_change_with_the_day():
    """Llama 3's template asks for the date unless it is told one."""
    tiny = engine.load_policy("tiny", "cpu")
    tiny.tokenizer.chat_template = ("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
                                    "{{ messages[0]['content'] }}")
    assert engine.prompt_text(tiny.tokenizer, "Q", "llama").startswith("26 Jul 2024Q")


def test_several_processes_do_not_share_one_gpu_by_a_flag(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="under torchrun"):
        engine.start_processes("cuda:1")


def test_half_the_rows_means_half_of_those_that_were_in_the_cache(capsys):
    """What was asked for may be far above what fitted, and half of it too."""
    tiny = engine.load_policy("tiny", "cpu")
    tiny.sampler.last_slots, tried = 60, []

    def scarce(items):
        tried.append(tiny.sampler.max_rows)
        if len(tried) == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return items
    assert engine.halve_rows_on_oom(tiny, scarce, [0] * 256) == [0] * 256
    assert tried == [None, 30] and "--max-rows 30" in capsys.readouterr().err


def test_bare_names():
    assert engine.find_model("Qwen2.5-Math-7B") == "Qwen/Qwen2.5-Math-7B"
    assert engine.find_model("Llama-3.2-3B-Instruct") == "meta-llama/Llama-3.2-3B-Instruct"
    assert engine.find_model("owner/name") == "owner/name"
    with pytest.raises(UserError, match="neither"):
        engine.find_model("nothing")


def test_tiny_policy_round_trips_text():
    policy = engine.load_policy("tiny", "cpu")
    problem = data.load("tiny:1-3")[0]
    assert policy.decode(policy.encode(problem.solution)) == problem.solution
    assert policy.end_id in policy.end_ids
