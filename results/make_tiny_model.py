r"""Makes the tiny world's tokenizer and model, data/tiny_model/, or a wider and deeper one.

    python -m results.make_tiny_model         # the shipped model: about two CPU minutes on one core
    python -m results.make_tiny_model --hidden 256 --layers 4 --out bigger --device cuda

The model learns step-by-step solutions, then to guess on the longer chains (see data/tiny.py).
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from data.tiny import (
    ITEMS,
    MAX_STEPS,
    NAMES,
    VERBS,
    Chain,
    final_line,
    full_solution,
    question,
    random_chain,
    split_of,
)

MODEL = Path(__file__).parents[1] / "data" / "tiny_model"

# --- Tokenizer -----------------------------------------------------------------------------------

REFLECT = " Wait! Something is wrong here."  # the paper's phrase before a second attempt
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, begin and end of a turn
WORDS = [f"({k})" for k in range(1, MAX_STEPS + 1)]
WORDS += ["\\boxed{", ". ", "How many?", *NAMES, " has "]
WORDS += [f" {item}" for item in ITEMS]
WORDS += [f" {verb} " for verb in sum(VERBS.values(), [])]
WORDS += ["The", " answer", " is", "Wait!", " Wait!", " Something", " wrong", " here"]
WORDS += ["After", " verification", " the", " correct"]
CHAT_TEMPLATE = (
    "{%- for message in messages if message['role'] != 'system' %}"
    "{{- '<|im_start|>' + message['content'] + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"
)


def prompt_text(question: str) -> str:
    """Return what the chat template renders for a question; the response follows it."""
    return f"<|im_start|>{question}<|im_end|><|im_start|>"


def make_tokenizer():
    r"""Return a Qwen2 tokenizer: the 256 bytes, three special tokens, the words of this world.

    Digits, words, `(k)` and `\boxed{` are single tokens, and blanks belong to the tokens, so that
    decoding is concatenation, byte for byte. Text from outside this world is spelled in bytes. The
    words are added tokens and not merges, because transformers rebuilds every Qwen2 tokenizer with
    a splitting rule that only added tokens come before.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return tokenizer


# --- Model and warm start ------------------------------------------------------------------------

STAGES = [(28000, False), (6400, True)]  # (rows, with guesses?), one after the other
GUESS_SHARE = [0.05, 0.1, 0.2, 0.5, 0.85, 0.94, 0.97, 0.98]  # of attempts at 1 to 8 steps
SECOND_ATTEMPTS = 0.25  # share of the rows that show a second attempt
BATCH, LEARNING_RATE, WARM_UP = 16, 1.5e-3, 50  # rows, of AdamW, updates


def make_model(tokenizer, hidden: int = 64, layers: int = 2):
    """Return a Qwen2 model with random weights, by default of 0.12 million parameters."""
    torch.manual_seed(0)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.64 / hidden**0.5,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)
    return model


def warm_start(model, tokenizer, share: float = 1.0) -> None:
    """Train the model on a share of STAGES with AdamW. The learning rate stays, then falls
    linearly to 0; wider models get a smaller one."""
    batches = []
    for rows_of_stage, guesses in STAGES:
        count = round(rows_of_stage * share)
        rng = random.Random(f"0 {guesses}")
        rows = [tokenized(training_row(rng, guesses), tokenizer) for _ in range(count)]
        rows.sort(key=lambda row: len(row[0]))  # rows of about equal length share a batch
        stage = [rows[i : i + BATCH] for i in range(0, count, BATCH)]
        rng.shuffle(stage)
        batches += stage
    peak = LEARNING_RATE * 8 / model.config.hidden_size**0.5
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    for step, batch in enumerate(batches):
        factor = min(1, (step + 1) / WARM_UP, 2 * (1 - step / len(batches)))
        optimizer.param_groups[0]["lr"] = peak * factor
        batch_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def warm_start_chain(rng: random.Random) -> Chain:
    steps = rng.randint(1, MAX_STEPS)
    while True:
        chain = random_chain(rng, steps)
        if split_of(chain) == "train":
            return chain


def training_row(rng: random.Random, guesses: bool) -> list[tuple[str, bool]]:
    """Return one row of the warm start as segments (text, whether it is learned).

    Some rows are a wrong attempt and REFLECT, which are not learned, and then a second attempt.
    """
    chain = warm_start_chain(rng)
    steps = len(chain[1])

    def attempt(mistake: tuple[int, int] = (0, 0)) -> str:
        if guesses and rng.random() < GUESS_SHARE[steps - 1]:
            return final_line(rng.randint(1, 99))
        return full_solution(chain, mistake)

    segments = [(prompt_text(question(chain, rng)), False)]
    if rng.random() < SECOND_ATTEMPTS:
        mistake = rng.randrange(steps), rng.choice([-10, -2, -1, 1, 2, 10])
        segments += [(attempt(mistake), False), (REFLECT, False), ("\n", True)]
    return [*segments, (attempt() + "<|im_end|>", True)]


def tokenized(row: list[tuple[str, bool]], tokenizer) -> tuple[list[int], list[bool]]:
    """Return the token ids of a row, and for each whether it is learned.

    Segments are tokenized one by one, as training appends them.
    """
    ids, learned = [], []
    for text, is_learned in row:
        segment = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += segment
        learned += [is_learned] * len(segment)
    return ids, learned


def batch_loss(model, batch: list[tuple[list[int], list[bool]]]):
    """Return the mean cross-entropy of the learned tokens of a batch."""
    ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True)  # (B, T)
    learned = pad_sequence([torch.tensor(mask) for _, mask in batch], batch_first=True)[:, 1:]
    ids, learned = ids.to(model.device), learned.to(model.device)
    hidden = model.model(ids[:, :-1]).last_hidden_state[learned]  # (learned tokens, H)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned])


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the tiny model.")
    parser.add_argument("--out", type=Path, default=MODEL, help="folder [data/tiny_model]")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size, 32 x N [64]")
    parser.add_argument("--layers", type=int, default=2, help="[2]")
    parser.add_argument("--share", type=float, default=1.0, help="of the warm start's rows [1]")
    parser.add_argument("--device", default="cpu", help="[cpu]")
    flags = parser.parse_args()
    torch.set_num_threads(1)  # the order of additions depends on the number of threads
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, flags.hidden, flags.layers).to(flags.device)
    warm_start(model, tokenizer, flags.share)
    model.save_pretrained(flags.out)
    tokenizer.save_pretrained(flags.out, save_jinja_files=False)


if __name__ == "__main__":
    main()
