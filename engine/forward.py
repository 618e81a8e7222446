"""The training forward pass: prompts and responses -> log-probability and entropy of each token."""

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

# --- Micro-batches ---------------------------------------------------------------------------


@dataclass
class Batch:
    """A micro-batch: whole rows (a prompt with its response), never parts of a row.

    The N tokens hold each prompt once, however many of its responses follow, and each response
    without its last token, which is only a target. M counts the response tokens. `make_batch` has
    an example."""

    rows: list[int]  # which rows of the step, in the order of their tokens below
    lengths: list[int]  # response tokens of each of them; they sum to M
    ids: Tensor  # (N,)
    positions: Tensor  # (N,) position of each token in its row
    padded_rows: list[Tensor]  # (b, S) each: b rows of similar length as indices into the N tokens
    place: Tensor  # (N,) index of each token in the concatenated, flattened `padded_rows`
    previous: Tensor  # (M,) index into the N tokens: the token before each response token
    targets: Tensor  # (M,) the response tokens
    max_target: int  # the largest of them, kept on the host so that no check waits for a GPU

    def join(self, tokens: list):
        """Per-token columns of the step's rows -> those of this batch.

        `tokens` has one dataclass for each row of the step, whose fields are (T_i,) tensors, or
        None in all rows. Returns one of the same class with (M,) tensors on this batch's device."""
        columns = {}
        for field in fields(tokens[0]):
            first = getattr(tokens[0], field.name)
            if first is not None:
                parts = [getattr(tokens[row], field.name) for row in self.rows]
                column = torch.cat(parts) if parts else first[:0]
                columns[field.name] = column.to(self.ids.device)
        return replace(tokens[0], **columns)

    def by_row(self, *columns: Tensor) -> dict[int, tuple[Tensor, ...]]:
        """(M,) tensors -> for each row its part of each of them, (T_i,) on the CPU, detached."""
        parts = [column.detach().cpu().split(self.lengths) for column in columns]
        return dict(zip(self.rows, zip(*parts)))


def make_batches(
    prompts: list[list[int]],
    responses: list[list[int]],
    rows: list[int],
    budget: int,
    device: torch.device,
    packed: bool,
) -> list[Batch]:
    """Micro-batches of the given rows, each of at most `budget` tokens unless it is a single row.

    Every row counts with its prompt; rows without a response are left out. Packed batches keep
    the order of the rows, so that rows of one prompt stay together. Without packing, a batch is
    padded to its longest row, so rows are sorted by length and padding counts."""
    lengths = {row: len(prompts[row]) + len(responses[row]) for row in rows if responses[row]}
    order = list(lengths)
    if not packed:
        order.sort(key=lambda row: -lengths[row])
    chunks: list[list[int]] = []
    room = 0
    for row in order:
        cost = lengths[row]
        if chunks and not packed:
            cost = lengths[chunks[-1][0]]
        if not chunks or cost > room:
            chunks.append([])
            room = budget
            cost = lengths[row]
        chunks[-1].append(row)
        room -= cost
    return [make_batch(prompts, responses, chunk, device, packed) for chunk in chunks]


def make_batch(
    prompts: list[list[int]],
    responses: list[list[int]],
    rows: list[int],
    device: torch.device,
    packed: bool,
) -> Batch:
    """The given rows as one micro-batch. No rows: an empty batch of one token and M = 0.

    Example: two responses [e f g] and [c d] to the prompt [a b], packed. The last tokens g and d
    are targets only.

        ids          a b e f c          N = 5
        positions    0 1 2 3 2
        padded_rows  [0 1 2 3]          a b e f
                     [0 1 4]            a b c, in a second block, as its length is another
        place        4 5 2 3 6          in 0 1 2 3 0 1 4; a and b stand in both rows
        targets      e f g c d          M = 5
        previous     1 2 3 1 4          the token before each: b e f b c
    """
    rows = sorted(rows, key=lambda row: -len(prompts[row]) - len(responses[row]))
    ids, previous, indices = [], [], []
    prompt_start: dict[tuple, int] = {}
    for row in rows:
        prompt = tuple(prompts[row])
        fed = responses[row][:-1]
        if prompt not in prompt_start:
            prompt_start[prompt] = len(ids)
            ids += prompt
        start = prompt_start[prompt]
        index = [*range(start, start + len(prompt)), *range(len(ids), len(ids) + len(fed))]
        ids += fed
        previous += index[len(prompt) - 1 :]
        indices.append(index)
    if not rows:
        ids, indices = [0], [[0]]
    positions, place, padded_rows = arrange(indices, len(ids), packed)
    targets = [token for row in rows for token in responses[row]]
    tensor = functools.partial(torch.tensor, dtype=torch.long, device=device)
    return Batch(
        rows=rows,
        lengths=[len(responses[row]) for row in rows],
        ids=tensor(ids),
        positions=tensor(positions),
        padded_rows=[tensor(block) for block in padded_rows],
        place=tensor(place),
        previous=tensor(previous),
        targets=tensor(targets),
        max_target=max(targets, default=-1),
    )


