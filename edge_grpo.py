"""EDGE-GRPO: group-relative policy optimisation with Guided Error Correction (GEC) and Entropy-Driven Advantages (EDA).

The method of arXiv 2507.21848 in plain PyTorch, in the order of the paper: the flags, what a response is, group
advantages, EDA, GEC, the loss, the update, the loop. rollout.py samples, reward.py grades, entropy.py tells the
entropies of tokens, eval.py measures; engine/ holds what training needs and no paper describes.

    python edge_grpo.py                                    # the tiny model on a CPU
    python edge_grpo.py --model Qwen2.5-Math-7B            # the paper's run
    python edge_grpo.py --method grpo --seed 1             # a baseline; --help lists every flag

Where it departs from the released code, and why, stands in results/README.md.

Letters: B responses in a step = Q questions x G, T tokens of a response, M response tokens of a micro-batch, P the mean
entropy of a response. Names in _QG and comments say the shape of a tensor.
"""
import math
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # Ctrl-C while modules are imported: no traceback

import torch
from torch import Tensor

import data
import engine
import eval as evaluation
import reward
from data import Problem, UserError
from engine.console import exit_code, say, timed
from engine.flags import changed, check_ranges, flag, make_parser, run_name
from engine.memory import preflight
from engine.processes import leave, spread, start_processes, stream
from engine.run import Run
from engine.trainer import Trainer
from entropy import mean_entropy
from results.report import conclude

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
    eda_clamp: list[float] = flag([], "bounds LO HI of the relative entropy in EDA (default: only a tiny floor)",
                                  names=("LO", "HI"))
    guided_probs: list[float] = flag([0.5, 0.25, 0.25], "GEC: probabilities of reflect, answer, reference", 0, 1,
                                     names=("REFLECT", "ANSWER", "REFERENCE"))
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
    betas: list[float] = flag([0.9, 0.999], "AdamW's betas", 0, 1, names=("B1", "B2"))
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
    out: str = flag("", "the run's folder (default: runs/MODEL-METHOD-FLAGS-seedN)")
    resume: bool = flag(False, "go on from the newest whole checkpoint in --out; without a run there, start one")
    overwrite: bool = flag(False, "delete an existing run in --out first")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    save_every: int = flag(100, "steps between checkpoints; 0: only at the end", 0)
    keep: int = flag(1, "newest checkpoints kept", 1)
    max_bad_steps: int = flag(5, "stop after this many steps in a row without a finite gradient", 1)
    eval_every: int = flag(0, "steps between evaluations; 0: before the first step and after the last", 0)
    eval_tasks: list[str] = flag([], "held-out problems evaluated during training (see eval.py --tasks)", names="TASK")
    eval_limit: int = flag(0, "problems of each of these tasks; 0: all", 0)
    eval_n: int = flag(1, "responses per problem in these evaluations", 1)
    eval_temperature: float = flag(0.1, "temperature of these evaluations; 0: greedy", 0)
    eval_max_new_tokens: int = flag(3000, "tokens per response there, with its prompt at most 4096", 1)
    template: str = flag("auto", "prompt form", choices=["auto", "qwen", "llama"])
    mirror: str = flag("", "a folder or base address that holds the downloads instead of their public addresses")
    trust_remote_code: bool = flag(False, "allow a model to bring its own code")
    differing: ClassVar[dict] = {}          # what is not as the profile and the method's row have it


