"""What only a GPU can show: python -m pytest --cuda. Without that flag all of it is skipped. Bounds
are those of bf16; what is exact is pinned on the CPU by the other files."""

import json
import math
import shutil

import pytest
import torch
from helpers import backward, random_rows
from transformers import AutoConfig, AutoModelForCausalLM

import edge_grpo
import engine
import rollout
from engine.forward import ForwardPass, make_batches, response_logprobs
from engine.trainer import Trainer
from entropy import mm_wide
from rollout import Sampler

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def bf16_model(seed=0, kind="qwen2"):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        head_dim=64,
        num_key_value_heads=2,
        vocab_size=500,
        intermediate_size=512,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    return AutoModelForCausalLM.from_config(config).to(DEVICE, torch.bfloat16).eval()


@pytest.mark.parametrize("heads, shared, dim", [(28, 4, 128), (12, 2, 128), (32, 8, 64)])
@pytest.mark.parametrize(
    "rows, new, length", [(1, 1, 1664), (8, 1, 1792), (96, 1, 3584), (8, 5, 1792), (3, 9, 64)]
)
def test_flash_attention_in_a_graph_equals_masked_attention(heads, shared, dim, rows, new, length):
    """Recorded once, replayed with other lengths: the numbers on the device count, not those at
    recording. With several new tokens in a row (drafts) each sees itself and what is before it."""
    like = dict(device=DEVICE, dtype=torch.bfloat16)
    keys, values = (
        torch.randn(rows, length, shared, dim, **like).transpose(1, 2) for _ in range(2)
    )
    q, used = (
        torch.randn(rows, new, heads, dim, **like),
        torch.full((rows,), new, dtype=torch.int32, device=DEVICE),
    )
    starts = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)

    def attend():
        valid = used, starts * new, starts * length
        return rollout.attend_flash(q, keys, values, valid, dim**-0.5)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = attend()
    for _ in range(20):
        used.copy_(torch.randint(new, length + 1, (rows,)))
        graph.replay()
        position = used[:, None] - new + torch.arange(new, device=DEVICE)
        beyond = torch.arange(length, device=DEVICE) > position[:, None, :, None]
        mask = torch.zeros(rows, 1, new, length, device=DEVICE).masked_fill(beyond, -torch.inf)
        exact = rollout.attend_masked(q.float(), keys.float(), values.float(), mask, dim**-0.5)
        assert (out.float() - exact).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_samples_fit_the_model_and_come_again(kind):
    """Graphs, slots fewer than rows, padded vocabulary: the numbers are those of the model's own
    forward, also after its weights were changed in place."""
    model, prompts = bf16_model(kind=kind), random_rows(12, vocab=480)[0]
    sampler = Sampler(model, {0}, vocab_size=480, max_rows=20)
    assert sampler.fixed
    for _ in range(2):
        first = sampler.sample(prompts, 4, 60, 1.0, seed=1)
        assert [[s.ids for s in row] for row in sampler.sample(prompts, 4, 60, 1.0, seed=1)] == [
            [s.ids for s in row] for row in first
        ]
        gaps = []
        for prompt, row in zip(prompts, first):
            for s in row:
                assert (
                    max(s.ids) < 480
                    and (s.ids[-1] == 0) == s.finished
                    and (s.finished or len(s.ids) == 60)
                )
                logits = model(torch.tensor([prompt + s.ids], device=DEVICE)).logits[
                    0, len(prompt) - 1 : -1, :480
                ]
                logp = logits.float().log_softmax(-1).cpu()
                gaps += (logp[range(len(s.ids)), s.ids] - torch.tensor(s.logprobs)).abs().tolist()
                gaps += (-(logp.exp() * logp).sum(-1) - torch.tensor(s.entropies)).abs().tolist()
        assert sum(gaps) / len(gaps) < 0.02 and max(gaps) < 0.3
        graphs = sampler.graphs
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    assert sampler.graphs is graphs


