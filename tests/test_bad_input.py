"""Every mistake that a user can make: one sentence on stderr that says what to change, exit code
2, nothing lost.

MISTAKES has a line for each: the command => a part of its sentence. {tmp} is a folder that holds
the FILES and the MODELS that a command names. Commands of eval.py begin with `eval.py`, the others
are of edge_grpo.py."""

import json
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import refusal
from transformers import BertConfig, BertForMaskedLM

import edge_grpo
import eval as evaluation
from data import download
from engine import modelfiles, models
from errors import UserError

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny_model"
SMALL = (
    "--steps 1 --questions-per-step 1 --group-size 2 --max-new-tokens 2 --correction-tokens 1 "
    "--eval-tasks"
).split()

MISTAKES = r"""
--stepz 3 => unrecognized arguments: --stepz 3; did you mean --steps?
--group_size 3 => did you mean --group-size?
--max-tokens 3 => did you mean --max-new-tokens?
--no-edaa => did you mean --no-eda?
--xyzzyq 3 => --xyzzyq 3 (--help lists every flag)
tiny => unrecognized arguments: tiny
--steps => --steps
--steps 0 => --steps 0: must be at least 1
--steps 1.5 => 1.5
--steps many => many
--method ppo => ppo
--lr nan => --lr nan: must be a finite number
--lr inf => --lr inf
--lr -1 => --lr
--temperature 0 => --temperature
--top-p 0 => --top-p
--top-p 1.5 => --top-p 1.5: must be between
--group-size 0 => --group-size
--group-size 1 => a group of one
--questions-per-step 0 => --questions-per-step
--max-new-tokens 0 => --max-new-tokens
--micro-batch-tokens 0 => --micro-batch-tokens
--max-rows -1 => --max-rows
--seed -1 => --seed
--keep 0 => --keep
--max-bad-steps 0 => --max-bad-steps
--eps-low 2 => --eps-low
--format-weight -1 => --format-weight
--updates-per-rollout 0 => --updates-per-rollout
--loss mean => mean
--template chatml => chatml
--correction wait => must be none, guided, reflect
--correction-factors 1 1 1 1 1 => at most 4
--all-wrong-advantage 1 => --all-wrong-advantage
--method grpo --guide all-wrong => --guide
--method grpo --guide-at-most 1 => --guide
--betas 0.9 1 => --betas
--betas 0.9 => --betas
--method force-r --guided-probs 0.2 0.4 0.4 => belongs to --correction guided
--method sft --mask-injected => drop
--guided-probs 0.5 0.5 0.5 => sum to 1
--guided-probs .4 .3 .1 .1 .1 => at most 4
--guided-probs -1 1 1 => --guided-probs
--guided-probs 0.5 0.25 => sum to 1
--eda-clamp 2 1 => LO < HI
--eda-clamp 0 1 => 0 < LO
--method grpo --correction-factors 1 1 5 => does nothing
--method grpo --mask-injected => does nothing
--method grpo --injected-shaping .1 => does nothing
--method grpo --drop-wrong-references => does nothing
--injected-shaping .1 --mask-injected => one of the two
--sft => --method sft
--eda-clamp 1 2 3 => LO HI
--eda-clamp .5 1 2 1 => LO < HI
--no-eda --eda-rows right => need EDA
--eda-clamp 0.5 2 --no-eda => --eda-clamp
--eda-grad --no-eda => --eda-grad
--method sft --eda => drop --correction, --eda
--method sft --correction reflect => drop --correction
--method sft --kl 0.1 => --kl
--method sft --random-reward => --random-reward
--method sft --resample-rounds 2 => --resample-rounds
--method sft --advantage-std none => --advantage-std
--method sft --all-wrong-advantage -1 => --all-wrong-advantage
--method sft --injected-shaping .1 => drop
--method sft --updates-per-rollout 2 => drop
--resume --overwrite => one of the two
--device tpu => --device tpu
--device cpu:x => --device cpu:x
--device cuda: => --device cuda:
--device cuda => no CUDA GPU
--device cuda:0 => no CUDA GPU
--out {tmp}/file => File exists
--out {tmp}/file/below => Not a directory
--eval-tasks nonsense => nonsense
--eval-tasks tiny:9 => tiny:9
--eval-tasks {tmp}/null.json => null.json:1

--data tiny:1:test => for testing
--data gsm8k => --data gsm8k is for testing
--data tiny => tiny
--data tiny: => tiny:
--data tiny:9 => tiny:9
--data tiny:5-3 => tiny:5-3
--data tiny:x => tiny:x
--data tiny:5:nowhere => tiny:5:nowhere
--data tiny:5:train:long => tiny:5:train:long
--data tiny:5:a:b:c => tiny:5:a:b:c
--data tiny:4: => is not a tiny set
--data tiny:0-3 => is not a tiny set
--data {tmp}/nothing.jsonl => neither a file nor a known set
--data {tmp}/. => is a folder
--data {tmp}/%(long)s => too long
--data {tmp}/broken.json => broken.json is not valid JSON
--data {tmp}/broken.jsonl => broken.jsonl:2 is not valid JSON
--data {tmp}/latin1.jsonl => not UTF-8
--data {tmp}/empty.jsonl => holds no problem
--data {tmp}/blank.jsonl => holds no problem
--data {tmp}/no_answer.jsonl => no field answer
--data {tmp}/no_problem.jsonl => no field problem
--data {tmp}/null.json => null.json:1: the answer is of type NoneType
--data {tmp}/second.json => second.json:2: the answer is of type dict
--data {tmp}/answer_in_list.jsonl => the answer is of type NoneType
--data {tmp}/solution_number.jsonl => the solution is of type int
--data {tmp}/huge_number.json => not valid JSON
--data {tmp}/answer_list.jsonl => empty list of answers
--data {tmp}/answer_nan.jsonl => finite number
--data {tmp}/answer_bool.jsonl => the answer
--data {tmp}/answer_empty.jsonl => the answer is empty
--data {tmp}/question_empty.jsonl => the problem is empty
--data {tmp}/question_number.jsonl => the problem is of type int
--data {tmp}/rows_are_lists.jsonl => JSON
--data {tmp}/object.json => no field problem
--data {tmp}/surrogate.jsonl => surrogate
--data {tmp}/deep.json => not valid JSON
--data {tmp}/no_solution.jsonl => no reference solution
--data {tmp}/no_solution.jsonl --method sft => --sft needs
--data {tmp}/solution_with_end.jsonl => holds an end token
--data {tmp}/long.jsonl => --max-prompt-tokens 512

--model {tmp}/nothing => no such folder
--model ./nothing => no such folder
--model nothing => neither a local folder
--model a/b/c => no such folder
--model ~/nothing => no such folder
--model {tmp} => no config.json
--model {tmp}/no-config => no config.json
--model {tmp}/config-not-json => config.json
--model {tmp}/config-without-type => config.json
--model {tmp}/config-unknown-type => nonesuch
--model {tmp}/config-impossible-sizes => --model
--model {tmp}/no-tokenizer => no tokenizer
--model {tmp}/tokenizer-broken => tokenizer
--model {tmp}/tokenizer-of-another-model => the tokenizer has ids up to
--model {tmp}/template-broken => chat template
--model {tmp}/template-refuses => no system turn
--model {tmp}/templates-without-default => multiple chat templates
--model {tmp}/template-loses-the-question => leaves the question out
--model {tmp}/template-divides-by-zero => chat template fails (division by zero)
--model {tmp}/template-of-a-large-text => chat template fails (MemoryError)
--model {tmp}/template-with-half-a-character => chat template fails
--model {tmp}/template-is-a-number => --model
--model {tmp}/no-weights => no *.safetensors
--model {tmp}/weights-pickled => pickles are not loaded
--model {tmp}/index-names-a-pickle => evil.bin; pickled weights are not loaded
--model {tmp}/config-names-a-pickle => pickled weights are not loaded
--model {tmp}/index-is-a-list => cannot be loaded
--model {tmp}/adapter => merge
--model {tmp}/quantized => quantized
--model {tmp}/vocabulary-is-huge => config.json describes an embedding of 64,000
--model {tmp}/weights-cut-off => the weights have only 5,000 bytes
--model {tmp}/weights-no-safetensors => the weights have only 4,096 bytes
--model {tmp}/weights-one-missing => model.norm.weight
--model {tmp}/weights-one-of-another-shape => model.norm.weight
--model {tmp}/weights-of-another-model => it belongs to another model
--model {tmp}/weights-not-finite => not finite
--model {tmp}/end-token-outside-vocabulary => eos_token_id in config.json is id 50256
--model {tmp}/end-token-is-negative => eos_token_id in generation_config.json is id -1
--model {tmp}/end-token-is-text => --model
--model {tmp}/end-token-is-true => --model
--model {tmp}/end-token-of-the-tokenizer => eos_token in tokenizer_config.json is id 308, but the
--model {tmp}/remote-code => trust
--model {tmp}/encoder => --model

eval.py => --model
eval.py --model tiny --n 0 => --n 0
eval.py --model tiny --n x => x
eval.py --model tiny --temperature -1 => --temperature
eval.py --model tiny --limit 0 => --limit 0
eval.py --model tiny --temperature nan => --temperature
eval.py --model tiny --top-p 1.1 => --top-p
eval.py --model tiny --max-new-tokens 0 => --max-new-tokens
eval.py --model tiny --context 0 => --context
eval.py --model tiny --seed -1 => --seed
eval.py --model tiny --batch 0 => --batch
eval.py --model tiny --compare 8b-sft => --compare
eval.py --model tiny --entropy --temperature 0 => --entropy
eval.py --model tiny --tasks => --tasks: must be given
eval.py --model tiny --stepz => --stepz
eval.py --model {tmp}/nothing --tasks tiny:3:validation => no such folder
eval.py --model tiny --tasks nonsense => nonsense
eval.py --model tiny --tasks {tmp}/null.json => null.json:1
eval.py --model tiny --tasks tiny:3:validation --out {tmp}/file => file
eval.py --model tiny --tasks tiny:3:validation --device tpu => --device tpu
eval.py compare =>
eval.py compare {tmp}/nothing => nothing
eval.py compare {tmp} => {tmp}
eval.py compare {tmp}/file => file
eval.py plot {tmp}/nothing --out {tmp}/figures => nothing
"""
MISTAKES = [line.split(" =>") for line in MISTAKES.splitlines() if line]

