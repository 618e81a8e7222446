r"""The tiny world: synthetic chain word problems, their tokenizer, and the recipe of the model in data/tiny_model/.

It lets every command of the project run on a CPU from nothing downloaded, with the pathology that the paper is about:
most groups on hard problems are all wrong. A question and its reference solution look like this:

    Mia has 30 cards. (1) multiplies by 3. (2) loses 18. (3) sells 20. How many?
    (1)30*3=90\n(2)90-18=72\n(3)72-20=52\nThe answer is \boxed{52}.

The model can work step by step, but the longer the chain the more it prefers a bare guess, `The answer is \boxed{7}.`,
so that reinforcement learning has a behaviour to select.

    python -m data.tiny                      # make data/tiny_model/ anew: about two CPU minutes on one core

At temperature 1 the shipped model guesses at one problem in six of 1 to 3 steps and at nearly all of 5 to 8 steps,
where one guess in 80 is right by luck and 85% of the groups of 8 are all wrong.
"""

import argparse
import hashlib
import random
import re
from pathlib import Path

from tqdm import tqdm

from data import Problem
from errors import UserError

MODEL = Path(__file__).parent / "tiny_model"
NAMES = ["Mia", "Tom", "Ana", "Ben", "Zoe", "Leo", "Eva", "Sam"]
ITEMS = ["cards", "coins", "books", "shells", "stones", "apples", "pens", "eggs"]
VERBS = {
    "+": ["finds", "buys", "wins", "gets"],
    "-": ["loses", "sells", "gives", "eats"],
    "*": ["multiplies by"],
}
MAX_STEPS = 8
SIZES = {"train": 2048, "validation": 256, "test": 2048}
STYLES = ("full", "terse", "half")
REFLECT = " Wait! Something is wrong here."  # the paper's reflection phrase; the warm start shows what may follow it

Chain = tuple[
    int, list[tuple[str, int]]
]  # the starting number, then (operator, operand) of each step


# --- Problems --------------------------------------------------------------------------------------------------------


def problems(name: str) -> list[Problem]:
    """The problems of `tiny:STEPS[:SPLIT[:STYLE]]`, for example tiny:5-8, tiny:4:test or tiny:5-8:train:half.

    Every number of steps in STEPS is equally frequent. SPLIT is train (default), validation or test: no chain of one
    split occurs in another, whatever STEPS. STYLE is that of the reference solutions: full (default), terse, or half
    (every second one terse). Raises UserError.
    """
    steps, split, style = _parts(name)
    rng, seen, found = random.Random(f"{steps} {split}"), set(), []
    while len(found) < SIZES[split]:
        chain = random_chain(rng, steps[len(found) % len(steps)])
        if split_of(chain) == split and str(chain) not in seen:
            seen.add(str(chain))
            terse = style == "terse" or style == "half" and len(found) % 2 == 1
            solution = terse_solution(chain) if terse else full_solution(chain)
            answers = (str(results(chain)[-1]),)
            found.append(
                Problem(question(chain, rng), answers, solution, f"{name}:{len(found) + 1}")
            )
    return found


def _parts(name: str) -> tuple[range, str, str]:
    match = re.fullmatch(r"tiny:(\d)(?:-(\d))?(?::(\w+))?(?::(\w+))?", name, re.ASCII)
    first, last, split, style = match.groups() if match else ("0", None, None, None)
    steps, split, style = (
        range(int(first), int(last or first) + 1),
        split or "train",
        style or "full",
    )
    if not (
        steps and 1 <= steps[0] and steps[-1] <= MAX_STEPS and split in SIZES and style in STYLES
    ):
        raise UserError(
            f"{name!r} is not a tiny set: it is tiny:STEPS[:SPLIT[:STYLE]], such as tiny:5-8:test, with "
            f"STEPS from 1 to {MAX_STEPS}, SPLIT of {', '.join(SIZES)}, and STYLE of {', '.join(STYLES)}"
        )
    return steps, split, style


