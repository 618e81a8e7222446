"""Prints the tables of results/README.md from the packed runs.

    python results/tables.py            # every table, and all runs by seed
    python results/tables.py --write    # put them into README.md, below each <!-- table NAME -->

Accuracies come from the packed counts of right responses per problem. tests/test_results.py holds
the README against what is printed here.
"""

import json
import lzma
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE / "README.md"
HARD, EASY = "tiny:5-8:test", "tiny:1-3:test"
COLUMNS = [(HARD, 1), (HARD, 8), (EASY, 1)]  # task, responses per problem
METHODS = [  # (label, run)
    ("SFT", "sft"),
    ("GRPO", "grpo"),
    ("GRPO + EDA", "grpo-eda"),
    ("GEC only (no EDA)", "gec"),
    ("Force-R", "force-r"),
    ("Force-R & EDA", "force-r-eda"),
    ("EDGE-GRPO", "edge"),
    ("DAPO", "dapo"),
    ("A = −1 in all-wrong groups", "nsr"),
    ("SFT, then GRPO", "sft-grpo"),
]
CONTROLS = [
    ("EDGE-GRPO", "edge"),
    ("GEC only (`--no-eda`)", "gec"),
    ("no EDA, references × 5 (`--correction-factors 1 1 5`)", "gec-ref5"),
    ("no EDA, references × 20", "gec-ref20"),
    ("EDA on all rows but references (`--eda-rows not-reference`)", "edge-not-ref"),
    ("EDA on references alone (`--eda-rows reference`)", "edge-ref"),
    ("EDA on right rows (`--eda-rows right`)", "edge-right"),
    ("EDA on wrong rows (`--eda-rows wrong`)", "edge-wrong"),
    ("references in place of answers (`--guided-probs .5 0 .5`)", "edge-no-answers"),
    ("the same, no EDA", "gec-no-answers"),
    ("reflections in place of answers (`--guided-probs .75 0 .25`)", "edge-reflect"),
    ("the same, no EDA ", "gec-reflect"),
    ("the same, no EDA, references × 5", "gec-reflect-ref5"),
    ("the same, no EDA, references × 20", "gec-reflect-ref20"),
    ("Force-R & EDA", "force-r-eda"),
    ("Force-R", "force-r"),
    ("Force-R, right responses by steps × 9", "force-r-by-steps-9"),
    ("Force-R, all right responses × 9", "force-r-right-9"),
    ("Force-R & EDA, P shuffled within a group", "force-r-eda-shuffled"),
]
CURES = [
    ("GRPO", "grpo"),
    ("GRPO, a random reward", "random"),
    ("DAPO", "dapo"),
    ("A = −1 in all-wrong groups", "nsr"),
    ("A = ∓.33 in equal groups", "const.33"),
    ("RL-ZVP, .5", "zvp.5"),
    ("MaxRL", "maxrl"),
    ("EDGE-GRPO", "edge"),
    ("EDGE-GRPO in all-wrong groups only", "edge-all-wrong"),
    ("GEC, references for answers, fading out, no EDA", "gec-decay"),
    ("GEC from a sibling", "sibling-3e-4"),
    ("hint: an untrained prefix", "hint-3e-4"),
    ("one reference in all-wrong groups", "imitate-neg"),
    ("the same, A > 0 only", "imitate"),
    ("GRPO + SFT in one loss", "joint-9-3e-4"),
    ("SFT", "sft"),
    ("SFT of 200 steps", "sft-200"),
    ("SFT, then GRPO", "sft-grpo"),
    ("SFT, then GRPO on other problems", "sft-grpo-fresh"),
    ("SFT, then GRPO + SFT", "sft-joint-9-3e-4"),
]
BATCHES = [  # 64 responses a step, but for one question: 8
    ("EDGE-GRPO, 8 × 8", "edge"),
    ("EDGE-GRPO, 16 × 4 (`--guided-probs 0 .5 .5`)", "edge-G4"),
    ("EDGE-GRPO, 16 × 4", "edge-G4-half"),
    ("EDGE-GRPO, 4 × 16 (`--guided-probs .75 .125 .125`)", "edge-G16"),
    ("EDGE-GRPO, 1 × 8, 800 steps, 1e-4", "edge-Q1"),
    ("GRPO, 8 × 8", "grpo"),
    ("GRPO, 1 × 8, 800 steps, 3e-5", "grpo-Q1"),
]
FORMS = [
    ("GRPO + EDA, seed 1", "grpo-eda-seed1"),
    ("Force-R & EDA, seed 1", "force-r-eda-seed1"),
    ("Force-R & EDA, seed 2", "force-r-eda-seed2"),
    ("EDGE-GRPO, seed 1", "edge-seed1"),
]
RATES = {  # label -> learning rate -> run
    "SFT": {"3e-4": "sft", "1e-3": "sft-1e-3"},
    "GRPO": {"3e-5": "grpo-3e-5", "1e-4": "grpo"},
    "GRPO + EDA": {"3e-4": "grpo-eda", "1e-3": "grpo-eda-1e-3"},
    "Force-R & EDA": {"3e-4": "force-r-eda", "1e-3": "force-r-eda-1e-3"},
    "EDGE-GRPO": {"1e-4": "edge-1e-4", "3e-4": "edge", "1e-3": "edge-1e-3"},
    "no EDA, references × 5": {"1e-4": "gec-ref5-1e-4", "3e-4": "gec-ref5"},
    "no EDA, references × 20": {
        "1e-4": "gec-ref20-1e-4",
        "3e-4": "gec-ref20",
        "1e-3": "gec-ref20-1e-3",
    },
    "DAPO": {"3e-5": "dapo-3e-5", "1e-4": "dapo"},
    "A = −1 in all-wrong groups": {"3e-5": "nsr-3e-5", "1e-4": "nsr"},
    "SFT, then GRPO": {"1e-5": "sft-grpo-1e-5", "3e-5": "sft-grpo"},
}
GUESS = 30  # tokens: a bare guess has 10, with a reflection and another guess 26
KINDS = ("right", "wrong", "reflect", "answer", "reference")
Runs = dict[str, dict[int, dict]]  # run -> seed -> what is packed


