"""What several test files share: files and commands, small models and rows for them, groups of
responses, a step."""

import copy
import json
import math
import random
from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import data
import edge_grpo as eg
import engine
from data import Problem
from engine.forward import make_batch
from engine.trainer import Trainer
from rollout import Sampler

# --- Files and commands ----------------------------------------------------------------------


def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_problems(path, problems):
    rows = []
    for p in problems:
        rows.append(dict(problem=p.question, answer=p.answers[0], solution=p.solution))
    return write_lines(path, rows)


def refusal(capfd, main, argv):
    """The sentence, alone on stderr, of a command that is refused."""
    capfd.readouterr()
    assert main([str(word) for word in argv]) == 2
    text = capfd.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1 and len(text) < 700, text
    return text


def equal(ours, theirs):
    """Whether two dicts of tensors are the same, bit for bit."""
    return all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)


# --- Small random models and rows for them ---------------------------------------------------


def small_policy(dtype=torch.float32, hidden=32, layers=2, vocab=64, inner=64, seed=0, tied=True):
    torch.manual_seed(seed)
    config = Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
    )
    model = Qwen2ForCausalLM(config).to(dtype).eval()
    return engine.Policy(
        model, None, Sampler(model, {0}), {0}, 0, vocab, torch.device("cpu"), "qwen"
    )


def random_rows(n, seed=0, vocab=64, prompt=(3, 20), response=(1, 60)):
    """n prompts and n responses of random ids and of lengths in these ranges."""
    r = random.Random(seed)
    rows = []
    for _ in range(n):
        for length in (prompt, response):
            rows.append([r.randrange(1, vocab) for _ in range(r.randint(*length))])
    return rows[::2], rows[1::2]


def shared_rows(prompts=5, n=30, seed=1, vocab=60):
    """Rows of which several have the same prompt, not always side by side. Some prompts and
    responses have one token, one response is empty, and a long prompt begins another."""
    few, _ = random_rows(prompts, seed, vocab)
    few[0], few[1], few[2] = few[0][:1], few[1] * 3, few[1] * 3 + few[2]
    _, responses = random_rows(n, seed + 1, vocab)
    responses[3], responses[4] = [], responses[4][:1]
    return sorted((few * n)[: n - 3]) + few[:3], responses


def one_batch(prompts, responses, device="cpu", packed=True):
    """All rows as a single micro-batch."""
    return make_batch(prompts, responses, [i for i, r in enumerate(responses) if r], device, packed)


def backward(trainer, prompts, responses, factor=1.0):
    """Adds the gradient of `factor` times the sum of all log-probabilities. Returns each row's
    (logp, entropy)."""
    by_row = {}
    for batch in trainer.micro_batches(prompts, responses):
        logp, entropy = trainer.forward(batch)
        trainer.backward(factor * logp.sum())
        by_row |= batch.by_row(logp, entropy)
    return [by_row.get(row, (torch.zeros(0), torch.zeros(0))) for row in range(len(responses))]


def train_steps(policy, steps, lr, offload=False, checkpointing=False, rows=12):
    """Likelihood training on fixed rows; returns the trainer."""
    trainer = Trainer(policy, 200, offload=offload, checkpointing=checkpointing)
    for _ in range(steps):
        backward(trainer, *random_rows(rows), factor=-1 / 100)
        trainer.step(lr, 1.0)
    return trainer


SHAPE = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    pad_token_id=None,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA_3_ROPE = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
GQA = dict(num_key_value_heads=2)
WINDOW = dict(**GQA, sliding_window=6)
FAMILIES = {  # name: (model type, what its config has beyond SHAPE)
    "qwen2": ("qwen2", GQA),
    "qwen3": ("qwen3", dict(**GQA, head_dim=32, tie_word_embeddings=True)),
    "llama": ("llama", dict(attention_bias=True, mlp_bias=True, rope_parameters=LLAMA_3_ROPE)),
    "mistral": ("mistral", dict(num_key_value_heads=1, sliding_window=None)),
    "mistral_window": ("mistral", WINDOW),
    "qwen2_window": ("qwen2", dict(**WINDOW, use_sliding_window=True, max_window_layers=1)),
    "gemma2": ("gemma2", dict(**WINDOW, head_dim=16, query_pre_attn_scalar=16)),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "mamba": ("mamba", dict(hidden_size=32)),
}
LLAMA_FAMILY = ("qwen2", "qwen3", "llama", "mistral")  # whose layers run_layers computes