FILES = {
    "file": "in the way",
    "broken.json": '[{"problem": "1+1?", "answer": "2"',
    "broken.jsonl": '{"problem": "1+1?", "answer": "2"}\n{"problem": ',
    "latin1.jsonl": b'{"problem": "caf\xe9?", "answer": "2"}',
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "no_answer.jsonl": '{"problem": "1+1?"}',
    "no_problem.jsonl": '{"answer": "2"}',
    "null.json": '[{"problem": "1+1?", "answer": null}]',
    "second.json": '[{"problem": "1+1?", "answer": "2"}, {"problem": "1+1?", "answer": {}}]',
    "answer_in_list.jsonl": '{"problem": "1+1?", "answer": ["1", null]}',
    "solution_number.jsonl": '{"problem": "1+1?", "answer": "2", "solution": 3}',
    "solution_with_end.jsonl": '{"problem": "1+1?", "answer": "2", "solution": "2<|im_end|>"}',
    "huge_number.json": '[{"problem": "q", "answer": ' + "1" * 5000 + "}]",
    "answer_list.jsonl": '{"problem": "1+1?", "answer": []}',
    "answer_nan.jsonl": '{"problem": "1+1?", "answer": NaN}',
    "answer_bool.jsonl": '{"problem": "1+1?", "answer": true}',
    "answer_empty.jsonl": '{"problem": "1+1?", "answer": " "}',
    "question_empty.jsonl": '{"problem": "", "answer": "2"}',
    "question_number.jsonl": '{"problem": 7, "answer": "2"}',
    "rows_are_lists.jsonl": '["1+1?", "2"]',
    "object.json": '{"data": []}',
    "surrogate.jsonl": r'{"problem": "\ud800", "answer": "2"}',
    "deep.json": "[" * 100_000,
    "no_solution.jsonl": '{"problem": "1+1?", "answer": "2"}',
    "long.jsonl": json.dumps(dict(problem="1+1? " * 200, answer="2", solution="2")),
}


