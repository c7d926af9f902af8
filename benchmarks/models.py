"""Models that benchmarks run on: the bundled one, and random layers of a large one's shape."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-model"


def llama_8b_layer(work: Path) -> Path:
    """A random model of one layer, with the reference model's vocabulary; made once."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    out = work / "llama-8b-layer-base"
    if not out.is_dir():
        config = LlamaConfig(
            vocab_size=AutoConfig.from_pretrained(REFERENCE).vocab_size,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=1,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=131072,
        )
        torch.manual_seed(0)
        draft = work / "draft"
        LlamaForCausalLM(config).bfloat16().save_pretrained(draft)
        for path in REFERENCE.glob("tokenizer*"):
            shutil.copy(path, draft)
        draft.rename(out)
    return out


MODELS: dict[str, Callable[[Path], Path]] = {"reference-model": lambda _: REFERENCE, "llama-8b-layer": llama_8b_layer}
"""By name: makes the model in a folder, once, and says where it is."""
