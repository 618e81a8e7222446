"""engine/models.py, modelfiles.py and prompts.py: names, folders, families, weights, end tokens,
prompts and tokenizers, also those unlike the paper's two. What is refused: test_bad_input.py."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers as tf
from helpers import LLAMA_3_ROPE
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

import edge_grpo
import engine
import eval as evaluation
from engine.checkpoints import save_final, save_model
from engine.forward import response_logprobs
from engine.modelfiles import TINY_MODEL, find_model
from engine.models import choose_dtype, load_config, load_model
from engine.prompts import INSTRUCTION, prompt_text
from engine.trainer import Trainer
from errors import UserError

ROOT = Path(__file__).parents[1]
QWEN = ROOT.parent / "shared" / "tokenizers" / "Qwen2.5-Math-1.5B"
needs_qwen = pytest.mark.skipif(
    not QWEN.exists(), reason="../shared is absent: no real tokenizer to test with"
)
QUESTION = "Eva has 3 shells. How many?"

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + (m.role if m.role == 'user' else 'model') + '\n' }}"
    "{{ m.content|trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ ' ' + m.content|trim + ' ' + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% for m in messages %}{{ '<|header|>' + m.role + '<|header_end|>\n\n' + m.content|trim }}"
    "{{ '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|header_end|>\n\n' }}{% endif %}"
)
EOS_IN_PROMPT = (  # an old model of Mistral's kind, whose prompt would change with eos_token
    "{% for m in messages %}{{ m.content + (eos_token if m.role == 'system' else '<|eot|>') }}"
    "{% endfor %}"
)
QWEN_3 = CHATML.replace(
    "'\n' + m.content",
    "'\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content",
)
GPT_OSS = (
    "{% for m in messages %}{{ '<|start|>' + m.role }}"
    "{{ '<|channel|>final<|message|>' if m.role == 'assistant' else '<|message|>' }}"
    "{{ m.content + ('<|return|>' if m.role == 'assistant' else '<|end|>') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
GLM = (
    "[gMASK]{% for m in messages %}{{ '<|' + m.role + '|>\n' }}"
    "{{ '<think></think>\n' if m.role == 'assistant' else '' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
NO_RESPONSES = (
    "{% if messages[-1].role == 'assistant' %}{{ 1 / 0 }}{% endif %}{{ messages[-1].content }}"
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
GQA = C | dict(num_key_value_heads=2)


def rope(theta=1e6, **more):
    return dict(rope_parameters={"rope_type": "default", "rope_theta": theta, **more})


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
    """A random model of a config, far from uniform, with the tiny model's tokenizer."""
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
    """The largest difference of a log-probability between sampler and trainer, ragged rows."""
    prompts = [policy.prompt_ids(QUESTION)[-n:] for n in (60, 60, 20, 5)]
    samples = policy.sample(prompts, [limit, limit // 3, limit, limit // 2], [1, 2, 3, 4], 1.0)
    trainer = response_logprobs(
        policy.model, prompts, [s.ids for s in samples], 1.0, policy.vocab_size, 300
    )
    gaps = []
    for sample, (logp, _) in zip(samples, trainer):
        gaps.append((torch.tensor(sample.logprobs) - logp).abs().max().item())
    return max(gaps)


# --- names, policies ---------------------------------------------------------------------------


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


def test_dtype_is_what_the_model_computes_in_and_masters_stay_float32(policy):
    assert policy.model.dtype == torch.float32  # on a CPU
    other = engine.load_policy("tiny", "cpu", dtype="bfloat16")
    trainer = Trainer(other, micro_batch_tokens=1000)
    assert other.model.dtype == torch.bfloat16
    assert {master.dtype for master in trainer.masters.values()} == {torch.float32}
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    "program, flags",
    [
        (edge_grpo, "--steps 1 --eval-every 0 --eval-tasks tiny:1:validation --eval-limit 1"),
        (evaluation, "--model tiny --tasks tiny:1:test --limit 1"),
    ],
)
def test_both_programs_compute_in_the_dtype_that_is_asked_for(
    tmp_path, monkeypatch, program, flags
):
    used = []
    load = engine.load_policy

    def load_policy(*args):
        policy = load(*args)
        used.append(policy.model.dtype)
        return policy

    monkeypatch.setattr(engine, "load_policy", load_policy)
    out = str(tmp_path / "out")
    assert program.main([*flags.split(), "--dtype", "bfloat16", "--out", out]) == 0
    assert used == [torch.bfloat16]


def test_a_fingerprint_is_that_of_the_weights_the_prompt_and_the_end_tokens(policy):
    tiny = engine.load_policy("tiny", "cpu")
    before = policy.fingerprint()
    assert tiny.fingerprint() == before
    for weight in tiny.model.parameters():
        with torch.no_grad():
            value = weight.flatten()[3].item()
            weight.view(-1)[3] += 0.1
            assert tiny.fingerprint() != before
            weight.view(-1)[3] = value
    assert tiny.fingerprint() == before
    assert replace(tiny, end_ids={256}).fingerprint() != before
    tiny.tokenizer.chat_template = CHATML
    assert tiny.fingerprint() != before


# --- families ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, context",
    [
        (tf.Phi3Config(**GQA, original_max_position_embeddings=96, **rope(**LONGROPE)), 96),
        (tf.LlamaConfig(**GQA, **rope(rope_type="dynamic", factor=4.0)), 256),
    ],
    ids=["longrope", "dynamic"],
)
def test_rows_end_before_their_length_changes_the_rotations_of_a_batch(
    tmp_path, capsys, config, context
):
    folder, model = family(tmp_path, config)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.context() == context
    assert ("longrope" in capsys.readouterr().out) == (context == 96)
    assert gap(policy, limit=400) < 1e-4
    policy.end_ids = policy.sampler.end_ids = set()
    assert max(len(s.ids) for s in policy.sample([[1, 2, 3]], [400], [5], 1.0)) <= context - 3


