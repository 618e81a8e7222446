r"""Benchmarks with the paper's protocol, and the paper's analyses (Figures 2 and 3).

    python eval.py --model Qwen2.5-Math-7B --compare 7b-base           # the five benchmarks, one sample each at T = 0.1
    python eval.py --model runs/X/final --out runs/X/eval --n 8        # avg@8, pass@k and maj@8 of a trained model
    python eval.py --model tiny --tasks tiny:1-3:test --limit 50 --entropy --reflect
    python eval.py plot runs/* --out figures                           # these four lead to results/
    python eval.py compare runs/* --format markdown                    # or csv, latex
    python eval.py show runs/X --step 17 --question 2                  # one group; --html FILE
    python eval.py pack runs/* --out evidence.jsonl.xz                 # to be read as runs are

The release seeds its evaluation from the clock; here every sample is a function of (seed, problem, sample index), so
that neither --limit nor an interruption changes it. --out receives responses.jsonl (a line per response, with its
ids), settings.json and summary.json; the same command goes on where it was stopped. edge_grpo.py calls `evaluate` and
`summarize` on held-out problems while it trains. Several GPUs: torchrun --nproc-per-node 8 -- eval.py … (the lone --
keeps torchrun from reading --n as its own).
"""

import math
import re
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported: no traceback

import data
import engine
import report
import reward
from data import Problem
from data.overlap import contaminated
from engine.console import exit_code, say
from engine.flags import check_ranges, flag, make_parser
from engine.folder import append, claim, read_json, read_lines, write_json
from engine.forward import response_logprobs
from engine.processes import is_main, leave, on_main, spread, stream
from errors import UserError
from report.paper import CONTEXT, PUBLISHED, TASKS
from report.tables import MIN_COUNT, group, mean
from report.tables import result_text as text_of

REFLECTION_TOKENS = 256  # after a forced reflection, as in GEC


@dataclass
class Flags:
    model: str = flag("", "`tiny`, a folder (runs/X/final), a hub id, or a bare Qwen or Llama name")
    tasks: list[str] = flag(list(TASKS), "sets, tiny:STEPS[:SPLIT], JSON/JSONL files", names="TASK")
    limit: int = flag(None, "only the first problems of each task; None: all", 1)
    out: str = flag(
        "",
        "folder of results, to go on with; runs/X/eval for a runs/X/final, else evals/MODEL-seedSEED",
    )
    n: int = flag(1, "responses per problem", 1)
    temperature: list[float] = flag(
        [0.1],
        "of sampling, several in turn (Figure 3: 0.1 0.3 0.6 1.0 1.2); 0: greedy",
        0,
        names="T",
    )
    top_p: float = flag(1.0, "nucleus sampling", 1e-6, 1)
    max_new_tokens: int = flag(3000, "tokens per response", 1)
    context: int = flag(CONTEXT, "prompt and response together", 1)
    seed: int = flag(0, "seed of the sampling", 0)
    compare: str = flag("", "a published row beside", choices=["", *PUBLISHED])
    entropy: bool = flag(False, "entropy against correctness, and by token (Figure 3)")
    reflect: bool = flag(False, "self-reflection, and one forced on each wrong response (Figure 2)")
    exclude_contaminated: bool = flag(False, "also report without problems of the training set")
    template: str = flag("auto", "prompt form", choices=["auto", "qwen", "llama"])
    batch: int = flag(256, "responses between two writes to --out", 1)
    max_rows: int = flag(None, "rows sampled at a time; None: as many as fit the memory", 1)
    mirror: str = flag(
        "", "a folder or base address that holds the downloads instead of their public addresses"
    )
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = flag(False, "allow a model to bring its own code")


# --- Protocol: problems in, records out ------------------------------------------------------------------------------


