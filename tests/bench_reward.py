"""How accurate and how fast the grader is: prints, for the public regression cases and the hostile cases in ../shared
and for the table of test_reward.py, the counts, the accuracy and the latency.

    python tests/bench_reward.py
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import reward  # noqa: E402
from test_reward import SHARED, box, pairs  # noqa: E402


def measure(name: str, cases: list[tuple[str, object, bool]]) -> None:
    """cases: (response, gold, expected)."""
    right, seconds = {True: [], False: []}, []
    for response, gold, expected in cases:
        started = time.perf_counter()
        verdict = reward.grade(response, gold)
        seconds.append(time.perf_counter() - started)
        right[expected].append(verdict == expected)
    seconds.sort()
    shares = "   ".join(f"{label} {sum(hits)}/{len(hits)} right ({sum(hits) / len(hits):.1%})"
                        for label, hits in (("equal", right[True]), ("different", right[False])))
    median, p99 = seconds[len(seconds) // 2], seconds[int(len(seconds) * 0.99)]
    print(f"{name:8} {shares}   median {median * 1e3:.3f} ms   p99 {p99 * 1e3:.1f} ms   "
          f"slowest {seconds[-1] * 1e3:.0f} ms")


def shared_cases(name: str) -> list[tuple[str, object, bool]]:
    rows = [json.loads(line) for line in (SHARED / "graders" / name).read_text().splitlines()]
    return [(row["response"], row["gold"], row["expected"]) for row in rows if row["expected"] != "either"]


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    measure("table", [(box(answer), gold, equal) for kind in pairs().values() for gold, answer, equal in kind])
    if SHARED.exists():
        measure("dev", shared_cases("dev.jsonl"))
        measure("hostile", shared_cases("hostile.jsonl"))
    integers = [(box(k % 7), k % 5, k % 7 == k % 5) for k in range(10_000)]
    measure("integers", integers)


if __name__ == "__main__":
    main()
