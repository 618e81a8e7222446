"""Tables in Markdown, text that is safe to print, and the tables that eval.py prints."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

from report.paper import PROBLEMS, PUBLISHED


def group(items: Iterable, key: Callable) -> dict:
    """Group items into lists by their key, in the order in which the keys first occur."""
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None if there are no values. Of booleans it is the share of True."""
    values = list(values)
    if values:
        return statistics.fmean(values)
    return None


def average(metrics: list[dict], key: str) -> float | None:
    """Return the mean of one number of metrics.jsonl over the steps that know it."""
    return mean(step[key] for step in metrics if step.get(key) is not None)


HIDDEN = re.compile(  # control, bidirectional and invisible characters, and lone surrogates
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Write control and bidirectional characters as \x1b and the like; newlines and tabs stay.

    Everything that a model wrote passes through here before it is printed: an escape sequence
    would clear the screen, and a bidirectional override would reorder the line.
    """
    return HIDDEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def markdown(rows: list[dict[str, str]]) -> str:
    """Return a table of rows, each {column: cell}; a cell that a row lacks becomes –.

    Cells are padded for the screen: the first column to the left, the others to the right.
    """
    columns = dict.fromkeys(column for row in rows for column in row)
    lines = ["|"] * (len(rows) + 2)
    for position, column in enumerate(columns):
        cells = [column, "---", *[row.get(column, "–") for row in rows]]
        width = max(map(len, cells))
        if position == 0:
            cells[1] = "-" * width
            cells = [cell.ljust(width) for cell in cells]
        else:
            cells[1] = "-" * (width - 1) + ":"
            cells = [cell.rjust(width) for cell in cells]
        lines = [f"{line} {cell} |" for line, cell in zip(lines, cells)]
    return "\n".join(lines)


def number(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def percent_and_error(numbers: dict, digits: int = 1) -> str:
    """Write an accuracy in percent ± its standard error over problems."""
    return f"{percent(numbers['accuracy'], digits)} ± {percent(numbers['stderr'], digits)}"


def result_text(result: dict, published: str | None = None) -> str:
    """Write what eval.py found at one temperature. published names a row of the paper's table."""
    text = accuracy_table(result, published)
    if "entropy" in result:
        text += "\n\n" + entropy_text(result["entropy"])
    if "reflection" in result:
        text += "\n\n" + reflection_text(result["reflection"])
    return text


def accuracy_table(result: dict, published: str | None = None) -> str:
    """Make a table of accuracies in percent ± standard error over problems.

    The paper's average stands beside ours only if the problems are the paper's.
    """
    paper = PUBLISHED.get(published, {})
    problems = {}
    rows = []
    for task, numbers in (result["tasks"] | {"average": result["all"]}).items():
        row = {"benchmark": task, "problems": str(numbers["problems"])}
        row[f"avg@{numbers['n']}"] = percent_and_error(numbers, 2)
        if published and (task != "average" or problems == PROBLEMS):
            row[f"paper: {published}"] = number(paper.get(task), ".2f")
        problems[task] = numbers["problems"]
        for key, value in numbers.items():
            if "@" in key:  # pass@k and maj@n
                row[key] = percent(value)
        row["mean length"] = f"{numbers['mean_length']:.0f}"
        row["max length"] = str(numbers["max_length"])
        row["formatted"] = percent(numbers["format"])
        row["truncated"] = percent(numbers["truncated"])
        rows.append(row)
    return markdown(rows)


def entropy_text(found: dict) -> str:
    """Compare the entropies of right and of wrong responses (Figure 3)."""
    names = dict(overall="over all responses", within="within each question (P / its mean)")
    rows = []
    for key, name in names.items():
        row = {"entropy P": name}
        for column, value in (found.get(key) or {}).items():
            row[column.replace("_", " ")] = number(value)
        rows.append(row)
    return markdown(rows)


def reflection_text(found: dict) -> str:
    """Write how responses that reflect do, and what forced reflections fix (Figure 2)."""
    shares = {f"fixed by {phrase!r}": share for phrase, share in found["fixed"].items()}
    rows = []
    for key, value in (found | shares).items():
        if key != "fixed":
            rows.append({"reflection": key.replace("_", " "), "": number(value)})
    return markdown(rows)
