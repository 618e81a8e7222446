r"""Benchmarks with the paper's protocol, the paper's analyses (Figures 2 and 3), figures and the comparison of runs.

    python eval.py --model Qwen2.5-Math-7B --compare 7b-base           # the five benchmarks, one sample each at T = 0.1
    python eval.py --model runs/X/final --out runs/X/eval --n 8        # avg@8, pass@k and maj@8 of a trained model
    python eval.py --model tiny --tasks tiny:1-3:test --limit 50 --entropy --reflect
    python eval.py plot runs/* --out figures                           # PNGs of the runs' curves and saved results
    python eval.py compare runs/*                                      # methods x benchmarks in Markdown

The release seeds its evaluation from the clock; here every sample is a function of (seed, problem, sample index), so
that neither --limit nor an interruption changes it. --out receives responses.jsonl (a line per response, with its
ids), settings.json and summary.json; the same command goes on where it was stopped. edge_grpo.py calls `evaluate` and
`summarize` on held-out problems while it trains. Several GPUs: torchrun --nproc-per-node 8 -- eval.py … (the lone --
keeps torchrun from reading --n as its own).
"""
import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

import data
import engine
import reward
from data import Problem, UserError
from engine import folder, processes
from engine.console import exit_code, say
from engine.flags import wrong_flag
from engine.folder import append, read_lines, write_json
from engine.forward import response_logprobs
from engine.processes import leave, on_main, spread, stream

TASKS = ("aime", "amc", "math", "minerva", "olympiad_bench")     # the paper's 1560 problems; gsm8k is there on request
CONTEXT = 4096                                                   # prompt and response together
REFLECTION_TOKENS = 256                                          # after a forced reflection, as in GEC
MIN_COUNT = 20                                                   # least count of a token in the table of tokens

# Accuracy in percent as published, trained on DeepScaleR-Hard-1K: average, then by task. Below the table, averages of
# the withdrawn one: the base models, and `1k-` rows trained on a 1K sample that was not chosen for hardness.
PUBLISHED_TABLE = """
1.5b-sft         29.17  6.67 28.92 46.40 12.87 24.00
1.5b-grpo        40.26 10.00 46.99 65.00 20.59 30.37
1.5b-force-r     41.55 13.33 31.33 70.00 22.06 30.81
1.5b-force-r-eda 42.44 10.00 34.94 69.60 23.53 32.30
1.5b-edge-grpo   47.24 10.00 44.58 73.20 29.04 37.33
7b-sft           37.37  3.33 44.58 68.00 19.85 22.37
7b-grpo          47.69 26.67 53.01 74.20 25.74 37.19
7b-force-r       40.26 13.33 40.96 67.60 19.85 29.33
7b-force-r-eda   45.19 26.67 50.60 68.00 28.68 35.11
7b-edge-grpo     53.21 16.67 53.01 79.00 36.03 42.67
"""
PUBLISHED = {name: dict(zip(("average", *TASKS), map(float, numbers)))
             for name, *numbers in map(str.split, PUBLISHED_TABLE.strip().splitlines())}
PUBLISHED |= {name: {"average": average} for name, average in {
    "1.5b-base": 25.71, "1k-1.5b-sft": 30.13, "1k-1.5b-grpo": 40.32, "1k-1.5b-force-r": 42.63,
    "1k-1.5b-force-r-eda": 45.83, "1k-1.5b-edge-grpo": 48.08, "7b-base": 29.04, "1k-7b-sft": 41.99, "1k-7b-grpo": 46.47,
    "1k-7b-force-r": 47.76, "1k-7b-force-r-eda": 45.71, "1k-7b-edge-grpo": 49.30}.items()}


# --- Protocol: problems in, records out ------------------------------------------------------------------------------

@dataclass
class Record:
    """One response to one problem, as it stands in a line of responses.jsonl."""
    task: str                       # the set or file, and
    problem: int                    # the row in it, from 1: Problem.source
    sample: int                     # 0 .. n-1
    temperature: float
    phrase: str                     # "" or the forced reflection that this response contains
    response: str
    ids: list[int]                  # its tokens, the end token included
    finished: bool                  # ended by an end token; False: truncated by a limit
    format: float
    accuracy: float
    answer: str | None              # content of the last closed box
    entropy: float | None = None            # P_i, Eq. 3, at the sampling temperature
    entropies: list[float] | None = None    # of each token, rounded

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
        task, _, row = self.problem.source.rpartition(":")
        return task, int(row), self.sample, temperature, self.phrase


@dataclass(frozen=True)
class Limits:
    """What a response depends on besides the weights, the prompt, its index and the temperature."""
    max_new_tokens: int = 3000
    context: int = CONTEXT
    seed: int = 0
    top_p: float = 1.0


def evaluate(policy: engine.Policy, problems: list[Problem], n: int = 1, temperature: float = 0.1,
             max_new_tokens: int = 3000, seed: int = 0, top_p: float = 1.0) -> list[Record]:
    """n graded responses to each problem, problem-major; every process works on a share and gets all of them."""
    return respond(policy, drafts(policy, problems, n), temperature, Limits(max_new_tokens, CONTEXT, seed, top_p))


def drafts(policy: engine.Policy, problems: list[Problem], n: int) -> list[Draft]:
    return [Draft(problem, sample, prompt) for problem in problems for prompt in [policy.prompt_ids(problem.question)]
            for sample in range(n)]


def respond(policy: engine.Policy, drafts: list[Draft], temperature: float, limits: Limits,
            entropy: bool = False) -> list[Record]:
    """Sample and grade each draft, in order; with `entropy` also score its tokens. Spread over the processes."""
    rows = sample(policy, drafts, temperature, limits)
    texts = [policy.decode(ids) for ids, _ in rows]
    scores = spread(list(zip(texts, drafts)), lambda mine: reward.score_all(
        [text for text, _ in mine], [list(d.problem.answers) for _, d in mine]))
    records = [Record(*d.key(temperature), text, ids, finished, *scored, reward.final_answer(text))
               for d, text, (ids, finished), scored in zip(drafts, texts, rows, scores)]
    if entropy:
        add_entropy(policy, drafts, records, temperature)
    return records


