"""Models as they are found: names, folders, tokenizers, templates and families that differ from the paper's two."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import AddedToken

import engine
from engine.checkpoints import save_final, save_model
from engine.forward import response_logprobs
from engine.modelfiles import TINY_MODEL, find_model
from engine.models import CannotSample, load_config
from engine.prompts import prompt_text
from errors import UserError

ROOT = Path(__file__).parents[1]
QWEN = ROOT.parent / "shared" / "tokenizers" / "Qwen2.5-Math-1.5B"
QUESTION = "Eva has 3 shells. How many?"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + (m.role if m.role == 'user' else 'model') + '\n' }}"
    "{{ m.content|trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content|trim + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)


def change_json(path, **changes):
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tiny(tmp_path, template=None, tokens=(), **changes):
    """A copy of the tiny model with another template, more special tokens, another config.json."""
    folder = Path(shutil.copytree(TINY_MODEL, tmp_path / "model"))
    if tokens:
        tokenizer = tf.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(
            [AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True
        )
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(folder)
    if template is not None:
        change_json(folder / "tokenizer_config.json", chat_template=template)
    change_json(folder / "config.json", **changes)
    return folder


C = dict(
    vocab_size=308,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=257,
)
GQA = dict(num_key_value_heads=2)


def rope(theta=1e6, **more):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


LLAMA_3_ROPE = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LONGROPE = dict(
    rope_type="longrope",
    short_factor=[1.0] * 4,
    long_factor=[4.0] * 4,
    original_max_position_embeddings=96,
)
GEMMA_3_ROPE = dict(
    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    sliding_attention=dict(rope_type="default", rope_theta=3e4),
)


def family(tmp_path, config):
    """A random model of a config, with the tiny model's tokenizer; its weights make far from flat distributions."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, folder)
    return folder, model


def gap(policy, limit=40):
    """The most that sampler and trainer differ in the log-probability of a token, rows of several lengths together."""
    prompts = [policy.prompt_ids(QUESTION)[-n:] for n in (60, 60, 20, 5)]
    samples = policy.sample(prompts, [limit, limit // 3, limit, limit // 2], [1, 2, 3, 4], 1.0)
    told = response_logprobs(
        policy.model, prompts, [s.ids for s in samples], 1.0, policy.vocab_size, 300
    )
    return max(
        (torch.tensor(s.logprobs) - logp).abs().max().item() for s, (logp, _) in zip(samples, told)
    )


# --- 6, 14: families ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, context",
    [
        (tf.Phi3Config(**C, **GQA, original_max_position_embeddings=96, **rope(**LONGROPE)), 96),
        (tf.LlamaConfig(**C, **GQA, **rope(rope_type="dynamic", factor=4.0)), 256),
    ],
    ids=["longrope", "dynamic"],
)
def test_rows_end_before_their_length_changes_the_rotations_of_a_batch(
    tmp_path, capsys, config, context
):
    folder, model = family(tmp_path, config)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.context() == context and ("longrope" in capsys.readouterr().out) == (
        context == 96
    )
    assert gap(policy, limit=400) < 1e-4
    policy.end_ids = policy.sampler.end_ids = set()
    assert max(len(s.ids) for s in policy.sample([[1, 2, 3]], [400], [5], 1.0)) <= context - 3


NO_SDPA = {
    "gpt_neo": tf.GPTNeoConfig(
        vocab_size=308,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=8,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=256,
    ),
    "bloom": tf.BloomConfig(
        vocab_size=308,
        hidden_size=32,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    ),
    "mpt": tf.MptConfig(
        vocab_size=308, d_model=32, n_layers=2, n_heads=4, max_seq_len=96, expansion_ratio=2
    ),
    "gpt_oss": tf.GptOssConfig(
        **C, **GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    ),
    "xglm": tf.XGLMConfig(
        vocab_size=308,
        d_model=32,
        num_layers=2,
        attention_heads=4,
        ffn_dim=64,
        bos_token_id=0,
        max_position_embeddings=256,
        eos_token_id=256,
        pad_token_id=257,
    ),
    "mamba": tf.MambaConfig(
        vocab_size=308,
        hidden_size=32,
        num_hidden_layers=2,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    ),
    "mamba2": tf.Mamba2Config(
        vocab_size=308,
        hidden_size=32,
        num_hidden_layers=2,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=16,
        eos_token_id=256,
        pad_token_id=257,
        bos_token_id=None,
    ),
}


@pytest.mark.parametrize("name", NO_SDPA)
def test_families_without_torchs_attention_sample_what_they_train(tmp_path, name):
    policy = engine.load_policy(str(family(tmp_path, NO_SDPA[name])[0]), "cpu")
    assert gap(policy) < 1e-4
    assert name != "mpt" or policy.context() == 96


def test_a_cap_on_the_logits_is_seen_whatever_its_name(tmp_path):
    folder, _ = family(
        tmp_path,
        tf.RecurrentGemmaConfig(
            vocab_size=308,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            lru_width=32,
            attention_window_size=8,
            bos_token_id=None,
            eos_token_id=256,
            pad_token_id=257,
        ),
    )
    with pytest.raises(UserError, match="logits_soft_cap"):
        engine.load_policy(str(folder), "cpu")


# --- 8: names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, found",
    [
        ("Qwen/Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("Qwen2.5-Math-7B", "Qwen/Qwen2.5-Math-7B"),
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
        ("Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
        ("QwenFans/Qwen-mine", "QwenFans/Qwen-mine"),
    ],
)
def test_an_id_with_an_owner_is_left_as_it_is(name, found):
    assert find_model(name) == found


@pytest.mark.parametrize("inside", ["final", "checkpoints/step-20"])
def test_the_folder_of_a_run_says_which_model_is_in_it(tmp_path, inside):
    (tmp_path / "config.json").write_text('{"flags": {}}')
    shutil.copytree(TINY_MODEL, tmp_path / inside)
    with pytest.raises(UserError, match=f"folder of a run; give .*{inside}"):
        load_config(str(tmp_path))


def test_a_model_in_the_hubs_cache_is_trained_and_saved_without_the_hub(tmp_path):
    cached = tmp_path / "cache" / "models--Qwen--Qwen-tiny"
    shutil.copytree(TINY_MODEL, cached / "snapshots" / "1234")
    (cached / "snapshots" / "1234" / "preprocessor_config.json").write_text("{}")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("1234")
    code = "import engine; print(sorted(engine.load_policy('Qwen-tiny', 'cpu').files))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={
            **os.environ,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_ENDPOINT": "http://127.0.0.1:9",
        },
    )
    assert "'preprocessor_config.json', 'tokenizer.json'" in run.stdout, run.stderr