@dataclass
class Record:
    """One response to one problem, as it stands in a line of responses.jsonl."""

    task: str  # the set or file, and
    problem: int  # the row in it, from 1: Problem.source
    sample: int  # 0 .. n-1
    temperature: float
    phrase: str  # "" or the forced reflection that this response contains
    response: str
    ids: list[int]  # its tokens, the end token included
    finished: bool  # ended by an end token; False: truncated by a limit
    format: float
    accuracy: float
    answer: str | None  # content of the last closed box
    entropy: float | None = None  # P_i, Eq. 3, at the sampling temperature
    entropies: list[float] | None = None  # of each token, rounded

    def key(self) -> tuple:
        return self.task, self.problem, self.sample, self.temperature, self.phrase


@dataclass
class Draft:
    """A response to be sampled: the prompt, and what the response starts with."""

    problem: Problem
    sample: int
    prompt: list[int]
    start: list[int] = field(default_factory=list)
    phrase: str = ""

    def key(self, temperature: float) -> tuple:
        """That of the record which it becomes."""
        task, _, row = self.problem.source.rpartition(":")
        return task, int(row), self.sample, temperature, self.phrase


def evaluate(
    policy: engine.Policy,
    problems: list[Problem],
    n: int = 1,
    temperature: float = 0.1,
    max_new_tokens: int = 3000,
    seed: int = 0,
    top_p: float = 1.0,
) -> list[Record]:
    """n graded responses to each problem, problem-major; every process works on a share and gets all of them."""
    return respond(
        policy,
        drafts(policy, problems, n),
        temperature,
        Flags(max_new_tokens=max_new_tokens, seed=seed, top_p=top_p),
    )


def drafts(policy: engine.Policy, problems: list[Problem], n: int) -> list[Draft]:
    prompts = [policy.prompt_ids(p.question) for p in problems]
    return [Draft(p, sample, prompt) for p, prompt in zip(problems, prompts) for sample in range(n)]


def respond(
    policy: engine.Policy,
    drafts: list[Draft],
    temperature: float,
    flags: Flags,
    entropy: bool = False,
) -> list[Record]:
    """Sample and grade each draft, in order; with `entropy` also compute its tokens' entropies. Every process works on
    a share. Prompt and response together fit the context and the model's own maximum."""
    longest = min(flags.context, policy.context())
    prompts = [d.prompt + d.start for d in drafts]
    most = [REFLECTION_TOKENS if d.phrase else flags.max_new_tokens for d in drafts]
    samples = policy.sample(
        prompts,
        [max(0, min(m, longest - len(p))) for m, p in zip(most, prompts)],
        [stream(flags.seed, d.problem.source, d.sample, d.phrase) for d in drafts],
        temperature,
        flags.top_p,
    )
    rows = [(d.start + s.ids)[: max(0, longest - len(d.prompt))] for d, s in zip(drafts, samples)]
    texts = [policy.decode(ids) for ids in rows]
    scores = spread(
        list(zip(texts, drafts)),
        lambda mine: reward.score_all(
            [text for text, _ in mine], [list(d.problem.answers) for _, d in mine]
        ),
    )
    records = [
        Record(
            *d.key(temperature),
            response=text,
            ids=ids,
            finished=s.finished,
            format=format,
            accuracy=accuracy,
            answer=reward.final_answer(text),
        )
        for d, s, ids, text, (format, accuracy) in zip(drafts, samples, rows, texts, scores)
    ]
    if entropy:
        add_entropy(policy, drafts, records, temperature)
    return records


def add_entropy(
    policy: engine.Policy, drafts: list[Draft], records: list[Record], temperature: float
) -> None:
    """Token entropies under softmax(z / T), T the sampling temperature, and their mean P_i (Eq. 3)."""
    policy.sampler.release()  # its cache holds most of a GPU's memory
    rows = [(d.prompt, r.ids) for d, r in zip(drafts, records)]
    known = spread(
        rows,
        lambda mine: response_logprobs(
            policy.model,
            [p for p, _ in mine],
            [ids for _, ids in mine],
            temperature,
            policy.vocab_size,
            budget=8192,
        ),
    )
    for r, (_, entropies) in zip(records, known):
        if r.ids:
            r.entropy = entropies.double().mean().item()
            r.entropies = [round(h, 4) for h in entropies.tolist()]