def sample(policy: engine.Policy, drafts: list[Draft], temperature: float,
           limits: Limits) -> list[tuple[list[int], bool]]:
    """(ids, finished) of each response. Prompt and response fit the context and the model's own maximum together."""
    longest = min(limits.context, policy.context())
    prompts = [d.prompt + d.start for d in drafts]
    most = [REFLECTION_TOKENS if d.phrase else limits.max_new_tokens for d in drafts]
    most = [max(0, min(m, longest - len(p))) for m, p in zip(most, prompts)]
    seeds = [stream(limits.seed, d.problem.source, d.sample, d.phrase) for d in drafts]
    samples = policy.sample(prompts, most, seeds, temperature, limits.top_p)
    return [((d.start + s.ids)[:max(0, longest - len(d.prompt))], s.finished) for d, s in zip(drafts, samples)]


def add_entropy(policy: engine.Policy, drafts: list[Draft], records: list[Record], temperature: float) -> None:
    """Token entropies under softmax(z / T), T the sampling temperature, and their mean P_i (Eq. 3)."""
    policy.sampler.release()                                        # its cache holds most of a GPU's memory
    rows = [(d.prompt, r.ids) for d, r in zip(drafts, records)]
    scored = spread(rows, lambda mine: response_logprobs(policy.model, [p for p, _ in mine], [ids for _, ids in mine],
                                                         temperature, policy.vocab_size, budget=8192))
    for r, (_, entropies) in zip(records, scored):
        if r.ids:
            r.entropy = entropies.double().mean().item()
            r.entropies = [round(h, 4) for h in entropies.tolist()]


def while_training(policy: engine.Policy, tasks: dict[str, list[Problem]], flags, step: int) -> None:
    """Held-out accuracy after `step` steps, printed and appended to evals.jsonl of the run."""
    for task, problems in tasks.items():
        s = summarize(evaluate(policy, problems, n=flags.eval_n, temperature=flags.eval_temperature,
                               max_new_tokens=flags.eval_max_new_tokens, seed=flags.seed))
        append(Path(flags.out) / "evals.jsonl", [dict(
            step=step, task=task, n=flags.eval_n, temperature=flags.eval_temperature,
            **{k: s[k] for k in ("accuracy", "stderr", "problems", "mean_length", "format", "truncated")})])
        say(f"step {step}: held-out {task}: accuracy {s['accuracy']:.3f} ± {s['stderr']:.3f} "
            f"({s['problems']} problems)")
    policy.sampler.release()            # its cache took most of the free memory, which the update needs


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
    numbers = dict(problems=len(problems), n=n, accuracy=statistics.fmean(means), stderr=stderr,
                   mean_length=statistics.fmean(lengths), max_length=max(lengths),
                   format=statistics.fmean(r.format for r in records),
                   truncated=statistics.fmean(not r.finished for r in records))
    for k in sorted({2**i for i in range(n.bit_length())} | {n}) if n > 1 else []:
        solved = (pass_at_k(len(rs), sum(r.accuracy == 1 for r in rs), k) for rs in problems)
        numbers[f"pass@{k}"] = statistics.fmean(solved)
    if n > 1:
        numbers[f"maj@{n}"] = statistics.fmean(majority([(r.answer, r.accuracy == 1) for r in rs]) for rs in problems)
    return numbers


