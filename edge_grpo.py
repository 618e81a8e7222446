"""EDGE-GRPO: group-relative policy optimisation with Guided Error Correction (GEC) and Entropy-Driven Advantages (EDA).

The method of arXiv 2507.21848 in plain PyTorch, in one file, in the order of the paper: the flags, what a response is,
group advantages, EDA, GEC, the loss, the training loop. The pieces live beside it: rollout.py samples, reward.py
grades, entropy.py scores tokens, engine.py holds weights, optimizer and checkpoints, eval.py measures.

    python edge_grpo.py                                    # the tiny model on CPU, about a minute
    python edge_grpo.py --model Qwen2.5-Math-7B            # the paper's run
    python edge_grpo.py --method grpo --seed 1             # a baseline; --help lists every flag

Departures from the released code (where it departs from the paper, or hides a constant) are listed in README.md.

Letters: B responses in a step = Q questions x G, T response length. Tensors named x_B or (Q, G) say their axes.
"""
import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import IO

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

import data
import engine
import eval as evaluation
import reward
from data import Problem, UserError
from entropy import mean_entropy
from engine import stream

# --- Flags -----------------------------------------------------------------------------------------------------------

METHODS = {                      # the rows of the paper's table, each a set of flags
    "edge-grpo":   dict(correction="guided", eda=True, sft=False),
    "force-r-eda": dict(correction="reflect", eda=True, sft=False),
    "force-r":     dict(correction="reflect", eda=False, sft=False),
    "grpo":        dict(correction="none", eda=False, sft=False),
    "sft":         dict(correction="none", eda=False, sft=True),
}
TINY = dict(                     # what `--model tiny` overrides of the paper's settings below
    data="tiny:5-8", steps=100, questions_per_step=8, lr=1e-4, betas=[0.9, 0.99], max_new_tokens=128,
    correction_tokens=128, micro_batch_tokens=2048, gradient_checkpointing=False, save_every=50,
    eval_tasks=["tiny:5-8:validation", "tiny:1-3:validation"], eval_temperature=0.0, eval_max_new_tokens=160,
)


