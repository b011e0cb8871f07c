"""NdLinear (arXiv:2503.17353): a linear map along each axis of a tensor, and the MLP that NdGPT-2 builds from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NdLinear(nn.Module):
    """A linear map along each mode of a tensor in turn, the first mode first (algorithm 1 of the paper).

    (..., d_1, …, d_n) -> (..., h_1, …, h_n), with weights (h_i, d_i) and biases (h_i,). Without biases this is the
    linear map whose matrix is the Kronecker product of the factors.
    """

    def __init__(self, d: Sequence[int], h: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        if len(d) != len(h) or not d:
            raise ValueError(f"NdLinear needs as many output modes as input modes, not {tuple(d)} -> {tuple(h)}")
        self.modes = nn.ModuleList(nn.Linear(d_i, h_i, bias=bias) for d_i, h_i in zip(d, h))

    def forward(self, x: Tensor) -> Tensor:
        for axis, linear in enumerate(self.modes, -len(self.modes)):
            x = linear(x.movedim(axis, -1)).movedim(-1, axis)
        return x


class NdMLP(nn.Module):
    """NdGPT-2's MLP: two NdLinear layers around a GELU, (C, 1) -> (I, f) -> GELU -> (I, f) -> (C, 1).

    The second mode starts and ends with size one. With u = W x + b a hidden unit is gelu(w_j u_i + β_j), so the block
    is a dense MLP of width I with a learned activation Σ_j v_j gelu(w_j t + β_j).
    """

    def __init__(self, n_embd: int, width: int, n_modes: int, approximate: str) -> None:
        """n_embd: C; width: I; n_modes: f; approximate: as in F.gelu."""
        super().__init__()
        self.c_fc = NdLinear((n_embd, 1), (width, n_modes))
        self.c_proj = NdLinear((width, n_modes), (n_embd, 1))
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        # The literal order is self.c_proj(gelu(self.c_fc(x[..., None])))[..., 0]. Two changes make it cheap: the second
        # mode is the first axis, so all arithmetic runs along I; and it is contracted before the large matrix product,
        # which then costs 1/f. The bias of that product must be scaled by Σ v.
        (large_in, spread), (large_out, mix) = self.c_fc.modes, self.c_proj.modes
        u = large_in(x)  # (B, T, I)
        # the cast keeps the following products in bf16 under autocast
        w, beta, v = (p.to(u.dtype).view(-1, *[1] * u.dim()) for p in (spread.weight, spread.bias, mix.weight))
        hidden = F.gelu(torch.addcmul(beta, w, u), approximate=self.approximate)  # (f, B, T, I)
        mixed = (v * hidden).sum(0)  # (B, T, I)
        return large_out(mixed) + (mix.weight.sum() - 1) * large_out.bias + mix.bias


# Initialization of the factors of size f. With N(0, 0.02) for every factor the output would be 1e5 times too small to
# learn from; w near 1 and v = 1/f start as a dense MLP. Equal w would stay equal, so they vary.
INIT = {
    "c_fc.modes.1.weight": lambda w: nn.init.normal_(w, mean=1.0, std=0.1),  # (f, 1)
    "c_proj.modes.1.weight": lambda v: nn.init.constant_(v, 1 / v.numel()),  # (1, f)
}
