"""Fast matrix products and compilation for decoding on a CPU."""

import shutil

import pytest
import torch
from test_generate import tokens_of, uncached
from test_model import random_ids, rough_model
from torch._dynamo.utils import counters

from neogpt import cpu
from neogpt.generate import generate
from neogpt.model import GPT


def products(raw: GPT) -> set[str]:
    """How the linear layers of a model multiply small batches: names of functions of cpu.py, or "usual"."""
    linears = [m for m in raw.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * raw.config.n_layer + 1
    return {vars(m)["forward"].args[1].func.__name__ if "forward" in vars(m) else "usual" for m in linears}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_out", [15, 16, 48, 61])
@pytest.mark.parametrize("rows", [(1,), (2,), (8,), (64,), (3, 5), (1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("way", ["packed_matmul", "split_matmul"])
def test_products_equal_float64(way: str, rows: tuple[int, ...], n_out: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(*rows, 24, generator=generator), torch.randn(n_out, 24, generator=generator)
    b = torch.randn(n_out, generator=generator) if bias else None
    expected = x.double() @ W.double().T + (0 if b is None else b.double())
    if way == "packed_matmul" and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs AVX")
    arranged = torch.ops.mkldnn._reorder_linear_weight(W, 8) if way == "packed_matmul" else W
    for given in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        # sums of 24 products of order 1, rounded to 2^-24
        found = getattr(cpu, way)(given, arranged, b)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_rows", [1, 2, 65])
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512", "DEFAULT"])
def test_generation_uses_fast_products(instructions: str, n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the time of a generation, with the weights at its start."""
    if "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("needs AVX")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    fast = {("AVX2", 1): "split_matmul", ("AVX2", 2): "packed_matmul", ("AVX512", 2): "packed_matmul"}
    raw = rough_model(vocab_size=61)  # an odd size, like OpenAI's
    prompts = [random_ids(1 + n % 7, seed=n).tolist() for n in range(n_rows)]
    for large in (2**30, 0):
        monkeypatch.setattr(cpu, "MIN_WEIGHTS", large)
        for _ in range(2):
            expected = [uncached(raw, p, 20, seed) for seed, p in enumerate(prompts)]
            steps = generate(raw, prompts, 20)
            tokens = [next(steps)]
            assert products(raw) == {fast.get((instructions, n_rows), "usual") if large == 0 else "usual"}
            tokens += steps
            assert [list(row) for row in zip(*tokens)] == expected
            assert products(raw) == {"usual"} and not any("forward" in vars(m) for m in raw.modules())
            with torch.no_grad():
                raw.lm_head.weight.neg_()
    steps = generate(raw, prompts, 20)
    next(steps)
    del steps  # an abandoned generation
    assert products(raw) == {"usual"}
    with torch.autocast("cpu", torch.bfloat16):
        steps = generate(raw, prompts, 20)
        next(steps)
        assert products(raw) == {"usual"}
    in_doubles = generate(raw.double(), prompts, 20)
    next(in_doubles)
    assert products(raw) == {"usual"}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler")
def test_compiled_equals_uncached_and_changed_weights_are_compiled_again() -> None:
    """One compilation serves prompts of all lengths, beyond block_size, until the weights change."""
    raw = rough_model(n_layer=1, block_size=8)
    optimizer = torch.optim.AdamW(raw.parameters(), lr=0.1, fused=True)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 5)]
    n_compiled = counters["stats"]["unique_graphs"]
    for _ in range(2):
        for n_cut in (0, 1):
            cut = [p[n_cut:] for p in prompts]
            n = 20 - n_cut
            expected = [uncached(raw, p, n, seed) for seed, p in enumerate(cut)]
            assert tokens_of(raw, cut, n, compile=True) == expected
        n_compiled += 1
        assert counters["stats"]["unique_graphs"] == n_compiled
        for p in raw.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()  # a fused optimizer does not increment the version of a tensor