def flag(default, help: str, low=None, high=None, choices=None):
    """A dataclass field with its one line of help and the closed range of its values."""
    factory = dict(default_factory=lambda: list(default)) if isinstance(default, list) else dict(default=default)
    return field(**factory, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Flags:
    """Every setting of a run. The defaults are the paper's (its released script where the paper is silent)."""
    model: str = flag("tiny", "`tiny`, a local model folder, a hub id, or a bare Qwen or Llama name")
    data: str = flag("deepscaler-hard-1k", "training problems: a set, tiny:STEPS[:SPLIT[:STYLE]], or a JSON/JSONL file")
    method: str = flag("edge-grpo", "a row of flags: sets --correction, --eda and --sft", choices=list(METHODS))
    correction: str = flag("guided", "GEC on wrong responses (reflect: Force-R)", choices=["none", "reflect", "guided"])
    eda: bool = flag(True, "divide advantages by the relative entropy of their response (Eq. 6-7)")
    sft: bool = flag(False, "no sampling: supervised fine-tuning on the reference solutions")
    eda_grad: bool = flag(False, "let the gradient flow through the entropies of EDA, as the released code does")
    eda_clamp: list[float] = flag([], "bounds LO HI of the relative entropy in EDA (default: only a tiny floor)")
    guided_probs: list[float] = flag([0.5, 0.25, 0.25], "GEC: probabilities of reflect, answer, reference", 0, 1)
    injected_weight: float = flag(1.0, "loss weight of injected tokens: 1 as if sampled (paper), 0 masks them", 0)
    loss: str = flag("sequence", "normalisation: sequence (1/B sum 1/|o|), token, or constant (Dr. GRPO)",
                     choices=["sequence", "token", "constant"])
    eps_low: float = flag(0.2, "clip range of the ratio below 1", 0, 1)
    eps_high: float = flag(0.2, "clip range of the ratio above 1", 0)
    kl: float = flag(0.0, "weight of the KL penalty to the initial model, which is kept in memory only if > 0", 0)
    updates_per_rollout: int = flag(1, "optimizer updates on each rollout; above 1 the ratios differ from 1", 1)
    format_weight: float = flag(0.0, "weight of the format reward (closed, non-empty box; constant in the release)", 0)
    questions_per_step: int = flag(1, "questions in a step", 1)
    group_size: int = flag(8, "responses per question, G", 1)
    steps: int = flag(1000, "training steps (rollouts)", 1)
    lr: float = flag(1e-6, "peak learning rate; it falls linearly to 0, without warm-up", 0)
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas", 0, 1)
    weight_decay: float = flag(0.0, "AdamW's weight decay", 0)
    grad_clip: float = flag(1.0, "clip the gradient to this norm; 0: no clipping", 0)
    temperature: float = flag(0.6, "sampling temperature, also of every log-probability and entropy", 1e-3)
    top_p: float = flag(1.0, "nucleus sampling", 1e-6, 1)
    max_prompt_tokens: int = flag(512, "problems with a longer prompt, or one that fills the model's context, are left "
                                  "out, and counted", 1)
    max_new_tokens: int = flag(1024, "tokens sampled per response", 1)
    correction_tokens: int = flag(256, "tokens sampled after a reflection phrase", 0)
    max_corrected_tokens: int = flag(0, "cut corrected responses to this length; 0: only to the model's context", 0)
    micro_batch_tokens: int = flag(8192, "tokens in one forward and backward pass, each response with its prompt", 1)
    max_rows: int = flag(0, "rows sampled at a time; 0: as many as fit the memory", 0)
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass")
    offload_optimizer: bool = flag(False, "keep master weights and moments in CPU memory")
    seed: int = flag(42, "seed of everything", 0)
    out: str = flag("", "the run's folder (default: runs/MODEL-METHOD-seedN)")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out; without a run there, start one")
    overwrite: bool = flag(False, "delete an existing run in --out first")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end", 0)
    keep: int = flag(1, "newest checkpoints kept", 1)
    max_bad_steps: int = flag(5, "stop after this many steps in a row without a finite gradient", 1)
    eval_every: int = flag(0, "steps between evaluations; 0: before the first step and after the last", 0)
    eval_tasks: list[str] = flag([], "held-out problems evaluated during training (see eval.py --tasks)")
    eval_limit: int = flag(0, "problems of each of these tasks; 0: all", 0)
    eval_n: int = flag(1, "responses per problem in these evaluations", 1)
    eval_temperature: float = flag(0.1, "temperature of these evaluations; 0: greedy", 0)
    eval_max_new_tokens: int = flag(3000, "tokens per response there, with its prompt at most 4096", 1)
    template: str = flag("auto", "prompt form", choices=["auto", "qwen", "llama"])
    mirror: str = flag("", "a folder or base address that holds the downloads instead of their public addresses")
    trust_remote_code: bool = flag(False, "allow a model to bring its own code")


LISTS = {"eda_clamp": (float, ("LO", "HI")), "guided_probs": (float, ("REFLECT", "ANSWER", "REFERENCE")),
         "betas": (float, ("B1", "B2")), "eval_tasks": (str, "TASK")}
MAY_CHANGE_ON_RESUME = {"resume", "overwrite", "device", "out", "save_every", "keep", "max_bad_steps", "mirror",
                        "max_rows", "micro_batch_tokens", "gradient_checkpointing", "offload_optimizer"}  # memory only


def option(name: str) -> str:
    """A field of Flags as it is written on the command line."""
    return "--" + name.replace("_", "-")


def make_parser(defaults: dict) -> argparse.ArgumentParser:
    """One option for each field of Flags; `defaults` overrides some of theirs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="python edge_grpo.py [flags]", allow_abbrev=False)
    parser.error = engine.wrong_flag
    for f in fields(Flags):
        value = defaults.get(f.name, getattr(Flags(), f.name))
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        options = dict(help=f"{f.metadata['help']} [{shown}]".replace("%", "%%"), default=value)
        if f.name in LISTS:
            kind, names = LISTS[f.name]
            options.update(type=kind, metavar=names, nargs=len(names) if isinstance(names, tuple) else "*")
        elif f.type is bool:
            options.update(action=argparse.BooleanOptionalAction)
        else:
            choices = f.metadata["choices"]
            options.update(type=f.type, choices=choices, metavar=None if choices else f.type.__name__.upper())
        parser.add_argument(option(f.name), **options)
    return parser


def parse_flags(argv: list[str]) -> Flags:
    """Defaults, then the tiny profile (for `--model tiny`), then the method's row, then the flags as given."""
    first, _ = make_parser({}).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    defaults = {**(TINY if first.model == "tiny" else {}), **METHODS[first.method]}
    flags = Flags(**vars(make_parser(defaults).parse_args(argv)))
    if not flags.out:
        flags.out = f"runs/{Path(flags.model).name}-{flags.method}-seed{flags.seed}"
    check_flags(flags)
    return flags


def check_flags(flags: Flags) -> None:
    """UserError for a value out of range or flags in conflict."""
    for f in fields(Flags):
        value, low, high, name = getattr(flags, f.name), f.metadata["low"], f.metadata["high"], option(f.name)
        for v in value if isinstance(value, list) else [value]:
            if isinstance(v, float) and not math.isfinite(v):
                raise UserError(f"{name} {v}: must be a finite number")
            if low is not None and v < low or high is not None and v > high:
                bounds = f"at least {low}" if high is None else f"between {low} and {high}"
                raise UserError(f"{name} {v}: must be {bounds}")
    lo_hi, probs = flags.eda_clamp, flags.guided_probs
    if lo_hi and not 0 < lo_hi[0] < lo_hi[1]:
        raise UserError(f"--eda-clamp {lo_hi[0]} {lo_hi[1]}: needs 0 < LO < HI")
    if lo_hi and not flags.eda:
        raise UserError("--eda-clamp bounds EDA, which is off: add --eda, or drop --eda-clamp")
    if probs != Flags().guided_probs and flags.correction != "guided":
        raise UserError("--guided-probs belongs to --correction guided: add that, or drop --guided-probs")
    if abs(sum(probs) - 1) > 1e-6:
        raise UserError(f"--guided-probs {' '.join(map(str, probs))}: must sum to 1, not {sum(probs):g}")
    if max(flags.betas) >= 1:
        raise UserError(f"--betas {flags.betas[0]} {flags.betas[1]}: must be below 1")
    if flags.eda_grad and not flags.eda:
        raise UserError("--eda-grad needs EDA: add --eda, or drop --eda-grad")
    if flags.eda_grad and flags.updates_per_rollout > 1:
        raise UserError("--eda-grad is defined for one update per rollout: set --updates-per-rollout 1")
    if flags.sft and (flags.correction != "none" or flags.eda):
        raise UserError("--sft samples nothing, so there is nothing to correct or weigh: use --correction none "
                        "--no-eda")
    if flags.sft and flags.kl:
        raise UserError("--sft has no KL penalty: set --kl 0")
    if flags.sft and flags.injected_weight != 1:
        raise UserError("--sft trains on references alone, with weight 1: drop --injected-weight")
    if flags.resume and flags.overwrite:
        raise UserError("--resume goes on with a run, --overwrite deletes it: give one of the two")


# --- Responses -------------------------------------------------------------------------------------------------------

@dataclass
class Response:
    """One response to one problem, in token ids. Text is made from ids, never ids from text that came from ids."""
    problem: Problem
    prompt: list[int]
    ids: list[int]                          # the end token included, once finished
    injected: list[bool]                    # origin of each token: False sampled by the policy, True put there by GEC
    logprobs: list[float]                   # the sampler's log-probability of each token; NaN where injected
    entropies: list[float]                  # and the policy's entropy there; NaN where injected, until it is scored
    finished: bool = False                  # ended by an end token, not cut by a limit
    correction: str = ""                    # "", "reflect", "answer" or "reference"
    text: str = ""                          # of ids, once graded
    accuracy: float | None = None           # 0.0 or 1.0 once graded
    format: float | None = None
    logp: Tensor | None = None              # (T,) the trainer's log-probabilities, from the first update's forward


# Every random choice of a run is `stream` of (seed, step, what, row), so nothing random needs to be saved, and the
# number of processes changes nothing.

def batch_of_problems(problems: list[Problem], flags: Flags, step: int) -> list[Problem]:
    """The problems of a step: consecutive items of an endless sequence of shuffled epochs."""
    batch = []
    for k in range(step * flags.questions_per_step, (step + 1) * flags.questions_per_step):
        epoch, i = divmod(k, len(problems))
        shuffling = torch.Generator().manual_seed(stream(flags.seed, "epoch", epoch))
        batch.append(problems[torch.randperm(len(problems), generator=shuffling)[i]])
    return batch


def sample(policy: engine.Policy, problems: list[Problem], flags: Flags, step: int) -> list[Response]:
    """G responses to each of Q problems, question-major: Q x G."""
    responses = []
    for problem in problems:
        prompt = policy.prompt_ids(problem.question)
        responses += [Response(problem, prompt, [], [], [], []) for _ in range(flags.group_size)]
    extend(policy, dict(enumerate(responses)), flags.max_new_tokens, flags, (step, "sample"))
    return responses


def room(policy: engine.Policy, prompt: list[int]) -> int:
    """How many tokens the model's positions leave for a response."""
    return max(0, policy.context() - len(prompt))


def extend(policy: engine.Policy, responses: dict[int, Response], limit: int, flags: Flags, key: tuple) -> None:
    """Let the policy continue each response (by its row in the step) in place, by at most `limit` tokens; they are
    spread over the processes."""
    requests = []
    for row, r in responses.items():
        ids = r.prompt + r.ids
        requests.append((ids, min(limit, room(policy, ids)), stream(flags.seed, *key, row)))

    def run(mine):
        if not mine:
            return []
        prompts, most, seeds = map(list, zip(*mine))
        samples = policy.sampler.sample(prompts, 1, most, flags.temperature, seeds, flags.top_p)
        return [s[0] for s in samples]

    with sampling(flags):
        samples = engine.spread(requests, lambda mine: engine.halve_rows_on_oom(policy, run, mine))
    for r, s in zip(responses.values(), samples):
        r.ids, r.logprobs, r.entropies = r.ids + s.ids, r.logprobs + s.logprobs, r.entropies + s.entropies
        r.injected, r.finished = r.injected + [False] * len(s.ids), s.finished


def references(policy: engine.Policy, problems: list[Problem]) -> list[Response]:
    """SFT: the reference solution of each problem, as a response whose every token is injected."""
    responses = [replaced(Response(p, policy.prompt_ids(p.question), [], [], [], []), "reference", policy)
                 for p in problems]
    for r in responses:
        cut(r, room(policy, r.prompt))
    return responses


def grade(policy: engine.Policy, responses: list[Response]) -> None:
    """Format and accuracy of the responses that have none yet."""
    new = [r for r in responses if r.accuracy is None]
    for r in new:
        r.text = policy.decode(r.ids)
    texts = [(r.text, list(r.problem.answers)) for r in new]
    scores = engine.spread(texts, lambda mine: reward.score_all([t for t, _ in mine], [g for _, g in mine]))
    for r, (well_formed, accuracy) in zip(new, scores):
        r.format, r.accuracy = well_formed, accuracy


def rewards(responses: list[Response], flags: Flags) -> Tensor:
    """(Q, G): accuracy + w x format."""
    values = [r.accuracy + flags.format_weight * r.format for r in responses]
    return torch.tensor(values, dtype=torch.float64).view(-1, 1 if flags.sft else flags.group_size)


# --- Group advantages (GRPO) -----------------------------------------------------------------------------------------

def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean_j r_j) / (std_j r_j + eps), j over the group; (Q, G) -> (Q, G).

    std is unbiased (n - 1); a group of one has no spread, so its advantage is 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[1] == 1:
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


