"""eval.py: the protocol on a scripted sampler, interruptions, and the analyses on worked cases."""

import ast
import itertools
import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import json_lines, refusal

import data
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
            finished = ids[-1:] == [END]
            samples.append(Sample(ids, [0.0] * len(ids), finished))
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
    known["accuracy"] = float(accuracy)
    return Record(task, row, sample, **known | fields)


def text_of(records=(record(1),), published=None, **analyses) -> str:
    """What is printed for the records and the results of analyses."""
    return evaluation.result_text(numbers(records) | analyses, published)


def numbers(records) -> dict:
    return evaluation.analyse(records, [], evaluation.Flags())


# --- Protocol ---------------------------------------------------------------------------------


def test_protocol_on_a_scripted_sampler():
    answers = {
        "p": [r"\boxed{3}|", r"no box|"],
        "q": [r"\boxed{7.0}|", r"\boxed{8}|"],
        "r": [r"so \boxed{2}", "x" * 50],
    }
    scripted = script(answers)
    problems = [
        problem("p", 3, source="a:1"),
        problem("q", "5", "7", source="a:2"),
        problem("r", 1, source="b:1"),
    ]
    sampling = dict(n=2, temperature=0.3, max_new_tokens=20, seed=5, top_p=0.9)
    records = evaluation.evaluate(scripted, problems, **sampling)
    found = []
    for r in records:
        known = r.task, r.problem, r.sample, r.accuracy, r.format, r.finished, r.answer
        found.append(" ".join(map(str, known)))
    assert found == [
        "a 1 0 1.0 1.0 True 3",
        "a 1 1 0.0 0.0 True None",
        "a 2 0 1.0 1.0 True 7.0",
        "a 2 1 0.0 1.0 True 8",
        "b 1 0 0.0 1.0 False 2",
        "b 1 1 0.0 0.0 False None",
    ]
    assert {(c.temperature, c.top_p, c.limit) for c in scripted.calls} == {(0.3, 0.9, 20)}
    assert records[0].response == r"\boxed{3}"
    assert records[0].ids[-1] == END

    result = numbers(records)
    a, b, together = result["tasks"]["a"], result["tasks"]["b"], result["all"]
    assert (a["accuracy"], a["stderr"], a["right"]) == (0.5, 0, [1, 1])
    assert (b["accuracy"], b["right"], together["right"]) == (0, [0], [1, 1, 0])
    expected = {
        "accuracy": 1 / 3,  # the average over problems, not over benchmarks
        "stderr": math.sqrt((2 / 36 + 1 / 9) / 2 / 3),  # of the means 1/2, 1/2, 0
        "max_length": 20,
        "mean_length": (10 + 7 + 12 + 10 + 12 + 20) / 6,
        "format": 4 / 6,
        "truncated": 2 / 6,
        "pass@1": 1 / 3,
        "pass@2": 2 / 3,
    }
    assert {key: together[key] for key in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    "row",  # prompt, max_new_tokens, context, the model's positions, expected limit
    [
        "5    6    None 4096  6",
        "5    6    None 9     4",
        "5    6    8    100   3",
        "5    6    3    100   0",
        "1096 3000 None 10000 3000",
        "1200 3000 None 10000 2896",  # the paper's 4096
        "1096 7000 None 10000 7000",  # above the paper's 3000 the context follows
        "1200 7000 None 10000 6896",
        "192  8000 None 8192  8000",
        "193  8000 None 8192  7999",  # never beyond the model's own maximum
        "5    7000 4096 8192  4091",  # an explicit --context holds
    ],
)
def test_prompt_and_response_fit_the_context(capsys, row):
    evaluation.say_once.cache_clear()
    prompt, max_new_tokens, context, positions, expected = map(ast.literal_eval, row.split())
    question = "1" * prompt
    scripted = script({question: ["x" * 9000] * 2}, positions)
    drafts = evaluation.requests(scripted, [problem(question, 1, source="a:1")], 2)
    limits = evaluation.Flags(max_new_tokens=max_new_tokens, context=context)
    records = evaluation.respond(scripted, drafts, 0.1, limits)
    for r, call in zip(records, scripted.calls):
        assert len(r.ids) == call.limit == expected
        assert not r.finished
    notes = capsys.readouterr().out.count("fewer new tokens than asked for")
    assert notes == (expected < max_new_tokens), "said once, and only if something is cut"


