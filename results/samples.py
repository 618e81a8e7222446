"""Packs the numbers of every response of a run, without its text, into results/samples.json.xz.

    python results/samples.py runs/edge-seed1 runs/gec-seed1 ...

For each run, and each response trained on: the step, the question, the kind of row
(see docs/runs.md), its tokens, and P, A and A^ to four digits. From these, tests/test_docs.py
computes the table "what EDA sees" once more, and tables.py the one of guesses and steps.
"""

import json
import lzma
import statistics
import sys
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).parent / "samples.json.xz"
COLUMNS = {  # the name here -> the key in samples.jsonl
    "step": "step",
    "question": "question_number",
    "P": "entropy",
    "A": "advantage",
    "A_hat": "advantage_eda",
}


def kind_of(row: dict) -> str:
    if row.get("correction"):
        return row["correction"]
    if row["accuracy"]:
        return "right"
    return "wrong"


def pack(run: Path) -> dict:
    """The columns of one run."""
    columns = {"kind": [], "tokens": []}
    for name in COLUMNS:
        columns[name] = []
    for line in (run / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        columns["kind"].append(kind_of(row))
        for name, key in COLUMNS.items():
            columns[name].append(float(f"{row[key]:.4g}"))
        columns["tokens"].append(row.get("tokens_corrected", row["tokens"]))
    return columns


def what_eda_sees(packed: dict) -> dict[tuple[str, int], tuple[float, float]]:
    """(kind, step) -> (mean of P / mean P of the group, share of the step's sum of |A^|)."""
    group_entropies = defaultdict(list)
    step_sum = defaultdict(float)
    for step, question, P, A_hat in zip(
        packed["step"], packed["question"], packed["P"], packed["A_hat"]
    ):
        group_entropies[step, question].append(P)
        step_sum[step] += abs(A_hat)
    relative = defaultdict(list)
    kind_sum = defaultdict(float)
    for step, question, kind, P, A_hat in zip(
        packed["step"], packed["question"], packed["kind"], packed["P"], packed["A_hat"]
    ):
        mean = statistics.fmean(group_entropies[step, question])
        relative[kind, step].append(P / mean if mean else 1.0)
        kind_sum[kind, step] += abs(A_hat)
    sees = {}
    for (kind, step), values in relative.items():
        share = 0.0
        if step_sum[step]:
            share = kind_sum[kind, step] / step_sum[step]
        sees[kind, int(step)] = statistics.fmean(values), share
    return sees


if __name__ == "__main__":
    packed = {Path(run).name: pack(Path(run)) for run in sys.argv[1:]}
    with lzma.open(FILE, "wt", encoding="utf-8") as file:
        json.dump(packed, file, separators=(",", ":"))
