"""EDGE-GRPO: GRPO with Guided Error Correction (GEC) and Entropy-Driven Advantages (EDA).

The method of arXiv 2507.21848 in plain PyTorch. This file holds, from top to bottom: flags, groups
of responses, group advantages, EDA, GEC, the loss, the update, the training loop. rollout.py
samples, reward.py grades, entropy.py computes log-probabilities and entropies, eval.py evaluates.
engine/ holds the infrastructure: models, optimizer, checkpoints, processes.

    python edge_grpo.py                                  # the tiny model on a CPU
    python edge_grpo.py --model Qwen/Qwen2.5-Math-7B     # the paper's run
    python edge_grpo.py --help                           # every flag

docs/paper.md lists where this departs from the released code, and why.

The flags come first. To read the method, begin below them, at "Groups of responses".

Letters: a step has B = Q x G responses, G to each of Q questions. T is the number of tokens in one
response, M the number of response tokens in a micro-batch. P is an entropy (Eq. 3). A row is one
response of a batch. A gold is the right answer of a problem.
"""

import sys
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from engine.flags import changed, check_ranges, end_if_unreadable, flag, make_parser, run_name
from errors import UserError

# --- Flags -----------------------------------------------------------------------------------

METHODS = {  # presets of flags: the paper's five methods, Dr. GRPO and DAPO
    "edge-grpo": dict(correction="guided", eda=True),
    "force-r-eda": dict(correction="reflect", eda=True),
    "force-r": dict(correction="reflect", eda=False),
    "grpo": dict(correction="none", eda=False),
    "dr-grpo": dict(correction="none", eda=False, advantage_std="none", loss="constant"),
    "dapo": dict(
        correction="none",
        eda=False,
        eps_high=0.28,
        loss="token",
        resample_rounds=10,
        mask_truncated=True,
    ),
    "sft": dict(correction="none", eda=False, sft=True),
}
TINY = dict(  # `--profile tiny` puts these in place of the paper's settings below
    data="tiny:5-8",
    steps=60,
    questions_per_step=8,
    lr=1e-4,
    betas=[0.9, 0.99],
    max_new_tokens=128,
    correction_tokens=128,
    micro_batch_tokens=2048,
    gradient_checkpointing=False,
    save_every=50,
    eval_every=20,
    eval_tasks=["tiny:5-8:validation", "tiny:1-3:validation"],
    eval_temperature=0.0,
    eval_max_new_tokens=160,
    save_tokens=True,
)