# --- Entropy-Driven Advantage (EDA) ----------------------------------------------------------------------------------

TINY_FLOOR = 1e-4        # of the relative entropy, so that a response of one repeated token cannot blow up the step


def score(model: nn.Module, policy: engine.Policy, responses: list[Response],
          flags: Flags) -> list[tuple[Tensor, Tensor]]:
    """(logp (T,), entropy (T,)) of each response under `model`, at the temperature it was sampled with; no gradient."""
    temperature = 1.0 if flags.sft else flags.temperature
    return engine.response_logprobs(model, [r.prompt for r in responses], [r.ids for r in responses], temperature,
                                    policy.vocab_size, flags.micro_batch_tokens)


def score_injected(policy: engine.Policy, responses: list[Response], flags: Flags) -> None:
    """A forward pass over the rows that hold injected tokens, for their entropies. Those of all other rows are known
    from sampling: to score them too would take 14% of a step (tests/bench_step.py --score)."""
    new = [r for r in responses if any(math.isnan(h) for h in r.entropies)]
    scored = engine.spread(new, lambda mine: score(policy.model, policy, mine, flags))
    for r, (_, entropy) in zip(new, scored):
        r.entropies = entropy.tolist()


def response_entropy(responses: list[Response], group_size: int) -> Tensor:
    """Eq. 3: P_i = 1/|o_i| sum_t H_t over the response's own tokens, (Q, G); an empty response has P = 0."""
    return mean_entropy([torch.tensor(r.entropies) for r in responses]).double().view(-1, group_size)


def entropy_driven_advantages(advantages: Tensor, response_entropy: Tensor,
                              clamp: tuple[float, float] | list[float] | None = None) -> Tensor:
    """Eq. 6-7: P^_i = P_i / mean_j P_j over the group, A^_i = A_i / P^_i; (Q, G), (Q, G) -> (Q, G).

    Confident and right: rewarded more. Confident and wrong: punished more. `clamp` = (lo, hi) bounds P^; without it
    there is only a tiny floor. A group without any entropy keeps its advantages.
    """
    mean = response_entropy.mean(dim=1, keepdim=True)
    relative = torch.where(mean > 0, response_entropy / mean.clamp(min=1e-30), torch.ones_like(response_entropy))
    lo, hi = clamp if clamp else (TINY_FLOOR, None)
    return advantages / relative.clamp(lo, hi)


# --- Guided Error Correction (GEC) -----------------------------------------------------------------------------------

REFLECT = " Wait! Something is wrong here."
ANSWER = "\nWait! Something is wrong here. After verification, the correct answer is \\boxed{{{}}}."
BRANCHES = ("reflect", "answer", "reference")


def branch_probabilities(flags: Flags) -> list[float]:
    """Of reflect, answer, reference, for a wrong response. Force-R is the first branch with p = 1."""
    return {"none": [0, 0, 0], "reflect": [1, 0, 0], "guided": flags.guided_probs}[flags.correction]


def draw_branch(probabilities: list[float], u: float) -> str:
    """The branch that u in [0, 1) falls into; "" if it falls into none."""
    for branch, p in zip(BRANCHES, probabilities):
        if u < p:
            return branch
        u -= p
    return BRANCHES[-1] if sum(probabilities) > 0.5 else ""         # only rounding can leave u here if they sum to 1


