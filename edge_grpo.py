"""EDGE-GRPO: group-relative policy optimisation with Guided Error Correction (GEC) and Entropy-Driven Advantages (EDA).

The method of arXiv 2507.21848 in plain PyTorch, in the order of the paper: the flags, what a response is, group
advantages, EDA, GEC, the loss, the update, the loop. rollout.py samples, reward.py grades, entropy.py tells the
entropies of tokens, eval.py measures; engine/ holds what training needs and no paper describes.

    python edge_grpo.py                                    # the tiny model on a CPU; --help lists every flag
    python edge_grpo.py --model Qwen/Qwen2.5-Math-7B       # the paper's run

Where it departs from the released code, and why, stands in results/README.md.

Letters: B responses in a step = Q questions x G, T tokens of a response, M tokens of a micro-batch, P a mean entropy.
"""

import math
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported: no traceback

import torch
from torch import Tensor

import data
import engine
import eval as evaluation
import reward
from data import Problem
from engine.console import exit_code, say, timed
from engine.flags import changed, check_ranges, flag, make_parser, run_name
from engine.memory import preflight
from engine.problems import training_problems
from engine.processes import leave, spread, start_processes, stream, uniform
from engine.run import Run
from engine.trainer import Trainer
from entropy import mean_entropy
from errors import UserError
from report.metrics import SHOWN, measure, readable
from report.page import conclude

# --- Flags -----------------------------------------------------------------------------------------------------------

