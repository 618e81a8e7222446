"""`python eval.py show RUN --step 17 --question 2` shows one group as a person reads it.

A group is the responses to one question of a step, from samples.jsonl. Text that GEC injected is
set apart. The HTML page also shades each token by its entropy.
"""

import html
import shutil
import textwrap
from itertools import groupby
from pathlib import Path

from engine.folder import read_lines
from errors import UserError
from report.tables import number, visible


def find_group(run: Path, step: int | None, question: int) -> list[dict]:
    """Find the rows of question number `question` (from 1) of a step (default: the last).

    Raises UserError if there are none.
    """
    rows, _ = read_lines(run / "samples.jsonl")
    if not rows or "question" not in rows[0]:
        raise UserError(f"{run}: no run with samples of this version (samples.jsonl)")
    steps = rows[-1]["step"]
    if step is None:
        step = steps
    group = [row for row in rows if (row["step"], row["question_number"]) == (step, question)]
    if not group:
        questions = max(row["question_number"] for row in rows)
        raise UserError(
            f"{run}: holds no question {question} of step {step}; it has {steps} steps of "
            f"{questions} questions"
        )
    return group


def title(row: dict) -> str:
    place = f"step {row['step']}, question {row['question_number']}: {row['source']}"
    return visible(f"{place}, gold {' or '.join(map(str, row['answers']))}")


def heading(position: int, row: dict) -> str:
    """Write a response's accuracy, length, P, P/mean and A -> A^, and what GEC did to it."""
    grade = "right" if row["accuracy"] else "wrong"
    length = str(row["tokens"])
    if "correction" in row:
        corrected = "right" if row["accuracy_corrected"] else "wrong"
        grade += f", {row['correction']}: {corrected}"
        length += f" -> {row['tokens_corrected']}"
    return (
        f"{position}. {grade}, {length} tokens, P {number(row['entropy'], '.3f')}, "
        f"P/mean {number(row.get('relative_entropy'), '.2f')}, "
        f"A {row['advantage']:+.2f} -> {row['advantage_eda']:+.2f}"
    )


def replaced(row: dict) -> bool:
    """Tell whether a correction kept nothing of the sampled response."""
    return "correction" in row and row["segments"][0][1]


def as_text(rows: list[dict], width: int | None = None, colour: bool = False) -> str:
    """Write the group in lines of `width` columns, injected text in colour or in [brackets]."""
    width = width or shutil.get_terminal_size().columns
    start, end = ("\x1b[35m", "\x1b[0m") if colour else ("[", "]")
    lines = [title(rows[0]), wrapped(visible(rows[0]["question"]), width, "  "), ""]
    for position, row in enumerate(rows, start=1):
        lines.append(heading(position, row))
        if replaced(row):
            lines.append(wrapped(visible("(as sampled) " + row["response"]), width, "   "))
        text = ""
        for part, injected in row["segments"]:
            text += start + visible(part) + end if injected else visible(part)
        lines.append(wrapped(text, width, "   "))
    return "\n".join(lines)


def wrapped(text: str, width: int, indent: str) -> str:
    """Wrap and indent each line of a text."""
    wrapper = textwrap.TextWrapper(
        max(width, 20), initial_indent=indent, subsequent_indent=indent, replace_whitespace=False
    )
    return "\n".join(map(wrapper.fill, text.split("\n")))


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
    if "token_entropies" not in rows[0]:
        raise UserError(
            "these samples do not hold their tokens, which the page shades: run with --save-tokens"
        )
    highest = max(entropy for row in rows for entropy in row["token_entropies"]) or 1.0
    name = escaped(title(rows[0]))
    body = [
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style>",
        f"<h1>{name}</h1>",
        f"<p>{escaped(rows[0]['question'])}</p>",
        f"<p>Shade: entropy of each token, white 0, darkest {highest:.2f} nats; outlined: injected "
        "by GEC; hover for numbers.</p>",
    ]
    for position, row in enumerate(rows, start=1):
        body.append(f"<h2>{escaped(heading(position, row))}</h2>")
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