@dataclass
class Flags:
    """Every setting of a run. The defaults of the method are the paper's, or those of its released
    script where the paper is silent; docs/paper.md lists the exceptions."""

    model: str = flag(
        "tiny",
        "`tiny`, a local model folder, a hub id, or a bare Qwen or Llama name",
        section="everyday flags",
    )
    data: str = flag(
        "deepscaler-hard-1k",
        "training problems: a named set, tiny:STEPS[:SPLIT[:STYLE]], or a JSON/JSONL file of rows "
        "{problem or question, answer, solution (if references are used)}",
    )
    method: str = flag(
        "edge-grpo",
        "preset of flags; flags given explicitly override it",
        choices=list(METHODS),
    )
    steps: int = flag(1000, "training steps, each one rollout and its updates", low=1)
    questions_per_step: int = flag(1, "questions in a step, Q", low=1)
    group_size: int = flag(8, "responses per question, G", low=1)
    lr: float = flag(1e-6, "peak learning rate; falls linearly to 0, without warm-up", low=0)
    seed: int = flag(42, "random seed", low=0)
    out: str = flag("", "the run's folder (default: runs/MODEL-METHOD-FLAGS-seedN)")
    resume: bool = flag(
        False, "continue from the newest checkpoint in --out; start if there is none"
    )

    overwrite: bool = flag(False, "delete an existing run in --out first", section="the run")
    profile: str = flag(
        "auto",
        "default settings: the paper's, or those of the tiny world (auto: for --model tiny)",
        choices=["auto", "paper", "tiny"],
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end", low=0)
    keep: int = flag(1, "how many of the newest checkpoints are kept", low=1)
    save_tokens: bool = flag(
        False, "write each token's log-probability and entropy too, for eval.py show --html"
    )
    log: str = flag("", "also log live to this package", choices=["", "wandb", "tensorboard"])
    template: str = flag("auto", "chat template of the prompt", choices=["auto", "qwen", "llama"])
    mirror: str = flag("", "a folder or base URL to download from")
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")

    sft: bool = flag(
        False,
        "supervised fine-tuning on the reference solutions; no sampling",
        section="the method",
    )
    advantage_std: str = flag(
        "group",
        "divide advantages by the standard deviation of the group's rewards, or not (Dr. GRPO)",
        choices=["group", "none"],
    )
    all_wrong_advantage: float = flag(
        0.0,
        "advantage of every response in an all-wrong group, after GEC (-1: negative-sample "
        "reinforcement)",
        low=-100,
        high=0,
    )
    random_reward: bool = flag(False, "a control: the reward is 0 or 1 at random")
    resample_rounds: int = flag(
        0,
        "replace all-right and all-wrong groups by new questions, for at most this many rounds "
        "(DAPO)",
        low=0,
    )
    format_weight: float = flag(
        0.0,
        "weight of the format reward: 1 for a closed \\boxed{} that parses, else 0 (in the "
        "released code it is constant, so it has no effect)",
        low=0,
    )

    correction: str = flag(
        "guided",
        "GEC of wrong responses: none, guided (drawn with --guided-probs), or always the same one: "
        "reflect (Force-R), answer, reference, prefix",
        section="corrections",
    )
    guided_probs: list[float] = flag(
        [0.5, 0.25, 0.25],
        "probabilities of reflect, answer, reference, prefix (missing ones are 0). The default is "
        "the paper's for G = 8 (2/G each for answer and reference); it does not follow "
        "--group-size",
        low=0,
        high=1,
        names="P",
    )
    guide: str = flag(
        "every",
        "which wrong responses are corrected: every one (the paper), or only those in all-wrong "
        "groups",
        choices=["every", "all-wrong"],
    )
    guide_at_most: int = flag(0, "maximum number of corrections per group; 0: no limit", low=0)
    correction_factors: list[float] = flag(
        [1, 1, 1, 1],
        "factors on the advantages of responses corrected by reflect, answer, reference, prefix "
        "(missing ones are 1)",
        low=0,
        names="F",
    )
    correction_tokens: int = flag(256, "maximum tokens sampled after a reflection or prefix", low=0)
    max_corrected_tokens: int = flag(
        0,
        "truncate corrected responses to this many tokens; 0: only where the context ends",
        low=0,
    )
    drop_wrong_references: bool = flag(
        False, "do not use reference solutions that the grader finds wrong"
    )

    eda: bool = flag(
        True,
        "divide each advantage by its response's relative entropy (Eq. 6-7)",
        section="EDA",
    )
    eda_clamp: list[float] = flag(
        [],
        "bounds LO HI of the relative entropy, or LO HI LO HI separately for positive and "
        "negative advantages (default: only a tiny floor)",
        names="BOUND",
    )
    eda_rows: str = flag(
        "all",
        "apply EDA only to these responses (as they are after GEC); reference: those that a "
        "reference replaced",
        choices=["all", "right", "wrong", "reference", "not-reference"],
    )
    eda_grad: bool = flag(
        False,
        "let the gradient flow through each response's own entropy, as the released code does",
    )

    loss: str = flag(
        "sequence",
        "normalisation: sequence (1/B sum 1/|o|), token (1/sum |o|), or constant (1/(B x "
        "--max-new-tokens), Dr. GRPO)",
        choices=["sequence", "token", "constant"],
        section="loss and optimizer",
    )
    eps_low: float = flag(0.2, "clip range of the ratio below 1", low=0, high=1)
    eps_high: float = flag(0.2, "clip range of the ratio above 1", low=0)
    kl: float = flag(
        0.0,
        "weight of a KL penalty to the initial model, on sampled tokens; above 0, a copy of that "
        "model stays in memory",
        low=0,
    )
    updates_per_rollout: int = flag(
        1, "optimizer updates per rollout; in the first the ratio is 1", low=1
    )
    injected_shaping: float = flag(
        0.0,
        "for injected tokens, use the unclipped ratio p/(p + this) (LUFFY: 0.1); 0: train them as "
        "if they were sampled, as in the paper",
        low=0,
    )
    mask_injected: bool = flag(False, "leave injected tokens out of the loss and of |o|")
    mask_truncated: bool = flag(False, "leave truncated responses out of the loss and of B (DAPO)")
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas", low=0, high=1, names=("B1", "B2"))
    weight_decay: float = flag(0.0, "AdamW's weight decay", low=0)
    grad_clip: float = flag(1.0, "clip the gradient to this norm; 0: no clipping", low=0)

    temperature: float = flag(
        0.6,
        "sampling temperature; log-probabilities and entropies are computed at it too",
        low=1e-3,
        section="sampling",
    )
    top_p: float = flag(1.0, "nucleus sampling; 1: off", low=1e-6, high=1)
    max_new_tokens: int = flag(1024, "maximum tokens sampled per response", low=1)
    max_prompt_tokens: int = flag(512, "training problems with a longer prompt are left out", low=1)

    dtype: str = flag(
        "auto",
        "what the model computes in; auto: bfloat16 on a GPU, float32 on a CPU. Master weights are "
        "always float32",
        choices=["auto", "float32", "bfloat16"],
        section="memory",
    )
    micro_batch_tokens: int = flag(
        8192,
        "maximum tokens in one forward and backward pass; each response counts with its prompt",
        low=1,
    )
    max_rows: int = flag(0, "responses sampled at a time; 0: as many as fit in memory", low=0)
    drafts: int = flag(
        0,
        "speculative decoding: guess up to K tokens per step from the group's own texts; the "
        "samples stay the same; 0: off",
        low=0,
        high=8,
    )
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass")
    offload_optimizer: bool = flag(False, "keep master weights and moments in CPU memory")

    eval_every: int = flag(
        100,
        "steps between evaluations; 0: only before the first step and after the last",
        low=0,
        section="evaluation during training",
    )
    eval_tasks: list[str] = flag([], "held-out problems (see eval.py --tasks)", names="TASK")
    eval_limit: int = flag(0, "use only the first problems of each task; 0: all", low=0)
    eval_n: int = flag(1, "responses per problem", low=1)
    eval_temperature: float = flag(0.1, "sampling temperature; 0: greedy", low=0)
    eval_max_new_tokens: int = flag(
        3000,
        "maximum tokens per response; the context is 4096 tokens, plus what this exceeds 3000 by",
        low=1,
    )
    differing: ClassVar[dict] = {}  # the flags that differ from the profile and the method's row


def parse_flags(argv: list[str]) -> Flags:
    """The flags of a command line. Raises UserError also for flags in conflict."""
    flags = read_flags(argv)
    for wrong, sentence in conflicts(flags):
        if wrong:
            raise UserError(sentence)
    return flags


def read_flags(argv: list[str]) -> Flags:
    """The flags of a command line; parse_flags looks for conflicts, too.

    Each overrides the one before: defaults, tiny profile, method preset, command line. Raises
    UserError for an unknown flag and for a value out of range."""
    parser = partial(make_parser, Flags, description=__doc__, usage="python edge_grpo.py [flags]")
    without_help = [arg for arg in argv if arg not in ("-h", "--help")]
    given, _ = parser({}).parse_known_args(without_help)  # to learn --method and --profile
    defaults = dict(METHODS[given.method])
    if given.profile == "tiny" or (given.profile == "auto" and given.model == "tiny"):
        defaults = TINY | defaults
    flags = Flags(**vars(parser(defaults).parse_args(argv)))
    flags.differing = changed(flags, defaults)
    flags.out = flags.out or f"runs/{run_name(flags, flags.differing)}"
    check_ranges(flags)
    return flags


def conflicts(flags: Flags) -> list[tuple[bool, str]]:
    """All rules for flags that do not fit together: (is it broken, the error message)."""
    probabilities, clamp, guided = flags.guided_probs, flags.eda_clamp, flags.correction == "guided"
    known = len(CORRECTIONS)
    low, high = clamp[::2], clamp[1::2]
    return [
        (
            flags.correction not in ("none", "guided", *CORRECTIONS),
            f"--correction {flags.correction}: must be none, guided, {', '.join(CORRECTIONS)}",
        ),
        (
            guided and (len(probabilities) > known or abs(sum(probabilities) - 1) > 1e-6),
            f"--guided-probs: needs at most {known} numbers that sum to 1, not {probabilities}",
        ),
        (
            probabilities != Flags().guided_probs and not guided,
            "--guided-probs belongs to --correction guided: add that, or drop --guided-probs",
        ),
        (
            flags.correction == "none" and flags.differing.keys() & NEEDS_CORRECTION,
            "each of --guide, --guide-at-most, --correction-factors, --injected-shaping and "
            "--mask-injected does nothing with --correction none: choose another --correction, or "
            "drop it",
        ),
        (
            flags.drop_wrong_references and not flags.sft and flags.correction == "none",
            "--drop-wrong-references does nothing with --correction none, which uses no references",
        ),
        (
            len(flags.correction_factors) > known,
            f"--correction-factors: at most {known}, one for each of {', '.join(CORRECTIONS)}",
        ),
        (
            len(clamp) not in (0, 2, 4) or not all(0 < a < b for a, b in zip(low, high)),
            f"--eda-clamp {clamp}: needs LO HI or LO HI LO HI with 0 < LO < HI",
        ),
        (
            (clamp or flags.eda_grad or flags.eda_rows != "all") and not flags.eda,
            "--eda-clamp, --eda-rows and --eda-grad need EDA, which is off: add --eda or drop them",
        ),
        (
            flags.injected_shaping > 0 and flags.mask_injected,
            "--injected-shaping changes the loss of injected tokens, --mask-injected leaves them "
            "out of it: give one of the two",
        ),
        (max(flags.betas) >= 1, f"--betas {flags.betas}: must be below 1"),
        (
            flags.sft and changed(flags, TINY | METHODS["sft"]).keys() & NOT_FOR_SFT,
            "--sft trains on reference solutions alone: use --method sft, and drop --correction, "
            "--eda, --kl, --updates-per-rollout, --random-reward, --resample-rounds, "
            "--advantage-std and --all-wrong-advantage",
        ),
        (
            flags.group_size == 1 and not (flags.sft or flags.all_wrong_advantage),
            "--group-size 1: a group of one has no advantage, so nothing would be learned; "
            "give 2 or more",
        ),
        (
            flags.resume and flags.overwrite,
            "--resume continues a run, --overwrite deletes it: give one of the two",
        ),
    ]


NEEDS_CORRECTION = {
    "guide",
    "guide_at_most",
    "correction_factors",
    "injected_shaping",
    "mask_injected",
}
NOT_FOR_SFT = {
    "correction",
    "eda",
    "kl",
    "updates_per_rollout",
    "random_reward",
    "resample_rounds",
    "advantage_std",
    "all_wrong_advantage",
}


# The imports below take seconds, so a mistyped flag ends the program before them.
if __name__ == "__main__":
    end_if_unreadable(read_flags)

# ruff: noqa: E402
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import field

import torch
from torch import Tensor

import data
import engine
import eval as evaluation
import reward
from data import Problem
from engine.console import exit_code, say, timed
from engine.forward import Batch
from engine.memory import preflight
from engine.models import Policy
from engine.problems import check_golds, training_problems
from engine.processes import gather, leave, seed_from, spread, start_processes, uniform_from
from engine.run import Run
from engine.trainer import Trainer
from entropy import response_entropy
from report.metrics import SHOWN, measure, readable
from report.page import conclude

# --- Groups of responses ---------------------------------------------------------------------


@dataclass
class Response:
    """One response in token ids. Ids are decoded to text for grading; that text is never tokenised
    again."""

    ids: list[int] = field(default_factory=list)  # with its end token, once it is finished
    injected: list[bool] = field(default_factory=list)  # True: put there by GEC, False: sampled
    sampler_logp: list[float] = field(default_factory=list)  # NaN where injected
    entropies: list[float] = field(default_factory=list)  # H_t of each token, nats; NaN: unknown
    finished: bool = False  # the last token is an end token
    sampled_tokens: int = 0  # a corrected copy counts only what was sampled for the correction
    random: float = 0.0  # in [0, 1), for --random-reward
    correction: str = ""  # the row of CORRECTIONS that made it, or ""
    text: str = ""  # once it is graded
    format: float | None = None
    accuracy: float | None = None  # 0.0 or 1.0 once it is graded
    trainer_logp: Tensor | None = None  # (T,) from the first update's forward pass
    trainer_entropies: Tensor | None = None  # (T,) from the same pass

    @property
    def entropy(self) -> float:
        """P_i of this response; NaN while the entropy of a token is unknown."""
        return response_entropy(torch.tensor(self.entropies)).item()

    def cut(self, limit: int) -> None:
        """Drops the tokens beyond `limit`."""
        if len(self.ids) > limit:
            self.finished = False
            for column in (self.ids, self.injected, self.sampler_logp, self.entropies):
                del column[limit:]


@dataclass
class Group:
    """G responses to one problem, and what the method computes from them.

    Everything that logs, prints or draws a group reads these fields."""

    number: int  # index of the group in its step, from 0
    problem: Problem
    prompt: list[int]
    sampled: list[Response]  # as the policy sampled them
    responses: list[Response]  # as trained on: the sampled ones, or GEC's corrected copies of them
    A: Tensor | None = None  # (G,) group-relative advantages
    P: Tensor | None = None  # (G,) response entropies, Eq. 3
    A_hat: Tensor | None = None  # (G,) entropy-driven advantages, Eq. 7: what the loss uses

    def row(self, i: int) -> int:
        """Index of response i among the step's B responses. It seeds the random choices made for
        that response."""
        return self.number * len(self.responses) + i


def batch_of_problems(
    problems: list[Problem], flags: Flags, step: int, *resample_round: int
) -> list[Problem]:
    """The Q problems of a step: consecutive items of an endless sequence of shuffled epochs.

    Each round of DAPO's resampling has shuffles of its own. `resample_round` is its number, and is
    absent in the first draw."""
    batch = []
    first = step * flags.questions_per_step
    for k in range(first, first + flags.questions_per_step):
        epoch, i = divmod(k, len(problems))
        shuffle = torch.Generator().manual_seed(
            seed_from(flags.seed, "epoch", epoch, *resample_round)
        )
        batch.append(problems[torch.randperm(len(problems), generator=shuffle)[i]])
    return batch


@timed("sample")
def sample(
    policy: Policy, problems: list[Problem], flags: Flags, step: int, *resample_round: int
) -> list[Group]:
    """A group of G sampled responses for each problem."""
    groups = []
    for number, problem in enumerate(problems):
        responses = [Response() for _ in range(flags.group_size)]
        prompt = policy.prompt_ids(problem.question)
        # One list under two names, until GEC replaces the second.
        groups.append(Group(number, problem, prompt, sampled=responses, responses=responses))
    rows = [(group, i) for group in groups for i in range(flags.group_size)]
    key = (step, "sample", *resample_round)
    continue_responses(policy, rows, flags.max_new_tokens, flags, key)
    for group, i in rows:
        group.responses[i].random = uniform_from(flags.seed, "reward", *key, group.row(i))
    return groups


def continue_responses(
    policy: Policy, rows: list[tuple[Group, int]], limit: int, flags: Flags, key: tuple
) -> None:
    """For each (group, i), samples up to `limit` more tokens and appends them to response i.

    A row's random numbers are a hash of (--seed, key, group.row(i)): they depend neither on the
    batch nor on the number of processes, and no generator state has to be saved."""
    prompts = [group.prompt + group.responses[i].ids for group, i in rows]
    seeds = [seed_from(flags.seed, *key, group.row(i)) for group, i in rows]
    limits = [limit] * len(rows)
    samples = policy.sample(prompts, limits, seeds, flags.temperature, flags.top_p)
    for (group, i), new in zip(rows, samples):
        response = group.responses[i]
        response.ids += new.ids
        response.injected += [False] * len(new.ids)
        response.sampler_logp += new.logprobs
        response.entropies += new.entropies
        response.finished = new.finished
        response.sampled_tokens = len(new.ids)


@timed("grade")
def grade(policy: Policy, groups: list[Group]) -> None:
    """Fills in text, format and accuracy of the responses that have none yet."""
    responses, rows = [], []
    for group in groups:
        for response in group.responses:
            if response.accuracy is None:
                response.text = policy.decode(response.ids)
                responses.append(response)
                rows.append((response.text, list(group.problem.answers)))

    def scores_of(share: list[tuple]) -> list[tuple[float, float]]:
        return reward.score_all([text for text, _ in share], [golds for _, golds in share])

    for response, (well_formed, accuracy) in zip(responses, spread(rows, scores_of)):
        response.format = well_formed
        response.accuracy = accuracy


def rewards(responses: list[Response], flags: Flags) -> Tensor:
    """Rewards (G,) of the responses, float64. They may be any real numbers. GEC and resampling look
    at `accuracy` only. In an all-wrong group, even a small difference between rewards becomes an
    advantage of about 1, because GRPO divides by their standard deviation."""
    values = [r.accuracy + flags.format_weight * r.format for r in responses]
    if flags.random_reward:
        values = [float(r.random < 0.5) for r in responses]
    return torch.tensor(values, dtype=torch.float64)


def resample_equal_groups(
    policy: Policy, groups: list[Group], problems: list[Problem], flags: Flags, step: int
) -> list[Group]:
    """DAPO's dynamic sampling: groups that are all right or all wrong are replaced, in place, by
    new questions, round after round. Returns every group that was sampled for the step."""
    all_groups = list(groups)
    for resample_round in range(1, flags.resample_rounds + 1):
        unmixed = [group for group in groups if len({r.accuracy for r in group.sampled}) == 1]
        if not unmixed:
            break
        new_problems = batch_of_problems(problems, flags, step, resample_round)[: len(unmixed)]
        new_groups = sample(policy, new_problems, flags, step, resample_round)
        grade(policy, new_groups)
        all_groups += new_groups
        for old, new in zip(unmixed, new_groups):
            new.number = old.number
            groups[old.number] = new
    return all_groups


# --- Group advantages (GRPO) -----------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4, std: str = "group") -> Tensor:
    """A_i = (r_i - mean_j r_j) / (std_j r_j + eps), j over the group; (Q, G) -> (Q, G).

    The standard deviation is unbiased (n - 1). std="none" does not divide (Dr. GRPO). In a group
    of one the advantage is 0."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[1] == 1 or std == "none":
        return centred
    return centred / (rewards.std(dim=1, keepdim=True) + eps)


def advantages(group: Group, flags: Flags) -> Tensor:
    """Advantages A (G,) of a group, float64.

    They are GRPO's, or the constant --all-wrong-advantage if it is set and all responses are wrong.
    Those of corrected responses are then multiplied by their entry of --correction-factors."""
    A = group_advantages(rewards(group.responses, flags)[None], std=flags.advantage_std)[0]
    if flags.all_wrong_advantage and not any(r.accuracy > 0 for r in group.responses):
        A = torch.full_like(A, flags.all_wrong_advantage)
    factor = dict(zip(CORRECTIONS, flags.correction_factors))
    factors = [factor.get(r.correction, 1.0) for r in group.responses]
    return A * torch.tensor(factors, dtype=A.dtype)


# --- Entropy-Driven Advantage (EDA) ----------------------------------------------------------

MIN_RELATIVE_ENTROPY = 1e-4  # keeps A / P^ finite; it can still be 10,000 A


def group_entropy(group: Group) -> Tensor:
    """P (G,) of a group."""
    return torch.tensor([r.entropy for r in group.responses], dtype=torch.float64)


def entropy_driven_advantages(A: Tensor, P: Tensor, clamp: list[float] | None = None) -> Tensor:
    """Eq. 6-7: P^_i = P_i / mean_j P_j over the group, A^_i = A_i / P^_i; (Q, G), (Q, G) -> (Q, G).

    Low entropy enlarges an advantage: more reward if right, more penalty if wrong. `clamp`
    bounds P^: (lo, hi), or (lo, hi) for positive and then (lo, hi) for negative advantages. Without
    it the only bound is MIN_RELATIVE_ENTROPY. If every P_i of a group is 0, its advantages stay as
    they are. The result is differentiable in each P_i, but the mean is detached, as in the released
    code."""
    mean = P.mean(dim=1, keepdim=True).detach()
    relative = P / mean.clamp(min=1e-30)
    relative = torch.where(mean > 0, relative, torch.ones_like(relative))
    bounds = list(clamp or (MIN_RELATIVE_ENTROPY, None))
    lo, hi = bounds[:2]  # for positive advantages
    lo_negative, hi_negative = bounds[-2:]  # the same two, unless four are given
    bounded = torch.where(A > 0, relative.clamp(lo, hi), relative.clamp(lo_negative, hi_negative))
    return A / bounded


def eda(group: Group, P: Tensor, flags: Flags) -> Tensor:
    """Entropy-driven advantages A^ (G,) from group.A and P (G,). Responses that --eda-rows does
    not select keep their A."""
    A_hat = entropy_driven_advantages(group.A[None], P[None], flags.eda_clamp or None)[0]
    applies = {
        "all": lambda r: True,
        "right": lambda r: r.accuracy > 0,
        "wrong": lambda r: r.accuracy == 0,
        "reference": lambda r: r.correction == "reference",
        "not-reference": lambda r: r.correction != "reference",
    }[flags.eda_rows]
    return torch.where(torch.tensor([applies(r) for r in group.responses]), A_hat, group.A)


@timed("update")
def fill_in_entropies(trainer: Trainer, groups: list[Group]) -> None:
    """Computes the entropies of responses with injected tokens in a forward pass. Those of all
    others were recorded while sampling. (A pass over all of them would take 14% of a step on a CPU:
    tests/bench_step.py.)"""
    rows = []
    for group in groups:
        rows += [(group.prompt, r) for r in group.responses if any(map(math.isnan, r.entropies))]
    known = trainer.logprobs([prompt for prompt, _ in rows], [r.ids for _, r in rows])
    for (_, response), (_, entropies) in zip(rows, known):
        response.entropies = entropies.tolist()


# --- Guided Error Correction (GEC) -----------------------------------------------------------

REFLECT = " Wait! Something is wrong here."
ANSWER = "\nWait! Something is wrong here. After verification, the correct answer is \\boxed{{{}}}."


# Each function below returns the token ids that its correction injects into response i of the
# group (see Correction.adds).


def reflection(policy: Policy, group: Group, i: int, u: float) -> list[int]:
    return policy.encode(REFLECT)


def direct_answer(policy: Policy, group: Group, i: int, u: float) -> list[int]:
    return policy.encode(ANSWER.format(data.gold_text(group.problem)))


def reference(policy: Policy, group: Group, i: int, u: float) -> list[int]:
    return policy.encode_response(group.problem.solution)


def reference_prefix(policy: Policy, group: Group, i: int, u: float) -> list[int]:
    """The first quarter, half or three quarters (u decides) of the reference solution."""
    ids = policy.encode_response(group.problem.solution)
    return ids[: math.ceil(len(ids) * (1 + int(3 * u)) / 4)]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """How a wrong response is corrected. To add a correction, write its function and a row of
    CORRECTIONS.

    adds(policy, group, i, u) -> the token ids to inject into response i of the group; u, uniform in
    [0, 1), is for its random choices. None: leave the response as it is. A box in what is injected
    counts as the response's answer, unless the policy adds another one."""

    adds: Callable[[Policy, Group, int, float], list[int] | None]
    keeps: bool  # True: inject after the response's own tokens; False: in place of them
    continues: bool  # True: the policy continues; False: an end token closes the response
    needs_solution: bool
    count: str  # the key in metrics.jsonl that counts these corrections


CORRECTIONS = {  # in the order of --guided-probs and --correction-factors
    "reflect": Correction(
        adds=reflection, keeps=True, continues=True, needs_solution=False, count="reflected"
    ),
    "answer": Correction(
        adds=direct_answer, keeps=True, continues=False, needs_solution=False, count="answered"
    ),
    "reference": Correction(
        adds=reference, keeps=False, continues=False, needs_solution=True, count="referenced"
    ),
    "prefix": Correction(
        adds=reference_prefix, keeps=False, continues=True, needs_solution=True, count="prefixed"
    ),
}


def correction_probabilities(flags: Flags, problem: Problem | None = None) -> dict[str, float]:
    """The probability of each correction for a wrong response. Force-R is `reflect` with p = 1.

    If the problem has no solution, the probability of corrections that need one is spread over
    the others."""
    if flags.correction == "none":
        return {}
    probabilities = {flags.correction: 1.0}
    if flags.correction == "guided":
        probabilities = dict(zip(CORRECTIONS, flags.guided_probs))
    if problem and problem.solution is None:
        for name in CORRECTIONS:
            if CORRECTIONS[name].needs_solution:
                probabilities.pop(name, None)
        total = sum(probabilities.values())
        if total == 0:
            return {}
        probabilities = {name: p / total for name, p in probabilities.items()}
    return {name: p for name, p in probabilities.items() if p > 0}


def draw_correction(probabilities: dict[str, float], u: float) -> str:
    """The correction whose share of [0, 1) contains u; "" if `probabilities` is empty."""
    name = ""
    for name, p in probabilities.items():
        if u < p:
            break
        u -= p
    return name  # the last one, if the sum is rounded to slightly less than 1


def corrected_copy(name: str, policy: Policy, group: Group, i: int, u: float = 0.0) -> Response:
    """A copy of response i with the tokens of a correction injected, or response i itself if there
    is nothing to inject. If the policy continues the correction, that is left to the caller."""
    correction = CORRECTIONS[name]
    old = group.responses[i]
    kept = 0  # tokens of the old response
    if correction.keeps:
        kept = len(old.ids)
        if old.finished:
            kept -= 1  # without the end token
    added = correction.adds(policy, group, i, u)
    if added is None:
        return old
    if not correction.continues:
        added = added + [policy.end_id]
    unknown = [math.nan] * len(added)
    return Response(
        ids=old.ids[:kept] + added,
        injected=old.injected[:kept] + [True] * len(added),
        sampler_logp=old.sampler_logp[:kept] + unknown,
        entropies=old.entropies[:kept] + unknown,
        finished=not correction.continues,
        random=old.random,
        correction=name,
    )


def rows_to_correct(group: Group, flags: Flags) -> list[int]:
    """Indices of the responses of a group that GEC corrects: all wrong ones (the paper), or fewer
    with --guide and --guide-at-most."""
    wrong = [i for i, r in enumerate(group.responses) if r.accuracy == 0]
    if flags.guide == "all-wrong" and len(wrong) < len(group.responses):
        return []
    return wrong[: flags.guide_at_most or None]


@timed("correct")
def correct_errors(policy: Policy, groups: list[Group], flags: Flags, step: int) -> None:
    """GEC: draws one correction for each wrong response and applies it once; a corrected response
    is not corrected again. Right responses are untouched."""
    to_continue = []
    for group in groups:
        probabilities = correction_probabilities(flags, group.problem)
        if not probabilities:
            continue
        responses = list(group.responses)
        for i in rows_to_correct(group, flags):
            u = uniform_from(flags.seed, step, "branch", group.row(i))
            name = draw_correction(probabilities, u)
            u = uniform_from(flags.seed, step, name, group.row(i))
            responses[i] = corrected_copy(name, policy, group, i, u)
            if responses[i].correction and CORRECTIONS[name].continues:
                to_continue.append((group, i))
        group.responses = responses
    key = (step, "reflect")
    continue_responses(policy, to_continue, flags.correction_tokens, flags, key)
    for group in groups:
        context = policy.room(group.prompt)
        for response in group.responses:
            if response.correction:
                response.cut(min(flags.max_corrected_tokens or context, context))


# --- The loss --------------------------------------------------------------------------------


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """The clipped surrogate -sum_m w_m min(rho_m A_m, clip(rho_m, 1 - eps_low, 1 + eps_high) A_m)
    with the ratio rho = exp(logp - old_logp); all (M,) -> scalar."""
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    return (weights * -surrogate).sum()


def shaped_loss(logp: Tensor, advantages: Tensor, weights: Tensor, shaping: float) -> Tensor:
    """LUFFY's loss of injected tokens (its Eq. 6): the ratio p / (p + shaping), not clipped."""
    p = torch.exp(logp)
    return -(weights * advantages * p / (p + shaping)).sum()


def kl_penalty(logp: Tensor, initial_logp: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1 with
    d = initial_logp - logp."""
    d = initial_logp - logp
    return torch.exp(d) - d - 1


def token_weights(lengths: list[int], reduction: str, longest: int) -> list[float]:
    """The weight of each token of row i in the step's loss: "sequence" 1/(B |o_i|), "token"
    1/sum_j |o_j|, "constant" 1/(B longest).

    They are weights in the loss of the whole step, so the gradients of micro-batches and processes
    are simply summed."""
    B = len(lengths)
    total = max(sum(lengths), 1)
    weights = []
    for length in lengths:
        weight = {
            "sequence": 1 / (B * max(length, 1)),
            "token": 1 / total,
            "constant": 1 / (B * longest),
        }
        weights.append(weight[reduction])
    return weights


@dataclass(kw_only=True)
class Tokens:
    """Per-token inputs of the loss: tensors (T,) for a response, (M,) for a micro-batch.

    To add an input, add a field here and set it in `tokens_of`."""

    weights: Tensor  # of the token in the loss of the whole step; 0 if it is masked
    advantages: Tensor  # A^ of the response, for each of its tokens
    injected: Tensor  # bool
    old_logp: Tensor | None = None  # under the policy that sampled; None in the first update
    initial_logp: Tensor | None = None  # under the initial model (KL)


def tokens_of(groups: list[Group], flags: Flags) -> list[Tokens]:
    """The loss inputs of each of the step's B responses.

    Masked tokens (--mask-truncated, --mask-injected) get weight 0 and do not count in |o_i| or in
    the token total. A response whose tokens are all masked does not count in B."""
    tokens, counted = [], []
    for group in groups:
        for response, a_hat in zip(group.responses, group.A_hat.tolist()):
            injected = torch.tensor(response.injected, dtype=torch.bool)
            mask = torch.ones(len(injected))
            if flags.mask_truncated and not response.finished:
                mask[:] = 0
            if flags.mask_injected:
                mask[injected] = 0
            advantages = torch.full_like(mask, a_hat)
            tokens.append(Tokens(weights=mask, advantages=advantages, injected=injected))
            if mask.any() or not response.ids:  # an empty response counts in B
                counted.append(tokens[-1])
    lengths = [int(t.weights.sum()) for t in counted]
    for t, weight in zip(counted, token_weights(lengths, flags.loss, flags.max_new_tokens)):
        t.weights *= weight
    return tokens


def batch_loss(t: Tokens, logp: Tensor, flags: Flags) -> Tensor:
    """The loss of a micro-batch: its part of the step's loss. t: fields (M,); logp (M,).

    Where one response ends, `batch.lengths` in `update` says: logp.split(batch.lengths)."""
    old_logp = t.old_logp
    if old_logp is None:
        old_logp = logp.detach()  # the policy still is the one that sampled, so the ratio is 1
    weights = t.weights
    if flags.injected_shaping:
        weights = t.weights * ~t.injected
    loss = policy_loss(logp, old_logp, t.advantages, weights, flags.eps_low, flags.eps_high)
    if flags.injected_shaping:
        weights = t.weights * t.injected
        loss = loss + shaped_loss(logp, t.advantages, weights, flags.injected_shaping)
    if flags.kl:
        penalty = kl_penalty(logp, t.initial_logp)
        penalty = penalty.masked_fill(t.injected, 0)  # only sampled tokens estimate the KL
        loss = loss + flags.kl * (t.weights * penalty).sum()
    return loss


# --- The update ------------------------------------------------------------------------------


@timed("update")
def update(trainer: Trainer, groups: list[Group], flags: Flags, lr: float) -> dict:
    """The optimizer updates of a step, on all B responses.

    The first update's forward pass also fills in each response's `trainer_logp`, any missing
    entropies, and each group's P if EDA has not needed it. Returns the means of loss and gradient
    norm over the updates, and how many updates were skipped because they were not finite."""
    rows = [(group, i) for group in groups for i in range(len(group.responses))]
    prompts = [group.prompt for group, _ in rows]
    ids = [group.responses[i].ids for group, i in rows]
    tokens = tokens_of(groups, flags)
    if flags.kl:
        for t, (logp, _) in zip(tokens, trainer.logprobs(prompts, ids, initial=True)):
            t.initial_logp = logp

    updates = []
    for k in range(flags.updates_per_rollout):
        sums = defaultdict(float)  # over the micro-batches of all processes
        first_pass = {}  # row -> (logp, entropy)
        for batch in trainer.micro_batches(prompts, ids):  # a row is never split over two
            logp, entropy = trainer.forward(batch)  # (M,) each, with gradient
            t = batch.join(tokens)  # each field (M,)
            if flags.eda_grad:
                t.advantages = advantages_with_gradient(rows, batch, entropy, flags)
            loss = batch_loss(t, logp, flags)
            trainer.backward(loss)
            sums["loss"] += loss.item()
            if k == 0:
                first_pass |= batch.by_row(logp, entropy)
        if k == 0:
            store_first_pass(rows, tokens, first_pass)
        sums = trainer.add_over_processes(sums)
        norm = trainer.step(lr, flags.grad_clip)
        # A clip fraction: add up clipped and all tokens in `sums`, and average over updates[1:],
        # because in the first update nothing is clipped.
        updates.append({"loss": sums["loss"], "grad_norm": norm})
    return update_statistics(updates, lr)


def update_statistics(updates: list[dict], lr: float) -> dict:
    """Means over the updates of a step."""
    norms = [u["grad_norm"] for u in updates]
    return {
        "loss": sum(u["loss"] for u in updates) / len(updates),
        "grad_norm": sum(norms) / len(norms),
        "skipped_updates": sum(not math.isfinite(norm) for norm in norms),
        "lr": lr,
    }


@timed("update")
def sft_update(trainer: Trainer, groups: list[Group], flags: Flags, lr: float) -> dict:
    """One SFT update: the weighted negative log-likelihood of one reference per group."""
    rows = [(group, 0) for group in groups]
    prompts = [group.prompt for group in groups]
    ids = [group.responses[0].ids for group in groups]
    tokens = tokens_of(groups, flags)
    sums = defaultdict(float)
    first_pass = {}
    for batch in trainer.micro_batches(prompts, ids):
        logp, entropy = trainer.forward(batch)
        loss = (batch.join(tokens).weights * -logp).sum()
        trainer.backward(loss)
        sums["loss"] += loss.item()
        first_pass |= batch.by_row(logp, entropy)
    store_first_pass(rows, tokens, first_pass)
    sums = trainer.add_over_processes(sums)
    norm = trainer.step(lr, flags.grad_clip)
    return update_statistics([{"loss": sums["loss"], "grad_norm": norm}], lr)


def advantages_with_gradient(
    rows: list[tuple[Group, int]], batch: Batch, entropy: Tensor, flags: Flags
) -> Tensor:
    """A^ (M,) with a gradient through each row's own P_i (--eda-grad). Straight-through: the value
    comes from the group's P, the gradient from the P_i of this forward pass."""
    columns = [entropy[:0]]  # so that torch.cat works for an empty batch
    for row, entropies in zip(batch.rows, entropy.split(batch.lengths)):
        group, i = rows[row]
        P_i = response_entropy(entropies).cpu()
        P = group.P.clone()
        P[i] += P_i - P_i.detach()  # adds 0, with a gradient
        columns.append(eda(group, P, flags)[i].expand(len(entropies)).to(entropy))
    return torch.cat(columns)


def store_first_pass(
    rows: list[tuple[Group, int]], tokens: list[Tokens], first_pass: dict[int, tuple]
) -> None:
    """Saves what the first forward pass computed, under the policy that sampled: `trainer_logp`,
    which is also the `old_logp` of later updates, the missing entropies, and P where it is missing.

    first_pass: row -> (logp (T,), entropies (T,)) of this process's rows."""
    for share in gather(first_pass):
        first_pass |= share
    for row, (group, i) in enumerate(rows):
        response = group.responses[i]
        logp, entropies = first_pass.get(row, (torch.zeros(0), torch.zeros(0)))
        response.trainer_logp = tokens[row].old_logp = logp
        response.trainer_entropies = entropies
        for t, entropy in enumerate(entropies.tolist()):
            if math.isnan(response.entropies[t]):
                response.entropies[t] = entropy
    for group, _ in rows:
        if group.P is None:
            group.P = group_entropy(group)


# --- The run ---------------------------------------------------------------------------------


def train(flags: Flags) -> int:
    """GRPO and its variants, EDGE-GRPO among them. Returns the exit code."""
    policy, problems, trainer, run, evaluate = set_up(flags)
    with run:
        for step in run.steps(trainer, evaluate, SHOWN):  # it saves and evaluates between steps
            batch = batch_of_problems(problems, flags, step)  # Q problems
            groups = sample(policy, batch, flags, step)  # Q groups of G responses
            grade(policy, groups)
            all_groups = resample_equal_groups(policy, groups, problems, flags, step)  # DAPO
            correct_errors(policy, groups, flags, step)  # GEC
            grade(policy, groups)  # the corrected ones
            for group in groups:
                group.A = group.A_hat = advantages(group, flags)  # (G,)
            if flags.eda:
                fill_in_entropies(trainer, groups)
                for group in groups:
                    group.P = group_entropy(group)  # (G,) Eq. 3
                    group.A_hat = eda(group, group.P, flags)  # (G,) Eq. 6-7
            stats = update(trainer, groups, flags, lr=flags.lr * (1 - step / flags.steps))
            stats |= measure(groups, all_groups, partial(rewards, flags=flags), CORRECTIONS, flags)
            run.log(step, stats, readable(policy, groups, flags.save_tokens))
    return run.code or conclude(flags)


def fine_tune(flags: Flags) -> int:
    """SFT on the reference solutions; logs, saves and evaluates like `train`. Returns the exit
    code."""
    policy, problems, trainer, run, evaluate = set_up(flags)
    with run:
        for step in run.steps(trainer, evaluate, SHOWN):
            groups = references(policy, batch_of_problems(problems, flags, step))
            grade(policy, groups)
            stats = sft_update(trainer, groups, flags, lr=flags.lr * (1 - step / flags.steps))
            stats |= measure(groups, [], partial(rewards, flags=flags), CORRECTIONS, flags)
            run.log(step, stats, readable(policy, groups, flags.save_tokens))
    return run.code or conclude(flags)


@timed("sample")
def references(policy: Policy, problems: list[Problem]) -> list[Group]:
    """A group of one for each problem: its reference solution. Its `sampled` is empty."""
    groups = []
    for number, problem in enumerate(problems):
        prompt = policy.prompt_ids(problem.question)
        group = Group(number, problem, prompt, sampled=[], responses=[Response()])
        group.responses = [corrected_copy("reference", policy, group, 0)]
        group.responses[0].cut(policy.room(prompt))
        group.A = group.A_hat = torch.zeros(1, dtype=torch.float64)
        groups.append(group)
    return groups


def set_up(flags: Flags) -> tuple[Policy, list[Problem], Trainer, Run, Callable[[int], None]]:
    """Loads and checks everything that a run needs, and opens its folder. The last item is
    evaluate(steps_done), which evaluates the policy on --eval-tasks. Raises UserError."""
    rows = 0 if flags.sft else flags.questions_per_step * flags.group_size
    row_tokens = flags.max_prompt_tokens + flags.max_new_tokens + flags.correction_tokens
    max_rows = preflight(flags, start_processes(flags.device), rows, row_tokens)
    policy = engine.load_policy(
        flags.model, flags.device, flags.template, max_rows, flags.trust_remote_code, flags.dtype
    )
    policy.sampler.drafts = flags.drafts
    corrections = [CORRECTIONS[name] for name in correction_probabilities(flags)]
    needs_solution = flags.sft or any(c.needs_solution for c in corrections)
    problems, left_out, wrong_references = training_problems(flags, policy, needs_solution)
    every_one = flags.guide == "every" and not flags.guide_at_most
    if corrections and every_one and not any(c.continues for c in corrections):
        say(
            "note: these corrections make nearly every wrong response right, so few groups are "
            "mixed and little is learned; use --correction guided with a first --guided-probs "
            "above 0"
        )
    tasks = {}
    for task in flags.eval_tasks:
        tasks[task] = data.load(task, flags.mirror or None)[: flags.eval_limit or None]
        check_golds(tasks[task])
    run = Run(flags, policy, problems, left_out, wrong_references, tasks)
    trainer = Trainer(
        policy,
        flags.micro_batch_tokens,
        temperature=1.0 if flags.sft else flags.temperature,
        entropy_grad=flags.eda_grad,
        betas=tuple(flags.betas),
        weight_decay=flags.weight_decay,
        offload=flags.offload_optimizer,
        checkpointing=flags.gradient_checkpointing,
        keep_initial=flags.kl > 0,
    )
    return policy, problems, trainer, run, partial(evaluation.while_training, policy, tasks, flags)


def main(argv: list[str] | None = None) -> int:
    def work() -> int:
        flags = parse_flags(sys.argv[1:] if argv is None else argv)
        return fine_tune(flags) if flags.sft else train(flags)

    return exit_code(
        work,
        "go on with --resume",
        "set --micro-batch-tokens or --max-rows lower, add --offload-optimizer if GPU memory ran "
        "out, or use a smaller model",
    )


if __name__ == "__main__":
    leave(main())
