"""One group as a person reads it: `python eval.py show RUN --step 17 --question 2`, on the terminal or as a page.

A group is the responses to one question of a step (samples.jsonl of a run), or to one problem of an evaluation
(responses.jsonl of a folder of eval.py). What GEC injected is set apart; the page shades each token by its entropy.
"""

import html
import shutil
import textwrap
from itertools import groupby
from pathlib import Path

import data
from engine.folder import read_lines
from errors import UserError
from report.tables import mean


def find_group(folder: Path, step: int | None, question: int) -> list[dict]:
    """The rows of question number `question` (from 1) of a step (default: the last). UserError if there are none."""
    if (folder / "samples.jsonl").exists():
        rows, _ = read_lines(folder / "samples.jsonl")
        if not rows or "question" not in rows[0]:
            raise UserError(
                f"{folder / 'samples.jsonl'}: holds no samples of this version; run it again"
            )
        step = rows[-1]["step"] if step is None else step
        found = [r for r in rows if r["step"] == step and r["question_number"] == question]
        what = (
            f"question {question} of step {step}; it has {rows[-1]['step']} steps of "
            f"{max(r['question_number'] for r in rows)} questions"
        )
    elif (folder / "responses.jsonl").exists():
        rows = [as_sample(r) for r in read_lines(folder / "responses.jsonl")[0] if not r["phrase"]]
        numbers = {
            source: i for i, source in enumerate(dict.fromkeys(r["source"] for r in rows), start=1)
        }
        found = [r for r in rows if numbers[r["source"]] == question]
        what = f"problem {question}; it has {len(numbers)}"
    else:
        raise UserError(
            f"{folder}: neither a run (samples.jsonl) nor results of eval.py (responses.jsonl)"
        )
    if not found:
        raise UserError(f"{folder}: holds no {what}")
    return found


def as_sample(record: dict) -> dict:
    """A line of responses.jsonl as a row of samples.jsonl; its question is looked up, if it can be."""
    source = f"{record['task']}:{record['problem']}"
    try:
        problem = data.load(record["task"])[record["problem"] - 1]
        question, answers = problem.question, list(problem.answers)
    except (UserError, IndexError):
        question, answers = "(its file is not here)", []
    return dict(
        source=source,
        question=question,
        answers=answers,
        response=record["response"],
        accuracy=record["accuracy"],
        tokens=len(record["ids"]),
        entropy=record["entropy"],
        segments=[[record["response"], False]],
    )


def title(rows: list[dict]) -> str:
    first = rows[0]
    where = (
        f"step {first['step']}, question {first['question_number']}: " if "step" in first else ""
    )
    return f"{where}{first['source']}, gold {' or '.join(map(str, first['answers'])) or 'unknown'}"


def heading(number: int, row: dict, rows: list[dict]) -> str:
    """Accuracy, length, P, relative entropy, A -> A^, and what GEC did."""
    parts = ["right" if row["accuracy"] else "wrong", f"{row['tokens']} tokens"]
    if "correction" in row:
        parts = [
            f"{parts[0]}, {row['correction']}: {'right' if row['accuracy_corrected'] else 'wrong'}",
            f"{row['tokens']} -> {row['tokens_corrected']} tokens",
        ]
    if row["entropy"] is not None:
        average = mean(r["entropy"] for r in rows)
        parts += [
            f"P {row['entropy']:.3f}",
            f"P/mean {row['entropy'] / average:.2f}" if average else "P/mean –",
        ]
    if "advantage" in row:
        parts.append(f"A {row['advantage']:+.2f} -> {row['advantage_eda']:+.2f}")
    return f"{number}. " + ", ".join(parts)


def as_text(rows: list[dict], width: int | None = None, colour: bool = False) -> str:
    """The group in lines of at most `width` columns; injected text in colour, or else in [brackets]."""
    width = width or shutil.get_terminal_size().columns
    start, end = ("\x1b[35m", "\x1b[0m") if colour else ("[", "]")
    lines = [title(rows), *wrapped(rows[0]["question"], width, "  "), ""]
    for number, row in enumerate(rows, start=1):
        lines.append(heading(number, row, rows))
        if "correction" in row and row["segments"][0][1]:  # nothing of the response was kept
            lines += wrapped("(as sampled) " + row["response"], width, "   ")
        text = "".join(
            start + part + end if injected else part for part, injected in row["segments"]
        )
        lines += wrapped(text, width, "   ")
    return "\n".join(lines)


def wrapped(text: str, width: int, indent: str) -> list[str]:
    return [
        line
        for paragraph in text.split("\n")
        for line in textwrap.wrap(
            paragraph,
            max(width, 20),
            initial_indent=indent,
            subsequent_indent=indent,
            replace_whitespace=False,
        )
        or [indent]
    ]


STYLE = """body { font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.2rem } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem } pre { white-space: pre-wrap; font-size: 13px;
background: #fafafa; padding: .6rem; border-radius: 4px; line-height: 1.9 } .injected { outline: 1.5px
solid #7b1fa2 } .sampled { color: #777 }"""


def as_page(rows: list[dict]) -> str:
    """The group as one self-contained HTML page: each token shaded by its entropy, injected ones outlined."""
    known = [h for row in rows for h in row.get("token_entropies", ())]
    if not known:
        raise UserError(
            "these samples do not hold their tokens, which the page shades: run with --save-tokens"
        )
    top = max(known) or 1.0
    body = [
        f"<h1>{html.escape(title(rows))}</h1>",
        f"<p>{html.escape(rows[0]['question'])}</p>",
        f"<p>Shade: entropy of each token, white 0, darkest {top:.2f} nats; outlined: injected by GEC; hover for "
        "numbers.</p>",
    ]
    for number, row in enumerate(rows, start=1):
        body.append(f"<h2>{html.escape(heading(number, row, rows))}</h2>")
        if "correction" in row and row["segments"][0][1]:
            body.append(f"<pre class=sampled>{html.escape('as sampled: ' + row['response'])}</pre>")
        tokens = zip(
            row["token_injected"], row["token_texts"], row["token_entropies"], row["token_logp"]
        )
        body.append("<pre>")
        for injected, run in groupby(tokens, key=lambda token: token[0]):
            shaded = "".join(
                f'<span style="background:rgba(230,97,0,{0.85 * entropy / top:.2f})" title="entropy '
                f'{entropy:.3f}, log-probability {logp:.3f}">{html.escape(text)}</span>'
                for _, text, entropy, logp in run
            )
            body[-1] += f"<span class=injected>{shaded}</span>" if injected else shaded
        body[-1] += "</pre>"
    return (
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title(rows))}</title><style>{STYLE}</style>"
        + "\n".join(body)
        + "\n"
    )
