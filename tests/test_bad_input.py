"""Every error that a user can make: one sentence on stderr that says what to change, exit code 2, and nothing lost.

Each row of the tables is (command line, what the sentence must hold); {tmp} is a folder with the bad files.
"""

import json
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertForMaskedLM

import data
import edge_grpo
import eval as evaluation
from data import download
from engine import modelfiles, models

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny_model"
SMALL = "--steps 1 --questions-per-step 1 --group-size 2 --max-new-tokens 2 --correction-tokens 1 --eval-tasks".split()

FLAGS = [
    ("--stepz 3", "--stepz"),
    ("tiny", "unrecognized arguments: tiny"),
    ("--steps", "--steps"),
    ("--steps 0", "--steps 0"),
    ("--steps 1.5", "1.5"),
    ("--steps many", "many"),
    ("--method ppo", "ppo"),
    ("--lr nan", "--lr nan"),
    ("--lr inf", "--lr inf"),
    ("--lr -1", "--lr"),
    ("--temperature 0", "--temperature"),
    ("--top-p 0", "--top-p"),
    ("--top-p 1.5", "--top-p 1.5"),
    ("--group-size 0", "--group-size"),
    ("--group-size 1", "a group of one"),
    ("--data tiny:1:test", "for testing"),
    ("--questions-per-step 0", "--questions-per-step"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--micro-batch-tokens 0", "--micro-batch-tokens"),
    ("--max-rows -1", "--max-rows"),
    ("--seed -1", "--seed"),
    ("--keep 0", "--keep"),
    ("--max-bad-steps 0", "--max-bad-steps"),
    ("--eps-low 2", "--eps-low"),
    ("--format-weight -1", "--format-weight"),
    ("--updates-per-rollout 0", "--updates-per-rollout"),
    ("--loss mean", "mean"),
    ("--template chatml", "chatml"),
    ("--correction wait", "wait"),
    ("--betas 0.9 1", "--betas"),
    ("--betas 0.9", "--betas"),
    ("--method force-r --guided-probs 0.2 0.4 0.4", "belongs to --correction guided"),
    ("--method sft --injected-weight 0", "drop --injected-weight"),
    ("--guided-probs 0.5 0.5 0.5", "must sum to 1, not 1.5"),
    ("--guided-probs .4 .3 .1 .1 .1", "at most 4"),
    ("--guided-probs -1 1 1", "--guided-probs"),
    ("--guided-probs 0.5 0.25", "must sum to 1, not 0.75"),
    ("--eda-clamp 2 1", "LO < HI"),
    ("--eda-clamp 0 1", "0 < LO"),
    ("--eda-clamp 0.5 2 --no-eda", "--eda-clamp"),
    ("--eda-grad --no-eda", "--eda-grad"),
    ("--eda-grad --updates-per-rollout 2", "--updates-per-rollout 1"),
    ("--method sft --eda", "--no-eda"),
    ("--method sft --correction reflect", "--correction none"),
    ("--method sft --kl 0.1", "--kl 0"),
    ("--resume --overwrite", "one of the two"),
    ("--device tpu", "--device tpu"),
    ("--device cpu:x", "--device cpu:x"),
    ("--device cuda:", "--device cuda:"),
    ("--out {tmp}/file", "File exists"),
    ("--out {tmp}/file/below", "Not a directory"),
    ("--eval-tasks nonsense", "nonsense"),
    ("--eval-tasks tiny:9", "tiny:9"),
    ("--eval-tasks {tmp}/null.json", "null.json:1"),
]
DATA = {  # file: (content, what the sentence must hold)
    "broken.json": ('[{"problem": "1+1?", "answer": "2"', "broken.json is not valid JSON"),
    "broken.jsonl": (
        '{"problem": "1+1?", "answer": "2"}\n{"problem": ',
        "broken.jsonl:2 is not valid JSON",
    ),
    "latin1.jsonl": (b'{"problem": "caf\xe9?", "answer": "2"}', "not UTF-8"),
    "binary.json": (bytes(range(128, 256)), "not UTF-8"),
    "empty.jsonl": ("", "holds no problem"),
    "empty.json": ("[]", "holds no problem"),
    "blank.jsonl": ("\n\n", "holds no problem"),
    "no_answer.jsonl": ('{"problem": "1+1?"}', "no field answer"),
    "no_problem.jsonl": ('{"answer": "2"}', "no field problem"),
    "null.json": ('[{"problem": "1+1?", "answer": null}]', "null.json:1: the answer"),
    "answer_list.jsonl": ('{"problem": "1+1?", "answer": []}', "empty list of answers"),
    "answer_nan.jsonl": ('{"problem": "1+1?", "answer": NaN}', "finite number"),
    "answer_bool.jsonl": ('{"problem": "1+1?", "answer": true}', "the answer"),
    "answer_empty.jsonl": ('{"problem": "1+1?", "answer": " "}', "the answer is empty"),
    "question_empty.jsonl": ('{"problem": "", "answer": "2"}', "the problem is empty"),
    "question_number.jsonl": ('{"problem": 7, "answer": "2"}', "the problem is of type int"),
    "rows_are_lists.jsonl": ('["1+1?", "2"]', "JSON"),
    "object.json": ('{"data": []}', "no field problem"),
    "number.json": ("3", "JSON int"),
    "surrogate.jsonl": (r'{"problem": "\ud800", "answer": "2"}', "surrogate"),
    "deep.json": ("[" * 100_000, "not valid JSON"),
    "no_solution.jsonl": ('{"problem": "1+1?", "answer": "2"}', "no reference solution"),
    "long.jsonl": (
        json.dumps(dict(problem="1+1? " * 200, answer="2", solution="2")),
        "--max-prompt-tokens 512",
    ),
}


def the_sentence(capfd, main, argv) -> str:
    """Runs the command; its only line on stderr, checked for form."""
    capfd.readouterr()
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    said = capfd.readouterr().err
    assert code == 2, said
    assert said.count("\n") == 1 and said.endswith("\n") and said.startswith("error: "), said
    assert "Traceback" not in said and len(said) < 700
    return said


def wrong(tmp_path, capfd, flags, *more):
    """The sentence about a training command, which must leave no run behind."""
    out = tmp_path / "run"
    argv = [*SMALL, "--out", str(out), *flags.replace("{tmp}", str(tmp_path)).split(), *more]
    said = the_sentence(capfd, edge_grpo.main, argv)
    assert not out.exists()
    return said


@pytest.mark.parametrize("flags, holds", FLAGS, ids=[flags for flags, _ in FLAGS])
def test_a_wrong_flag(tmp_path, capfd, flags, holds):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "null.json").write_text(DATA["null.json"][0])
    assert holds in wrong(tmp_path, capfd, flags)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(tmp_path, capfd, device):
    assert "no CUDA GPU" in wrong(tmp_path, capfd, f"--device {device}")


