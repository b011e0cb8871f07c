"""Faster decoding on a CPU: matrix products for small batches, and compilation. Results agree to rounding.

Private PyTorch APIs: torch.ops.mkldnn._reorder_linear_weight and _linear_pointwise, because no public function packs a
weight matrix once and multiplies with it often. The fallback is F.linear.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import lora

MAX_ROWS = 64  # use the small-batch matmuls up to this many rows; at 512 rows F.linear is as fast
MIN_WEIGHTS = 2**18  # use them for matrices of at least this size
N_SPLITS = 16  # parts of a matrix in split_matmul


@contextmanager
def fast_cpu_linears(raw: nn.Module, n_rows: int) -> Iterator[None]:
    """Inside, large fp32 linear layers on a CPU use a faster matmul for inputs of `n_rows` rows, without gradients.

    PyTorch's BLAS leaves cores idle for one row, and for several rows it rearranges the matrix in every call. For
    several rows we pack a copy of the matrix once, in 0.1 s; for one row we split the matrix, which needs no copy. All
    layers of gpt2 on two AVX2 cores: one row 28 ms instead of 37, eight rows 46 instead of 112.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    linears = [] if torch.is_autocast_enabled("cpu") else [m for m in raw.modules() if type(m) is nn.Linear]
    try:
        for linear in linears:
            W, b = linear.weight.detach(), linear.bias
            if not W.is_cpu or W.dtype != torch.float32 or W.numel() < MIN_WEIGHTS:
                continue
            if 1 < n_rows <= MAX_ROWS and "AVX" in instructions:
                packed = torch.ops.mkldnn._reorder_linear_weight(W, 8)  # 8 rows: the layout is the same from 2 rows on
                linear.forward = functools.partial(small_batch, linear, functools.partial(packed_matmul, W=packed, b=b))
            elif n_rows == 1 and instructions == "AVX2":
                linear.forward = functools.partial(small_batch, linear, functools.partial(split_matmul, W=W, b=b))
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def small_batch(linear: nn.Linear, matmul: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The layer's output, computed by `matmul` if x has few rows and no gradient is needed."""
    if torch.is_grad_enabled() or x.numel() > MAX_ROWS * x.size(-1):
        return F.linear(x, linear.weight, linear.bias)
    return matmul(x)


def packed_matmul(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b with a matrix packed by oneDNN, (…, in) -> (…, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def split_matmul(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b as N_SPLITS products with different rows of W, (…, in) -> (…, out)."""
    rows, n_out = x.reshape(-1, x.size(-1)), len(W) // N_SPLITS * N_SPLITS
    xs, Ws = rows.expand(N_SPLITS, -1, -1), W[:n_out].view(N_SPLITS, -1, W.size(1)).mT  # (16, in, out / 16)
    y = torch.bmm(xs, Ws) if b is None else torch.baddbmm(b[:n_out].view(N_SPLITS, 1, -1), xs, Ws)
    y = y.transpose(0, 1).reshape(len(rows), n_out)
    if n_out < len(W):  # the remaining rows
        y = torch.cat([y, F.linear(rows, W[n_out:], b if b is None else b[n_out:])], dim=1)
    return y.view(*x.shape[:-1], len(W))


def compile_frozen(step: Callable[..., Tensor], raw: nn.Module) -> Callable[..., Tensor]:
    """step, compiled with the weights of `raw` as constants: a second copy of them in the layout of the compiler's
    matrix products, which take half the time of BLAS for a few rows. With other weights it is compiled again.
    """
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    fingerprint = lora.fingerprint(raw.state_dict())

    def frozen_step(*inputs: Tensor) -> Tensor:
        assert fingerprint  # reading the closure variable makes torch.compile guard on its value
        return step(*inputs)

    freeze = inductor.patch(freezing=True, max_autotune=True, max_autotune_gemm_backends="CPP")
    return dynamo.patch(recompile_limit=64)(freeze(torch.compile(frozen_step, fullgraph=True, dynamic=False)))
