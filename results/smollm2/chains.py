r"""Writes the tiny world's chains of arithmetic in plain English, for a model that reads English.

    python -m results.smollm2.chains --out chains

writes chains/STEPS-SPLIT.jsonl for the warm start (1-3 steps) and for each length from 3 to 8, rows
{"problem", "answer", "solution"} that --data and --tasks take. A question and its solution:

    Mia has 30 cards. She finds 12 more. She gives away 7. Then she has 2 times as many. How many
    cards does Mia have in the end?
    30 + 12 = 42\n42 - 7 = 35\n35 * 2 = 70\nThe answer is \boxed{70}.

The chains are those of data/tiny.py: every result is in 1..99, and no chain is in two splits.
"""

import argparse
import json
import random
from pathlib import Path

from data.tiny import ITEMS, SIZES, Chain, apply, chains, final_line, result

NAMES = {"She": ["Mia", "Ana", "Zoe", "Eva"], "He": ["Tom", "Ben", "Leo", "Sam"]}
SENTENCES = {
    "+": ["{who} finds {n} more. ", "{who} buys {n} more. ", "{who} gets {n} more. "],
    "-": ["{who} loses {n}. ", "{who} sells {n}. ", "{who} gives away {n}. "],
    "*": ["Then {who} has {n} times as many. "],
}


def question(chain: Chain, rng: random.Random) -> str:
    start, operations = chain
    pronoun = rng.choice(list(NAMES))
    name, item = rng.choice(NAMES[pronoun]), rng.choice(ITEMS)
    text = f"{name} has {start} {item}. "
    for operator, operand in operations:
        who = pronoun.lower() if operator == "*" else pronoun
        text += rng.choice(SENTENCES[operator]).format(who=who, n=operand)
    return f"{text}How many {item} does {name} have in the end?"


def solution(chain: Chain) -> str:
    value, operations = chain
    lines = ""
    for operator, operand in operations:
        after = apply(value, operator, operand)
        lines += f"{value} {operator} {operand} = {after}\n"
        value = after
    return lines + final_line(value)


def rows(steps: range, split: str) -> list[dict]:
    """The problems of a split, the numbers of steps in turn; as many as the tiny world has."""
    rng = random.Random(f"english {steps} {split}")
    made = []
    for chain in chains(rng, steps, split):
        made.append(
            {
                "problem": question(chain, rng),
                "answer": str(result(chain)),
                "solution": solution(chain),
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="chains", help="the folder to write")
    folder = Path(parser.parse_args().out)
    folder.mkdir(parents=True, exist_ok=True)
    lengths = {"1-3": range(1, 4)} | {str(k): range(k, k + 1) for k in range(3, 9)}
    for name, steps in lengths.items():
        for split in SIZES:
            path = folder / f"{name}-{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows(steps, split)))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
