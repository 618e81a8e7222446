"""eval.py: the protocol on a scripted sampler, interruption, the analyses on worked cases, the data of the figures."""

import ast
import itertools
import json
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
from data import Problem
from data.overlap import contaminated
from eval import Record
from report import tables
from rollout import Sample

SHARED = Path(__file__).parents[2] / "shared"
UPSTREAM = SHARED / "upstream"
needs_files = pytest.mark.skipif(
    not UPSTREAM.is_dir(), reason="the real data files are not beside the project"
)
END = 0


def script(answers: dict[str, list[str]], max_positions: int = 10_000) -> SimpleNamespace:
    """A policy whose ids are characters and whose k-th response to a question is known; a final "|" is the end id."""
    calls = []

    def encode(text):
        return [END if c == "|" else ord(c) for c in text]

    def sample(prompts, limits, seeds, temperature, top_p):
        assert len(prompts) == len(limits) == len(seeds)
        found = []
        for prompt, limit, seed in zip(prompts, limits, seeds):
            text = "".join(map(chr, prompt))
            calls.append(
                SimpleNamespace(
                    prompt=text, limit=limit, seed=seed, temperature=temperature, top_p=top_p
                )
            )
            k = sum(c.prompt == text for c in calls) - 1
            ids = encode(answers[text][k])[:limit]
            found.append(Sample(ids, [0.0] * len(ids), ids[-1:] == [END]))
        return found

    return SimpleNamespace(
        prompt_ids=encode,
        encode=encode,
        decode=lambda ids: "".join(chr(i) for i in ids if i != END),
        calls=calls,
        context=lambda: max_positions,
        model=None,
        end_ids={END},
        end_id=END,
        sample=sample,
        vocab_size=10**6,
    )


def problem(question: str, *answers, source: str) -> Problem:
    return Problem(question, answers, None, source)


def record(accuracy=0.0, task="a", row=1, sample=0, **fields) -> Record:
    known = dict(
        temperature=0.1, phrase="", response="", ids=[1], finished=True, format=1.0, answer=None
    )
    return Record(task, row, sample, accuracy=float(accuracy), **{**known, **fields})


@pytest.fixture(scope="module")
def tiny():
    return engine.load_policy("tiny", "cpu")


# --- protocol and numbers --------------------------------------------------------------------------------------------


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
    records = evaluation.evaluate(
        policy, problems, n=2, temperature=0.3, max_new_tokens=20, seed=5, top_p=0.9
    )
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
    s = evaluation.scores(records)
    assert (
        s["tasks"]["a"]["accuracy"] == 0.5
        and s["tasks"]["a"]["stderr"] == 0
        and s["tasks"]["b"]["accuracy"] == 0
    )
    assert s["all"]["accuracy"] == pytest.approx(1 / 3), (
        "the average is over problems, not over benchmarks"
    )
    assert s["all"]["stderr"] == pytest.approx(
        math.sqrt((2 / 36 + 1 / 9) / 2 / 3)
    )  # means 1/2, 1/2, 0
    assert s["all"]["max_length"] == 20 and s["all"]["mean_length"] == pytest.approx(
        (10 + 7 + 12 + 10 + 12 + 20) / 6
    )
    assert s["all"]["format"] == pytest.approx(4 / 6) and s["all"]["truncated"] == pytest.approx(
        2 / 6
    )
    assert s["all"]["pass@1"] == pytest.approx(1 / 3) and s["all"]["pass@2"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "context, positions, expected",
    [(4096, 9, 4), (8, 100, 3), (4096, 4096, 6), (5, 100, 0), (3, 100, 0)],
)
def test_prompt_and_response_fit_the_context_and_the_model(context, positions, expected):
    policy = script({"12345": ["x" * 50]}, positions)
    limits = evaluation.Flags(max_new_tokens=6, context=context)
    [r] = evaluation.respond(
        policy, evaluation.drafts(policy, [problem("12345", 1, source="a:1")], 1), 0.1, limits
    )
    assert len(r.ids) == policy.calls[0].limit == expected and not r.finished


