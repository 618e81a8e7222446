"""Problems: the training set, the benchmarks, any JSON or JSONL file, and the synthetic problems of the tiny world.

    from data import load
    load("deepscaler-hard-1k")        # the paper's training set; fetched once into data/cache/ (data/download.py)
    load("gsm8k-train:2:validation")  # of those of at most 2 solution lines, the tenth that is held out by hash
    load("my_problems.jsonl")         # rows {"problem" or "question", "answer", optionally "solution"}
    load("tiny:5-8:test")             # synthetic, generated on the spot (data/tiny.py)

Text is kept byte for byte as the file gives it, but for the solutions of GSM8K. A row that cannot be a problem stops
the loading with its file and row number; no row is ever skipped.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from errors import UserError


@dataclass(frozen=True)
class Problem:
    question: str
    answers: tuple  # the golds as the file gives them (str, int or float): any of them counts
    solution: str | None  # the reference solution, byte for byte
    source: str  # "deepscaler-hard-1k:17": set or file and row (from 1), for messages and records


def load(name_or_path: str, mirror: str | None = None) -> list[Problem]:
    """The problems of a named set, of a tiny set `tiny:STEPS[:SPLIT[:STYLE]]`, or of a JSON/JSONL file.

    gsm8k-train[:LINES[:SPLIT]] keeps the problems whose solution has at most LINES lines, and of them all, or those of
    a SPLIT: train or validation, a tenth by the hash of the question. `mirror` is a folder or base address that holds
    the downloads as OWNER/REPO/COMMIT/PATH. Raises UserError.
    """
    name = str(name_or_path)
    if name.split(":")[0] == "tiny":
        from data import tiny  # imported here because both modules build on this one

        return tiny.problems(name)
    from data import download

    if name in download.FILES:
        return read(download.fetch(name, mirror), name)
    if name.startswith("gsm8k-train:"):
        return _easier(name, read(download.fetch("gsm8k-train", mirror), "gsm8k-train"))
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{name!r} is neither a file nor a known set; the sets are {', '.join(download.FILES)} "
            "and tiny:STEPS, such as tiny:5-8"
        )
    return read(path, name)


def is_test_set(name: str) -> bool:
    """Whether problems of this name are for testing, so that nobody should train on them."""
    from data import download

    return (name in download.FILES and name not in ("deepscaler-hard-1k", "gsm8k-train")) or (
        name.startswith("tiny:") and "test" in name.split(":")
    )


def _easier(name: str, problems: list[Problem]) -> list[Problem]:
    match = re.fullmatch(r"gsm8k-train:(\d+)(?::(train|validation))?", name)
    if not match:
        raise UserError(
            f"{name!r} is no such part: it is gsm8k-train:LINES[:SPLIT], with SPLIT train or validation"
        )
    kept = [
        p for p in problems if p.solution.count("\n") <= int(match[1])
    ]  # the answer's line not counted
    held_out = [hashlib.sha256(p.question.encode()).digest()[0] % 10 == 0 for p in kept]
    kept = [
        p for p, out in zip(kept, held_out) if match[2] is None or out == (match[2] == "validation")
    ]
    if not kept:
        raise UserError(f"{name!r} holds no problem: the shortest solutions have 2 lines")
    return kept


def read(path: Path, name: str) -> list[Problem]:
    """The problems of a JSON (a list of objects) or JSONL file, which messages and `Problem.source` call `name`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        raise UserError(f"{name} is a folder; give the JSON or JSONL file in it") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    rows = _array(text, name) if text.lstrip().startswith("[") else _lines(text, name)
    if not rows:
        raise UserError(
            f"{name} holds no problem; it must be a JSON list of objects, or one JSON object per line"
        )
    return [_problem(row, f"{name}:{number}") for number, row in rows]


def _array(text: str, name: str) -> list[tuple[int, object]]:
    return list(enumerate(_json(text, name), start=1))


def _lines(text: str, name: str) -> list[tuple[int, object]]:
    # Only "\n" ends a row: str.splitlines would also cut at U+2028, which may stand inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, _json(line, f"{name}:{number}")) for number, line in lines if line.strip()]


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
        raise UserError(
            f"{where} is a JSON {type(row).__name__}; each row must be an object with problem and answer"
        )
    field = next((name for name in ("problem", "question") if name in row), None)
    if field is None or "answer" not in row:
        missing = "answer" if field else "problem (or question)"
        raise UserError(
            f"{where} has no field {missing}; its fields are {', '.join(map(repr, row)) or 'none'}"
        )
    question = _text(row[field], f"the {field}", where)
    answers, solution = row["answer"], _solution(row.get("solution"), where)
    if (
        solution is None and isinstance(answers, str) and "#### " in answers
    ):  # GSM8K keeps both in one field
        solution, _, answers = answers.rpartition(
            "#### "
        )  # with calculator marks <<48/2=24>> and no box
        solution, answers = re.sub(r"<<[^<>]*>>", "", solution), answers.strip()
        solution = (
            solution and f"{solution.removesuffix(chr(10))}\nThe answer is \\boxed{{{answers}}}."
        )
    golds = answers if isinstance(answers, list) else [answers]
    if not golds:
        raise UserError(f"{where} has an empty list of answers; give at least one")
    return Problem(question, tuple(_gold(gold, where) for gold in golds), solution or None, where)


def _gold(gold: object, where: str) -> str | int | float:
    if isinstance(gold, (int, float)) and not isinstance(gold, bool):
        if isinstance(gold, int) or math.isfinite(gold):
            return gold
        raise UserError(f"{where} has the answer {gold}; it must be text or a finite number")
    return _text(gold, "the answer", where)


def _solution(solution: object, where: str) -> str | None:
    """OlympiadBench lists alternative solutions: the first is the reference. None, "" and [] mean there is none."""
    if isinstance(solution, list):
        solution = solution[0] if solution else None
    return None if solution in (None, "") else _text(solution, "the solution", where)


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
            f"{where}: {what} holds half of a surrogate pair, which is no character; repair it"
        ) from None
    return value


def gold_text(problem: Problem) -> str:
    r"""The first gold as the text inside \boxed{} when the answer is injected: 142.0 -> 142, $\boxed{a}$ -> a."""
    gold = problem.answers[0]
    if isinstance(gold, float) and gold.is_integer():
        return f"{Decimal(repr(gold)):.0f}"  # the digits as they were written, also above 2^53
    text, inner = None, str(gold).strip()
    while inner != text:
        text, inner = inner, _unwrapped(inner)
    return text


def _unwrapped(text: str) -> str:
    r"""Without one pair of $...$, \(...\), \[...\] or \boxed{...} around all of it, if there is one."""
    match = re.fullmatch(r"\$\$([^$]+)\$\$|\$([^$]+)\$|\\\((.+)\\\)|\\\[(.+)\\\]", text, re.DOTALL)
    inner = next((group for group in match.groups() if group is not None), text) if match else text
    if not match and text.startswith(r"\boxed{") and text.endswith("}") and _balanced(text[7:-1]):
        inner = text[7:-1]
    return inner.strip() or text


def _balanced(text: str) -> bool:
    """True if every closing brace has its opening one before it, so that the braces around the text are a pair."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0