@pytest.mark.parametrize("name", DATA)
def test_wrong_data(tmp_path, capfd, name):
    content, holds = DATA[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    said = wrong(tmp_path, capfd, "--data {tmp}/" + name)
    assert holds in said and name in said


@pytest.mark.parametrize(
    "name, holds",
    [
        ("nothing.jsonl", "neither a file nor a known set"),
        (".", "is a folder"),
        ("x" * 300, "too long"),
    ],
)
def test_data_that_is_not_a_file(tmp_path, capfd, name, holds):
    assert holds in wrong(tmp_path, capfd, "--data {tmp}/" + name)


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        "tiny:",
        "tiny:9",
        "tiny:5-3",
        "tiny:x",
        "tiny:5:nowhere",
        "tiny:5:train:long",
        "tiny:5:a:b:c",
    ],
)
def test_a_tiny_set_that_is_none(tmp_path, capfd, name):
    assert name in wrong(tmp_path, capfd, f"--data {name}")


def test_sft_needs_solutions_and_reflection_does_not(tmp_path, capfd):
    (tmp_path / "d.jsonl").write_text(DATA["no_solution.jsonl"][0])
    assert "--sft needs" in wrong(tmp_path, capfd, "--method sft --data {tmp}/d.jsonl")
    argv = [
        *SMALL,
        "--out",
        str(tmp_path / "ok"),
        "--data",
        str(tmp_path / "d.jsonl"),
        "--method",
        "force-r",
    ]
    assert edge_grpo.main(argv) == 0


# --- downloads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")


def test_no_network_and_no_cache(tmp_path, capfd, monkeypatch, no_cache):
    def away(*_, **__):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", away)
    said = wrong(tmp_path, capfd, "--data deepscaler-hard-1k")
    assert "Name or service not known" in said and "--mirror" in said


def test_a_mirror_without_the_file(tmp_path, capfd, no_cache):
    assert "No such file" in wrong(tmp_path, capfd, "--data deepscaler-hard-1k --mirror {tmp}")


