"""AdamW and Muon, and which parameter belongs to which."""

import torch
from torch import Tensor, nn

from model import is_matrix


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices (n, rows, columns) -> about U Vᵀ of the singular value decomposition of each, same shape.

    Five Newton-Schulz steps; the coefficients make small singular values grow fastest, and all end near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16() if x.is_cuda else x
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: Muon (Jordan et al. 2024), for the blocks' matrices.

    Updates are scaled to the root mean square of AdamW's: one learning rate and weight decay serve both
    (arXiv:2502.16982). The mathematics of torch.optim.Muon with adjust_lr_fn="match_rms_adamw"; here all
    matrices of a shape are stacked into one product, in bf16 on CUDA and in fp32 elsewhere.
    """

    def __init__(self, params: list[dict], momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=0.0, momentum=momentum, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                params = [p for p in group["params"] if p.shape == shape]
                grads = [p.grad for p in params]
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(momenta, grads, 1 - beta)
                # Nesterov: the momentum one step ahead
                updates = orthogonalize(torch.stack(torch._foreach_lerp(grads, momenta, beta)))
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(
                    params, list(updates.to(params[0].dtype)), alpha=-lr * 0.2 * max(shape) ** 0.5
                )


def make_optimizers(
    raw: nn.Module, *, optimizer: str, weight_decay: float, betas: tuple[float, float], eps: float
) -> list[torch.optim.Optimizer]:
    """Fused AdamW, and with optimizer="muon" Muon for the blocks' matrices; no parameter twice.

    Weight decay is on matrices and embeddings, not on biases, gains and NdLinear's mixing vectors.
    """
    params = {name: p for name, p in raw.named_parameters() if p.requires_grad}
    muon = [p for name, p in params.items() if optimizer == "muon" and is_matrix(p) and ".h." in name]
    taken = {id(p) for p in muon}
    decayed = [p for p in params.values() if is_matrix(p) and id(p) not in taken]
    others = [p for p in params.values() if not is_matrix(p)]
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    assert sorted(map(id, muon + decayed + others)) == sorted(map(id, params.values())), (
        "a parameter has no or two groups"
    )
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    return [adamw, Muon([dict(params=muon, weight_decay=weight_decay)])] if muon else [adamw]


def zero_masks(raw: nn.Module) -> dict[str, Tensor]:
    """Where the matrices of a pruned model's blocks are not zero, by name; a dense model has none.

    One zero in a hundred makes a matrix pruned: no training and no rounding leaves so many.
    """
    matrices = {name: p.detach() for name, p in raw.named_parameters() if ".h." in name and is_matrix(p)}
    return {name: p != 0 for name, p in matrices.items() if (p == 0).float().mean() >= 0.01}


def keep_zeros(optimizers: list[torch.optim.Optimizer], raw: nn.Module, masks: dict[str, Tensor]) -> None:
    """Make every optimizer step leave the weights zero where a mask is False."""
    params = {name: p for name, p in raw.named_parameters() if name in masks}

    @torch.no_grad()
    def mask_weights(*_: object) -> None:
        for name, p in params.items():
            p.mul_(masks[name])

    for optimizer in optimizers if params else []:
        optimizer.register_step_post_hook(mask_weights)


def load_moments(optimizers: list[torch.optim.Optimizer], moments: list[dict]) -> None:
    """Give the optimizers the moments of a checkpoint; learning rates and the like stay as configured."""
    for optimizer, state in zip(optimizers, moments, strict=True):
        settings = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": settings})
