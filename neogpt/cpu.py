"""Faster decoding on a CPU: matrix products for small batches, whose results agree to rounding, and int8 weights.

Private PyTorch APIs: torch.ops.mkldnn._reorder_linear_weight and _linear_pointwise, because no public function packs a
weight matrix once and multiplies with it often. The fallback is F.linear, also in a build without oneDNN.
"""

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import model, runtime

MAX_ROWS = 64  # use packed matrices up to this many rows; at 512 rows F.linear is as fast
MIN_WEIGHTS = 2**18  # use them for matrices of at least this size


def fast_linears(raw: model.GPT, n_rows: int) -> dict[nn.Linear, Callable[[Tensor], Tensor]]:
    """A `forward` with a faster matmul for each large linear layer on a CPU, for `n_rows` rows without gradients.

    For several rows F.linear repacks the matrix in every call; we pack a copy of every matrix once, in 0.1 s for gpt2;
    under autocast the copy is bf16. For one row F.linear leaves cores idle in fp32, unless the matrix is split into
    parts; in bf16 PyTorch's kernel is faster than oneDNN's. On Intel CPUs neither is true. Times: bench/RESULTS.md.
    """
    dtype = torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32
    is_fast = torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()
    is_fast = is_fast and (runtime.cpu_has_bf16() if dtype == torch.bfloat16 else n_rows > 1 or not is_intel())
    linears = [m for m in raw.modules() if type(m) is nn.Linear and n_rows <= MAX_ROWS and is_fast]
    if raw.config.vocab_size <= model.SMALL_VOCAB:
        linears = [m for m in linears if m is not raw.lm_head]  # it is small, and stays fp32
    forwards = {}
    for linear in linears:
        W, b = linear.weight.detach(), linear.bias
        if not W.is_cpu or W.dtype not in (torch.float32, dtype) or W.numel() < MIN_WEIGHTS:
            continue
        W, b = W.to(dtype), None if b is None else b.detach().to(dtype)
        if n_rows == 1 and not is_intel():
            matmul = split_matmul(W, b) if dtype == torch.float32 else functools.partial(one_row_matmul, W=W, b=b)
        else:  # packed for 8 rows: fast for any number from 2 on, in bf16 on Intel CPUs also for 1
            matmul = functools.partial(packed_matmul, W=torch.ops.mkldnn._reorder_linear_weight(W, 8), b=b)
        forwards[linear] = functools.partial(small_batch, linear, matmul, dtype)
    return forwards


@functools.cache
def is_intel() -> bool:
    """Whether this is an Intel CPU running Linux."""
    info = Path("/proc/cpuinfo")
    return info.exists() and "GenuineIntel" in info.read_text()


def small_batch(linear: nn.Linear, matmul: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    """The layer's output, computed by `matmul` in `dtype` if x has few rows and no gradient is needed."""
    if torch.is_grad_enabled() or x.numel() > MAX_ROWS * x.size(-1):
        return F.linear(x, linear.weight, linear.bias)
    return matmul(x.to(dtype))


def packed_matmul(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b with a matrix packed by oneDNN, (…, in) -> (…, out)."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")


def split_matmul(W: Tensor, b: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function x -> x Wᵀ + b, (…, in) -> (…, out): products with 32 parts of W, which the cores share."""
    n, b = len(W), W.new_zeros(len(W)) if b is None else b
    if n % 32:  # OpenAI's head has 50,257 rows
        W, b = F.pad(W, (0, 0, 0, -n % 32)), F.pad(b, (0, -n % 32))
    parts, biases = W.view(32, -1, W.size(1)), b.view(32, -1, 1)

    def matmul(x: Tensor) -> Tensor:
        columns = x.flatten(0, -2).T.expand(32, -1, -1)  # (32, in, rows)
        y = torch.baddbmm(biases, parts, columns).flatten(0, 1)[:n]  # (out, rows)
        return y.T.reshape(*x.shape[:-1], n)

    return matmul


def one_row_matmul(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x Wᵀ + b, (…, in) -> (…, out), without oneDNN if x is one row."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled and x.numel() > x.size(-1)
    try:
        return F.linear(x, W, b)
    finally:
        torch.backends.mkldnn.enabled = enabled


INT8_KERNEL = r"""
#include <stdint.h>

/* y = x W^T, times scale, plus b unless it is null;
   x: (n_rows, n_in), W: (n_out, n_in), scale and b: (n_out), y: (n_rows, n_out) */
void int8_linear(const float *x, const int8_t *W, const float *scale, const float *b, float *y,
                 int64_t n_rows, int64_t n_out, int64_t n_in) {
    #pragma omp parallel for
    for (int64_t o = 0; o < n_out; o++) {
        for (int64_t i = 0; i < n_in; i += 64)  /* a cache line of a later row, perhaps beyond the end */
            __builtin_prefetch((const void *)((uintptr_t)(W + o * n_in + i) + 4096));
        for (int64_t r = 0; r < n_rows; r++) {
            float sum = 0;
            for (int64_t i = 0; i < n_in; i++)
                sum += x[r * n_in + i] * W[o * n_in + i];
            y[r * n_out + o] = sum * scale[o] + (b ? b[o] : 0);
        }
    }
}
"""

# Sums are computed in any order, so in vectors. With -ffast-math loading the library would also set denormals to zero.
INT8_FLAGS = "-O3 -march=native -funroll-loops -fassociative-math -fno-signed-zeros -fno-trapping-math -fopenmp"


@functools.cache
def int8_kernel() -> Callable[..., None]:
    """The function in INT8_KERNEL, compiled for this processor in 0.2 s. It uses PyTorch's threads, because the same
    OpenMP library is loaded already. Raises ValueError without a compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [os.environ.get("CC", "gcc"), *INT8_FLAGS.split(), "-shared", "-fPIC", "-x", "c", "-"]
        try:
            output = dict(text=True, capture_output=True, check=True)
            subprocess.run([*command, "-o", f"{folder}/int8.so"], input=INT8_KERNEL, **output)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            raise ValueError(f"int8 weights need gcc with OpenMP: install it, or set CC ({reason})") from error
        kernel = ctypes.CDLL(f"{folder}/int8.so").int8_linear
    kernel.argtypes, kernel.restype = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 3, None
    return kernel


class Int8Linear(nn.Linear):
    """An fp32 linear layer whose weights are int8 times a scale per output, with errors of at most half of the scale.
    It has no gradients. For one row it is faster than bf16, as it reads half of the bytes.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, device="meta")
        W = linear.weight.detach()
        self.scale = (W.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-30)  # (out, 1)
        self.weight = nn.Parameter((W / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        x, W, b = x.float().contiguous(), self.weight, self.bias
        n_rows = x.numel() // self.in_features
        if n_rows > MAX_ROWS:
            return F.linear(x, W * self.scale, b)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        addresses = x.data_ptr(), W.data_ptr(), self.scale.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr()
        int8_kernel()(*addresses, n_rows, self.out_features, self.in_features)
        return y


def use_int8(raw: model.GPT) -> None:
    """Replace the linear layers, but not a small head, by layers with int8 weights."""
    int8_kernel()
    for name, linear in model.weight_matrices(raw).items():
        raw.set_submodule(name, Int8Linear(linear))
    if raw.config.vocab_size > model.SMALL_VOCAB:
        raw.lm_head = Int8Linear(raw.lm_head)  # the embedding keeps its own weights
