"""Estimates how far trained models have moved from the warm start.

    python -m results.smollm2.kl START RUN...

START and RUN are run folders. Prints for each RUN the mean over tokens of log p - log p_start, on
256 of its own test responses (RUN/eval/avg4/responses.jsonl) and at the temperature at which they
were sampled: an estimate of KL(trained || start) per token, in nats.
"""

import json
import sys
from pathlib import Path

import torch

import data
import engine
from engine.forward import response_logprobs

RESPONSES = 256
TEMPERATURE = 0.6


def logp(folder: str, rows: list[dict], task: str) -> torch.Tensor:
    policy = engine.load_policy(f"{folder}/final", "cpu")
    problems = data.load(task)
    prompts = [policy.prompt_ids(problems[row["problem"] - 1].question) for row in rows]
    ids = [row["ids"] for row in rows]
    numbers = response_logprobs(policy.model, prompts, ids, TEMPERATURE, policy.vocab_size, 2048)
    return torch.cat([column for column, _ in numbers])


def main() -> None:
    start, *runs = sys.argv[1:]
    for run in runs:
        lines = (Path(run) / "eval" / "avg4" / "responses.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines[:RESPONSES]]
        task = rows[0]["task"]
        kl = (logp(run, rows, task) - logp(start, rows, task)).mean().item()
        print(f"{run}: {kl:.3f} nats a token")


if __name__ == "__main__":
    main()