def test_samples_depend_on_seed_problem_and_index_alone(policy):
    problems = data.load("tiny:1-3:test")[:6]

    def ids(problems, **sampling):
        records = evaluation.evaluate(policy, problems, max_new_tokens=40, **sampling)
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
    head, _, task, average = text_of(rows).splitlines()[:4]
    names = ["problems", "avg@1", "mean length", "max length", "formatted", "truncated"]
    assert [name.strip() for name in head.split("|")[2:-1]] == names
    for line in (task, average):
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        assert cells == ["4", "25.00 ± 25.00", "25", "40", "75.0", "25.0"]


def test_summarize_edge_cases():
    single = evaluation.summarize([record(1)])
    assert single["stderr"] == 0
    assert "pass@1" not in single
    uneven = [record(a, sample=i) for i, a in enumerate((1, 0, 0))]
    uneven += [record(1, row=2, sample=i) for i in range(2)]
    s = evaluation.summarize(uneven)
    assert s["n"] == 2, "n is what every problem has"
    assert (s["accuracy"], s["pass@2"]) == pytest.approx((2 / 3, (2 / 3 + 1) / 2))
    with pytest.raises(ValueError):
        evaluation.summarize([])


@pytest.mark.parametrize("n", [1, 4, 5])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(n):
    for right in range(n + 1):
        for k in range(1, n + 1):
            choices = list(itertools.combinations(range(n), k))
            with_a_right_one = sum(min(choice) < right for choice in choices)
            expected = pytest.approx(with_a_right_one / len(choices))
            assert evaluation.pass_at_k(n, right, k) == expected


@pytest.mark.parametrize(
    "row",  # right answers | wrong answers | maj@n
    [
        "3, 3 | 4 | 1",
        "3 | 4, 4 | 0",
        "3 | 4 | 1/2",  # a tie is drawn by lot
        "3 | 4, 5 | 1/3",
        "3, 3.0 | 4, 5, 5 | 1/2",  # right answers are one answer
        "5, 7 | 4 | 1",  # also if there are several golds
        "3 | 0.5, 1/2 | 0",  # equal wrong answers are one answer
        "3 | 1 2, 12 | 1/3",  # blanks tell answers apart
        "5 | 1 1/2, 3/2 | 0",  # where the grader says so
        "3 | None, None | 1",  # without a box there is no vote
        "| 4, 4 | 0",
        "| | 0",
        "None | 4 | 0",
    ],
)
def test_majority(row):
    right, wrong, expected = (cell.strip() for cell in row.split("|"))
    votes = []
    for answers, is_right in ((right, True), (wrong, False)):
        for answer in filter(None, answers.split(", ")):
            votes.append((None if answer == "None" else answer, is_right))
    expected = pytest.approx(float(Fraction(expected)))
    assert evaluation.majority(votes) == evaluation.majority(votes[::-1]) == expected


def test_majority_waits_for_sympy(monkeypatch):
    """On a crowded machine sympy answers late: wrong answers are compared all the same."""
    for name in ("START", "RESTART"):
        monkeypatch.setattr(reward.sympy_process, name, 0.0, raising=False)
    reward.sympy_process.end()
    votes = [("3", True), (r"\int_0^1 x dx", False), (r"\frac{1}{2}", False)]
    assert evaluation.majority(votes) == 0


def test_the_published_average_stands_beside_the_same_problems_only():
    whole = []
    for task, count in zip(evaluation.TASKS, (30, 83, 500, 272, 675)):
        whole += [record(1, task=task, row=i) for i in range(count)]
    table = text_of(whole, "7b-edge-grpo")
    assert "53.21" in table.splitlines()[-1]
    assert "100.00 ± 0.00" in table
    table = text_of(whole[113:213], "7b-edge-grpo")
    assert "79.00" in table
    assert "53.21" not in table