# --- 9, 10, 18: what is saved ---------------------------------------------------------------------------------------

READ_ALIKE = {  # name: (config, what transformers 4 reads in config.json)
    "qwen2": (tf.Qwen2Config(**C, **GQA, **rope()), dict(rope_theta=1e6, rope_scaling=None)),
    "qwen3": (
        tf.Qwen3Config(**C, **GQA, **rope(), head_dim=16),
        dict(rope_theta=1e6, rope_scaling=None),
    ),
    "llama3": (
        tf.LlamaConfig(**C, **GQA, **rope(5e5, **LLAMA_3_ROPE)),
        dict(rope_theta=5e5, rope_scaling=LLAMA_3_ROPE),
    ),
    "gemma3": (
        tf.Gemma3TextConfig(
            **C,
            **GQA,
            head_dim=8,
            sliding_window=8,
            rope_parameters=GEMMA_3_ROPE,
            layer_types=["sliding_attention", "full_attention"],
        ),
        dict(
            rope_theta=1e6,
            rope_local_base_freq=3e4,
            rope_scaling=dict(rope_type="linear", factor=8.0),
        ),
    ),
    "phi3": (
        tf.Phi3Config(**C, **GQA, original_max_position_embeddings=96, **rope(**LONGROPE)),
        dict(
            rope_theta=1e6,
            original_max_position_embeddings=96,
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
        ),
    ),
    "stablelm": (
        tf.StableLmConfig(**C, **GQA, **rope(partial_rotary_factor=0.25)),
        dict(rope_theta=1e6, partial_rotary_factor=0.25),
    ),
    "gpt_neox": (
        tf.GPTNeoXConfig(**C, **rope(partial_rotary_factor=0.25)),
        dict(rotary_emb_base=1e6, rotary_pct=0.25),
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig(
            **C,
            **GQA,
            **rope(),
            head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
        ),
        dict(rope_theta=1e6, num_experts=4),
    ),
}
LOGITS = """
import sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
torch.save(model(torch.arange(200)[None] % 300).logits, sys.argv[1] + "/logits.pt")
"""