def parse_flags(argv: list[str]) -> Flags:
    """Defaults, then the tiny profile (for `--model tiny`), then the method's row, then the flags as given. UserError
    for a value out of range or flags in conflict."""
    parser = partial(make_parser, Flags, description=__doc__, usage="python edge_grpo.py [flags]")
    first, _ = parser({}).parse_known_args([a for a in argv if a not in ("-h", "--help")])
    defaults = {**(TINY if first.model == "tiny" else {}), **METHODS[first.method]}
    flags = Flags(**vars(parser(defaults).parse_args(argv)))
    flags.differing = changed(flags, defaults)
    flags.out = flags.out or f"runs/{run_name(flags, flags.differing)}"
    check_ranges(flags)
    lo_hi, probs = flags.eda_clamp, flags.guided_probs
    conflicts = [
        (lo_hi and not 0 < lo_hi[0] < lo_hi[1], f"--eda-clamp {' '.join(map(str, lo_hi))}: needs 0 < LO < HI"),
        (lo_hi and not flags.eda, "--eda-clamp bounds EDA, which is off: add --eda, or drop --eda-clamp"),
        (probs != Flags().guided_probs and flags.correction != "guided",
         "--guided-probs belongs to --correction guided: add that, or drop --guided-probs"),
        (abs(sum(probs) - 1) > 1e-6, f"--guided-probs {' '.join(map(str, probs))}: must sum to 1, not {sum(probs):g}"),
        (max(flags.betas) >= 1, f"--betas {flags.betas[0]} {flags.betas[1]}: must be below 1"),
        (flags.eda_grad and not flags.eda, "--eda-grad needs EDA: add --eda, or drop --eda-grad"),
        (flags.eda_grad and flags.updates_per_rollout > 1,
         "--eda-grad is defined for one update per rollout: set --updates-per-rollout 1"),
        (flags.sft and (flags.correction != "none" or flags.eda),
         "--sft samples nothing, so there is nothing to correct or weigh: use --correction none --no-eda"),
        (flags.sft and flags.kl, "--sft has no KL penalty: set --kl 0"),
        (flags.sft and flags.injected_weight != 1,
         "--sft trains on references alone, with weight 1: drop --injected-weight"),
        (flags.resume and flags.overwrite, "--resume goes on with a run, --overwrite deletes it: give one of the two"),
    ]
    for wrong, sentence in conflicts:
        if wrong:
            raise UserError(sentence)
    return flags


# --- Responses -------------------------------------------------------------------------------------------------------
# Every random choice of a run is `stream` of (seed, step, what, row), so nothing random needs to be saved, and the
# number of processes changes nothing.

@dataclass
class Response:
    """One response to one problem, in token ids. Text is made from ids, never ids from text that came from ids."""
    problem: Problem
    prompt: list[int]
    ids: list[int] = field(default_factory=list)            # the end token included, once finished
    injected: list[bool] = field(default_factory=list)      # origin of each token: False sampled, True put there by GEC
    logprobs: list[float] = field(default_factory=list)     # the sampler's log-probability of each; NaN where injected
    entropies: list[float] = field(default_factory=list)    # the policy's entropy there; NaN where not known yet
    sampled: int = 0                        # how many tokens the policy sampled for this copy of it
    finished: bool = False                  # ended by an end token, not cut by a limit
    correction: str = ""                    # a row of CORRECTIONS, or ""
    text: str = ""                          # of ids, once graded
    accuracy: float | None = None           # 0.0 or 1.0 once graded
    format: float | None = None
    logp: Tensor | None = None              # (T,) the trainer's log-probabilities, from the first update's forward

    def cut(self, limit: int) -> None:
        """Drop what is beyond `limit` tokens."""
        if len(self.ids) > limit:
            self.finished = False
            for column in (self.ids, self.injected, self.logprobs, self.entropies):
                del column[limit:]


def batch_of_problems(problems: list[Problem], flags: Flags, step: int) -> list[Problem]:
    """The problems of a step: consecutive items of an endless sequence of shuffled epochs."""
    batch = []
    for k in range(step * flags.questions_per_step, (step + 1) * flags.questions_per_step):
        epoch, i = divmod(k, len(problems))
        shuffling = torch.Generator().manual_seed(stream(flags.seed, "epoch", epoch))
        batch.append(problems[torch.randperm(len(problems), generator=shuffling)[i]])
    return batch


@timed("sample")
def sample(policy: engine.Policy, problems: list[Problem], flags: Flags, step: int) -> list[Response]:
    """G responses to each of Q problems, question-major: Q x G."""
    prompts = [policy.prompt_ids(problem.question) for problem in problems]
    responses = [Response(problem, prompt) for problem, prompt in zip(problems, prompts)
                 for _ in range(flags.group_size)]
    extend(policy, dict(enumerate(responses)), flags.max_new_tokens, flags, (step, "sample"))
    return responses


def extend(policy: engine.Policy, responses: dict[int, Response], limit: int, flags: Flags, key: tuple) -> None:
    """Let the policy continue each response (by its row in the step) in place, by at most `limit` tokens."""
    seeds = [stream(flags.seed, *key, row) for row in responses]
    samples = policy.sample([r.prompt + r.ids for r in responses.values()], [limit] * len(responses), seeds,
                            flags.temperature, flags.top_p)
    for r, s in zip(responses.values(), samples):
        r.ids, r.logprobs, r.entropies = r.ids + s.ids, r.logprobs + s.logprobs, r.entropies + s.entropies
        r.injected, r.finished, r.sampled = r.injected + [False] * len(s.ids), s.finished, len(s.ids)