METHODS = {  # the rows of the paper's tables, each a set of flags
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
TINY = dict(  # what `--profile tiny` overrides of the paper's settings below
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
    eval_every=10,
    eval_tasks=["tiny:5-8:validation", "tiny:1-3:validation"],
    eval_temperature=0.0,
    eval_max_new_tokens=160,
    save_tokens=True,
)


@dataclass
class Flags:
    """Every setting of a run. The defaults are the paper's (its released script where the paper is silent)."""

    model: str = flag(
        "tiny", "`tiny`, a local model folder, a hub id, or a bare Qwen or Llama name"
    )
    data: str = flag(
        "deepscaler-hard-1k",
        "training problems: a set, tiny:STEPS[:SPLIT[:STYLE]], or a JSON/JSONL file "
        "of rows {problem or question, answer, solution if references are used}",
    )
    profile: str = flag(
        "auto",
        "default settings: the paper's, or those of the tiny world (auto: for --model tiny)",
        choices=["auto", "paper", "tiny"],
    )
    method: str = flag(
        "edge-grpo",
        "a row of flags (METHODS), which flags given beside it override",
        choices=list(METHODS),
    )
    correction: str = flag(
        "guided",
        "GEC on wrong responses: none, guided (a draw among all), or one of them for all: "
        "reflect (Force-R), answer, reference, prefix",
    )
    guided_probs: list[float] = flag(
        [0.5, 0.25, 0.25],
        "probabilities of reflect, answer, reference, prefix; left out "
        "is 0. The paper's are for G = 8 (2/G each of the guided ones) and stay so at any "
        "other --group-size",
        0,
        1,
        names="P",
    )
    guide: str = flag(
        "every",
        "which wrong responses GEC corrects: every one (the paper), or only those of groups "
        "without a right one",
        choices=["every", "all-wrong"],
    )
    guide_at_most: int = flag(0, "corrections in a group at most; 0: no limit", 0)
    eda: bool = flag(True, "divide advantages by the relative entropy of their response (Eq. 6-7)")
    eda_clamp: list[float] = flag(
        [],
        "bounds LO HI of the relative entropy in EDA, or LO HI LO HI for positive and "
        "negative advantages apart (default: only a tiny floor)",
        names="BOUND",
    )
    eda_rows: str = flag(
        "all",
        "rows whose advantages EDA divides: all, right, wrong, or not-reference (all but those "
        "that a reference replaced)",
        choices=["all", "right", "wrong", "not-reference"],
    )
    eda_grad: bool = flag(
        False,
        "let the gradient flow through each response's own entropy, as the released code does",
    )
    sft: bool = flag(False, "no sampling: supervised fine-tuning on the reference solutions")
    advantage_std: str = flag(
        "group",
        "divide advantages by the standard deviation of the group's rewards, of the "
        "batch's, or not at all (Dr. GRPO)",
        choices=["group", "batch", "none"],
    )
    all_wrong_advantage: float = flag(
        0.0,
        "advantage of the responses of a group without a right one; -1: "
        "negative-sample reinforcement",
        -100,
        0,
    )
    correction_factors: list[float] = flag(
        [1, 1, 1, 1],
        "factors on the advantages of responses corrected by reflect, "
        "answer, reference, prefix; left out is 1",
        0,
        names="F",
    )
    injected_shaping: float = flag(
        0.0,
        "ratio p/(p + this), not clipped, for injected tokens (LUFFY: 0.1); 0: "
        "trained as if sampled, as in the paper",
        0,
    )
    mask_injected: bool = flag(
        False, "leave injected tokens out of the loss and of all counts in it"
    )
    mask_truncated: bool = flag(
        False, "leave truncated responses out of the loss and of all counts in it (DAPO)"
    )
    resample_rounds: int = flag(
        0, "replace groups of equal rewards by new questions, at most so often (DAPO)", 0
    )
    loss: str = flag(
        "sequence",
        "normalisation: sequence (1/B sum 1/|o|), token (1/sum |o|), or constant (1/(B x "
        "--max-new-tokens), Dr. GRPO)",
        choices=["sequence", "token", "constant"],
    )
    eps_low: float = flag(0.2, "clip range of the ratio below 1", 0, 1)
    eps_high: float = flag(0.2, "clip range of the ratio above 1", 0)
    kl: float = flag(
        0.0,
        "weight of the KL penalty to the initial model on sampled tokens; > 0 keeps that model in "
        "memory",
        0,
    )
    updates_per_rollout: int = flag(
        1, "optimizer updates on each rollout; above 1 the ratios differ from 1", 1
    )
    format_weight: float = flag(
        0.0, "weight of the format reward (closed, non-empty box; constant in the release)", 0
    )
    no_echo: bool = flag(
        False, "an answer that stands in the question is wrong, unless short or the gold as written"
    )
    drop_wrong_references: bool = flag(
        False, "do not use reference solutions that are not graded right"
    )
    questions_per_step: int = flag(1, "questions in a step", 1)
    group_size: int = flag(8, "responses per question, G", 1)
    steps: int = flag(1000, "training steps (rollouts)", 1)
    lr: float = flag(1e-6, "peak learning rate; it falls linearly to 0, without warm-up", 0)
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas", 0, 1, names=("B1", "B2"))
    weight_decay: float = flag(0.0, "AdamW's weight decay", 0)
    grad_clip: float = flag(1.0, "clip the gradient to this norm; 0: no clipping", 0)
    temperature: float = flag(
        0.6, "sampling temperature, also of every log-probability and entropy", 1e-3
    )
    top_p: float = flag(1.0, "nucleus sampling", 1e-6, 1)
    max_prompt_tokens: int = flag(
        512,
        "problems with a longer prompt, or one that fills the model's context, are left "
        "out, and counted",
        1,
    )
    max_new_tokens: int = flag(1024, "tokens sampled per response", 1)
    correction_tokens: int = flag(256, "tokens sampled after a reflection phrase", 0)
    max_corrected_tokens: int = flag(
        0, "cut corrected responses to this length; 0: only to the model's context", 0
    )
    micro_batch_tokens: int = flag(
        8192, "tokens in one forward and backward pass, each response with its prompt", 1
    )
    max_rows: int = flag(0, "rows sampled at a time; 0: as many as fit the memory", 0)
    gradient_checkpointing: bool = flag(True, "recompute activations in the backward pass")
    offload_optimizer: bool = flag(False, "keep master weights and moments in CPU memory")
    seed: int = flag(42, "seed of everything", 0)
    out: str = flag("", "the run's folder (default: runs/MODEL-METHOD-FLAGS-seedN)")
    resume: bool = flag(
        False, "go on from the newest whole checkpoint in --out; without a run there, start one"
    )
    overwrite: bool = flag(False, "delete an existing run in --out first")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end", 0)
    keep: int = flag(1, "newest checkpoints kept", 1)
    max_bad_steps: int = flag(5, "stop after this many steps in a row without a finite gradient", 1)
    eval_every: int = flag(
        100, "steps between evaluations; 0: only before the first step and after the last", 0
    )
    eval_tasks: list[str] = flag(
        [], "held-out problems evaluated during training (see eval.py --tasks)", names="TASK"
    )
    eval_limit: int = flag(0, "problems of each of these tasks; 0: all", 0)
    eval_limit_between: int = flag(
        64, "the same in the evaluations between the first and the last", 0
    )
    eval_n: int = flag(1, "responses per problem in these evaluations", 1)
    eval_temperature: float = flag(0.1, "temperature of these evaluations; 0: greedy", 0)
    eval_max_new_tokens: int = flag(
        3000, "tokens per response there, with its prompt at most 4096", 1
    )
    save_tokens: bool = flag(
        False, "samples.jsonl also holds each token with its entropy, for eval.py show --html"
    )
    template: str = flag("auto", "prompt form", choices=["auto", "qwen", "llama"])
    mirror: str = flag(
        "", "a folder or base address that holds the downloads instead of their public addresses"
    )
    trust_remote_code: bool = flag(False, "allow a model to bring its own code")
    differing: ClassVar[dict] = {}  # what is not as the profile and the method's row have it


def parse_flags(argv: list[str]) -> Flags:
    """Defaults, then the tiny profile, then the method's row, then the flags as given. UserError for a value out of
    range or flags in conflict."""
    parser = partial(make_parser, Flags, description=__doc__, usage="python edge_grpo.py [flags]")
    first, _ = parser({}).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    tiny = first.profile == "tiny" or (first.profile == "auto" and first.model == "tiny")
    defaults = {**(TINY if tiny else {}), **METHODS[first.method]}
    flags = Flags(**vars(parser(defaults).parse_args(argv)))
    flags.differing = changed(flags, defaults)
    flags.out = flags.out or f"runs/{run_name(flags, flags.differing)}"
    check_ranges(flags)
    clamp, probs, guided = flags.eda_clamp, flags.guided_probs, flags.correction == "guided"
    conflicts = [
        (
            flags.correction not in ("none", "guided", *CORRECTIONS),
            f"--correction {flags.correction}: must be none, guided, {', '.join(CORRECTIONS)}",
        ),
        (
            guided and (len(probs) > len(CORRECTIONS) or abs(sum(probs) - 1) > 1e-6),
            f"--guided-probs {' '.join(map(str, probs))}: at most {len(CORRECTIONS)}; must sum to 1, not {sum(probs):g}",
        ),
        (
            probs != Flags().guided_probs and not guided,
            "--guided-probs belongs to --correction guided: add that, or drop --guided-probs",
        ),
        (
            (flags.guide != "every" or flags.guide_at_most) and flags.correction == "none",
            "--guide and --guide-at-most belong to a --correction, which is none: add one, or drop them",
        ),
        (
            len(clamp) not in (0, 2, 4)
            or any(not 0 < lo < hi for lo, hi in zip(clamp[::2], clamp[1::2])),
            f"--eda-clamp {' '.join(map(str, clamp))}: needs LO HI or LO HI LO HI with 0 < LO < HI",
        ),
        (
            (clamp or flags.eda_grad or flags.eda_rows != "all") and not flags.eda,
            "--eda-clamp, --eda-rows and --eda-grad belong to EDA, which is off: add --eda, or drop them",
        ),
        (
            len(flags.correction_factors) > len(CORRECTIONS),
            f"--correction-factors: at most {len(CORRECTIONS)}",
        ),
        (
            flags.eda_grad and (flags.updates_per_rollout > 1 or flags.injected_shaping),
            "--eda-grad is defined where every ratio is 1: set --updates-per-rollout 1 --injected-shaping 0",
        ),
        (max(flags.betas) >= 1, f"--betas {flags.betas[0]} {flags.betas[1]}: must be below 1"),
        (
            flags.sft
            and (
                flags.correction != "none"
                or flags.eda
                or flags.kl
                or flags.injected_shaping
                or flags.mask_injected
            ),
            "--sft trains on reference solutions alone: use --correction none --no-eda --kl 0, and drop "
            "--injected-shaping and --mask-injected",
        ),
        (
            flags.group_size == 1 and not (flags.sft or flags.all_wrong_advantage),
            "--group-size 1: a group of one has no advantage, so nothing would be learned; give 2 or more",
        ),
        (
            flags.resume and flags.overwrite,
            "--resume goes on with a run, --overwrite deletes it: give one of the two",
        ),
    ]
    for wrong, sentence in conflicts:
        if wrong:
            raise UserError(sentence)
    return flags


# --- Responses -------------------------------------------------------------------------------------------------------


@dataclass
class Response:
    """One response to one problem, in token ids. Text is made from ids, never ids from text that came from ids. Every
    random choice about it is `stream` of (seed, step, what, row): nothing random is saved, processes change nothing."""

    problem: Problem
    prompt: list[int]
    ids: list[int] = field(default_factory=list)  # the end token included, once finished
    injected: list[bool] = field(
        default_factory=list
    )  # origin of each token: False sampled, True put there by GEC
    logprobs: list[float] = field(
        default_factory=list
    )  # the sampler's log-probability of each; NaN where injected
    entropies: list[float] = field(
        default_factory=list
    )  # the policy's entropy there; NaN where not known yet
    sampled: int = 0  # how many tokens the policy sampled for this copy of it
    finished: bool = False  # ended by an end token, not cut by a limit
    correction: str = ""  # a row of CORRECTIONS, or ""
    text: str = ""  # of ids, once graded
    accuracy: float | None = None  # 0.0 or 1.0 once graded
    format: float | None = None
    logp: Tensor | None = None  # (T,) by the trainer, from the first update's forward
    trainer_entropies: Tensor | None = None

    @property
    def entropy(self) -> float:
        """Eq. 3: P_i = 1/|o_i| sum_t H_t over the response's own tokens; 0 if it has none."""
        return mean_entropy([torch.tensor(self.entropies)]).item()

    def cut(self, limit: int) -> None:
        """Drop what is beyond `limit` tokens."""
        if len(self.ids) > limit:
            self.finished = False
            for column in (self.ids, self.injected, self.logprobs, self.entropies):
                del column[limit:]


def batch_of_problems(
    problems: list[Problem], flags: Flags, step: int, *again: int
) -> list[Problem]:
    """The problems of a step: consecutive items of an endless sequence of shuffled epochs. `again`: the round of
    resampling, which has a sequence of its own."""
    batch = []
    for k in range(step * flags.questions_per_step, (step + 1) * flags.questions_per_step):
        epoch, i = divmod(k, len(problems))
        shuffling = torch.Generator().manual_seed(stream(flags.seed, "epoch", epoch, *again))
        batch.append(problems[torch.randperm(len(problems), generator=shuffling)[i]])
    return batch


@timed("sample")
def sample(
    policy: engine.Policy, problems: list[Problem], flags: Flags, step: int, *again: int
) -> list[Response]:
    """G responses to each of Q problems, question-major: Q x G."""
    prompts = [policy.prompt_ids(problem.question) for problem in problems]
    responses = [
        Response(problem, prompt)
        for problem, prompt in zip(problems, prompts)
        for _ in range(flags.group_size)
    ]
    extend(
        policy, dict(enumerate(responses)), flags.max_new_tokens, flags, (step, "sample", *again)
    )
    return responses


def extend(
    policy: engine.Policy, responses: dict[int, Response], limit: int, flags: Flags, key: tuple
) -> None:
    """Let the policy continue each response (by its row in the step) in place, by at most `limit` tokens."""
    seeds = [stream(flags.seed, *key, row) for row in responses]
    samples = policy.sample(
        [r.prompt + r.ids for r in responses.values()],
        [limit] * len(responses),
        seeds,
        flags.temperature,
        flags.top_p,
    )
    for r, s in zip(responses.values(), samples):
        r.ids, r.logprobs, r.entropies = (
            r.ids + s.ids,
            r.logprobs + s.logprobs,
            r.entropies + s.entropies,
        )
        r.injected, r.finished, r.sampled = (
            r.injected + [False] * len(s.ids),
            s.finished,
            len(s.ids),
        )


@timed("sample")
def references(policy: engine.Policy, problems: list[Problem]) -> list[Response]:
    """SFT: the reference solution of each problem, as a response whose every token is injected."""
    responses = [
        corrected_by("reference", Response(p, policy.prompt_ids(p.question)), policy)
        for p in problems
    ]
    for r in responses:
        r.cut(policy.room(r.prompt))
    return responses


@timed("grade")
def grade(policy: engine.Policy, responses: list[Response], no_echo: bool = False) -> None:
    """Format and accuracy of the responses that have none yet; no_echo: what only quotes the question is wrong."""
    new = [r for r in responses if r.accuracy is None]
    for r in new:
        r.text = policy.decode(r.ids)
    rows = [(r.text, list(r.problem.answers), r.problem.question if no_echo else "") for r in new]
    scores = spread(rows, lambda mine: reward.score_all(*map(list, zip(*mine))) if mine else [])
    for r, (well_formed, accuracy) in zip(new, scores):
        r.format, r.accuracy = well_formed, accuracy


def rewards(responses: list[Response], flags: Flags) -> Tensor:
    """(Q, G): accuracy + w x format. Any number may be a reward; what GEC corrects is what the grader calls wrong."""
    values = [r.accuracy + flags.format_weight * r.format for r in responses]
    return torch.tensor(values, dtype=torch.float64).view(-1, 1 if flags.sft else flags.group_size)


def resample_equal_groups(
    policy: engine.Policy,
    responses: list[Response],
    problems: list[Problem],
    flags: Flags,
    step: int,
) -> tuple[list[Response], list[Response]]:
    """DAPO's dynamic sampling: groups whose rewards are all equal are replaced by new questions, round after round.
    Returns the step's Q x G responses, and everything that was sampled for it, graded."""
    G, kept, everything = flags.group_size, list(responses), list(responses)
    for again in range(1, flags.resample_rounds + 1):
        equal = [q for q, r_G in enumerate(rewards(kept, flags)) if (r_G == r_G[0]).all()]
        if not equal:
            break
        new = sample(
            policy,
            batch_of_problems(problems, flags, step, again)[: len(equal)],
            flags,
            step,
            again,
        )
        grade(policy, new, flags.no_echo)
        everything += new
        for k, q in enumerate(equal):
            kept[q * G : (q + 1) * G] = new[k * G : (k + 1) * G]
    return kept, everything


# --- Group advantages (GRPO) -----------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, eps: float = 1e-4, std: str = "group") -> Tensor:
    """A_i = (r_i - mean_j r_j) / (std_j r_j + eps), j over the group; (Q, G) -> (Q, G).

    std is unbiased (n - 1), "group" of the group, "batch" of all rewards, "none" for no division (Dr. GRPO). A group of
    one has no spread, so its advantage is 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[1] == 1 or std == "none":
        return centred
    return centred / ((rewards.std() if std == "batch" else rewards.std(dim=1, keepdim=True)) + eps)


def advantages_of(responses: list[Response], flags: Flags) -> Tensor:
    """(Q, G): the group advantages, or --all-wrong-advantage in groups without a right response."""
    A = group_advantages(rewards(responses, flags), std=flags.advantage_std)
    if flags.all_wrong_advantage:
        right = torch.tensor([r.accuracy > 0 for r in responses]).view_as(A)
        A = A.masked_fill(~right.any(dim=1, keepdim=True), flags.all_wrong_advantage)
    return A


# --- Entropy-Driven Advantage (EDA) ----------------------------------------------------------------------------------

TINY_FLOOR = 1e-4  # of the relative entropy, so that a response of one repeated token cannot blow up the step


@timed("update")
def response_entropy(trainer: Trainer, responses: list[Response], group_size: int) -> Tensor:
    """Eq. 3: P_i of each response, (Q, G). The sampler has told the entropies of what it sampled; rows with injected
    tokens get a forward pass (for all rows it would take 14% of a step: tests/bench_step.py --score)."""
    new = [r for r in responses if any(math.isnan(h) for h in r.entropies)]
    for r, (_, entropies) in zip(new, trainer.score([r.prompt for r in new], [r.ids for r in new])):
        r.entropies = entropies.tolist()
    return torch.tensor([r.entropy for r in responses], dtype=torch.float64).view(-1, group_size)


def entropy_driven_advantages(
    advantages: Tensor,
    response_entropy: Tensor,
    clamp: tuple[float, ...] | list[float] | None = None,
) -> Tensor:
    """Eq. 6-7: P^_i = P_i / mean_j P_j over the group, A^_i = A_i / P^_i; (Q, G), (Q, G) -> (Q, G).

    Confident and right: rewarded more. Confident and wrong: punished more. `clamp` bounds P^: (lo, hi), or (lo, hi, lo,
    hi) for positive and negative advantages apart; without it there is only a tiny floor. A group without any entropy
    keeps its advantages. Differentiable in each response's own entropy: the mean is detached, as in the release.
    """
    mean = response_entropy.mean(dim=1, keepdim=True).detach()
    relative = torch.where(
        mean > 0, response_entropy / mean.clamp(min=1e-30), torch.ones_like(response_entropy)
    )
    *positive, lo, hi = clamp or (TINY_FLOOR, None)
    bounded = relative.clamp(lo, hi)
    if positive:
        bounded = torch.where(advantages > 0, relative.clamp(*positive), bounded)
    return advantages / bounded


def rows_of_eda(responses: list[Response], flags: Flags) -> Tensor:
    """(Q, G): whether EDA divides the advantage of each response (--eda-rows)."""
    of_row = {
        "all": lambda r: True,
        "right": lambda r: r.accuracy > 0,
        "wrong": lambda r: r.accuracy == 0,
        "not-reference": lambda r: r.correction != "reference",
    }[flags.eda_rows]
    return torch.tensor([of_row(r) for r in responses]).view(-1, flags.group_size)


# --- Guided Error Correction (GEC) -----------------------------------------------------------------------------------

REFLECT = " Wait! Something is wrong here."
ANSWER = "\nWait! Something is wrong here. After verification, the correct answer is \\boxed{{{}}}."


def reflection(policy: engine.Policy, problem: Problem, u: float) -> list[int]:
    return policy.encode(REFLECT)


def direct_answer(policy: engine.Policy, problem: Problem, u: float) -> list[int]:
    return policy.encode(ANSWER.format(data.gold_text(problem)))


def reference(policy: engine.Policy, problem: Problem, u: float) -> list[int]:
    return policy.encode(problem.solution)


def reference_prefix(policy: engine.Policy, problem: Problem, u: float) -> list[int]:
    """The first quarter, half or three quarters."""
    ids = policy.encode(problem.solution)
    return ids[: math.ceil(len(ids) * (1 + int(3 * u)) / 4)]


@dataclass(frozen=True)
class Correction:
    """What is done to a wrong response. A new one is a row below and its function."""

    adds: Callable[
        [engine.Policy, Problem, float], list[int]
    ]  # token ids; the number in [0, 1) is for its draws
    keeps: bool  # behind the response's own tokens; False: instead of them
    goes_on: bool  # then the policy continues; False: an end token closes it
    needs_solution: bool
    count: str  # its number in metrics.jsonl


CORRECTIONS = {  # in the order of --guided-probs
    "reflect": Correction(
        reflection, keeps=True, goes_on=True, needs_solution=False, count="reflected"
    ),
    "answer": Correction(
        direct_answer, keeps=True, goes_on=False, needs_solution=False, count="answered"
    ),
    "reference": Correction(
        reference, keeps=False, goes_on=False, needs_solution=True, count="referenced"
    ),
    "prefix": Correction(
        reference_prefix, keeps=False, goes_on=True, needs_solution=True, count="prefixed"
    ),
}


def correction_probabilities(flags: Flags, problem: Problem | None = None) -> dict[str, float]:
    """Of each correction that can be drawn for a wrong response; a problem without solution leaves its share to the
    others. Force-R is one correction with p = 1."""
    drawn = {"none": {}, "guided": dict(zip(CORRECTIONS, flags.guided_probs))}.get(flags.correction)
    drawn = {flags.correction: 1.0} if drawn is None else drawn
    possible = {
        name: p
        for name, p in drawn.items()
        if p > 0 and not (problem and problem.solution is None and CORRECTIONS[name].needs_solution)
    }
    return (
        possible
        if len(possible) == len(drawn)
        else {k: p / sum(possible.values()) for k, p in possible.items()}
    )


def draw_correction(probabilities: dict[str, float], u: float) -> str:
    """The correction that u in [0, 1) falls into; "" if there is none."""
    for name, p in probabilities.items():
        if u < p:
            return name
        u -= p
    return next(reversed(probabilities), "")  # only rounding can leave u here


def corrected_by(name: str, response: Response, policy: engine.Policy, u: float = 0.0) -> Response:
    """The edited copy of a response. Its own tokens stay as they were sampled; what is added is marked injected."""
    correction = CORRECTIONS[name]
    kept = (
        len(response.ids) - (1 if response.finished else 0) if correction.keeps else 0
    )  # without the end token
    added = correction.adds(policy, response.problem, u) + (
        [] if correction.goes_on else [policy.end_id]
    )
    unknown = [math.nan] * len(added)
    return Response(
        response.problem,
        response.prompt,
        response.ids[:kept] + added,
        response.injected[:kept] + [True] * len(added),
        response.logprobs[:kept] + unknown,
        response.entropies[:kept] + unknown,
        finished=not correction.goes_on,
        correction=name,
    )


def factors_of_corrections(responses: list[Response], flags: Flags) -> Tensor:
    """(Q, G): what the advantage of each response is multiplied by (--correction-factors); 1 for untouched ones."""
    of_correction = dict(zip(CORRECTIONS, flags.correction_factors))
    factors = [of_correction.get(r.correction, 1.0) for r in responses]
    return torch.tensor(factors, dtype=torch.float64).view(-1, 1 if flags.sft else flags.group_size)


def to_be_corrected(responses: list[Response], flags: Flags) -> list[int]:
    """The rows of wrong responses: every one (the paper), or as --guide and --guide-at-most say."""
    rows = []
    for first in range(0, len(responses), flags.group_size):
        group = range(first, first + flags.group_size)
        wrong = [row for row in group if responses[row].accuracy == 0]
        if flags.guide == "every" or len(wrong) == len(group):
            rows += wrong[: flags.guide_at_most or None]
    return rows


@timed("correct")
def correct_errors(
    policy: engine.Policy, responses: list[Response], flags: Flags, step: int
) -> list[Response]:
    """One independent draw for each wrong response, one pass, no re-check; right responses are passed on untouched."""
    corrected, going_on = list(responses), {}
    for row in to_be_corrected(responses, flags) if flags.correction != "none" else []:
        r = responses[row]
        name = draw_correction(
            correction_probabilities(flags, r.problem), uniform(flags.seed, step, "branch", row)
        )
        if name:
            corrected[row] = corrected_by(name, r, policy, uniform(flags.seed, step, name, row))
            if CORRECTIONS[name].goes_on:
                going_on[row] = corrected[row]
    extend(policy, going_on, flags.correction_tokens, flags, (step, "reflect"))
    for r in corrected:
        if r.correction:
            most = policy.room(r.prompt)
            r.cut(min(flags.max_corrected_tokens or most, most))
    return corrected


# --- The loss --------------------------------------------------------------------------------------------------------


@dataclass
class Tokens:
    """What the loss needs to know of each response token: (T,) tensors for a response, (M,) for a micro-batch."""

    weights: Tensor  # of the token in the whole step's loss
    advantages: Tensor  # A^ of its response
    injected: Tensor  # 1 where GEC put it there, 0 where the policy sampled it
    old_logp: Tensor | None = (
        None  # under the policy that sampled; None: the policy has not changed since
    )
    reference_logp: Tensor | None = None  # under the initial model (KL)
    entropy_slopes: Tensor | None = None  # d loss / d H_t through the advantages (--eda-grad)


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
) -> Tensor:
    """The clipped surrogate: -sum_m w_m min(rho_m A_m, clip(rho_m, 1 - eps_low, 1 + eps_high) A_m), with the ratio
    rho = exp(logp - old_logp); all (M,) -> scalar."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.minimum(
        ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    )
    return (weights * -surrogate).sum()


