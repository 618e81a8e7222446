r"""The tiny world: synthetic chain word problems, their tokenizer, and the recipe of the tiny model in data/tiny_model/.

It lets every command of the project run on a CPU from nothing downloaded, with the pathology that the paper is about:
most groups on hard problems are all wrong. A question and its reference solution look like this:

    Mia has 30 cards. (1) multiplies by 3. (2) loses 18. (3) sells 20. How many?
    (1)30*3=90\n(2)90-18=72\n(3)72-20=52\nThe answer is \boxed{52}.

The model can work step by step, but the longer the chain the more it prefers a bare guess ("The answer is \boxed{7}."), so
that reinforcement learning has a behaviour to select.
"""
import argparse
import hashlib
import random
import re
import time
from pathlib import Path

from tqdm import tqdm

from data import Problem, UserError

NAMES = ["Mia", "Tom", "Ana", "Ben", "Zoe", "Leo", "Eva", "Sam"]
ITEMS = ["cards", "coins", "books", "shells", "stones", "apples", "pens", "eggs"]
VERBS = {"+": ["finds", "buys", "wins", "gets"], "-": ["loses", "sells", "gives", "eats"], "*": ["multiplies by"]}
MAX_STEPS = 8
SIZES = {"train": 2048, "validation": 256, "test": 256}
STYLES = ("full", "terse", "half")
REFLECT = " Wait! Something is wrong here."     # the paper's reflection phrase, which the warm start teaches to answer

Chain = tuple[int, list[tuple[str, int]]]       # the starting number, then (operator, operand) of each step


# ---- problems ----------------------------------------------------------------------------------------------------------

def problems(name: str) -> list[Problem]:
    """The problems of `tiny:STEPS[:SPLIT[:STYLE]]`, for example tiny:5-8, tiny:4:test or tiny:5-8:train:half.

    Every number of steps in STEPS is equally frequent. SPLIT is train (default), validation or test: no chain of one split occurs in
    another, whatever STEPS. STYLE is that of the reference solutions: full (default), terse, or half (every second one terse).
    """
    steps, split, style = _parts(name)
    rng, seen, found = random.Random(f"{steps} {split}"), set(), []
    while len(found) < SIZES[split]:
        chain = random_chain(rng, steps[len(found) % len(steps)])
        if split_of(chain) == split and str(chain) not in seen:
            seen.add(str(chain))
            terse = style == "terse" or style == "half" and len(found) % 2 == 1
            solution = terse_solution(chain) if terse else full_solution(chain)
            found.append(Problem(question(chain, rng), (str(results(chain)[-1]),), solution, f"{name}:{len(found) + 1}"))
    return found


def _parts(name: str) -> tuple[range, str, str]:
    head, *rest = name.split(":")
    match = re.fullmatch(r"([1-9])(?:-([1-9]))?", rest[0]) if rest else None
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if head != "tiny" or not 1 <= first <= last <= MAX_STEPS:
        raise UserError(f"{name!r} is not a tiny set: it is tiny:STEPS[:SPLIT[:STYLE]], with STEPS from 1 to {MAX_STEPS}, such as tiny:4 or tiny:5-8")
    split, style = (rest[1:] + ["train", "full"][len(rest) - 1:])[:2] if len(rest) <= 3 else ("", "")
    if split not in SIZES or style not in STYLES:
        raise UserError(f"{name!r} is not a tiny set: after the steps come one of {', '.join(SIZES)} and one of {', '.join(STYLES)}, "
                        "such as tiny:5-8:train:half")
    return range(first, last + 1), split, style