def while_training(
    policy: engine.Policy, tasks: dict[str, list[Problem]], flags, step: int
) -> None:
    """Held-out accuracy after `step` steps, printed and appended to evals.jsonl of the run."""
    limit = flags.eval_limit_between if 0 < step < flags.steps else 0
    for task, problems in tasks.items():
        s = summarize(
            evaluate(
                policy,
                problems[: limit or None],
                n=flags.eval_n,
                temperature=flags.eval_temperature,
                max_new_tokens=flags.eval_max_new_tokens,
                seed=flags.seed,
            )
        )
        append(
            Path(flags.out) / "evals.jsonl",
            [
                dict(
                    step=step,
                    task=task,
                    n=flags.eval_n,
                    temperature=flags.eval_temperature,
                    **{
                        k: s[k]
                        for k in (
                            "accuracy",
                            "stderr",
                            "problems",
                            "mean_length",
                            "format",
                            "truncated",
                        )
                    },
                )
            ],
        )
        say(
            f"step {step}: held-out {task}: accuracy {s['accuracy']:.3f} ± {s['stderr']:.3f} "
            f"({s['problems']} problems)"
        )
    policy.sampler.release()  # its cache took most of the free memory, which the update needs


# --- Numbers ---------------------------------------------------------------------------------------------------------


def summarize(records: list[Record]) -> dict:
    """Numbers over all problems of `records`, each with the same weight (over several tasks: the micro average).

    accuracy is avg@n in [0, 1]; stderr its standard error over problems (0 for a single problem); lengths are in
    tokens; pass@k for k = 1, 2, 4, .., n and maj@n only where n > 1. Raises ValueError for no records.
    """
    if not records:
        raise ValueError("no records to summarize")
    problems = list(group(records, lambda r: (r.task, r.problem)).values())
    means = [statistics.fmean(r.accuracy for r in rs) for rs in problems]
    n = min(map(len, problems))
    stderr = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    lengths = [len(r.ids) for r in records]
    numbers = dict(
        problems=len(problems),
        n=n,
        accuracy=statistics.fmean(means),
        stderr=stderr,
        mean_length=statistics.fmean(lengths),
        max_length=max(lengths),
        format=mean(r.format for r in records),
        truncated=mean(not r.finished for r in records),
    )
    if n > 1:
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            numbers[f"pass@{k}"] = mean(
                pass_at_k(len(rs), sum(r.accuracy == 1 for r in rs), k) for rs in problems
            )
        numbers[f"maj@{n}"] = mean(
            majority([(r.answer, r.accuracy == 1) for r in rs]) for rs in problems
        )
    return numbers


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n >= k samples, of the chance that one of k samples is right (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: list[tuple[str | None, bool]]) -> float:
    """maj@n of one problem from (answer, right) pairs: 1 if the right answer has the most votes, else 0.

    Tie rule: of t answers that share the lead, one is drawn; so if the right one is among them, this is 1/t. Right
    answers are one answer, however they are written; wrong ones are the same if the grader says so. No box, no vote.
    """
    right = sum(correct for answer, correct in votes if answer is not None)
    wrong = Counter()
    for answer, count in Counter(
        a for a, correct in votes if a is not None and not correct
    ).items():
        same = (known for known in wrong if reward.grade(f"\\boxed{{{answer}}}", known))
        wrong[next(same, answer)] += count
    ahead = right > 0 and right >= max(wrong.values(), default=0)
    return 1 / (1 + list(wrong.values()).count(right)) if ahead else 0.0


# --- Figure 3: entropy -----------------------------------------------------------------------------------------------


def entropy_report(records: list[Record]) -> dict:
    """Mean P of correct and of wrong responses, their ratio, and the shares on the expected side of the average.

    `overall` compares each P with the average over all responses. `within` compares it with its own question's (what
    EDA divides by): there the means are of P / that average, over the questions with at least two responses.
    """
    scored = [r for r in records if r.entropy is not None]
    if not scored:
        return {}
    average = statistics.fmean(r.entropy for r in scored)
    within = []
    for rs in group(scored, lambda r: (r.task, r.problem)).values():
        P = statistics.fmean(r.entropy for r in rs)
        within += (
            [(r.entropy / P if P > 0 else 1.0, r.accuracy == 1) for r in rs] if len(rs) > 1 else []
        )
    overall = split([(r.entropy, r.accuracy == 1) for r in scored], average)
    return dict(average=average, overall=overall, within=split(within, 1.0) if within else None)


