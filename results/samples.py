"""Packs the numbers of every response of a run, without its text, into results/samples.jsonl.xz.

    python results/samples.py runs/edge-seed1 runs/gec-seed1 ...

One line a run: its name, and for each response trained on the step, the question, the kind of row
(see docs/runs.md), P, A and A^, to four digits. From these, tests/test_docs.py computes the table
"what EDA sees" once more.
"""

import json
import lzma
import statistics
import sys
from pathlib import Path

FILE = Path(__file__).parent / "samples.jsonl.xz"
COLUMNS = {"step": "step", "question": "question_number", "P": "entropy"}
COLUMNS |= {"A": "advantage", "A_hat": "advantage_eda"}


def kind(row: dict) -> str:
    if row.get("correction"):
        return row["correction"]
    return "right" if row["accuracy"] else "wrong"


def numbers(run: Path) -> dict:
    """The columns of one run."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    packed = {"name": run.name, "kind": [kind(row) for row in rows]}
    for column, key in COLUMNS.items():
        packed[column] = [float(f"{row[key]:.4g}") for row in rows]
    return packed


def what_eda_sees(packed: dict) -> dict[str, dict[int, tuple[float, float]]]:
    """kind -> step -> (mean P/mean, share of the step's sum of |A^|)."""
    groups: dict[tuple, list[float]] = {}
    for step, question, P in zip(packed["step"], packed["question"], packed["P"]):
        groups.setdefault((step, question), []).append(P)
    relative: dict[tuple, list[float]] = {}
    shares: dict[tuple, float] = {}
    totals: dict[int, float] = {}
    columns = (packed[name] for name in ("step", "question", "kind", "P", "A_hat"))
    for step, question, kind, P, A_hat in zip(*columns):
        mean = statistics.fmean(groups[step, question])
        relative.setdefault((kind, step), []).append(P / mean if mean else 1.0)
        shares[kind, step] = shares.get((kind, step), 0.0) + abs(A_hat)
        totals[step] = totals.get(step, 0.0) + abs(A_hat)
    sees: dict[str, dict[int, tuple[float, float]]] = {}
    for (kind, step), values in relative.items():
        share = shares[kind, step] / totals[step] if totals[step] else 0.0
        sees.setdefault(kind, {})[int(step)] = (statistics.fmean(values), share)
    return sees


if __name__ == "__main__":
    with lzma.open(FILE, "wt", encoding="utf-8") as lines:
        for run in sys.argv[1:]:
            lines.write(json.dumps(numbers(Path(run)), separators=(",", ":")) + "\n")