SMALL = {key: value for key, value in C.items() if key not in ("intermediate_size",)}
NO_SDPA = {
    "bloom": tf.BloomConfig(**SMALL),
    "mpt": tf.MptConfig(
        vocab_size=308, d_model=32, n_layers=2, n_heads=4, max_seq_len=96, expansion_ratio=2
    ),
    "gpt_oss": tf.GptOssConfig(
        **GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
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
    ),
}


@pytest.mark.parametrize("name", NO_SDPA)
def test_families_without_torchs_attention_sample_what_they_train(tmp_path, name):
    policy = engine.load_policy(str(family(tmp_path, NO_SDPA[name])[0]), "cpu")
    assert gap(policy) < 1e-4
    assert name != "mpt" or policy.context() == 96


# --- folders -----------------------------------------------------------------------------------


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
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment)
    assert "'preprocessor_config.json', 'tokenizer.json'" in run.stdout, run.stderr


def test_the_working_folder_is_a_model_and_its_attention_is_ours(tmp_path, monkeypatch):
    folder = tiny(tmp_path, _attn_implementation="flash_attention_2")
    monkeypatch.chdir(folder)
    policy = engine.load_policy(".", "cpu")
    assert policy.model.config._attn_implementation == "sdpa"
    assert "_attn_implementation" not in json.loads(policy.files["config.json"])


# --- weights -----------------------------------------------------------------------------------


def biases(folder):
    config = tf.LlamaConfig(**GQA, attention_bias=True)
    family(folder.parent, config)
    change_json(folder / "config.json", attention_bias=False)


def add_weights(**tensors):
    def add(folder):
        weights = load_file(folder / "model.safetensors")
        for key, shape in tensors.items():
            weights[key] = torch.ones(shape)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return add