def test_a_download_with_another_checksum(tmp_path, capfd, no_cache):
    file = download.FILES["deepscaler-hard-1k"]
    path = tmp_path / "mirror" / file.paths[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"[]")
    assert "checksum" in wrong(tmp_path, capfd, "--data deepscaler-hard-1k --mirror {tmp}/mirror")
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written(tmp_path, capfd, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setattr(download, "CACHE", tmp_path / "cache")
    assert "cache" in wrong(tmp_path, capfd, "--data deepscaler-hard-1k")


# --- models ----------------------------------------------------------------------------------------------------------


def change_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def weights_with(change):
    def damage(folder):
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return damage


def pickled(folder):
    torch.save(
        safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()


def with_chat_template(text):
    return lambda folder: change_json(folder / "tokenizer_config.json", chat_template=text)


def templates_without_a_default(folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages[-1].content }}")


def cut_off(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:5000])


def of_100_tokens(folder):
    change_json(folder / "config.json", vocab_size=100, eos_token_id=0, pad_token_id=None)
    weights_with(lambda t: t.update({k: v[:100].clone() for k, v in t.items() if "embed" in k}))(
        folder
    )


def with_remote_code(folder):
    change_json(
        folder / "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"},
    )
    (folder / "code.py").write_text(
        f"open({str(folder / 'ran')!r}, 'w')\nclass Mine: pass\nclass Model: pass\n"
    )


def encoder(folder):
    BertForMaskedLM(
        BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            vocab_size=308,
        )
    ).save_pretrained(folder)


