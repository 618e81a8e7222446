"""eval.py: the protocol on a scripted sampler, interruptions, and the analyses on worked cases."""

import ast
import itertools
import json
import lzma
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import engine
import eval as evaluation
import reward
from data import Problem
from eval import Record
from rollout import Sample

ROOT = Path(evaluation.__file__).parent
END = 0


def script(answers: dict[str, list[str]], max_positions: int = 10_000) -> SimpleNamespace:
    """A policy with characters as ids and k-th responses by prompt; "|" ends a response."""
    calls = []

    def encode(text):
        return [END if c == "|" else ord(c) for c in text]

    def sample(prompts, limits, seeds, temperature, top_p):
        assert len(prompts) == len(limits) == len(seeds)
        samples = []
        for prompt, limit, seed in zip(prompts, limits, seeds):
            text = "".join(map(chr, prompt))
            k = sum(call.prompt == text for call in calls)
            call = dict(prompt=text, limit=limit, seed=seed, temperature=temperature, top_p=top_p)
            calls.append(SimpleNamespace(**call))
            ids = encode(answers[text][k])[:limit]
            samples.append(Sample(ids, [0.0] * len(ids), ids[-1:] == [END]))
        return samples

    return SimpleNamespace(
        prompt_ids=encode,
        encode=encode,
        decode=lambda ids: "".join(chr(i) for i in ids if i != END),
        calls=calls,
        context=lambda: max_positions,
        sample=sample,
    )


def problem(question: str, *answers, source: str) -> Problem:
    return Problem(question, answers, None, source)


def record(accuracy=0.0, task="a", row=1, sample=0, **fields) -> Record:
    known = dict(temperature=0.1, phrase="", response="", ids=[1], finished=True, format=1.0)
    return Record(task, row, sample, accuracy=float(accuracy), **{**known, **fields})


def text_of(records=(record(1),), published=None, **analyses) -> str:
    """What is printed for the records and the results of analyses."""
    return evaluation.result_text(numbers(records) | analyses, published)


def numbers(records) -> dict:
    return evaluation.analyse(records, [], evaluation.Flags())


@pytest.fixture(scope="module")
def tiny():
    return engine.load_policy("tiny", "cpu")


# --- Protocol ---------------------------------------------------------------------------------