def group(items: Iterable, key: Callable) -> dict:
    """Lists of items by key, in the order in which the keys come first."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate, from n >= k samples, of the chance that one of k samples is right (Chen et al. 2021)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def majority(votes: list[tuple[str | None, bool]]) -> float:
    """maj@n of one problem from (answer, right) pairs: 1 if the right answer has the most votes, else 0.

    Tie rule: of t answers that share the lead, one is drawn; so if the right one is among them, this is 1/t. Right
    answers are one answer, however they are written; wrong ones are the same if the grader says so. No box, no vote.
    """
    classes = []                                                            # [an answer, is right, votes]
    for (answer, right), count in Counter((re.sub(r"\s", "", a), right) for a, right in votes if a is not None).items():
        for known in classes:
            if known[1] == right and (right or reward.grade(f"\\boxed{{{answer}}}", known[0])):
                known[2] += count
                break
        else:
            classes.append([answer, right, count])
    lead = [right for _, right, count in classes if count == max(c[2] for c in classes)]
    return sum(lead) / len(lead) if lead else 0.0


def shingles(question: str) -> set[str]:
    """The 12-character pieces of a question without figures ([asy]), forum tags, LaTeX commands, spaces and signs."""
    text = re.sub(r"(?s)\[asy\].*?(\[/asy\]|$)", " ", question.lower())
    text = re.sub(r"[^a-z0-9]", "", re.sub(r"\[/?\w+\]|\\[a-z]+", " ", text))
    return {text[i:i + 12] for i in range(max(1, len(text) - 11))}


def contaminated(problems: list[Problem], training: list[Problem]) -> set[str]:
    """Sources of the problems that (nearly) stand in the training set: at least 0.42 of the pieces of the two questions
    are common to both (Jaccard). On the paper's files that is 6 of MATH-500 and 8 of OlympiadBench, with a gap: the
    least similar of the 14 shares 0.47 (the same figure, another question), the most similar of the others 0.37."""
    questions = [shingles(p.question) for p in training]
    holders = defaultdict(list)
    for i, pieces in enumerate(questions):
        for piece in pieces:
            holders[piece].append(i)
    found = set()
    for p in problems:
        mine = shingles(p.question)
        shared = Counter(i for piece in mine for i in holders.get(piece, ()))
        if any(c >= 0.42 * (len(mine) + len(questions[i]) - c) for i, c in shared.items()):
            found.add(p.source)
    return found


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
        mean = statistics.fmean(r.entropy for r in rs)
        within += [(r.entropy / mean if mean > 0 else 1.0, 1.0, r.accuracy == 1) for r in rs] if len(rs) > 1 else []
    overall = split([(r.entropy, average, r.accuracy == 1) for r in scored])
    return dict(average=average, overall=overall, within=split(within) if within else None)


def split(rows: list[tuple[float, float, bool]]) -> dict:
    """Of (P, average, right) rows: counts, mean P of right and wrong ones, their ratio (wrong / right), and the shares
    of right ones above and of wrong ones below the average (equal is neither). None where there is no such response."""
    right = [(p, a) for p, a, correct in rows if correct]
    wrong = [(p, a) for p, a, correct in rows if not correct]
    mean_right, mean_wrong = (statistics.fmean(p for p, _ in side) if side else None for side in (right, wrong))
    return dict(correct=len(right), wrong=len(wrong), mean_correct=mean_right, mean_wrong=mean_wrong,
                ratio=mean_wrong / mean_right if mean_right and mean_wrong is not None else None,
                correct_above=share(p > a and not math.isclose(p, a) for p, a in right),
                wrong_below=share(p < a and not math.isclose(p, a) for p, a in wrong))


def share(flags: Iterable[float]) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def token_table(records: list[Record], min_count: int = MIN_COUNT) -> list[tuple[int, float, int]]:
    """(token id, mean entropy of the distribution it was drawn from, count) of tokens drawn min_count times, highest
    entropy first."""
    count, total = Counter(), Counter()
    for r in records:
        for token, h in zip(r.ids, r.entropies or ()):
            count[token] += 1
            total[token] += h
    return sorted(((t, total[t] / c, c) for t, c in count.items() if c >= min_count), key=lambda row: (-row[1], row[0]))


# --- Figure 2: reflection --------------------------------------------------------------------------------------------

# A response contains self-reflection if one of these stands in it, in any case, at word boundaries. The paper's rule is
# not public: this list is ours; edit it.
REFLECTION_PHRASES = (
    "wait", "hold on", "let me check", "let me re-check", "let me recheck", "let me double-check", "let me verify",
    "let me reconsider", "let me rethink", "let me try again", "let's double-check", "let's recheck", "let's re-check",
    "let's re-examine", "let's reexamine", "let's reconsider", "let's re-evaluate", "let's reevaluate",
    "on second thought", "i made a mistake", "i made an error", "there is a mistake", "there is an error",
    "there was a mistake", "that's not right", "that is not right", "this is not right", "this is incorrect",
    "something is wrong",
    "upon reflection", "upon re-evaluation", "upon reevaluation", "upon closer inspection",
)
REFLECTION = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, REFLECTION_PHRASES))})(?!\w)", re.IGNORECASE)
FORCED = (                                              # each is tried on every incorrect response
    " Wait! Something is wrong here.",                  # the paper's; the other three are ours
    "\nLet me double-check the steps above.",
    "\nHold on, I made a mistake somewhere. Let me find it.",
    "\nOn second thought, let me solve it again in another way.",
)


def reflects(response: str) -> bool:
    return REFLECTION.search(response.replace("’", "'")) is not None


def reflection_report(records: list[Record], forced: list[Record]) -> dict:
    """Accuracy with self-reflection and overall, counts, and for each forced reflection the share of wrong responses
    that it fixed; `gain` is what the average over the four adds to the overall accuracy."""
    with_it = [r.accuracy for r in records if reflects(r.response)]
    fixed = {phrase: share(r.accuracy == 1 for r in rs) for phrase, rs in group(forced, lambda r: r.phrase).items()}
    mean_fixed = statistics.fmean(fixed.values()) if fixed else None
    wrong = sum(r.accuracy != 1 for r in records)
    return dict(responses=len(records), accuracy=statistics.fmean(r.accuracy for r in records), reflecting=len(with_it),
                share_reflecting=len(with_it) / len(records), accuracy_reflecting=share(with_it), wrong=wrong,
                fixed=fixed, mean_fixed=mean_fixed, gain=mean_fixed * wrong / len(records) if fixed else None)


def forced_drafts(policy: engine.Policy, drafts: list[Draft], records: list[Record]) -> list[Draft]:
    """Each incorrect response without its end token, then one of the four phrases, open to be continued."""
    return [Draft(d.problem, d.sample, d.prompt, r.ids[:len(r.ids) - r.finished] + policy.encode(phrase), phrase)
            for d, r in zip(drafts, records) if r.accuracy != 1 for phrase in FORCED]


# --- The folder of results -------------------------------------------------------------------------------------------

def open_results(out: Path, settings: dict) -> dict[tuple, Record]:
    """The finished records of the folder by key; UserError if they were made with other settings."""
    out.mkdir(parents=True, exist_ok=True)
    file, lines = out / "settings.json", out / "responses.jsonl"
    try:
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            check_settings(out, before, settings)
            settings = {**settings, "tasks": {**before["tasks"], **settings["tasks"]}}
        rows, whole = read_lines(lines)
        records = [Record(**row) for row in rows]
    except (TypeError, KeyError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"--out {out}: holds files that eval.py did not write; give another --out") from None
    write_json(file, settings)
    with open(lines, "ab") as f:
        f.truncate(whole)
    return {r.key(): r for r in records}


def check_settings(out: Path, before: dict, now: dict) -> None:
    """The weights, the prompt and the limits must be the same; a task may be new, but not have other problems."""
    changed = [f"{name} was {before[name]!r}, is {value!r}" for name, value in now.items()
               if name != "tasks" and before[name] != value]
    changed += [f"the problems of {task} have changed" for task in now["tasks"]
                if before["tasks"].get(task, now["tasks"][task]) != now["tasks"][task]]
    if changed:
        raise UserError(f"--out {out}: holds results of other settings ({'; '.join(changed)}); give another --out, or "
                        "delete the folder")


def complete(policy: engine.Policy, drafts: list[Draft], temperature: float, flags: argparse.Namespace, stored: dict,
             name: str) -> list[Record]:
    """The records of all drafts: the stored ones, and the others batch by batch, each batch written when it is done."""
    limits = Limits(flags.max_new_tokens, flags.context, flags.seed, flags.top_p)
    todo = [d for d in drafts if d.key(temperature) not in stored]
    if todo and len(todo) < len(drafts):
        say(f"{name}: {len(drafts) - len(todo)} of {len(drafts)} responses were there already")
    started = time.perf_counter()
    for first in range(0, len(todo), flags.batch):
        batch = todo[first:first + flags.batch]
        records = respond(policy, batch, temperature, limits, flags.entropy and not batch[0].phrase)
        stored.update((r.key(), r) for r in records)
        append(Path(flags.out) / "responses.jsonl", map(asdict, records))
        done = min(first + flags.batch, len(todo))
        left = (time.perf_counter() - started) / done * (len(todo) - done)
        say(f"{name}: {len(drafts) - len(todo) + done}/{len(drafts)} responses, "
            + (f"{left / 60:.1f} min left at this pace" if done < len(todo) else "done"))
    return [stored[d.key(temperature)] for d in drafts]


# --- The evaluation of a model ---------------------------------------------------------------------------------------

def run(flags: argparse.Namespace) -> None:
    """Evaluate one model: tables to the screen, responses.jsonl and summary.json to --out."""
    tasks = {task: data.load(task, flags.mirror or None) for task in dict.fromkeys(flags.tasks)}
    policy = engine.load_policy(flags.model, flags.device, flags.template, flags.max_rows, flags.trust_remote_code)
    problems = [p for task in tasks.values() for p in task[:flags.limit]]
    removed = None
    if flags.exclude_contaminated:
        removed = contaminated(problems, data.load("deepscaler-hard-1k", flags.mirror or None))
    settings = dict(weights=fingerprint(policy), prompt=policy.decode_raw(policy.prompt_ids("QUESTION")),
                    seed=flags.seed, max_new_tokens=flags.max_new_tokens, context=flags.context, top_p=flags.top_p,
                    entropy=flags.entropy, tasks={name: digest(map(asdict, task)) for name, task in tasks.items()})
    lock = folder.claim(Path(flags.out)) if processes.is_main() else None
    stored = on_main(lambda: open_results(Path(flags.out), settings))
    say(f"{flags.model} on {policy.device}: {len(problems)} problems x {flags.n}; results in {flags.out}")
    say(f"prompt of the first problem: {policy.decode_raw(policy.prompt_ids(problems[0].question))!r}")
    results, rows = {}, drafts(policy, problems, flags.n)
    for T in dict.fromkeys(flags.temperatures):
        records = complete(policy, rows, T, flags, stored, f"T = {T:g}")
        forced = forced_drafts(policy, rows, records) if flags.reflect else []
        forced = complete(policy, forced, T, flags, stored, f"T = {T:g}, forced reflection")
        results[f"{T:g}"] = on_main(lambda: report(policy, records, forced, removed, flags, T))
    summary = dict(model=flags.model, seed=flags.seed, n=flags.n, limit=flags.limit, settings=settings, results=results)
    on_main(lambda: write_json(Path(flags.out) / "summary.json", summary))
    if lock:
        lock.close()


def digest(items: Iterable) -> str:
    """A hash of the items in order: bytes as they are, anything else by its repr."""
    found = blake2b(digest_size=8)
    for item in items:
        found.update(item if isinstance(item, bytes) else repr(item).encode())
    return found.hexdigest()


def fingerprint(policy: engine.Policy) -> str:
    """A hash of the first 4096 numbers of every weight: results of one model are never continued with another."""
    return digest(p.detach().flatten()[:4096].float().cpu().numpy().tobytes() for p in policy.model.parameters())


def report(policy: engine.Policy, records: list[Record], forced: list[Record], removed: set[str] | None,
           flags: argparse.Namespace, T: float) -> dict:
    """Print everything that was asked for at one temperature; returns it as it goes into summary.json."""
    say(f"\n## {flags.model}, T = {T:g}, top-p {flags.top_p:g}, at most {flags.max_new_tokens} new tokens, context "
        f"{flags.context}, seed {flags.seed}\n")
    result = scores(records)
    say(score_table(result, PUBLISHED.get(flags.compare), flags.compare))
    if removed is not None:
        kept = [r for r in records if f"{r.task}:{r.problem}" not in removed]
        result["without_contaminated"] = dict(removed=sorted(removed), **(scores(kept) if kept else {}))
        say(f"\nwithout the {len(removed)} problems that also stand in the training set:\n")
        say(score_table(result["without_contaminated"]) if kept else "nothing is left")
    if flags.entropy:
        result["entropy"] = entropy_report(records)
        say("\n" + entropy_text(result["entropy"]))
        result["tokens"] = [(policy.decode_raw([t]), h, c) for t, h, c in token_table(records)]
        say("\n" + token_text(result["tokens"]))
    if flags.reflect:
        result["reflection"] = reflection_report(records, forced)
        say("\n" + reflection_text(result["reflection"]))
    return result


def scores(records: list[Record]) -> dict:
    """Numbers per task, and over all problems: the micro average."""
    by_task = group(records, lambda r: r.task)
    return dict(tasks={task: summarize(rs) for task, rs in by_task.items()}, all=summarize(records))


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns also line up on a screen: the first to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = [("-" * (w + 1) + "-:"[i > 0]) for i, w in enumerate(widths)]
    lines = [[f" {cell:{'<>'[i > 0]}{w}} " for i, (cell, w) in enumerate(zip(row, widths))] for row in (header, *rows)]
    return "\n".join("|" + "|".join(line) + "|" for line in [lines[0], rule, *lines[1:]])


def score_table(result: dict, published: dict | None = None, name: str | None = None) -> str:
    """Accuracies in percent ± standard error over problems. The paper's average stands beside its own problems only."""
    everything = {t: s["problems"] for t, s in result["tasks"].items()} == dict(zip(TASKS, (30, 83, 500, 272, 675)))
    extra = [k for k in result["all"] if "@" in k]
    header = ["benchmark", "problems", f"avg@{result['all']['n']}", *([f"paper: {name}"] if published else []), *extra,
              "mean length", "max length", "formatted", "truncated"]
    rows = []
    for task, s in [*result["tasks"].items(), ("average", result["all"])]:
        paper = (published or {}).get(task) if task != "average" or everything else None
        rows.append([task, str(s["problems"]), f"{percent(s['accuracy'], 2)} ± {percent(s['stderr'], 2)}",
                     *([f"{paper:.2f}" if paper is not None else "–"] if published else []),
                     *(percent(s.get(k)) for k in extra),
                     f"{s['mean_length']:.0f}", str(s["max_length"]), percent(s["format"]), percent(s["truncated"])])
    return markdown(header, rows)


