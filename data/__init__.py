"""Problems: the training set, the benchmarks, JSON and JSONL files, and the tiny world.

    from data import load
    load("deepscaler-hard-1k")        # the paper's training set, downloaded once (data/download.py)
    load("gsm8k-train:2:validation")  # at most 2 solution lines; a held-out tenth, chosen by hash
    load("my_problems.jsonl")         # rows {"problem" or "question", "answer", maybe "solution"}
    load("tiny:5-8:test")             # synthetic problems, generated on the spot (data/tiny.py)

Text is kept byte for byte as the file gives it, except for GSM8K's solutions (_gsm8k_solution) and
golds with markup that no boxed answer has (_golds). A row that cannot be a problem raises UserError
with its file and row number; no row is ever skipped.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from errors import UserError
from reward import final_answer

TRAINING_SETS = ("deepscaler-hard-1k", "gsm8k-train")


@dataclass(frozen=True)
class Problem:
    question: str
    answers: tuple  # the golds (str, int or float); a response is right if it equals any of them
    solution: str | None  # the reference solution
    source: str  # "deepscaler-hard-1k:17": set or file, and row from 1


def load(name_or_path: str, mirror: str | None = None) -> list[Problem]:
    """Return the problems of a named set, of tiny:STEPS[:SPLIT[:STYLE]], or of a JSON/JSONL file.

    gsm8k-train:LINES[:SPLIT] keeps problems whose solution has at most LINES lines. SPLIT is train
    or validation (default: both); validation is a tenth, chosen by a hash of the question.
    `mirror` is a folder or base URL that holds the downloads as OWNER/REPO/COMMIT/PATH.
    Raises UserError.
    """
    from data import download, tiny  # imported here because tiny imports this module

    name = str(name_or_path)
    if name.split(":")[0] == "tiny":
        return tiny.problems(name)
    if name in download.FILES:
        return read(download.fetch(name, mirror), name)
    if name.startswith("gsm8k-train:"):
        return _short_gsm8k(name, load("gsm8k-train", mirror))
    if not Path(name).exists():
        raise UserError(
            f"{name!r} is neither a file nor a known set; the sets are "
            f"{', '.join(download.FILES)} and tiny:STEPS, such as tiny:5-8"
        )
    return read(Path(name), name)


def is_test_set(name: str) -> bool:
    """Return whether this is a test set, on which one must not train."""
    from data import download

    if name.startswith("tiny:"):
        return "test" in name.split(":")
    return name in download.FILES and name not in TRAINING_SETS


def tenth_of(text: str) -> int:
    """Return a number from 0 to 9, a hash of the text, to hold out tenths of the problems."""
    return hashlib.sha256(text.encode()).digest()[0] % 10


def _short_gsm8k(name: str, problems: list[Problem]) -> list[Problem]:
    match = re.fullmatch(r"gsm8k-train:([2-9])(?::(train|validation))?", name)
    if not match:
        raise UserError(
            f"{name!r} is not a subset of GSM8K: write gsm8k-train:LINES[:SPLIT], with LINES from "
            "2 to 9, and SPLIT train or validation"
        )
    lines, split = int(match[1]), match[2]
    kept = []
    for p in problems:
        held_out = tenth_of(p.question) == 0
        in_split = split is None or held_out == (split == "validation")
        if (
            in_split and p.solution.count("\n") <= lines
        ):  # the last line, the answer, is not counted
            kept.append(p)
    return kept


# --- Files ---------------------------------------------------------------------------------------

PANDAS = (
    "python -c \"import pandas; pandas.{}.to_json('{{0}}.jsonl', orient='records', lines=True)\""
)
DATASETS = "python -c \"import datasets; datasets.Dataset.from_file('{0}').to_json('{0}.jsonl')\""
HEADER = rb'(\xef\xbb\xbf)?("[\w ]+"|[\w ]+)'  # the name of the first column of a CSV file
OTHER_FORMATS = {  # a regular expression for the first bytes: (what the file is, how to convert it)
    rb"PAR1": ("a Parquet file", PANDAS.format("read_parquet('{0}')")),
    rb"ARROW1": ("an Arrow file", PANDAS.format("read_feather('{0}')")),
    rb"\xff\xff\xff\xff": ("an Arrow file of Hugging Face datasets", DATASETS),
    rb"\x1f\x8b": ("a gzip file", "gunzip -k '{0}'"),
    rb"PK\x03\x04": ("a zip archive or an Excel file", "unzip '{0}'"),
    HEADER + rb",": ("a CSV file", PANDAS.format("read_csv('{0}', dtype=str)")),
    HEADER + rb"\t": (
        "a file of tab-separated columns",
        PANDAS.format("read_table('{0}', dtype=str)"),
    ),
}


def read(path: Path, name: str) -> list[Problem]:
    """Return the problems of a JSON (a list of objects) or JSONL file.

    `name` stands for the file in messages and in `Problem.source`. Raises UserError.
    """
    if path.is_dir():
        raise UserError(f"{name} is a folder; give the JSON or JSONL file in it")
    content = path.read_bytes()
    for first_bytes, (kind, command) in OTHER_FORMATS.items():
        if re.match(first_bytes, content):
            raise UserError(f"{name} is {kind}; convert it to JSONL: {command.format(name)}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}); convert it to JSONL in UTF-8"
        ) from None
    problems = []
    if text.lstrip().startswith("["):
        for number, row in enumerate(_json(text, name), start=1):
            problems.append(_problem(row, f"{name}:{number}"))
    else:
        # Only "\n" ends a row: str.splitlines also cuts at U+2028, which a JSON string may hold.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{name}:{number}"
                problems.append(_problem(_json(line, where), where))
    if not problems:
        raise UserError(
            f"{name} holds no problem; it must be a JSON list of objects, or one object per line"
        )
    return problems


def _json(text: str, where: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{where} is not valid JSON: {error}; "
            "a file is a JSON list of objects, or one object per line"
        ) from None


def _problem(row: object, where: str) -> Problem:
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise UserError(
            f"{where} is a JSON {kind}; a row must be an object with problem and answer"
        )
    field = "problem" if "problem" in row else "question"
    for needed in (field, "answer"):
        if needed not in row:
            missing = needed.replace("question", "problem (or question)")
            names = ", ".join(map(repr, row)) or "none"
            raise UserError(f"{where} has no field {missing}; its fields are {names}")
    question = _text(row[field], f"the {field}", where)
    answers, solution = row["answer"], row.get("solution")
    if isinstance(solution, list):  # OlympiadBench lists alternatives: the first is the reference
        solution = solution[0] if solution else None
    if solution in (None, ""):
        solution = _gsm8k_solution(answers)
    else:
        _text(solution, "the solution", where)
    if answers == []:
        raise UserError(f"{where} has an empty list of answers; give at least one")
    golds = []
    for answer in answers if isinstance(answers, list) else [answers]:
        golds += _golds(answer, where)
    return Problem(question, tuple(golds), solution, where)


def _text(value: object, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(
            f"{where}: {what} is of type {type(value).__name__} ({value!r:.40}); it must be text"
        )
    if not value.strip():
        raise UserError(f"{where}: {what} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: {what} holds half of a surrogate pair, which is not a character; replace it"
        ) from None
    return value


def _gsm8k_solution(answer: object) -> str | None:
    """Return the solution that GSM8K puts before "#### answer", with the answer in a box.

    Calculator marks such as <<48/2=24>> are dropped. None if the answer holds no solution.
    """
    if not isinstance(answer, str):
        return None
    solution, _, gold = answer.rpartition("####")
    solution = re.sub(r"<<[^<>]*>>", "", solution).removesuffix("\n")
    if not solution:
        return None
    return f"{solution}\nThe answer is \\boxed{{{_content(_plain(gold))}}}."


# --- Golds ---------------------------------------------------------------------------------------

QUOTED_LIST = re.compile(  # ['42'], ["42", "6*7"], ('42',), and array(['42' '43'], dtype=object)
    r"""(?:array\()?[\[(]\s*(['"])(.+)\1\s*,?\s*[\])](?:, *dtype=\w+)?\)?""", re.DOTALL
)
_ANSWER_IS = (  # So the answer is ... **Answer:** ...
    r"(?:(?:so|thus|hence|therefore),? +)?[*_]*(?:(?:the|my|your|our) +)?"
    r"(?:(?:final|correct|right) +)*(?:answer|ans|result|solution|option|choice)[*_]*"
    r"(?:\s+is\b|\.\s|\s+[-–—]\s|\s*[=:：\n])+[*_\s]*"
)
MARKUP = [  # Each keeps its last group.
    r".*####(.+)",  # GSM8K's mark of the answer
    r"#{1,3}\s+(.+)",  # a heading
    r"(?:.*<\w*answer>|<\|?\w+\|?>)(.+)",  # <answer>42, <|begin_of_box|>42
    r"(.+)(?:</\w+>|<\|\w+\|>)",  # 42</answer>, 42<|im_end|>
    r"""(\*{1,3}|_{1,3}|`{1,3}|["'])((?:(?!\1).)+)\1\.?""",  # **42**, `42`, "42"
    r"[“‘«](.+)[”’»]",
    r"(.+?)\.? +I hope it is correct\.?",  # the end of Minerva's form of an answer
    r"\\?f?box(?:ed)?\{(.+)\}",  # boxed{42}, \fbox{42}
    _ANSWER_IS + r"(.+?(?:\.\.\.)?)\**\.?",
    r"(?:=+(?![=<>])|:|=>|->|→|⇒)\s*(.+)",  # = 42
]
DELIMITERS = [
    r"\$\$([^$]+)\$\$",
    r"\$([^$]+)\$",
    r"\\\(((?:(?!\\\)).)+)\\\)",
    r"\\\[((?:(?!\\\]).)+)\\\]",
]


def gold_text(problem: Problem) -> str:
    r"""Return the first gold as text to put into \boxed{}: 142.0 -> 142, $\boxed{a}$ -> a."""
    gold = problem.answers[0]
    if isinstance(gold, float) and gold.is_integer():
        return f"{Decimal(repr(gold)):.0f}"  # the digits as they were written, also above 2^53
    return _content(str(gold))


def _golds(answer: object, where: str) -> list[str | int | float]:
    """Return the golds of one answer: several if its text is a quoted list such as ['42', '43']."""
    if isinstance(answer, float) and not math.isfinite(answer):
        raise UserError(f"{where} has the answer {answer}; it must be text or a finite number")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        return [answer]
    text = _plain(_text(answer, "the answer", where))
    quoted_list = QUOTED_LIST.fullmatch(text.strip())
    if not quoted_list:
        return [text]
    quote, items = quoted_list.groups()
    golds = []
    for item in re.split(f"{quote}\\s*,?\\s*{quote}", items):
        if "\\" not in item.replace("\\\\", ""):  # JSON and Python write each backslash twice
            item = item.replace("\\\\", "\\")
        if item.strip():
            golds.append(_plain(item))
    return golds or [text]


def _plain(text: str) -> str:
    """Return a gold without markup that no boxed answer has; the text itself where there is none.

    A boxed gold stays as it is, because grading reads the last box in it.
    """
    if final_answer(text):
        return text
    inner = _unwrapped(text.strip(), DELIMITERS + MARKUP)
    return text if inner == _content(text) else inner


def _content(text: str) -> str:
    """Return the content of the last box, if there is one, without the dollars around formulas."""
    return _unwrapped((final_answer(text) or text).strip(), DELIMITERS)


def _unwrapped(text: str, patterns: list[str]) -> str:
    """Return what is left of a text if each pattern that matches all of it keeps its last group."""
    for pattern in 3 * patterns:  # there may be markup inside markup
        match = re.fullmatch(pattern, text, re.DOTALL | re.IGNORECASE)
        if match and match[match.lastindex].strip():
            text = match[match.lastindex].strip()
    return text
