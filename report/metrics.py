"""What a step of training did, in numbers (metrics.jsonl) and as text (samples.jsonl).

`sampled` are all responses as the policy sampled them, `trained` those that the loss saw, after correction: lists of
edge_grpo.Response. Tensors are (Q, G).
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from report.tables import mean

SHOWN = {
    "accuracy": "acc",
    "accuracy_corrected": "corrected",
    "mixed_groups": "mixed",
    "mixed_groups_corrected": "mixed corrected",
    "entropy": "entropy",
    "loss": "loss",
}  # on the screen
OF_SAMPLES = (
    "accuracy",
    "accuracy_corrected",
    "format",
    "mixed_groups",
    "mixed_groups_corrected",
    "advantage_variance",
    "advantage_variance_eda",
    "entropy_sampled",
    "response_tokens",
    "truncated",
    "self_reflection",
    "logprob_gap",
    "entropy_gap",
)  # undefined where nothing was sampled (SFT)


def share_mixed(rewards: Tensor) -> float:
    """Share of groups whose rewards are not all equal (1 - the advantage collapse rate)."""
    return (rewards != rewards[:, :1]).any(dim=1).double().mean().item()


def mean_variance(values: Tensor) -> float:
    """Mean over groups of the unbiased variance inside the group; 0 for groups of one."""
    return values.var(dim=1).mean().item() if values.shape[1] > 1 else 0.0


def mean_gap(responses: list, one: Callable, other: Callable) -> float | None:
    """Mean |difference| of two numbers known of each token, where both are; None if they never are."""
    gaps = [(torch.as_tensor(one(r)) - torch.as_tensor(other(r))).abs() for r in responses]
    gaps = torch.cat([torch.zeros(0), *gaps])
    known = gaps[~gaps.isnan()]
    return known.mean().item() if len(known) else None


def measure(
    sampled: list,
    trained: list,
    A: Tensor,
    A_hat: Tensor,
    rewards: Callable[[list], Tensor],
    corrections: dict,
    flags,
) -> dict:
    """What a step did, as one flat dict: keys of metrics.jsonl, explained in the README."""
    r_QG = rewards(trained)
    m = dict(
        reward=r_QG.mean().item(),
        accuracy=mean(r.accuracy for r in sampled),
        accuracy_corrected=mean(r.accuracy for r in trained),
        format=mean(r.format for r in sampled),
        mixed_groups=share_mixed(rewards(sampled)),
        mixed_groups_corrected=share_mixed(r_QG),
        advantage_variance=mean_variance(A),
        advantage_variance_eda=mean_variance(A_hat),
        entropy=torch.tensor([r.entropy for r in trained], dtype=torch.float64).mean().item(),
        entropy_sampled=torch.tensor([r.entropy for r in sampled], dtype=torch.float64)
        .mean()
        .item(),
        sampled_tokens=sum(r.sampled for r in [*sampled, *(r for r in trained if r.correction)]),
        response_tokens=mean(len(r.ids) for r in sampled),
        truncated=mean(not r.finished for r in sampled),
        self_reflection=mean("Wait! Something is wrong here." in r.text for r in sampled),
        over_long=sum(len(r.ids) > flags.max_new_tokens + flags.correction_tokens for r in trained),
        logprob_gap=mean_gap(trained, lambda r: r.logprobs, lambda r: r.logp)
        if flags.top_p == 1
        else None,
        entropy_gap=mean_gap(
            [r for r in trained if not any(r.injected)],
            lambda r: r.entropies,
            lambda r: r.trainer_entropies,
        ),
    )
    for name, correction in corrections.items():
        rows = [r for r in trained if r.correction == name]
        m[correction.count] = len(rows)
        if correction.goes_on:
            m[f"{name}_fixed"] = sum(r.accuracy for r in rows)
    return m | dict.fromkeys(OF_SAMPLES) if flags.sft else m


def readable(
    policy, responses: list, trained: list, A: Tensor, A_hat: Tensor, with_tokens: bool
) -> list[dict]:
    """The rows of samples.jsonl: each rollout as text, before and after correction; with_tokens (about 40 bytes a
    token): what eval.py show --html draws."""
    rows, G, used = [], A.shape[1], {i for t in trained for i in t.ids} if with_tokens else ()
    texts = {i: policy.decode_raw([i]) for i in used}
    for i, (r, t, a, a_hat) in enumerate(
        zip(responses, trained, A.flatten().tolist(), A_hat.flatten().tolist())
    ):
        row = dict(
            question_number=i // G + 1,
            source=r.problem.source,
            question=r.problem.question,
            answers=list(r.problem.answers),
            response=r.text,
            accuracy=r.accuracy,
            tokens=len(r.ids),
        )
        if t is not r:
            row.update(
                correction=t.correction,
                corrected=t.text,
                accuracy_corrected=t.accuracy,
                tokens_corrected=len(t.ids),
            )
        parts = groupby(zip(t.ids, t.injected), key=lambda token: token[1])
        row.update(
            segments=[[policy.decode([i for i, _ in part]), injected] for injected, part in parts]
        )
        if with_tokens:
            row.update(
                token_texts=[texts[i] for i in t.ids],
                token_injected=t.injected,
                token_entropies=[round(h, 3) for h in t.entropies],
                token_logp=[round(p, 3) for p in t.logp.tolist()],
            )
        rows.append(row | dict(advantage=a, advantage_eda=a_hat, entropy=t.entropy))
    return rows
