"""How many decode steps drafts by lookup save: a replay of responses that exist already, and the
sampler itself.

    python eval.py --model M --tasks T --n 8 --temperature 0.6 --out FOLDER
    python tests/bench_drafts.py FOLDER --model M    # with prompts and references as sources
    python tests/bench_drafts.py RUN                 # a run's samples.jsonl, without them
    python tests/bench_drafts.py --sample TASK --model M    # the sampler, with and without drafts

In each step every live row looks up its last n tokens (3, then 2) in its own text, then in the
texts of the other rows with the same prompt, as far as these have come, then in the reference. The
k tokens that followed there last are its draft. It keeps those that equal its next tokens, and gets
one more. A token depends only on the row's random stream, so the tokens are the plain sampler's.

    tokens a row-step: how many tokens a live row gets in a step, on average.
    group, 8 groups: the lock-step factor, plain steps over steps with drafts. A batch takes as many
        steps as its slowest row; a batch is one group, or 8 groups together.

With --sample the sampler draws 8 responses to each problem, one group at a time, with more and more
drafts, in turns. It prints decode steps, seconds of this process, and how many responses differ
from those without drafts (0 but for rounding).
"""

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SOURCES = ("own", "own+siblings", "own+siblings+reference")
TOKENS_LOOKED_UP = ((3, 2), (3,), (2,))
DRAFT_LENGTHS = (1, 2, 4, 8)


class Text:
    """Tokens so far, and where each n-gram among them was followed by another token last."""

    def __init__(self, tokens, sizes):
        self.tokens = []
        self.sizes = sizes
        self.followed = {}
        self.extend(tokens)

    def extend(self, tokens):
        for token in tokens:
            end = len(self.tokens)
            for n in self.sizes:
                if end >= n:
                    self.followed[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)


def look_up(texts: list[Text], k: int) -> list:
    """The draft for the first text: at most k tokens that followed its last n in one of the
    texts."""
    for n in texts[0].sizes:
        tail = tuple(texts[0].tokens[-n:])
        for text in texts:
            start = text.followed.get(tail)
            if start is not None:
                return text.tokens[start : start + k]
    return []


def replay(prompt, responses, k, sizes=(3, 2), siblings=True, reference=()) -> list[int]:
    """In how many steps each response of one prompt is sampled when drafts have up to k tokens. The
    tokens may be ids or texts."""
    texts = [Text(prompt, sizes) for _ in responses]
    shared = [Text(reference, sizes)]
    steps = [0] * len(responses)
    live = list(range(len(responses)))
    while live:
        accepted = {}
        for i in live:
            sources = [texts[i]]
            if siblings:
                sources += texts[:i] + texts[i + 1 :]
            sources += shared
            left = responses[i][len(texts[i].tokens) - len(prompt) :]
            count = 0
            for token, draft in zip(left, look_up(sources, k)):
                if token != draft:
                    break
                count += 1
            accepted[i] = left[: count + 1]
        for i, tokens in accepted.items():  # after all rows: nobody sees what another one drew now
            texts[i].extend(tokens)
            steps[i] += 1
        live = [i for i in live if len(texts[i].tokens) < len(prompt) + len(responses[i])]
    return steps


def read_groups(folder: Path, model: str | None, mirror: str | None) -> dict[str, list[tuple]]:
    """{temperature or "run": groups of (prompt, responses, reference)}, tokens as ids if the folder
    is eval.py's, else as texts. Injected rows are left out, and groups of a single row."""
    rows = defaultdict(list)
    if (folder / "responses.jsonl").exists():
        for row in map(json.loads, open(folder / "responses.jsonl")):
            rows[f"T = {row['temperature']}", row["task"], row["problem"]].append(row["ids"])
    else:
        for row in map(json.loads, open(folder / "samples.jsonl")):
            if not row.get("correction") and not any(row["token_injected"]):
                rows["run", row["step"], row["question_number"]].append(row["token_texts"])
    sources = {}
    if model and (folder / "responses.jsonl").exists():
        import data
        import engine

        policy = engine.load_policy(model, "cpu")
        for task in {key[1] for key in rows}:
            for i, problem in enumerate(data.load(task, mirror), 1):
                prompt = policy.prompt_ids(problem.question)
                sources[task, i] = prompt, policy.encode(problem.solution or "")
    groups = defaultdict(list)
    for (name, *problem), responses in rows.items():
        prompt, reference = sources.get(tuple(problem), ([], []))
        if len(responses) > 1:
            groups[name].append((prompt, [r for r in responses if r], reference))
    return groups