def test_every_number_of_the_table_stands_under_its_name():
    rows = [
        record(a, row=i, ids=[1] * 10 * (i + 1), finished=i > 0, format=float(i != 1))
        for i, a in enumerate((1, 0, 0, 0))
    ]
    head, _, task, average = tables.accuracy_table(evaluation.scores(rows)).splitlines()
    for line in (task, average):
        cells = dict(zip(*([cell.strip() for cell in x.split("|")[1:-1]] for x in (head, line))))
        cells.pop("benchmark")
        assert cells == {
            "problems": "4",
            "avg@1": "25.00 ± 25.00",
            "mean length": "25",
            "max length": "40",
            "formatted": "75.0",
            "truncated": "25.0",
        }


def test_summarize_edge_cases():
    assert evaluation.summarize([record(1)])["stderr"] == 0
    assert "pass@1" not in evaluation.summarize([record(1)])
    uneven = [
        record(1),
        record(0, sample=1),
        record(0, sample=2),
        record(1, row=2),
        record(1, row=2, sample=1),
    ]
    s = evaluation.summarize(
        uneven
    )  # n is what every problem has; the mean is that of the problems
    assert (
        s["n"] == 2
        and s["accuracy"] == pytest.approx(2 / 3)
        and s["pass@2"] == pytest.approx((2 / 3 + 1) / 2)
    )
    with pytest.raises(ValueError):
        evaluation.summarize([])


@pytest.mark.parametrize("n, correct", [(1, 0), (1, 1), (4, 1), (6, 2), (6, 5), (5, 0), (5, 5)])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples(n, correct):
    for k in range(1, n + 1):
        choices = list(itertools.combinations(range(n), k))
        with_a_right_one = sum(min(c) < correct for c in choices)
        assert evaluation.pass_at_k(n, correct, k) == pytest.approx(with_a_right_one / len(choices))


@pytest.mark.parametrize(
    "votes, expected",
    [
        ([("3", True), ("3", True), ("4", False)], 1),
        ([("3", True), ("4", False), ("4", False)], 0),
        ([("3", True), ("4", False)], 1 / 2),  # a tie is drawn by lot
        ([("3", True), ("4", False), ("5", False)], 1 / 3),
        (
            [("3", True), ("4", False), ("5", False), ("5", False), ("3.0", True)],
            1 / 2,
        ),  # right ones are one answer
        ([("5", True), ("7", True), ("4", False)], 1),  # also where the golds are several
        ([("0.5", False), ("1/2", False), ("3", True)], 0),  # equal wrong ones are one answer
        ([("1 2", False), ("12", False), ("3", True)], 1 / 3),  # blanks tell answers apart
        ([("1 1/2", False), ("11/2", False), ("5", True)], 1 / 3),
        ([("1 1/2", False), ("3/2", False), ("5", True)], 0),
        ([(" 12", False), ("12 ", False), ("3", True)], 0),  # where the grader says so
        ([(None, False), (None, False), ("3", True)], 1),  # no box, no vote
        ([("4", False), ("4", False)], 0),
        ([(None, False)], 0),
        ([], 0),
    ],
)
def test_majority(votes, expected):
    assert evaluation.majority(votes) == pytest.approx(expected)
    assert evaluation.majority(votes[::-1]) == pytest.approx(expected)


def test_published_row_stands_beside_ours_and_its_average_only_beside_the_same_problems():
    sizes = dict(zip(evaluation.TASKS, (30, 83, 500, 272, 675)))
    numbers = lambda n: dict(
        problems=n,
        n=1,
        accuracy=0.5,
        stderr=0.1,
        mean_length=9,
        max_length=9,
        format=1,
        truncated=0,
    )
    whole = {"tasks": {t: numbers(n) for t, n in sizes.items()}, "all": numbers(1560)}
    part = {"tasks": {"math": numbers(100)}, "all": numbers(100)}
    row = evaluation.PUBLISHED["7b-edge-grpo"]
    assert "53.21" in tables.accuracy_table(whole, row, "7b-edge-grpo").splitlines()[-1]
    table = tables.accuracy_table(part, row, "7b-edge-grpo")
    assert "79.00" in table and "53.21" not in table and "50.00 ± 10.00" in table


