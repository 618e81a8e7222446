"""What training needs and no paper describes. A reader of the method can skip this folder.

processes.py    one process or several under torchrun: who am I, give everyone everything
models.py       weights, tokenizer, end tokens and sampler of a model: the Policy
prompts.py      chat templates: prompts, where a response stands, what ends it
modelfiles.py   where a model's files are, and what is saved beside trained weights
outputlayer.py  whether logits are hidden states times the output matrix, as entropy.py assumes
forward.py      the training forward: packed micro-batches -> log-probabilities and entropies
trainer.py      gradients and AdamW on fp32 master weights, sharded (FSDP2) or offloaded
sharding.py     a model cut over several processes
checkpoints.py  written whole or not at all, checked by sha256
memory.py       what a run will need
run.py          a run's folder and its life: resume, log, save, stop
folder.py       a folder of results: locked, written whole, its JSON read
console.py      what is printed, and how an error becomes one sentence
flags.py        a dataclass of flags as a command line
"""

from importlib.util import find_spec
from pathlib import Path

data_file = find_spec("data").origin
if Path(data_file).parents[1] != Path(__file__).parents[1]:
    raise ImportError(
        f"{data_file} hides this project's own data/: rename it, or work in another folder"
    )

__all__ = ["Policy", "load_policy"]


def __getattr__(name: str):
    """Import Policy and load_policy from engine.models when they are first used. That imports torch
    and transformers, which takes seconds, and a program can read its flags before."""
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    from engine import models

    return getattr(models, name)
