"""Write a training state as a Transformers model folder (bfloat16 safetensors)."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from llama import Shape
from safetensors.torch import save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def export_model(weights: dict[str, torch.Tensor], shape: Shape, tokenizer: Path, out: Path) -> None:
    """Fill `out` in a scratch folder beside it, then swap: readers never see half a model."""
    scratch = out.with_name(out.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    tensors = {f"model.{name}": w.detach().to("cpu", torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    (scratch / "config.json").write_text(json.dumps(shape.hf_config(), indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False}
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer / name, scratch / name)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    scratch.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Export the state that train.py saved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="state.pt of a training run")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    state = torch.load(args.state, map_location="cpu", weights_only=True)
    export_model(state["model"], Shape(**state["shape"]), args.tokenizer, args.out)


if __name__ == "__main__":
    main()
