"""What a step of training did, as numbers (metrics.jsonl) and as text (samples.jsonl).

`groups` are the step's edge_grpo.Group objects after the update. Metrics of what was sampled are
None where nothing was (SFT)."""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from report.tables import mean

SHOWN = {  # on the screen: metric and short name
    "accuracy": "acc",
    "accuracy_corrected": "acc trained",
    "mixed_groups": "mixed",
    "mixed_groups_corrected": "mixed trained",
    "entropy": "entropy",
    "loss": "loss",
}
PHRASE = "Wait! Something is wrong here."


def share_mixed(values: list[Tensor]) -> float | None:
    """Share of groups, (G,) each, whose values are not all equal: 1 - the advantage collapse
    rate, where the values are rewards."""
    return mean(bool((v != v[0]).any()) for v in values)


def mean_variance(values: list[Tensor]) -> float:
    """Mean over groups, (G,) each, of the unbiased variance; 0 for groups of one."""
    if len(values[0]) == 1:
        return 0.0
    return torch.stack(values).var(dim=1).mean().item()


def mean_gap(pairs: list[tuple]) -> float | None:
    """Mean |difference| of two numbers per token over (one, other) pairs of (T,) columns, where
    both are known (not NaN). None if they never are."""
    gaps = [torch.zeros(0)]
    for one, other in pairs:
        gaps.append((torch.as_tensor(one) - torch.as_tensor(other)).abs())
    gaps = torch.cat(gaps)
    known = gaps[~gaps.isnan()]
    return known.mean().item() if len(known) else None


def measure(groups: list, everything: list, rewards: Callable, corrections: dict, flags) -> dict:
    """A step's numbers, by key of metrics.jsonl (docs/runs.md explains them).

    everything: all groups that were sampled for the step, also those that resampling replaced.
    rewards: responses -> (G,). corrections: edge_grpo.CORRECTIONS."""
    sampled = [r for group in everything for r in group.sampled]
    trained = [r for group in groups for r in group.responses]
    corrected = [r for r in trained if r.correction]
    sampled_rewards = [rewards(group.sampled) for group in everything]
    trained_rewards = [rewards(group.responses) for group in groups]
    sampled_entropy = torch.tensor([r.entropy for r in sampled], dtype=torch.float64)
    longest = flags.max_new_tokens + flags.correction_tokens
    logp_pairs = [(r.sampler_logp, r.trainer_logp) for r in trained if flags.top_p == 1]
    entropy_pairs = [(r.entropies, r.trainer_entropies) for r in trained if not any(r.injected)]
    numbers = {
        "reward": torch.stack(trained_rewards).mean().item(),
        "accuracy": mean(r.accuracy for r in sampled),
        "accuracy_corrected": mean(r.accuracy for r in trained),
        "format": mean(r.format for r in sampled),
        "mixed_groups": share_mixed(sampled_rewards),
        "mixed_groups_corrected": share_mixed(trained_rewards),
        "mixed_accuracy": share_mixed([accuracies(group.sampled) for group in everything]),
        "mixed_accuracy_corrected": share_mixed([accuracies(group.responses) for group in groups]),
        "advantage_variance": mean_variance([group.A for group in groups]),
        "advantage_variance_eda": mean_variance([group.A_hat for group in groups]),
        "entropy": torch.cat([group.P for group in groups]).mean().item(),
        "entropy_sampled": sampled_entropy.mean().item(),
        "sampled_tokens": sum(r.sampled_tokens for r in sampled + corrected),
        "response_tokens": mean(len(r.ids) for r in sampled),
        "truncated": mean(not r.finished for r in sampled),
        "self_reflection": mean(PHRASE in r.text for r in sampled),
        "over_long": sum(len(r.ids) > longest for r in trained),
        "logprob_gap": mean_gap(logp_pairs),
        "entropy_gap": mean_gap(entropy_pairs),
    }
    for name, correction in corrections.items():
        rows = [r for r in corrected if r.correction == name]
        numbers[correction.count] = len(rows)
        if correction.goes_on:
            numbers[f"{name}_fixed"] = sum(r.accuracy for r in rows)
    if not sampled:
        for key in OF_SAMPLES:
            numbers[key] = None
    return numbers | by_kind(groups, list(corrections))


