"""Estimates how far trained models have moved from the warm start.

    python -m results.smollm2.kl START RUN...

START and RUN are run folders. Prints for each RUN the mean over tokens of log p - log p_start, on
256 of its own test responses (RUN/eval/avg4/responses.jsonl) and at the temperature at which they
were sampled: an estimate of KL(trained || start) per token, in nats.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch

import data
import engine
from engine.forward import response_logprobs

RESPONSES = 256
TEMPERATURE = 0.6


def logp(run: str, rows: list[dict], task: str) -> torch.Tensor:
    """Log-probabilities of all tokens of the responses under the final model of a run."""
    policy = engine.load_policy(f"{run}/final", "cpu")
    problems = data.load(task)
    prompts, responses = [], []
    for row in rows:
        prompts.append(policy.prompt_ids(problems[row["problem"] - 1].question))
        responses.append(row["ids"])
    arguments = dict(temperature=TEMPERATURE, vocab_size=policy.vocab_size, budget=2048)
    numbers = response_logprobs(policy.model, prompts, responses, **arguments)
    return torch.cat([column for column, _ in numbers])


def main() -> None:
    start, *runs = sys.argv[1:]
    for run in runs:
        rows = []
        with open(Path(run) / "eval" / "avg4" / "responses.jsonl") as lines:
            for line in islice(lines, RESPONSES):
                rows.append(json.loads(line))
        task = rows[0]["task"]
        kl = (logp(run, rows, task) - logp(start, rows, task)).mean().item()
        print(f"{run}: {kl:.3f} nats a token")


if __name__ == "__main__":
    main()