def replaced(response: Response, branch: str, policy: engine.Policy) -> Response:
    """The edited copy of a response. Its own tokens stay as they were sampled; what is added is marked injected.

    reflect: + REFLECT, left open for the policy to go on. answer: + ANSWER with the gold + end token.
    reference: the reference solution + end token instead of the response.
    """
    kept = len(response.ids) - response.finished                   # without the end token
    if branch == "reference":
        kept, text = 0, response.problem.solution
    else:
        text = REFLECT if branch == "reflect" else ANSWER.format(data.gold_text(response.problem))
    added = policy.encode(text) + ([] if branch == "reflect" else [policy.end_id])
    return Response(response.problem, response.prompt, response.ids[:kept] + added,
                    response.injected[:kept] + [True] * len(added),
                    response.logprobs[:kept] + [float("nan")] * len(added),
                    response.entropies[:kept] + [float("nan")] * len(added),
                    finished=branch != "reflect", correction=branch)


def correct_errors(policy: engine.Policy, responses: list[Response], flags: Flags, step: int) -> list[Response]:
    """One independent draw for each wrong response, one pass, no re-check; right responses are passed on untouched."""
    probabilities = branch_probabilities(flags)
    corrected = list(responses)
    for row, r in enumerate(responses):
        branch = draw_branch(probabilities, stream(flags.seed, step, "branch", row) / 2**63)
        if r.accuracy == 0 and branch:
            corrected[row] = replaced(r, branch, policy)
    reflected = {row: r for row, r in enumerate(corrected) if r.correction == "reflect"}
    extend(policy, reflected, flags.correction_tokens, flags, (step, "reflect"))
    for r in corrected:
        most = room(policy, r.prompt)
        cut(r, min(flags.max_corrected_tokens or most, most))
    return corrected


def cut(response: Response, limit: int) -> None:
    """Cut a corrected response to `limit` tokens, in place."""
    if response.correction and len(response.ids) > limit:
        response.ids, response.injected = response.ids[:limit], response.injected[:limit]
        response.logprobs, response.entropies = response.logprobs[:limit], response.entropies[:limit]
        response.finished = False


# --- The loss and the update -----------------------------------------------------------------------------------------

def clipped_surrogate(logp: Tensor, old_logp: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) per token, rho = exp(logp - old_logp); shapes broadcast."""
    ratio = torch.exp(logp - old_logp)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def token_weights(lengths: list[int], reduction: str, longest: int) -> list[float]:
    """Weight in the step's loss of each token of row i: sequence 1/(B |o_i|), token 1/sum_j |o_j|, constant
    1/(B longest)."""
    B, total = len(lengths), max(sum(lengths), 1)
    return [{"sequence": 1 / (B * max(n, 1)), "token": 1 / total, "constant": 1 / (B * longest)}[reduction]
            for n in lengths]


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, eps_low: float = 0.2,
                eps_high: float = 0.2, reduction: str = "sequence") -> Tensor:
    """The clipped loss of padded rows: (B, T), (B, T), (B,), (B, T) -> scalar.

    reduction: "sequence" 1/B sum_i 1/|o_i| sum_t, "token" sum / sum mask, "constant" sum / (B T) (Dr. GRPO).
    """
    surrogate = clipped_surrogate(logp, old_logp, advantages[:, None], eps_low, eps_high)           # (B, T)
    lengths = mask.sum(dim=1).long().tolist()
    weights = torch.tensor(token_weights(lengths, reduction, mask.shape[1]), dtype=logp.dtype, device=logp.device)
    return (surrogate.masked_fill(mask == 0, 0.0) * weights[:, None]).sum()


def kl_penalty(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1, d = reference_logp - logp."""
    d = reference_logp - logp
    return torch.exp(d) - d - 1


def entropy_gradient(A: Tensor, P: Tensor, row_weights: Tensor, flags: Flags) -> Tensor:
    """--eda-grad: dL/dP_i, (Q, G), of L = -sum_i w_i A^_i(P), the loss where every ratio is 1; w_i: a row's weight."""
    P = P.clone().requires_grad_()
    loss = -(row_weights * entropy_driven_advantages(A, P, flags.eda_clamp or None)).sum()
    return torch.autograd.grad(loss, P)[0]


def update(trainer: engine.Trainer, reference: nn.Module | None, responses: list[Response], A: Tensor, A_hat: Tensor,
           P: Tensor, flags: Flags, lr: float) -> dict:
    """The step's optimizer updates on all B responses; the gradient does not depend on the cut into micro-batches.

    Each row gets its weight in the whole step's loss first; micro-batches and processes then only add up. The first
    update's forward also tells the responses' `logp`, and entropies that are not known yet.
    Returns loss and gradient norm (means over the updates) and how many updates were skipped as not finite.
    """
    lengths = [len(r.ids) for r in responses]
    row_weights = token_weights(lengths, flags.loss, flags.max_new_tokens)
    weights = [[w * (flags.injected_weight if x and not flags.sft else 1.0) for x in r.injected]
               for w, r in zip(row_weights, responses)]
    columns = dict(weight=weights, advantage=[[a] * n for a, n in zip(A_hat.flatten().tolist(), lengths)])
    if flags.eda_grad:
        slope = entropy_gradient(A, P, torch.tensor([sum(w) for w in weights]).view_as(A), flags)
        columns["entropy_weight"] = [[g / max(n, 1)] * n for g, n in zip(slope.flatten().tolist(), lengths)]
    share = slice(engine.rank(), None, engine.world_size())                # this process's rows
    mine, columns = responses[share], {name: values[share] for name, values in columns.items()}
    if flags.kl:
        columns["reference_logp"] = [logp for logp, _ in score(reference, trainer.policy, mine, flags)]
    losses, norms, bad = [], [], 0
    for k in range(flags.updates_per_rollout):
        loss, scored = engine.halve_batch_on_oom(trainer, lambda: gradients(trainer, mine, columns, flags))
        if k == 0:                                                         # still the policy that sampled
            columns["old_logp"] = [logp for logp, _ in scored]
            for r, (r.logp, entropy) in zip(responses, engine.spread(responses, lambda mine: scored)):
                r.entropies = [h if math.isnan(known) else known for known, h in zip(r.entropies, entropy.tolist())]
        norm = trainer.step(lr, flags.grad_clip) if math.isfinite(loss) else trainer.skip()
        losses, norms, bad = losses + [loss], norms + [norm], bad + (not math.isfinite(norm))
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms), "skipped_updates": bad}