OF_SAMPLES = (
    "accuracy_corrected",
    "mixed_groups_corrected",
    "mixed_accuracy_corrected",
    "advantage_variance",
    "advantage_variance_eda",
    "entropy_sampled",
    "logprob_gap",
    "entropy_gap",
)


def accuracies(responses: list) -> Tensor:
    return torch.tensor([r.accuracy for r in responses])


def kind(response) -> str:
    """The correction that made a response, or else "right" or "wrong"."""
    return response.correction or ("right" if response.accuracy else "wrong")


def by_kind(groups: list, corrections: list[str]) -> dict:
    """What EDA sees: mean P/mean of each kind of row, and the kind's share of the step's |A^|."""
    relative: dict[str, list[float]] = {name: [] for name in ("right", "wrong", *corrections)}
    weight = dict.fromkeys(relative, 0.0)
    for group in groups:
        rows = zip(group.responses, relative_entropy(group.P).tolist(), group.A_hat.tolist())
        for response, P_relative, a_hat in rows:
            relative[kind(response)].append(P_relative)
            weight[kind(response)] += abs(a_hat)
    total = sum(weight.values())
    numbers = {}
    for name in relative:
        numbers[f"relative_entropy_{name}"] = mean(relative[name])
        numbers[f"advantage_share_{name}"] = weight[name] / total if total else None
    return numbers


def relative_entropy(P: Tensor) -> Tensor:
    """P_i / mean_j P_j (G,) of a group, 1 where the group has no entropy."""
    average = P.mean()
    return P / average if average > 0 else torch.ones_like(P)


def readable(policy, groups: list, with_tokens: bool) -> list[dict]:
    """The rows of samples.jsonl: each response as text, before and after correction.

    with_tokens: also each token with its numbers, which `eval.py show --html` draws (about 40
    bytes a token)."""
    rows = []
    for group in groups:
        numbers = zip(group.A, group.A_hat, group.P, relative_entropy(group.P))
        for i, (trained, of_row) in enumerate(zip(group.responses, numbers)):
            sampled = group.sampled[i] if group.sampled else trained
            a, a_hat, entropy, relative = (x.item() for x in of_row)
            row = {
                "question_number": group.number + 1,
                "source": group.problem.source,
                "question": group.problem.question,
                "answers": list(group.problem.answers),
                "response": sampled.text,
                "accuracy": sampled.accuracy,
                "tokens": len(sampled.ids),
            }
            if trained is not sampled:
                row |= {
                    "correction": trained.correction,
                    "corrected": trained.text,
                    "accuracy_corrected": trained.accuracy,
                    "tokens_corrected": len(trained.ids),
                }
            row["segments"] = segments(policy, trained)
            if with_tokens:
                row |= {
                    "token_texts": [policy.decode_raw([token]) for token in trained.ids],
                    "token_injected": trained.injected,
                    "token_entropies": [round(h, 3) for h in trained.entropies],
                    "token_logp": [round(x, 3) for x in trained.trainer_logp.tolist()],
                }
            row |= {
                "advantage": a,
                "advantage_eda": a_hat,
                "entropy": entropy,
                "relative_entropy": relative,
            }
            rows.append(row)
    return rows


def segments(policy, response) -> list[list]:
    """The response's text in pieces [text, whether it was injected]."""
    pieces = []
    for injected, tokens in groupby(zip(response.ids, response.injected), key=lambda t: t[1]):
        pieces.append([policy.decode([token for token, _ in tokens]), injected])
    return pieces
