"""Learning rate schedules, Muon, the optimizers of a model and their moments, and masks of pruned weights."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from neogpt import model


def schedule(
    kind: str, max_steps: int, warmup_steps: int, max_lr: float, min_lr_frac: float = 0.0, decay_frac: float = 0.0
) -> Callable[[int], float]:
    """Step -> learning rate: linear warmup to max_lr, then decay to min_lr_frac · max_lr at max_steps.

    kind: "cosine" follows half a cosine (GPT-3, appendix B). "wsd" (warmup, stable, decay; arXiv:2405.18392) stays
    constant, and decays linearly over the last decay_frac of max_steps; a run can be extended until its decay begins.
    """

    def lr(step: int) -> float:
        if step < warmup_steps:
            return max_lr * (step + 1) / warmup_steps
        if kind == "cosine":
            progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
            decay = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            decay = min(1.0, max(0, max_steps - step) / max(1, decay_frac * max_steps))
        return max_lr * (min_lr_frac + (1 - min_lr_frac) * decay)

    return lr


# Newton-Schulz: X <- (a + b G + c G²) X with G = X Xᵀ, five times. With these coefficients (Jordan et al. 2024) small
# singular values grow fastest, and all end near 1.
NS = (3.4445, -4.7750, 2.0315)


def newton_schulz(X: Tensor) -> Tensor:
    """Five Newton-Schulz steps on n matrices (n, rows, columns), rows <= columns, with norms of at most 1."""
    a, b, c = NS
    for _ in range(5):
        G = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(G, G, G, beta=b, alpha=c), X, beta=a)
    return X


def newton_schulz_factor(G: Tensor) -> Tensor:
    """Gram matrices G = X Xᵀ (n, rows, rows) -> F with F X = newton_schulz(X / norm of X). Needs fp32. The polynomials
    in G commute, so X is multiplied only once: less than half the work for a wide X.
    """
    a, b, c = NS
    squared_norm = G.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-14)[:, None, None]  # of X
    G, product = G / squared_norm, None
    for step in range(5):
        p = torch.baddbmm(G, G, G, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        product = p if product is None else p @ product
        G = p @ G @ p if step < 4 else None
    return product * squared_norm.rsqrt()


def orthogonalize(matrices: list[Tensor]) -> list[Tensor]:
    """Each matrix, of any shape -> approximately U Vᵀ of its singular value decomposition, in the same shape. Matrices
    are batched: on CUDA those of equal shape, in bf16; elsewhere those with equal smaller sides.
    """
    out = list(matrices)
    keys = [x.shape if x.is_cuda else min(x.shape) for x in matrices]
    for key in dict.fromkeys(keys):
        indices = [i for i, other in enumerate(keys) if other == key]
        group = [matrices[i] for i in indices]
        tall = [x.size(0) > x.size(1) for x in group]
        if group[0].is_cuda:
            X = torch.stack(group)
            X = (X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
            new = (newton_schulz(X.mT).mT if tall[0] else newton_schulz(X)).to(group[0].dtype)
        else:
            G = torch.stack([x.mT @ x if is_tall else x @ x.mT for x, is_tall in zip(group, tall)])
            factors = newton_schulz_factor(G)  # symmetric
            new = [x @ f if is_tall else f @ x for x, f, is_tall in zip(group, factors, tall)]
        for i, x in zip(indices, new):
            out[i] = x
    return out


def orthogonalize_on_ranks(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalize`, with the matrices divided among the ranks; an all-reduce distributes the results."""
    if not torch.distributed.is_initialized():
        return orthogonalize(matrices)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    by_shape = sorted(range(len(matrices)), key=lambda i: matrices[i].shape)  # every rank gets some of each shape
    mine = by_shape[rank::world_size]
    flat = matrices[0].new_zeros(sum(x.numel() for x in matrices))
    out = [part.view_as(x) for part, x in zip(flat.split([x.numel() for x in matrices]), matrices)]
    for i, x in zip(mine, orthogonalize([matrices[i] for i in mine])):
        out[i].copy_(x)
    torch.distributed.all_reduce(flat)
    return out