def test_protocol_on_a_scripted_sampler():
    policy = script(
        {
            "p": [r"\boxed{3}|", r"no box|"],
            "q": [r"\boxed{7.0}|", r"\boxed{8}|"],
            "r": [r"so \boxed{2}", "x" * 50],
        }
    )
    problems = [
        problem("p", 3, source="a:1"),
        problem("q", "5", "7", source="a:2"),
        problem("r", 1, source="b:1"),
    ]
    sampling = dict(n=2, temperature=0.3, max_new_tokens=20, seed=5, top_p=0.9)
    records = evaluation.evaluate(policy, problems, **sampling)
    assert [
        (r.task, r.problem, r.sample, r.accuracy, r.format, r.finished, r.answer) for r in records
    ] == [
        ("a", 1, 0, 1, 1, True, "3"),
        ("a", 1, 1, 0, 0, True, None),
        ("a", 2, 0, 1, 1, True, "7.0"),
        ("a", 2, 1, 0, 1, True, "8"),
        ("b", 1, 0, 0, 1, False, "2"),
        ("b", 1, 1, 0, 0, False, None),
    ]
    assert {(c.temperature, c.top_p, c.limit) for c in policy.calls} == {(0.3, 0.9, 20)}
    assert records[0].response == r"\boxed{3}" and records[0].ids[-1] == END

    result = numbers(records)
    a, b, together = result["tasks"]["a"], result["tasks"]["b"], result["all"]
    assert (a["accuracy"], a["stderr"], a["right"]) == (0.5, 0, [1, 1])
    assert (b["accuracy"], b["right"], together["right"]) == (0, [0], [1, 1, 0])
    expected = dict(
        accuracy=1 / 3,  # the average over problems, not over benchmarks
        stderr=math.sqrt((2 / 36 + 1 / 9) / 2 / 3),  # of the means 1/2, 1/2, 0
        max_length=20,
        mean_length=(10 + 7 + 12 + 10 + 12 + 20) / 6,
        format=4 / 6,
        truncated=2 / 6,
    )
    expected |= {"pass@1": 1 / 3, "pass@2": 2 / 3}
    assert {key: together[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "prompt, max_new_tokens, context, positions, expected",
    [
        (5, 6, None, 4096, 6),
        (5, 6, None, 9, 4),
        (5, 6, 8, 100, 3),
        (5, 6, 5, 100, 0),
        (5, 6, 3, 100, 0),
        (1096, 3000, None, 10_000, 3000),
        (1200, 3000, None, 10_000, 2896),  # the paper's 4096
        (1096, 7000, None, 10_000, 7000),  # above the paper's 3000 the context follows
        (1200, 7000, None, 10_000, 6896),
        (192, 7000, None, 8192, 7000),
        (192, 8000, None, 8192, 8000),
        (193, 8000, None, 8192, 7999),  # never beyond the model's own maximum
        (5, 7000, 4096, 8192, 4091),  # an explicit --context holds
    ],
)
def test_prompt_and_response_fit_the_context(
    capsys, prompt, max_new_tokens, context, positions, expected
):
    evaluation.say_once.cache_clear()
    question = "1" * prompt
    policy = script({question: ["x" * 9000] * 3}, positions)
    problems = [problem(question, 1, source="a:1")] * 2
    limits = evaluation.Flags(max_new_tokens=max_new_tokens, context=context)
    records = evaluation.respond(policy, evaluation.drafts(policy, problems, 1), 0.1, limits)
    if context is None:
        records += evaluation.evaluate(policy, problems[:1], max_new_tokens=max_new_tokens)
    for r, call in zip(records, policy.calls):
        assert len(r.ids) == call.limit == expected and not r.finished
    notes = capsys.readouterr().out.count("fewer new tokens than asked for")
    assert notes == (expected < max_new_tokens), "said once, and only if something is cut"


def test_samples_depend_on_seed_problem_and_index_alone(tiny):
    problems = data.load("tiny:1-3:test")[:6]

    def ids(problems, **sampling):
        records = evaluation.evaluate(tiny, problems, max_new_tokens=40, **sampling)
        return {r.key(): r.ids for r in records}

    three = ids(problems, n=3, temperature=2.0, seed=1)
    one = ids(problems[::-2], n=1, temperature=2.0, seed=1)
    assert one.items() <= three.items()
    assert len({tuple(i) for i in three.values()}) > 12, "samples of one problem must differ"
    assert ids(problems, n=3, temperature=2.0, seed=2) != three


# --- Accuracy ---------------------------------------------------------------------------------


def test_every_number_of_the_table_stands_under_its_name():
    rows = []
    for i, accuracy in enumerate((1, 0, 0, 0)):
        ids = [1] * 10 * (i + 1)
        rows.append(record(accuracy, row=i, ids=ids, finished=i > 0, format=float(i != 1)))
    lines = text_of(rows).splitlines()
    head, task, average = ([c.strip() for c in lines[i].split("|")[1:-1]] for i in (0, 2, 3))
    expected = {
        "problems": "4",
        "avg@1": "25.00 ± 25.00",
        "mean length": "25",
        "max length": "40",
        "formatted": "75.0",
        "truncated": "25.0",
    }
    assert dict(zip(head, task)) == {head[0]: "a", **expected}
    assert dict(zip(head, average)) == {head[0]: "average", **expected}


def test_summarize_edge_cases():
    single = evaluation.summarize([record(1)])
    assert single["stderr"] == 0 and "pass@1" not in single
    uneven = [
        *(record(a, sample=i) for i, a in enumerate((1, 0, 0))),
        *(record(1, row=2, sample=i) for i in range(2)),
    ]
    s = evaluation.summarize(uneven)
    assert s["n"] == 2, "n is what every problem has"
    assert (s["accuracy"], s["pass@2"]) == pytest.approx((2 / 3, (2 / 3 + 1) / 2))
    with pytest.raises(ValueError):
        evaluation.summarize([])


@pytest.mark.parametrize("n, right", [(1, 0), (1, 1), (4, 1), (6, 2), (6, 5), (5, 0), (5, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(n, right):
    for k in range(1, n + 1):
        choices = list(itertools.combinations(range(n), k))
        with_a_right_one = sum(min(c) < right for c in choices)
        assert evaluation.pass_at_k(n, right, k) == pytest.approx(with_a_right_one / len(choices))


@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        (["3", "3"], ["4"], 1),
        (["3"], ["4", "4"], 0),
        (["3"], ["4"], 1 / 2),  # a tie is drawn by lot
        (["3"], ["4", "5"], 1 / 3),
        (["3", "3.0"], ["4", "5", "5"], 1 / 2),  # right answers are one answer
        (["5", "7"], ["4"], 1),  # also if there are several golds
        (["3"], ["0.5", "1/2"], 0),  # equal wrong answers are one answer
        (["3"], ["1 2", "12"], 1 / 3),  # blanks tell answers apart
        (["5"], ["1 1/2", "11/2"], 1 / 3),
        (["5"], ["1 1/2", "3/2"], 0),
        (["3"], [" 12", "12 "], 0),  # where the grader says so
        (["3"], [None, None], 1),  # without a box there is no vote
        ([], ["4", "4"], 0),
        ([], [None], 0),
        ([], [], 0),
        ([None], ["4"], 0),
    ],
)
def test_majority(right, wrong, expected):
    votes = [(answer, True) for answer in right] + [(answer, False) for answer in wrong]
    assert evaluation.majority(votes) == pytest.approx(expected)
    assert evaluation.majority(votes[::-1]) == pytest.approx(expected)


def test_majority_waits_for_sympy(monkeypatch):
    """On a crowded machine sympy answers late: wrong answers are compared all the same."""
    for name in ("START", "RESTART"):
        monkeypatch.setattr(reward.sympy_process, name, 0.0, raising=False)
    votes = [("3", True), (r"\int_0^1 x dx", False), (r"\frac{1}{2}", False)]
    assert evaluation.majority(votes) == 0


def test_the_published_average_stands_beside_the_same_problems_only():
    whole = []
    for task, count in zip(evaluation.TASKS, (30, 83, 500, 272, 675)):
        whole += [record(1, task=task, row=i) for i in range(count)]
    table = text_of(whole, "7b-edge-grpo")
    assert "53.21" in table.splitlines()[-1] and "100.00 ± 0.00" in table
    table = text_of(whole[113:213], "7b-edge-grpo")
    assert "79.00" in table and "53.21" not in table


# --- The command: interruption, settings, files -----------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    """A small evaluation; later flags win."""
    flags = "--model tiny --device cpu --tasks tiny:1-3:test --limit 5 --n 2 --temperature 1"
    flags += f" --max-new-tokens 30 --batch 4 --out {out}"
    return [*flags.split(), *more]


def lines(out: Path) -> list[str]:
    return (out / "responses.jsonl").read_text().splitlines()


def summary(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def spy_on_respond(monkeypatch, before=lambda batches: None) -> list[int]:
    """The sizes of the batches that are sampled from now on."""
    respond, batches = evaluation.respond, []

    def counted(policy, drafts, *rest):
        batches.append(len(drafts))
        before(batches)
        return respond(policy, drafts, *rest)

    monkeypatch.setattr(evaluation, "respond", counted)
    return batches


def test_the_command_prints_the_table_and_continues_after_an_interruption(
    tmp_path, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert evaluation.main(command(whole)) == 0
    shown = capsys.readouterr().out
    for part in ("<|im_start|>", "| tiny:1-3:test |        5 |", "4/10 responses", "min left"):
        assert part in shown

    def interrupt(batches):
        if len(batches) == 3:
            raise KeyboardInterrupt

    batches = spy_on_respond(monkeypatch, interrupt)
    assert evaluation.main(command(cut)) == 130
    assert len(lines(cut)) == 8 and not (cut / "summary.json").exists()
    with open(cut / "responses.jsonl", "ab") as f:  # the last line is half written
        f.truncate((cut / "responses.jsonl").stat().st_size - 20)
    batches[:] = [0]
    assert evaluation.main(command(cut)) == 0
    assert batches == [0, 3], "the cut line and the two missing responses, and nothing twice"
    assert sorted(lines(cut)) == sorted(lines(whole))
    assert summary(cut)["results"] == summary(whole)["results"]
    batches[:] = [0]
    assert evaluation.main(command(cut, "--limit", "6")) == 0
    assert batches == [0, 2], "a larger limit only adds"


def test_a_cpu_tells_its_pace_after_32_responses(tmp_path, monkeypatch, capsys):
    batches = spy_on_respond(monkeypatch)
    more = "--limit 20 --max-new-tokens 2 --batch 256".split()
    assert evaluation.main(command(tmp_path, *more)) == 0
    shown = capsys.readouterr().out
    assert batches == [32, 8] and "40 of 40 responses" in shown and "32/40 responses" in shown


def test_right_responses_by_problem_are_in_the_packed_evidence(tmp_path, capsys):
    out, packed = tmp_path / "eval", tmp_path / "evidence.jsonl.xz"
    assert evaluation.main(command(out, "--tasks", "tiny:1-3:test", "tiny:5-8:test")) == 0
    assert evaluation.main(["pack", str(out), "--out", str(packed)]) == 0
    [row] = lzma.decompress(packed.read_bytes()).splitlines()
    tasks = json.loads(row)["summaries"][0]["results"]["1"]["tasks"]
    counts = {task: [0] * 5 for task in ("tiny:1-3:test", "tiny:5-8:test")}
    for r in map(json.loads, lines(out)):
        counts[r["task"]][r["problem"] - 1] += r["accuracy"] == 1
    assert {task: result["right"] for task, result in tasks.items()} == counts
    assert sum(map(sum, counts.values())) > 0


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    assert evaluation.main(command(tmp_path)) == 0
    before = lines(tmp_path)
    for change, said in {
        "--seed 1": "seed was 0, is 1",
        "--max-new-tokens 31": "max_new_tokens was 30, is 31",
        "--top-p 0.9": "top_p",
        "--context 99": "context was 4096, is 99",
        "--entropy": "entropy",
    }.items():
        assert evaluation.main(command(tmp_path, *change.split())) == 2
        [error] = capsys.readouterr().err.splitlines()
        assert said in error and "--out" in error and lines(tmp_path) == before


def test_other_weights_or_problems_are_refused(tmp_path, tiny, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": ["3", 4]}\n' * 2)
    arguments = command(tmp_path / "out", "--tasks", str(own))
    assert evaluation.main(arguments) == 0
    assert f"| {own} |" in capsys.readouterr().out, "a file of one's own is a task"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": 5}\n' * 2)
    assert evaluation.main(arguments) == 2
    assert f"problems of {own} was" in capsys.readouterr().err


def test_broken_files_of_results_are_reported_and_left_as_they_are(tmp_path, capsys):
    assert evaluation.main(command(tmp_path)) == 0
    responses, settings = tmp_path / "responses.jsonl", tmp_path / "settings.json"
    good = responses.read_bytes()
    for file, content, said in (
        (responses, good.replace(b"{", b"(", 1), f"{responses}:1: not valid JSON"),
        (responses, b'{"strange": 1}\n' + good, "did not write"),
        (settings, b"\xff\xfe", f"{settings}:1: not valid JSON"),
        (settings, b"[]", f"{settings}:1: no JSON object"),
    ):
        before = file.read_bytes()
        file.write_bytes(content)
        assert evaluation.main(command(tmp_path)) == 2
        assert said in capsys.readouterr().err and file.read_bytes() == content
        file.write_bytes(before)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--n 0", "--n"),
        ("--n x", "--n"),
        ("--limit 0", "--limit"),
        ("--temperature -1", "--temperature"),
        ("--temperature nan", "--temperature"),
        ("--temperature inf", "--temperature"),
        ("--top-p 0", "--top-p"),
        ("--top-p 1.1", "--top-p"),
        ("--max-new-tokens 0", "--max-new-tokens"),
        ("--context 0", "--context"),
        ("--seed -1", "--seed"),
        ("--batch 0", "--batch"),
        ("--compare 8b-sft", "--compare"),
        ("--nonsense", "--nonsense"),
        ("--lim 3", "--lim"),
        ("--temperature 1 --temperatures 1 2", "--temperatures"),
        ("--entropy --temperature 0", "--entropy"),
        ("--tasks", "--tasks: must be given"),
        ("--tasks nowhere", "nowhere"),
        ("--model ./nowhere --tasks tiny:1-3", "nowhere"),
        ("compare nowhere", "nowhere"),
        ("plot nowhere", "nowhere"),
    ],
)
def test_mistakes_are_one_sentence(arguments, said, capsys):
    argv = arguments.split()
    if argv[0] not in ("compare", "plot"):
        argv = ["--model", "tiny", *argv]
    assert evaluation.main(argv) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and said in error


@pytest.mark.parametrize(
    "model, out",
    [("Qwen/Qwen2.5-Math-7B", "evals/Qwen2.5-Math-7B-seed3"), ("runs/x/final", "runs/x/eval")],
)
def test_results_go_where_compare_looks_for_them(model, out):
    assert evaluation.parse_flags(["--model", model, "--seed", "3"]).out == out


def test_the_limits_on_the_command_line_are_those_of_the_sampling(tmp_path, monkeypatch):
    calls, respond = [], evaluation.respond

    def spy(policy, drafts, T, flags):
        calls.append(flags)
        return respond(policy, drafts, T, flags)

    monkeypatch.setattr(evaluation, "respond", spy)
    more = "--context 99 --top-p 0.9 --seed 5 --entropy --reflect".split()
    assert evaluation.main(command(tmp_path, *more)) == 0
    limits = {(f.max_new_tokens, f.context, f.seed, f.top_p) for f in calls}
    assert limits == {(30, 99, 5, 0.9)}
    for r in map(json.loads, lines(tmp_path)):
        assert (r["entropy"] is None) == bool(r["phrase"])


@pytest.mark.slow
def test_two_processes_give_the_same_responses(tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert evaluation.main(command(alone, "--reflect", "--entropy")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    ran = [
        subprocess.Popen(
            [sys.executable, "eval.py", *command(two, "--reflect", "--entropy")],
            text=True,
            cwd=ROOT,
            env={**os.environ, **group, "RANK": r, "LOCAL_RANK": r},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for r in "01"
    ]
    (out, error), (out_1, error_1) = [p.communicate(timeout=300) for p in ran]
    assert [p.returncode for p in ran] == [0, 0], error + error_1
    printed = [line for line in out_1.splitlines() if "[Gloo]" not in line]  # torch 2.9's own
    assert "prompt of the first problem" in out and not printed, "only one process prints"
    parsed = [[json.loads(line) for line in lines(out)] for out in (alone, two)]
    assert len(parsed[0]) == len(parsed[1])
    for a, b in zip(*parsed):
        entropies = a.pop("entropy"), b.pop("entropy")
        assert a == b and entropies[0] == pytest.approx(entropies[1], abs=1e-4)


@pytest.mark.slow
def test_an_evaluation_whose_output_nobody_reads_is_no_success(tmp_path):
    evaluated = subprocess.Popen(
        [sys.executable, "eval.py", *command(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    evaluated.stdout.close()
    evaluated.stderr.read()
    assert evaluated.wait() == 141


def test_two_evaluations_do_not_share_a_folder(tmp_path, capsys):
    code = (
        "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.lockf(lock, fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert evaluation.main(command(tmp_path)) == 2
        assert "another process is at work" in capsys.readouterr().err
        assert [f.name for f in tmp_path.iterdir()] == [".lock"]
        other.stdin.close()
    assert evaluation.main(command(tmp_path)) == 0


def test_a_full_gpu_is_reported_in_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(evaluation, "response_logprobs", full)
    assert evaluation.main([*command(tmp_path), "--entropy"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory (CUDA out of memory") and "--max-rows" in error


def test_importing_eval_loads_neither_matplotlib_nor_the_training_program():
    tree = ast.parse(Path(evaluation.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert "engine" in imported and not imported & {"matplotlib", "edge_grpo"}


# --- Figure 2 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Wait! Something is wrong here.", True),
        ("so x = 2. wait, no", True),
        ("Let’s re-examine step 2", True),
        ("LET ME CHECK", True),
        ("I made a mistake", True),
        ("He waits for the waiter", False),
        ("await", False),
        ("", False),
        ("The answer is 4.", False),
    ],
)
def test_reflects(text, expected):
    assert evaluation.reflects(text) is expected


def test_reflection_report_on_a_worked_case():
    responses = ((1, "Wait, 3"), (0, "Hold on."), (1, "3"), (0, "5"))
    records = [record(a, row=i, response=text) for i, (a, text) in enumerate(responses)]
    forced = []
    for phrase, accuracies in {"A": (1, 1), "B": (1, 0), "C": (0, 0), "D": (0, 1)}.items():
        forced += [record(a, row=q, phrase=phrase) for q, a in zip((1, 3), accuracies)]
    report = evaluation.reflection_report(records, forced)
    assert (report["reflecting"], report["share_reflecting"]) == (2, 0.5)
    assert (report["accuracy_reflecting"], report["wrong"]) == (0.5, 2)
    assert report["fixed"] == {"A": 1, "B": 0.5, "C": 0, "D": 0.5}
    assert (report["mean_fixed"], report["gain"]) == (0.5, 0.25)
    text = text_of(reflection=report)
    assert "| mean fixed          |  0.5 |" in text and "| fixed by 'B'        |  0.5 |" in text
    none = evaluation.reflection_report([record(1, response="3")], [])
    assert none["accuracy_reflecting"] is none["mean_fixed"] is none["gain"] is None
    assert "| gain                |   – |" in text_of(reflection=none)


def test_forced_reflection_continues_the_wrong_responses_only():
    paper = " Wait! Something is wrong here."
    assert evaluation.FORCED[0] == paper and len(set(evaluation.FORCED)) == 4
    answers = {"p": [r"\boxed{1}|"], "q": [r"\boxed{1}|"], "r": ["xxxx"]}
    for phrase in evaluation.FORCED:
        answers[r"q\boxed{1}" + phrase] = answers["rxxxx" + phrase] = [r" \boxed{2}|"]
    policy = script(answers)
    problems = [problem(q, gold, source=f"a:{gold}") for q, gold in zip("pqr", (1, 2, 3))]
    drafts = evaluation.drafts(policy, problems, 1)
    limits = evaluation.Flags(max_new_tokens=12, seed=3)
    records = evaluation.respond(policy, drafts, 0.1, limits)
    policy.calls.clear()
    forced = evaluation.forced_drafts(policy, drafts, records)
    forced = evaluation.respond(policy, forced, 0.1, limits)
    assert [(r.problem, r.accuracy) for r in forced] == [(2, 1)] * 4 + [(3, 0)] * 4
    assert forced[0].response == r"\boxed{1}" + paper + r" \boxed{2}", "no end token between"
    assert forced[0].ids == policy.encode(forced[0].response) + [END]
    assert {c.limit for c in policy.calls} == {256} and len({c.seed for c in policy.calls}) == 8


def test_a_forced_reflection_is_cut_to_the_context():
    """A response may have used all of it, and learned positions end there."""
    answers = {"pxxxx" + phrase: [""] for phrase in evaluation.FORCED}
    policy = script({"p": ["xxxx"], **answers}, max_positions=8)
    drafts = evaluation.drafts(policy, [problem("p", 1, source="a:1")], 1)
    limits = evaluation.Flags(max_new_tokens=4)
    records = evaluation.respond(policy, drafts, 0.1, limits)
    forced = evaluation.forced_drafts(policy, drafts, records)
    records = evaluation.respond(policy, forced, 0.1, limits)
    assert [r.response for r in records] == ["xxxx" + phrase[:3] for phrase in evaluation.FORCED]
    assert all(len(r.ids) == 7 and not r.finished for r in records)


def test_reflect_on_the_command_line(tmp_path):
    assert evaluation.main(command(tmp_path, "--reflect")) == 0
    records = [json.loads(line) for line in lines(tmp_path)]
    wrong = [r for r in records if not r["phrase"] and r["accuracy"] == 0]
    assert len([r for r in records if r["phrase"]]) == 4 * len(wrong) > 0
    result = summary(tmp_path)["results"]["1"]
    assert result["reflection"]["wrong"] == len(wrong)
    assert set(result["reflection"]["fixed"]) == set(evaluation.FORCED)
    assert (result["all"]["problems"], result["all"]["n"]) == (5, 2), "forced ones do not count"


# --- Figure 3 ---------------------------------------------------------------------------------


def test_entropy_report_on_a_worked_case():
    # Question 1: right 0.2, wrong 0.6 (mean 0.4). Question 2: right 1.0, right 0.6, wrong 0.2
    # (mean 0.6). The average is 0.52.
    rows = [(1, 1, 0.2), (1, 0, 0.6), (2, 1, 1.0), (2, 1, 0.6), (2, 0, 0.2)]
    records = [record(a, row=q, entropy=P) for q, a, P in rows]
    report = evaluation.entropy_report([*records, record(0, row=3, ids=[])])
    assert report["average"] == pytest.approx(0.52)
    assert (report["P_correct"], report["P_wrong"]) == ([0.2, 1.0, 0.6], [0.6, 0.2])
    counts = dict(correct=3, wrong=2)
    assert report["overall"] == pytest.approx(
        counts
        | dict(mean_correct=0.6, mean_wrong=0.4, ratio=2 / 3, correct_above=2 / 3, wrong_below=0.5)
    )
    mean_correct, mean_wrong = (0.5 + 5 / 3 + 1) / 3, (1.5 + 1 / 3) / 2
    means = dict(mean_correct=mean_correct, mean_wrong=mean_wrong, ratio=mean_wrong / mean_correct)
    shares = dict(correct_above=1 / 3, wrong_below=1 / 2)  # 0.6 equals its average
    assert report["within"] == pytest.approx(counts | means | shares)


def test_entropy_report_where_a_side_is_missing():
    report = evaluation.entropy_report(
        [record(1, row=i, entropy=P) for i, P in ((1, 0.5), (2, 0.1))]
    )
    assert report["within"] is None, "one response has no other to be compared with"
    assert report["overall"]["ratio"] is None and report["overall"]["wrong_below"] is None
    row = next(line for line in text_of(entropy=report).split("\n") if "| within" in line)
    assert row.count("–") == 7
    assert evaluation.entropy_report([record(0, ids=[])]) == {}
    assert evaluation.entropy_report([record(a, entropy=0.0) for a in (0, 1)])["within"] is None


def test_equal_entropies_are_neither_above_nor_below_their_average():
    for P in (k / 10 for k in range(1, 60)):  # the mean of three equal numbers may be off by a bit
        same = evaluation.entropy_report([record(i % 2, sample=i, entropy=P) for i in range(3)])
        for side in (same["overall"], same["within"]):
            assert side["correct_above"] == side["wrong_below"] == 0


def test_entropy_is_that_of_the_sampling_distribution(tiny):
    drafts = evaluation.drafts(tiny, data.load("tiny:1-3:test")[:3], 1)
    limits = evaluation.Flags(max_new_tokens=20, entropy=True)
    records = evaluation.respond(tiny, drafts, 0.6, limits)
    for r, d in zip(records, drafts):
        logits = tiny.model(torch.tensor([d.prompt + r.ids])).logits[0].double()
        logits = logits[len(d.prompt) - 1 : -1, : tiny.vocab_size]
        p = torch.softmax(logits / 0.6, -1)
        H = -(p * p.clamp_min(1e-300).log()).sum(-1)
        assert r.entropy == pytest.approx(H.mean().item(), abs=1e-5)


def test_temperatures_are_evaluated_one_by_one(tmp_path):
    assert evaluation.main(command(tmp_path, "--entropy", "--temperature", "0.1", "1.2")) == 0
    results = summary(tmp_path)["results"]
    assert list(results) == ["0.1", "1.2"]
    records = [json.loads(line) for line in lines(tmp_path)]
    for T, result in results.items():
        entropies = [r["entropy"] for r in records if r["temperature"] == float(T)]
        assert len(entropies) == 10
        assert result["entropy"]["average"] == pytest.approx(sum(entropies) / 10)
    assert results["0.1"]["entropy"]["average"] < results["1.2"]["entropy"]["average"]
