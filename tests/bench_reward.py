"""How accurate and how fast the grader is, and what can be had from it without solving anything.

Prints, for the labelled cases in ../shared and the table of answers.txt, the counts, the accuracy
and the latency; for the real golds, what a quoted expression of the problem is worth (echo); and
what random tokens raise.

    python tests/bench_reward.py [--fuzz 200000]
"""

import argparse
import re
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from helpers import json_lines  # noqa: E402
from test_grading import fuzz  # noqa: E402
from test_reward import SHARED, benchmarks, box, pairs  # noqa: E402

import reward  # noqa: E402


def measure(name: str, cases: list[tuple[str, object, bool]]) -> None:
    """cases: (response, gold, expected)."""
    right, seconds = {True: [], False: []}, []
    for response, gold, expected in cases:
        started = time.perf_counter()
        verdict = reward.grade(response, gold)
        seconds.append(time.perf_counter() - started)
        right[expected].append(verdict == expected)
    seconds.sort()
    shares = ""
    for label, hits in (("equal", right[True]), ("different", right[False])):
        share = sum(hits) / max(len(hits), 1)
        shares += f"{label} {sum(hits)}/{len(hits)} right ({share:.1%})   "
    median, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
    print(
        f"{name:8} {shares}median {median * 1e3:.3f} ms   p99 {p99 * 1e3:.1f} ms   "
        f"slowest {seconds[-1] * 1e3:.0f} ms"
    )


def shared_cases(name: str) -> list[tuple[str, object, bool]]:
    rows = []
    for row in json_lines(SHARED / "graders" / name):
        if row["expected"] != "either":
            rows.append((row["response"], row["gold"], row["expected"]))
    return rows


def quoted(question: str) -> list[str]:
    """The formulas of a problem that are longer than a number or a name, and their sides."""
    found = re.findall(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", question, re.DOTALL)
    formulas = ["".join(groups).strip(" .,\n") for groups in found]
    sides = [side.strip() for formula in formulas for side in formula.split("=")]
    return [
        text
        for text in dict.fromkeys(formulas + sides)
        if len(text) < 300 and not re.fullmatch(r"-?[\d.,]*|\\?[a-zA-Z]+(_.)?", text)
    ]


def echo(name: str, problems: list) -> None:
    """On how many problems a formula of the question, boxed as it stands, is right."""
    right = 0
    for p in problems:
        right += any(reward.grade(box(text), p.answers) for text in quoted(p.question))
    print(f"{name:20} {len(problems):5} problems: a quoted formula is right on {right}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--fuzz", type=int, default=200_000, metavar="N", help="random strings to try"
    )
    flags = parser.parse_args()
    measure(
        "table",
        [(box(answer), gold, equal) for kind in pairs().values() for gold, answer, equal in kind],
    )
    if SHARED.exists():
        for path in sorted((SHARED / "graders").glob("*.jsonl")):
            measure(path.stem, shared_cases(path.name))
        for name, problems in benchmarks().items():
            measure(name, [(box(p.answers[0]), list(p.answers), True) for p in problems])
        for name, problems in benchmarks().items():
            echo(name, problems)
    measure("integers", [(box(k % 7), k % 5, k % 7 == k % 5) for k in range(10_000)])
    started = time.perf_counter()
    raised = fuzz(flags.fuzz, seed=0)
    print(
        f"{flags.fuzz} random strings: {len(raised)} raised, {time.perf_counter() - started:.0f} s",
        *raised[:5],
    )


if __name__ == "__main__":
    main()