@timed("sample")
def references(policy: engine.Policy, problems: list[Problem]) -> list[Response]:
    """SFT: the reference solution of each problem, as a response whose every token is injected."""
    responses = [corrected_by("reference", Response(p, policy.prompt_ids(p.question)), policy) for p in problems]
    for r in responses:
        r.cut(policy.room(r.prompt))
    return responses


@timed("grade")
def grade(policy: engine.Policy, responses: list[Response]) -> None:
    """Format and accuracy of the responses that have none yet."""
    new = [r for r in responses if r.accuracy is None]
    for r in new:
        r.text = policy.decode(r.ids)
    rows = [(r.text, list(r.problem.answers)) for r in new]
    scores = spread(rows, lambda mine: reward.score_all([text for text, _ in mine], [golds for _, golds in mine]))
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


@timed("update")
def response_entropy(trainer: Trainer, responses: list[Response], group_size: int) -> Tensor:
    """Eq. 3: P_i of each response, (Q, G). The sampler has told the entropies of what it sampled; only rows with injected
    tokens get a forward pass of their own (to score all would take 14% of a step: tests/bench_step.py --score)."""
    new = [r for r in responses if any(math.isnan(h) for h in r.entropies)]
    for r, (_, entropy) in zip(new, trainer.score([r.prompt for r in new], [r.ids for r in new])):
        r.entropies = entropy.tolist()
    return mean_entropies(responses).view(-1, group_size)


def mean_entropies(responses: list[Response]) -> Tensor:
    """P_i = 1/|o_i| sum_t H_t over the response's own tokens, (B,); an empty response has P = 0."""
    return mean_entropy([torch.tensor(r.entropies) for r in responses]).double()


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


@dataclass(frozen=True)
class Correction:
    """What is done to a wrong response. To add one: a row below, its probability in --guided-probs, its function."""
    adds: Callable[[Problem], str]          # the text that is injected
    keeps: bool                             # behind the response's own tokens; False: instead of them
    goes_on: bool                           # then the policy continues; False: an end token closes it
    needs_solution: bool
    count: str                              # its number in metrics.jsonl


CORRECTIONS = {
    "reflect":   Correction(lambda problem: REFLECT, True, True, False, "reflected"),
    "answer":    Correction(lambda problem: ANSWER.format(data.gold_text(problem)), True, False, False, "answered"),
    "reference": Correction(lambda problem: problem.solution, False, False, True, "referenced"),
}


def correction_probabilities(flags: Flags) -> dict[str, float]:
    """Of each correction, for a wrong response. Force-R is the first with p = 1."""
    guided = dict(zip(CORRECTIONS, flags.guided_probs))
    return {"none": {}, "guided": guided}.get(flags.correction, {flags.correction: 1.0})


def draw_correction(probabilities: dict[str, float], u: float) -> str:
    """The correction that u in [0, 1) falls into; "" if it falls into none."""
    for name, p in probabilities.items():
        if u < p:
            return name
        u -= p
    return list(probabilities)[-1] if sum(probabilities.values()) > 0.5 else ""     # only rounding can leave u here


def corrected_by(name: str, response: Response, policy: engine.Policy) -> Response:
    """The edited copy of a response. Its own tokens stay as they were sampled; what is added is marked injected."""
    correction = CORRECTIONS[name]
    kept = len(response.ids) - (1 if response.finished else 0) if correction.keeps else 0     # without the end token
    added = policy.encode(correction.adds(response.problem)) + ([] if correction.goes_on else [policy.end_id])
    unknown = [math.nan] * len(added)
    return Response(response.problem, response.prompt, response.ids[:kept] + added,
                    response.injected[:kept] + [True] * len(added), response.logprobs[:kept] + unknown,
                    response.entropies[:kept] + unknown, finished=not correction.goes_on, correction=name)


