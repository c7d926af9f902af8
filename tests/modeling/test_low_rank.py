from __future__ import annotations

import pytest
import torch
from torch import nn

from kvcompress.modeling.low_rank import LowRankLinear, product, ranks_of, replace_linears


def config(weights: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "kvcompress", "version": 2, "weights": weights}}


@pytest.mark.parametrize("bias", [False, True])
def test_computes_the_product_of_its_factors(bias: bool) -> None:
    torch.manual_seed(0)
    linear = LowRankLinear(12, 20, 5, bias)
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 7, 12)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.up_weight @ linear.down_weight, linear.bias))
    torch.testing.assert_close(linear.weight, linear.up_weight @ linear.down_weight)
    assert sorted(linear.state_dict()) == sorted(["down_weight", "up_weight", *(["bias"] if bias else [])])


def test_half_precision_factors_are_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    down, up = torch.randn(64, 30).bfloat16(), torch.randn(40, 64).bfloat16()
    assert torch.equal(product(down, up), (up.float() @ down.float()).bfloat16())


def test_replaces_named_layers_only_and_keeps_what_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 6, bias=True), nn.Sequential(nn.Linear(6, 4, bias=False))).to(torch.float64)
    replace_linears(model, {"1.0": 2})
    assert isinstance(model[0], nn.Linear)
    found = model[1][0]
    assert isinstance(found, LowRankLinear)
    assert (found.rank, found.in_features, found.out_features, found.bias) == (2, 6, 4, None)
    assert found.down_weight.dtype == torch.float64


@pytest.mark.parametrize(("name", "found"), [("2", "no such module"), ("1", "a ReLU")])
def test_a_name_that_does_not_fit_the_model(name: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        replace_linears(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), {name: 2})


def test_ranks_are_read_from_config() -> None:
    assert ranks_of({}) == {}
    assert ranks_of({"quantization_config": {"quant_method": "fp8"}}) == {}
    assert ranks_of(config({"a.b": {"rank": 3}})) == {"a.b": 3}


@pytest.mark.parametrize(
    ("weights", "words"), [({"a": {}}, "rank"), ({"a": 3}, "edited"), ([1], "edited"), ({"a": {"rank": 0}}, "rank 0")]
)
def test_a_damaged_section_is_refused(weights: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ranks_of(config(weights))
