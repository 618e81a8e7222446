r"""The paper's evaluation: five benchmarks, self-reflection (Figure 2) and entropy (Figure 3).

    python eval.py --model Qwen2.5-Math-7B --compare 7b-base      # the paper's protocol
    python eval.py --model runs/X/final --n 8 --temperature 0.6   # avg@8, pass@k and maj@8
    python eval.py --model runs/X/final --reflect                 # Figure 2
    python eval.py --model runs/X/final --entropy --temperature 0.1 0.3 0.6 1.0 1.2    # Figure 3
    python eval.py --model tiny --tasks tiny:1-3:test --limit 50 --entropy --reflect   # on a laptop

The next four commands read what training and evaluation wrote (report/):

    python eval.py plot runs/* --out figures
    python eval.py compare runs/* --against GRPO
    python eval.py show runs/X --step 17 --question 2             # one group of responses
    python eval.py pack runs/* --out evidence.jsonl.xz

The released evaluation is seeded from the clock. Here a sample depends only on the seed, the
problem and its index among the n responses to that problem, so neither --limit nor an
interruption changes it. The folder --out holds responses.jsonl (one response a line),
settings.json and summary.json; the same command continues an interrupted evaluation.
edge_grpo.py calls `while_training` on held-out problems. To use several GPUs, run
`torchrun --nproc-per-node 8 -- eval.py ...`; without the -- torchrun would read --n as its own.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from engine.flags import check_ranges, end_if_unreadable, flag, make_parser
from report import COMMANDS
from report.paper import CONTEXT, PUBLISHED, TASKS

# --- Flags ------------------------------------------------------------------------------------

MAX_NEW_TOKENS = 3000  # per response, as in the paper
REFLECTION_TOKENS = 256  # after a forced reflection, as in GEC


@dataclass
class Flags:
    model: str = flag(
        "",
        "`tiny`, a folder (runs/X/final), a hub id, or a bare Qwen or Llama name",
        section="everyday flags",
    )
    tasks: list[str] = flag(
        list(TASKS), "benchmarks, tiny:STEPS[:SPLIT], JSON or JSONL files", names="TASK"
    )
    limit: int = flag(None, "evaluate only the first problems of each task; None: all", low=1)
    n: int = flag(1, "responses per problem", low=1)
    temperature: list[float] = flag(
        [0.1], "sampling temperature, or several to evaluate in turn; 0: greedy", low=0, names="T"
    )
    max_new_tokens: int = flag(
        MAX_NEW_TOKENS,
        "maximum tokens per response; what exceeds 3000 is added to the context",
        low=1,
    )
    seed: int = flag(0, "seed of the sampling", low=0)
    out: str = flag(
        "",
        "folder of the results, in which an interrupted evaluation continues; "
        "default: runs/X/eval for a runs/X/final, else evals/MODEL-seedSEED",
    )
    compare: str = flag("", "print this published row beside the results", choices=["", *PUBLISHED])

    entropy: bool = flag(
        False, "Figure 3: entropy of right and of wrong responses", section="the paper's analyses"
    )
    reflect: bool = flag(
        False, "Figure 2: self-reflection, and reflections forced on each wrong response"
    )

    top_p: float = flag(
        1.0, "nucleus sampling; 1: off", low=1e-6, high=1, section="everything else"
    )
    context: int = flag(
        None,
        "tokens of prompt and response together, at most the model's own maximum; "
        "None: the paper's 4096, and more if --max-new-tokens is above 3000",
        low=1,
    )
    template: str = flag("auto", "chat template of the prompt", choices=["auto", "qwen", "llama"])
    batch: int = flag(256, "responses to sample between two writes to --out", low=1)
    max_rows: int = flag(None, "responses sampled at a time; None: as many as fit in memory", low=1)
    drafts: int = flag(
        0,
        "verify up to K tokens of a response in a decode step, looked up in the group's texts; the "
        "samples are the same; 0: off",
        low=0,
        high=8,
    )
    mirror: str = flag("", "a folder or base URL to download from")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = flag(
        "auto",
        "what the model computes in; auto: bfloat16 on a GPU, float32 on a CPU",
        choices=["auto", "float32", "bfloat16"],
    )
    trust_remote_code: bool = flag(False, "run Python code that comes with the model")

    def total_tokens(self) -> int:
        """The maximum length of prompt and response together; the model may allow less."""
        return self.context or CONTEXT + max(0, self.max_new_tokens - MAX_NEW_TOKENS)


def parse_flags(argv: list[str]) -> Flags:
    """The flags of a command line. Raises UserError."""
    usage = "python eval.py --model MODEL [flags]"
    parser = make_parser(Flags, {}, description=__doc__, usage=usage)
    flags = Flags(**vars(parser.parse_args(argv)))
    check_ranges(flags)
    for name in ("model", "tasks", "temperature"):
        if not getattr(flags, name):
            parser.error(f"--{name}: must be given")
    if flags.entropy and 0 in flags.temperature:
        parser.error("--entropy: at temperature 0 every entropy is 0; give a temperature above 0")
    if not flags.out:
        model = Path(flags.model)
        out = Path("evals") / f"{model.name}-seed{flags.seed}"
        if model.name == "final":
            out = model.parent / "eval"
        flags.out = str(out)
    return flags


def reads_runs(argv: list[str]) -> bool:
    """Whether a command line is one of the commands that read runs."""
    return bool(argv) and argv[0] in COMMANDS


# The imports below take seconds, so a mistyped flag ends the program before them.
if __name__ == "__main__" and not reads_runs(sys.argv[1:]):
    end_if_unreadable(parse_flags)

# ruff: noqa: E402
import functools
import math
import re
import statistics
import time
from collections import Counter
from dataclasses import asdict, field

import data
import engine
import reward
from data import Problem
from engine.console import exit_code, say
from engine.folder import append, claim, read_json, read_lines, write_json
from engine.forward import response_logprobs
from engine.problems import check_golds
from engine.processes import is_main, leave, on_main, seed_from, spread
from entropy import response_entropy
from errors import UserError
from report.commands import run_command
from report.tables import group, mean, result_text

say_once = functools.cache(say)


# --- Protocol: sample and grade ---------------------------------------------------------------


@dataclass
class Record:
    """One graded response; a line of responses.jsonl."""

    task: str  # the benchmark or file
    problem: int  # its row in that task, from 1
    sample: int  # 0 .. n-1
    temperature: float
    phrase: str  # the forced reflection in this response, or ""
    response: str
    ids: list[int]  # its tokens, the end token included
    finished: bool  # whether it ended with an end token; if not, it was truncated
    format: float = 0.0
    accuracy: float = 0.0
    answer: str | None = None  # content of the last closed box
    entropy: float | None = None  # P_i of Eq. 3, at the sampling temperature

    def key(self) -> tuple:
        return self.task, self.problem, self.sample, self.temperature, self.phrase


@dataclass
class Request:
    """A response that is still to be sampled. A forced reflection gives its first tokens."""

    problem: Problem
    sample: int
    prompt: list[int]
    start: list[int] = field(default_factory=list)
    phrase: str = ""

    def key(self, temperature: float) -> tuple:
        """The key of the record that answers this request."""
        task, _, row = self.problem.source.rpartition(":")
        return task, int(row), self.sample, temperature, self.phrase


def evaluate(
    policy: engine.Policy,
    problems: list[Problem],
    n: int = 1,
    temperature: float = 0.1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
    top_p: float = 1.0,
) -> list[Record]:
    """Sample and grade n responses to each problem; all responses to one problem are adjacent."""
    flags = Flags(max_new_tokens=max_new_tokens, seed=seed, top_p=top_p)
    return respond(policy, requests(policy, problems, n), temperature, flags)


def requests(policy: engine.Policy, problems: list[Problem], n: int) -> list[Request]:
    """The n responses to each problem that are to be sampled."""
    to_sample = []
    for problem in problems:
        prompt = policy.prompt_ids(problem.question)
        for sample in range(n):
            to_sample.append(Request(problem, sample, prompt))
    return to_sample


def respond(
    policy: engine.Policy, requests: list[Request], temperature: float, flags: Flags
) -> list[Record]:
    """Sample and grade the responses. With --entropy, also compute P_i, except for forced
    reflections.

    Prompt and response together stay within the context and the model's own maximum. Under
    torchrun every process samples and grades its share, and all of them return all records.
    """
    total_tokens = min(flags.total_tokens(), policy.context())
    prompts, limits, seeds = [], [], []
    for request in requests:
        prompt = request.prompt + request.start
        wanted = flags.max_new_tokens
        if request.phrase:
            wanted = REFLECTION_TOKENS
        limit = max(0, min(wanted, total_tokens - len(prompt)))
        if limit < wanted:
            say_once(
                "note: some responses get fewer new tokens than asked for, because prompt and "
                f"response together have at most {total_tokens} (--context, or the model's maximum)"
            )
        prompts.append(prompt)
        limits.append(limit)
        seeds.append(seed_from(flags.seed, request.problem.source, request.sample, request.phrase))
    samples = policy.sample(prompts, limits, seeds, temperature, flags.top_p)

    records = []
    for request, sample in zip(requests, samples):
        ids = request.start + sample.ids
        ids = ids[: max(0, total_tokens - len(request.prompt))]  # a forced phrase may not fit
        record = Record(*request.key(temperature), policy.decode(ids), ids, sample.finished)
        records.append(record)
    grade(requests, records)
    if flags.entropy and not requests[0].phrase:
        add_entropy(policy, requests, records, temperature)
    return records


def grade(requests: list[Request], records: list[Record]) -> None:
    """Fill in the rewards and the answer of each record."""
    responses = [record.response for record in records]
    golds = [list(request.problem.answers) for request in requests]
    scores = spread(responses, golds, reward.score_all)
    for record, (format, accuracy) in zip(records, scores):
        record.format, record.accuracy = format, accuracy
        record.answer = reward.final_answer(record.response)


def add_entropy(
    policy: engine.Policy, requests: list[Request], records: list[Record], temperature: float
) -> None:
    """Fill in P_i of Eq. 3, the mean entropy of a response's tokens; None if it has no token.

    The entropy of a token is that of softmax(z / T), where T is the sampling temperature.
    """
    policy.sampler.release()  # its cache holds most of a GPU's memory
    logprobs = functools.partial(
        response_logprobs,
        policy.model,
        temperature=temperature,
        vocab_size=policy.vocab_size,
        budget=8192,
    )
    prompts = [request.prompt for request in requests]
    responses = [record.ids for record in records]
    for record, (_, entropies) in zip(records, spread(prompts, responses, logprobs)):
        if record.ids:
            record.entropy = response_entropy(entropies).item()


def while_training(
    policy: engine.Policy, tasks: dict[str, list[Problem]], flags, step: int
) -> None:
    """Print the held-out accuracy after `step` steps, and append it to evals.jsonl of the run.

    `flags` are those of edge_grpo.py.
    """
    for task, problems in tasks.items():
        records = evaluate(
            policy,
            problems,
            n=flags.eval_n,
            temperature=flags.eval_temperature,
            max_new_tokens=flags.eval_max_new_tokens,
            seed=flags.seed,
        )
        line = dict(step=step, task=task, temperature=flags.eval_temperature)
        line |= summarize(records)
        append(Path(flags.out) / "evals.jsonl", [line])
        say(
            f"step {step}: held-out {task}: accuracy {line['accuracy']:.3f} "
            f"± {line['stderr']:.3f} ({line['problems']} problems)"
        )
    policy.sampler.release()  # its cache took most of the free memory, which the update needs


# --- Accuracy: avg@n, pass@k, maj@n -----------------------------------------------------------


def summarize(records: list[Record]) -> dict:
    """Numbers over all problems of the records, each problem with the same weight.

    So over several tasks the accuracy is the micro average, as in the paper. accuracy is avg@n
    in [0, 1], and stderr its standard error over problems (0 for a single one). Lengths are in
    tokens. pass@k for k = 1, 2, 4, .., n and maj@n are given if n > 1, where n is the number of
    responses that every problem has. `right` counts the right responses to each problem, in the
    order of the problems, so that two models can be compared in pairs. Raises ValueError if there
    are no records.
    """
    if not records:
        raise ValueError("no records to summarize")
    right, accuracies, votes = [], [], []  # by problem
    for responses in group(records, lambda r: (r.task, r.problem)).values():
        right.append(sum(r.accuracy == 1 for r in responses))
        accuracies.append(right[-1] / len(responses))
        votes.append([(r.answer, r.accuracy == 1) for r in responses])
    stderr = 0.0
    if len(accuracies) > 1:
        stderr = statistics.stdev(accuracies) / math.sqrt(len(accuracies))
    lengths = [len(r.ids) for r in records]
    n = min(map(len, votes))
    numbers = dict(
        problems=len(votes),
        n=n,
        accuracy=statistics.fmean(accuracies),
        stderr=stderr,
        mean_length=statistics.fmean(lengths),
        max_length=max(lengths),
        format=mean(r.format for r in records),
        truncated=mean(not r.finished for r in records),
    )
    if n > 1:
        for k in sorted({2**i for i in range(n.bit_length())} | {n}):
            numbers[f"pass@{k}"] = mean(pass_at_k(len(v), c, k) for v, c in zip(votes, right))
        numbers[f"maj@{n}"] = mean(map(majority, votes))
    return numbers | dict(right=right)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, estimated from n >= k (Chen et al. 2021)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority(votes: list[tuple[str | None, bool]]) -> float:
    """maj@n of one problem, from (answer, right) pairs: 1 if the right answer has the most votes.

    A response without a box has no vote. All right answers count as one answer, however they are
    written, and wrong answers as the same if the grader says so. If t answers share the lead, one
    of them is drawn: with the right one among them, that is 1 / t.
    """
    right = 0
    wrong = Counter()  # wrong answer, as written -> votes
    for answer, is_right in votes:
        if answer is not None and is_right:
            right += 1
        elif answer is not None:
            wrong[answer] += 1
    if right == 0:
        return 0.0
    if right > wrong.total():
        return 1.0

    merged = Counter()  # equal answers together, under the first way they are written
    for answer, count in wrong.items():
        for known in merged:
            [(_, same)] = reward.score_all([f"\\boxed{{{answer}}}"], [known])  # waits for sympy
            if same == 1:
                answer = known
                break
        merged[answer] += count
    if right < max(merged.values()):
        return 0.0
    return 1 / (1 + list(merged.values()).count(right))


# --- Figure 2: does reflection help? ----------------------------------------------------------

# A response reflects if one of these stands in it, in upper or lower case, as whole words. The
# paper does not publish its rule: this list is ours, so edit it.
REFLECTION_PHRASES = """
wait
hold on
let me check
let me re-check
let me recheck
let me double-check
let me verify
let me reconsider
let me rethink
let me try again
let's double-check
let's recheck
let's re-check
let's re-examine
let's reexamine
let's reconsider
let's re-evaluate
let's reevaluate
on second thought
i made a mistake
i made an error
there is a mistake
there is an error
there was a mistake
that's not right
that is not right
this is not right
this is incorrect
something is wrong
upon reflection
upon re-evaluation
upon reevaluation
upon closer inspection
""".strip().splitlines()
REFLECTION = re.compile(
    rf"(?<!\w)(?:{'|'.join(map(re.escape, REFLECTION_PHRASES))})(?!\w)", re.IGNORECASE
)
FORCED = (  # each is tried on every wrong response
    " Wait! Something is wrong here.",  # the paper's; the other three are ours
    "\nLet me double-check the steps above.",
    "\nHold on, I made a mistake somewhere. Let me find it.",
    "\nOn second thought, let me solve it again in another way.",
)


def reflects(response: str) -> bool:
    """Whether a response contains self-reflection."""
    return REFLECTION.search(response.replace("’", "'")) is not None


def forced_requests(
    policy: engine.Policy, requests: list[Request], records: list[Record]
) -> list[Request]:
    """Requests that continue each wrong response, without its end token, after each phrase."""
    forced = []
    for request, record in zip(requests, records):
        if record.accuracy == 1:
            continue
        written = record.ids
        if record.finished:
            written = written[:-1]
        for phrase in FORCED:
            start = written + policy.encode(phrase)
            forced.append(Request(request.problem, request.sample, request.prompt, start, phrase))
    return forced


def reflection_report(records: list[Record], forced: list[Record]) -> dict:
    """Accuracy with self-reflection and overall, and what forced reflections fix.

    `fixed` is, for each phrase, the share of wrong responses that become right with it. `gain` is
    what the average of the four phrases would add to the overall accuracy.
    """
    reflecting = [r.accuracy for r in records if reflects(r.response)]
    wrong = sum(r.accuracy != 1 for r in records)
    fixed = {}
    for phrase, continued in group(forced, lambda r: r.phrase).items():
        fixed[phrase] = mean(r.accuracy for r in continued)
    mean_fixed = gain = None
    if fixed:
        mean_fixed = mean(fixed.values())
        gain = mean_fixed * wrong / len(records)
    return dict(
        responses=len(records),
        accuracy=mean(r.accuracy for r in records),
        reflecting=len(reflecting),
        share_reflecting=len(reflecting) / len(records),
        accuracy_reflecting=mean(reflecting),
        wrong=wrong,
        fixed=fixed,
        mean_fixed=mean_fixed,
        gain=gain,
    )


# --- Figure 3: are right responses more confident than wrong ones? ----------------------------


def entropy_report(records: list[Record]) -> dict:
    """Compare the entropy P of right and of wrong responses; {} if no response has a token.

    `overall` compares each P with the average over all responses, as the paper does. `within`
    compares P / mean(P), with the mean over the responses to the same question, because EDA
    divides by that mean; questions with one response, or with no entropy at all, are left out.
    `P_correct` and `P_wrong` list every P, for histograms.
    """
    measured = [r for r in records if r.entropy is not None]
    if not measured:
        return {}
    overall = [(r.entropy, r.accuracy == 1) for r in measured]
    average = statistics.fmean(r.entropy for r in measured)
    within = []
    for responses in group(measured, lambda r: (r.task, r.problem)).values():
        mean_P = statistics.fmean(r.entropy for r in responses)
        if len(responses) > 1 and mean_P > 0:
            within += [(r.entropy / mean_P, r.accuracy == 1) for r in responses]
    result = dict(
        average=average,
        overall=right_and_wrong(overall, average),
        within=None,
        P_correct=[round(P, 4) for P, is_right in overall if is_right],
        P_wrong=[round(P, 4) for P, is_right in overall if not is_right],
    )
    if within:
        result["within"] = right_and_wrong(within, 1.0)
    return result


def right_and_wrong(rows: list[tuple[float, bool]], average: float) -> dict:
    """Compare the P of right and of wrong responses; rows are (P, right) pairs.

    `ratio` is the left panel's relative confidence: mean P of wrong / mean P of right responses.
    The right panel shows `correct_above` and `wrong_below`: the share of right responses with P
    above the average, and of wrong ones with P below it. A P equal to the average is neither. A
    number is None if there are no such responses.
    """
    right = [P for P, is_right in rows if is_right]
    wrong = [P for P, is_right in rows if not is_right]
    mean_right, mean_wrong = mean(right), mean(wrong)
    ratio = None
    if wrong and mean_right:
        ratio = mean_wrong / mean_right
    return dict(
        correct=len(right),
        wrong=len(wrong),
        mean_correct=mean_right,
        mean_wrong=mean_wrong,
        ratio=ratio,
        correct_above=mean(P > average and not math.isclose(P, average) for P in right),
        wrong_below=mean(P < average and not math.isclose(P, average) for P in wrong),
    )


# --- The folder of results, in which an interrupted evaluation continues -----------------------


def open_results(out: Path, settings: dict) -> dict[tuple, Record]:
    """The records that are already in the folder, by key.

    Raises UserError if they were made with other settings: other weights, prompts or limits, or
    other problems of a task. A new task may be added.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, lines = out / "settings.json", out / "responses.jsonl"
    before = settings
    if file.exists():
        before = read_json(file)
    rows, whole_bytes = read_lines(lines)
    try:
        records = [Record(**row) for row in rows]
    except TypeError:
        raise UserError(
            f"--out {out}: holds files that this eval.py did not write; give another --out"
        ) from None
    changed = []
    for name, value in settings.items():
        if before.get(name, value) != value:
            changed.append(f"{name} was {before[name]!r}, is {value!r}")
    if changed:
        raise UserError(
            f"--out {out}: holds results of other settings ({'; '.join(changed)}); "
            "give another --out, or delete the folder"
        )
    write_json(file, before | settings)
    with open(lines, "ab") as f:
        f.truncate(whole_bytes)  # the last line may be half written
    return {r.key(): r for r in records}