@timed("correct")
def correct_errors(policy: engine.Policy, responses: list[Response], flags: Flags, step: int) -> list[Response]:
    """One independent draw for each wrong response, one pass, no re-check; right responses are passed on untouched."""
    probabilities = correction_probabilities(flags)
    corrected = list(responses)
    for row, r in enumerate(responses):
        name = draw_correction(probabilities, stream(flags.seed, step, "branch", row) / 2**63)
        if r.accuracy == 0 and name:
            corrected[row] = corrected_by(name, r, policy)
    going_on = {row: r for row, r in enumerate(corrected) if r.correction and CORRECTIONS[r.correction].goes_on}
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
    weights: Tensor                         # of the token in the whole step's loss
    advantages: Tensor                      # A^ of its response
    old_logp: Tensor | None = None          # under the policy that sampled; None: the policy has not changed since
    reference_logp: Tensor | None = None    # under the initial model (KL)
    entropy_slopes: Tensor | None = None    # d loss / d H_t through the advantages (--eda-grad)


def policy_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor, eps_low: float = 0.2,
                eps_high: float = 0.2) -> Tensor:
    """The clipped surrogate: -sum_m w_m min(rho_m A_m, clip(rho_m, 1 - eps_low, 1 + eps_high) A_m), with the ratio
    rho = exp(logp - old_logp); all (M,) -> scalar."""
    ratio = torch.exp(logp - old_logp)
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)
    return (weights * -surrogate).sum()


def kl_penalty(logp: Tensor, reference_logp: Tensor) -> Tensor:
    """The k3 estimator of KL(policy || reference) per token: exp(d) - d - 1, d = reference_logp - logp."""
    d = reference_logp - logp
    return torch.exp(d) - d - 1


def loss_of_tokens(logp: Tensor, entropy: Tensor, t: Tokens, flags: Flags) -> Tensor:
    """What M tokens contribute to the step's loss: logp (M,), entropy (M,) -> scalar."""
    if flags.sft:
        return (t.weights * -logp).sum()
    old_logp = logp.detach() if t.old_logp is None else t.old_logp              # ratio 1: only its gradient matters
    loss = policy_loss(logp, old_logp, t.advantages, t.weights, flags.eps_low, flags.eps_high)
    if flags.kl:
        loss = loss + flags.kl * (t.weights * kl_penalty(logp, t.reference_logp)).sum()
    if flags.eda_grad:                                                          # adds a gradient, no value
        loss = loss + (t.entropy_slopes * (entropy - entropy.detach())).sum()
    return loss


def token_weights(lengths: list[int], reduction: str, longest: int) -> list[float]:
    """Weight in the step's loss of each token of row i: "sequence" 1/(B |o_i|), "token" 1/sum_j |o_j|, "constant"
    1/(B longest). Each row has it in the whole step's loss, so micro-batches and processes only add up."""
    B, total = len(lengths), max(sum(lengths), 1)
    return [{"sequence": 1 / (B * max(n, 1)), "token": 1 / total, "constant": 1 / (B * longest)}[reduction]
            for n in lengths]


# --- The update ------------------------------------------------------------------------------------------------------

@timed("update")
def update(trainer: Trainer, responses: list[Response], A_hat: Tensor, P: Tensor, flags: Flags, lr: float) -> dict:
    """The step's optimizer updates on all B responses; A_hat and P are (Q, G).

    The first update's forward also tells the responses' `logp`, and the entropies that are not known yet. Returns loss
    and gradient norm (means over the updates) and how many updates were skipped as not finite.
    """
    prompts, ids, lengths = [r.prompt for r in responses], [r.ids for r in responses], [len(r.ids) for r in responses]
    weights = [torch.tensor([w * (flags.injected_weight if injected else 1.0) for injected in r.injected])
               for r, w in zip(responses, token_weights(lengths, flags.loss, flags.max_new_tokens))]
    tokens = [Tokens(w, torch.full_like(w, a)) for w, a in zip(weights, A_hat.flatten().tolist())]
    if flags.eda_grad:                      # at ratio 1 the loss is -sum_i w_i A^_i(P), with w_i the sum of row i
        w_QG = torch.stack([w.double().sum() for w in weights]).view_as(A_hat)
        slopes = torch.autograd.grad(-(w_QG * A_hat).sum(), P)[0]
        for t, slope, n in zip(tokens, slopes.flatten().tolist(), lengths):
            t.entropy_slopes = torch.full((n,), slope / max(n, 1))
    if flags.kl:
        for t, (logp, _) in zip(tokens, trainer.score(prompts, ids, reference=True)):
            t.reference_logp = logp
    losses, norms = [], []
    for k in range(flags.updates_per_rollout):
        loss, logp, entropies = trainer.forward_backward(prompts, ids, tokens, partial(loss_of_tokens, flags=flags))
        if k == 0:                                                         # still the policy that sampled
            for r, t, old_logp, entropy in zip(responses, tokens, logp, entropies):
                r.logp = t.old_logp = old_logp
                r.entropies = [h if math.isnan(known) else known for known, h in zip(r.entropies, entropy.tolist())]
        losses.append(loss)
        norms.append(trainer.step(lr, flags.grad_clip) if math.isfinite(loss) else trainer.skip())
    return {"loss": sum(losses) / len(losses), "grad_norm": sum(norms) / len(norms),
            "skipped_updates": sum(not math.isfinite(norm) for norm in norms), "lr": lr}