LAYER = "model.layers.0.self_attn."
UNUSED = {  # name: (what is done to a model of two layers, the weight that is named or "")
    "a bias of an attention without": (biases, LAYER + "k_proj.bias"),
    "layers beyond the last": (
        lambda f: change_json(
            f / "config.json", num_hidden_layers=1, layer_types=["full_attention"]
        ),
        "model.layers.1.input_layernorm.weight",
    ),
    "LoRA": (
        add_weights(**{LAYER + "q_proj.lora_A.weight": (4, 32)}),
        LAYER + "q_proj.lora_A.weight",
    ),
    "rotary buffers": (add_weights(**{LAYER + "rotary_emb.inv_freq": (4,)}), ""),
    "a causal mask": (add_weights(**{LAYER[:-1] + ".bias": (1, 1, 8, 8)}), ""),
    "layers that predict ahead": (add_weights(**{"mtp.fc.weight": (4, 4)}), ""),
}


@pytest.mark.parametrize("name", UNUSED)
def test_weights_that_the_config_has_no_place_for_are_refused(tmp_path, name):
    damage, weight = UNUSED[name]
    folder, _ = family(tmp_path, tf.Qwen2Config(**GQA))
    damage(folder)
    if not weight:
        engine.load_policy(str(folder), "cpu")
        return
    with pytest.raises(UserError, match=f"no place for, such as {weight};"):
        engine.load_policy(str(folder), "cpu")


def test_the_other_parts_of_a_larger_model_may_stay_behind(tmp_path):
    """Llama 4's text part has a config of its own; images are none of our business."""
    config = tf.Llama4Config(
        text_config=dict(**GQA, head_dim=8, intermediate_size_mlp=64, num_local_experts=2),
        vision_config=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
    )
    folder, _ = family(tmp_path, config.get_text_config())
    config.save_pretrained(folder)
    add_weights(**{"vision_model.class_embedding": (32,)})(folder)
    cpu = torch.device("cpu")
    assert load_model(str(folder), cpu, torch.float32).config.model_type == "llama4_text"
    add_weights(**{LAYER + "q_proj.bias": (32,)})(folder)
    with pytest.raises(UserError, match="no place for"):
        load_model(str(folder), cpu, torch.float32)


