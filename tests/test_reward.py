"""Tests of reward.py: a table of equal and different answers (tests/answers.txt), the public
regression cases and the golds of the benchmarks where ../shared has them, and what hostile text
must not do."""

import ast
import json
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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


def any_of(gold) -> list:
    return gold if isinstance(gold, list) else [gold]


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
    return {
        name: [list(problem.answers) for problem in problems]
        for name, problems in benchmarks().items()
    }


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
    assert {name: len(rows) for name, rows in golds.items()} == {
        "deepscaler-hard-1k": 1000,
        "aime": 30,
        "amc": 83,
        "math": 500,
        "minerva": 272,
        "olympiad_bench": 675,
        "gsm8k": 1319,
        "gsm8k-train": 7473,
    }
    for name, rows in golds.items():
        for gold in rows:
            for one in any_of(gold):
                boxed = str(one) if "\\boxed" in str(one) else box(one)
                bare = final_answer(str(one)) or str(one)
                assert grade(boxed, gold) and grade(boxed, one) and grade(box(bare), one), (
                    name,
                    one,
                )
                # spelt another way, so that it is the value that is compared and not the text
                if score(box(bare), "1")[0]:
                    assert grade(box("\\, " + bare.replace("\\frac", "\\dfrac")), one), (name, one)
    texts = {str(one) for rows in golds.values() for gold in rows for one in any_of(gold)}
    assert (
        sum(score(text if "\\boxed" in text else box(text), "1")[0] for text in texts)
        >= len(texts) - 2
    )


@pytest.mark.parametrize(
    "constant",
    ["0", "1", "2", "\\frac{1}{2}", "x", "A", "\\infty", "0=0", "1,2", "(0,1)", "\\{\\}", "x=x"],
)
def test_a_constant_answer_is_worth_its_share_only(constant):
    for name, golds in benchmark_golds().items():
        hits = sum(grade(box(constant), gold) for gold in golds)
        share = sum(
            not {constant, constant + ".0"}.isdisjoint(map(str, any_of(gold))) for gold in golds
        )
        assert hits <= max(share + 5, 0.06 * len(golds)), (name, hits)


def test_shuffled_golds_score_about_nothing():
    for name, golds in benchmark_golds().items():
        first = [str(any_of(gold)[0]).replace("\\boxed", "") for gold in golds]
        shuffled = random.Random(0).sample(first, len(first))
        right = sum(accuracy for _, accuracy in score_all([box(text) for text in shuffled], golds))
        assert right <= max(2, 0.03 * len(golds)), name


def test_golds_of_every_type():
    assert (
        grade(box("14"), 14)
        and grade(box("14"), 14.0)
        and grade(box("14.0"), 14)
        and grade(box("0.5"), 0.5)
    )
    assert not grade(box("15"), 14) and not grade(box("14.5"), 14) and not grade(box("0.33"), 1 / 3)
    assert (
        grade(box("2"), ["1", 2])
        and grade(box("2"), ("1", "2"))
        and grade(box("2"), ["1", ["3", 2.0]])
    )
    assert not grade(box("3"), ["1", 2]) and not grade(box("3"), [])
    for nothing in (None, "", " ", "$$", [], [None], ["", None]):
        assert (
            not grade(box(""), nothing)
            and not grade(box("None"), None)
            and not grade(box("nan"), float("nan"))
        )
    assert not grade(box("inf"), float("nan"))


# -- the box and the format reward


@pytest.mark.parametrize(
    "response, expected",
    [
        ("\\boxed{1}", "1"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\boxed {3}", "3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{4}}", "4"),
        ("\\boxed{ \\boxed{4}, 5}", " \\boxed{4}, 5"),
        ("\\\\boxed{5}", "5"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("}}\\boxed{1}}", "1"),
        ("{{\\boxed{1}", "1"),
        ("\\boxed{}", ""),
        ("\\boxed{1", None),
        ("\\boxed", None),
        ("", None),
        ("1", None),
        ("\\boxed 1", "1"),
        ("$\\boxed5$", "5"),
        ("\\boxed 12.5", "12.5"),
        ("\\boxed\\pi", "\\pi"),
        ("\\boxed A.", "A"),
        ("\\boxed{1} then \\boxed2", "2"),
        ("\\boxed\\frac12", None),
        ("\\boxed notation", None),
        ("\\boxed{1}, as I boxed it in \\boxed form", "1"),
        ("\\boxed{" * 2000 + "\\boxed{7}", "7"),
    ],
)
def test_final_answer(response, expected):
    assert final_answer(response) == expected


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("5", 1.0),
        ("\\frac{1}{2}", 1.0),
        ("x=5", 1.0),
        ("\\text{east}", 1.0),
        ("yes", 1.0),
        ("(1,2)", 1.0),
        ("", 0.0),
        (" ", 0.0),
        ("2+", 0.0),
        ("\\frac{1}", 0.0),
        ("\\foo\\bar{\\baz}", 0.0),
        ("(1,2", 0.0),
        ("*", 0.0),
        ("1 2 3", 0.0),
        ("\\left\\left", 0.0),
        ("_", 0.0),
    ],
)
def test_format_reward_is_a_closed_box_that_parses(answer, expected):
    assert score(box(answer), "12345") == (expected, 0.0)
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


