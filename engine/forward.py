"""The training forward: micro-batches of prompts and responses -> log-probability, entropy of each response token."""

import functools
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from entropy import logprob_entropy
from rollout import has_llama_layers, rms_norm


def attend_rows(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    rows: list[Tensor] | None = None,
    home: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention of a packed micro-batch. q (1, heads, N, D), k and v (1, kv heads, N, D); rows and home as in `Batch`
    -> (1, N, heads, D). A causal row needs no mask for padding on its right. Without rows: transformers' own."""
    if rows is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=scaling, **others)
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (N, heads, D)
    outputs = []
    for tokens in rows:  # (b, S)
        of_rows = (
            t.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).transpose(1, 2)
            for t in (q, k, v)
        )
        out = F.scaled_dot_product_attention(
            *of_rows, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (b * S, heads, D)
    return torch.cat(outputs).index_select(0, home)[None], None


ROWS = "rows_of_a_packed_batch"  # the name under which transformers' models call it
AttentionInterface.register(ROWS, attend_rows)
AttentionMaskInterface.register(ROWS, sdpa_mask)


class Scorer(nn.Module):
    """Log-probability and entropy of given tokens: the trunk, then the output layer on response positions only.

    packed (the Llama family): the layers see a micro-batch as one string of tokens, in which the prompt of several
    responses stands once and nothing is padding; only attention takes it apart into rows. Other models see padded rows.
    A module, so that a sharded model (FSDP2) gathers its weights around the whole of it, output layer included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.packed = model, has_llama_layers(model)
        if self.packed:
            model.set_attn_implementation(ROWS)
            for norm in model.modules() if model.device.type == "cuda" else []:
                if hasattr(
                    norm, "variance_epsilon"
                ):  # one kernel instead of six, as in the sampler
                    norm.forward = functools.partial(rms_norm, norm)

    def forward(
        self, batch: "Batch", temperature: float, vocab_size: int, entropy_grad: bool = False
    ):
        """logp (M,) and entropy (M,) of the batch's M response tokens."""
        if batch.highest >= vocab_size:
            raise ValueError(
                f"a response has the id {batch.highest}, but the vocabulary ends at {vocab_size - 1}"
            )
        if self.packed:
            unused = torch.ones(
                1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device
            )  # else one is made, (N, N)
            out = self.model.base_model(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                attention_mask=unused,
                use_cache=False,
                rows=batch.rows,
                home=batch.home,
            )
            hidden = out.last_hidden_state[0]  # (N, H)
        else:
            [rows] = batch.rows
            out = self.model.base_model(input_ids=batch.ids[rows], use_cache=False)  # (b, S, H)
            hidden = out.last_hidden_state.flatten(0, 1).index_select(0, batch.home)
        weight = self.model.get_output_embeddings().weight  # (V, H)
        return logprob_entropy(
            hidden.index_select(0, batch.before),
            weight,
            batch.targets,
            temperature,
            vocab_size,
            entropy_grad,
        )


@dataclass
class Batch:
    """A micro-batch: some rows of a step (prompt and response, but for its last token, which is only predicted) as N
    tokens, each prompt once, and M response tokens to be scored."""

    index: list[int]  # which rows of the step
    ids: Tensor  # (N,)
    positions: Tensor  # (N,) of each token in its row
    rows: list[
        Tensor
    ]  # (b, S) each: the tokens (of N) that make up b rows of about one length, right-padded
    home: Tensor  # (N,) where each token is found in the flat concatenation of `rows`
    before: Tensor  # (M,) the token (of N) that precedes each response token
    targets: Tensor  # (M,) the response tokens, row after row
    highest: int  # the largest of them, known here so that no check has to wait for a GPU
    counts: list[int]  # how many of them each row has

    def tokens(self, rows: list):
        """One dataclass for each row of the step, whose fields are (T_i,) tensors or all None -> one of the same kind
        for this batch, whose fields are (M,) tensors on its device, or None."""

        def column(name: str) -> Tensor | None:
            if getattr(rows[0], name) is None:
                return None
            return torch.cat([torch.zeros(0), *(getattr(rows[i], name) for i in self.index)]).to(
                self.ids.device
            )

        return replace(rows[0], **{f.name: column(f.name) for f in fields(rows[0])})

    def by_row(self, *columns: Tensor) -> list[tuple[Tensor, ...]]:
        """The inverse: columns of one value per response token (M,) -> for each row of this batch its part of each,
        (T_i,) tensors on the CPU."""
        return list(zip(*(column.detach().cpu().split(self.counts) for column in columns)))


def micro_batches(
    prompts: list[list[int]],
    responses: list[list[int]],
    budget: int,
    device: torch.device,
    packed: bool = True,
) -> list[Batch]:
    """Batches of at most `budget` tokens, every row counted with its prompt (a longer row is alone), without the empty
    responses. Packed: in their order, so rows of one prompt stay together. Otherwise by length, and padding counts."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    groups, room = [], 0
    for i in sorted(
        (i for i, r in enumerate(responses) if r), key=lambda i: 0 if packed else -lengths[i]
    ):
        cost = lengths[i] if packed or not groups else lengths[groups[-1][0]]
        if not groups or cost > room:
            groups.append([])
            cost, room = lengths[i], budget
        groups[-1].append(i)
        room -= cost
    return [make_batch(group, prompts, responses, device, packed) for group in groups]


def make_batch(
    index: list[int],
    prompts: list[list[int]],
    responses: list[list[int]],
    device: torch.device,
    packed: bool = True,
) -> Batch:
    """These rows as one micro-batch. Packed: rows at least 0.85 times as long as another are padded to it. Otherwise
    all are padded to the longest, for a single forward."""
    index = sorted(index, key=lambda i: -len(prompts[i]) - len(responses[i]))
    ids, before, rows, starts = [], [], [], {}
    for i in index:
        prompt, fed = tuple(prompts[i]), responses[i][:-1]
        if prompt not in starts:
            starts[prompt] = len(ids)
            ids += prompt
        row = [
            *range(starts[prompt], starts[prompt] + len(prompt)),
            *range(len(ids), len(ids) + len(fed)),
        ]
        ids += fed
        before += row[len(prompt) - 1 :]
        rows.append(row)
    positions, home, padded, offset = [0] * len(ids), [0] * len(ids), [], 0
    while rows:
        width = len(rows[0])
        alike = sum(len(row) >= 0.85 * width for row in rows) if packed else len(rows)
        for row in rows[:alike]:
            for column, token in enumerate(row):
                positions[token], home[token] = column, offset + column
            offset += width
        padded.append([row + [0] * (width - len(row)) for row in rows[:alike]])
        rows = rows[alike:]
    tensor = functools.partial(torch.tensor, dtype=torch.long, device=device)
    targets = [token for i in index for token in responses[i]]
    return Batch(
        index,
        tensor(ids),
        tensor(positions),
        [tensor(row) for row in padded],
        tensor(home),
        tensor(before),
        tensor(targets),
        max(targets),
        [len(responses[i]) for i in index],
    )


@torch.no_grad()
def response_logprobs(
    model: nn.Module,
    prompts: list[list[int]],
    responses: list[list[int]],
    temperature: float,
    vocab_size: int,
    budget: int,
) -> list[tuple[Tensor, Tensor]]:
    """Scoring pass: per row (logp (T_i,), entropy (T_i,)), float32 on the CPU; an empty response has empty tensors."""
    scorer, scored = Scorer(model), [(torch.zeros(0), torch.zeros(0))] * len(responses)
    for batch in micro_batches(
        prompts, responses, budget, next(model.parameters()).device, scorer.packed
    ):
        for i, told in zip(batch.index, batch.by_row(*scorer(batch, temperature, vocab_size))):
            scored[i] = told
    return scored