def entropy_text(found: dict) -> str:
    if not found:
        return "entropy: there is no response with a token in it"
    sides = [("over all responses", found["overall"]), ("within each question (P / its mean)", found["within"])]
    rows = [[name, str(s["correct"]), str(s["wrong"]), *(number(s[k]) for k in ("mean_correct", "mean_wrong", "ratio")),
             percent(s["correct_above"]), percent(s["wrong_below"])] for name, s in sides if s]
    table = markdown(["entropy P", "correct", "wrong", "mean P correct", "mean P wrong", "wrong / correct",
                      "% correct above average", "% wrong below average"], rows)
    return table + ("" if found["within"] else "\nwithin each question: needs at least two responses (--n)")


def token_text(tokens: list[tuple[str, float, int]], top: int = 12) -> str:
    if not tokens:
        return f"tokens by entropy: none was drawn {MIN_COUNT} times or more"
    pairs = zip(tokens[:top], tokens[::-1][:top])
    return markdown([f"highest entropy (count >= {MIN_COUNT})", "mean", "count", "lowest entropy", "mean", "count"],
                    [[repr(a), f"{h:.4f}", str(c), repr(b), f"{g:.4f}", str(d)] for (a, h, c), (b, g, d) in pairs])


def reflection_text(r: dict) -> str:
    text = (f"reflection: {r['reflecting']} of {r['responses']} responses ({percent(r['share_reflecting'])}%) contain "
            f"self-reflection, accuracy {percent(r['accuracy_reflecting'])}%; overall {percent(r['accuracy'])}%\n")
    if not r["fixed"]:
        return text + "no response is wrong, so none was made to reflect"
    rows = [[repr(phrase), percent(x)] for phrase, x in r["fixed"].items()]
    rows.append(["average of the four", percent(r["mean_fixed"])])
    table = markdown([f"forced reflection on the {r['wrong']} wrong responses", "% fixed"], rows)
    return f"{text}\n{table}\non average that adds {percent(r['gain'])} points to the overall accuracy"


