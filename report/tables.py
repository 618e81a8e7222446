"""Tables in Markdown, and what eval.py prints about one model with them."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from report.paper import PROBLEMS, PUBLISHED

MIN_COUNT = 20  # how often a token must be drawn to stand in the table of tokens


def group(items: Iterable, key: Callable) -> dict:
    """Lists of items by key, in the order in which the keys come first."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def mean(values: Iterable[float]) -> float | None:
    """None where there is nothing to average; of truth values it is the share that is true."""
    values = list(values)
    return statistics.fmean(values) if values else None


def short(task: str) -> str:
    """5-8 for tiny:5-8:test, which the legend names in full; the name of a file without its folders."""
    return (
        Path(task).stem.removeprefix("tiny:").removesuffix(":test").replace(":validation", " val.")
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose columns also line up on a screen: the first to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    aligned = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        for row in (header, *rows)
    ]
    rule = "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])])
    lines = [" | ".join(row) for row in aligned]
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def latex(header: list[str], rows: list[list[str]]) -> str:
    """The same for LaTeX, without packages."""

    def line(cells: list[str]) -> str:
        text = " & ".join(re.sub(r"([&%_#$])", r"\\\1", cell) for cell in cells)
        for sign, command in {
            "±": r"$\pm$",
            "×": r"$\times$",
            "–": "--",
            "Â": r"$\hat{A}$",
        }.items():
            text = text.replace(sign, command)
        return text + r" \\"

    return "\n".join(
        [
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\hline",
            line(header),
            r"\hline",
            *map(line, rows),
            r"\hline",
            r"\end{tabular}",
        ]
    )


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def report(result: dict, published: str | None = None) -> str:
    """The text of what eval.py found at one temperature; `published` is a row of the paper's table."""
    parts = [score_table(result, PUBLISHED.get(published), published)]
    if without := result.get("without_contaminated"):
        parts += [
            f"without the {len(without['removed'])} problems that also stand in the training set:",
            score_table(without) if "all" in without else "nothing is left",
        ]
    if "entropy" in result:
        parts.append(entropy_text(result["entropy"]))
    if "reflection" in result:
        parts += [reflection_text(result["reflection"])]
    return "\n\n".join(parts)


def score_table(result: dict, published: dict | None = None, name: str | None = None) -> str:
    """Accuracies in percent ± standard error over problems. The paper's average stands beside its own problems only."""
    everything = {task: s["problems"] for task, s in result["tasks"].items()} == PROBLEMS
    extra = [k for k in result["all"] if "@" in k]
    header = [
        "benchmark",
        "problems",
        f"avg@{result['all']['n']}",
        *([f"paper: {name}"] if published else []),
        *extra,
        "mean length",
        "max length",
        "formatted",
        "truncated",
    ]
    rows = []
    for task, s in [*result["tasks"].items(), ("average", result["all"])]:
        paper = (published or {}).get(task) if task != "average" or everything else None
        rows.append(
            [
                task,
                str(s["problems"]),
                f"{percent(s['accuracy'], 2)} ± {percent(s['stderr'], 2)}",
                *([f"{paper:.2f}" if paper is not None else "–"] if published else []),
                *(percent(s.get(k)) for k in extra),
                f"{s['mean_length']:.0f}",
                str(s["max_length"]),
                percent(s["format"]),
                percent(s["truncated"]),
            ]
        )
    return markdown(header, rows)


def entropy_text(found: dict) -> str:
    if not found:
        return "entropy: there is no response with a token in it"
    sides = [
        ("over all responses", found["overall"]),
        ("within each question (P / its mean)", found["within"]),
    ]
    rows = [
        [
            name,
            str(s["correct"]),
            str(s["wrong"]),
            *(number(s[k]) for k in ("mean_correct", "mean_wrong", "ratio")),
            percent(s["correct_above"]),
            percent(s["wrong_below"]),
        ]
        for name, s in sides
        if s
    ]
    table = markdown(
        [
            "entropy P",
            "correct",
            "wrong",
            "mean P correct",
            "mean P wrong",
            "wrong / correct",
            "% correct above average",
            "% wrong below average",
        ],
        rows,
    )
    return table + (
        "" if found["within"] else "\nwithin each question: needs at least two responses (--n)"
    )


def token_text(tokens: list[tuple[str, float, int]], top: int = 12) -> str:
    if not tokens:
        return f"tokens by entropy: none was drawn {MIN_COUNT} times or more"
    pairs = zip(tokens[:top], tokens[::-1][:top])
    return markdown(
        [
            f"highest entropy (count >= {MIN_COUNT})",
            "mean",
            "count",
            "lowest entropy",
            "mean",
            "count",
        ],
        [
            [repr(a), number(h), str(c), repr(b), number(g), str(d)]
            for (a, h, c), (b, g, d) in pairs
        ],
    )


def reflection_text(r: dict) -> str:
    text = (
        f"reflection: {r['reflecting']} of {r['responses']} responses ({percent(r['share_reflecting'])}%) contain "
        f"self-reflection, accuracy {percent(r['accuracy_reflecting'])}%; overall {percent(r['accuracy'])}%\n"
    )
    if not r["fixed"]:
        return text + "no response is wrong, so none was made to reflect"
    rows = [[repr(phrase), percent(x)] for phrase, x in r["fixed"].items()]
    rows.append(["average of the four", percent(r["mean_fixed"])])
    table = markdown([f"forced reflection on the {r['wrong']} wrong responses", "% fixed"], rows)
    return (
        f"{text}\n{table}\non average that adds {percent(r['gain'])} points to the overall accuracy"
    )