def random_chain(rng: random.Random, steps: int) -> Chain:
    """A chain whose every intermediate result lies in 1..99."""
    start = value = rng.randint(2, 99)
    operations = []
    for _ in range(steps):
        operator = rng.choice([o for o, possible in (("+", value < 99), ("-", value > 1), ("*", value < 50)) if possible])
        low, high = {"+": (1, 99 - value), "-": (1, value - 1), "*": (2, min(9, 99 // value))}[operator]
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
    """The only split that a chain can be in, whatever the names and things around it: a tenth each is held out, by its hash."""
    return {0: "validation", 1: "test"}.get(hashlib.sha256(str(chain).encode()).digest()[0] % 10, "train")


def question(chain: Chain, rng: random.Random) -> str:
    start, operations = chain
    steps = " ".join(f"({k}) {rng.choice(VERBS[operator])} {operand}." for k, (operator, operand) in enumerate(operations, start=1))
    return f"{rng.choice(NAMES)} has {start} {rng.choice(ITEMS)}. {steps} How many?"


def full_solution(chain: Chain, wrong: dict[int, int] | None = None) -> str:
    """Step by step. `wrong` maps a step's index (from 0) to the mistake that is added to its result; later steps go on from there."""
    value, operations = chain
    lines = []
    for k, (operator, operand) in enumerate(operations):
        result = apply(value, operator, operand) + (wrong or {}).get(k, 0)
        lines.append(f"({k + 1}){value}{operator}{operand}={result}\n")
        value = result
    return "".join(lines) + final_line(value)


def terse_solution(chain: Chain) -> str:
    r"""One expression and its value, without the steps: `(5+3)*4-2=\boxed{30}.` A style that the model does not speak."""
    expression, last = str(chain[0]), ""
    for operator, operand in chain[1]:
        expression = f"({expression})" if operator == "*" and last in ("+", "-") else expression
        expression, last = f"{expression}{operator}{operand}", operator
    return f"{expression}=\\boxed{{{results(chain)[-1]}}}."


def final_line(value: int) -> str:
    return f"The answer is \\boxed{{{value}}}."


# ---- tokenizer ---------------------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]    # padding, begin and end of a turn
WORDS = ([f"({k})" for k in range(1, MAX_STEPS + 1)] + ["\\boxed{", ". ", "How many?"] + NAMES + [" has "] + [" " + item for item in ITEMS]
         + [f" {verb} " for verbs in VERBS.values() for verb in verbs]
         + ["The", " answer", " is", "Wait!", " Wait!", " Something", " wrong", " here", "After", " verification", " the", " correct"])
CHAT_TEMPLATE = ("{%- for message in messages if message['role'] != 'system' %}{{- '<|im_start|>' + message['content'] + '<|im_end|>' }}"
                 "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>' }}{%- endif %}")


def make_tokenizer():
    r"""A Qwen2 tokenizer whose vocabulary is the 256 bytes, the three special tokens and the words of the tiny world.

    Digits, words, `(k)` and `\boxed{` are single tokens and the blanks belong to the tokens, so that decoding is concatenation, byte
    for byte. Text from outside this world is spelled in bytes. The words are added tokens, not merges: transformers rebuilds the
    tokenizer of every Qwen2 model with its own splitting rule, which added tokens come before.
    """
    from tokenizers import AddedToken, pre_tokenizers
    from transformers import Qwen2Tokenizer
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=alphabet, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token=None,
                               chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    return tokenizer


def prompt_text(question: str) -> str:
    """What the chat template renders; the reply follows."""
    return f"<|im_start|>{question}<|im_end|><|im_start|>"


# ---- model -------------------------------------------------------------------------------------------------------------

def make_model(seed: int, tokenizer):
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.08,
                         bos_token_id=None, eos_token_id=end, pad_token_id=pad)
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=[end, pad], pad_token_id=pad)     # either end id stops a sample
    return model


# ---- warm start --------------------------------------------------------------------------------------------------------

STAGES = [(24000, 3, False), (12000, 8, False), (6000, 8, True)]      # (rows, most steps, with guesses?), one after the other
GUESS_SHARE = [.1, .2, .3, .7, .9, .95, .97, .98]                     # of the replies in the last stage, for 1 to 8 steps
SECOND_ATTEMPTS = .25                                                 # share of the rows that show a second attempt
BATCH, LEARNING_RATE, WARM_UP = 16, 1.5e-3, 50                        # rows, of AdamW, steps


def warm_start_chain(rng: random.Random, most_steps: int) -> Chain:
    steps = rng.randint(1, most_steps)
    while split_of(chain := random_chain(rng, steps)) != "train":
        pass
    return chain


def training_row(rng: random.Random, most_steps: int, guesses: bool) -> list[tuple[str, bool]]:
    """One row of the warm start as (text, is it learned?) segments. They are tokenized apart, as the trainer appends them.

    Some rows are: a wrong attempt and REFLECT, both not learned, then a second attempt, which is.
    """
    chain = warm_start_chain(rng, most_steps)
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
    ids = iter(tokenizer([text for row in rows for text, _ in row], add_special_tokens=False)["input_ids"])
    pieces = [[(next(ids), learned) for _, learned in row] for row in rows]
    return [([i for piece, _ in row for i in piece], [learned for piece, learned in row for _ in piece]) for row in pieces]


def batches(rows: list, rng: random.Random) -> list[list]:
    """Batches of rows of about equal length, in random order."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    out = [rows[i:i + BATCH] for i in range(0, len(rows), BATCH)]
    rng.shuffle(out)
    return out


def warm_start(model, tokenizer, seed: int) -> None:
    """Supervised training through STAGES: AdamW, learning rate constant at first, then falling linearly to 0."""
    import torch
    rng = random.Random(seed)
    todo = [batch for count, most_steps, guesses in STAGES
            for batch in batches(tokenized([training_row(rng, most_steps, guesses) for _ in range(count)], tokenizer), rng)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(.9, .99), weight_decay=.01, fused=True)
    for step, batch in enumerate(tqdm(todo, unit="step")):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP, 2 * (1 - step / len(todo)))
        row_loss(model, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def row_loss(model, batch: list[tuple[list[int], list[bool]]]):
    """Mean cross-entropy of the learned tokens of a batch."""
    import torch
    width = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])                          # (B, T)
    learned = torch.tensor([mask + [False] * (width - len(mask)) for _, mask in batch])[:, 1:]        # (B, T-1)
    hidden = model.model(ids[:, :-1]).last_hidden_state[learned]                                      # (learned tokens, H)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][learned])
