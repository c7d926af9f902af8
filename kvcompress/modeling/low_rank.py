"""Linear layers stored as two factors: the module, how a model gets it, and what config.json says of it.

    "quantization_config": {"quant_method": "kvcompress", "version": 2,
                            "weights": {"model.layers.0.self_attn.q_proj": {"rank": 64}, ...}}

The checkpoint then has `NAME.down_weight` [rank, in] and `NAME.up_weight` [out, rank] in place of `NAME.weight`; a
bias stays as it is. Everything after the last dot is one word, so that the renaming of merged projections in serving
engines (`q_proj` to `qkv_proj` and a shard name) applies to factors as it does to weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.checkpoint.reader import is_compressed

SECTION = "weights"
DOWN, UP = "down_weight", "up_weight"


class LowRankLinear(nn.Module):
    """y = (x @ down^T) @ up^T + bias, with down `[rank, in_features]` and up `[out_features, rank]`."""

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down_weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    @property
    def weight(self) -> Tensor:
        """The matrix the factors stand for, `[out_features, in_features]`, made anew by every call."""
        return product(self.down_weight, self.up_weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return nn.functional.linear(nn.functional.linear(x, self.down_weight), self.up_weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def product(down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """up @ down in the factors' dtype, summed in float32 or better."""
    wide = torch.promote_types(up_OR.dtype, torch.float32)
    return (up_OR.to(wide) @ down_RI.to(wide)).to(up_OR.dtype)


def ranks_of(config: Mapping[str, Any]) -> dict[str, int]:
    """Rank of every factored linear layer by module name, from a checkpoint's config.json; empty where none is.

    Raises:
        ValueError: the section is not as documented above.
    """
    if not is_compressed(config):
        return {}
    try:
        section = config["quantization_config"].get(SECTION) or {}
        ranks = {str(name): int(entry["rank"]) for name, entry in section.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the list of factored weights cannot be read ({error!r}); was config.json edited?") from None
    wrong = next((name for name, rank in ranks.items() if rank < 1), None)
    if wrong is not None:
        raise ValueError(f"{wrong} has rank {ranks[wrong]} in config.json; expected at least 1; was it edited?")
    return ranks


def replace_linears(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Put a `LowRankLinear`, with weights not set, in place of every named linear layer.

    Raises:
        ValueError: the model has no linear layer of that name.
    """
    modules = dict(model.named_modules())
    for name, rank in ranks.items():
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            found = "no such module" if linear is None else f"a {type(linear).__name__}"
            raise ValueError(
                f"config.json has factors for {name}, but the model has {found} there; they do not fit together"
            )
        parent, _, child = name.rpartition(".")
        weight = linear.weight
        factored = LowRankLinear(
            linear.in_features, linear.out_features, rank, linear.bias is not None, weight.device, weight.dtype
        )
        setattr(modules[parent], child, factored)