# --- Runs: the comparison --------------------------------------------------------------------------------------------

# Correction and EDA of each method, in the order of the paper's table.
METHODS = {"sft": ("none", False), "grpo": ("none", False), "force-r": ("reflect", False),
           "force-r-eda": ("reflect", True), "edge-grpo": ("guided", True)}
BOOKKEEPING = {"seed", "out", "resume", "overwrite", "device", "save_every", "keep", "max_rows", "mirror",
               "max_bad_steps", "method", "sft", "micro_batch_tokens", "gradient_checkpointing", "offload_optimizer",
               "trust_remote_code"}                             # flags that do not make it another experiment


@dataclass
class Run:
    """What `plot` and `compare` read of a run's folder, or of a folder that --out made."""
    path: Path
    method: str                     # of a folder of results alone: its model
    seed: int
    flags: dict
    metrics: list[dict]
    evals: list[dict]
    summaries: list[dict]
    label: str = ""                 # runs with the same label differ in their seed only


def read_runs(paths: list[str]) -> list[Run]:
    """The runs, labelled, in the order of the paper's table. UserError for a folder that is no run and no results."""
    runs = [read_run(Path(path)) for path in dict.fromkeys(str(Path(p)) for p in paths)]
    several_models = len({r.flags["model"] for r in runs if r.flags}) > 1
    for alike in group(runs, lambda r: r.method).values():
        varying = {k for r in alike for k, v in r.flags.items() if v != alike[0].flags.get(k)
                   and k not in BOOKKEEPING and not k.startswith("eval_")}
        for r in alike:
            named = dict(zip(("correction", "eda"), METHODS.get(r.method, ())))
            shown = [f"{k}={v}" for k, v in r.flags.items()
                     if (v != named[k] if k in named else k in varying or k == "model" and several_models)]
            r.label = " ".join([r.method, *shown])
    order = list(METHODS)
    return sorted(runs, key=lambda r: order.index(r.method) if r.method in order else -1)


def read_run(path: Path) -> Run:
    files, config = sorted({*path.glob("summary.json"), *path.glob("eval/**/summary.json")}), path / "config.json"
    if not files and not config.exists():
        raise UserError(f"{path}: neither a run (config.json) nor results of eval.py (summary.json)")
    try:
        summaries = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        if config.exists():
            c = json.loads(config.read_text(encoding="utf-8"))
            method, seed, flags = c["method"], c["seed"], c["flags"]
        else:
            model = [part for part in Path(summaries[0]["model"]).parts if part != "checkpoints"]    # RUN/step-100
            method, seed, flags = "/".join(model[-2:]), summaries[0]["seed"], {}
        metrics, evals = (read_lines(path / name)[0] for name in ("metrics.jsonl", "evals.jsonl"))
        found = Run(path, method, seed, flags, metrics, evals, summaries)
        final_scores(found)                                             # these fail on what they cannot read
        [sum(v for v in line.values() if v is not None) + line["step"] for line in metrics]
        flags and (flags["model"], flags["steps"])
        return found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path}: its files were not written by edge_grpo.py or eval.py ({type(error).__name__}: "
                        f"{error}); leave that folder out") from None


