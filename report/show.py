"""`python eval.py show RUN --step 17 --question 2` shows one group as a person reads it.

A group is the responses to one question of a step (samples.jsonl of a run), or to one problem of
an evaluation (responses.jsonl of a folder of eval.py). Text that GEC injected is set apart. The
HTML page also shades each token by its entropy.
"""

import html
import shutil
import textwrap
from itertools import groupby
from pathlib import Path

import data
from engine.folder import read_lines
from errors import UserError
from report.tables import mean, visible


def find_group(folder: Path, step: int | None, question: int) -> list[dict]:
    """Find the rows of question number `question` (from 1) of a step (default: the last).

    Raises UserError if there are none.
    """
    samples = folder / "samples.jsonl"
    if samples.exists():
        rows, _ = read_lines(samples)
        if not rows or "question" not in rows[0]:
            raise UserError(f"{samples}: holds no samples of this version; run it again")
        steps = rows[-1]["step"]
        step = steps if step is None else step
        found = [r for r in rows if r["step"] == step and r["question_number"] == question]
        questions = max(r["question_number"] for r in rows)
        wanted = (
            f"question {question} of step {step}; it has {steps} steps of {questions} questions"
        )
    elif (folder / "responses.jsonl").exists():
        records, _ = read_lines(folder / "responses.jsonl")
        records = [r for r in records if not r["phrase"]]  # not the forced reflections
        problems = list(dict.fromkeys((r["task"], r["problem"]) for r in records))
        asked = problems[question - 1 : question]
        found = [as_sample(r) for r in records if (r["task"], r["problem"]) in asked]
        wanted = f"problem {question}; it has {len(problems)}"
    else:
        raise UserError(
            f"{folder}: neither a run (samples.jsonl) nor results of eval.py (responses.jsonl)"
        )
    if not found:
        raise UserError(f"{folder}: holds no {wanted}")
    return found


def as_sample(record: dict) -> dict:
    """Make a row of samples.jsonl from a line of responses.jsonl, with its question if possible."""
    try:
        problem = data.load(record["task"])[record["problem"] - 1]
        question, answers = problem.question, list(problem.answers)
    except (UserError, IndexError):
        question, answers = "(its file is not here)", []
    return dict(
        record,
        source=f"{record['task']}:{record['problem']}",
        question=question,
        answers=answers,
        tokens=len(record["ids"]),
        segments=[[record["response"], False]],
    )


def title(rows: list[dict]) -> str:
    first = rows[0]
    gold = " or ".join(map(str, first["answers"])) or "unknown"
    text = f"{first['source']}, gold {gold}"
    if "step" in first:
        text = f"step {first['step']}, question {first['question_number']}: {text}"
    return visible(text)


def heading(number: int, row: dict, rows: list[dict]) -> str:
    """Write a response's accuracy, length, P, P/mean and A -> A^, and what GEC did to it."""
    parts = ["right" if row["accuracy"] else "wrong", f"{row['tokens']} tokens"]
    if "correction" in row:
        then = "right" if row["accuracy_corrected"] else "wrong"
        parts[0] += f", {row['correction']}: {then}"
        parts[1] = f"{row['tokens']} -> {row['tokens_corrected']} tokens"
    if row["entropy"] is not None:
        relative = row.get("relative_entropy")
        if "relative_entropy" not in row:  # an evaluation, or an older run
            average = mean(r["entropy"] for r in rows if r["entropy"] is not None)
            relative = row["entropy"] / average if average else None
        parts.append(f"P {row['entropy']:.3f}")
        parts.append("P/mean –" if relative is None else f"P/mean {relative:.2f}")
    if "advantage" in row:
        parts.append(f"A {row['advantage']:+.2f} -> {row['advantage_eda']:+.2f}")
    return f"{number}. " + ", ".join(parts)


def replaced(row: dict) -> bool:
    """Tell whether a correction kept nothing of the sampled response."""
    return "correction" in row and row["segments"][0][1]


def as_text(rows: list[dict], width: int | None = None, colour: bool = False) -> str:
    """Write the group in lines of `width` columns, injected text in colour or in [brackets]."""
    width = width or shutil.get_terminal_size().columns
    start, end = ("\x1b[35m", "\x1b[0m") if colour else ("[", "]")
    lines = [title(rows), *wrapped(visible(rows[0]["question"]), width, "  "), ""]
    for number, row in enumerate(rows, start=1):
        lines.append(heading(number, row, rows))
        if replaced(row):
            lines += wrapped(visible("(as sampled) " + row["response"]), width, "   ")
        text = ""
        for part, injected in row["segments"]:
            text += start + visible(part) + end if injected else visible(part)
        lines += wrapped(text, width, "   ")
    return "\n".join(lines)


def wrapped(text: str, width: int, indent: str) -> list[str]:
    """Wrap and indent the lines of a text; empty ones stay."""
    wrapper = textwrap.TextWrapper(
        max(width, 20), initial_indent=indent, subsequent_indent=indent, replace_whitespace=False
    )
    lines = []
    for paragraph in text.split("\n"):
        lines += wrapper.wrap(paragraph) or [indent]
    return lines


STYLE = """\
body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.2rem }
h2 { font-size: 1rem; margin: 1.6rem 0 .3rem }
pre { white-space: pre-wrap; font-size: 13px; background: #fafafa; padding: .6rem;
      border-radius: 4px; line-height: 1.9 }
.injected { outline: 1.5px solid #7b1fa2 }
.sampled { color: #777 }"""


def escaped(text: str) -> str:
    return html.escape(visible(text))


def as_page(rows: list[dict]) -> str:
    """Write the group as one self-contained HTML page. Raises UserError without --save-tokens."""
    known = [entropy for row in rows for entropy in row.get("token_entropies", ())]
    if not known:
        raise UserError(
            "these samples do not hold their tokens, which the page shades: run with --save-tokens"
        )
    highest = max(known) or 1.0
    name = escaped(title(rows))
    body = [
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<p>{escaped(rows[0]['question'])}</p>",
        f"<p>Shade: entropy of each token, white 0, darkest {highest:.2f} nats; outlined: injected "
        "by GEC; hover for numbers.</p>",
    ]
    for number, row in enumerate(rows, start=1):
        body.append(f"<h2>{escaped(heading(number, row, rows))}</h2>")
        if replaced(row):
            body.append(f"<pre class=sampled>{escaped('as sampled: ' + row['response'])}</pre>")
        body.append(f"<pre>{shaded(row, highest)}</pre>")
    return "\n".join(body) + "\n"


def shaded(row: dict, highest: float) -> str:
    """Write a response's tokens as HTML, coloured by entropy, injected ones outlined together."""
    keys = ("token_injected", "token_texts", "token_entropies", "token_logp")
    page = ""
    for injected, tokens in groupby(zip(*map(row.get, keys)), key=lambda token: token[0]):
        spans = ""
        for _, text, entropy, logp in tokens:
            spans += (
                f'<span style="background:rgba(230,97,0,{0.85 * entropy / highest:.2f})" '
                f'title="entropy {entropy:.3f}, log-probability {logp:.3f}">'
                f"{escaped(text)}</span>"
            )
        page += f"<span class=injected>{spans}</span>" if injected else spans
    return page