# --- Metrics ---------------------------------------------------------------------------------------------------------

SHOWN = {"accuracy": "acc", "accuracy_corrected": "corrected", "mixed_groups": "mixed",
         "mixed_groups_corrected": "mixed corrected", "entropy": "entropy", "loss": "loss"}      # on the screen
OF_SAMPLES = ("accuracy", "accuracy_corrected", "format", "mixed_groups", "mixed_groups_corrected",
              "advantage_variance", "advantage_variance_eda", "entropy_sampled", "response_tokens", "truncated",
              "self_reflection", "logprob_gap")                             # undefined where nothing was sampled (SFT)


def mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def share_mixed(r_QG: Tensor) -> float:
    """Share of groups whose rewards are not all equal (1 - the advantage collapse rate)."""
    return (r_QG != r_QG[:, :1]).any(dim=1).double().mean().item()


def mean_variance(values_QG: Tensor) -> float:
    """Mean over groups of the unbiased variance inside the group; 0 for groups of one."""
    return values_QG.var(dim=1).mean().item() if values_QG.shape[1] > 1 else 0.0


def measure(responses: list[Response], corrected: list[Response], A: Tensor, A_hat: Tensor, flags: Flags) -> dict:
    """What a step did, as one flat dict (keys of metrics.jsonl). `responses` as sampled, `corrected` as trained on."""
    r_QG = rewards(corrected, flags)
    by_name = {name: [r for r in corrected if r.correction == name] for name in CORRECTIONS}
    m = dict(reward=r_QG.mean().item(), accuracy=mean(r.accuracy for r in responses),
             accuracy_corrected=mean(r.accuracy for r in corrected), format=mean(r.format for r in responses),
             mixed_groups=share_mixed(rewards(responses, flags)), mixed_groups_corrected=share_mixed(r_QG),
             advantage_variance=mean_variance(A), advantage_variance_eda=mean_variance(A_hat),
             entropy=mean_entropies(corrected).mean().item(), entropy_sampled=mean_entropies(responses).mean().item(),
             sampled_tokens=sum(r.sampled for r in [*responses, *(r for r in corrected if r.correction)]),
             response_tokens=mean(len(r.ids) for r in responses), truncated=mean(not r.finished for r in responses),
             **{CORRECTIONS[name].count: len(rows) for name, rows in by_name.items()},
             **{f"{name}_fixed": sum(r.accuracy for r in rows) for name, rows in by_name.items()
                if CORRECTIONS[name].goes_on},
             self_reflection=mean(REFLECT.strip() in r.text for r in responses),
             over_long=sum(len(r.ids) > flags.max_new_tokens + flags.correction_tokens for r in corrected),
             logprob_gap=logprob_gap(corrected) if flags.top_p == 1 else None)
    return m | dict.fromkeys(OF_SAMPLES) if flags.sft else m


def logprob_gap(responses: list[Response]) -> float | None:
    """Mean |log-probability by the sampler - by the trainer| of the sampled tokens among those trained on, 0 but for
    rounding; None if there are none."""
    gaps = torch.cat([(torch.tensor(r.logprobs) - r.logp).abs() for r in responses])
    sampled = gaps[~gaps.isnan()]
    return sampled.mean().item() if len(sampled) else None