def gradients(trainer: engine.Trainer, responses: list[Response], columns: dict,
              flags: Flags) -> tuple[float, list[tuple[Tensor, Tensor]]]:
    """Accumulate the gradient of the step's loss over the micro-batches; returns the loss, and of each response
    (logp (T,), entropy (T,)) under the weights as they were."""
    policy, total, scored = trainer.policy, 0.0, [(torch.zeros(0), torch.zeros(0))] * len(responses)
    batches = trainer.micro_batches([r.prompt for r in responses], [r.ids for r in responses])
    for batch, last in trainer.in_step(batches):
        temperature = 1.0 if flags.sft else flags.temperature
        logp, entropy = trainer.scorer(batch, temperature, policy.vocab_size, flags.eda_grad)           # each (M,)
        column = {name: batch.flat(values) for name, values in columns.items()}
        if flags.sft:
            token_loss = -logp
        else:       # in the first update after sampling the ratio is 1, and only its gradient matters
            old = column["old_logp"] if "old_logp" in column else logp.detach()
            token_loss = clipped_surrogate(logp, old, column["advantage"], flags.eps_low, flags.eps_high)
        if flags.kl:
            token_loss = token_loss + flags.kl * kl_penalty(logp, column["reference_logp"])
        loss = (column["weight"] * token_loss).sum()
        if flags.eda_grad:                                                  # adds a gradient, no value
            loss = loss + (column["entropy_weight"] * (entropy - entropy.detach())).sum()
        trainer.backward(loss, last)
        total += loss.item()
        for i, told in zip(batch.index, batch.by_row(logp, entropy)):
            scored[i] = told
    return sum(engine.gather(total)), scored


# --- Metrics ---------------------------------------------------------------------------------------------------------

def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def share_mixed(r_QG: Tensor) -> float:
    """Share of groups whose rewards are not all equal (1 - the advantage collapse rate)."""
    return (r_QG != r_QG[:, :1]).any(dim=1).double().mean().item()


def mean_variance(values_QG: Tensor) -> float:
    """Mean over groups of the unbiased variance inside the group; 0 for groups of one."""
    return values_QG.var(dim=1).mean().item() if values_QG.shape[1] > 1 else 0.0


def measure(responses: list[Response], corrected: list[Response], A: Tensor, A_hat: Tensor, P: Tensor,
            flags: Flags) -> dict:
    """What a step did, as one flat dict (keys of metrics.jsonl). `responses` as sampled, `corrected` as trained on."""
    r_QG = rewards(corrected, flags)
    count = {b: sum(r.correction == b for r in corrected) for b in BRANCHES}
    m = dict(reward=r_QG.mean().item(), accuracy=mean(r.accuracy for r in responses),
             accuracy_corrected=mean(r.accuracy for r in corrected), format=mean(r.format for r in responses),
             mixed_groups=share_mixed(rewards(responses, flags)), mixed_groups_corrected=share_mixed(r_QG),
             advantage_variance=mean_variance(A), advantage_variance_eda=mean_variance(A_hat),
             entropy=P.mean().item(), entropy_sampled=response_entropy(responses, P.shape[1]).mean().item(),
             response_tokens=mean(len(r.ids) for r in responses), truncated=mean(not r.finished for r in responses),
             reflected=count["reflect"], answered=count["answer"], referenced=count["reference"],
             reflect_fixed=sum(r.accuracy for r in corrected if r.correction == "reflect"),
             self_reflection=mean(REFLECT.strip() in r.text for r in responses),
             over_long=sum(len(r.ids) > flags.max_new_tokens + flags.correction_tokens for r in corrected),
             logprob_gap=logprob_gap(corrected) if flags.top_p == 1 else None)
    if flags.sft:                               # nothing was sampled, so what describes samples and groups is undefined
        for key in ("accuracy", "accuracy_corrected", "format", "mixed_groups", "mixed_groups_corrected",
                    "advantage_variance", "advantage_variance_eda", "entropy_sampled", "response_tokens", "truncated",
                    "self_reflection", "logprob_gap"):
            m[key] = None
    return m


def logprob_gap(responses: list[Response]) -> float | None:
    """Mean |log-probability by the sampler - by the trainer| of the sampled tokens among those trained on, 0 but for
    rounding; None if there are none."""
    gaps = torch.cat([(torch.tensor(r.logprobs) - r.logp).abs() for r in responses])
    sampled = gaps[~gaps.isnan()]
    return sampled.mean().item() if len(sampled) else None


def readable(step: int, responses: list[Response], corrected: list[Response], A: Tensor, A_hat: Tensor,
             P: Tensor) -> list[dict]:
    """The rows of samples.jsonl: each rollout as text, before and after correction."""
    rows = []
    for r, c, a, a_hat, p in zip(responses, corrected, *(x.flatten().tolist() for x in (A, A_hat, P))):
        row = dict(step=step, source=r.problem.source, response=r.text, accuracy=r.accuracy, tokens=len(r.ids))
        if c is not r:
            row.update(correction=c.correction, corrected=c.text, accuracy_corrected=c.accuracy)
        rows.append(row | dict(advantage=a, advantage_eda=a_hat, entropy=p))
    return rows


# --- The run's folder ------------------------------------------------------------------------------------------------

LOGS = ("metrics.jsonl", "samples.jsonl", "evals.jsonl")
RUN = ("checkpoints", "final", *LOGS, "config.json")            # all that a run writes


def open_run(flags: Flags, problems: list[Problem]) -> tuple[tuple[Path, dict] | None, IO | None]:
    """Make, clear or reopen the run's folder, which only the main process does; returns the checkpoint to go on from,
    and the lock on the folder."""
    out, found, lock = Path(flags.out), None, None
    if engine.is_main():
        lock = engine.claim(out)
        started = [name for name in RUN if (out / name).exists()]
        if started and not (flags.resume or flags.overwrite):
            raise UserError(f"--out {out}: holds a run already; give --resume to go on with it, --overwrite to delete "
                            "it, or another --out")
        if flags.overwrite:
            clear_run(out)
        found = find_checkpoint(flags, problems, out) if flags.resume else None
        for name in LOGS:                       # what was logged after the checkpoint will be logged again
            with open(out / name, "ab") as f:
                f.truncate(found[1]["logs"].get(name, 0) if found else 0)
    return engine.gather(found)[0], lock