def split(rows: list[tuple[float, bool]], average: float) -> dict:
    """Of (P, right) rows: counts, mean P of right and wrong ones, their ratio (wrong / right), and the shares of right
    ones above and of wrong ones below the average (equal is neither). None where there is no such response."""
    right, wrong = [p for p, correct in rows if correct], [p for p, correct in rows if not correct]
    mean_right, mean_wrong = mean(right), mean(wrong)
    return dict(
        correct=len(right),
        wrong=len(wrong),
        mean_correct=mean_right,
        mean_wrong=mean_wrong,
        ratio=mean_wrong / mean_right if mean_right and mean_wrong is not None else None,
        correct_above=mean(p > average and not math.isclose(p, average) for p in right),
        wrong_below=mean(p < average and not math.isclose(p, average) for p in wrong),
    )


def token_table(records: list[Record], min_count: int = MIN_COUNT) -> list[tuple[int, float, int]]:
    """(token id, mean entropy of the distribution it was drawn from, count) of tokens drawn min_count times, highest
    entropy first."""
    drawn = defaultdict(list)
    for r in records:
        for token, h in zip(r.ids, r.entropies or ()):
            drawn[token].append(h)
    rows = [
        (token, statistics.fmean(hs), len(hs))
        for token, hs in drawn.items()
        if len(hs) >= min_count
    ]
    return sorted(rows, key=lambda row: (-row[1], row[0]))


# --- Figure 2: reflection --------------------------------------------------------------------------------------------

# A response contains self-reflection if one of these stands in it, in any case, at word boundaries. The paper's rule is
# not public: this list is ours; edit it.
REFLECTION_PHRASES = (
    "wait",
    "hold on",
    "let me check",
    "let me re-check",
    "let me recheck",
    "let me double-check",
    "let me verify",
    "let me reconsider",
    "let me rethink",
    "let me try again",
    "let's double-check",
    "let's recheck",
    "let's re-check",
    "let's re-examine",
    "let's reexamine",
    "let's reconsider",
    "let's re-evaluate",
    "let's reevaluate",
    "on second thought",
    "i made a mistake",
    "i made an error",
    "there is a mistake",
    "there is an error",
    "there was a mistake",
    "that's not right",
    "that is not right",
    "this is not right",
    "this is incorrect",
    "something is wrong",
    "upon reflection",
    "upon re-evaluation",
    "upon reevaluation",
    "upon closer inspection",
)
REFLECTION = re.compile(
    rf"(?<!\w)(?:{'|'.join(map(re.escape, REFLECTION_PHRASES))})(?!\w)", re.IGNORECASE
)
FORCED = (  # each is tried on every incorrect response
    " Wait! Something is wrong here.",  # the paper's; the other three are ours
    "\nLet me double-check the steps above.",
    "\nHold on, I made a mistake somewhere. Let me find it.",
    "\nOn second thought, let me solve it again in another way.",
)


def reflects(response: str) -> bool:
    return REFLECTION.search(response.replace("’", "'")) is not None


def forced_drafts(policy: engine.Policy, drafts: list[Draft], records: list[Record]) -> list[Draft]:
    """Each incorrect response without its end token, then one of the four phrases, open to be continued."""
    wrong = [
        (d, r.ids[:-1] if r.finished else r.ids) for d, r in zip(drafts, records) if r.accuracy != 1
    ]
    return [
        Draft(d.problem, d.sample, d.prompt, ids + policy.encode(phrase), phrase)
        for d, ids in wrong
        for phrase in FORCED
    ]