MODELS = {  # name: (damage to a copy of the tiny model, what the sentence must hold)
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "config of another kind": (lambda f: (f / "config.json").write_text("[]"), "config.json"),
    "config empty": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config without a type": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "config of an unknown type": (
        lambda f: change_json(f / "config.json", model_type="nonesuch"),
        "nonesuch",
    ),
    "config with impossible sizes": (
        lambda f: change_json(f / "config.json", num_attention_heads=7),
        "--model",
    ),
    "config with text for a number": (
        lambda f: change_json(f / "config.json", hidden_size="big"),
        "--model",
    ),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no tokenizer",
    ),
    "tokenizer broken": (
        lambda f: (f / "tokenizer.json").write_text('{"version": "1.0"}'),
        "tokenizer",
    ),
    "tokenizer not JSON": (lambda f: (f / "tokenizer.json").write_text("x"), "tokenizer"),
    "chat template broken": (with_chat_template("{% for %}"), "chat template"),
    "chat template refuses": (
        with_chat_template("{{ raise_exception('no system turn') }}"),
        "no system turn",
    ),
    "chat templates without a default": (templates_without_a_default, "multiple chat templates"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
    "pickled weights": (pickled, "pickled weights are not loaded"),
    "weights cut off": (cut_off, "cannot be loaded"),
    "weights empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "cannot be loaded"),
    "weights no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4096),
        "cannot be loaded",
    ),
    "a weight missing": (weights_with(lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "a weight of another shape": (
        weights_with(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        "model.norm.weight",
    ),
    "other weights": (
        weights_with(lambda t: (t.clear(), t.update(x=torch.ones(2)))),
        "weights missing",
    ),
    "tokenizer of another model": (of_100_tokens, "the tokenizer has ids up to"),
    "an end token outside the vocabulary": (
        lambda f: change_json(f / "config.json", eos_token_id=50256),
        "50256",
    ),
    "remote code": (with_remote_code, "trust"),
    "not a causal model": (encoder, "--model"),
    "not finite": (
        weights_with(lambda t: t["model.norm.weight"].fill_(float("nan"))),
        "not finite",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_wrong_model_folder(tmp_path, capfd, name):
    damage, holds = MODELS[name]
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    damage(folder)
    if name == "not finite":  # found only when it samples: the run has begun
        said = the_sentence(
            capfd,
            edge_grpo.main,
            [*SMALL, "--out", str(tmp_path / "run"), "--model", str(folder), "--data", "tiny:1"],
        )
    else:
        said = wrong(tmp_path, capfd, "--model {tmp}/model --data tiny:1")
    assert holds in said
    assert not (folder / "ran").exists()


def test_a_model_without_an_end_token(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        models, "find_end_ids", lambda *_: set()
    )  # transformers' tokenizers add one by themselves
    assert "end token" in wrong(tmp_path, capfd, "--data tiny:1")


@pytest.mark.parametrize(
    "name, holds",
    [
        ("{tmp}/nothing", "no such folder"),
        ("./nothing", "no such folder"),
        ("nothing", "neither a local folder"),
        ("a/b/c", "no such folder"),
        ("~/nothing", "no such folder"),
        ("{tmp}", "no config.json"),
    ],
)
def test_a_model_that_is_not_there(tmp_path, capfd, name, holds):
    said = wrong(tmp_path, capfd, f"--data tiny:1 --model {name}")
    assert holds in said and said.count("--model") == 1  # not one message inside another


@pytest.mark.parametrize("name", ["nobody/nothing-of-that-name", "Qwen2.5-Math-0.1B"])
def test_a_hub_model_without_network_fails_at_once(tmp_path, capfd, monkeypatch, name):
    asked = []

    def away(address, timeout):
        asked.append(address)
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.setattr(urllib.request, "urlopen", away)
    monkeypatch.setattr(
        modelfiles, "ENDPOINT", "http://127.0.0.1:9"
    )  # whatever else is asked is refused
    modelfiles.hub_is_away.cache_clear()
    said = wrong(tmp_path, capfd, f"--data tiny:1 --model {name}")
    modelfiles.hub_is_away.cache_clear()
    assert "couldn't connect" in said and len(asked) == 1


def test_with_permission_a_model_brings_its_own_code(tmp_path, capfd):
    """The other side of the refusal above: the flag is what decides."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    change_json(
        folder / "config.json", auto_map={"AutoConfig": "code_of_mine.Mine"}, model_type="mine"
    )
    (folder / "code_of_mine.py").write_text(
        "from transformers import Qwen2Config\nclass Mine(Qwen2Config):\n    model_type = 'mine'\n"
    )
    with pytest.raises(data.UserError, match="trust"):
        models.load_config(str(folder))
    assert type(models.load_config(str(folder), trust_remote_code=True)).__name__ == "Mine"


# --- eval.py ---------------------------------------------------------------------------------------------------------

EVAL = [
    ("--model {tmp}/nothing --tasks tiny:1:test", "no such folder"),
    ("--model tiny --tasks nonsense", "nonsense"),
    ("--model tiny --tasks {tmp}/null.json", "null.json:1"),
    ("--model tiny --tasks tiny:1:test --out {tmp}/file", "file"),
    ("--model tiny --tasks tiny:1:test --device tpu", "--device tpu"),
    ("compare {tmp}/nothing", "nothing"),
    ("plot {tmp}/nothing --out {tmp}/figures", "nothing"),
    ("compare {tmp}", "{tmp}"),
    ("compare {tmp}/file", "file"),
]
EVAL_FLAGS = [
    "",
    "--model tiny --n 0",
    "--model tiny --temperature -1",
    "--model tiny --limit 0",
    "--model tiny --stepz",
    "compare",
    "--model tiny --n x",
]


@pytest.mark.parametrize("flags, holds", EVAL, ids=[flags for flags, _ in EVAL])
def test_a_wrong_evaluation(tmp_path, capfd, flags, holds):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "null.json").write_text(DATA["null.json"][0])
    out = (
        []
        if "--out" in flags or not flags.startswith("--")
        else ["--out", str(tmp_path / "results")]
    )
    argv = flags.replace("{tmp}", str(tmp_path)).split() + out
    assert holds.replace("{tmp}", str(tmp_path)) in the_sentence(capfd, evaluation.main, argv)
    assert not (tmp_path / "results").exists() and not (tmp_path / "figures").exists()


@pytest.mark.parametrize("flags", EVAL_FLAGS)
def test_a_wrong_flag_of_an_evaluation(capfd, flags):
    the_sentence(capfd, evaluation.main, flags.split())


def test_output_that_nobody_reads(tmp_path):
    """`edge_grpo.py | head`: the pipe is closed before anything is printed."""
    run = subprocess.Popen(
        [sys.executable, "edge_grpo.py", "--model", "tiny", "--out", str(tmp_path / "run"), *SMALL],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run.stdout.close()
    [said] = run.stderr.read().splitlines()
    assert run.wait() == 2 and "nobody reads" in said and "--resume" in said


def test_the_tables_hold_at_least_forty_errors():
    assert len(FLAGS) + len(DATA) + len(MODELS) + len(EVAL) >= 40