def load(file: Path) -> Runs:
    runs: Runs = {}
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            packed = json.loads(line)
            name, seed = packed["name"].rsplit("-seed", 1)
            runs.setdefault(name, {})[int(seed)] = packed
    return {name: dict(sorted(seeds.items())) for name, seeds in runs.items()}


def accuracy(packed: dict, task: str, n: int) -> float:
    """Percent of right responses."""
    for summary in packed["summaries"]:
        if summary["n"] == n:
            for result in summary["results"].values():
                right = result["tasks"][task]["right"]
                return 100 * sum(right) / (n * len(right))
    raise KeyError((packed["name"], task, n))


def mean_and_std(values: list[float], digits: int = 1) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    return text


def paired(seeds: dict[int, dict], baseline: dict[int, dict], task: str, n: int) -> str:
    """Mean difference over common seeds ± its standard error, and t."""
    differences = []
    for seed in seeds.keys() & baseline.keys():
        differences.append(accuracy(seeds[seed], task, n) - accuracy(baseline[seed], task, n))
    if len(differences) < 3 or not any(differences):
        return "–"
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.1f} ± {error:.1f} ({mean / error:.1f})"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracies(runs: Runs, labels: list[tuple[str, str]], baseline: str) -> str:
    """One row a method: accuracies, paired differences to the baseline, tokens and seconds."""
    rows = []
    for label, name in labels:
        if name not in runs:
            continue
        seeds = runs[name]
        row = [label, str(len(seeds))]
        for task, n in COLUMNS:
            values = [accuracy(packed, task, n) for packed in seeds.values()]
            row.append(mean_and_std(values))
        row.append(paired(seeds, runs[baseline], HARD, 8))
        tokens = [sum(packed["metrics"]["sampled_tokens"]) / 1000 for packed in seeds.values()]
        seconds = [packed["config"]["cpu_seconds"] for packed in seeds.values()]
        row += [f"{statistics.fmean(tokens):.0f}", f"{statistics.fmean(seconds):.0f}"]
        rows.append(row)
    header = ["", "seeds", "hard, greedy", "hard, avg@8", "easy, greedy"]
    header += [f"avg@8 − {baseline} (t)", "k tokens", "CPU s"]
    return markdown(header, rows)


def mean_of(packed: dict, key: str, steps: slice) -> float | None:
    values = [v for v in packed["metrics"].get(key, [])[steps] if v is not None]
    return statistics.fmean(values) if values else None


def what_eda_sees(runs: Runs) -> str:
    """P/mean and share of |A^| by kind of row, in the first and the last ten steps."""
    rows = []
    for label, name in CONTROLS:
        if name not in ("edge", "gec", "edge-no-answers"):
            continue
        for when, steps in (("first 10", slice(10)), ("last 10", slice(-10, None))):
            row = [label.split(" (")[0], when]
            for kind in KINDS:
                cell = []
                for key in (f"relative_entropy_{kind}", f"advantage_share_{kind}"):
                    values = [mean_of(packed, key, steps) for packed in runs[name].values()]
                    known = [v for v in values if v is not None]
                    if known:
                        cell.append(f"{statistics.fmean(known):.2f}")
                row.append(", ".join(cell) if len(cell) == 2 else "–")
            rows.append(row)
    return markdown(["P/mean, share of Σ\\|Â\\|", "steps", *KINDS], rows)