# --- Models: what is done to a copy of the tiny one -----------------------------------------------


def write(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda model: (model / name).write_bytes(content)


def delete(*names):
    return lambda model: [(model / name).unlink() for name in names]


def change(name, **changes):
    """Other values in a JSON file; None removes a key."""

    def damage(model):
        content = json.loads((model / name).read_text()) | changes
        content = {key: value for key, value in content.items() if value is not None}
        (model / name).write_text(json.dumps(content))

    return damage


def config(**changes):
    return change("config.json", **changes)


def template(text):
    return change("tokenizer_config.json", chat_template=text)


def weights(work):
    def damage(model):
        tensors = safetensors.torch.load_file(model / "model.safetensors")
        work(tensors)
        safetensors.torch.save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


def pickled(model):
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def pickled_by_index(model):
    shutil.copy(model / "model.safetensors", model / "evil.bin")
    (model / "model.safetensors").rename(model / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "evil.bin"}}
    write("model.safetensors.index.json", json.dumps(index))(model)


def pickled_by_config(model):
    shutil.copy(model / "model.safetensors", model / "adapter_model.bin")
    config(transformers_weights="adapter_model.bin")(model)


def templates_without_default(model):
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[-1].content }}")


def cut_off(model):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:5000])


def of_100_tokens(model):
    config(vocab_size=100, eos_token_id=0, pad_token_id=None)(model)
    weights(lambda t: t.update({k: v[:100].clone() for k, v in t.items() if "embed" in k}))(model)