def final_scores(run: Run) -> dict[str, dict]:
    """Numbers by task: of eval.py's results where there are any (their first temperature), else of the last evaluation
    during training. Never the best of several steps. A task that eval.py measured in two ways has a column for each;
    UserError if it has measured it twice in the same way."""
    last = max((e["step"] for e in run.evals), default=None)
    found = {e["task"]: {**e, "max_new_tokens": run.flags.get("eval_max_new_tokens")} for e in run.evals
             if e["step"] == last}
    measured = []
    for summary in run.summaries:
        temperature, result = next(iter(summary["results"].items()))
        how = {k: v for k, v in summary.get("settings", {}).items() if k in ("max_new_tokens", "context", "top_p")}
        measured += [(task, {**s, "temperature": float(temperature), **how}) for task, s in result["tasks"].items()]
    times = Counter(task for task, _ in measured)
    for task in times:
        found.pop(task, None)
    for task, s in measured:
        way = f"{task} (n = {s['n']}, T = {s['temperature']:g})"
        if way in found:
            raise UserError(f"{run.path}: its eval/ holds {way} twice, say of two seeds; move one of the folders away")
        found[way if times[task] > 1 else task] = s
    return found


def comparison(runs: list[Run]) -> str:
    """Methods x benchmarks in Markdown: mean ± std (n - 1) over seeds, in percent.

    The average is the micro average over the paper's five tasks, or else over the tasks that every run has.
    """
    scored = {id(r): final_scores(r) for r in runs}
    tasks = list(dict.fromkeys(task for found in scored.values() for task in found))
    tasks = [t for t in TASKS if t in tasks] + [t for t in tasks if t not in TASKS]
    if not tasks:
        raise UserError("nothing to compare: no run has an evals.jsonl or an eval/ folder of `eval.py --out RUN/eval`")
    common = [t for t in tasks if all(t in found for found in scored.values())]
    in_two_ways = any(t.endswith(")") for t in common)
    pool = list(TASKS) if set(TASKS) <= set(common) else [] if in_two_ways else common
    rows = []
    for label, alike in group(runs, lambda r: r.label).items():
        found = [scored[id(r)] for r in alike]
        columns = [[micro_average([x[t] for t in pool]) for x in found] if pool else []]
        columns += [[x[t]["accuracy"] for x in found if t in x] for t in tasks]
        seeds = ", ".join(str(r.seed) for r in alike)
        rows.append([label, f"{len(alike)} ({seeds})", *(mean_std(c, len(alike)) for c in columns)])
    below = ["Accuracy in percent at the last step: mean ± standard deviation over seeds. Average over all problems of "
             f"{', '.join(pool) or 'the tasks that every run has (there is none)'}.", "", *notes(runs, scored, tasks)]
    return "\n".join([markdown(["method", "n (seeds)", "average", *tasks], rows), "", *below, "", training_table(runs)])


TRAINING = {"mixed_groups": "mixed, sampled", "mixed_groups_corrected": "mixed, corrected",
            "advantage_variance": "var A", "advantage_variance_eda": "var Â", "entropy_sampled": "entropy, sampled",
            "entropy": "entropy, trained on", "accuracy": "accuracy, sampled", "self_reflection": "self-reflection"}


def training_table(runs: list[Run]) -> str:
    """Methods x metrics of training in Markdown: the mean over all steps, then mean ± std over seeds; and seconds."""
    rows = []
    for label, alike in group([r for r in runs if r.metrics], lambda r: r.label).items():
        columns = [[statistics.fmean(values) for r in alike if (values := known(r.metrics, key))] for key in TRAINING]
        seconds = [sum(v for line in r.metrics for k, v in line.items() if k.startswith("seconds_")) for r in alike]
        rows.append([label, *(mean_std(c, len(alike), 1, 3) for c in columns), mean_std(seconds, len(alike), 1, 0)])
    if not rows:
        return ""
    below = ("Means over all steps of training: mean ± standard deviation over seeds. Seconds are those of all steps "
             "together.")
    return "\n".join([markdown(["method", *TRAINING.values(), "seconds"], rows), "", below])


def known(lines: list[dict], key: str) -> list[float]:
    """The values of a metric where it is defined."""
    return [line[key] for line in lines if line.get(key) is not None]


def micro_average(numbers: list[dict]) -> float:
    return sum(s["accuracy"] * s["problems"] for s in numbers) / sum(s["problems"] for s in numbers)


def mean_std(values: list[float], expected: int, scale: int = 100, digits: int = 2) -> str:
    if not values:
        return "–"
    std = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    mean = f"{scale * statistics.fmean(values):.{digits}f}"
    return mean + std + (f" (n = {len(values)})" if len(values) < expected else "")


def notes(runs: list[Run], scored: dict, tasks: list[str]) -> list[str]:
    """What a reader of the table must know: how each column was measured, and which runs had not ended."""
    found = []
    for task in tasks:
        ways = sorted({measured_how(s) for x in scored.values() if (s := x.get(task))})
        found.append(f"- {task}: " + ("NOT MEASURED ALIKE: " if len(ways) > 1 else "") + "; ".join(ways))
    for r in runs:
        if r.flags and not r.summaries and (last := max((e["step"] for e in r.evals), default=0)) < r.flags["steps"]:
            found.append(f"- {r.path}: last evaluated at step {last} of {r.flags['steps']}")
    return found


def measured_how(s: dict) -> str:
    """What two scores must have in common to be compared."""
    parts = [f"{s['problems']} problems, n = {s['n']}, T = {s['temperature']:g}"]
    parts += [f"at most {s['max_new_tokens']} tokens"] if s.get("max_new_tokens") else []
    parts += [f"context {s['context']}"] if s.get("context", CONTEXT) != CONTEXT else []
    parts += [f"top-p {s['top_p']:g}"] if s.get("top_p", 1.0) != 1.0 else []
    return ", ".join(parts)


