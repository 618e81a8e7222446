"""Text and ids that nobody meant: whatever a file, a model or a policy brings, loading, grading,
correcting and scoring do not crash, and a row that cannot be a problem is refused with its
place.
"""

import json
import math
import re
import unicodedata
from functools import partial
from pathlib import Path

from helpers import flags_of, group_of, response, train_step, trainer_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import data
import edge_grpo as eg
import reward
from data import Problem
from engine.modelfiles import TINY_MODEL, find_model
from errors import UserError

FEW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

ANY_TEXT = st.text(
    st.characters(exclude_categories=("Cs",)), max_size=60
)  # control characters, all planes
HALVES = st.text(st.characters(), max_size=20)  # halves of surrogate pairs too
PIECES = r"""\boxed{ } { \ $ \frac ^ _ ( ) [ ] 1 0 - / , . % \sqrt \text{ x ! ** e inf nan
    999999999999999999999999999999 <|im_end|> <|im_start|> ½ ٣"""
PIECES = st.sampled_from([*PIECES.split(), "\n", "\0", "\u2028"])
MATHS = st.lists(PIECES, max_size=25).map("".join)
GOLD = st.one_of(
    ANY_TEXT,
    MATHS,
    st.integers(),
    st.floats(allow_nan=True),
    st.none(),
    st.lists(MATHS, max_size=3),
)
ANY_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), ANY_TEXT, HALVES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
ODD = dict(problem=ANY_JSON, question=ANY_TEXT, answer=ANY_JSON, solution=ANY_JSON)
FULL = dict(
    problem=ANY_TEXT,
    answer=st.one_of(ANY_TEXT, MATHS, st.integers(), st.floats()),
    solution=ANY_TEXT,
)
ROW = st.one_of(ANY_JSON, st.fixed_dictionaries({}, optional=ODD), st.fixed_dictionaries(FULL))


def ids(low=0, size=24):
    """Any ids of the tiny model, special ones too."""
    return st.lists(st.integers(0, 307), min_size=low, max_size=size)


# --- grading ------------------------------------------------------------------------------------


@FEW
@given(st.one_of(ANY_TEXT, MATHS, HALVES), GOLD)
def test_grading_gives_zeros_and_ones(text, gold):
    for whole in (text, r"so \boxed{" + text + "}"):
        assert set(reward.score(whole, gold)) <= {0.0, 1.0}


# --- data ---------------------------------------------------------------------------------------


def load(path) -> list[Problem]:
    """The problems of a file, or none and a sentence that names it."""
    try:
        return data.load(str(path))
    except UserError as error:
        assert path.name in str(error) and "\n" not in str(error)
        return []


@FEW
@given(
    st.one_of(
        st.binary(max_size=60),
        st.lists(ROW, max_size=3).map(lambda rows: json.dumps(rows).encode()),
        st.lists(ROW, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    )
)
def test_any_file_is_read_whole_or_refused_by_name(tmp_path, policy, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    for p in load(path):
        assert p.question.strip() and p.answers
        assert all(not isinstance(a, float) or math.isfinite(a) for a in p.answers)
        assert policy.prompt_ids(p.question)
        assert isinstance(data.gold_text(p), str)


@FEW
@given(ANY_TEXT, ANY_TEXT, st.one_of(ANY_TEXT, st.none()))
def test_a_file_of_strange_text_keeps_it_byte_for_byte(tmp_path, question, answer, solution):
    path = tmp_path / "row.jsonl"
    row = dict(problem=question, answer=answer, solution=solution)
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8", newline="\n")
    for p in load(path):
        assert p.question == question
        has_markup = re.search(r"[^\w\s]", answer)
        assert p.solution in (None, solution) or has_markup
        assert p.answers == (answer,) or has_markup


# --- correction and scoring ---------------------------------------------------------------------


@FEW
@example("0", "0", "0", [[], []], 1)  # nothing is left that was sampled
@given(
    ANY_TEXT.filter(str.strip),
    st.one_of(ANY_TEXT, MATHS).filter(str.strip),
    st.one_of(ANY_TEXT, MATHS).filter(str.strip),
    st.lists(ids(), min_size=2, max_size=2),
    st.integers(0, 2**40),
)
def test_any_ids_and_texts_go_through_a_whole_step(policy, question, answer, solution, rows, seed):
    """Graded, corrected at random, trained on at a learning rate of 0: every number is finite,
    every origin is known."""
    flags = flags_of(f"--group-size 2 --questions-per-step 1 --correction-tokens 3 --seed {seed}")
    responses = []
    for row in rows:
        finished = bool(row) and row[-1] in policy.end_ids
        responses.append(response(None, row, format=None, finished=finished))
    group = group_of(responses, problem=Problem(question, (answer,), solution, "row:1"))
    group.prompt = policy.prompt_ids(question)
    eg.grade(policy, [group])
    eg.correct_errors(policy, [group], flags, seed % 7)
    eg.grade(policy, [group])
    train_step(trainer_of(policy, flags), [group], flags, lr=0.0)
    assert group.A_hat.isfinite().all()
    for r, row in zip(group.sampled, rows):
        assert r.ids == row
    for r in group.responses:
        n = len(r.ids)
        assert n == len(r.injected) == len(r.sampler_logp) == len(r.entropies)
        assert list(map(math.isnan, r.sampler_logp)) == r.injected
        assert r.trainer_logp.isfinite().all()
        assert (r.trainer_logp <= 1e-4).all()
        assert min(r.entropies, default=0) >= -1e-4
    rewards = partial(eg.rewards, flags=flags)
    metrics = eg.measure([group], [group], rewards, eg.CORRECTIONS, flags)
    assert all(v is None or math.isfinite(v) for v in metrics.values())
    for row in eg.readable(policy, [group], with_tokens=True):
        json.loads(json.dumps(row).encode())


@FEW
@given(ANY_TEXT)
def test_text_goes_to_ids_and_back(policy, text):
    assert policy.decode_raw(policy.encode(text)) == unicodedata.normalize(
        "NFC", text
    )  # as Qwen's tokenizers do
    assert policy.prompt_ids(text)[-1] == policy.prompt_ids("x")[-1]


# --- flags and models ---------------------------------------------------------------------------

WORDS = """--lr --steps --seed --eda-clamp --guided-probs --betas --method --no-eda --sft --kl 0
    1 0.5 -1 nan inf 1e999 grpo sft -- - = --lr=1e-3 --eval-tasks ½"""
WORDS = st.sampled_from([*WORDS.split(), "", "x" * 50])


@FEW
@given(st.lists(st.one_of(WORDS, st.text(max_size=6).filter(lambda t: "h" not in t)), max_size=6))
def test_any_command_line_is_flags_or_a_sentence(words):
    try:
        assert isinstance(eg.parse_flags(words), eg.Flags)
    except UserError as error:
        assert str(error)


@FEW
@given(st.text(st.characters(), max_size=30))
def test_any_name_of_a_model_is_found_or_refused(name):
    try:
        found = find_model(name)
        assert found == str(TINY_MODEL) or Path(found).is_dir() or "/" in found
    except UserError as error:
        assert "--model" in str(error)


def test_models_are_loaded_without_pickle_and_without_their_own_code():
    """No program has another way to read weights (what is refused: see test_bad_input)."""
    source = ""
    for path in Path(__file__).parents[1].rglob("*.py"):
        if not {"tests", ".venv"} & set(path.parts):
            source += path.read_text(encoding="utf-8")
    assert "torch.load(" not in source and "import pickle" not in source
    assert source.count("AutoModelForCausalLM.from_pretrained") == 1
    assert source.count("use_safetensors=True") == 1