def reflection_report(records: list[Record], forced: list[Record]) -> dict:
    """Accuracy with self-reflection and overall, counts, and for each forced reflection the share of wrong responses
    that it fixed; `gain` is what the average over the four adds to the overall accuracy."""
    with_it = [r.accuracy for r in records if reflects(r.response)]
    fixed = {
        phrase: mean(r.accuracy == 1 for r in rs)
        for phrase, rs in group(forced, lambda r: r.phrase).items()
    }
    mean_fixed = mean(fixed.values())
    wrong = sum(r.accuracy != 1 for r in records)
    return dict(
        responses=len(records),
        accuracy=mean(r.accuracy for r in records),
        reflecting=len(with_it),
        share_reflecting=len(with_it) / len(records),
        accuracy_reflecting=mean(with_it),
        wrong=wrong,
        fixed=fixed,
        mean_fixed=mean_fixed,
        gain=mean_fixed * wrong / len(records) if fixed else None,
    )


# --- The folder of results -------------------------------------------------------------------------------------------


def open_results(out: Path, settings: dict) -> dict[tuple, Record]:
    """The finished records of the folder by key. UserError if they were made with other weights, another prompt or
    other limits; a task may be new, but not have other problems."""
    out.mkdir(parents=True, exist_ok=True)
    file, lines = out / "settings.json", out / "responses.jsonl"
    before = read_json(file) if file.exists() else settings
    rows, whole = read_lines(lines)
    try:
        records = [Record(**row) for row in rows]
    except TypeError:
        raise UserError(
            f"--out {out}: holds files that eval.py did not write; give another --out"
        ) from None
    if changed := [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in settings.items()
        if before.get(name, value) != value
    ]:
        raise UserError(
            f"--out {out}: holds results of other settings ({'; '.join(changed)}); give another --out, or "
            "delete the folder"
        )
    write_json(file, {**before, **settings})
    with open(lines, "ab") as f:
        f.truncate(whole)
    return {r.key(): r for r in records}


def complete(
    policy: engine.Policy,
    drafts: list[Draft],
    temperature: float,
    flags: Flags,
    stored: dict,
    name: str,
) -> list[Record]:
    """The records of all drafts: the stored ones, and the others batch by batch, each batch written when it is done."""
    todo = [d for d in drafts if d.key(temperature) not in stored]
    if 0 < len(todo) < len(drafts):
        say(f"{name}: {len(drafts) - len(todo)} of {len(drafts)} responses were there already")
    started = time.perf_counter()
    for first in range(0, len(todo), flags.batch):
        batch = todo[first : first + flags.batch]
        records = respond(policy, batch, temperature, flags, flags.entropy and not batch[0].phrase)
        stored.update((r.key(), r) for r in records)
        append(Path(flags.out) / "responses.jsonl", map(asdict, records))
        left = len(todo) - first - len(batch)
        minutes = (time.perf_counter() - started) / (len(todo) - left) * left / 60
        say(
            f"{name}: {len(drafts) - left}/{len(drafts)} responses, "
            + (f"{minutes:.1f} min left at this pace" if left else "done")
        )
    return [stored[d.key(temperature)] for d in drafts]


# --- The evaluation of a model ---------------------------------------------------------------------------------------