# --- Runs: the figures -----------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind can tell apart; a method has the same one in every figure.
COLOURS = {"edge-grpo": "#D55E00", "grpo": "#0072B2", "force-r": "#009E73", "force-r-eda": "#CC79A7", "sft": "#000000"}
OTHER_COLOURS = ("#56B4E9", "#E69F00", "#F0E442")               # variants and models; then again, dashed
CURVES = {                                                      # file: its panels, (key of metrics.jsonl, title)
    "entropy": [("entropy_sampled", "Mean entropy (nats), as sampled"),
                ("entropy", "Mean entropy (nats), as trained on")],
    "advantage": [("advantage_variance", "Advantage variance before EDA"),
                  ("advantage_variance_eda", "Advantage variance after EDA"),
                  ("mixed_groups", "Share of mixed groups, as sampled"),
                  ("mixed_groups_corrected", "Share of mixed groups, after correction")],
    "accuracy": [("accuracy", "Training accuracy, as sampled")],
}
REFLECTION_BARS = {"overall\naccuracy": "accuracy", "accuracy with\nself-reflection": "accuracy_reflecting",
                   "wrong ones fixed by\nforced reflection": "mean_fixed"}
ENTROPY_BARS = {"Mean P, correct responses": "mean_correct", "Mean P, wrong responses": "mean_wrong",
                "Mean P, wrong / correct": "ratio", "Correct ones above the average P": "correct_above",
                "Wrong ones below the average P": "wrong_below"}


def curve(series: list[list[tuple[int, float]]], window: int) -> list[tuple[int, float, float, float]]:
    """(step, mean, min, max) over seeds of (step, value) series, each first smoothed by the mean of its last `window`
    values; only steps that every seed has."""
    smooth = [{step: statistics.fmean(v for _, v in s[max(0, i + 1 - window):i + 1]) for i, (step, _) in enumerate(s)}
              for s in series]
    values = {step: [s[step] for s in smooth] for step in sorted(set.intersection(*map(set, smooth)))}
    return [(step, statistics.fmean(v), min(v), max(v)) for step, v in values.items()]


def panels_of_curves(runs: list[Run], window: int) -> dict[str, list[tuple[str, str, dict]]]:
    """Per figure, its panels (title, label of the x axis, {run's label: curve}); panels without data are left out."""
    def panel(title: str, points, window: int) -> tuple[str, str, dict]:
        curves = {}
        for label, alike in group(runs, lambda r: r.label).items():
            if series := [found for r in alike if (found := points(r))]:
                curves[label] = curve(series, window)
        return title, "step" if window == 1 else f"step (each point: mean of the last {window} steps)", curves

    def metric(key: str):
        return lambda r: [(m["step"], m[key]) for m in r.metrics if m.get(key) is not None]

    def held_out(task: str):
        return lambda r: [(e["step"], e["accuracy"]) for e in r.evals if e["task"] == task]

    figures = {name: [panel(title, metric(key), window) for key, title in panels] for name, panels in CURVES.items()}
    for task in dict.fromkeys(e["task"] for r in runs for e in r.evals):
        figures["accuracy"].append(panel(f"Held-out accuracy, {task}", held_out(task), 1))
    return {name: kept for name, panels in figures.items() if (kept := [p for p in panels if p[2]])}


def panels_of_bars(runs: list[Run]) -> dict[str, list[tuple[str, str, dict]]]:
    """The same of saved results; in the place of a curve {category: (mean, min, max) over seeds}."""
    cells = defaultdict(list)
    for r in runs:
        for T, result in ((T, x) for summary in r.summaries for T, x in summary["results"].items()):
            reflection, entropy = result.get("reflection", {}), result.get("entropy", {}).get("overall", {})
            for category, key in REFLECTION_BARS.items():
                cells["reflection", f"Reflection, T = {T}", r.label, category].append(reflection.get(key))
            for title, key in ENTROPY_BARS.items():
                cells["entropy_correctness", title, r.label, f"T = {T}"].append(entropy.get(key))
    figures = {}
    for (name, title, label, category), values in cells.items():
        if values := [v for v in values if v is not None]:
            bars = figures.setdefault(name, {}).setdefault(title, {}).setdefault(label, {})
            bars[category] = statistics.fmean(values), min(values), max(values)
    return {name: [(title, "", bars) for title, bars in panels.items()] for name, panels in figures.items()}


def styles(labels: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, line style) by label."""
    others = [label for label in labels if label not in COLOURS]
    found = {label: (OTHER_COLOURS[i % 3], ("-", "--", ":", "-.")[i // 3 % 4]) for i, label in enumerate(others)}
    return {label: (COLOURS[label], "-") if label in COLOURS else found[label] for label in labels}


def draw(runs: list[Run], out: Path, window: int) -> list[Path]:
    """One PNG per figure that the runs have data for; returns their paths. UserError without data or matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    window = window or max(1, max(len(r.metrics) for r in runs) // 25)
    figures = [(name, panels, draw_curve) for name, panels in panels_of_curves(runs, window).items()]
    figures += [(name, panels, draw_bars) for name, panels in panels_of_bars(runs).items()]
    if not figures:
        raise UserError("nothing to draw: no line in a metrics.jsonl, and no results of eval.py --entropy or --reflect")
    alike = group(runs, lambda r: r.label)
    note = "mean over seeds; band or whisker: lowest to highest seed" if max(map(len, alike.values())) > 1 else None
    out.mkdir(parents=True, exist_ok=True)
    for name, panels, draw_panel in figures:
        draw_figure(out / f"{name}.png", panels, draw_panel, styles(list(alike)), note)
    return [out / f"{name}.png" for name, _, _ in figures]


def draw_figure(path: Path, panels: list, draw_panel: Callable, style: dict, note: str | None) -> None:
    import matplotlib.pyplot as plt
    columns = min(len(panels), 2)
    height = -(-len(panels) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(5.2 * columns, 3.2 * height + 0.6), squeeze=False,
                                layout="constrained")
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, (title, xlabel, values) in zip(axes.flat, panels):
        draw_panel(axis, values, style)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel(xlabel)
        axis.set_axisbelow(True)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels())}
    labels = [label for label in style if label in handles]
    figure.legend([handles[label] for label in labels], labels, loc="outside lower center", ncols=min(3, len(labels)),
                  frameon=False, title=note)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curve(axis, curves: dict, style: dict) -> None:
    for label, points in curves.items():
        steps, mean, low, high = zip(*points)
        colour, line = style[label]
        axis.plot(steps, mean, line, color=colour, label=label, marker="o" if len(steps) < 15 else None, markersize=3)
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
    if max(high for points in curves.values() for *_, high in points) > 20:     # a variance after EDA, of first steps
        axis.set_yscale("symlog", linthresh=1)


