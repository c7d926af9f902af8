"""Layer-by-layer capture against the whole model run by transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvcompress.calibration.capture import LayerRunner
from kvcompress.calibration.corpus import Calibration
from kvcompress.checkpoint.reader import Checkpoint
from tests import tiny


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_layers_one_by_one_equal_the_whole_model(architecture: str, tmp_path: Path) -> None:
    directory = tiny.save_model(tmp_path / "m", architecture)
    tokens = np.array(tiny.prompts([40, 40]), dtype=np.int64)
    runner = LayerRunner(Checkpoint.open(directory), "cpu", torch.float32)
    hidden = runner.embed(Calibration("test", tokens, np.zeros(2, dtype=np.int64)))
    keys = []
    for index in range(tiny.NUM_LAYERS):
        with runner.layer(index) as layer:
            for sample in range(2):
                collected: list[torch.Tensor] = []
                hidden[sample] = runner.forward(layer, hidden[sample], 0, lambda q, k, v, s, c=collected: c.append(k))
                if sample == 1:
                    keys.append(collected[0])
        assert all(parameter.is_meta for parameter in runner.model.model.layers[index].parameters())
    model = tiny.load_model(directory)
    with torch.no_grad():
        expected = model.model(torch.from_numpy(tokens), use_cache=True)
    found = torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], model.model.norm.weight, model.config.rms_norm_eps)
    torch.testing.assert_close(found, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    for index, key in enumerate(keys):
        torch.testing.assert_close(key[0], expected.past_key_values.layers[index].keys[1], rtol=1e-4, atol=1e-4)


def test_offset_moves_keys_but_not_activations(base_model: Path) -> None:
    runner = LayerRunner(Checkpoint.open(base_model), "cpu", torch.float32)
    hidden = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    keys: list[torch.Tensor] = []
    with runner.layer(0) as layer:
        outputs = [runner.forward(layer, hidden, at, lambda q, k, v, s: keys.append(k)) for at in (0, 700)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(keys[0], keys[1], atol=0.1)


def test_sliding_window_is_respected(tmp_path: Path) -> None:
    directory = tiny.save_model(tmp_path / "m", "Mistral", sliding_window=8)
    tokens = np.array(tiny.prompts([40]), dtype=np.int64)
    runner = LayerRunner(Checkpoint.open(directory), "cpu", torch.float32)
    hidden = runner.embed(Calibration("test", tokens, np.zeros(1, dtype=np.int64)))
    for index in range(tiny.NUM_LAYERS):
        with runner.layer(index) as layer:
            hidden[0] = runner.forward(layer, hidden[0], 0, None)
    model = tiny.load_model(directory)
    with torch.no_grad():
        expected = model.model(torch.from_numpy(tokens)).last_hidden_state
    found = model.model.norm(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_missing_tensor_is_named(base_model: Path) -> None:
    checkpoint = Checkpoint.open(base_model)
    del checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
    runner = LayerRunner(checkpoint, "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"), runner.layer(1):
        pass
