"""What only a GPU can show: python -m pytest --cuda. Without that flag all of it is skipped. Bounds
are those of bf16; what is exact is pinned on the CPU by the other files."""

import math
import shutil

import pytest
import torch
from helpers import backward, json_lines, random_rows
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
HEADS = pytest.mark.parametrize(
    "heads, shared, dim",
    [
        (28, 4, 128),
        (12, 2, 128),
        (32, 8, 64),
    ],
)


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


def ids_of(samples):
    return [[sample.ids for sample in row] for row in samples]


# --- Kernels ---------------------------------------------------------------------------------


@HEADS
@pytest.mark.parametrize(
    "rows, new, length",
    [
        (1, 1, 1664),
        (8, 1, 1792),
        (96, 1, 3584),
        (8, 5, 1792),
        (3, 9, 64),
    ],
)
def test_flash_attention_in_a_graph_equals_masked_attention(heads, shared, dim, rows, new, length):
    """Recorded once, replayed with other lengths: the numbers on the device count, not those at
    recording. With several new tokens in a row (drafts) each sees itself and what is before it."""
    like = dict(device=DEVICE, dtype=torch.bfloat16)
    keys, values = torch.randn(2, rows, length, shared, dim, **like).transpose(2, 3)
    q = torch.randn(rows, new, heads, dim, **like)
    used = torch.full((rows,), new, dtype=torch.int32, device=DEVICE)
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
        mask = torch.zeros(rows, 1, new, length, device=DEVICE)
        mask.masked_fill_(beyond, -torch.inf)
        wide = q.float(), keys.float(), values.float()
        exact = rollout.attend_masked(*wide, mask, dim**-0.5)
        assert (out.float() - exact).abs().max() < 0.02


