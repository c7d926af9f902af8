"""From SmolLM2's GGUF file to an ordinary bfloat16 checkpoint, with what the conversion loses put right.

python -m examples.real.convert FILE.gguf FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

ORIGINAL = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 8192}
"""GGUF has the first as a float32, and does not say the second."""
LEFT_OUT = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "pretraining_tp")


def main() -> None:
    source, out = map(Path, sys.argv[1:])
    read = {"gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **read)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **read)
    settings = {name: value for name, value in loaded.config.to_dict().items() if name not in LEFT_OUT}
    model = LlamaForCausalLM(LlamaConfig(**settings | ORIGINAL))
    model.load_state_dict(loaded.state_dict())
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.model_max_length = ORIGINAL["max_position_embeddings"]
    tokenizer.save_pretrained(out)
    check(out)


def check(out: Path) -> None:
    """That the checkpoint says what a server and `generate` have to know."""
    config, generation = (json.loads((out / name).read_text()) for name in ("config.json", "generation_config.json"))
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == ORIGINAL["rms_norm_eps"]
    assert config["tie_word_embeddings"]
    assert generation["eos_token_id"] == config["eos_token_id"] is not None
    assert "im_start" in (out / "chat_template.jinja").read_text()


if __name__ == "__main__":
    main()