def random_chain(rng: random.Random, steps: int) -> Chain:
    """A chain whose every intermediate result lies in 1..99."""
    start = value = rng.randint(2, 99)
    operations = []
    for _ in range(steps):
        possible = {"+": value < 99, "-": value > 1, "*": value < 50}
        operator = rng.choice([operator for operator in possible if possible[operator]])
        low, high = {"+": (1, 99 - value), "-": (1, value - 1), "*": (2, min(9, 99 // value))}[
            operator
        ]
        operand = rng.randint(low, high)
        operations.append((operator, operand))
        value = apply(value, operator, operand)
    return start, operations


def apply(value: int, operator: str, operand: int) -> int:
    return {"+": value + operand, "-": value - operand, "*": value * operand}[operator]


def results(chain: Chain) -> list[int]:
    """The number after each step; the last one is the answer."""
    value, operations = chain
    return [value := apply(value, *operation) for operation in operations]


def split_of(chain: Chain) -> str:
    """The one split that a chain can be in, whatever the names around it: by its hash, a tenth each is held out."""
    return {0: "validation", 1: "test"}.get(
        hashlib.sha256(str(chain).encode()).digest()[0] % 10, "train"
    )


def question(chain: Chain, rng: random.Random) -> str:
    steps = [
        f"({k}) {rng.choice(VERBS[sign])} {operand}."
        for k, (sign, operand) in enumerate(chain[1], start=1)
    ]
    return f"{rng.choice(NAMES)} has {chain[0]} {rng.choice(ITEMS)}. {' '.join(steps)} How many?"


def full_solution(chain: Chain, mistakes: dict[int, int] | None = None) -> str:
    """Step by step. `mistakes` maps a step (from 0) to what is added to its result; later steps go on from there."""
    value, operations = chain
    lines = []
    for k, (operator, operand) in enumerate(operations):
        result = apply(value, operator, operand) + (mistakes or {}).get(k, 0)
        lines.append(f"({k + 1}){value}{operator}{operand}={result}\n")
        value = result
    return "".join(lines) + final_line(value)


def terse_solution(chain: Chain) -> str:
    r"""One expression and its value without the steps, `(5+3)*4-2=\boxed{30}.`: a style foreign to the model."""
    expression, last = str(chain[0]), ""
    for operator, operand in chain[1]:
        expression = f"({expression})" if operator == "*" and last in ("+", "-") else expression
        expression, last = f"{expression}{operator}{operand}", operator
    return f"{expression}=\\boxed{{{results(chain)[-1]}}}."


def final_line(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."


# --- Tokenizer -------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # padding, begin and end of a turn
WORDS = (
    [f"({k})" for k in range(1, MAX_STEPS + 1)]
    + ["\\boxed{", ". ", "How many?"]
    + NAMES
    + [" has "]
    + [f" {item}" for item in ITEMS]
    + [f" {verb} " for verbs in VERBS.values() for verb in verbs]
    + ["The", " answer", " is", "Wait!", " Wait!", " Something", " wrong", " here"]
    + ["After", " verification", " the", " correct"]
)
CHAT_TEMPLATE = (
    "{%- for message in messages if message['role'] != 'system' %}"
    "{{- '<|im_start|>' + message['content'] + '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}"
)


def make_tokenizer():
    r"""A Qwen2 tokenizer whose vocabulary is the 256 bytes, three special tokens and the words of the tiny world.

    Digits, words, `(k)` and `\boxed{` are single tokens and blanks belong to the tokens, so that decoding is
    concatenation, byte for byte; text from outside this world is spelled in bytes. The words are added tokens and not
    merges: transformers rebuilds the tokenizer of every Qwen2 model with a splitting rule that only those come before.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer

    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet,
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        special_tokens=True,
    )
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return tokenizer


def prompt_text(question: str) -> str:
    """What the chat template renders; the reply follows."""
    return f"<|im_start|>{question}<|im_end|><|im_start|>"


# --- Model and warm start --------------------------------------------------------------------------------------------
# torch and transformers are imported where they are used, so that loading problems does not wait for them.

STAGES = [(28000, False), (6400, True)]  # (rows, with guesses?), one after the other
GUESS_SHARE = [
    0.05,
    0.1,
    0.2,
    0.5,
    0.85,
    0.94,
    0.97,
    0.98,
]  # of the replies in the last stage, for 1 to 8 steps
SECOND_ATTEMPTS = 0.25  # share of the rows that show a second attempt
BATCH, LEARNING_RATE, WARM_UP = 16, 1.5e-3, 50  # rows, of AdamW, steps


def make(folder: Path, seed: int) -> None:
    """Make the tiny model with its tokenizer and save both, in Hugging Face format."""
    import torch

    torch.set_num_threads(
        1
    )  # the order of additions, and so the checkpoint, depends on the number of threads
    tokenizer = make_tokenizer()
    model = make_model(seed, tokenizer)
    warm_start(model, tokenizer, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)


def make_model(seed: int, tokenizer):
    """A Qwen2 model of 0.12 million parameters with random weights."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad
    )  # either one ends a sample
    return model


def warm_start_chain(rng: random.Random) -> Chain:
    steps = rng.randint(1, MAX_STEPS)
    while split_of(chain := random_chain(rng, steps)) != "train":
        pass
    return chain


def training_row(rng: random.Random, guesses: bool) -> list[tuple[str, bool]]:
    """One row of the warm start as (text, is it learned?) segments, tokenized apart as the trainer appends them.

    Some rows are: a wrong attempt and REFLECT, both not learned, then a second attempt, which is.
    """
    chain = warm_start_chain(rng)
    steps = len(chain[1])

    def attempt(mistakes: dict[int, int]) -> str:
        guess = guesses and rng.random() < GUESS_SHARE[steps - 1]
        return final_line(rng.randint(1, 99)) if guess else full_solution(chain, mistakes)

    segments = [(prompt_text(question(chain, rng)), False)]
    if rng.random() < SECOND_ATTEMPTS:
        mistake = {rng.randrange(steps): rng.choice([-10, -2, -1, 1, 2, 10])}
        segments += [(attempt(mistake), False), (REFLECT, False), ("\n", True)]
    return segments + [(attempt({}) + "<|im_end|>", True)]


def tokenized(rows: list[list[tuple[str, bool]]], tokenizer) -> list[tuple[list[int], list[bool]]]:
    """(ids, is it learned?) of each row, both as long as the row."""
    ids = iter(
        tokenizer([text for row in rows for text, _ in row], add_special_tokens=False)["input_ids"]
    )
    pieces = [[(next(ids), learned) for _, learned in row] for row in rows]
    return [
        ([i for piece, _ in row for i in piece], [learned for piece, learned in row for _ in piece])
        for row in pieces
    ]


def batches(rows: list, rng: random.Random) -> list[list]:
    """Batches of rows of about equal length, in random order."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    out = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    rng.shuffle(out)
    return out


def warm_start(model, tokenizer, seed: int) -> None:
    """Supervised training through STAGES: AdamW, learning rate constant at first, then falling linearly to 0."""
    import torch

    todo = []
    for count, guesses in STAGES:
        rng = random.Random(f"{seed} {guesses}")
        todo += batches(
            tokenized([training_row(rng, guesses) for _ in range(count)], tokenizer), rng
        )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    for step, batch in enumerate(tqdm(todo, unit="step")):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(
            1, (step + 1) / WARM_UP, 2 * (1 - step / len(todo))
        )
        row_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def row_loss(model, batch: list[tuple[list[int], list[bool]]]):
    """Mean cross-entropy of the learned tokens of a batch."""
    import torch

    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])  # (B, T)
    learned = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in batch])[
        :, 1:
    ]  # (B, T-1)
    hidden = model.model(ids[:, :-1]).last_hidden_state[learned]  # (learned tokens, H)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.tiny", description="Make the tiny model.")
    parser.add_argument(
        "--out", type=Path, default=MODEL, help="the model's folder [data/tiny_model]"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the weights and of the warm start's problems [0]",
    )
    flags = parser.parse_args()
    make(flags.out, flags.seed)


if __name__ == "__main__":
    main()