@HEADS
@pytest.mark.parametrize("rows, length", [(8, 1163), (1, 37)])
def test_attention_of_prefill_and_training_is_flash_and_not_cudnn(heads, shared, dim, rows, length):
    """cuDNN's builds a plan for each new shape. Lengths are such that it could not be asked before
    torch 2.11."""
    like = dict(device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    q = torch.randn(rows, heads, length, dim, **like)
    k, v = torch.randn(2, rows, shared, length, dim, **like)
    choice = torch._fused_sdp_choice(q, k, v, None, 0.0, True, scale=dim**-0.5, enable_gqa=True)
    assert choice == int(torch.nn.attention.SDPBackend.FLASH_ATTENTION.value)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_products_of_bf16_are_not_rounded_to_bf16():
    """Neither the sampler's logits nor the trainer's: within what summation in fp32 leaves of
    float64."""
    a = torch.randn(8, 256, device=DEVICE, dtype=torch.bfloat16)
    b = torch.randn(500, 256, device=DEVICE, dtype=torch.bfloat16)
    exact = a.double() @ b.double().T
    error = mm_wide(a, b.T).double() - exact
    assert error.abs().max() < 1e-3


# --- The sampler -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_samples_fit_the_model_and_come_again(kind):
    """Graphs, slots fewer than rows, padded vocabulary: the numbers are those of the model's own
    forward, also after its weights were changed in place."""
    model = bf16_model(kind=kind)
    prompts, _ = random_rows(12, vocab=480)
    sampler = Sampler(model, {0}, vocab_size=480, max_rows=20)
    assert sampler.fixed
    for _ in range(2):
        first = sampler.sample(prompts, 4, 60, 1.0, seed=1)
        assert ids_of(sampler.sample(prompts, 4, 60, 1.0, seed=1)) == ids_of(first)
        gaps = []
        for prompt, row in zip(prompts, first):
            for s in row:
                assert max(s.ids) < 480
                assert s.finished == (s.ids[-1] == 0)
                assert s.finished or len(s.ids) == 60
                ids = torch.tensor([prompt + s.ids], device=DEVICE)
                logits = model(ids).logits[0, len(prompt) - 1 : -1, :480]
                logp = logits.float().log_softmax(-1).cpu()
                entropies = -(logp.exp() * logp).sum(-1)
                logprobs = logp[range(len(s.ids)), s.ids]
                gaps.append(logprobs - torch.tensor(s.logprobs))
                gaps.append(entropies - torch.tensor(s.entropies))
        gaps = torch.cat(gaps).abs()
        assert gaps.mean() < 0.02
        assert gaps.max() < 0.3
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
    model = bf16_model().to(dtype)
    prompts, _ = random_rows(2, vocab=480)
    call = prompts, 4, 60, 1.0, 1
    plain = Sampler(model, {0}).sample(*call)
    sampler = Sampler(model, {0}, drafts=4)
    for _ in range(2):
        drafted = sampler.sample(*call)
        same = total = 0
        for a, b in zip(sum(plain, []), sum(drafted, [])):
            equal = torch.tensor([x == y for x, y in zip(a.ids, b.ids)])
            n = int(equal.cumprod(0).sum())  # up to the first difference
            same += n
            total += len(a.ids)
            assert b.logprobs[:n] == pytest.approx(a.logprobs[:n], abs=bound)
            assert b.entropies[:n] == pytest.approx(a.entropies[:n], abs=bound)
        assert same >= share * total


def test_sampler_and_trainer_find_nearly_the_same_log_probabilities_and_entropies():
    """Rounding inside the layers is left, which depends on the number of rows; at T = 0.6 it weighs
    more."""
    model = bf16_model()
    prompts, _ = random_rows(12, vocab=480)
    sampler = Sampler(model, {0})
    drawn = sum(sampler.sample(prompts, 4, 60, 0.6, seed=1), [])
    rows = [prompt for prompt in prompts for _ in range(4)]
    scored = response_logprobs(model, rows, [s.ids for s in drawn], 0.6, 500, 2000)
    logp_gaps, entropy_gaps = [], []
    for s, (logp, entropy) in zip(drawn, scored):
        logp_gaps.append(torch.tensor(s.logprobs) - logp)
        entropy_gaps.append(torch.tensor(s.entropies) - entropy)
    assert torch.cat(logp_gaps).abs().mean() < 0.01
    assert torch.cat(entropy_gaps).abs().mean() < 0.01


def test_two_samplers_live_beside_each_other_and_give_their_memory_back():
    """torch >= 2.12 frees the cuBLAS workspaces of a stream with any graph recorded on it."""
    first = Sampler(bf16_model(0), set())
    second = Sampler(bf16_model(1), set())
    call = [[1, 2, 3]], 8, 40, 1.0, 0
    expected = first.sample(*call)
    for _ in range(3):
        second.sample(*call)
        before = torch.cuda.memory_reserved()
        second.release()
        assert torch.cuda.memory_reserved() < before
        torch.empty(2**28, dtype=torch.uint8, device=DEVICE).fill_(255)  # where the workspaces lay
        assert ids_of(first.sample(*call)) == ids_of(expected)


def test_longer_rows_up_to_the_least_capacity_need_no_new_graphs():
    sampler = Sampler(bf16_model(), set())
    sampler.sample([[1, 2, 3]], 8, 20, 1.0, seed=0)
    slots = sampler.slots
    sampler.sample([[1] * 400], 8, 500, 1.0, seed=0)
    assert sampler.slots is slots
    assert slots.capacity == rollout.CAPACITY


# --- Training --------------------------------------------------------------------------------


def test_a_packed_batch_scores_and_learns_as_its_rows_alone():
    """The prompt's part of the gradient is summed over its responses in bf16, in any order."""
    model = bf16_model().requires_grad_()
    forward_pass = ForwardPass(model)
    assert forward_pass.packed
    prompts, responses = random_rows(8)
    prompts = prompts[:1] * 4 + prompts[1:2] * 4
    logps, gradients = [], []
    for budget in (1, 10_000):
        by_row = {}
        model.zero_grad()
        for batch in make_batches(prompts, responses, range(8), budget, DEVICE, packed=True):
            logp, entropy = forward_pass(batch, 0.7, 500)
            logp.sum().backward()
            by_row |= batch.by_row(logp, entropy)
        logps.append([by_row[row][0] for row in range(8)])
        gradients.append({name: p.grad.float() for name, p in model.named_parameters()})
    for a, b in zip(*logps):
        assert (a - b).abs().mean() < 0.02
    alone, together = gradients
    for name in alone:
        off = together[name] - alone[name]
        assert off.norm() < 0.05 * alone[name].norm(), name


def test_offload_trains_as_without():
    """CPU and GPU AdamW round differently, and gradients reach the CPU while the backward pass
    runs."""
    moves = []
    start = dict(bf16_model().named_parameters())
    for offload in (False, True):
        model = bf16_model()
        sampler, device = Sampler(model, {0}), torch.device(DEVICE)
        policy = engine.Policy(model, None, sampler, {0}, 0, 500, device, "qwen")
        trainer = Trainer(policy, 200, offload=offload, checkpointing=True)
        for _ in range(3):
            backward(trainer, *random_rows(12), factor=-1 / 100)
            trainer.step(1e-4, 1.0)
        moved = []
        for name, master in trainer.masters.items():
            weight = trainer.params[name].cpu()
            assert torch.equal(weight, master.to(torch.bfloat16).cpu())
            before = start[name].float().cpu()
            moved.append((master.cpu() - before).flatten())
        moves.append(torch.cat(moved))
    assert (moves[0] - moves[1]).norm() < 0.05 * moves[0].norm()


def test_a_run_on_the_gpu_and_its_resume(tmp_path):
    out = tmp_path / "run"
    argv = (
        f"--device {DEVICE} --steps 4 --save-every 2 --keep 2 --questions-per-step 2 "
        f"--max-new-tokens 40 --eval-limit 8 --out {out}"
    ).split()
    assert edge_grpo.main(argv) == 0
    before = json_lines(out / "metrics.jsonl")
    assert len(before) == 4
    for m in before:
        assert m["logprob_gap"] < 0.05
        assert math.isfinite(m["grad_norm"])
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints" / "step-4")
    assert edge_grpo.main([*argv, "--resume"]) == 0
    after = json_lines(out / "metrics.jsonl")
    assert after[:2] == before[:2]
    assert [m["step"] for m in after] == [1, 2, 3, 4]
    assert (out / "final" / "model.safetensors").exists()
