"""A LoRA adapter for a tiny model: written for vLLM, and hooked into the transformers path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ("q_proj", "o_proj", "down_proj")
"""Linear layers that models of every method have."""

RANK, ALPHA = 4, 8


def save(model: Any, folder: Path) -> Path:
    """A random adapter that changes answers, as PEFT would save it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            for side, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
                factor = torch.randn(*shape, generator=generator) * shape[1] ** -0.5
                tensors[f"base_model.model.{name}.lora_{side}.weight"] = factor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def attach(model: nn.Module, folder: Path) -> None:
    """Have a model answer with an adapter, whatever its linear layers are."""
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, module in model.named_modules():
        down = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if down is not None:
            product = ALPHA / RANK * tensors[f"base_model.model.{name}.lora_B.weight"] @ down
            module.register_forward_hook(lambda _, args, output, product=product: output + args[0] @ product.mT)


def serve(scenario: dict[str, Any]) -> dict[str, Any]:
    """In the child: tokens without the adapter, and with it, of one engine."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(**scenario["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=scenario["max_tokens"], detokenize=False, ignore_eos=True)
    requests = (None, LoRARequest("tiny", 1, scenario["engine"]["additional_config"]["adapter"]))
    found = []
    for prompts, request in zip(scenario["passes"], requests, strict=True):
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, lora_request=request, use_tqdm=False)
        found.append([list(output.outputs[0].token_ids) for output in outputs])
    return {"tokens": found}
