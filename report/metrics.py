"""What a step of training did, as numbers (metrics.jsonl) and as text (samples.jsonl).

`groups` are the step's edge_grpo.Group objects after the update.
"""

from collections.abc import Callable, Iterable
from itertools import chain, groupby

import torch
from torch import Tensor

from report.tables import mean

SHOWN = {  # on the screen: metric and short name
    "accuracy": "acc",
    "accuracy_corrected": "acc trained",
    "mixed_accuracy": "mixed",
    "mixed_accuracy_corrected": "mixed trained",
    "entropy": "entropy",
    "loss": "loss",
}
PHRASE = "Wait! Something is wrong here."
OF_SAMPLES = (  # None in a step that samples nothing (SFT)
    "accuracy_corrected",
    "mixed_groups_corrected",
    "mixed_accuracy_corrected",
    "advantage_variance",
    "advantage_variance_eda",
    "entropy_sampled",
    "logprob_gap",
    "entropy_gap",
)


def measure(groups: list, everything: list, rewards: Callable, corrections: dict, flags) -> dict:
    """Return a step's numbers, by key of metrics.jsonl (docs/runs.md explains them).

    everything: all groups that were sampled for the step, also those that resampling replaced.
    rewards: responses -> (G,). corrections: edge_grpo.CORRECTIONS.
    """
    sampled_groups, trained_groups = column(everything, "sampled"), column(groups, "responses")
    sampled, trained = list(chain(*sampled_groups)), list(chain(*trained_groups))
    trained_rewards = list(map(rewards, trained_groups))
    sampled_P = torch.tensor(column(sampled, "entropy"), dtype=torch.float64)

    numbers = {}
    numbers["reward"] = torch.stack(trained_rewards).mean().item()
    numbers["accuracy"] = mean(column(sampled, "accuracy"))
    numbers["accuracy_corrected"] = mean(column(trained, "accuracy"))
    numbers["format"] = mean(column(sampled, "format"))
    numbers["mixed_groups"] = share_mixed(map(rewards, sampled_groups))
    numbers["mixed_groups_corrected"] = share_mixed(trained_rewards)
    numbers["mixed_accuracy"] = share_mixed(map(accuracies, sampled_groups))
    numbers["mixed_accuracy_corrected"] = share_mixed(map(accuracies, trained_groups))
    numbers["advantage_variance"] = mean_variance(column(groups, "A"))
    numbers["advantage_variance_eda"] = mean_variance(column(groups, "A_hat"))
    numbers["entropy"] = torch.cat(column(groups, "P")).mean().item()
    numbers["entropy_sampled"] = sampled_P.mean().item()
    numbers["response_tokens"] = mean(len(r.ids) for r in sampled)
    numbers["truncated"] = mean(not r.finished for r in sampled)
    numbers["self_reflection"] = mean(PHRASE in r.text for r in sampled)
    numbers["sampled_tokens"] = sum(column(sampled, "sampled_tokens"))
    numbers["over_long"] = 0
    for name, correction in corrections.items():
        numbers[correction.count] = 0
        if correction.continues:
            numbers[f"{name}_fixed"] = 0

    logp_pairs, entropy_pairs = [], []
    for r in trained:
        numbers["over_long"] += len(r.ids) > flags.max_new_tokens + flags.correction_tokens
        if r.correction:
            correction = corrections[r.correction]
            numbers[correction.count] += 1
            numbers["sampled_tokens"] += r.sampled_tokens
            if correction.continues:
                numbers[f"{r.correction}_fixed"] += r.accuracy
        if flags.top_p == 1:
            logp_pairs.append((r.sampler_logp, r.trainer_logp))
        if not any(r.injected):
            entropy_pairs.append((r.entropies, r.trainer_entropies))
    numbers["logprob_gap"] = mean_gap(logp_pairs)
    numbers["entropy_gap"] = mean_gap(entropy_pairs)
    if not sampled:
        numbers |= dict.fromkeys(OF_SAMPLES)
    return numbers | by_kind(groups, list(corrections))


def column(items: list, name: str) -> list:
    """Return one attribute of each item."""
    return [getattr(item, name) for item in items]