# --- The command: interruption, settings, files -----------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    """A small evaluation; later flags win."""
    flags = "--model tiny --device cpu --tasks tiny:1-3:test --limit 5 --n 2 --temperature 1"
    flags += f" --max-new-tokens 30 --batch 4 --out {out}"
    return [*flags.split(), *more]


def rows(out: Path) -> list[dict]:
    return json_lines(out / "responses.jsonl")


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
    assert len(rows(cut)) == 8
    assert not (cut / "summary.json").exists()
    responses = cut / "responses.jsonl"
    responses.write_bytes(responses.read_bytes()[:-20])  # the last line is half written
    batches[:] = [0]
    assert evaluation.main(command(cut)) == 0
    assert batches == [0, 3], "the cut line and the two missing responses, and nothing twice"
    assert sorted(map(str, rows(cut))) == sorted(map(str, rows(whole)))
    assert summary(cut)["results"] == summary(whole)["results"]
    batches[:] = [0]
    assert evaluation.main(command(cut, "--limit", "6")) == 0
    assert batches == [0, 2], "a larger limit only adds"


def test_a_folder_of_other_settings_is_refused(tmp_path, capsys):
    assert evaluation.main(command(tmp_path)) == 0
    before = rows(tmp_path)
    for change, said in {
        "--seed 1": "seed was 0, is 1",
        "--max-new-tokens 31": "max_new_tokens was 30, is 31",
        "--top-p 0.9": "top_p",
        "--context 99": "context was 4096, is 99",
        "--entropy": "entropy",
    }.items():
        error = refusal(capsys, evaluation.main, command(tmp_path, *change.split()))
        assert said in error
        assert "--out" in error
        assert rows(tmp_path) == before


