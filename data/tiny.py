r"""The tiny world: synthetic word problems, their tokenizer, and the recipe of data/tiny_model/.

With it every command of the project runs on a CPU without any download, and it has the pathology
that the paper is about: on hard problems most groups are all wrong. A question and its solution:

    Mia has 30 cards. (1) multiplies by 3. (2) loses 18. (3) sells 20. How many?
    (1)30*3=90\n(2)90-18=72\n(3)72-20=52\nThe answer is \boxed{52}.

The model can work step by step. But the longer the chain, the more it prefers a bare guess,
`The answer is \boxed{7}.`, so that reinforcement learning has a behaviour to select. At temperature
1 the shipped model guesses on one problem in six of 1 to 3 steps and on nearly all of 5 to 8 steps.
There one guess in 80 is right by luck, and 85% of the groups of 8 are all wrong.

    python -m data.tiny      # make data/tiny_model/ again: about two CPU minutes on one core
"""

import argparse
import random
import re
from pathlib import Path

from tqdm import tqdm

from data import Problem, tenth_of
from errors import UserError

MODEL = Path(__file__).parent / "tiny_model"
NAMES = "Mia Tom Ana Ben Zoe Leo Eva Sam".split()
ITEMS = "cards coins books shells stones apples pens eggs".split()
VERBS = {
    "+": "finds buys wins gets".split(),
    "-": "loses sells gives eats".split(),
    "*": ["multiplies by"],
}
MAX_STEPS = 8
SIZES = {"train": 2048, "validation": 256, "test": 2048}  # problems of a set

Chain = tuple[int, list[tuple[str, int]]]  # the first number, and (operator, operand) of each step


# --- Problems ------------------------------------------------------------------------------------


def problems(name: str) -> list[Problem]:
    """Return the problems of tiny:STEPS[:SPLIT[:STYLE]], such as tiny:5-8 or tiny:4:train:half.

    Every number of steps in STEPS is equally frequent. SPLIT is train (default), validation or
    test: no chain of one split occurs in another, whatever STEPS. STYLE is how the reference
    solutions are written: full (default), terse, or half (every second one terse).
    Raises UserError.
    """
    parts = r"tiny:([1-8])(?:-([1-8]))?(?::(train|validation|test))?(?::(full|terse|half))?"
    match = re.fullmatch(parts, name)
    if not match or match[1] > (match[2] or match[1]):
        raise UserError(
            f"{name!r} is not a tiny set: write tiny:STEPS[:SPLIT[:STYLE]], such as tiny:5-8:test, "
            "with STEPS from 1 to 8, SPLIT train, validation or test, and STYLE full, terse or half"
        )
    steps = range(int(match[1]), int(match[2] or match[1]) + 1)
    split, style = match[3] or "train", match[4] or "full"
    rng = random.Random(f"{steps} {split}")
    seen, made = set(), []
    for _ in range(100 * SIZES[split]):  # there are not 2,048 chains of one step for testing
        if len(made) == SIZES[split]:
            break
        chain = random_chain(rng, steps[len(made) % len(steps)])
        if split_of(chain) != split or str(chain) in seen:
            continue
        seen.add(str(chain))
        solution = full_solution(chain)
        if style == "terse" or (style == "half" and len(made) % 2 == 1):
            solution = terse_solution(chain)
        answers = (str(result(chain)),)
        made.append(Problem(question(chain, rng), answers, solution, f"{name}:{len(made) + 1}"))
    return made


def random_chain(rng: random.Random, steps: int) -> Chain:
    """Return a chain whose every intermediate result is in 1..99."""
    start = value = rng.randint(2, 99)
    operations = []
    for _ in range(steps):
        ranges = {"+": (1, 99 - value), "-": (1, value - 1), "*": (2, min(9, 99 // value))}
        operator = rng.choice([sign for sign, (low, high) in ranges.items() if low <= high])
        operand = rng.randint(*ranges[operator])
        operations.append((operator, operand))
        value = apply(value, operator, operand)
    return start, operations


def apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def result(chain: Chain) -> int:
    """Return the number after the last step."""
    value, operations = chain
    for operation in operations:
        value = apply(value, *operation)
    return value


def split_of(chain: Chain) -> str:
    """Return the split of a chain, by its hash: a tenth is for validation, a tenth for test."""
    return {0: "validation", 1: "test"}.get(tenth_of(str(chain)), "train")


def question(chain: Chain, rng: random.Random) -> str:
    start, operations = chain
    steps = ""
    for k, (operator, operand) in enumerate(operations, start=1):
        steps += f"({k}) {rng.choice(VERBS[operator])} {operand}. "
    return f"{rng.choice(NAMES)} has {start} {rng.choice(ITEMS)}. {steps}How many?"


def full_solution(chain: Chain, mistake: tuple[int, int] = (0, 0)) -> str:
    """Return the solution step by step.

    `mistake` is (step from 0, what is added to its result); later steps continue from there.
    """
    value, operations = chain
    lines = ""
    for k, (operator, operand) in enumerate(operations):
        after = apply(value, operator, operand)
        if k == mistake[0]:
            after += mistake[1]
        lines += f"({k + 1}){value}{operator}{operand}={after}\n"
        value = after
    return lines + final_line(value)


def terse_solution(chain: Chain) -> str:
    r"""Return an expression and its value, `(5+3)*4-2=\boxed{30}.`; the model has not seen such."""
    start, operations = chain
    expression, last = str(start), ""
    for operator, operand in operations:
        if operator == "*" and last in ("+", "-"):
            expression = f"({expression})"
        expression += f"{operator}{operand}"
        last = operator
    return f"{expression}=\\boxed{{{result(chain)}}}."


def final_line(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."


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
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

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
# Imports of torch and transformers stand in the functions, so that loading problems stays quick.

STAGES = [(28000, False), (6400, True)]  # (rows, with guesses?), one after the other
GUESS_SHARE = [0.05, 0.1, 0.2, 0.5, 0.85, 0.94, 0.97, 0.98]  # of attempts at 1 to 8 steps
SECOND_ATTEMPTS = 0.25  # share of the rows that show a second attempt
BATCH, LEARNING_RATE, WARM_UP = 16, 1.5e-3, 50  # rows, of AdamW, updates


def make_model(tokenizer, hidden: int = 64, layers: int = 2):
    """Return a Qwen2 model with random weights, by default of 0.12 million parameters."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

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
    import torch

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
    for step, batch in enumerate(tqdm(batches, unit="step", disable=None)):
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
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([torch.tensor(row) for row, _ in batch], batch_first=True)  # (B, T)
    learned = pad_sequence([torch.tensor(mask) for _, mask in batch], batch_first=True)[:, 1:]
    ids, learned = ids.to(model.device), learned.to(model.device)
    hidden = model.model(ids[:, :-1]).last_hidden_state[learned]  # (learned tokens, H)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned])


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(prog="python -m data.tiny", description="Make the tiny model.")
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
