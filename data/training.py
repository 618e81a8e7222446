"""The training problems of a run: loaded, checked, and those that do not fit left out."""
from dataclasses import replace

import data
import reward
from data import Problem, UserError
from engine.console import say


def training_problems(flags, policy, needs_solution: bool) -> tuple[list[Problem], list[str]]:
    """The problems of --data that fit, and the sources of those whose prompt is too long. Raises UserError."""
    if data.is_test_set(flags.data):
        raise UserError(f"--data {flags.data} is for testing: train on deepscaler-hard-1k, gsm8k-train, tiny:STEPS or a "
                        "file of your own")
    problems = data.load(flags.data, flags.mirror or None)
    if needs_solution:
        problems = check_references(problems, flags)
    longest = min(flags.max_prompt_tokens, policy.room([]) - 1)                 # one token at least for the response
    too_long = {p.source for p in problems if len(policy.prompt_ids(p.question)) > longest}
    kept = [p for p in problems if p.source not in too_long]
    if not kept:
        raise UserError(f"--data {flags.data}: every prompt is longer than --max-prompt-tokens "
                        f"{flags.max_prompt_tokens}, or leaves no room for a response in the model's context")
    return kept, sorted(too_long)


def check_references(problems: list[Problem], flags) -> list[Problem]:
    """UserError for a missing reference solution. Those that are not graded right are told, or with
    --drop-wrong-references not used: SFT leaves the problem out, GEC corrects it in another way."""
    for p in problems:
        if not p.solution or not p.solution.strip():
            raise UserError(f"{p.source}: has no reference solution, which " + (
                "--sft needs; use data with solutions, or another --method" if flags.sft else
                f"--correction {flags.correction} needs; use data with solutions, or --correction reflect or none, or "
                "--guided-probs .67 .33"))
    scores = reward.score_all([p.solution for p in problems], [list(p.answers) for p in problems])
    wrong = {p.source for p, (_, accuracy) in zip(problems, scores) if accuracy == 0}
    if wrong:
        first = next(p.source for p in problems if p.source in wrong)
        what = "not used" if flags.drop_wrong_references else (
            "trained on all the same" if flags.sft else "trained against when they are injected")
        say(f"note: {len(wrong)} of {len(problems)} reference solutions are not graded right, the first of them "
            f"{first}; they are {what}" + ("" if flags.drop_wrong_references else "; see --drop-wrong-references"))
    if not flags.drop_wrong_references:
        return problems
    without = [p for p in problems if p.source not in wrong]
    return without if flags.sft else [replace(p, solution=None) if p.source in wrong else p for p in problems]
