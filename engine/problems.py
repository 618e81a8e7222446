"""The training problems of a run: loaded, checked, and without those that do not fit."""

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
        wrong = check_references(problems, needed_by)
    if flags.drop_wrong_references:
        problems = without_references(problems, set(wrong), flags.sft)
    longest = min(flags.max_prompt_tokens, policy.room([]) - 1)  # leaves one token to respond
    kept, too_long, cut = [], [], 0
    for p in problems:
        reference = policy.encode_response(p.solution or "") if needs_solution else []
        if policy.end_ids & set(reference):
            raise UserError(
                f"{p.source}: the solution holds an end token of the model; delete it, because "
                "every reference gets one at its end"
            )
        prompt = policy.prompt_ids(p.question)
        if len(prompt) > longest:
            too_long.append(p.source)
        else:
            kept.append(p)
            cut += len(reference) >= policy.room(prompt)  # its end token has to fit, too
    if cut:
        say(f"note: {cut} of {len(kept)} references are cut at the end of the model's context")
    if not kept:
        raise UserError(
            f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
            f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context"
        )
    return kept, too_long, wrong


def check_golds(problems: list[Problem]) -> list[str]:
    r"""Return the sources of golds that are unreadable or wrong as a \boxed{gold}, and say so.

    GEC injects this box as the answer. Where it fails, right responses are graded wrong, too.
    """
    failing = not_right(problems, [f"\\boxed{{{data.gold_text(p)}}}" for p in problems])
    if failing:
        gold = data.gold_text(failing[0])
        say(
            f"note: {len(failing)} of {len(problems)} golds cannot be read as an answer, the first "
            f"is {failing[0].source} ({gold!r:.60}); right responses may be graded wrong"
        )
    return [p.source for p in failing]


def check_references(problems: list[Problem], needed_by: str) -> list[str]:
    """Return the sources of problems whose reference solution is not graded right, and say so.

    Raises UserError if a problem has no solution, which the flag `needed_by` needs.
    """
    for p in problems:
        if not (p.solution or "").strip():
            raise UserError(
                f"{p.source} has no reference solution, which {needed_by} needs; use data with "
                "solutions, or --correction reflect or none, or --guided-probs .67 .33"
            )
    wrong = [p.source for p in not_right(problems, [p.solution for p in problems])]
    if wrong:
        say(
            f"note: {len(wrong)} of {len(problems)} reference solutions are not graded right, the "
            f"first is {wrong[0]}; --drop-wrong-references leaves them out"
        )
    return wrong


def not_right(problems: list[Problem], responses: list[str]) -> list[Problem]:
    """Return the problems whose response, one for each, is not both readable and right."""
    scores = reward.score_all(responses, [p.answers for p in problems])
    return [p for p, score in zip(problems, scores) if score != (1.0, 1.0)]


def without_references(problems: list[Problem], sources: set[str], sft: bool) -> list[Problem]:
    """Drop the references of these sources: GEC corrects in another way, SFT drops the problem."""
    kept = []
    for p in problems:
        if p.source not in sources:
            kept.append(p)
        elif not sft:
            kept.append(replace(p, solution=None))
    return kept
