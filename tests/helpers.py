"""What several test files share: small random models, rows for them, a few steps of training."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import engine
from engine.trainer import Trainer
from rollout import Sampler


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
    r = random.Random(seed)
    rows = [
        tuple(
            [r.randrange(1, vocab) for _ in range(r.randint(*length))]
            for length in (prompt, response)
        )
        for _ in range(n)
    ]
    return [p for p, _ in rows], [x for _, x in rows]


def shared_rows(prompts=5, n=30, seed=1, vocab=60):
    """Rows of which several have the same prompt, not always side by side; one prompt and some responses of one token,
    an empty response, and a long prompt that begins another."""
    few, _ = random_rows(prompts, seed, vocab)
    few[0], few[1], few[2] = few[0][:1], few[1] * 3, few[1] * 3 + few[2]
    _, responses = random_rows(n, seed + 1, vocab)
    responses[3], responses[4] = [], responses[4][:1]
    return sorted((few * n)[: n - 3]) + few[:3], responses


@dataclass
class Weights:
    """The least that a loss can want to know of each token."""

    weights: Tensor  # (T,) of a response, (M,) of a micro-batch


def backward(trainer, prompts, responses, factor=1.0):
    """The gradient of `factor` times the sum of all log-probabilities; returns what forward_backward returns."""
    tokens = [Weights(torch.full((len(r),), factor)) for r in responses]
    return trainer.forward_backward(
        prompts, responses, tokens, lambda logp, _, t: (t.weights * logp).sum()
    )


def train_steps(policy, steps, lr, offload=False, checkpointing=False, rows=12):
    """Likelihood training on fixed rows; returns the trainer."""
    trainer = Trainer(policy, 200, offload=offload, checkpointing=checkpointing)
    for _ in range(steps):
        backward(trainer, *random_rows(rows), factor=-1 / 100)
        trainer.step(lr, 1.0)
    return trainer


SHAPE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    vocab_size=64,
    max_position_embeddings=256,
    pad_token_id=None,
)
MODELS = {  # name: (class, config, whether its batches are packed)
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE, num_key_value_heads=2), True),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16), True),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            **SHAPE,
            num_key_value_heads=4,
            rope_parameters=dict(
                rope_type="llama3",
                rope_theta=1e4,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=64,
            ),
        ),
        True,
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=None),
        True,
    ),
    "window": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8),
        False,
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=None,
        ),
        False,
    ),
}