def accuracies(responses: list) -> Tensor:
    return torch.tensor(column(responses, "accuracy"))


def share_mixed(values: Iterable[Tensor]) -> float | None:
    """Return the share of groups, (G,) each, whose values are not all equal.

    Of rewards, that is 1 - the advantage collapse rate.
    """
    return mean(bool((v != v[0]).any()) for v in values)


def mean_variance(values: list[Tensor]) -> float:
    """Return the mean over groups, (G,) each, of the unbiased variance; 0 for groups of one."""
    if len(values[0]) == 1:
        return 0.0
    return torch.stack(values).var(dim=1).mean().item()


def mean_gap(pairs: list[tuple]) -> float | None:
    """Return the mean |difference| per token of (one, other) pairs of (T,) columns.

    Tokens that one side does not know (NaN) are left out; without any token it is None.
    """
    gaps = [torch.zeros(0)]
    for one, other in pairs:
        gaps.append((torch.as_tensor(one) - torch.as_tensor(other)).abs())
    gaps = torch.cat(gaps)
    known = gaps[~gaps.isnan()]
    return known.mean().item() if len(known) else None


def by_kind(groups: list, corrections: list[str]) -> dict:
    """Return what EDA sees: the mean P/mean of each kind of row, and its share of the step's |A^|.

    A row's kind is the correction that made it, or else "right" or "wrong".
    """
    relative = {name: [] for name in ("right", "wrong", *corrections)}
    weight = dict.fromkeys(relative, 0.0)
    for group in groups:
        P_relative = relative_entropy(group.P).tolist()
        for i, response in enumerate(group.responses):
            kind = response.correction or ("right" if response.accuracy else "wrong")
            relative[kind].append(P_relative[i])
            weight[kind] += abs(group.A_hat[i].item())
    total = sum(weight.values())
    numbers = {}
    for kind in relative:
        numbers[f"relative_entropy_{kind}"] = mean(relative[kind])
        numbers[f"advantage_share_{kind}"] = weight[kind] / total if total else None
    return numbers


def relative_entropy(P: Tensor) -> Tensor:
    """Return P_i / mean_j P_j (G,) of a group, 1 where the group has no entropy."""
    average = P.mean()
    return P / average if average > 0 else torch.ones_like(P)


def readable(policy, groups: list, with_tokens: bool) -> list[dict]:
    """Return the rows of samples.jsonl: each response as text, before and after correction.

    with_tokens: also each token with its numbers, which `eval.py show --html` draws (about 40
    bytes a token).
    """
    rows = []
    for group in groups:
        relative = relative_entropy(group.P)
        for i, trained in enumerate(group.responses):
            sampled = group.sampled[i] if group.sampled else trained
            row = {
                "question_number": group.number + 1,
                "source": group.problem.source,
                "question": group.problem.question,
                "answers": list(group.problem.answers),
                "response": sampled.text,
                "accuracy": sampled.accuracy,
                "tokens": len(sampled.ids),
                "segments": segments(policy, trained),
                "advantage": group.A[i].item(),
                "advantage_eda": group.A_hat[i].item(),
                "entropy": group.P[i].item(),
                "relative_entropy": relative[i].item(),
            }
            if trained is not sampled:
                row["correction"] = trained.correction
                row["corrected"] = trained.text
                row["accuracy_corrected"] = trained.accuracy
                row["tokens_corrected"] = len(trained.ids)
            if with_tokens:
                row["token_texts"] = [policy.decode_raw([token]) for token in trained.ids]
                row["token_injected"] = trained.injected
                row["token_entropies"] = [round(h, 3) for h in trained.entropies]
                row["token_logp"] = [round(x, 3) for x in trained.trainer_logp.tolist()]
            rows.append(row)
    return rows


def segments(policy, response) -> list[list]:
    """Return the response's text in pieces [text, whether it was injected]."""
    pieces = []
    for injected, tokens in groupby(zip(response.ids, response.injected), key=lambda t: t[1]):
        pieces.append([policy.decode([token for token, _ in tokens]), injected])
    return pieces