def complete(
    policy: engine.Policy,
    requests: list[Request],
    temperature: float,
    flags: Flags,
    stored: dict[tuple, Record],
    name: str,
) -> list[Record]:
    """The records of all requests: those already stored, and the others, written batch by batch."""
    missing = [request for request in requests if request.key(temperature) not in stored]
    say(f"{name}: {len(missing)} of {len(requests)} responses still to sample")
    done = 0
    started = time.perf_counter()
    while done < len(missing):
        batch_size = flags.batch
        if done == 0 and policy.device.type == "cpu":
            batch_size = min(32, batch_size)  # to estimate the pace early
        batch = missing[done : done + batch_size]
        records = respond(policy, batch, temperature, flags)
        stored.update({r.key(): r for r in records})
        append(Path(flags.out) / "responses.jsonl", map(asdict, records))
        done += len(batch)
        minutes = (time.perf_counter() - started) / done * (len(missing) - done) / 60
        say(f"{name}: {done}/{len(missing)} responses, {minutes:.1f} min left at this pace")
    return [stored[request.key(temperature)] for request in requests]


# --- The evaluation of a model ----------------------------------------------------------------


def run(flags: Flags) -> None:
    """Evaluate a model: print tables, write responses.jsonl and summary.json to --out."""
    out, mirror = Path(flags.out), flags.mirror or None
    tasks, problems = {}, []
    for task in dict.fromkeys(flags.tasks):
        tasks[task] = data.load(task, mirror)
        problems += tasks[task][: flags.limit]
    if len({p.source.rpartition(":")[0] for p in problems}) < len(tasks):
        raise UserError("--tasks: two are parts of one set; evaluate them one after the other")
    check_golds(problems)
    policy = engine.load_policy(
        flags.model,
        flags.device,
        flags.template,
        flags.max_rows,
        flags.trust_remote_code,
        flags.dtype,
    )
    policy.sampler.drafts = flags.drafts
    settings = dict(
        seed=flags.seed,
        max_new_tokens=flags.max_new_tokens,
        context=flags.total_tokens(),
        top_p=flags.top_p,
        entropy=flags.entropy,
        weights=policy.fingerprint(),
        prompt=policy.decode_raw(policy.prompt_ids("QUESTION")),
    )
    for task in tasks:
        settings[f"problems of {task}"] = seed_from(tasks[task])
    lock = claim(out) if is_main() else None
    stored = on_main(lambda: open_results(out, settings))
    say(f"{flags.model} on {policy.device}: {len(problems)} problems x {flags.n}; results in {out}")
    first_prompt = policy.decode_raw(policy.prompt_ids(problems[0].question))
    say(f"prompt of the first problem: {first_prompt!r}")

    to_sample = requests(policy, problems, flags.n)
    results = {}
    for T in dict.fromkeys(flags.temperature):
        records = complete(policy, to_sample, T, flags, stored, f"T = {T:g}")
        forced = []
        if flags.reflect:
            to_reflect = forced_requests(policy, to_sample, records)
            name = f"T = {T:g}, forced reflection"
            forced = complete(policy, to_reflect, T, flags, stored, name)
        if is_main():
            result = analyse(records, forced, flags)
            results[f"{T:g}"] = result
            say(
                f"\n## {flags.model}, T = {T:g}, top-p {flags.top_p:g}, "
                f"at most {flags.max_new_tokens} new tokens, context {settings['context']}, "
                f"seed {flags.seed}\n\n{result_text(result, flags.compare)}"
            )
    if is_main():
        summary = dict(model=flags.model, seed=flags.seed, n=flags.n, limit=flags.limit)
        write_json(out / "summary.json", summary | dict(settings=settings, results=results))
        lock.close()


def analyse(records: list[Record], forced: list[Record], flags: Flags) -> dict:
    """The results of one temperature, as written to summary.json."""
    tasks = {}
    for task, responses in group(records, lambda r: r.task).items():
        tasks[task] = summarize(responses)
    result = dict(tasks=tasks, all=summarize(records))
    if flags.entropy:
        result["entropy"] = entropy_report(records)
    if flags.reflect:
        result["reflection"] = reflection_report(records, forced)
    return result


# --- The command line -------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Evaluate, or run one of the commands that read runs; returns the exit code."""
    if argv is None:
        argv = sys.argv[1:]

    def work() -> int:
        if reads_runs(argv):
            print(run_command(argv))
        else:
            run(parse_flags(argv))
        return 0

    return exit_code(
        work,
        "run the same command again to continue",
        "set --max-rows or --batch lower; run the same command again to continue",
    )


if __name__ == "__main__":
    leave(main())
