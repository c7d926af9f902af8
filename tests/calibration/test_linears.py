"""Moments of inputs and gradients, layer by layer, against the whole model's autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvcompress.calibration.capture import LayerRunner
from kvcompress.calibration.linears import GradientMoments, InputMoments, LossHead
from kvcompress.checkpoint.reader import Checkpoint
from tests import tiny

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
LENGTH = 40


def linears(layer: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: layer.get_submodule(name) for name in NAMES}


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_gradients_one_layer_at_a_time_equal_autograd_through_the_model(architecture: str, tmp_path: Path) -> None:
    directory = tiny.save_model(tmp_path / "m", architecture)
    tokens_NT = torch.tensor(tiny.prompts([LENGTH, LENGTH]))
    model = tiny.load_model(directory)
    expected: dict[str, torch.Tensor] = {}
    for tokens_T in tokens_NT:
        gradients: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(f"model.layers.{index}.{name}").register_full_backward_hook(
                lambda _, __, output, into=gradients, key=f"{index}.{name}": into.update({key: output[0][0].double()})
            )
            for index in range(tiny.NUM_LAYERS)
            for name in NAMES
        ]
        model.zero_grad()
        logits_TV = model(tokens_T[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits_TV, tokens_T[1:], reduction="sum")
        loss.backward()
        for handle in handles:
            handle.remove()
        for key, gradient_TO in gradients.items():
            weight = model.get_submodule(f"model.layers.{key}").weight
            for moment, value in (
                ("fisher", weight.grad.double().square().sum(0) / 2),
                ("output", gradient_TO.mT @ gradient_TO / (2 * LENGTH)),
            ):
                expected[f"{key}.{moment}"] = expected.get(f"{key}.{moment}", 0) + value
    runner = LayerRunner(Checkpoint.open(directory), "cpu", torch.float32)
    inputs = [model.model.embed_tokens(tokens_NT).detach()]
    for index in range(tiny.NUM_LAYERS):
        with runner.layer(index) as layer:
            inputs.append(torch.stack([runner.forward(layer, hidden_TC, 0, None) for hidden_TC in inputs[-1]]))
    head = LossHead(runner)
    found = [head.gradient(*sample) for sample in zip(inputs[-1], tokens_NT, strict=True)]
    assert found[1][0] == pytest.approx(float(loss), rel=1e-5)
    gradient_NTC = torch.stack([gradient for _, gradient in found])
    for index in reversed(range(tiny.NUM_LAYERS)):
        moments = GradientMoments(outputs=True)
        with runner.layer(index) as layer, moments.watch(linears(layer)):
            for sample in range(2):
                # A position offset turns keys and queries alike, so it changes no gradient.
                gradient_NTC[sample] = runner.backward(layer, inputs[index][sample], 300, gradient_NTC[sample])
        for key, value in moments.tensors().items():
            torch.testing.assert_close(
                value, expected[f"{index}.{key}"], rtol=2e-3, atol=1e-4 * float(value.abs().max())
            )


def test_input_moments_are_those_of_the_data_and_shared_where_inputs_are(base_model: Path) -> None:
    runner = LayerRunner(Checkpoint.open(base_model), "cpu", torch.float32)
    hidden = torch.randn(2, LENGTH, 128, generator=torch.Generator().manual_seed(0))
    moments, seen = InputMoments(), []
    with runner.layer(0) as layer, moments.watch(linears(layer)):
        handle = layer.self_attn.k_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
        for hidden_TC in hidden:
            runner.forward(layer, hidden_TC, 0, None)
        handle.remove()
    rows = torch.cat(seen)
    torch.testing.assert_close(moments.moment_II("self_attn.k_proj"), rows.mT @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert torch.equal(moments.moment_II("self_attn.q_proj"), moments.moment_II("self_attn.k_proj"))
    assert moments.moment_II("mlp.down_proj").shape == (256, 256)
    assert moments.moment_II("self_attn.o_proj").shape == (128, 128)


def test_weights_in_half_precision_give_nearly_the_same_gradient(base_model: Path, tmp_path: Path) -> None:
    model = tiny.load_model(base_model).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    hidden, tokens = torch.randn(LENGTH, 128), torch.tensor(tiny.prompts([LENGTH])[0])
    results = []
    for directory in (base_model, tmp_path / "half"):
        runner = LayerRunner(Checkpoint.open(directory), "cpu", torch.float32)
        gradient_TC = LossHead(runner).gradient(hidden, tokens)[1]
        with runner.layer(3) as layer:
            results.append(runner.backward(layer, hidden, 0, gradient_TC))
            assert all(parameter.grad is None for parameter in layer.parameters())
    error = (results[0] - results[1]).norm() / results[0].norm()
    assert error < 0.05