@pytest.mark.parametrize("same", [True, False])
def test_an_output_layer_beside_a_config_that_says_tied(tmp_path, capsys, same):
    """It is trained where it differs from the embedding, so every reader of final/ must use it."""
    folder, model = family(tmp_path, tf.Qwen2Config(**GQA, tie_word_embeddings=same))
    if same:
        embedding = model.model.embed_tokens.weight
        save_file(
            {**load_file(folder / "model.safetensors"), "lm_head.weight": embedding.detach()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
    change_json(folder / "config.json", tie_word_embeddings=True)
    policy = engine.load_policy(str(folder), "cpu")
    assert ("it is trained" in capsys.readouterr().out) != same
    check_readers(policy, tmp_path / "saved", model)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["tie_word_embeddings"] == same


# --- what is saved -----------------------------------------------------------------------------

ROTATIONS = dict(rope_theta=1e6, rope_scaling=None)
LLAMA_3_SCALING = {key: LLAMA_3_ROPE[key] for key in LLAMA_3_ROPE if key != "rope_theta"}
READ_ALIKE = {  # name: (config, what transformers 4 reads in config.json)
    "qwen2": (tf.Qwen2Config(**GQA, **rope()), dict(rope_theta=1e6, rope_scaling=None)),
    "llama3": (
        tf.LlamaConfig(**GQA, rope_parameters=LLAMA_3_ROPE),
        dict(rope_theta=1e4, rope_scaling=LLAMA_3_SCALING),
    ),
    "gemma3": (
        tf.Gemma3TextConfig(
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
        tf.Phi3Config(**GQA, original_max_position_embeddings=96, **rope(**LONGROPE)),
        dict(
            original_max_position_embeddings=96,
            rope_scaling=dict(type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
        ),
    ),
    "gpt_neox": (
        tf.GPTNeoXConfig(**C, **rope(partial_rotary_factor=0.25)),
        dict(rotary_emb_base=1e6, rotary_pct=0.25),
    ),
    "qwen3_moe": (
        tf.Qwen3MoeConfig(
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


def check_readers(policy, saved, model):
    """Saves the policy; transformers 5, and with TRANSFORMERS_4=FOLDER also transformers 4
    (`pip install --target FOLDER 'transformers<5'`), must find the logits of `model` in it."""
    save_model(policy, saved)
    ids = torch.arange(200)[None] % 300
    logits = model(ids).logits
    assert torch.equal(tf.AutoModelForCausalLM.from_pretrained(saved).eval()(ids).logits, logits)
    if path := os.environ.get("TRANSFORMERS_4"):
        command = [sys.executable, "-c", LOGITS, str(saved)]
        environment = {**os.environ, "PYTHONPATH": path}
        run = subprocess.run(command, text=True, capture_output=True, env=environment)
        assert run.returncode == 0, run.stderr
        assert torch.allclose(torch.load(saved / "logits.pt"), logits, atol=1e-4)


@pytest.mark.parametrize("name", READ_ALIKE)
def test_a_saved_model_is_the_same_for_readers_of_transformers_4_and_5(tmp_path, name):
    config, old_keys = READ_ALIKE[name]
    folder, model = family(tmp_path, config)
    check_readers(engine.load_policy(str(folder), "cpu"), tmp_path / "saved", model)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {k: saved[k] for k in old_keys} == old_keys
    assert saved["torch_dtype"] == saved["dtype"] == "float32"
    assert saved["architectures"] == [type(model).__name__]


def test_a_config_of_transformers_4_stays_but_for_its_dtype_and_end_tokens(tmp_path):
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
    assert policy.model.config.rope_parameters["rope_theta"] == 1e6
    assert policy.model.config.attention_dropout == 0
    save_model(policy, tmp_path / "saved")
    after = json.loads((tmp_path / "saved" / "config.json").read_text())
    changes = dict(dtype="float32", torch_dtype="float32", eos_token_id=[256, 257])
    assert after == before | changes


def test_all_that_stands_beside_the_weights_is_saved_byte_for_byte(tmp_path):
    """Tokenizer files are not written anew, in a form that transformers 4 may not know."""
    folder = tiny(tmp_path)
    for name, text in {
        "preprocessor_config.json": "{ }",
        "special_tokens_map.json": "{}",
        "tokenizer.model": "",
        "chat_template.jinja": CHATML,
        "additional_chat_templates/rag.jinja": PHI,
        "checkpoint.json": "{}",
        "pytorch_model.bin.index.json": "{}",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    change_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        add_prefix_space=None,
    )
    # Llama 2 has these two without do_sample, which transformers 5.0 refuses to save.
    change_json(folder / "generation_config.json", temperature=0.6, top_p=0.9)

    def contents(folder):
        return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}

    before = contents(folder)
    policy = engine.load_policy(str(folder), "cpu")
    shutil.rmtree(folder)  # --overwrite of the run that it came from
    save_final(policy, tmp_path / "final")
    after = contents(tmp_path / "final")
    dropped = {Path("checkpoint.json"), Path("pytorch_model.bin.index.json")}
    assert after.keys() == before.keys() - dropped
    assert {name for name in after if after[name] != before[name]} == {Path("config.json")}
    assert policy.model.generation_config.temperature == 0.6
    again = engine.load_policy(str(tmp_path / "final"), "cpu")
    assert again.prompt_ids(QUESTION) == policy.prompt_ids(QUESTION)
    assert again.fingerprint() == policy.fingerprint()


def test_without_a_generation_config_the_saved_model_still_knows_its_end(tmp_path):
    folder = tiny(tmp_path)
    (folder / "generation_config.json").unlink()
    save_model(engine.load_policy(str(folder), "cpu"), tmp_path / "saved")
    assert tf.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 256


# --- end tokens --------------------------------------------------------------------------------

EOS = "<|endoftext|>"
TURN_ENDS = {  # name: (template, special tokens, the end of a turn, eos_token of final/)
    "chatml": (CHATML, (), "<|im_end|>", "<|im_end|>"),
    "gemma": (GEMMA, ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", "<end_of_turn>"),
    "phi": (PHI, ("<|end|>", "<|user|>"), "<|end|>", "<|end|>"),
    "llama 2": (LLAMA_2, ("</s>",), "</s>", "</s>"),
    "llama 3": (LLAMA_3, ("<|header|>", "<|header_end|>", "<|eot|>"), "<|eot|>", "<|eot|>"),
    "qwen 3": (QWEN_3, (), "<|im_end|>", "<|im_end|>"),
    "gpt-oss": (GPT_OSS, ("<|end|>", "<|return|>"), "<|return|>", "<|return|>"),
    "glm": (GLM, ("<|user|>",), EOS, EOS),
    "eos in the prompt": (EOS_IN_PROMPT, ("<|eot|>",), "<|eot|>", EOS),
    "no end": ("{{ messages[-1].content }}", (), EOS, EOS),
    "no responses": (NO_RESPONSES, (), EOS, EOS),
}


def stops_generate(model, token) -> bool:
    """Whether generate() stops at a token that is forced to be its fourth."""

    def force(ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token if ids.shape[1] == 5 else 7] = 0.0
        return forced

    start = torch.tensor([[5, 6]])
    ids = model.generate(start, max_new_tokens=10, do_sample=False, logits_processor=[force])
    return ids.shape[1] == 6


def check_ends(policy, final):
    """Readers of final/ must stop where the sampler stops, whichever file they read."""
    save_final(policy, final)
    model = tf.AutoModelForCausalLM.from_pretrained(final)
    special = {7, *policy.end_ids, *policy.tokenizer.added_tokens_decoder}
    assert {i for i in special if stops_generate(model, i)} == policy.end_ids
    assert policy.sampler.end_ids == policy.end_ids
    config, generation = tf.AutoConfig.from_pretrained(final), model.generation_config
    for named in (config.eos_token_id, generation.eos_token_id):
        assert set(named if isinstance(named, list) else [named]) == policy.end_ids
    again = engine.load_policy(str(final), "cpu")
    assert (again.end_ids, again.end_id) == (policy.end_ids, policy.end_id)
    assert again.prompt_ids(QUESTION) == policy.prompt_ids(QUESTION)
    return again.tokenizer.eos_token


@pytest.mark.parametrize("name", TURN_ENDS)
def test_final_stops_where_the_sampler_stops(tmp_path, name):
    """The end of a turn is read from the template: every vocabulary here holds <|im_end|>."""
    template, tokens, end, saved_eos = TURN_ENDS[name]
    folder = tiny(tmp_path, template, tokens, eos_token_id=257)
    change_json(folder / "generation_config.json", eos_token_id=257)
    change_json(
        folder / "tokenizer_config.json", eos_token="</s>" if "</s>" in tokens else "<|endoftext|>"
    )
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.decode_raw([policy.end_id]) == end
    assert {policy.decode_raw([i]) for i in policy.end_ids} == {end, "<|endoftext|>"}
    assert check_ends(policy, tmp_path / "final") == saved_eos


@needs_qwen
@pytest.mark.parametrize("own_template", [True, False])
def test_the_papers_prompt_and_end_tokens(tmp_path, own_template):
    ends = dict(eos_token_id=151643, pad_token_id=None, bos_token_id=151643)
    config = tf.Qwen2Config(**GQA | ends | dict(vocab_size=151936, hidden_size=8))
    folder = family(tmp_path, config)[0]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(QWEN / name, folder)
    if not own_template:
        change_json(folder / "tokenizer_config.json", chat_template=None)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.decode_raw(policy.prompt_ids("What is $1+1$?")) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>user\nWhat is $1+1$?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert policy.end_ids == {151643, 151645} and policy.end_id == 151645
    assert check_ends(policy, tmp_path / "final") == "<|im_end|>"
    for text in (" Wait! Something is wrong here.", "\nSo \\boxed{1}.", "  two", ".\n\n", ""):
        assert policy.encode(text) == policy.tokenizer.encode(text, add_special_tokens=False)


def test_an_end_token_that_is_an_ordinary_token_is_told(tmp_path, capsys):
    """As in configs that keep the eos_token_id of their class. (This template names the system
    turn.)"""
    folder = tiny(tmp_path, eos_token_id=2)
    change_json(folder / "generation_config.json", eos_token_id=[2, 257])
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.end_ids == {2, 256, 257}
    out = capsys.readouterr().out
    assert out.count("ordinary token") == 1
    assert "system turn" not in out, "this template leaves it out on purpose"


# --- prompts -----------------------------------------------------------------------------------

RESPONSE_HEADERS = {  # name: (template, what precedes a response, what the note says of it)
    "chatml": (CHATML, "", ""),
    "gemma": (GEMMA, "", ""),
    "qwen 3": (QWEN_3, "<think>\n\n</think>\n\n", "before a response"),
    "gpt-oss": (GPT_OSS, "<|channel|>final<|message|>", "before a response"),
    "glm": (GLM, "\n<think></think>\n", "before a response"),
    "llama 2": (LLAMA_2, " ", "before a response"),
    "no generation prompt": (
        CHATML.partition("{% if")[0],
        "<|im_start|>assistant\n",
        "before a response",
    ),
    "no responses": (NO_RESPONSES, "", "does not show how a response follows"),
    "an open user's turn": (
        "{% for m in messages %}{{ '<|im_end|>' if not loop.first else '' }}"
        "{{ m.role + ': ' + m.content }}{% endfor %}",
        "",
        "holds an end token",
    ),
    "open thinking": (CHATML + "<think>\n", "", "opens <think>"),
}


@pytest.mark.parametrize("name", RESPONSE_HEADERS)
def test_references_stand_where_the_template_puts_a_response(tmp_path, capsys, name):
    template, header, note = RESPONSE_HEADERS[name]
    policy = engine.load_policy(str(tiny(tmp_path, template)), "cpu")
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert len(notes) == bool(note) and note in "".join(notes)
    assert policy.response_header == header
    text = "The sum is 3."
    turn = policy.decode_raw(policy.prompt_ids(QUESTION) + policy.encode_response(text))
    assert turn.endswith(header + text)
    if not note or header:
        assert prompt_text(policy.tokenizer, QUESTION, policy.template, text).startswith(turn)


@pytest.mark.parametrize(
    "chat_template, prompt",
    [
        (None, "<|im_start|>system\nPlease"),
        ("Q: {{ messages[-1].content }}\nA:", f"Q: {QUESTION}\nA:"),
    ],
)
def test_a_template_in_chat_template_json_is_used(tmp_path, capsys, chat_template, prompt):
    folder = tiny(tmp_path)
    change_json(folder / "tokenizer_config.json", chat_template=None)
    if chat_template:
        change_json(folder / "chat_template.json", chat_template=chat_template)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.decode_raw(policy.prompt_ids(QUESTION)).startswith(prompt)
    assert ("leaves out the system turn" in capsys.readouterr().out) == bool(chat_template)


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


def test_a_template_that_asks_for_the_time_gets_the_same_one_every_day(tmp_path):
    template = (
        "  {%- if true %}{{ strftime_now('%Y-%m-%d') + ' ' + strftime_now('%d %b %Y %H:%M') }}"
        "{% endif %}\n{{ date_string }} {{ messages[-1].content }}"
    )
    policy = engine.load_policy(str(tiny(tmp_path, template)), "cpu")
    assert policy.decode_raw(policy.prompt_ids("Q")) == "2024-07-26 26 Jul 2024 00:0026 Jul 2024 Q"


# --- tokenizers --------------------------------------------------------------------------------

CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def own_split(tmp_path, split, tokenizer_class, config_class):
    """A model whose tokenizer.json splits texts in its own way before its byte-level BPE."""
    original = tokenizers.Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    original.pre_tokenizer = byte_level
    if split:
        own = pre_tokenizers.Split(Regex(split), "isolated")
        original.pre_tokenizer = pre_tokenizers.Sequence([own, byte_level])
    original.decoder = decoders.ByteLevel()
    texts = ["Ann has 2023 pens. How many?\n\n<think>\nOkay, 12345 456 789"] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    original.train_from_iterator(texts, trainer)
    original.add_special_tokens([AddedToken("<|end|>", special=True, normalized=False)])
    ends = dict(vocab_size=original.get_vocab_size(), eos_token_id=original.token_to_id("<|end|>"))
    folder, _ = family(tmp_path, config_class(**GQA | ends | dict(pad_token_id=None)))
    original.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            dict(
                tokenizer_class=tokenizer_class,
                eos_token="<|end|>",
                chat_template="{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}",
            )
        )
    )
    return folder, original


@pytest.mark.parametrize(
    "split, tokenizer_class, config_class",
    [
        (None, "LlamaTokenizerFast", tf.LlamaConfig),  # R1 distills, DeepSeek-Math
        (CL100K, "PreTrainedTokenizerFast", tf.Qwen2Config),
        (CL100K, "Qwen2TokenizerFast", tf.Qwen2Config),
        (CL100K, "GPT2TokenizerFast", tf.LlamaConfig),
        (r"\p{N}| ?[^\s\p{N}]+|\s+", "GPT2Tokenizer", tf.Qwen3Config),
    ],
)
def test_ids_are_those_of_the_models_own_tokenizer_json(
    tmp_path, split, tokenizer_class, config_class
):
    folder, original = own_split(tmp_path, split, tokenizer_class, config_class)
    policy = engine.load_policy(str(folder), "cpu")
    text = "Ann's got 2023 pens.\n\n<think>\nShe buys  650841 \u6570 more! $\\frac{1}{2}$"
    ids = original.encode(text, add_special_tokens=False).ids
    assert policy.encode(text) == ids and policy.decode(ids) == text
    assert ids == policy.tokenizer.encode(text) and gap(policy) < 1e-4


def sentencepiece_tokenizer(*words):
    """A SentencePiece-like vocabulary, such as Llama 2's: bytes, letters, and words by merges."""
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
    ends = dict(eos_token_id=2, pad_token_id=None, bos_token_id=1)
    config = tf.MistralConfig(**GQA | ends | dict(vocab_size=len(tokenizer)))
    folder = family(tmp_path, config)[0]
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


def test_a_template_writes_the_bos_itself(tmp_path):
    policy = sentencepiece(tmp_path, "{{ bos_token }}[INST] {{ messages[-1].content }} [/INST]")
    assert policy.prompt_ids(QUESTION).count(1) == 1


@pytest.mark.parametrize("text", ["Wait", " Wait", "\nWait", "7", "The end.", "\\boxed{7}", " "])
def test_injected_text_gets_no_blank_in_front(tmp_path, text):
    policy = sentencepiece(tmp_path)
    before = policy.encode("It is 7.")
    assert policy.decode(before + policy.encode(text)) == "It is 7." + text


def test_an_added_id_beyond_the_embedding_is_refused_only_where_it_is_needed(tmp_path):
    folder = tiny(tmp_path)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.save_pretrained(folder)
    policy = engine.load_policy(str(folder), "cpu")
    assert policy.vocab_size == policy.sampler.vocab_size == 308 and gap(policy) < 1e-4
    for use in (policy.prompt_ids, policy.encode):
        with pytest.raises(UserError, match="up to 308, but the model's embedding only 308 rows"):
            use("what is in <image>?")


def test_no_memory_is_no_fault_of_the_model(monkeypatch):
    def no_memory(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tf.AutoModelForCausalLM, "from_pretrained", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        engine.load_policy("tiny", "cpu")
