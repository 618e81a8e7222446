"""engine/console.py: errors that become sentences. Every sentence that a user can meet stands in test_bad_input.py."""

import pytest
import torch

from engine.console import is_out_of_memory


def test_every_way_to_say_that_memory_is_short_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (
        caught.value,
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("CUDA error: out of memory"),
    ):  # the last: pinning
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes differ"), ValueError("out of memory")):
        assert not is_out_of_memory(error)