def find_checkpoint(flags: Flags, problems: list[Problem], out: Path) -> tuple[Path, dict] | None:
    """--resume: the newest whole checkpoint of the same run, None if it was ended before its first."""
    saved = engine.checkpoint_folders(out / "checkpoints")
    if saved or (out / "config.json").exists():
        check_same_run(flags, problems, out)
    found = engine.newest_checkpoint(out / "checkpoints")
    if not found and (saved or (out / "final").exists() or checkpoints_were_deleted(out)):
        raise UserError(f"--resume {out}: no whole checkpoint is left to go on from; put one back, or start again with "
                        "--overwrite")
    for name, size in found[1]["logs"].items() if found else []:
        if not (out / name).exists() or (out / name).stat().st_size < size:
            raise UserError(f"--resume {out}: {name} is shorter than when {found[0].name} was saved; put it back, or "
                            "start again with --overwrite")
    return found


def checkpoints_were_deleted(out: Path) -> bool:
    """Whether metrics.jsonl goes on behind a step that was saved; otherwise the run ended before its first checkpoint."""
    if not (out / "config.json").exists():
        return False
    every = json.loads((out / "config.json").read_text())["flags"]["save_every"]
    lines, _ = evaluation.read_lines(out / "metrics.jsonl")
    return any(every and m["step"] % every == 0 and not m["skipped_updates"] for m in lines[:-1])


def clear_run(out: Path) -> None:
    """Delete what a run writes and what eval.py says of its model, and nothing else that stands in the folder;
    config.json, which names the run, last."""
    for name in ("eval", *RUN):
        if (out / name).is_dir():
            shutil.rmtree(out / name)
        (out / name).unlink(missing_ok=True)


def fingerprint(problems: list[Problem]) -> str:
    """Changes with any question, gold answer or solution."""
    return blake2b(repr([(p.question, p.answers, p.solution) for p in problems]).encode(), digest_size=16).hexdigest()


def check_same_run(flags: Flags, problems: list[Problem], out: Path) -> None:
    """UserError if --resume is given with flags or data that would make it another run."""
    try:
        config = json.loads((out / "config.json").read_text())
        before, same_data = dict(config["flags"]), config["problems_fingerprint"] == fingerprint(problems)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / 'config.json'}: cannot be read; start again with --overwrite") from error
    now = json.loads(json.dumps(asdict(flags)))
    changed = [f"{option(k)} was {before.get(k)}, is {now[k]}" for k in now
               if k not in MAY_CHANGE_ON_RESUME and before.get(k) != now[k]]
    if changed:
        raise UserError(f"--resume {out}: the run was started with other flags ({'; '.join(changed)}); give the same, "
                        "or another --out")
    if not same_data:
        raise UserError(f"--resume {out}: --data {flags.data} has other problems than when the run was started; put "
                        "them back, or start again with --overwrite")


def write_config(flags: Flags, policy: engine.Policy, problems: list[Problem], left_out: list[str]) -> None:
    """config.json: every flag, versions, commit, device: what is needed to run it again."""
    here = Path(__file__).parent
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:                             # a machine without git
        commit = "unknown"
    processor = platform.processor() or platform.machine()
    device = torch.cuda.get_device_name() if policy.device.type == "cuda" else processor
    versions = dict(python=platform.python_version(), torch=torch.__version__, transformers=transformers.__version__)
    config = dict(method=flags.method, seed=flags.seed, flags=asdict(flags), commit=commit,
                  versions=versions, device=f"{policy.device.type}: {device}", processes=engine.world_size(),
                  threads=torch.get_num_threads(), parameters=sum(p.numel() for p in policy.model.parameters()),
                  problems=len(problems), problems_fingerprint=fingerprint(problems), problems_left_out=left_out)
    unfinished = Path(flags.out) / ".config.json.unfinished"
    unfinished.write_text(json.dumps(config, indent=1) + "\n")
    unfinished.replace(Path(flags.out) / "config.json")


def append(path: Path, rows: list[dict]) -> None:
    """Append rows to a JSONL file, on the disk's side of any crash of this process."""
    if engine.is_main():
        engine.append(path, [{k: finite(v) for k, v in row.items()} for row in rows])


