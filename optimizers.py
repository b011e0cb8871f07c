"""AdamW and Muon, and which parameter belongs to which."""

import torch
from torch import Tensor, nn

from model import is_matrix

# Newton-Schulz: X <- (a + b G + c G²) X with G = X Xᵀ, five times. The coefficients (Jordan et al. 2024) make
# small singular values grow fastest, and all end near 1.
A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(X: Tensor) -> Tensor:
    """Five steps on matrices (n, rows, columns), rows <= columns, of norms of at most 1."""
    for _ in range(5):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=B, alpha=C), X, beta=A)
    return X


def newton_schulz_factor(G: Tensor) -> Tensor:
    """The same for G = X Xᵀ alone, (n, rows, rows), of X of any norm: returns what to multiply X with.

    The steps' polynomials in G commute, so their product needs to meet X only once: less than half the work
    where X is wide. Not for bf16, G having squared singular values.
    """
    square = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-14)[:, None, None]  # the norm of X, squared
    G, product = G / square, None
    for step in range(5):
        p = torch.baddbmm(G, G, G, beta=B, alpha=C)
        p.diagonal(dim1=-2, dim2=-1).add_(A)
        product = p if product is None else p @ product
        G = p @ G @ p if step < 4 else None
    return product * square.rsqrt()


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix, of any shape -> about U Vᵀ of its singular value decomposition, same shape.

    Alike ones go through the steps together: on CUDA those of one shape, in bf16; elsewhere those whose
    smaller sides are equal.
    """
    done = list(matrices)
    keys = [x.shape if x.is_cuda else min(x.shape) for x in matrices]
    for key in dict.fromkeys(keys):
        alike = [i for i, other in enumerate(keys) if other == key]
        tall = [matrices[i].size(0) > matrices[i].size(1) for i in alike]
        same = [matrices[i] for i in alike]
        if same[0].is_cuda:
            X = torch.stack(same)
            X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
            X = newton_schulz(X.mT).mT if tall[0] else newton_schulz(X)
            new = X.to(same[0].dtype)
        else:
            G = torch.stack([x.mT @ x if is_tall else x @ x.mT for x, is_tall in zip(same, tall)])
            factors = newton_schulz_factor(G)  # symmetric
            new = [x @ f if is_tall else f @ x for x, f, is_tall in zip(same, factors, tall)]
        for i, x in zip(alike, new):
            done[i] = x
    return done


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: Muon (Jordan et al. 2024), for the blocks' matrices.

    Updates are scaled to the root mean square of AdamW's: one learning rate and weight decay serve both
    (arXiv:2502.16982). The mathematics of torch.optim.Muon with adjust_lr_fn="match_rms_adamw", for many
    matrices at once.
    """

    def __init__(self, params: list[dict], momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=0.0, momentum=momentum, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient; change nothing if `found_inf` was set, to a 1."""
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params, rate, beta = group["params"], group["lr"], group["momentum"]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta, grads = [self.state[p]["momentum"] for p in params], [p.grad for p in params]
            if found_inf is not None:
                # a gradient equal to the momentum leaves it as it is, a rate of 0 the weights
                grads = [torch.where(found_inf > 0, m, g) for m, g in zip(momenta, grads)]
                rate = rate * (1 - found_inf.to(params[0].dtype))
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            # Nesterov: the momentum one step ahead
            updates = orthogonalize(torch._foreach_lerp(grads, momenta, beta))
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_mul_(updates, [-0.2 * max(p.shape) ** 0.5 for p in params])
            torch._foreach_mul_(updates, rate)
            torch._foreach_add_(params, updates)


def make_optimizers(
    raw: nn.Module,
    *,
    optimizer: str,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """Fused AdamW, and with optimizer="muon" Muon of this momentum for the blocks' matrices; no parameter
    twice.

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
    return [adamw, Muon([dict(params=muon, weight_decay=weight_decay)], momentum)] if muon else [adamw]


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