@pytest.mark.parametrize(
    "dtype, bound, share", [(torch.float32, 1e-3, 1.0), (torch.bfloat16, 0.3, 0.3)]
)
def test_drafts_change_no_sample(dtype, bound, share):
    """In the second call with drafts, the texts of the first one are drafts that are right. In bf16
    a draw may differ by rounding, and then so do all behind it: what is before must have the same
    numbers."""
    model, prompts = bf16_model().to(dtype), random_rows(2, vocab=480)[0]
    plain = Sampler(model, {0}).sample(prompts, 4, 60, 1.0, seed=1)
    sampler = Sampler(model, {0}, drafts=4)
    for _ in range(2):
        drafted = sampler.sample(prompts, 4, 60, 1.0, seed=1)
        equal = total = 0
        for a, b in (pair for rows in zip(plain, drafted) for pair in zip(*rows)):
            same = 0
            while same < len(a.ids) and a.ids[: same + 1] == b.ids[: same + 1]:
                same += 1
            equal += same
            total += len(a.ids)
            assert b.logprobs[:same] == pytest.approx(a.logprobs[:same], abs=bound)
            assert b.entropies[:same] == pytest.approx(a.entropies[:same], abs=bound)
        assert equal >= share * total


@pytest.mark.parametrize("heads, shared, dim", [(28, 4, 128), (12, 2, 128), (32, 8, 64)])
@pytest.mark.parametrize("rows, length", [(8, 1163), (1, 37)])
def test_attention_of_prefill_and_training_is_flash_and_not_cudnn(heads, shared, dim, rows, length):
    """cuDNN's builds a plan for each new shape. Lengths are such that it could not be asked before
    torch 2.11."""
    like = dict(device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(rows, heads, length, dim, **like)
    k, v = (torch.randn(rows, shared, length, dim, **like) for _ in range(2))
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=dim**-0.5, enable_gqa=True)
    assert choice == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_products_of_bf16_are_not_rounded_to_bf16():
    """Neither the sampler's logits nor the trainer's: within what summation in fp32 leaves of
    float64."""
    a, b = (torch.randn(n, 256, device=DEVICE, dtype=torch.bfloat16) for n in (8, 500))
    assert (mm_wide(a, b.T).double() - a.double() @ b.double().T).abs().max() < 1e-3


def test_sampler_and_trainer_tell_nearly_the_same_log_probabilities_and_entropies():
    """Rounding inside the layers is left, which depends on the number of rows; at T = 0.6 it weighs
    more."""
    model, prompts = bf16_model(), random_rows(12, vocab=480)[0]
    drawn = [s for row in Sampler(model, {0}).sample(prompts, 4, 60, 0.6, seed=1) for s in row]
    scored = response_logprobs(
        model, [p for p in prompts for _ in range(4)], [s.ids for s in drawn], 0.6, 500, 2000
    )
    for told, of_trainer in (("logprobs", 0), ("entropies", 1)):
        gaps = torch.cat(
            [
                (torch.tensor(getattr(s, told)) - row[of_trainer]).abs()
                for s, row in zip(drawn, scored)
            ]
        )
        assert gaps.mean() < 0.01, told


def test_two_samplers_live_beside_each_other_and_give_their_memory_back():
    """torch >= 2.12 frees the cuBLAS workspaces of a stream with any graph recorded on it."""
    first, second = (Sampler(bf16_model(seed), set()) for seed in (0, 1))
    expected = first.sample([[1, 2, 3]], 8, 40, 1.0, seed=0)
    for _ in range(3):
        second.sample([[1, 2, 3]], 8, 40, 1.0, seed=0)
        before = torch.cuda.memory_reserved()
        second.release()
        assert torch.cuda.memory_reserved() < before
        torch.empty(2**28, dtype=torch.uint8, device=DEVICE).fill_(255)  # where the workspaces lay
        again = first.sample([[1, 2, 3]], 8, 40, 1.0, seed=0)
        assert [s.ids for s in again[0]] == [s.ids for s in expected[0]]