def finite(value: object) -> object:
    """None for NaN and infinities, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load_problems(flags: Flags, policy: engine.Policy) -> tuple[list[Problem], list[str]]:
    """The training problems that fit, and the sources of those whose prompt is too long."""
    problems = data.load(flags.data, flags.mirror or None)
    needs_solution = flags.sft or branch_probabilities(flags)[2] > 0
    for p in problems if needs_solution else []:
        if not p.solution or not p.solution.strip():
            needed_by = "--sft" if flags.sft else "the third of --guided-probs"
            raise UserError(f"{p.source}: has no reference solution, which {needed_by} needs; use data with solutions, "
                            "or --correction reflect or none, or --guided-probs .67 .33 0")
    longest = min(flags.max_prompt_tokens, room(policy, []) - 1)                # one token at least for the response
    too_long = {p.source for p in problems if len(policy.prompt_ids(p.question)) > longest}
    kept = [p for p in problems if p.source not in too_long]
    if not kept:
        raise UserError(f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
                        f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context")
    return kept, sorted(too_long)


# --- The run ---------------------------------------------------------------------------------------------------------

class Stop:
    """SIGINT and SIGTERM let the step finish and save; a second one ends the process at once.

    Not under torchrun: it passes on a signal that a job manager may have sent to every process already, so a second one
    means nothing; and it ends the processes itself, after --shutdown-timeout seconds.
    """

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number: int, frame) -> None:
        if self.signal:
            return
        self.signal, note = number, b"\nfinishing the step, then saving"
        if engine.world_size() == 1:
            note += b"; once more to stop at once"
            for n in (signal.SIGINT, signal.SIGTERM):
                signal.signal(n, signal.SIG_DFL)
        if engine.is_main():
            os.write(2, note + b"\n")                               # print may be interrupted in a print


class Clock:
    """Seconds by phase: `lap(name)` adds the time since the last lap to `name`, once the GPU has done its work."""

    def __init__(self):
        self.last, self.seconds = time.perf_counter(), {}

    def lap(self, name: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now


def load_tasks(flags: Flags) -> dict[str, list[Problem]]:
    """The held-out problems, before anything is written or trained."""
    return {task: data.load(task, flags.mirror or None)[:flags.eval_limit or None] for task in flags.eval_tasks}


def evaluate(policy: engine.Policy, tasks: dict[str, list[Problem]], flags: Flags, step: int) -> None:
    """Held-out accuracy after `step` steps, printed and appended to evals.jsonl."""
    for task, problems in tasks.items():
        with sampling(flags):
            records = evaluation.evaluate(policy, problems, n=flags.eval_n, temperature=flags.eval_temperature,
                                          max_new_tokens=flags.eval_max_new_tokens, seed=flags.seed)
        s = evaluation.summarize(records)
        append(Path(flags.out) / "evals.jsonl", [dict(
            step=step, task=task, accuracy=s["accuracy"], stderr=s["stderr"], problems=s["problems"], n=flags.eval_n,
            temperature=flags.eval_temperature, mean_length=s["mean_length"], format=s["format"],
            truncated=s["truncated"])])
        say(f"step {step}: held-out {task}: accuracy {s['accuracy']:.3f} ± {s['stderr']:.3f} "
            f"({s['problems']} problems)")
    policy.sampler.release()            # its cache took most of the free memory, which the update needs


def say(line: str) -> None:
    if engine.is_main():
        tqdm.write(line)


class Progress:
    """A bar on a terminal; elsewhere a plain line about every twentieth of the run, with the time that is left."""

    def __init__(self, steps: int, done: int):
        self.steps, self.first, self.started = steps, done, time.perf_counter()
        self.bar = tqdm(total=steps, initial=done, disable=not (engine.is_main() and sys.stderr.isatty()), unit="step")

    def show(self, line: dict) -> None:
        names = {"accuracy": "acc", "accuracy_corrected": "corrected", "mixed_groups": "mixed",
                 "mixed_groups_corrected": "mixed corrected", "entropy": "entropy", "loss": "loss"}
        text = ", ".join(f"{short} {line[k]:.2f}" for k, short in names.items() if line[k] is not None)
        text += f", {line['tokens_per_second']:.0f} tok/s"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        step = line["step"]
        if self.bar.disable and (step % max(1, self.steps // 20) == 0 or step in (self.first + 1, self.steps)):
            pace = (time.perf_counter() - self.started) / (step - self.first)
            say(f"step {step}/{self.steps}: {text}, {pace * (self.steps - step) / 60:.1f} min left")


def train(flags: Flags) -> int:
    """The whole run; returns the exit code."""
    needs, max_rows = preflight(flags)
    say(needs)
    policy = engine.load_policy(flags.model, flags.device, flags.template, max_rows, flags.trust_remote_code)
    problems, left_out = load_problems(flags, policy)
    tasks = load_tasks(flags)
    checkpoint, lock = open_run(flags, problems)                # the lock holds until this function ends
    reference = engine.frozen_copy(policy.model) if flags.kl else None
    trainer = engine.Trainer(policy, flags.micro_batch_tokens, tuple(flags.betas), weight_decay=flags.weight_decay,
                             offload=flags.offload_optimizer, checkpointing=flags.gradient_checkpointing)
    out, stop, first_step, bad_steps = Path(flags.out), Stop(), 0, 0
    if checkpoint:
        engine.load_checkpoint(trainer, *checkpoint)
        first_step, bad_steps = checkpoint[1]["step"], checkpoint[1]["bad_steps"]
        engine.prune(out / "checkpoints", first_step, keep(flags, bad_steps))      # the run may have ended amid pruning
        say(f"going on from {checkpoint[0]}")
    elif flags.resume:
        say(f"no checkpoint in {out} yet: starting at the first step")
    introduce(flags, policy, problems, left_out)
    if evaluation_due(flags, first_step):
        evaluate(policy, tasks, flags, first_step)

    progress = Progress(flags.steps, first_step)
    for step in range(first_step, flags.steps):
        clock = Clock()
        batch = batch_of_problems(problems, flags, step)                                       # Q problems
        responses = references(policy, batch) if flags.sft else sample(policy, batch, flags, step)     # Q x G
        clock.lap("sample")
        grade(policy, responses)
        clock.lap("grade")
        corrected = correct_errors(policy, responses, flags, step)          # GEC: wrong ones edited, some continued
        clock.lap("correct")
        grade(policy, corrected)
        clock.lap("grade")
        if flags.eda:
            score_injected(policy, corrected, flags)
        A = group_advantages(rewards(corrected, flags))                                        # (Q, G)
        P = response_entropy(corrected, A.shape[1])                                            # (Q, G), Eq. 3
        A_hat = entropy_driven_advantages(A, P, flags.eda_clamp or None) if flags.eda else A   # (Q, G), Eq. 6-7
        lr = flags.lr * (1 - step / flags.steps)
        stats = update(trainer, reference, corrected, A, A_hat, P, flags, lr)
        clock.lap("update")
        P = response_entropy(corrected, A.shape[1])         # without EDA injected tokens are seen by the update first

        bad_steps = bad_steps + 1 if stats["skipped_updates"] else 0
        if bad_steps:
            say(f"step {step + 1}: the loss or its gradient is not finite, so the weights stay as they are "
                f"({bad_steps} in a row)")
        line = dict(step=step + 1, **stats, lr=lr, **measure(responses, corrected, A, A_hat, P, flags),
                    **timings(clock, responses, corrected, policy))
        append(out / "metrics.jsonl", [line])
        append(out / "samples.jsonl", readable(step + 1, responses, corrected, A, A_hat, P))
        progress.show(line)
        stopping = max(engine.gather(stop.signal))
        if bad_steps >= flags.max_bad_steps:
            raise UserError(f"no finite gradient in {bad_steps} steps in a row, so the run stops; the last good "
                            f"checkpoint: {last_good(flags)}; look at --lr, --eda-clamp and the last rows of "
                            f"{out / 'samples.jsonl'}")
        due = flags.save_every and (step + 1) % flags.save_every == 0
        if stopping or due and not bad_steps or step + 1 == flags.steps:    # a bad step is no place to go back to
            save(trainer, flags, step + 1, bad_steps)
        if stopping:
            return 128 + stopping
        if evaluation_due(flags, step + 1):             # after saving: a failure here loses no step
            evaluate(policy, tasks, flags, step + 1)
    progress.bar.close()
    engine.save_final(policy, out / "final")
    evaluate(policy, tasks, flags, flags.steps)
    conclude(flags)
    return 0


def evaluation_due(flags: Flags, step: int) -> bool:
    """Whether the weights of before step + 1 are to be evaluated; `train` evaluates the final ones in any case."""
    return step == 0 or step < flags.steps and flags.eval_every > 0 and step % flags.eval_every == 0


def preflight(flags: Flags) -> tuple[str, int | None]:
    """What the run will need, before any weight is loaded; and how many rows to sample at a time (None: any number)."""
    device = engine.start_processes(flags.device)
    B = 0 if flags.sft else flags.questions_per_step * flags.group_size
    rows = min(-(-B // engine.world_size()), flags.max_rows or B)
    cuda = device.type == "cuda"
    plan = engine.memory_plan(engine.load_config(flags.model, flags.trust_remote_code), rows,
                              flags.max_prompt_tokens + flags.max_new_tokens + flags.correction_tokens,
                              flags.micro_batch_tokens, 2 if cuda else 4, flags.offload_optimizer and cuda,
                              flags.gradient_checkpointing, engine.world_size(), flags.trust_remote_code)
    if flags.kl:
        plan["reference"] = plan["weights"]
    fit = engine.rows_that_fit(plan, rows, torch.cuda.mem_get_info(device)[0]) if cuda and rows else rows
    if fit == rows:
        return engine.preflight(plan, device), flags.max_rows or None
    plan["cache"] *= fit / rows
    return engine.preflight(plan, device) + f"; sampling {fit} of {rows} rows at a time", fit


def introduce(flags: Flags, policy: engine.Policy, problems: list[Problem], left_out: list[str]) -> None:
    """Print what is in force, and write config.json."""
    if not engine.is_main():
        return
    write_config(flags, policy, problems, left_out)
    count = sum(p.numel() for p in policy.model.parameters())
    say(f"{flags.model} ({count / 1e6:.1f}M parameters) on {policy.device}, {flags.data}: {len(problems)} problems"
        + (f", {len(left_out)} left out (prompt too long)" if left_out else ""))
    say("flags: " + " ".join(f"{k}={v}" for k, v in asdict(flags).items()))
    say(f"prompt of the first problem: {policy.decode_raw(policy.prompt_ids(problems[0].question))!r}")
    if flags.correction == "guided" and flags.guided_probs[0] == 0:
        say("note: without reflections every wrong response becomes a right one, no group is mixed, and nothing is "
            "learned; give the first of --guided-probs more than 0")


def timings(clock: Clock, responses: list[Response], corrected: list[Response], policy: engine.Policy) -> dict:
    """Seconds by phase, sampled tokens per second of sampling and correcting, and peak memory so far."""
    seconds = {f"seconds_{k}": clock.seconds[k] for k in ("sample", "grade", "correct", "update")}
    sampled = sum(not x for r in responses for x in r.injected)
    for r, c in zip(responses, corrected):
        if c.correction == "reflect":               # what the policy added behind the tokens that were kept
            sampled += sum(not x for x in c.injected) - (len(r.ids) - r.finished)
    return dict(tokens_per_second=sampled / (clock.seconds["sample"] + clock.seconds["correct"]), **seconds,
                peak_memory_gib=engine.peak_memory(policy.device))


def save(trainer: engine.Trainer, flags: Flags, step: int, bad_steps: int) -> Path:
    """A checkpoint that knows how long each log was when it was written."""
    out = Path(flags.out)
    logs = {name: (out / name).stat().st_size for name in LOGS if (out / name).exists()}
    return engine.save_checkpoint(trainer, out / "checkpoints", step, dict(logs=logs, bad_steps=bad_steps),
                                  keep(flags, bad_steps))


def keep(flags: Flags, bad_steps: int) -> int:
    """How many checkpoints stay: after a bad step also the last good one."""
    return flags.keep + (bad_steps > 0)


def last_good(flags: Flags) -> str:
    """The newest checkpoint that a good update preceded, for the message of a run that stops."""
    found = engine.newest_checkpoint(Path(flags.out) / "checkpoints", lambda manifest: not manifest["bad_steps"])
    return str(found[0]) if found else "none was saved yet"


@contextmanager
def sampling(flags: Flags) -> Iterator[None]:
    """Around sampling, which refuses logits that are not finite and may lack memory: names the checkpoint left."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{error}; the newest checkpoint: {last_good(flags)}") from error