def with_remote_code(model):
    classes = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"}
    config(model_type="mine", auto_map=classes)(model)
    (model / "code.py").write_text(
        f"open({str(model / 'ran')!r}, 'w')\nclass Mine: pass\nclass Model: pass\n"
    )


def encoder(model):
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(BertConfig(**shape, vocab_size=308)).save_pretrained(model)


MODELS = {
    "no-config": delete("config.json"),
    "config-not-json": write("config.json", "{"),
    "config-without-type": write("config.json", "{}"),
    "config-unknown-type": config(model_type="nonesuch"),
    "config-impossible-sizes": config(num_attention_heads=7),
    "no-tokenizer": delete("tokenizer.json", "tokenizer_config.json"),
    "tokenizer-broken": write("tokenizer.json", '{"version": "1.0"}'),
    "tokenizer-of-another-model": of_100_tokens,
    "template-broken": template("{% for %}"),
    "template-refuses": template("{{ raise_exception('no system turn') }}"),
    "templates-without-default": templates_without_default,
    "template-loses-the-question": template("<|im_start|>{{ messages[-1].content.text }}"),
    "template-divides-by-zero": template("{{ 1 / 0 }}"),
    "template-of-a-large-text": template("{{ 'a' * 10 ** 14 }}"),
    "template-with-half-a-character": template("\ud800{{ messages[-1].content }}"),
    "template-is-a-number": template(3),
    "no-weights": delete("model.safetensors"),
    "weights-pickled": pickled,
    "index-names-a-pickle": pickled_by_index,
    "config-names-a-pickle": pickled_by_config,
    "index-is-a-list": write("model.safetensors.index.json", "[]"),
    "adapter": write("adapter_config.json", "{}"),
    "quantized": config(quantization_config=dict(quant_method="mine")),
    "vocabulary-is-huge": config(vocab_size=10**12),
    "weights-cut-off": cut_off,
    "weights-no-safetensors": write("model.safetensors", b"\xff" * 4096),
    "weights-one-missing": weights(lambda t: t.pop("model.norm.weight")),
    "weights-one-of-another-shape": weights(
        lambda t: t.update({"model.norm.weight": torch.ones(3)})
    ),
    "weights-of-another-model": weights(lambda t: (t.clear(), t.update(x=torch.ones(2)))),
    "weights-not-finite": weights(lambda t: t["model.norm.weight"].fill_(float("nan"))),
    "end-token-outside-vocabulary": config(eos_token_id=50256),
    "end-token-is-negative": change("generation_config.json", eos_token_id=-1),
    "end-token-is-text": change("generation_config.json", eos_token_id="2"),
    "end-token-is-true": change("generation_config.json", eos_token_id=True),
    "end-token-of-the-tokenizer": change("tokenizer_config.json", eos_token="<|new|>"),
    "remote-code": with_remote_code,
    "encoder": encoder,
}


# --- One sentence each ----------------------------------------------------------------------------


def mistake(tmp_path, capfd, command) -> str:
    """The sentence about a command, which must leave no results behind."""
    for name in re.findall(r"{tmp}/([\w.-]+)", command):
        if name in FILES:
            write(name, FILES[name])(tmp_path)
        if name in MODELS:
            MODELS[name](Path(shutil.copytree(TINY, tmp_path / name)))
    argv = (command % dict(long="x" * 300)).replace("{tmp}", str(tmp_path)).split()
    out = tmp_path / "results"
    if argv[0] != "eval.py":
        # Only a damaged weight is met after the run has begun.
        more = ["--data", "tiny:1"] if argv[0] == "--model" else []
        text = refusal(capfd, edge_grpo.main, [*SMALL, "--out", str(out), *more, *argv])
    else:
        more = ["--out", str(out)] if "--out" not in argv and "--model" in argv else []
        text = refusal(capfd, evaluation.main, [*argv[1:], *more])
    assert text.count("--model") <= 1  # not one message inside another
    assert not out.exists() or "not-finite" in command
    assert not (tmp_path / "figures").exists() and not list(tmp_path.glob("*/ran"))
    if "/file" in command:
        assert (tmp_path / "file").read_text() == FILES["file"]
    return text