def test_hostile_cases():
    for case in cases("hostile.jsonl"):
        started = time.monotonic()
        verdict = grade(case["response"], case["gold"])
        assert time.monotonic() - started < 10, case["id"]  # a hang; bench_reward.py measures
        acceptable = "acceptable" in case["note"] or case["expected"] == "either"
        assert verdict == case["expected"] or acceptable and not verdict, (case["id"], case["note"])
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


def calls_and_names(tree: ast.AST) -> tuple[set, set]:
    nodes = list(ast.walk(tree))
    called = {
        node.func.id
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return called, names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def test_source_uses_only_sympy_and_the_standard_library_and_no_parser_of_theirs():
    files = [ROOT / "reward.py", *sorted((ROOT / "grading").glob("*.py"))]
    assert len(files) > 5
    for path in files:
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        imports = {
            alias.name.split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        imports |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
        assert imports <= set(sys.stdlib_module_names) | {"sympy", "mpmath", "grading"}, path
        assert "sympy" not in imports or path.name == "sympy_process.py"
        called, names = calls_and_names(tree)
        assert not called & {"eval", "exec", "compile", "__import__"}, path
        assert not names & {
            "sympify",
            "parse_expr",
            "parse_latex",
            "S",
            "literal_eval",
            "pickle",
            "alarm",
            "SIGALRM",
            "ITIMER_REAL",
            "workdps",
            "workprec",
            "extradps",
            "extraprec",
        }, path
        forked = [node for node in nodes if getattr(node, "name", "") == "_answer"]
        in_fork = sum("setitimer" in calls_and_names(part)[1] for part in forked)
        assert path.read_text().count("setitimer") == in_fork  # nothing rings in our process


def test_the_precision_of_the_numbers_is_never_changed():
    """mpmath's sec, cot and csc would change it for the time of a call, for all threads."""
    from grading.value import mp

    precisions = set()
    watch = type(mp).prec.fget
    digits = watch(mp)
    rows = [row for kind in pairs().values() for row in kind]
    previous, type(mp).prec = (
        type(mp).prec,
        property(watch, lambda self, value: precisions.add(value)),
    )
    try:
        for gold, answer, _ in rows:
            grade(box(answer), gold)
    finally:
        type(mp).prec = previous
    assert not precisions and watch(mp) == digits


@pytest.mark.parametrize(
    "text",
    [
        "\x00",
        "\ud800",
        "\u202e42",
        "\\",
        "\\\\",
        "{" * 3_000_000,
        "}" * 3_000_000,
        "\\boxed{" * 400_000,
        "((((" * 50_000,
        "$" * 10**6,
        "1," * 9_000,
        "\\frac" * 4000,
        "\\left(" * 3000,
        "^" * 10_000,
        "!" * 10_000,
        "-" * 15_000,
        "1" + "!" * 5000,
        "x" + "^2" * 5000,
        "\\text{" * 3000,
        "|" * 9000,
        "\\begin{pmatrix}" * 1000,
        "\\sqrt" * 3000,
        "1+" * 900 + "1",
        "1/" * 900 + "1",
        "\\cup".join(["[0,1]"] * 300),
        "\\pm" * 500 + "1",
        "9" * 19_000,
        "9^9^9^9^9^9",
        "((9!)!)!",
        "1e999999999999",
        "10^{-10^{20}}",
        "\\sin(10^{40})",
        "\\binom{10^5}{5\\cdot10^4}",
        "\\sum_{k=1}^{9000}k^k",
        "\\sum_{i=1}^{99}\\sum_{j=1}^{99}\\sum_{k=1}^{99}\\sin(ijk)",
        "e^{e^{e^{20}}}",
        "(1+i)^{10^{12}}",
        "\\lfloor 10^{10^6}/7 \\rfloor",
        "0^0",
        "\\frac{0}{0}",
        "\\infty-\\infty",
        "\\tan\\frac{\\pi}{2}",
        "x_{" * 2000,
        "{x | " * 50,
        "1_2_3_4",
        "\\gcd(10^{30},10^{29}+1)",
        "1:2:3:4:5",
        "=" * 2000,
        "x" * 19_000,
    ],
)
def test_awkward_text_is_answered_at_once(text):
    for gold in ("1", "\\sqrt{2}", "x^2+1", "1,2", "(0,1)", text[:2000] + "1"):
        started = time.monotonic()
        grade(box(text), gold)
        score("\\boxed{" + text, gold)
        assert time.monotonic() - started < 10  # typically milliseconds, see bench_reward.py


def test_random_text_never_raises():
    rng = random.Random(0)
    pieces = [*"0123456789+-*/^_=<>()[]{}|,;:!'%&. xyzabnie\n$"]
    pieces += r"\frac \sqrt \text{ \left \right \pm \cup \in \{ \} \\ \sin \log".split()
    pieces += r"\begin{pmatrix} \end{pmatrix}".split()
    pieces += r"\infty \pi \circ \pmod \ldots \binom \sum_{k=1}^ \%".split()
    golds = [gold for kind in pairs().values() for gold, _, _ in kind]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 25)))
        gold = rng.choice(golds)
        cut = rng.randrange(len(gold))
        assert score(box(text), gold)[1] in (0.0, 1.0)
        grade(box(gold[:cut] + rng.choice(pieces) + gold[cut:]), gold)
        grade(box(gold), text)