def measure(groups: list[tuple], k: int, sizes: tuple, source: str) -> tuple[float, float, float]:
    """Tokens a row-step, and the lock-step factor of single groups and of 8 groups together."""
    row_steps, slowest, longest = 0, [], []
    for prompt, responses, reference in groups:
        if source != SOURCES[2]:
            reference = []
        steps = replay(prompt, responses, k, sizes, source != "own", reference)
        row_steps += sum(steps)
        slowest.append(max(steps))
        longest.append(max(map(len, responses)))
    tokens = sum(len(r) for _, responses, _ in groups for r in responses)
    eights = range(0, len(groups), 8)
    together = [sum(max(x[i : i + 8]) for i in eights) for x in (longest, slowest)]
    return tokens / row_steps, sum(longest) / sum(slowest), together[0] / together[1]


def sample(flags: argparse.Namespace) -> None:
    """Counts the decode steps and the seconds of the sampler for each length of drafts."""
    import data
    import engine
    import rollout

    policy = engine.load_policy(flags.model, "cpu")
    sampler = policy.sampler
    prompts = []
    for problem in data.load(flags.sample, flags.mirror)[: flags.problems]:
        prompts.append(policy.prompt_ids(problem.question))
    steps, seconds, different = defaultdict(int), defaultdict(float), defaultdict(int)
    for prompt in prompts:
        for k in (0, *DRAFT_LENGTHS):
            sampler.drafts = k
            with mock.patch.object(rollout, "decode", wraps=rollout.decode) as decode:
                start = time.process_time()
                [rows] = sampler.sample([prompt], 8, flags.max_new_tokens, flags.temperature, 0)
                seconds[k] += time.process_time() - start
            steps[k] += decode.call_count
            ids = [row.ids for row in rows]
            if k == 0:
                plain = ids
            different[k] += sum(a != b for a, b in zip(ids, plain))
    print(f"{flags.sample}, T = {flags.temperature}, {len(prompts)} groups of 8")
    print(f"{'k':>3}{'steps':>8}{'factor':>8}{'seconds':>9}{'speed':>7}  different responses")
    for k in steps:
        factor, speed = steps[0] / steps[k], seconds[0] / seconds[k]
        print(f"{k:3}{steps[k]:8}{factor:8.2f}{seconds[k]:9.1f}{speed:7.2f}{different[k]:6}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--model", help="whose prompts and references are sources too")
    parser.add_argument("--mirror")
    parser.add_argument("--sample", metavar="TASK", help="run the sampler on these problems")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    flags = parser.parse_args()
    if flags.sample:
        sample(flags)
    for folder in flags.folders:
        for name, groups in read_groups(folder, flags.model, flags.mirror).items():
            lengths = [len(r) for _, responses, _ in groups for r in responses]
            print(
                f"\n{folder}, {name}: {len(groups)} groups, {len(lengths)} rows, "
                f"{statistics.mean(lengths):.0f} tokens on average, {max(lengths)} at most"
            )
            print(f"{'source':24}{'n':>6}{'k':>4}{'tokens a row-step':>19}   group  8 groups")
            for source in SOURCES[: 3 if any(reference for *_, reference in groups) else 2]:
                for sizes in TOKENS_LOOKED_UP:
                    for k in DRAFT_LENGTHS:
                        row, group, eight = measure(groups, k, sizes, source)
                        n = ",".join(map(str, sizes))
                        print(f"{source:24}{n:>6}{k:4}{row:19.2f}{group:8.2f}{eight:10.2f}")


if __name__ == "__main__":
    main()
