"""The training problems of a run: load them, check what can be graded, leave out what does not fit."""

from dataclasses import replace

import data
import reward
from data import Problem
from engine.console import say
from engine.models import Policy
from errors import UserError


def training_problems(
    flags, policy: Policy, needs_solution: bool
) -> tuple[list[Problem], list[str], list[str]]:
    """Return the problems of --data, the sources left out, and those with a wrong reference.

    Left out are problems whose prompt is too long. Raises UserError.
    """
    if data.is_test_set(flags.data):
        raise UserError(
            f"--data {flags.data} is for testing: train on deepscaler-hard-1k, gsm8k-train, "
            "tiny:STEPS or a file of your own"
        )
    problems = data.load(flags.data, flags.mirror or None)
    check_golds(problems)
    wrong = []
    if needs_solution:
        needed_by = "--sft" if flags.sft else f"--correction {flags.correction}"
        wrong = wrong_references(problems, needed_by, flags.drop_wrong_references)
    if flags.drop_wrong_references:
        problems = without_references(problems, wrong, keep=not flags.sft)
    longest = min(flags.max_prompt_tokens, policy.room([]) - 1)  # leaves one token to respond
    kept, too_long = [], []
    for p in problems:
        if len(policy.prompt_ids(p.question)) > longest:
            too_long.append(p.source)
        else:
            kept.append(p)
    if not kept:
        raise UserError(
            f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
            f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context"
        )
    return kept, too_long, wrong


def check_golds(problems: list[Problem]) -> list[str]:
    r"""Return the sources of problems whose own \boxed{gold} is unreadable or wrong, and say so.

    This is the box that GEC injects as the answer. Where it fails, right responses fail too.
    """
    boxes = [f"\\boxed{{{data.gold_text(p)}}}" for p in problems]
    scores = reward.score_all(boxes, [p.answers for p in problems])
    failing = [p for p, score in zip(problems, scores) if score != (1.0, 1.0)]
    if failing:
        say(
            f"note: {len(failing)} of {len(problems)} golds cannot be read as an answer, the first "
            f"of them {failing[0].source} ({data.gold_text(failing[0])!r:.60}); right responses "
            "to them are likely to be graded wrong"
        )
    return [p.source for p in failing]


def wrong_references(problems: list[Problem], needed_by: str, dropped: bool) -> list[str]:
    """Return the sources of problems whose reference solution is graded wrong, and say so.

    Raises UserError if a problem has no solution, which the flag `needed_by` needs.
    """
    for p in problems:
        if not (p.solution or "").strip():
            raise UserError(
                f"{p.source} has no reference solution, which {needed_by} needs; use data with "
                "solutions, another --method, --correction reflect or none, or --guided-probs .67 .33"
            )
    scores = reward.score_all([p.solution for p in problems], [p.answers for p in problems])
    wrong = [p.source for p, (_, accuracy) in zip(problems, scores) if accuracy == 0]
    if wrong:
        use = "not used" if dropped else "used all the same; see --drop-wrong-references"
        say(
            f"note: {len(wrong)} of {len(problems)} reference solutions are not graded right, the "
            f"first of them {wrong[0]}; they are {use}"
        )
    return wrong


def without_references(problems: list[Problem], wrong: list[str], keep: bool) -> list[Problem]:
    """Drop the references of the problems `wrong`: SFT drops the problem, GEC corrects otherwise."""
    dropped = set(wrong)
    kept = []
    for p in problems:
        if p.source not in dropped:
            kept.append(p)
        elif keep:
            kept.append(replace(p, solution=None))
    return kept