def arrange(
    rows: list[list[int]], count: int, packed: bool
) -> tuple[list[int], list[int], list[list[list[int]]]]:
    """positions, place and padded_rows of a Batch, from its rows as indices into `count` tokens."""
    positions, place = [0] * count, [0] * count
    padded_rows = []
    offset = 0
    for block in blocks_of_similar_length(rows, packed):
        width = len(block[0])
        for index in block:
            for position, token in enumerate(index):
                positions[token] = position
                # A prompt token stands in several rows. Causal attention gives it the same
                # output in each of them, so any one will do.
                place[token] = offset + position
            offset += width
        padded_rows.append([index + [0] * (width - len(index)) for index in block])
    return positions, place, padded_rows


def blocks_of_similar_length(rows: list[list[int]], packed: bool) -> list[list[list[int]]]:
    """Splits rows, longest first, into blocks whose shortest row has at least 0.85 times the
    length of the longest. Not packed: one block, for a single forward pass."""
    blocks: list[list[list[int]]] = []
    for row in rows:
        if not blocks or (packed and len(row) < 0.85 * len(blocks[-1][0])):
            blocks.append([])
        blocks[-1].append(row)
    return blocks


# --- The forward pass ------------------------------------------------------------------------


def attend_packed(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    padded_rows: list[Tensor] | None = None,
    place: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """Attention inside each row of a packed batch, called by transformers' layers.

    q (1, heads, N, D), k and v (1, kv heads, N, D) -> (1, N, heads, D). Rows are padded on the
    right, where causal attention never looks. Without `padded_rows`: transformers' own sdpa."""
    if padded_rows is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, scaling=scaling, **others)
    by_token = [t[0].transpose(0, 1) for t in (q, k, v)]  # (N, heads, D)
    outputs = []
    for index in padded_rows:  # (b, S)
        of_rows = [t.index_select(0, index.flatten()) for t in by_token]
        of_rows = [t.unflatten(0, index.shape).transpose(1, 2) for t in of_rows]  # (b, heads, S, D)
        out = F.scaled_dot_product_attention(
            *of_rows, is_causal=True, scale=scaling, enable_gqa=True
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (b * S, heads, D)
    return torch.cat(outputs).index_select(0, place)[None], None


PACKED = "rows_of_a_packed_batch"  # the name under which transformers' layers call it
AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)


class ForwardPass(nn.Module):
    """Log-probability and entropy of response tokens: the trunk, then the output layer on
    response positions only.

    packed (the Llama family): the layers see a micro-batch as one string of N tokens without
    padding; only attention takes it apart into rows. Other families see padded rows.
    It is a module so that FSDP2 gathers the weights around all of it, output layer included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.packed = has_llama_layers(model)
        if not self.packed:
            return
        model.set_attn_implementation(PACKED)
        if model.device.type == "cuda":
            for norm in model.modules():
                if hasattr(norm, "variance_epsilon"):  # one kernel instead of six, as in sampling
                    norm.forward = functools.partial(rms_norm, norm)

    def forward(
        self, batch: Batch, temperature: float, vocab_size: int, entropy_grad: bool = False
    ) -> tuple[Tensor, Tensor]:
        """logp (M,) and entropy (M,) of the batch's response tokens under softmax(z / T)."""
        if batch.max_target >= vocab_size:
            raise ValueError(
                f"a response has the id {batch.max_target}, "
                f"but the vocabulary ends at {vocab_size - 1}"
            )
        if self.packed:
            # transformers builds an (N, N) mask unless it is given one; attend_packed reads none.
            unused_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.ids.device)
            out = self.model.base_model(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                attention_mask=unused_mask,
                use_cache=False,
                padded_rows=batch.padded_rows,
                place=batch.place,
            )
            hidden = out.last_hidden_state[0]  # (N, H)
        else:
            [padded] = batch.padded_rows
            out = self.model.base_model(input_ids=batch.ids[padded], use_cache=False)  # (b, S, H)
            hidden = out.last_hidden_state.flatten(0, 1).index_select(0, batch.place)
        return logprob_entropy(
            hidden.index_select(0, batch.previous),
            self.model.get_output_embeddings().weight,
            batch.targets,
            temperature,
            vocab_size,
            entropy_grad,
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
    """(logp (T_i,), entropy (T_i,)) of each row, float32 on the CPU, without a gradient.

    `budget` is the number of tokens in one forward pass. An empty response has empty tensors."""
    forward_pass = ForwardPass(model)
    device = next(model.parameters()).device
    by_row = {}
    rows = list(range(len(responses)))
    for batch in make_batches(prompts, responses, rows, budget, device, forward_pass.packed):
        by_row |= batch.by_row(*forward_pass(batch, temperature, vocab_size))
    empty = (torch.zeros(0), torch.zeros(0))
    return [by_row.get(row, empty) for row in rows]