def test_other_problems_are_refused(tmp_path, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": ["3", 4]}\n' * 2)
    arguments = command(tmp_path / "out", "--tasks", str(own))
    assert evaluation.main(arguments) == 0
    assert f"| {own} |" in capsys.readouterr().out, "a file of one's own is a task"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": 5}\n' * 2)
    assert f"problems of {own} was" in refusal(capsys, evaluation.main, arguments)


def test_two_parts_of_one_set_are_refused(tmp_path, capsys, monkeypatch):
    """Their rows would be told apart by the set and the row number alone."""
    problems = data.load("tiny:1-3:test")
    monkeypatch.setattr(data, "load", lambda *_: problems)
    arguments = command(tmp_path, "--tasks", "gsm8k-train:2", "gsm8k-train:3")
    assert "parts of one set" in refusal(capsys, evaluation.main, arguments)


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
        assert said in refusal(capsys, evaluation.main, command(tmp_path))
        assert file.read_bytes() == content
        file.write_bytes(before)


@pytest.mark.parametrize(
    "model, out",
    [("Qwen/Qwen2.5-Math-7B", "evals/Qwen2.5-Math-7B-seed3"), ("runs/x/final", "runs/x/eval")],
)
def test_results_go_where_compare_looks_for_them(model, out):
    assert evaluation.parse_flags(["--model", model, "--seed", "3"]).out == out


def test_the_limits_on_the_command_line_are_those_of_the_sampling(tmp_path, monkeypatch):
    limits, respond = set(), evaluation.respond

    def spy(policy, drafts, T, flags):
        limits.add((flags.max_new_tokens, flags.context, flags.seed, flags.top_p))
        return respond(policy, drafts, T, flags)

    monkeypatch.setattr(evaluation, "respond", spy)
    more = "--context 99 --top-p 0.9 --seed 5 --entropy --reflect".split()
    assert evaluation.main(command(tmp_path, *more)) == 0
    assert limits == {(30, 99, 5, 0.9)}
    for r in rows(tmp_path):
        assert (r["entropy"] is None) == bool(r["phrase"])


def test_a_full_gpu_is_reported_in_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(evaluation, "response_logprobs", full)
    assert evaluation.main([*command(tmp_path), "--entropy"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory (CUDA out of memory")
    assert "--max-rows" in error


# --- Figure 2 ---------------------------------------------------------------------------------


REFLECTIONS = [
    "Wait! Something is wrong here.",
    "so x = 2. wait, no",
    "Let’s re-examine step 2",
    "LET ME CHECK",
    "I made a mistake",
]
OTHERS = ["He waits for the waiter", "await", "", "The answer is 4."]


def test_reflections_are_known_by_whole_words():
    assert all(map(evaluation.reflects, REFLECTIONS))
    assert not any(map(evaluation.reflects, OTHERS))


def test_reflection_report_on_a_worked_case():
    responses = ["Wait, 3", "Hold on.", "3", "5"]
    records = [record(i % 2 == 0, row=i, response=text) for i, text in enumerate(responses)]
    forced = []
    for phrase, first, second in (("A", 1, 1), ("B", 1, 0), ("C", 0, 0), ("D", 0, 1)):
        forced.append(record(first, row=1, phrase=phrase))
        forced.append(record(second, row=3, phrase=phrase))
    report = evaluation.reflection_report(records, forced)
    expected = dict(reflecting=2, share_reflecting=0.5, accuracy_reflecting=0.5, wrong=2)
    expected |= dict(fixed={"A": 1, "B": 0.5, "C": 0, "D": 0.5}, mean_fixed=0.5, gain=0.25)
    assert {key: report[key] for key in expected} == expected
    text = text_of(reflection=report)
    assert "| mean fixed          |  0.5 |" in text
    assert "| fixed by 'B'        |  0.5 |" in text
    none = evaluation.reflection_report([record(1, response="3")], [])
    assert none["accuracy_reflecting"] is none["mean_fixed"] is none["gain"] is None
    assert "| gain                |   – |" in text_of(reflection=none)


def test_forced_reflection_continues_the_wrong_responses_only():
    paper = " Wait! Something is wrong here."
    assert evaluation.FORCED[0] == paper
    assert len(set(evaluation.FORCED)) == 4
    answers = {"p": [r"\boxed{1}|"], "q": [r"\boxed{1}|"], "r": ["xxxx"]}
    for phrase in evaluation.FORCED:
        answers[r"q\boxed{1}" + phrase] = answers["rxxxx" + phrase] = [r" \boxed{2}|"]
    policy = script(answers)
    problems = []
    for gold, question in enumerate("pqr", start=1):
        problems.append(problem(question, gold, source=f"a:{gold}"))
    drafts = evaluation.requests(policy, problems, 1)
    limits = evaluation.Flags(max_new_tokens=12, seed=3)
    records = evaluation.respond(policy, drafts, 0.1, limits)
    policy.calls.clear()
    forced = evaluation.forced_requests(policy, drafts, records)
    forced = evaluation.respond(policy, forced, 0.1, limits)
    assert [(r.problem, r.accuracy) for r in forced] == [(2, 1)] * 4 + [(3, 0)] * 4
    assert forced[0].response == r"\boxed{1}" + paper + r" \boxed{2}", "no end token between"
    assert forced[0].ids == policy.encode(forced[0].response) + [END]
    assert {c.limit for c in policy.calls} == {256}
    assert len({c.seed for c in policy.calls}) == 8


def test_a_forced_reflection_is_cut_to_the_context():
    """A response may have used all of it, and learned positions end there."""
    answers = {"pxxxx" + phrase: [""] for phrase in evaluation.FORCED}
    policy = script({"p": ["xxxx"], **answers}, max_positions=8)
    drafts = evaluation.requests(policy, [problem("p", 1, source="a:1")], 1)
    limits = evaluation.Flags(max_new_tokens=4)
    records = evaluation.respond(policy, drafts, 0.1, limits)
    forced = evaluation.forced_requests(policy, drafts, records)
    records = evaluation.respond(policy, forced, 0.1, limits)
    cut = ["xxxx" + phrase[:3] for phrase in evaluation.FORCED]
    assert [r.response for r in records] == cut
    assert all(len(r.ids) == 7 and not r.finished for r in records)


def test_reflect_on_the_command_line(tmp_path):
    assert evaluation.main(command(tmp_path, "--reflect")) == 0
    records = rows(tmp_path)
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
    rows = [
        (1, 1, 0.2),
        (1, 0, 0.6),
        (2, 1, 1.0),
        (2, 1, 0.6),
        (2, 0, 0.2),
    ]
    records = [record(a, row=q, entropy=P) for q, a, P in rows]
    report = evaluation.entropy_report([*records, record(0, row=3, ids=[])])
    assert report["average"] == pytest.approx(0.52)
    assert (report["P_correct"], report["P_wrong"]) == ([0.2, 1.0, 0.6], [0.6, 0.2])
    counts = dict(correct=3, wrong=2)
    expected = dict(mean_correct=0.6, mean_wrong=0.4, ratio=2 / 3)
    expected |= dict(correct_above=2 / 3, wrong_below=0.5)
    assert report["overall"] == pytest.approx(counts | expected)
    mean_correct, mean_wrong = (0.5 + 5 / 3 + 1) / 3, (1.5 + 1 / 3) / 2
    expected = dict(mean_correct=mean_correct, mean_wrong=mean_wrong)
    expected |= dict(ratio=mean_wrong / mean_correct)
    expected |= dict(correct_above=1 / 3, wrong_below=1 / 2)  # 0.6 equals its average
    assert report["within"] == pytest.approx(counts | expected)


def test_entropy_report_where_a_side_is_missing():
    report = evaluation.entropy_report(
        [record(1, row=i, entropy=P) for i, P in ((1, 0.5), (2, 0.1))]
    )
    assert report["within"] is None, "one response has no other to be compared with"
    assert report["overall"]["ratio"] is None
    assert report["overall"]["wrong_below"] is None
    row = next(line for line in text_of(entropy=report).split("\n") if "| within" in line)
    assert row.count("–") == 7
    assert evaluation.entropy_report([record(0, ids=[])]) == {}
    zeros = [record(1, entropy=0.0), record(0, entropy=0.0)]
    assert evaluation.entropy_report(zeros)["within"] is None


def test_equal_entropies_are_neither_above_nor_below_their_average():
    for P in (k / 10 for k in range(1, 60)):  # the mean of three equal numbers may be off by a bit
        records = [record(i % 2, sample=i, entropy=P) for i in range(3)]
        same = evaluation.entropy_report(records)
        for side in (same["overall"], same["within"]):
            assert side["correct_above"] == side["wrong_below"] == 0


def test_entropy_is_that_of_the_sampling_distribution(policy):
    drafts = evaluation.requests(policy, data.load("tiny:1-3:test")[:3], 1)
    limits = evaluation.Flags(max_new_tokens=20, entropy=True)
    for r, d in zip(evaluation.respond(policy, drafts, 0.6, limits), drafts):
        ids = torch.tensor([d.prompt + r.ids])
        logits = policy.model(ids).logits[0, len(d.prompt) - 1 : -1]
        logp = torch.log_softmax(logits.double() / 0.6, -1)
        H = -(logp.exp() * logp).sum(-1)
        assert r.entropy == pytest.approx(H.mean().item(), abs=1e-5)


def test_temperatures_are_evaluated_one_by_one(tmp_path):
    assert evaluation.main(command(tmp_path, "--entropy", "--temperature", "0.1", "1.2")) == 0
    results = summary(tmp_path)["results"]
    assert list(results) == ["0.1", "1.2"]
    records = rows(tmp_path)
    for T, result in results.items():
        entropies = [r["entropy"] for r in records if r["temperature"] == float(T)]
        assert len(entropies) == 10
        assert result["entropy"]["average"] == pytest.approx(sum(entropies) / 10)
    assert results["0.1"]["entropy"]["average"] < results["1.2"]["entropy"]["average"]