def groups(runs: Runs, labels: list[tuple[str, str]]) -> str:
    """Mixed groups and variances of advantages: means over steps, but medians of the ratio."""
    rows = []
    for label, name in labels:
        columns = {}
        for seed in runs.get(name, {}).values():
            metrics = seed["metrics"]
            if "mixed_groups" in metrics and metrics["mixed_groups"][0] is not None:
                for key in ("mixed_groups", "mixed_groups_corrected", "entropy_sampled"):
                    columns.setdefault(key, []).append(statistics.fmean(metrics[key]))
                ratios = []
                variances = zip(metrics["advantage_variance"], metrics["advantage_variance_eda"])
                for before, after in variances:
                    if before:
                        ratios.append(after / before)
                columns.setdefault("ratio", []).append(statistics.median(ratios))
                for key, step in (("first", 0), ("last", -1)):
                    columns.setdefault(key, []).append(metrics["entropy_sampled"][step])
        if columns:
            mean = {key: statistics.fmean(values) for key, values in columns.items()}
            rows.append(
                [
                    label,
                    f"{mean['mixed_groups']:.2f} → {mean['mixed_groups_corrected']:.2f}",
                    f"{mean['ratio']:.1f}",
                    f"{mean['first']:.2f} → {mean['last']:.2f}",
                ]
            )
    header = ["", "mixed groups, sampled → corrected", "variance × by EDA, median step"]
    return markdown([*header, "P as sampled, first → last step"], rows)


def rates(runs: Runs) -> str:
    """avg@8 on hard problems by learning rate; the number of seeds in brackets."""
    header = ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3"]
    rows = []
    for label, by_rate in RATES.items():
        row = [label]
        for rate in header:
            seeds = runs.get(by_rate.get(rate, ""), {})
            values = [accuracy(packed, HARD, 8) for packed in seeds.values()]
            row.append(f"{mean_and_std(values)} ({len(values)})" if values else "")
        rows.append(row)
    return markdown(["", *header], rows)


def guesses_and_steps() -> str:
    """What EDA does to a bare guess and to a response that works step by step: P/mean and share of
    the sum of |A| and of |A^|. First 20 steps, responses whose advantage is not 0."""
    with lzma.open(HERE / "samples.json.xz", "rt") as file:
        packed = json.load(file)
    rows = []
    for label, run in FORMS:
        samples = packed[run]
        entropies: dict[tuple, list[float]] = {}
        for step, question, P in zip(samples["step"], samples["question"], samples["P"]):
            entropies.setdefault((step, question), []).append(P)
        seen: dict[tuple, list[tuple]] = {}
        columns = ("step", "question", "tokens", "P", "A", "A_hat")
        for step, question, tokens, P, A, A_hat in zip(*map(samples.get, columns)):
            if step <= 20 and A:
                relative = P / statistics.fmean(entropies[step, question])
                kind = (A > 0, tokens > GUESS)
                seen.setdefault(kind, []).append((relative, abs(A), abs(A_hat)))
        sums = [0.0, 0.0]
        for values in seen.values():
            sums[0] += sum(A for _, A, _ in values)
            sums[1] += sum(A_hat for _, _, A_hat in values)
        row = [label]
        for kind in ((True, False), (True, True), (False, False), (False, True)):
            relative, A, A_hat = map(list, zip(*seen[kind]))
            shares = f"{sum(A) / sums[0]:.2f} → {sum(A_hat) / sums[1]:.2f}"
            row.append(f"{statistics.fmean(relative):.2f}, {shares}")
        rows.append(row)
    header = ["P/mean, share of Σ\\|A\\| → Σ\\|Â\\|", "right, guess", "right, steps"]
    return markdown([*header, "wrong, guess", "wrong, steps"], rows)


def by_seed(runs: Runs) -> str:
    rows = []
    for name in sorted(runs):
        values = [f"{accuracy(packed, HARD, 8):.1f}" for packed in runs[name].values()]
        rows.append([f"`{name}`", " ".join(values)])
    return markdown(["run", "hard, avg@8, seeds 1, 2, …"], rows)


def tables() -> dict[str, str]:
    runs = load(HERE / "tiny.jsonl.xz")
    return {
        "methods": accuracies(runs, METHODS, "grpo"),
        "groups": groups(runs, METHODS[:7]),
        "controls": accuracies(runs, CONTROLS, "edge"),
        "sees": what_eda_sees(runs),
        "form": guesses_and_steps(),
        "batches": accuracies(runs, BATCHES, "edge"),
        "rates": rates(runs),
        "cures": accuracies(runs, CURES, "edge"),
    }


def put_in(text: str, made: dict[str, str]) -> str:
    """The README with each table below its marker."""
    for name, table in made.items():
        pattern = rf"(<!-- table {name} -->\n)(\|.*\n)*"
        text = re.sub(pattern, lambda found: found[1] + table + "\n", text)
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(put_in(README.read_text(), tables()))
    else:
        made = tables() | {"seeds": by_seed(load(HERE / "tiny.jsonl.xz"))}
        print("\n\n".join(f"## {name}\n\n{table}" for name, table in made.items()))