@pytest.mark.parametrize("command, sentence", MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_sentence(tmp_path, capfd, command, sentence):
    expected = sentence.strip().replace("{tmp}", str(tmp_path))
    assert expected in mistake(tmp_path, capfd, command)


def test_the_table_names_every_file_and_model():
    commands = " ".join(command for command, _ in MISTAKES)
    assert len(MISTAKES) > 130
    assert all(f"{{tmp}}/{name}" in commands for name in (*FILES, *MODELS))


def test_reflection_needs_no_solutions(tmp_path):
    (tmp_path / "d.jsonl").write_text(FILES["no_solution.jsonl"])
    argv = ["--data", str(tmp_path / "d.jsonl"), "--method", "force-r"]
    assert edge_grpo.main([*SMALL, "--out", str(tmp_path / "run"), *argv]) == 0


def test_a_model_without_an_end_token(tmp_path, capfd, monkeypatch):
    # transformers' tokenizers add one by themselves
    monkeypatch.setattr(models, "find_end_ids", lambda *_: set())
    assert "end token" in mistake(tmp_path, capfd, "--data tiny:1")


def test_with_permission_a_model_brings_its_own_code(tmp_path):
    """The other side of the refusal in the table: the flag is what decides."""
    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    config(auto_map={"AutoConfig": "code_of_mine.Mine"}, model_type="mine")(model)
    (model / "code_of_mine.py").write_text(
        "from transformers import Qwen2Config\nclass Mine(Qwen2Config):\n    model_type = 'mine'\n"
    )
    with pytest.raises(UserError, match="trust"):
        models.load_config(str(model))
    assert type(models.load_config(str(model), trust_remote_code=True)).__name__ == "Mine"


# --- The network ----------------------------------------------------------------------------------


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """Neither a network nor a cache; returns the list of addresses asked for."""
    asked, urlopen = [], urllib.request.urlopen

    def away(address, *args, **more):
        if str(address).startswith("file:"):
            return urlopen(address, *args, **more)
        asked.append(address)
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(urllib.request, "urlopen", away)
    monkeypatch.setattr(modelfiles, "ENDPOINT", "http://127.0.0.1:9")  # whatever else is asked
    modelfiles.hub_is_away.cache_clear()
    yield asked
    modelfiles.hub_is_away.cache_clear()


def test_data_that_cannot_be_downloaded(tmp_path, capfd, no_network):
    text = mistake(tmp_path, capfd, "--data deepscaler-hard-1k")
    assert "Name or service not known" in text and "--mirror" in text
    text = mistake(tmp_path, capfd, "--data deepscaler-hard-1k --mirror {tmp}")
    assert "No such file" in text
    file = download.FILES["deepscaler-hard-1k"]
    path = tmp_path / "mirror" / file.paths[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"[]")
    text = mistake(tmp_path, capfd, "--data deepscaler-hard-1k --mirror {tmp}/mirror")
    assert "checksum" in text and not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written(tmp_path, capfd, no_network):
    (tmp_path / "cache").write_text("a file in the way")
    assert "cache" in mistake(tmp_path, capfd, "--data deepscaler-hard-1k")


@pytest.mark.parametrize("name", ["nobody/nothing-of-that-name", "Qwen2.5-Math-0.1B"])
def test_a_hub_model_without_network_fails_at_once(tmp_path, capfd, no_network, name):
    assert "couldn't connect" in mistake(tmp_path, capfd, f"--data tiny:1 --model {name}")
    assert len(no_network) == 1


@pytest.mark.slow
def test_output_that_nobody_reads(tmp_path):
    """`edge_grpo.py | head`: the pipe is closed before anything is printed."""
    command = [sys.executable, "edge_grpo.py", "--out", str(tmp_path / "run"), *SMALL]
    pipe = subprocess.PIPE
    run = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    run.stdout.close()
    assert not run.stderr.read() and run.wait() == 141
