"""NdLinear (arXiv:2503.17353), a linear map along each axis of a tensor, and NdGPT-2's MLP, which is built from it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NdLinear(nn.Module):
    """A linear map along each mode (axis) of a tensor (algorithm 1 of the paper), (…, d_1, …, d_n) -> (…, h_1, …, h_n).
    Weights: (h_i, d_i); biases: (h_i,). Apart from the biases, its matrix is the Kronecker product of the weights.
    """

    def __init__(self, d: tuple[int, ...], h: tuple[int, ...]) -> None:
        super().__init__()
        self.modes = nn.ModuleList(nn.Linear(d_i, h_i) for d_i, h_i in zip(d, h, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for axis, linear in enumerate(self.modes, -len(self.modes)):
            x = linear(x.movedim(axis, -1)).movedim(-1, axis)
        return x


class NdMLP(nn.Module):
    """NdGPT-2's MLP: two NdLinear layers around a GELU, (C, 1) -> (I, f) -> GELU -> (I, f) -> (C, 1).

    n_embd: C; width: I; n_modes: f; approximate: as in F.gelu. The first mode of c_fc computes u = W x + b, its second
    mode w_j u_i + β_j, and the second mode of c_proj has the weights v_j. So this is a dense MLP of width I with the
    learned activation Σ_j v_j gelu(w_j t + β_j).
    """

    def __init__(self, n_embd: int, width: int, n_modes: int, approximate: str) -> None:
        super().__init__()
        self.c_fc = NdLinear((n_embd, 1), (width, n_modes))
        self.c_proj = NdLinear((width, n_modes), (n_embd, 1))
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        # Equal to self.c_proj(gelu(self.c_fc(x[..., None])))[..., 0] and cheaper: memory is contiguous along I, and the
        # second mode is summed before the large matrix product, which then costs 1/f; its bias must be scaled by Σ v.
        (large_in, spread), (large_out, mix) = self.c_fc.modes, self.c_proj.modes
        u = large_in(x)  # (B, T, I)
        # the cast keeps the following products in bf16 under autocast
        w, beta, v = (p.to(u.dtype).view(-1, *[1] * u.dim()) for p in (spread.weight, spread.bias, mix.weight))
        hidden = F.gelu(torch.addcmul(beta, w, u), approximate=self.approximate)  # (f, B, T, I)
        mixed = (v * hidden).sum(0)  # (B, T, I)
        return large_out(mixed) + (mix.weight.sum() - 1) * large_out.bias + mix.bias


# Initialization of w and v, by suffix of the name. With N(0, 0.02) the output would be 1e5 times too small to train.
# With w near 1 and v = 1/f the MLP starts as a dense one. The w must differ, or they would stay equal.
INIT = {
    "c_fc.modes.1.weight": lambda w: nn.init.normal_(w, mean=1.0, std=0.1),  # (f, 1)
    "c_proj.modes.1.weight": lambda v: nn.init.constant_(v, 1 / v.numel()),  # (1, f)
}
