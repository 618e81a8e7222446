"""Whether a model's logits are what entropy.py computes: hidden states times the output matrix."""

import torch

from entropy import mm_wide

SOFT_CAPS = (  # of Gemma, Griffin, xLSTM
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)


def check_output_layer(model: torch.nn.Module) -> None:
    """Raises ValueError unless the logits of the model, in eval mode, are hidden @ weight.T."""
    reason = find_extra_step(model)
    if reason is not None:
        raise ValueError(
            f"The logits of {type(model).__name__} are not the last hidden state times the output "
            f"matrix, as entropy.py assumes: {reason}; take another model."
        )


@torch.no_grad()
def find_extra_step(model: torch.nn.Module) -> str | None:
    """What else the model does to its logits: a bias, a soft cap (which hardly shows in small
    logits, so the config is asked), or a scale (which shows in the logits of a few tokens)."""
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        return "it has no output matrix"
    if getattr(head, "bias", None) is not None:
        return "its output layer has a bias"
    config = model.config.get_text_config()
    for name in SOFT_CAPS:
        if getattr(config, name, None):
            return f"it caps its logits ({name} in its config)"
    ids = torch.arange(4, device=head.weight.device)[None]  # (1, 4)
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    product = mm_wide(hidden, head.weight.T)
    gap = (model(input_ids=ids).logits[0] - product).abs().max()
    if gap > 0.02 * product.abs().max():  # bf16 logits are within 0.4%
        return "some models scale them"
    return None