def kl_penalty(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1, d = reference_logp - logp."""
    d = reference_logp - logp
    return torch.exp(d) - d - 1


def loss_of_tokens(logp: Tensor, entropy: Tensor, t: Tokens, flags: Flags) -> Tensor:
    """What M tokens contribute to the step's loss: logp (M,), entropy (M,) -> scalar."""
    if flags.sft:
        return (t.weights * -logp).sum()
    old_logp = (
        logp.detach() if t.old_logp is None else t.old_logp
    )  # ratio 1: only its gradient matters
    on_policy = t.weights * (1 - t.injected) if flags.injected_shaping else t.weights
    loss = policy_loss(logp, old_logp, t.advantages, on_policy, flags.eps_low, flags.eps_high)
    if flags.injected_shaping:  # LUFFY, Eq. 6: no ratio, no clip
        p = torch.exp(logp)
        loss = (
            loss - (t.weights * t.injected * t.advantages * p / (p + flags.injected_shaping)).sum()
        )
    if flags.kl:  # an estimate of the KL only for what the policy itself has drawn
        loss = (
            loss
            + flags.kl
            * (t.weights * kl_penalty(logp, t.reference_logp).masked_fill(t.injected > 0, 0)).sum()
        )
    if flags.eda_grad:  # adds a gradient, no value
        loss = loss + (t.entropy_slopes * (entropy - entropy.detach())).sum()
    return loss


def token_weights(lengths: list[int], reduction: str, longest: int) -> list[float]:
    """Weight in the step's loss of each token of row i: "sequence" 1/(B |o_i|), "token" 1/sum_j |o_j|, "constant"
    1/(B longest). Each row has it in the whole step's loss, so micro-batches and processes only add up."""
    B, total = len(lengths), max(sum(lengths), 1)
    return [
        {"sequence": 1 / (B * max(n, 1)), "token": 1 / total, "constant": 1 / (B * longest)}[
            reduction
        ]
        for n in lengths
    ]


def tokens_of(responses: list[Response], A_hat: Tensor, flags: Flags) -> list[Tokens]:
    """The tokens of each response with their weights. A masked token is in no count, a row of masked ones not in B."""
    counted = [
        [
            not (flags.mask_truncated and not r.finished) and not (flags.mask_injected and x)
            for x in r.injected
        ]
        for r in responses
    ]
    rows = [i for i, r in enumerate(responses) if any(counted[i]) or not r.ids]
    of_row = dict(
        zip(rows, token_weights([sum(counted[i]) for i in rows], flags.loss, flags.max_new_tokens))
    )
    tokens = []
    for i, (r, a) in enumerate(zip(responses, A_hat.flatten().tolist())):
        injected = torch.tensor(r.injected, dtype=torch.float32)
        weights = torch.tensor([of_row.get(i, 0.0) * c for c in counted[i]])
        tokens.append(Tokens(weights, torch.full_like(weights, a), injected))
    return tokens


# --- The update ------------------------------------------------------------------------------------------------------


@timed("update")
def update(
    trainer: Trainer, responses: list[Response], A_hat: Tensor, P: Tensor, flags: Flags, lr: float
) -> dict:
    """The step's optimizer updates on all B responses; A_hat and P are (Q, G).

    The first update's forward also tells the responses' `logp`, and the entropies that are not known yet. Returns loss
    and gradient norm (means over the updates) and how many updates were skipped as not finite.
    """
    prompts, ids, tokens = (
        [r.prompt for r in responses],
        [r.ids for r in responses],
        tokens_of(responses, A_hat, flags),
    )
    if flags.eda_grad:  # at ratio 1 the loss is -sum_i w_i A^_i(P), with w_i the sum of row i
        w_QG = torch.stack([t.weights.double().sum() for t in tokens]).view_as(A_hat)
        slopes = torch.autograd.grad(-(w_QG * A_hat).sum(), P)[0]
        for t, slope in zip(tokens, slopes.flatten().tolist()):
            t.entropy_slopes = torch.full_like(t.weights, slope / max(len(t.weights), 1))
    if flags.kl:
        for t, (logp, _) in zip(tokens, trainer.score(prompts, ids, reference=True)):
            t.reference_logp = logp
    losses, norms = [], []
    for k in range(flags.updates_per_rollout):
        loss, logp, entropies = trainer.forward_backward(
            prompts, ids, tokens, partial(loss_of_tokens, flags=flags)
        )
        if k == 0:  # still the policy that sampled
            for r, t, old_logp, told in zip(responses, tokens, logp, entropies):
                r.logp, t.old_logp, r.trainer_entropies = old_logp, old_logp, told
                r.entropies = [
                    h if math.isnan(known) else known
                    for known, h in zip(r.entropies, told.tolist())
                ]
        losses.append(loss)
        norms.append(trainer.step(lr, flags.grad_clip) if math.isfinite(loss) else trainer.skip())
    return {
        "loss": sum(losses) / len(losses),
        "grad_norm": sum(norms) / len(norms),
        "skipped_updates": sum(not math.isfinite(norm) for norm in norms),
        "lr": lr,
    }


# --- The run ---------------------------------------------------------------------------------------------------------


def train(flags: Flags) -> int:
    """The whole run; returns the exit code."""
    rows = 0 if flags.sft else flags.questions_per_step * flags.group_size
    max_rows = preflight(
        flags,
        start_processes(flags.device),
        rows,
        flags.max_prompt_tokens + flags.max_new_tokens + flags.correction_tokens,
    )
    policy = engine.load_policy(
        flags.model, flags.device, flags.template, max_rows, flags.trust_remote_code
    )
    corrections = correction_probabilities(flags)
    needs_solution = flags.sft or any(CORRECTIONS[name].needs_solution for name in corrections)
    problems, left_out, wrong_references = training_problems(flags, policy, needs_solution)
    if corrections and not any(CORRECTIONS[name].goes_on for name in corrections):
        say(
            "note: without reflections every wrong response becomes a right one, no group is mixed, and nothing is "
            "learned; give the first of --guided-probs more than 0"
        )
    tasks = {
        task: data.load(task, flags.mirror or None)[: flags.eval_limit or None]
        for task in flags.eval_tasks
    }
    with Run(flags, policy, problems, left_out, wrong_references) as run:
        trainer = Trainer(
            policy,
            flags.micro_batch_tokens,
            temperature=1.0 if flags.sft else flags.temperature,
            entropy_grad=flags.eda_grad,
            betas=tuple(flags.betas),
            weight_decay=flags.weight_decay,
            offload=flags.offload_optimizer,
            checkpointing=flags.gradient_checkpointing,
            keep_reference=flags.kl > 0,
        )
        for step in run.steps(
            trainer, partial(evaluation.while_training, policy, tasks, flags), SHOWN
        ):
            batch = batch_of_problems(problems, flags, step)  # Q problems
            responses = (
                references(policy, batch) if flags.sft else sample(policy, batch, flags, step)
            )  # Q x G
            grade(policy, responses, flags.no_echo)
            responses, sampled = resample_equal_groups(
                policy, responses, problems, flags, step
            )  # DAPO; else no round
            corrected = correct_errors(
                policy, responses, flags, step
            )  # GEC: wrong ones edited, some continued
            grade(policy, corrected, flags.no_echo)
            A = advantages_of(corrected, flags)  # (Q, G)
            A_hat, P = A, None
            if flags.eda:
                P = response_entropy(trainer, corrected, flags.group_size).requires_grad_(
                    flags.eda_grad
                )  # Eq. 3
                A_hat = entropy_driven_advantages(A, P, flags.eda_clamp or None)  # Eq. 6-7
                A_hat = torch.where(rows_of_eda(corrected, flags), A_hat, A)
            A_hat = A_hat * factors_of_corrections(corrected, flags)
            stats = update(
                trainer, corrected, A_hat, P, flags, lr=flags.lr * (1 - step / flags.steps)
            )
            metrics = measure(
                sampled, corrected, A, A_hat, partial(rewards, flags=flags), CORRECTIONS, flags
            )
            run.log(
                step,
                stats | metrics,
                readable(policy, responses, corrected, A, A_hat, flags.save_tokens),
            )
    return run.code or conclude(flags)


def main(argv: list[str] | None = None) -> int:
    return exit_code(
        lambda: train(parse_flags(sys.argv[1:] if argv is None else argv)),
        "go on with --resume",
        "set --micro-batch-tokens or --max-rows lower, add --offload-optimizer if it is the GPU's, or "
        "take a smaller model",
    )


if __name__ == "__main__":
    leave(main())
