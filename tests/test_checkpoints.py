"""engine/checkpoints.py: files of bounded size. Runs that are killed, damaged and resumed stand in test_resume.py."""

import torch

import engine
from engine import checkpoints
from engine.modelfiles import TINY_MODEL


def test_a_model_is_saved_in_files_of_bounded_size(tmp_path, monkeypatch):
    policy = engine.load_policy("tiny", "cpu")
    size = (TINY_MODEL / "model.safetensors").stat().st_size
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", size // 3)
    checkpoints.save_model(policy, tmp_path)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) >= 3 and max(f.stat().st_size for f in files) < size / 2
    again = engine.load_policy(str(tmp_path), "cpu").model.state_dict()
    assert all(
        torch.equal(tensor, again[name]) for name, tensor in policy.model.state_dict().items()
    )
