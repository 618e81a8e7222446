"""This file makes tables in Markdown, makes text safe to print, and writes what eval.py found."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from report.paper import PROBLEMS, PUBLISHED


def group(items: Iterable, key: Callable) -> dict:
    """Group items into lists by their key, in the order in which the keys first occur."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None of nothing. The mean of booleans is the share that is true."""
    values = list(values)
    return statistics.fmean(values) if values else None


HIDDEN = re.compile(  # control, bidirectional, invisible characters and halves of others
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Write control and bidirectional characters as \x1b and the like; newlines and tabs stay.

    Everything that a model wrote passes through here before it is printed: an escape sequence
    would clear the screen, and a bidirectional override would reorder the line.
    """
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def short(task: str) -> str:
    """Shorten a task for the head of a column: tiny:5-8:test is 5-8, a file has no folders."""
    name = Path(task).stem.removeprefix("tiny:").removesuffix(":test")
    return name.replace(":validation", " val.")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """Align a table for the screen, too: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0]]
    rule += ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = []
    for first, *others in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def result_text(result: dict, published: str | None = None) -> str:
    """Write what eval.py found at one temperature. published names a row of the paper's table."""
    parts = [accuracy_table(result, published)]
    if "entropy" in result:
        parts.append(entropy_text(result["entropy"]))
    if "reflection" in result:
        parts.append(reflection_text(result["reflection"]))
    return "\n\n".join(parts)


def accuracy_table(result: dict, published: str | None = None) -> str:
    """Make a table of accuracies in percent ± standard error over problems.

    The paper's average stands beside ours only if the problems are the paper's.
    """
    paper = PUBLISHED.get(published)
    problems = {}
    rows = []
    extra = [key for key in result["all"] if "@" in key]
    for task, numbers in [*result["tasks"].items(), ("average", result["all"])]:
        accuracy = f"{percent(numbers['accuracy'], 2)} ± {percent(numbers['stderr'], 2)}"
        row = [task, str(numbers["problems"]), accuracy]
        if paper and (task != "average" or problems == PROBLEMS):
            row.append(number(paper.get(task), 2))
        elif paper:
            row.append("–")
        row += [percent(numbers.get(key)) for key in extra]
        row += [f"{numbers['mean_length']:.0f}", str(numbers["max_length"])]
        rows.append([*row, percent(numbers["format"]), percent(numbers["truncated"])])
        problems[task] = numbers["problems"]
    header = ["benchmark", "problems", f"avg@{result['all']['n']}"]
    if paper:
        header.append(f"paper: {published}")
    header += [*extra, "mean length", "max length", "formatted", "truncated"]
    return markdown(header, rows)


def entropy_text(found: dict) -> str:
    """Compare the entropies of correct and of wrong responses (Figure 3)."""
    if not found:
        return "entropy: there is no response with a token in it"
    names = dict(overall="over all responses", within="within each question (P / its mean)")
    rows = []
    for key, name in names.items():
        side = found[key]
        if side:
            row = [name, str(side["correct"]), str(side["wrong"])]
            row += [number(side[key]) for key in ("mean_correct", "mean_wrong", "ratio")]
            rows.append([*row, percent(side["correct_above"]), percent(side["wrong_below"])])
    header = ["entropy P", "correct", "wrong", "mean P correct", "mean P wrong", "wrong / correct"]
    header += ["% correct above average", "% wrong below average"]
    text = markdown(header, rows)
    if not found["within"]:
        text += "\nwithin each question: needs at least two responses (--n)"
    return text


def reflection_text(found: dict) -> str:
    """Write the accuracy of responses that reflect, and what forced reflections fix (Figure 2)."""
    text = (
        f"reflection: {found['reflecting']} of {found['responses']} responses "
        f"({percent(found['share_reflecting'])}%) contain self-reflection, accuracy "
        f"{percent(found['accuracy_reflecting'])}%; overall {percent(found['accuracy'])}%\n"
    )
    if not found["fixed"]:
        return text + "no response is wrong, so none was made to reflect"
    rows = [[repr(phrase), percent(share)] for phrase, share in found["fixed"].items()]
    rows.append(["average of the four", percent(found["mean_fixed"])])
    table = markdown(
        [f"forced reflection on the {found['wrong']} wrong responses", "% fixed"], rows
    )
    gain = percent(found["gain"])
    return f"{text}\n{table}\non average that adds {gain} points to the overall accuracy"