def run(flags: Flags) -> None:
    """Evaluate one model: tables to the screen, responses.jsonl and summary.json to --out."""
    out = Path(flags.out)
    tasks = {task: data.load(task, flags.mirror or None) for task in dict.fromkeys(flags.tasks)}
    policy = engine.load_policy(
        flags.model, flags.device, flags.template, flags.max_rows, flags.trust_remote_code
    )
    problems = [p for task in tasks.values() for p in task[: flags.limit]]
    training = (
        data.load("deepscaler-hard-1k", flags.mirror or None) if flags.exclude_contaminated else []
    )
    removed = contaminated(problems, training)
    settings = {
        key: getattr(flags, key)
        for key in ("seed", "max_new_tokens", "context", "top_p", "entropy")
    }
    settings |= dict(
        weights=fingerprint(policy), prompt=policy.decode_raw(policy.prompt_ids("QUESTION"))
    )
    settings |= {
        f"problems of {task}": digest(repr(asdict(p)).encode() for p in tasks[task])
        for task in tasks
    }
    lock = claim(out) if is_main() else None
    stored = on_main(lambda: open_results(out, settings))
    say(
        f"{flags.model} on {policy.device}: {len(problems)} problems x {flags.n}; results in {flags.out}"
    )
    say(
        f"prompt of the first problem: {policy.decode_raw(policy.prompt_ids(problems[0].question))!r}"
    )
    found, rows = {}, drafts(policy, problems, flags.n)
    for T in dict.fromkeys(flags.temperature):
        records = complete(policy, rows, T, flags, stored, f"T = {T:g}")
        forced = forced_drafts(policy, rows, records) if flags.reflect else []
        forced = complete(policy, forced, T, flags, stored, f"T = {T:g}, forced reflection")
        if is_main():
            found[f"{T:g}"] = analyse(policy, records, forced, removed, flags)
            say(
                f"\n## {flags.model}, T = {T:g}, top-p {flags.top_p:g}, at most {flags.max_new_tokens} new tokens, "
                f"context {flags.context}, seed {flags.seed}\n\n{text_of(found[f'{T:g}'], flags.compare)}"
            )
    if is_main():
        write_json(
            out / "summary.json",
            dict(
                model=flags.model,
                seed=flags.seed,
                n=flags.n,
                limit=flags.limit,
                settings=settings,
                results=found,
            ),
        )
        lock.close()


def digest(items: Iterable[bytes]) -> str:
    return blake2b(b"".join(items), digest_size=8).hexdigest()


def fingerprint(policy: engine.Policy) -> str:
    """A hash of the first 4096 numbers of every weight: results of one model are never continued with another."""
    return digest(
        p.detach().flatten()[:4096].float().cpu().numpy().tobytes()
        for p in policy.model.parameters()
    )


def analyse(
    policy: engine.Policy,
    records: list[Record],
    forced: list[Record],
    removed: set[str],
    flags: Flags,
) -> dict:
    """Everything that was asked for at one temperature, as it goes into summary.json."""
    result = scores(records)
    if flags.exclude_contaminated:
        kept = [r for r in records if f"{r.task}:{r.problem}" not in removed]
        result["without_contaminated"] = dict(
            removed=sorted(removed), **(scores(kept) if kept else {})
        )
    if flags.entropy:
        result["entropy"] = entropy_report(records)
        result["tokens"] = [(policy.decode_raw([t]), h, c) for t, h, c in token_table(records)]
    if flags.reflect:
        result["reflection"] = reflection_report(records, forced)
    return result


def scores(records: list[Record]) -> dict:
    """Numbers per task, and over all problems: the micro average."""
    by_task = group(records, lambda r: r.task)
    return dict(tasks={task: summarize(rs) for task, rs in by_task.items()}, all=summarize(records))


# --- The command line ------------------------------------------------------------------------------------------------


def parse_flags(argv: list[str]) -> Flags:
    parser = make_parser(
        Flags, {}, description=__doc__, usage="python eval.py --model MODEL [flags]"
    )
    flags = Flags(**vars(parser.parse_args(argv)))
    check_ranges(flags)
    for name in ("model", "tasks", "temperature"):
        if not getattr(flags, name):
            parser.error(f"--{name}: must be given")
    if flags.entropy and 0 in flags.temperature:
        parser.error("--entropy: at temperature 0 every entropy is 0; give a temperature above 0")
    model = Path(flags.model)
    usual = (
        model.parent / "eval"
        if model.name == "final"
        else Path("evals") / f"{model.name}-seed{flags.seed}"
    )
    flags.out = flags.out or str(usual)
    return flags


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] and argv[0] in report.COMMANDS:
        return exit_code(
            lambda: print(report.command(argv)) or 0, "give the command again", "", if_unread=0
        )
    return exit_code(
        lambda: run(parse_flags(argv)) or 0,
        "the same command goes on where it was",
        "set --max-rows or --batch lower; the same command goes on where it was",
        if_unread=141,
    )  # an evaluation it ended is not complete


if __name__ == "__main__":
    leave(main())
