"""Muon (momentum, orthogonalised by Newton-Schulz) for matrices; what is no matrix goes to AdamW."""

from collections import defaultdict

import torch
from torch import Tensor


def orthogonalise(update: Tensor, working: torch.dtype) -> Tensor:
    """Bring the singular values of a stack of matrices near 1, in five Newton-Schulz steps (coefficients of Muon)."""
    x = update.to(working)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Matrices of one shape are stacked, so that a step is a few large products instead of many small ones."""

    def __init__(self, params, lr: float, momentum: float = 0.95, decay: float = 0.01, working=torch.bfloat16) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})
        self.working = working

    @torch.no_grad()
    def step(self) -> None:
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, orthogonalise(torch.stack(updates), self.working), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-scale)