def readable(responses: list[Response], corrected: list[Response], A: Tensor, A_hat: Tensor) -> list[dict]:
    """The rows of samples.jsonl: each rollout as text, before and after correction."""
    rows = []
    numbers = (x.flatten().tolist() for x in (A, A_hat, mean_entropies(corrected)))
    for r, c, a, a_hat, p in zip(responses, corrected, *numbers):
        row = dict(source=r.problem.source, response=r.text, accuracy=r.accuracy, tokens=len(r.ids))
        if c is not r:
            row.update(correction=c.correction, corrected=c.text, accuracy_corrected=c.accuracy)
        rows.append(row | dict(advantage=a, advantage_eda=a_hat, entropy=p))
    return rows


# --- The run ---------------------------------------------------------------------------------------------------------

def load_problems(flags: Flags, policy: engine.Policy) -> tuple[list[Problem], list[str]]:
    """The training problems that fit, and the sources of those whose prompt is too long."""
    problems, probabilities = data.load(flags.data, flags.mirror or None), correction_probabilities(flags)
    needs_solution = flags.sft or any(p > 0 and CORRECTIONS[name].needs_solution for name, p in probabilities.items())
    for p in problems if needs_solution else []:
        if not p.solution or not p.solution.strip():
            needed_by = "--sft" if flags.sft else "the third of --guided-probs"
            raise UserError(f"{p.source}: has no reference solution, which {needed_by} needs; use data with solutions, "
                            "or --correction reflect or none, or --guided-probs .67 .33 0")
    longest = min(flags.max_prompt_tokens, policy.room([]) - 1)                 # one token at least for the response
    too_long = {p.source for p in problems if len(policy.prompt_ids(p.question)) > longest}
    kept = [p for p in problems if p.source not in too_long]
    if probabilities and not any(p > 0 and CORRECTIONS[name].goes_on for name, p in probabilities.items()):
        say("note: without reflections every wrong response becomes a right one, no group is mixed, and nothing is "
            "learned; give the first of --guided-probs more than 0")
    if not kept:
        raise UserError(f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
                        f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context")
    return kept, sorted(too_long)


def train(flags: Flags) -> int:
    """The whole run; returns the exit code."""
    rows = 0 if flags.sft else flags.questions_per_step * flags.group_size
    max_rows = preflight(flags, start_processes(flags.device), rows,
                         flags.max_prompt_tokens + flags.max_new_tokens + flags.correction_tokens)
    policy = engine.load_policy(flags.model, flags.device, flags.template, max_rows, flags.trust_remote_code)
    problems, left_out = load_problems(flags, policy)
    tasks = {task: data.load(task, flags.mirror or None)[:flags.eval_limit or None] for task in flags.eval_tasks}
    with Run(flags, policy, problems, left_out) as run:
        trainer = Trainer(policy, flags.micro_batch_tokens, temperature=1.0 if flags.sft else flags.temperature,
                          entropy_grad=flags.eda_grad, betas=tuple(flags.betas), weight_decay=flags.weight_decay,
                          offload=flags.offload_optimizer, checkpointing=flags.gradient_checkpointing,
                          keep_reference=flags.kl > 0)
        for step in run.steps(trainer, partial(evaluation.while_training, policy, tasks, flags), SHOWN):
            batch = batch_of_problems(problems, flags, step)                                           # Q problems
            responses = references(policy, batch) if flags.sft else sample(policy, batch, flags, step)      # Q x G
            grade(policy, responses)
            corrected = correct_errors(policy, responses, flags, step)      # GEC: wrong ones edited, some continued
            grade(policy, corrected)
            A = group_advantages(rewards(corrected, flags))                                            # (Q, G)
            A_hat, P = A, None
            if flags.eda:
                P = response_entropy(trainer, corrected, flags.group_size).requires_grad_(flags.eda_grad)   # Eq. 3
                A_hat = entropy_driven_advantages(A, P, flags.eda_clamp or None)                       # Eq. 6-7
            stats = update(trainer, corrected, A_hat, P, flags, lr=flags.lr * (1 - step / flags.steps))
            run.log(step, stats | measure(responses, corrected, A, A_hat, flags),
                    readable(responses, corrected, A, A_hat))
    if run.code == 0:
        conclude(flags)
    return run.code


def main(argv: list[str] | None = None) -> int:
    return exit_code(lambda: train(parse_flags(sys.argv[1:] if argv is None else argv)), "go on with --resume",
                     "set --micro-batch-tokens or --max-rows lower, add --offload-optimizer if it is the GPU's, or "
                     "take a smaller model")


if __name__ == "__main__":
    leave(main())
