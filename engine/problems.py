"""The training problems of a run: loaded, checked, and those that do not fit left out."""

from dataclasses import replace

import data
import reward
from data import Problem
from engine.console import say
from errors import UserError


def training_problems(
    flags, policy, needs_solution: bool
) -> tuple[list[Problem], list[str], list[str]]:
    """The problems of --data that fit; the sources of those whose prompt is too long; and of those whose reference is
    not graded right. Raises UserError."""
    if data.is_test_set(flags.data):
        raise UserError(
            f"--data {flags.data} is for testing: train on deepscaler-hard-1k, gsm8k-train, tiny:STEPS or "
            "a file of your own"
        )
    problems, wrong = data.load(flags.data, flags.mirror or None), []
    if needs_solution:
        problems, wrong = check_references(problems, flags)
    longest = min(
        flags.max_prompt_tokens, policy.room([]) - 1
    )  # one token at least for the response
    too_long = {p.source for p in problems if len(policy.prompt_ids(p.question)) > longest}
    kept = [p for p in problems if p.source not in too_long]
    if not kept:
        raise UserError(
            f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
            f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context"
        )
    return kept, sorted(too_long), wrong


def check_references(problems: list[Problem], flags) -> tuple[list[Problem], list[str]]:
    """The problems, and the sources of those whose reference is not graded right: told, or with --drop-wrong-references
    not used (SFT leaves the problem out, GEC corrects it in another way). UserError for a missing reference."""
    for p in problems:
        if not p.solution or not p.solution.strip():
            raise UserError(
                f"{p.source}: has no reference solution, which "
                + (
                    "--sft needs; use data with solutions, or another --method"
                    if flags.sft
                    else f"--correction {flags.correction} needs; use data with solutions, or --correction reflect or none, or "
                    "--guided-probs .67 .33"
                )
            )
    scores = reward.score_all([p.solution for p in problems], [list(p.answers) for p in problems])
    wrong = [p.source for p, (_, accuracy) in zip(problems, scores) if accuracy == 0]
    if wrong:
        what = (
            "not used"
            if flags.drop_wrong_references
            else (
                "trained on all the same" if flags.sft else "trained against when they are injected"
            )
        )
        say(
            f"note: {len(wrong)} of {len(problems)} reference solutions are not graded right, the first of them "
            f"{wrong[0]}; they are {what}"
            + ("" if flags.drop_wrong_references else "; see --drop-wrong-references")
        )
    if not flags.drop_wrong_references:
        return problems, wrong
    used = set(p.source for p in problems) - set(wrong)
    kept = [p if p.source in used else replace(p, solution=None) for p in problems]
    return [p for p in kept if p.solution is not None] if flags.sft else kept, wrong
