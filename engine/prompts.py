"""Prompts: the chat template, where a response stands in it, and the tokens that end a response."""

from contextlib import suppress
from datetime import date

import transformers

from errors import UserError

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
QWEN_TEMPLATE = (
    f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n<|im_start|>user\n{{question}}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QUESTION = "What is 1 + 1?"  # a chat template is tried with these two
RESPONSE = "The answer is 2."
TODAY = date(2024, 7, 26)  # what every chat template is told, so that prompts do not change daily


def clock_macro() -> str:
    """Returns a Jinja macro strftime_now(format) that always answers with TODAY."""
    replacements = ""
    for code in "aAbBdHIjmMpSyY":
        replacements += f"|replace('%{code}', '{TODAY.strftime('%' + code)}')"
    return "{% macro strftime_now(format) %}{{ format" + replacements + " }}{% endmacro %}\n"


CLOCK = clock_macro()


def prompt_text(
    tokenizer: transformers.PreTrainedTokenizerBase,
    question: str,
    template: str,
    response: str = "",
) -> str:
    """Returns the question in the model's chat template, or in ChatML if it has none.

    template "qwen": the instruction is the system turn. "llama": it follows the question in the
    user's turn (as in the paper). Without a response the assistant's turn is opened; with one, the
    turn holds it and is closed. Raises whatever the chat template raises.
    """
    if tokenizer.chat_template is None:
        if template == "llama":
            raise UserError(
                f"--model {tokenizer.name_or_path}: its tokenizer has no chat template, which a "
                "Llama prompt needs; use the Instruct model, or --template qwen"
            )
        prompt = QWEN_TEMPLATE.replace("{question}", question)
        return f"{prompt}{response}<|im_end|>" if response else prompt
    if template == "llama":
        messages = [{"role": "user", "content": f"{question} {INSTRUCTION}"}]
    else:
        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": question},
        ]
    if response:
        messages.append({"role": "assistant", "content": response})
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=not response,
        chat_template=CLOCK + tokenizer.get_chat_template(),
        date_string=TODAY.strftime("%d %b %Y"),
    )


def closed_turn(tokenizer, template: str) -> tuple[str, str] | None:
    """Returns the text before and after a response in a closed turn; None if that is unknown."""
    with suppress(Exception):  # some templates accept no response, but their prompts may be fine
        text = prompt_text(tokenizer, QUESTION, template, RESPONSE)
        before, found, after = text.rpartition(RESPONSE)
        if found:
            return before, after
    return None


def turn_end(tokenizer, template: str) -> int | None:
    """Returns the special token that the template puts after a response; None without one."""
    turn = closed_turn(tokenizer, template)
    if turn is None:
        return None
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    for token in tokenizer.encode(turn[1].strip(), add_special_tokens=False):
        if token in special and tokenizer.decode([token]).strip():
            return token
    return None


def find_end_ids(config, generation_config, tokenizer, template: str = "qwen") -> set[int]:
    """Returns every id that ends a sample: each file's end tokens, and the end of a turn.

    Raises ValueError, which names the file, for an id that the model cannot draw.
    """
    rows = config.get_text_config().vocab_size
    named = {
        "eos_token_id in generation_config.json": getattr(generation_config, "eos_token_id", None),
        "eos_token_id in config.json": getattr(config, "eos_token_id", None),
        "eos_token in tokenizer_config.json": tokenizer.eos_token_id,
        "the end of a turn in the chat template": turn_end(tokenizer, template),
    }
    end_ids = set()
    for place, ids in named.items():
        for end_id in ids if isinstance(ids, (list, tuple)) else [ids]:
            if end_id is None:
                continue
            if type(end_id) is not int:
                raise ValueError(f"{place} is {end_id!r}, not a token id")
            if not 0 <= end_id < rows:
                raise ValueError(f"{place} is id {end_id}, but the embedding has {rows} rows")
            end_ids.add(end_id)
    return end_ids


def saved_eos_token(tokenizer, template: str, end_id: int) -> str | None:
    """Returns the eos_token that tokenizer_config.json should name beside trained weights.

    It is the token that ends a turn, since some engines stop at the tokenizer's eos alone. Where a
    prompt would change with it, because the chat template prints eos_token, the old one stays.
    """
    original = tokenizer.eos_token
    if end_id == tokenizer.eos_token_id or end_id not in tokenizer.added_tokens_decoder:
        return original
    end_token = tokenizer.added_tokens_decoder[end_id].content
    prompt = prompt_text(tokenizer, QUESTION, template)
    tokenizer.eos_token = end_token
    changed = prompt_text(tokenizer, QUESTION, template) != prompt
    tokenizer.eos_token = original
    return original if changed else end_token