def test_a_caller_at_the_edge_of_the_recursion_limit_gets_an_answer():
    def deep(levels: int) -> bool:
        return (
            deep(levels - 1)
            if levels
            else grade(box("\\sqrt{\\frac{1}{1+\\frac{1}{2}}}"), "\\sqrt{\\frac{2}{3}}")
        )

    used = len(__import__("inspect").stack())
    for margin in range(40, 200, 10):
        assert deep(sys.getrecursionlimit() - used - margin) in (True, False)


# -- the process that has sympy

SLOW = "\\int_0^{\\infty} \\frac{\\sin(x^3+x)}{e^{x^2}+\\cos x} dx"
NEEDS_SYMPY = [
    ("\\int_0^1 x^2 dx", "\\frac13"),
    ("\\lim_{x \\to 0} \\frac{\\sin x}{x}", "1"),
    ("\\sum_{k=1}^{1000000000} k", "500000000500000000"),
]


def test_limits_integrals_and_long_sums():
    for answer, gold in NEEDS_SYMPY:
        assert grade(box(answer), gold) and not grade(box(answer), gold + "1"), answer


def test_nothing_is_started_or_imported_for_simple_answers():
    program = (
        "import sys, reward\n"
        "rows = [('14', '14'), ('\\\\frac12', '0.5'), ('\\\\text{east}', 'east'), ('x+1', '1+x')]\n"
        "for a, g in rows:\n"
        "    assert reward.grade('\\\\boxed{' + a + '}', g)\n"
        "assert not {'sympy', 'torch', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_a_slow_answer_costs_its_clock():
    started = time.monotonic()
    assert not grade(box(SLOW), "2")
    assert time.monotonic() - started < 10


def test_what_is_too_slow_for_the_machine_is_wrong_and_does_not_hang(monkeypatch):
    monkeypatch.setattr(sympy_process, "PATIENCE", 0.01)
    assert sympy_process.ask(SLOW, ["2"]) is False
    monkeypatch.undo()
    assert sympy_process.ask("1", ["1"]) is True


def test_the_process_has_limits_on_memory_and_time():
    program = sympy_process._PROGRAM + (
        "import resource, signal\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[0])\n"
        "print(signal.getitimer(signal.ITIMER_PROF)[0] > 0)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], input='["1", ["1"]]', capture_output=True, text=True
    )
    assert process.stdout.split() == [f"True{sympy_process.MEMORY}", "True"]


def test_any_thread_and_several_graders_at_once():
    rows = [row for kind in pairs().values() for row in kind[:6]]
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda row: grade(box(row[1]), row[0]), rows * 2))
    assert verdicts == [row[2] for row in rows * 2]
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(grade(box(NEEDS_SYMPY[0][0]), NEEDS_SYMPY[0][1]))
    )
    thread.start()
    thread.join(60)
    assert verdicts == [True]