def test_samples_depend_on_seed_problem_and_index_alone(tiny):
    problems = data.load("tiny:1-3:test")[:6]
    ids = lambda records: {r.key(): r.ids for r in records}
    three = ids(
        evaluation.evaluate(tiny, problems, n=3, temperature=2.0, max_new_tokens=40, seed=1)
    )
    one = ids(
        evaluation.evaluate(tiny, problems[::-2], n=1, temperature=2.0, max_new_tokens=40, seed=1)
    )
    assert one.items() <= three.items()
    assert len({tuple(i) for i in three.values()}) > 12, "samples of one problem must differ"
    assert (
        ids(evaluation.evaluate(tiny, problems, n=3, temperature=1.0, max_new_tokens=40, seed=2))
        != three
    )


# --- the command: interruption, settings, files ----------------------------------------------------------------------


def command(out: Path, *more: str) -> list[str]:
    return [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--tasks",
        "tiny:1-3:test",
        "--limit",
        "5",
        "--n",
        "2",
        "--temperature",
        "1",
        "--max-new-tokens",
        "30",
        "--batch",
        "4",
        "--out",
        str(out),
        *more,
    ]


def lines(out: Path) -> list[str]:
    return (out / "responses.jsonl").read_text().splitlines()


def test_the_command_prints_the_table_and_goes_on_after_an_interruption(
    tmp_path, monkeypatch, capsys
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert evaluation.main(command(whole)) == 0
    shown = capsys.readouterr().out
    assert (
        "<|im_start|>" in shown and "| tiny:1-3:test |        5 |" in shown and "min left" in shown
    )

    real, batches = evaluation.respond, []

    def stopped(policy, drafts, *rest):
        batches.append(len(drafts))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return real(policy, drafts, *rest)

    monkeypatch.setattr(evaluation, "respond", stopped)
    assert evaluation.main(command(cut)) == 130
    assert len(lines(cut)) == 8 and not (cut / "summary.json").exists()
    with open(cut / "responses.jsonl", "ab") as f:
        f.truncate(
            (cut / "responses.jsonl").stat().st_size - 20
        )  # the disk's last line is half written
    batches.clear()
    batches.append(0)
    assert evaluation.main(command(cut)) == 0
    assert batches == [0, 3], "the cut line and the two missing responses, and nothing twice"
    assert sorted(lines(cut)) == sorted(lines(whole))
    results = [json.loads((out / "summary.json").read_text())["results"] for out in (cut, whole)]
    assert results[0] == results[1]
    batches[:] = [0]
    assert evaluation.main(command(cut, "--limit", "6")) == 0 and batches == [0, 2], (
        "a larger limit only adds"
    )


@pytest.mark.parametrize(
    "change, said",
    [
        (["--seed", "1"], "seed was 0, is 1"),
        (["--max-new-tokens", "31"], "max_new_tokens was 30, is 31"),
        (["--top-p", "0.9"], "top_p"),
        (["--context", "99"], "context"),
        (["--entropy"], "entropy"),
    ],
)
def test_a_folder_of_other_settings_is_refused(tmp_path, capsys, change, said):
    assert evaluation.main(command(tmp_path)) == 0
    before = lines(tmp_path)
    assert evaluation.main(command(tmp_path, *change)) == 2
    error = capsys.readouterr().err
    assert (
        said in error
        and "--out" in error
        and len(error.splitlines()) == 1
        and lines(tmp_path) == before
    )


def test_other_weights_or_problems_are_refused(tmp_path, tiny, capsys):
    own = tmp_path / "own.jsonl"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": ["3", 4]}\n' * 2)
    arguments = [
        "--model",
        "tiny",
        "--device",
        "cpu",
        "--tasks",
        str(own),
        "--max-new-tokens",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert evaluation.main(arguments) == 0
    assert f"| {own} |" in capsys.readouterr().out, "a file of one's own is a task"
    own.write_text('{"question": "Mia has 3 cards. How many?", "answer": 5}\n' * 2)
    assert evaluation.main(arguments) == 2 and f"problems of {own} was" in capsys.readouterr().err
    before = evaluation.fingerprint(tiny)
    weight = next(iter(tiny.model.parameters()))
    with torch.no_grad():
        weight[3, 5] += 1e-3
        assert evaluation.fingerprint(tiny) != before
        weight[3, 5] -= 1e-3


def test_broken_files_of_results_are_told_in_one_sentence(tmp_path, capsys):
    assert evaluation.main(command(tmp_path)) == 0
    file = tmp_path / "responses.jsonl"
    good = file.read_text()
    file.write_text(good.replace("{", "(", 1))
    assert (
        evaluation.main(command(tmp_path)) == 2
        and f"{file}:1: not valid JSON" in capsys.readouterr().err
    )
    file.write_text('{"strange": 1}\n' + good)
    assert evaluation.main(command(tmp_path)) == 2 and "did not write" in capsys.readouterr().err
    assert file.read_text() == '{"strange": 1}\n' + good, "a refused folder is left as it was"
    file.write_text(good)
    settings = tmp_path / "settings.json"
    settings.write_bytes(b"\xff\xfe")
    assert (
        evaluation.main(command(tmp_path)) == 2
        and f"{settings}:1: not valid JSON" in capsys.readouterr().err
    )
    settings.write_text("[]")
    assert (
        evaluation.main(command(tmp_path)) == 2
        and f"{settings}:1: no JSON object" in capsys.readouterr().err
    )
    assert file.read_text() == good and settings.read_text() == "[]"
    (tmp_path / "file").write_text("")
    assert evaluation.main(command(tmp_path / "file" / "out")) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "bad",
    [
        ["--n", "0"],
        ["--n", "x"],
        ["--limit", "0"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--temperature", "inf"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--max-new-tokens", "0"],
        ["--seed", "-1"],
        ["--compare", "8b-sft"],
        ["--nonsense"],
        ["--lim", "3"],
        ["--entropy", "--temperature", "0"],
        ["--batch", "0"],
        ["--temperature", "1", "--temperatures", "1", "2"],
    ],
)
def test_flags_out_of_range_fail(bad, capsys):
    assert evaluation.main(["--model", "tiny", *bad]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "model, out",
    [("Qwen/Qwen2.5-Math-7B", "evals/Qwen2.5-Math-7B-seed3"), ("runs/x/final", "runs/x/eval")],
)
def test_results_go_where_compare_looks_for_them(model, out):
    assert evaluation.parse_flags(["--model", model, "--seed", "3"]).out == out


@pytest.mark.parametrize(
    "bad",
    [
        ["--model", "tiny", "--tasks", "nowhere"],
        ["--model", "./nowhere", "--tasks", "tiny:1-3"],
        ["compare", "nowhere"],
        ["plot", "nowhere"],
    ],
)
def test_mistakes_are_one_sentence(bad, capsys):
    assert evaluation.main(bad) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "nowhere" in error and len(error.splitlines()) == 1


def test_two_processes_give_the_same_responses(tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    assert evaluation.main(command(alone, "--reflect", "--entropy")) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = dict(
        WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1"
    )
    ran = [
        subprocess.Popen(
            [sys.executable, "eval.py", *command(two, "--reflect", "--entropy")],
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **group, "RANK": r, "LOCAL_RANK": r},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for r in "01"
    ]
    (out, error), (out_1, error_1) = [p.communicate(timeout=300) for p in ran]
    assert [p.returncode for p in ran] == [0, 0], error + error_1
    told = [line for line in out_1.splitlines() if "[Gloo]" not in line]  # torch 2.9's own
    assert "prompt of the first problem" in out and not told, "only one process prints"
    parsed = [[json.loads(line) for line in lines(out)] for out in (alone, two)]
    assert len(parsed[0]) == len(parsed[1])
    for a, b in zip(*parsed):
        assert a["entropy"] == (
            None if b["entropy"] is None else pytest.approx(b["entropy"], abs=1e-4)
        )
        assert {**a, "entropy": 0, "entropies": 0} == {**b, "entropy": 0, "entropies": 0}


# --- contamination ---------------------------------------------------------------------------------------------------


def test_contamination_ignores_layout_but_not_numbers():
    long = r"Find the number of integers $k$ in $[-500,500]$ for which $\log(kx)=2\log(x+2)$ has one real solution."
    training = [problem(long, 1, source="t:1"), problem("How many?", 1, source="t:2")]
    same = long.replace(" ", "\n").replace("$", "") + "\n[i]Author[/i][asy]draw(A);[/asy]"
    other = "Find the number of primes $p$ below $1000$ for which $p+2$ is a prime as well."
    problems = [
        problem(q, 1, source=f"a:{i}") for i, q in enumerate([long, same, other, "how  many", ""])
    ]
    assert contaminated(problems, training) == {"a:0", "a:1", "a:3"}


@needs_files
def test_contamination_finds_the_14_problems():
    training = data.load("deepscaler-hard-1k", str(UPSTREAM))
    problems = [p for task in evaluation.TASKS for p in data.load(task, str(UPSTREAM))]
    found = contaminated(problems, training)
    assert {source for source in found if source.startswith("math:")} == {
        f"math:{i + 1}" for i in (80, 110, 285, 352, 412, 475)
    }
    assert sum(source.startswith("olympiad_bench:") for source in found) == 8 and len(found) == 14


def test_scores_without_the_contaminated_problems(tmp_path, monkeypatch, capsys):
    real = data.load
    monkeypatch.setattr(
        data,
        "load",
        lambda name, mirror: real("tiny:1-3:test")[1:3] if "hard" in name else real(name),
    )
    assert evaluation.main(command(tmp_path, "--exclude-contaminated")) == 0
    result = json.loads((tmp_path / "summary.json").read_text())["results"]["1"]
    assert result["without_contaminated"]["removed"] == ["tiny:1-3:test:2", "tiny:1-3:test:3"]
    assert (result["all"]["problems"], result["without_contaminated"]["all"]["problems"]) == (5, 3)


# --- Figure 3 --------------------------------------------------------------------------------------------------------


def test_entropy_report_on_a_worked_case():
    # Question 1: right 0.2, wrong 0.6 (mean 0.4). Question 2: right 1.0, right 0.6, wrong 0.2 (mean 0.6). Average 0.52.
    rows = [(1, 1, 0.2), (1, 0, 0.6), (2, 1, 1.0), (2, 1, 0.6), (2, 0, 0.2)]
    found = evaluation.entropy_report(
        [record(a, row=q, entropy=h) for q, a, h in rows] + [record(0, row=3, ids=[])]
    )
    assert found["average"] == pytest.approx(0.52)
    overall, within = found["overall"], found["within"]
    assert (overall["correct"], overall["wrong"]) == (within["correct"], within["wrong"]) == (3, 2)
    assert (overall["mean_correct"], overall["mean_wrong"], overall["ratio"]) == pytest.approx(
        (0.6, 0.4, 2 / 3)
    )
    assert (overall["correct_above"], overall["wrong_below"]) == pytest.approx((2 / 3, 1 / 2))
    assert (within["correct_above"], within["wrong_below"]) == pytest.approx((1 / 3, 1 / 2)), (
        "0.6 equals its average"
    )
    assert within["mean_correct"] == pytest.approx((0.5 + 5 / 3 + 1) / 3)
    assert within["mean_wrong"] == pytest.approx((1.5 + 1 / 3) / 2)


def test_entropy_report_where_a_side_is_missing():
    found = evaluation.entropy_report(
        [record(1, row=1, entropy=0.5), record(1, row=2, entropy=0.1)]
    )
    assert found["within"] is None, (
        "a question with one response has no average of its own to compare with"
    )
    assert found["overall"]["ratio"] is None and found["overall"]["wrong_below"] is None
    assert "needs at least two responses" in tables.entropy_text(found)
    assert evaluation.entropy_report([record(0, ids=[])]) == {}


def test_equal_entropies_are_neither_above_nor_below_their_average():
    for P in (k / 10 for k in range(1, 60)):  # the mean of three equal numbers may be off by a bit
        same = evaluation.entropy_report([record(i % 2, sample=i, entropy=P) for i in range(3)])
        for side in (same["overall"], same["within"]):
            assert side["correct_above"] == side["wrong_below"] == 0


def test_entropies_are_those_of_the_sampling_distribution(tiny):
    drafts = evaluation.drafts(tiny, data.load("tiny:1-3:test")[:3], 1)
    for r, d in zip(
        evaluation.respond(tiny, drafts, 0.6, evaluation.Flags(max_new_tokens=20), entropy=True),
        drafts,
    ):
        logits = (
            tiny.model(torch.tensor([d.prompt + r.ids]))
            .logits[0, len(d.prompt) - 1 : -1, : tiny.vocab_size]
            .double()
        )
        p = torch.softmax(logits / 0.6, -1)
        H = -(p * p.clamp_min(1e-300).log()).sum(-1)
        assert r.entropies == pytest.approx(H.tolist(), abs=2e-4)
        assert r.entropy == pytest.approx(H.mean().item(), abs=1e-5)


def test_token_table():
    records = [
        record(ids=[5, 6, 5], entropies=[1.0, 0.0, 2.0]),
        record(ids=[5, 7], entropies=[3.0, 9.0]),
        record(ids=[5, 5]),
    ]
    assert evaluation.token_table(records, min_count=1) == [(7, 9.0, 1), (5, 2.0, 3), (6, 0.0, 1)]
    assert evaluation.token_table(records, min_count=2) == [(5, 2.0, 3)]


def test_temperatures_are_evaluated_one_by_one(tmp_path):
    arguments = command(tmp_path, "--entropy")
    arguments[arguments.index("--temperature") :][:2] = []
    at = arguments.index("--temperature")
    arguments[at : at + 2] = ["--temperature", "0.1", "1.2"]
    assert evaluation.main(arguments) == 0
    results = json.loads((tmp_path / "summary.json").read_text())["results"]
    assert list(results) == ["0.1", "1.2"] and len(lines(tmp_path)) == 20
    assert results["0.1"]["entropy"]["average"] < results["1.2"]["entropy"]["average"]
    by_temperature = {
        T: [r for r in map(json.loads, lines(tmp_path)) if r["temperature"] == T]
        for T in (0.1, 1.2)
    }
    for T, rows in by_temperature.items():
        assert results[f"{T:g}"]["entropy"]["average"] == pytest.approx(
            sum(r["entropy"] for r in rows) / 10
        )


# --- Figure 2 --------------------------------------------------------------------------------------------------------


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
    records = [
        record(a, row=q, response=text)
        for q, a, text in ((1, 1, "Wait, 3"), (2, 0, "Hold on."), (3, 1, "3"), (4, 0, "5"))
    ]
    fixed = {"A": (1, 1), "B": (1, 0), "C": (0, 0), "D": (0, 1)}
    forced = [
        record(a, row=q, phrase=phrase)
        for phrase, both in fixed.items()
        for q, a in zip((2, 4), both)
    ]
    found = evaluation.reflection_report(records, forced)
    assert (found["reflecting"], found["share_reflecting"], found["accuracy_reflecting"]) == (
        2,
        0.5,
        0.5,
    )
    assert found["fixed"] == {"A": 1, "B": 0.5, "C": 0, "D": 0.5} and found["wrong"] == 2
    assert found["mean_fixed"] == 0.5 and found["gain"] == 0.25
    none = evaluation.reflection_report([record(1, response="3")], [])
    assert none["accuracy_reflecting"] is none["mean_fixed"] is None
    assert "no response is wrong" in tables.reflection_text(none)


def test_forced_reflection_continues_the_wrong_responses_only():
    paper = " Wait! Something is wrong here."
    assert evaluation.FORCED[0] == paper and len(set(evaluation.FORCED)) == 4
    first = {"p": [r"\boxed{1}|"], "q": [r"\boxed{1}|"], "r": ["xxxx"]}
    policy = script(
        {
            **first,
            **{
                q + start + phrase: [r" \boxed{2}|"]
                for phrase in evaluation.FORCED
                for q, start in (("q", r"\boxed{1}"), ("r", "xxxx"))
            },
        }
    )
    problems = [
        problem("p", 1, source="a:1"),
        problem("q", 2, source="a:2"),
        problem("r", 3, source="a:3"),
    ]
    drafts, limits = (
        evaluation.drafts(policy, problems, 1),
        evaluation.Flags(max_new_tokens=12, seed=3),
    )
    records = evaluation.respond(policy, drafts, 0.1, limits)
    policy.calls.clear()
    forced = evaluation.respond(
        policy, evaluation.forced_drafts(policy, drafts, records), 0.1, limits
    )
    assert [(r.problem, r.accuracy) for r in forced] == [(2, 1)] * 4 + [(3, 0)] * 4
    assert forced[0].response == r"\boxed{1}" + paper + r" \boxed{2}", (
        "without the end token of the first response"
    )
    assert forced[0].ids == policy.encode(forced[0].response) + [END]
    assert {c.limit for c in policy.calls} == {256} and len({c.seed for c in policy.calls}) == 8


def test_a_forced_reflection_is_cut_to_the_context():
    """A response may have used all of it, and learned positions end there."""
    policy = script(
        {"p": ["xxxx"], **{"pxxxx" + phrase: [""] for phrase in evaluation.FORCED}}, max_positions=8
    )
    drafts, limits = (
        evaluation.drafts(policy, [problem("p", 1, source="a:1")], 1),
        evaluation.Flags(max_new_tokens=4),
    )
    forced = evaluation.forced_drafts(
        policy, drafts, evaluation.respond(policy, drafts, 0.1, limits)
    )
    records = evaluation.respond(policy, forced, 0.1, limits)
    assert [r.response for r in records] == ["xxxx" + phrase[:3] for phrase in evaluation.FORCED]
    assert all(len(r.ids) == 7 and not r.finished for r in records)


def test_reflect_on_the_command_line(tmp_path, capsys):
    assert evaluation.main(command(tmp_path, "--reflect")) == 0
    records = [json.loads(line) for line in lines(tmp_path)]
    wrong = [r for r in records if not r["phrase"] and r["accuracy"] == 0]
    assert len([r for r in records if r["phrase"]]) == 4 * len(wrong) > 0
    found = json.loads((tmp_path / "summary.json").read_text())["results"]["1"]
    assert found["reflection"]["wrong"] == len(wrong) and set(found["reflection"]["fixed"]) == set(
        evaluation.FORCED
    )
    assert found["all"]["problems"] == 5 and found["all"]["n"] == 2, (
        "forced responses are not part of the accuracy"
    )
    assert "average of the four" in capsys.readouterr().out


# --- the program ---------------------------------------------------------------------------------------------------


def test_importing_eval_draws_in_neither_matplotlib_nor_the_training_program():
    tree = ast.parse(Path(evaluation.__file__).read_text(encoding="utf-8"))
    imported = lambda nodes: (
        {name.name for n in nodes if isinstance(n, ast.Import) for name in n.names}
        | {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    )
    assert "matplotlib" not in imported(tree.body) and "edge_grpo" not in imported(ast.walk(tree))


def test_an_evaluation_whose_output_nobody_reads_is_no_success(tmp_path):
    evaluated = subprocess.Popen(
        [sys.executable, "eval.py", *command(tmp_path)],
        stdout=subprocess.PIPE,
        cwd=Path(evaluation.__file__).parent,
        stderr=subprocess.PIPE,
    )
    evaluated.stdout.close()
    evaluated.stderr.read()
    assert evaluated.wait() == 141


def test_the_limits_on_the_command_line_are_those_of_the_sampling(tmp_path, monkeypatch):
    seen, respond = [], evaluation.respond

    def spy(policy, drafts, T, flags, entropy):
        seen.append((flags, entropy, bool(drafts[0].phrase)))
        return respond(policy, drafts, T, flags, entropy)

    monkeypatch.setattr(evaluation, "respond", spy)
    argv = command(
        tmp_path, "--context", "99", "--top-p", "0.9", "--seed", "5", "--entropy", "--reflect"
    )
    assert evaluation.main(argv) == 0
    assert {(f.max_new_tokens, f.context, f.seed, f.top_p) for f, *_ in seen} == {(30, 99, 5, 0.9)}
    assert {(entropy, forced) for _, entropy, forced in seen} == {(True, False), (False, True)}


def test_two_evaluations_do_not_share_a_folder(tmp_path, capsys):
    code = (
        "import pathlib, sys; from engine.folder import claim; lock = claim(pathlib.Path(sys.argv[1])); print(); "
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(evaluation.__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        other.stdout.readline()
        assert (
            evaluation.main(command(tmp_path)) == 2
            and "another process is at work" in capsys.readouterr().err
        )
        assert [f.name for f in tmp_path.iterdir()] == [".lock"]
        other.stdin.close()
    assert evaluation.main(command(tmp_path)) == 0


def test_a_gpu_that_is_full_is_told_in_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(evaluation, "response_logprobs", full)
    assert evaluation.main([*command(tmp_path), "--entropy"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory (CUDA out of memory") and "--max-rows" in said