def conclude(flags: Flags) -> None:
    """Print held-out accuracy before and after, mixed groups before and after correction, and where everything is."""
    out = Path(flags.out)
    evals = [json.loads(row) for row in (out / "evals.jsonl").read_text().splitlines()]
    lines = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    for task in flags.eval_tasks:
        accuracy = {e["step"]: e["accuracy"] for e in evals if e["task"] == task}
        say(f"held-out {task}: accuracy {accuracy[0]:.3f} before, {accuracy[flags.steps]:.3f} after training")
    if not flags.sft:
        for name, part in (("first", lines[:10]), ("last", lines[-10:])):
            say(f"{name} {len(part)} steps: mixed groups {mean(m['mixed_groups'] for m in part):.2f} as sampled, "
                f"{mean(m['mixed_groups_corrected'] for m in part):.2f} after correction; sampled accuracy "
                f"{mean(m['accuracy'] for m in part):.3f}")
    say(f"the model is in {out / 'final'}, the curves in {out / 'metrics.jsonl'}; draw them: python eval.py plot {out} "
        f"--out {out}")


def main(argv: list[str] | None = None) -> int:
    try:
        with engine.one_error():
            code = train(parse_flags(sys.argv[1:] if argv is None else argv))
            engine.stop_processes()
            return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:                                         # `| head`; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: nobody reads this output any more; go on with --resume", file=sys.stderr)
        return 2
    except (OSError, SafetensorError) as error:                     # a full disk, a folder that cannot be written
        print(f"error: {engine.first_line(error)}; make room and go on with --resume, or give another --out",
              file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not engine.is_out_of_memory(error):
            raise
        print(f"error: out of memory ({engine.first_line(error)}): set --micro-batch-tokens or --max-rows lower, add "
              "--offload-optimizer if it is the GPU's, or take a smaller model", file=sys.stderr)
        return 2
    except KeyboardInterrupt:                                       # before the first step, with nothing to save yet
        return 130


if __name__ == "__main__":
    engine.leave(main())