def draw_bars(axis, values: dict, style: dict) -> None:
    categories = list(dict.fromkeys(category for bars in values.values() for category in bars))
    width = 0.8 / len(values)
    for i, (label, bars) in enumerate(values.items()):
        x = [categories.index(category) + (i + 0.5) * width - 0.4 for category in bars]
        mean, low, high = zip(*bars.values())
        whiskers = [[max(0, m - a) for m, a in zip(mean, low)], [max(0, b - m) for m, b in zip(mean, high)]]
        colour, line = style[label]
        axis.bar(x, mean, width * 0.92, color=colour, hatch=None if line == "-" else "//", label=label,
                 yerr=whiskers if any(map(any, whiskers)) else None, capsize=2)
    axis.set_xticks(range(len(categories)), categories, fontsize=9)
    axis.set_xlim(-0.6, len(categories) - 0.4)


# --- The command line ------------------------------------------------------------------------------------------------

def ranged(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argparse type: a finite number of that kind in [low, high]."""
    def parse(text: str):
        value = kind(text)
        if not low <= value <= high or math.isinf(value):
            bounds = f"at least {low}" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value
    parse.__name__ = kind.__name__                   # argparse names it in "invalid int value"
    return parse


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = wrong_flag
    add, natural = parser.add_argument, ranged(int, 1)
    add("--model", required=True, help="`tiny`, a folder (runs/X/final), a hub id, or a bare Qwen or Llama name")
    add("--tasks", nargs="+", default=list(TASKS), help="sets, tiny:STEPS[:SPLIT], JSON/JSONL files [the paper's five]")
    add("--limit", type=natural, help="only the first problems of each task [all]")
    add("--out", help="folder of results, to go on with [runs/X/eval for a runs/X/final, else evals/MODEL-seedSEED]")
    add("--n", type=natural, default=1, help="responses per problem [1]")
    add("--temperature", type=ranged(float, 0), help="sampling temperature; 0: greedy [0.1]")
    add("--temperatures", type=ranged(float, 0), nargs="+", help="several in turn (Figure 3: 0.1 0.3 0.6 1.0 1.2)")
    add("--top-p", type=ranged(float, 1e-6, 1), default=1.0, help="nucleus sampling [1]")
    add("--max-new-tokens", type=natural, default=3000, help="tokens per response [3000]")
    add("--context", type=natural, default=CONTEXT, help="prompt and response together [4096]")
    add("--seed", type=ranged(int, 0), default=0, help="seed of the sampling [0]")
    add("--compare", choices=list(PUBLISHED), metavar="ROW", help=f"a published row beside: {' '.join(PUBLISHED)}")
    add("--entropy", action="store_true", help="entropy against correctness, and by token (Figure 3)")
    add("--reflect", action="store_true", help="self-reflection, and one forced on each wrong response (Figure 2)")
    add("--exclude-contaminated", action="store_true", help="also report without problems of the training set")
    add("--template", choices=["auto", "qwen", "llama"], default="auto", help="prompt form [auto]")
    add("--batch", type=natural, default=256, help="responses between two writes to --out [256]")
    add("--max-rows", type=natural, help="rows sampled at a time [as many as fit the memory]")
    add("--mirror", help="a folder or base address that holds the downloads instead of their public addresses")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N [auto]")
    add("--trust-remote-code", action="store_true", help="allow a model to bring its own code")
    flags = parser.parse_args(argv)
    if flags.temperature is not None and flags.temperatures:
        parser.error("--temperature and --temperatures: give one of the two")
    flags.temperatures = flags.temperatures or [0.1 if flags.temperature is None else flags.temperature]
    if flags.entropy and 0 in flags.temperatures:
        parser.error("--entropy: at temperature 0 every entropy is 0; give a temperature above 0")
    model = Path(flags.model)
    usual = model.parent / "eval" if model.name == "final" else Path("evals") / f"{model.name}-seed{flags.seed}"
    flags.out = flags.out or str(usual)
    return flags


def parse_runs(command: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"eval.py {command}", allow_abbrev=False)
    parser.error = wrong_flag
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of edge_grpo.py, or of results of eval.py")
    if command == "plot":
        parser.add_argument("--out", default="figures", help="folder of the PNGs [figures]")
        parser.add_argument("--window", type=ranged(int, 0), default=0, help="steps averaged; 0: a 25th of the run [0]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv

    def work() -> int:
        if argv[:1] == ["compare"]:
            print(comparison(read_runs(parse_runs("compare", argv[1:]).runs)))
        elif argv[:1] == ["plot"]:
            flags = parse_runs("plot", argv[1:])
            print(*draw(read_runs(flags.runs), Path(flags.out), flags.window), sep="\n")
        else:
            run(parse_flags(argv))
        return 0
    only_reads = argv[:1] in (["compare"], ["plot"])
    return exit_code(work, "the same command goes on where it was", "set --max-rows or --batch lower; the same command "
                     "goes on where it was", if_unread=0 if only_reads else 141)    # it ended an evaluation


if __name__ == "__main__":
    leave(main())
