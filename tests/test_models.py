"""engine/models.py and prompts.py: prompts, end tokens, names, fingerprints."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2Config

import data
import engine
from engine.modelfiles import find_model
from engine.models import choose_dtype
from engine.prompts import INSTRUCTION, QWEN_TEMPLATE, find_end_ids, prompt_text
from engine.trainer import Trainer
from errors import UserError

QWEN = Path(__file__).parents[2] / "shared" / "tokenizers" / "Qwen2.5-Math-1.5B"


@pytest.fixture
def tiny():
    return engine.load_policy("tiny", "cpu")


@pytest.mark.skipif(not QWEN.exists(), reason="../shared is absent: no real tokenizer to test with")
def test_qwen_prompt_is_the_papers_and_both_end_tokens_stop():
    tokenizer = AutoTokenizer.from_pretrained(QWEN)
    expected = QWEN_TEMPLATE.replace("{question}", "What is $1+1$?")
    assert prompt_text(tokenizer, "What is $1+1$?", "qwen") == expected
    ids = tokenizer.encode(expected, add_special_tokens=False)
    assert ids[0] == 151644 and tokenizer.decode(ids) == expected
    config = Qwen2Config(**json.loads((QWEN / "config.json").read_text()))
    assert find_end_ids(config, None, tokenizer) == {151643, 151645}
    tokenizer.chat_template = None
    assert prompt_text(tokenizer, "What is $1+1$?", "qwen") == expected


def test_llama_gets_the_instruction_in_the_user_turn():
    class Fake:
        chat_template = "x"

        def get_chat_template(self):
            return self.chat_template

        def apply_chat_template(self, messages, **_):
            return messages

    assert prompt_text(Fake(), "Q", "llama") == [{"role": "user", "content": f"Q {INSTRUCTION}"}]
    Fake.chat_template, Fake.name_or_path = None, "base"
    with pytest.raises(UserError, match="use the Instruct model"):
        prompt_text(Fake(), "Q", "llama")


def test_a_prompt_does_not_change_with_the_day(tiny):
    """Llama 3's template asks for the date unless it is given one."""
    tiny.tokenizer.chat_template = (
        "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
        "{{ messages[0]['content'] }}"
    )
    assert prompt_text(tiny.tokenizer, "Q", "llama").startswith("26 Jul 2024Q")


@pytest.mark.parametrize(
    "name, found",
    [
        ("Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("Llama-3.2-3B-Instruct", "meta-llama/Llama-3.2-3B-Instruct"),
        ("owner/name", "owner/name"),
        ("Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("QwenFans/Qwen-mine", "QwenFans/Qwen-mine"),
    ],
)
def test_bare_names_get_an_owner_and_others_stay(name, found):
    assert find_model(name) == found


def test_a_name_that_is_nothing_is_refused():
    with pytest.raises(UserError, match="neither"):
        find_model("nothing")


def test_tiny_policy_round_trips_text(tiny):
    problem = data.load("tiny:1-3")[0]
    assert tiny.decode(tiny.encode(problem.solution)) == problem.solution
    assert tiny.encode_response(problem.solution) == tiny.encode(problem.solution)
    assert tiny.end_id in tiny.end_ids


def test_dtype_is_what_the_model_computes_in_and_masters_stay_float32(tiny):
    assert tiny.model.dtype == torch.float32  # on a CPU
    policy = engine.load_policy("tiny", "cpu", dtype="bfloat16")
    trainer = Trainer(policy, micro_batch_tokens=1000, temperature=1.0)
    assert policy.model.dtype == torch.bfloat16
    assert {master.dtype for master in trainer.masters.values()} == {torch.float32}
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


def test_a_fingerprint_is_that_of_the_weights_the_prompt_and_the_end_tokens(tiny):
    before = tiny.fingerprint()
    assert before == engine.load_policy("tiny", "cpu").fingerprint()
    for weight in tiny.model.parameters():
        with torch.no_grad():
            value = weight.flatten()[3].item()
            weight.view(-1)[3] += 0.1
            assert tiny.fingerprint() != before
            weight.view(-1)[3] = value
    assert tiny.fingerprint() == before
    tiny.end_ids = {256}
    assert tiny.fingerprint() != before
    tiny.end_ids = {256, 257}
    tiny.tokenizer.chat_template = tiny.tokenizer.chat_template.replace("<|im_start|>", "")
    assert tiny.fingerprint() != before