@pytest.mark.parametrize("name", READ_ALIKE)
def test_a_saved_model_is_the_same_for_readers_of_transformers_4_and_5(tmp_path, name):
    """With TRANSFORMERS_4=FOLDER (`pip install --target FOLDER 'transformers<5'`) its logits are compared too."""
    config, old_keys = READ_ALIKE[name]
    folder, model = family(tmp_path, config)
    save_model(engine.load_policy(str(folder), "cpu"), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {k: saved[k] for k in old_keys} == old_keys
    assert saved["torch_dtype"] == saved["dtype"] == "float32" and saved["architectures"] == [
        type(model).__name__
    ]
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.arange(200)[None] % 300
    assert torch.equal(again(ids).logits, model(ids).logits)
    if path := os.environ.get("TRANSFORMERS_4"):
        run = subprocess.run(
            [sys.executable, "-c", LOGITS, str(tmp_path / "saved")],
            text=True,
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert run.returncode == 0, run.stderr
        assert torch.allclose(
            torch.load(tmp_path / "saved" / "logits.pt"), model(ids).logits, atol=1e-4
        )


def test_a_config_of_transformers_4_stays_as_it_is_but_for_its_dtype(tmp_path):
    """Its own keys, dropout included, which is off only while it trains."""
    folder = tiny(
        tmp_path,
        rope_parameters=None,
        dtype=None,
        rope_theta=1e6,
        torch_dtype="bfloat16",
        attention_dropout=0.1,
        rope_scaling=dict(rope_type="linear", factor=2.0),
        mine="kept",
    )
    before = json.loads((folder / "config.json").read_text())
    policy = engine.load_policy(str(folder), "cpu")
    assert (
        policy.model.config.rope_parameters["rope_theta"] == 1e6
        and policy.model.config.attention_dropout == 0
    )
    save_model(policy, tmp_path / "saved")
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert after == before | dict(dtype="float32", torch_dtype="float32", eos_token_id=[256, 257])


def test_all_that_stands_beside_the_weights_is_saved_byte_for_byte(tmp_path):
    """Tokenizer files are not written anew, in a form that transformers 4 may not know, and nothing else is lost."""
    folder = tiny(tmp_path)
    for name, text in {
        "preprocessor_config.json": "{ }",
        "special_tokens_map.json": "{}",
        "tokenizer.model": "",
        "chat_template.jinja": CHATML,
        "additional_chat_templates/rag.jinja": PHI,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        add_prefix_space=None,
    )
    (folder / "checkpoint.json").write_text("{}")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    before = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    policy = engine.load_policy(str(folder), "cpu")
    shutil.rmtree(folder)  # --overwrite of the run that it came from
    save_final(policy, tmp_path / "final")
    after = {
        f.relative_to(tmp_path / "final"): f.read_bytes()
        for f in (tmp_path / "final").rglob("*")
        if f.is_file()
    }
    ours = {Path("config.json"), Path("checkpoint.json"), Path("pytorch_model.bin.index.json")}
    assert after.keys() == before.keys() - ours | {Path("config.json")}
    assert all(after[name] == before[name] for name in after.keys() - ours)
    assert engine.load_policy(str(tmp_path / "final"), "cpu").prompt_ids(
        QUESTION
    ) == policy.prompt_ids(QUESTION)


def test_a_generation_config_that_may_not_be_saved_is_saved_as_it_was(tmp_path, monkeypatch):
    """Llama 2's: temperature and top_p without do_sample. transformers 5.0 refuses to save it."""
    folder = tiny(tmp_path)
    change_json(folder / "generation_config.json", temperature=0.6, top_p=0.9)
    check = tf.GenerationConfig.validate
    policy = engine.load_policy(str(folder), "cpu")
    monkeypatch.setattr(
        tf.GenerationConfig, "validate", lambda self, **more: check(self, **more | {"strict": True})
    )
    save_model(policy, tmp_path / "saved")
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / name).read_bytes()
    assert policy.model.generation_config.temperature == 0.6


def test_without_a_generation_config_the_saved_model_still_knows_its_end(tmp_path):
    folder = tiny(tmp_path)
    (folder / "generation_config.json").unlink()
    save_model(engine.load_policy(str(folder), "cpu"), tmp_path / "saved")
    assert tf.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 256


def test_what_cannot_be_saved_is_met_when_the_model_is_loaded(tmp_path, monkeypatch):
    def refuse(self, folder):
        raise ValueError("some generation parameters are set in the model config")

    monkeypatch.setattr(tf.Qwen2Config, "save_pretrained", refuse)
    with pytest.raises(UserError, match="cannot be saved again .*generation parameters"):
        engine.load_policy(str(tiny(tmp_path)), "cpu")


# --- 11, 12, 15, 17: templates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template, tokens, end",
    [
        (CHATML, (), "<|im_end|>"),
        (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
        (PHI, ("<|end|>", "<|user|>"), "<|end|>"),
        (LLAMA_2, ("</s>",), "</s>"),
        (
            "{{ messages[-1].content }}",
            (),
            "<|endoftext|>",
        ),  # nothing follows a response but the eos
        (
            "{% if messages[-1].role == 'assistant' %}{{ 1 / 0 }}{% endif %}{{ messages[-1].content }}",
            (),
            "<|endoftext|>",
        ),
    ],
    ids=["chatml", "gemma", "phi", "llama 2", "none", "no responses"],
)
def test_the_end_of_a_turn_is_read_from_the_template(tmp_path, template, tokens, end):
    """Every vocabulary here holds <|im_end|>; only the first template uses it."""
    folder = tiny(tmp_path, template, tokens, eos_token_id=257)
    change_json(folder / "generation_config.json", eos_token_id=257)
    change_json(
        folder / "tokenizer_config.json", eos_token="</s>" if "</s>" in tokens else "<|endoftext|>"
    )
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.decode_raw([policy.end_id]) == end
    ends = {policy.decode_raw([i]) for i in policy.end_ids}
    assert ends == {end, "<|endoftext|>"} and policy.sampler.end_ids == policy.end_ids


@pytest.mark.skipif(not QWEN.exists(), reason="../shared is absent: no real tokenizer to test with")
@pytest.mark.parametrize("own_template", [True, False])
def test_the_papers_prompt_and_end_tokens(tmp_path, own_template):
    folder = family(
        tmp_path,
        tf.Qwen2Config(
            **C
            | dict(
                vocab_size=151936,
                hidden_size=8,
                eos_token_id=151643,
                pad_token_id=None,
                bos_token_id=151643,
            ),
            **GQA,
        ),
    )[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(QWEN / name, folder)
    if not own_template:
        change_json(folder / "tokenizer_config.json", chat_template=None)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.decode_raw(policy.prompt_ids("What is $1+1$?")) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert policy.end_ids == {151643, 151645} and policy.end_id == 151645
    for text in (
        " Wait! Something is wrong here.",
        "The answer",
        "\nSo \\boxed{1}.",
        "  two",
        "\n\n  x",
        ".\n\n",
        "",
    ):
        assert policy.encode(text) == policy.tokenizer.encode(text, add_special_tokens=False)


def sentencepiece_tokenizer(*words):
    """A SentencePiece-like vocabulary: bytes, letters, and words by merges, such as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    pieces += ["\u2581", *map(chr, range(33, 127))]
    merges = []
    for word in words:
        for k in range(1, len(word)):
            if (word[:k], word[k]) not in merges:
                merges.append((word[:k], word[k]))
                pieces.append(word[: k + 1])
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return tf.LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def sentencepiece(tmp_path, template=None):
    tokenizer = sentencepiece_tokenizer("Wait", "\u2581Wait", "\u2581The")
    folder = family(
        tmp_path,
        tf.MistralConfig(
            **C
            | dict(vocab_size=len(tokenizer), eos_token_id=2, pad_token_id=None, bos_token_id=1),
            **GQA,
        ),
    )[0]
    tokenizer.chat_template = template
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    tokenizer.save_pretrained(folder)
    return engine.load_policy(str(folder), "cpu")


def test_a_base_model_without_a_template_gets_its_bos(tmp_path):
    policy = sentencepiece(tmp_path)
    ids = policy.prompt_ids(QUESTION)
    assert ids == policy.tokenizer.encode(prompt_text(policy.tokenizer, QUESTION, "qwen"))
    assert ids[0] == 1 and 1 not in ids[1:]
    plain = engine.load_policy("tiny", "cpu")
    plain.tokenizer.chat_template = None
    assert plain.decode_raw(plain.prompt_ids(QUESTION)).startswith("<|im_start|>system")


def test_a_template_writes_the_bos_itself(tmp_path):
    policy = sentencepiece(tmp_path, "{{ bos_token }}[INST] {{ messages[-1].content }} [/INST]")
    assert policy.prompt_ids(QUESTION).count(1) == 1


@pytest.mark.parametrize("text", ["Wait", " Wait", "\nWait", "7", "The end.", "\\boxed{7}", " "])
def test_injected_text_gets_no_blank_in_front(tmp_path, text):
    policy = sentencepiece(tmp_path)
    before = policy.encode("It is 7.")
    assert policy.decode(before + policy.encode(text)) == "It is 7." + text


def test_a_template_that_asks_for_the_time_gets_the_same_one_every_day(tmp_path):
    template = (
        "  {%- if true %}{{ strftime_now('%Y-%m-%d') + ' ' + strftime_now('%d %b %Y %H:%M') }}{% endif %}\n"
        "{{ date_string }} {{ messages[-1].content }}"
    )
    policy = engine.load_policy(str(tiny(tmp_path, template)), "cpu")
    assert policy.decode_raw(policy.prompt_ids("Q")) == "2024-07-26 26 Jul 2024 00:0026 Jul 2024 Q"


@pytest.mark.parametrize(
    "opened, noted", [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)]
)
def test_a_template_that_opens_thinking_is_told(tmp_path, capsys, opened, noted):
    engine.load_policy(str(tiny(tmp_path, CHATML + opened)), "cpu")
    assert ("opens <think>" in capsys.readouterr().out) == noted


def test_a_template_that_loses_the_question_is_refused(tmp_path):
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match="leaves the question out"):
        engine.load_policy(str(tiny(tmp_path, "<|im_start|>" + parts)), "cpu")


# --- 13: ids without a row ------------------------------------------------------------------------------------------


def test_an_added_id_beyond_the_embedding_is_refused_only_where_it_is_needed(tmp_path):
    folder = tiny(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.save_pretrained(folder)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.vocab_size == policy.sampler.vocab_size == 308 and gap(policy) < 1e-4
    for use in (policy.prompt_ids, policy.encode):
        with pytest.raises(
            UserError, match="ids up to 308, but the model's embedding only 308 rows"
        ):
            use("what is in <image>?")


def test_a_vocabulary_beyond_the_embedding_is_refused(tmp_path):
    folder = family(
        tmp_path,
        tf.Qwen2Config(**C | dict(vocab_size=200, eos_token_id=0, pad_token_id=None), **GQA),
    )[0]
    change_json(folder / "tokenizer_config.json", chat_template="{{ messages[-1].content }}")
    with pytest.raises(UserError, match="belongs to another model"):
        engine.load_policy(str(folder), "cpu")


# --- 34, 35, 36: what is refused, each in one sentence --------------------------------------------------------------


def pickled_by_index(folder):
    tensors = tf.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(tensors, folder / "evil.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "evil.bin")})
    )


def pickled_by_config(folder):
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.bin")
    change_json(folder / "config.json", transformers_weights="adapter_model.bin")


def template(text):
    return lambda folder: change_json(folder / "tokenizer_config.json", chat_template=text)


def ends(value, file="generation_config.json"):
    return lambda folder: change_json(folder / file, eos_token_id=value)


REFUSED = {  # name: (damage, what the sentence holds)
    "an index that names a pickle": (pickled_by_index, "evil.bin; pickled weights are not loaded"),
    "a config that names a pickle": (pickled_by_config, "pickled weights are not loaded"),
    "an index that is none": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        "cannot be loaded",
    ),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), "merge"),
    "an adapter alone": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "merge"),
    "quantized": (
        lambda f: change_json(f / "config.json", quantization_config=dict(quant_method="mine")),
        "quantized",
    ),
    "division by zero": (template("{{ 1 / 0 }}"), "chat template fails (division by zero)"),
    "recursion": (
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "chat template fails",
    ),
    "a lone surrogate": (template("\ud800{{ messages[-1].content }}"), "chat template fails"),
    "a large range": (template("{{ range(10 ** 9) }}"), "chat template fails"),
    "an unknown method": (template("{{ messages[0].content.nonsense() }}"), "chat template fails"),
    "no jinja": (template("{% for %}"), "chat template fails"),
    "a template that is a number": (template(3), "--model"),
    "an end token as text": (ends("2"), "--model"),
    "end tokens as text": (ends(["<|im_end|>"]), "--model"),
    "an end token of half": (ends(1.5), "--model"),
    "an end token that is true": (ends(True), "--model"),
    "a negative end token": (ends(-1), "eos_token_id"),
    "an end token without a row": (ends(5000), "eos_token_id"),
    "a nested list of ends": (ends([[1]]), "--model"),
    "an end token as text in config.json": (ends("2", "config.json"), "--model"),
    "a tokenizer of another shape": (
        lambda f: (f / "tokenizer.json").write_text("[1]"),
        "tokenizer cannot be read",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_sentence_that_names_the_model(tmp_path, name):
    damage, holds = REFUSED[name]
    folder = tiny(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as caught:
        engine.load_policy(str(folder), "cpu")
    assert (
        holds in str(caught.value)
        and str(folder) in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert not isinstance(caught.value, CannotSample)


def test_no_memory_is_no_fault_of_the_model(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.load_policy("tiny", "cpu")