def test_longer_rows_up_to_the_least_capacity_need_no_new_graphs():
    sampler = Sampler(bf16_model(), set())
    sampler.sample([[1, 2, 3]], 8, 20, 1.0, seed=0)
    slots = sampler.slots
    sampler.sample([[1] * 400], 8, 500, 1.0, seed=0)
    assert sampler.slots is slots and slots.capacity == rollout.CAPACITY


def test_graphs_see_an_update_in_place():
    model = bf16_model()
    sampler = Sampler(model, set())
    sampler.sample([[1, 2, 3]], 2, 20, 1.0, seed=0)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    [[sample]] = sampler.sample([[1, 2, 3]], 1, 20, 1.0, seed=0)
    assert sample.entropies == pytest.approx([math.log(500)] * 20, abs=1e-3)


def test_a_packed_batch_scores_and_learns_as_its_rows_alone():
    """The prompt's part of the gradient is summed over its responses in bf16, in any order."""
    model = bf16_model().requires_grad_()
    forward_pass = ForwardPass(model)
    prompts, responses = random_rows(8)
    prompts = [prompts[i // 4] for i in range(8)]
    logps, gradients = [], []
    for budget in (1, 10_000):
        batches = make_batches(prompts, responses, range(8), budget, DEVICE, forward_pass.packed)
        by_row = {}
        model.zero_grad()
        for batch in batches:
            logp, entropy = forward_pass(batch, 0.7, 500)
            logp.sum().backward()
            by_row |= batch.by_row(logp, entropy)
        logps.append([by_row[row][0] for row in range(8)])
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    assert forward_pass.packed and len(batches) == 1
    for a, b in zip(*logps):
        assert (a - b).abs().mean() < 0.02
    for name, alone in gradients[0].items():
        assert (gradients[1][name] - alone).norm() < 0.05 * alone.norm(), name


def test_offload_trains_as_without():
    """CPU and GPU AdamW round differently, and gradients reach the CPU while the backward pass
    runs."""
    masters = []
    for offload in (False, True):
        model = bf16_model()
        policy = engine.Policy(
            model, None, Sampler(model, {0}), {0}, 0, 500, torch.device(DEVICE), "qwen"
        )
        trainer = Trainer(policy, 200, offload=offload, checkpointing=True)
        prompts, responses = random_rows(12)
        for _ in range(3):
            backward(trainer, prompts, responses, factor=-1 / 100)
            trainer.step(1e-4, 1.0)
        masters.append({name: m.float().cpu() for name, m in trainer.masters.items()})
        assert all(
            torch.equal(p.cpu(), trainer.masters[name].to(torch.bfloat16).cpu())
            for name, p in trainer.params.items()
        )
    start = dict(bf16_model().named_parameters())
    moved = [(m - start[name].float().cpu()).norm() for name, m in masters[0].items()]
    apart = [(a - b).norm() for a, b in zip(masters[0].values(), masters[1].values())]
    assert sum(apart) < 0.05 * sum(moved) and sum(moved) > 0


def test_a_run_on_the_gpu_and_its_resume(tmp_path):
    argv = (
        f"--device {DEVICE} --steps 4 --save-every 2 --keep 2 --questions-per-step 2 "
        f"--max-new-tokens 40 --eval-limit 8 --out {tmp_path / 'run'}"
    ).split()
    assert edge_grpo.main(argv) == 0
    before = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert (
        all(m["logprob_gap"] < 0.05 and math.isfinite(m["grad_norm"]) for m in before)
        and len(before) == 4
    )
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-4")
    assert edge_grpo.main([*argv, "--resume"]) == 0
    after = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert after[:2] == before[:2] and [m["step"] for m in after] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