def config_of(name, **changes):
    kind, own = FAMILIES.get(name, (name, {}))
    return AutoConfig.for_model(kind, **SHAPE | own | changes)


def random_model(name, noise=0.0, **changes):
    """Random weights, with noise so large that distributions are far from flat."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model


# --- Groups of responses, and a step of training on them -------------------------------------


def flags_of(line=""):
    return eg.parse_flags(line.split())


def response(accuracy=0.0, ids=(5, 6, 7), injected=None, **more):
    """A finished response of which everything is known."""
    n = len(ids)
    injected = [False] * n if injected is None else list(injected)
    of_row = dict(sampler_logp=[-0.5] * n, entropies=[0.3] * n, finished=True, format=1.0)
    return eg.Response(list(ids), injected, accuracy=accuracy, **of_row | more)


def group_of(responses, number=0, problem=Problem("1+1?", ("2",), "\\boxed{2}", "x:1"), **more):
    return eg.Group(number, problem, [1, 2], sampled=responses, responses=responses, **more)


def rows_of(groups):
    """(prompt, response) of all that is trained on."""
    return [(group.prompt, r) for group in groups for r in group.responses]


def sampled_groups(policy, flags, problems, step=0):
    groups = eg.sample(policy, problems, flags, step)
    eg.grade(policy, groups)
    return groups


def wrong_and_right(policy):
    """Five graded groups of 8, of which each fourth response is right; each second one is cut by
    the limit, so it has no end token."""
    made = []
    for number, problem in enumerate(data.load("tiny:1-3")[:5]):
        rows = []
        for k in range(8):
            answer = "1000" if k % 4 else data.gold_text(problem)
            ids = policy.encode(f"(1)1+1=2\nThe answer is \\boxed{{{answer}}}")
            finished = k % 2 == 0
            if finished:
                ids = ids + [policy.end_id]
            rows.append(response(k % 4 == 0, ids, entropies=[math.nan] * len(ids)))
            rows[k].finished = finished
        made.append(group_of(rows, number, problem))
        made[number].prompt = policy.prompt_ids(problem.question)
    return made


def corrected_groups(policy, line="", step=4):
    """The same after GEC, graded again."""
    groups = wrong_and_right(policy)
    eg.correct_errors(policy, groups, flags_of(line), step)
    eg.grade(policy, groups)
    return groups


def own_copy(policy):
    """The policy with weights of its own, so that a test may train it."""
    return replace(policy, model=copy.deepcopy(policy.model))


def trainer_of(policy, flags, **more):
    """A trainer as a run makes it."""
    return Trainer(
        policy,
        flags.micro_batch_tokens,
        temperature=1.0 if flags.sft else flags.temperature,
        entropy_grad=flags.eda_grad,
        betas=tuple(flags.betas),
        weight_decay=flags.weight_decay,
        offload=flags.offload_optimizer,
        checkpointing=flags.gradient_checkpointing,
        **more,
    )


def logprobs_of(trainer, groups):
    rows = rows_of(groups)
    return trainer.logprobs([prompt for prompt, _ in rows], [r.ids for _, r in rows])


def train_step(trainer, groups, flags, lr=1e-3):
    """From graded groups to new weights, in the order of edge_grpo.train. Returns the step's
    numbers and the gradient of each update, {name: tensor}."""
    gradients, step = [], trainer.step

    def keep_gradient(lr, clip):
        gradients.append({name: p.grad.clone() for name, p in trainer.params.items()})
        return step(lr, clip)

    trainer.step = keep_gradient
    for group in groups:
        group.A = group.A_hat = eg.advantages(group, flags)
    if flags.eda:
        eg.fill_in_entropies(trainer, groups)
        for group in groups:
            group.P = eg.group_entropy(group)
            group.A_hat = eg.eda(group, group.P, flags)
    update = eg.sft_update if flags.sft else eg.update
    return update(trainer, groups, flags, lr=lr), gradients
