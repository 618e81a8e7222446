"""Tests of reward.py: a table of equal and different answers (tests/answers.txt), the public
regression cases and the golds of the benchmarks where ../shared has them, and what hostile text
must not do."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import data
import data.download
import reward
from grading import sympy_process
from reward import final_answer, grade, score, score_all

SHARED = Path(__file__).parents[2] / "shared"
ROOT = Path(reward.__file__).parent
ANSWERS = Path(__file__).parent / "answers.txt"


def box(text) -> str:
    return f"so the answer is $\\boxed{{{text}}}$."


def pairs(sign: str = "==!=") -> dict[str, list[tuple[str, str, bool]]]:
    """kind -> (gold, answer, equal) of tests/answers.txt, whose head tells its form."""
    kinds: dict[str, list] = {}
    for line in ANSWERS.read_text(encoding="utf-8").splitlines()[2:]:
        if line.startswith("# "):
            kind = kinds.setdefault(line[2:], [])
            continue
        gold, *rest = re.split(r" (==|!=|~~) ", line.removeprefix("> "))
        for found, answer in zip(rest[::2], rest[1::2]):
            if found in sign:
                kind.append((gold, answer, found != "!="))
                if not line.startswith("> "):
                    kind.append((answer, gold, found != "!="))
    return kinds


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def cases(name: str) -> list[dict]:
    return [json.loads(line) for line in shared(f"graders/{name}").read_text().splitlines()]


def benchmarks() -> dict[str, list]:
    mirror = shared("upstream")
    return {name: data.load(name, mirror=str(mirror)) for name in data.download.FILES}


def benchmark_golds() -> dict[str, list]:
    golds = {}
    for name, problems in benchmarks().items():
        golds[name] = [list(problem.answers) for problem in problems]
    return golds


# -- what is equal


@pytest.mark.parametrize("kind", pairs())
def test_table(kind):
    assert not [row for row in pairs()[kind] if grade(box(row[1]), row[0]) != row[2]]


def test_known_gaps_are_few_and_equal():
    gaps = [row for rows in pairs("~~").values() for row in rows]
    assert not [row for row in gaps if grade(box(row[1]), row[0])]
    assert len(gaps) < 20


@pytest.mark.parametrize(
    "name, count, equal, different",
    [
        ("dev.jsonl", 416, 1.0, 1.0),
        ("turn2.jsonl", 187, 0.97, 1.0),
        ("turn3.jsonl", 105, 1.0, 0.72),  # eight of 29 are contrived, see reward.py
    ],
)
def test_public_cases(name, count, equal, different):
    right = {True: [], False: []}
    for case in cases(name):
        if case["expected"] != "either":
            verdict = grade(case["response"], case["gold"])
            right[case["expected"]].append(verdict == case["expected"])
    assert len(right[True]) + len(right[False]) == count
    assert sum(right[True]) >= equal * len(right[True])
    assert sum(right[False]) >= different * len(right[False])


def test_every_gold_grades_itself_right_and_reads_as_an_answer():
    golds = benchmark_golds()
    counts = [len(rows) for rows in golds.values()]
    assert sorted(counts) == [30, 83, 272, 500, 675, 1000, 1319, 7473]
    unread = set()
    for gold in sum(golds.values(), []):
        for one in gold:
            text = str(one)
            boxed = text if "\\boxed" in text else box(text)
            bare = final_answer(text) or text
            assert grade(boxed, gold) and grade(boxed, one) and grade(box(bare), one), one
            if not score(boxed, "1")[0]:
                unread.add(text)
            # spelt another way, so that it is the value that is compared and not the text
            elif score(box(bare), "1")[0]:
                assert grade(box("\\, " + bare.replace("\\frac", "\\dfrac")), one), one
    assert len(unread) <= 2


@pytest.mark.parametrize("constant", r"0 1 2 \frac{1}{2} x A \infty 0=0 1,2 (0,1) \{\} x=x".split())
def test_a_constant_answer_is_worth_its_share_only(constant):
    for name, golds in benchmark_golds().items():
        hits = sum(grade(box(constant), gold) for gold in golds)
        share = 0
        for gold in golds:
            share += not {constant, constant + ".0"}.isdisjoint(map(str, gold))
        assert hits <= max(share + 5, 0.06 * len(golds)), (name, hits)


def test_shuffled_golds_score_about_nothing():
    for name, golds in benchmark_golds().items():
        first = [str(gold[0]).replace("\\boxed", "") for gold in golds]
        shuffled = random.Random(0).sample(first, len(first))
        right = sum(accuracy for _, accuracy in score_all([box(text) for text in shuffled], golds))
        assert right <= max(2, 0.03 * len(golds)), name


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("14", [14, 14.0, "14"], [15, 14.5]),
        ("14.0", [14], []),
        ("0.5", [0.5], []),
        ("0.33", [], [1 / 3]),
        ("2", [["1", 2], ("1", "2"), ["1", ["3", 2.0]]], [["1", 3], []]),
        ("", [], [None, "", " ", "$$", [], [None], ["", None]]),
        ("None", [], [None]),
        ("nan", [], [float("nan")]),
        ("inf", [], [float("nan")]),
    ],
)
def test_golds_of_every_type(answer, right, wrong):
    assert all(grade(box(answer), gold) for gold in right)
    assert not any(grade(box(answer), gold) for gold in wrong)


# -- the box and the format reward


FINAL_ANSWERS = r"""
\boxed{1} => 1
\boxed{1} then \boxed{2} => 2
\boxed{1} then \boxed{2 => 1
\boxed {3} => 3
\boxed{\frac{1}{2}} => \frac{1}{2}
\boxed{\boxed{4}} => 4
\boxed{ \boxed{4}, 5} =>  \boxed{4}, 5
\\boxed{5} => 5
\boxed{\{1\}} => \{1\}
}}\boxed{1}} => 1
{{\boxed{1} => 1
\boxed{} => 
\boxed{1 => None
\boxed => None
1 => None
\boxed 1 => 1
$\boxed5$ => 5
\boxed 12.5 => 12.5
\boxed\pi => \pi
\boxed A. => A
\boxed{1} then \boxed2 => 2
\boxed\frac12 => None
\boxed notation => None
\boxed{1}, as I boxed it in \boxed form => 1"""


@pytest.mark.parametrize("row", FINAL_ANSWERS.splitlines()[1:])
def test_final_answer(row):
    response, expected = row.split(" => ")
    assert str(final_answer(response)) == expected


def test_final_answer_behind_many_open_boxes():
    assert final_answer("\\boxed{" * 2000 + "\\boxed{7}") == "7"
    assert final_answer("") is None


READABLE = r"5 | \frac{1}{2} | x=5 | \text{east} | yes | (1,2)"
UNREADABLE = r" |  | 2+ | \frac{1} | \foo\bar{\baz} | (1,2 | * | 1 2 3 | \left\left | _"


@pytest.mark.parametrize("answers, expected", [(READABLE, 1.0), (UNREADABLE, 0.0)])
def test_format_reward_is_a_closed_box_that_parses(answers, expected):
    for answer in answers.split(" | "):
        assert score(box(answer), "12345") == (expected, 0.0), answer
        assert score(f"the answer is {answer}", "12345") == (0.0, 0.0)


def test_score_of_a_right_answer():
    assert score(box("0.5"), "\\frac12") == (1.0, 1.0)
    assert score("0.5", "\\frac12") == (0.0, 0.0)


def test_score_all_equals_score_one_by_one():
    rows = [(gold, answer) for kind in pairs().values() for gold, answer, _ in kind[:4]]
    rows += [("1", "x" * 30_000), ("1", "")]
    responses, golds = [box(answer) for _, answer in rows], [gold for gold, _ in rows]
    one_by_one = [score(response, gold) for response, gold in zip(responses, golds)]
    assert score_all(responses, golds) == one_by_one
    with pytest.raises(ValueError):
        score_all(responses, golds[1:])


# -- hostile text


class Hang(BaseException):
    """Not an Exception, which the grader would take for a wrong answer."""


@contextmanager
def no_hang():
    def ring(*_):
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)


def test_hostile_cases():
    for case in cases("hostile.jsonl"):
        with no_hang():
            verdict = grade(case["response"], case["gold"])
        acceptable = "acceptable" in case["note"] or case["expected"] == "either"
        assert verdict == case["expected"] or acceptable and not verdict, case
    assert not list(Path("/tmp").glob("pwned_*"))


def test_no_text_is_executed(tmp_path):
    target = tmp_path / "pwned"
    code = f"__import__('pathlib').Path('{target}').touch()"
    for text in (
        code,
        f"\\frac{{{code}}}{{1}}",
        f"[{code}]",
        f"x={code}",
        f"\\int_0^1 {code} dx",
        f"\\lim_{{x \\to 0}} {code}",
        f'sympify("{code}")',
    ):
        for gold in ("0", "x", "\\frac{1}{2}", text.replace("0", "1"), "(1,2)"):
            grade(box(text), gold)
            grade(box(gold), text)
    assert not target.exists()


def test_a_fresh_process_grades_a_batch_as_a_warm_one_does():
    """The first answers must not be lost to the start of sympy: rewards would differ on resume."""
    code = r"import reward; print(reward.score_all([r'\boxed{\int_0^1 x^2 dx}'] * 4, ['1/3'] * 4))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert fresh.stdout.strip() == str([(1.0, 1.0)] * 4), fresh.stderr


FORBIDDEN = """sympify parse_expr parse_latex S literal_eval pickle alarm SIGALRM ITIMER_REAL
    workdps workprec extradps extraprec"""
RUNS_CODE = r"(?<![.\w])(?<!def )(eval|exec|compile|__import__)\("


def test_the_source_uses_no_parser_of_others_and_sympy_in_its_own_process_only():
    """What changes the precision of mpmath changes it for all threads."""
    files = [ROOT / "reward.py", *sorted((ROOT / "grading").glob("*.py"))]
    assert len(files) > 5
    for path in files:
        assert not re.search(RUNS_CODE, path.read_text(encoding="utf-8")), path
        with open(path, "rb") as file:
            names = {token.string for token in tokenize.tokenize(file.readline)}
        assert not names & set(FORBIDDEN.split()), path
        assert "sympy" not in names or path.name == "sympy_process.py"


def test_the_precision_of_the_numbers_is_never_changed(monkeypatch):
    """mpmath's sec, cot and csc would change it for the time of a call, for all threads."""
    from grading.value import mp

    digits, changes = mp.prec, []
    watched = property(type(mp).prec.fget, lambda self, value: changes.append(value))
    monkeypatch.setattr(type(mp), "prec", watched)
    for kind in pairs().values():
        for gold, answer, _ in kind:
            grade(box(answer), gold)
    assert not changes and mp.prec == digits


AWKWARD = r"""
\ \\ 9^9^9^9^9^9 ((9!)!)! 1e999999999999 10^{-10^{20}} \sin(10^{40}) \binom{10^5}{5\cdot10^4}
\sum_{k=1}^{9000}k^k \sum_{i=1}^{99}\sum_{j=1}^{99}\sum_{k=1}^{99}\sin(ijk) e^{e^{e^{20}}} 0^0
(1+i)^{10^{12}} \lfloor10^{10^6}/7\rfloor \frac{0}{0} \infty-\infty \tan\frac{\pi}{2} 1_2_3_4
1:2:3 \gcd(10^{30},10^{29}+1)"""
REPEATED = [  # a text, how often it stands there, what follows
    ("{", 3_000_000, ""),
    ("}", 3_000_000, ""),
    ("\\boxed{", 400_000, ""),
    ("((((", 50_000, ""),
    ("$", 10**6, ""),
    ("1,", 9_000, ""),
    ("\\frac", 4000, ""),
    ("\\left(", 3000, ""),
    ("^", 10_000, ""),
    ("!", 10_000, ""),
    ("-", 15_000, "1"),
    ("x^2", 5000, ""),
    ("\\text{", 3000, ""),
    ("|", 9000, ""),
    ("\\begin{pmatrix}", 1000, ""),
    ("\\sqrt", 3000, ""),
    ("1+", 900, "1"),
    ("1/", 900, "1"),
    ("[0,1]\\cup", 300, "[0,1]"),
    ("\\pm", 500, "1"),
    ("9", 19_000, ""),
    ("x_{", 2000, ""),
    ("{x | ", 50, ""),
    ("=", 2000, ""),
    ("x", 19_000, ""),
    (" ", 19_000, "x"),
    ("( ", 9_000, ""),
    ("C(", 9_000, ""),
    ("9.", 9_000, ""),
    ("12", 9_000, "..."),
    ("1 ", 9_000, ""),
    ("^{", 9_000, ""),
    ("\\color{", 2_000, ""),
    ("}\\ ", 9_000, ""),
    ("A_", 9_000, ""),
    ("a:", 9_000, ""),
    ("£", 19_000, ""),
    ("\0\ud800\u202e", 1, ""),
    (AWKWARD, 0, ""),
]


@pytest.mark.parametrize("piece, count, rest", REPEATED)
def test_awkward_text_is_answered(piece, count, rest):
    texts = [piece * count + rest]
    if not count:
        texts = piece.split()
    for text in texts:
        for gold in ("1", "\\sqrt{2}", "x^2+1", "1,2", "(0,1)", text[:2000] + "1"):
            with no_hang():
                grade(box(text), gold)
                score("\\boxed{" + text, gold)


# -- the process that has sympy

SLOW = "\\int_0^{\\infty} \\frac{\\sin(x^3+x)}{e^{x^2}+\\cos x} dx"
NEEDS_SYMPY = [
    ("\\int_0^1 x^2 dx", "\\frac13"),
    ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1"),
    ("\\sum_{k=1}^{1000000000} k", "500000000500000000"),
]


@pytest.fixture
def warm():
    """The id of a sympy process that has started."""
    assert sympy_process.ask("1", ["1"]) is True
    return sympy_process.running().pid


def test_limits_integrals_and_long_sums(warm):
    for answer, gold in NEEDS_SYMPY:
        assert grade(box(answer), gold) and not grade(box(answer), gold + "1"), answer


def test_nothing_is_started_or_imported_for_simple_answers():
    program = r"""
import sys, reward
from grading import sympy_process
rows = [('14', '14'), (r'\frac12', '0.5'), (r'\text{east}', 'east'), ('x+1', '1+x')]
for answer, gold in rows:
    assert reward.grade(r'\boxed{' + answer + '}', gold)
assert not {'sympy', 'torch', 'numpy'} & set(sys.modules)
assert not sympy_process._running
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_a_slow_answer_costs_its_clock_and_not_the_process(warm):
    with no_hang():
        assert not grade(box(SLOW), "2")
    assert grade(box(NEEDS_SYMPY[0][0]), NEEDS_SYMPY[0][1])
    assert sympy_process.running().pid == warm


@pytest.mark.parametrize("answer, gold", NEEDS_SYMPY)
def test_a_right_answer_is_right_after_the_process_was_killed(warm, answer, gold):
    os.kill(warm, signal.SIGKILL)
    time.sleep(0.1)
    assert score_all([box(answer)], [gold]) == [(1.0, 1.0)]
    assert sympy_process.running().pid != warm


def test_what_is_too_slow_for_the_machine_is_wrong_and_does_not_hang(warm, monkeypatch):
    monkeypatch.setattr(sympy_process, "PATIENCE", 0.01)
    assert sympy_process.ask(SLOW, ["2"]) is False
    monkeypatch.undo()
    assert sympy_process.ask("1", ["1"]) is True


def test_the_process_has_limits_on_memory(warm):
    limits = Path(f"/proc/{warm}/limits").read_text()
    assert re.search(rf"Max address space\s+{sympy_process.MEMORY} ", limits)


def test_any_thread_and_several_graders_at_once(warm):
    rows = [row for kind in pairs().values() for row in kind[:6]]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda row: grade(box(row[1]), row[0]), rows * 2))
    assert verdicts == [row[2] for row in rows * 2]


def test_no_process_outlives_a_killed_parent():
    program = (
        "import time\nfrom grading import sympy_process\nsympy_process.ask('1', ['1'])\n"
        "print(sympy_process.running().pid, flush=True)\ntime.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        process = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        command = Path(f"/proc/{process}/cmdline")
        if not command.exists() or not command.read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("the process is still there")