def orthogonalize_shards(shards: list[Tensor], matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalize` for sharded matrices. shards: this rank's rows of each. matrices: the parameters, for shapes. For
    each shape the ranks exchange rows for whole matrices and back, so a rank sends and receives each of its values
    twice. Each matrix is computed once; ranks have equal work if the number of ranks divides that of the matrices.
    """
    from torch.distributed.tensor import DTensor, Shard

    out, rows, whole = list(shards), [Shard(1)], [Shard(0)]
    for shape in dict.fromkeys(p.shape for p in matrices):
        indices = [i for i, p in enumerate(matrices) if p.shape == shape]
        size = torch.empty(len(indices), *shape, device="meta")
        layout = dict(device_mesh=matrices[0].device_mesh, shape=size.shape, stride=size.stride())
        x = DTensor.from_local(torch.stack([shards[i] for i in indices]), placements=rows, **layout)
        mine = x.redistribute(placements=whole).to_local()
        mine = torch.stack(orthogonalize([*mine])) if len(mine) else mine
        x = DTensor.from_local(mine, placements=whole, **layout).redistribute(placements=rows)
        for i, part in zip(indices, x.to_local()):
            out[i] = part
    return out


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): Nesterov momentum with an orthogonalized update. Updates have the root mean square of
    AdamW's, so one learning rate and weight decay serve both (arXiv:2502.16982). Computes torch.optim.Muon with
    adjust_lr_fn="match_rms_adamw", many matrices at once.
    """

    def __init__(self, params: list[dict], momentum: float = 0.95) -> None:
        super().__init__(params, dict(lr=0.0, momentum=momentum, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter from its gradient. Changes nothing if the tensor `self.found_inf` is 1."""
        for group in self.param_groups:
            whole, beta = group["params"], group["momentum"]
            found_inf = self.found_inf if hasattr(self, "found_inf") else torch.zeros((), device=whole[0].device)
            for p in whole:
                self.state[p] = self.state[p] or dict(momentum=torch.zeros_like(p))
            momenta, grads, params = [self.state[p]["momentum"] for p in whole], [p.grad for p in whole], whole
            if sharded := hasattr(whole[0], "to_local"):  # this rank's rows
                momenta, grads, params = ([x.to_local() for x in part] for part in (momenta, grads, params))
            # a gradient equal to the momentum keeps the momentum, and a rate of 0 keeps the weights
            grads = [torch.where(found_inf > 0, m, g) for m, g in zip(momenta, grads)]
            rate = group["lr"] * (1 - found_inf.to(params[0].dtype))
            torch._foreach_lerp_(momenta, grads, 1 - beta)
            updates = torch._foreach_lerp(grads, momenta, beta)  # Nesterov
            updates = orthogonalize_shards(updates, whole) if sharded else orthogonalize_on_ranks(updates)
            torch._foreach_mul_(params, 1 - rate * group["weight_decay"])
            torch._foreach_mul_(updates, [-0.2 * max(p.shape) ** 0.5 for p in whole])
            torch._foreach_mul_(updates, rate)
            torch._foreach_add_(params, updates)


def make_optimizers(
    raw: nn.Module,
    *,
    optimizer: str = "adamw",
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    momentum: float = 0.95,
) -> list[torch.optim.Optimizer]:
    """[AdamW], or [AdamW, Muon] with optimizer="muon": Muon, with this momentum, for the matrices of the blocks. Weight
    decay applies to matrices and embeddings, not to biases, gains and the second mode of NdLinear.
    """
    params = {name: p for name, p in raw.named_parameters() if p.requires_grad}
    others = [p for p in params.values() if not model.is_matrix(p)]
    matrices = {name: p for name, p in params.items() if model.is_matrix(p)}
    muon = [matrices.pop(name) for name in list(matrices) if optimizer == "muon" and ".h." in name]
    groups = [dict(params=[*matrices.values()], weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
    return [adamw, Muon([dict(params=muon, weight_decay=weight_decay)], momentum)] if muon else [adamw]


def n_moments(optimizers: list[torch.optim.Optimizer]) -> int:
    """The number of values that the optimizers store: two per parameter, and one of Muon's."""
    params = [(optimizer, p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    return sum(p.numel() if isinstance(optimizer, Muon) else 2 * p.numel() for optimizer, p in params)


def load_moments(optimizers: list[torch.optim.Optimizer], moments: list[dict]) -> None:
    """Load moments; learning rates and other settings stay. Raises ValueError if the moments do not fit the model."""
    if len(moments) != len(optimizers):
        raise ValueError(f"the checkpoint has moments of {len(moments)} optimizers, expected {len(optimizers)}")
    for optimizer, state in zip(optimizers, moments):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        step, names = dict(step=torch.Size()), ("exp_avg", "exp_avg_sq")
        if isinstance(optimizer, Muon):
            step, names = {}, ("momentum",)
        expected = {i: step | dict.fromkeys(names, p.shape) for i, p in enumerate(params)}
        if expected != {i: {name: tensor.shape for name, tensor in found.items()} for i, found in state.items()}:
            raise ValueError(f"the moments of {type(optimizer).__name__} in the checkpoint do not fit the model")
        if hasattr(params[0], "placements"):  # sharded: every rank keeps its rows
            from torch.distributed.tensor import distribute_tensor

            for i, p in enumerate(params):
                rows = partial(distribute_tensor, device_mesh=p.device_mesh, placements=p.placements)
                state[i] = {k: rows(x, src_data_rank=None) if x.dim() else x for k, x in state[i].items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def zero_masks(raw: model.GPT) -> dict[str, Tensor]:
    """The masks of the pruned matrices by parameter name, True where a weight is not zero; {} for a dense model.

    A matrix counts as pruned if at least 1 %, but not all, of its weights are exactly zero: training and rounding do
    not produce that many zeros, and a matrix of zeros has only been initialized.
    """
    masks = {f"{name}.weight": linear.weight.detach() != 0 for name, linear in model.weight_matrices(raw).items()}
    return {name: mask for name, mask in masks.items() if 0 < mask.float().mean() <= 0.99}


def keep_zeros(optimizers: list[torch.optim.Optimizer], raw: model.GPT) -> int:
    """After every optimizer step, restore the zeros that a pruned model has now; return the number of masks."""
    masks = {raw.get_parameter(name): mask for name, mask in zero_masks(raw).items()}

    @torch.no_grad()
    def apply_masks(*_: object) -> None:
        for p, mask in masks.items():
            p.mul_(mask)

    for optimizer in optimizers:
        optimizer.register_step_post_hook(apply_masks)
    return len(masks)
