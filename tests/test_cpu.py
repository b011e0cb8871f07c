"""Fast matrix products and int8 weights for decoding on a CPU."""

import copy
import itertools

import pytest
import torch
from test_generate import uncached
from test_model import random_ids, rough_model

from neogpt import cpu, runtime
from neogpt.generate import KVCache, cast_linears, decode_one_token, generate, prefill
from neogpt.model import GPT


@torch.no_grad()
def decode_logits(raw: GPT, prompts: list[list[int]]) -> torch.Tensor:
    """The logits after the prompts and one more token."""
    cache = KVCache(raw.config.n_layer, raw.config.block_size)
    prefill(raw, prompts, cache)
    return decode_one_token(raw, torch.ones(len(prompts), dtype=torch.int64), cache)


needs_avx = pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX")
WAYS = [(torch.float32, "packed_matmul"), (torch.float32, "split_matmul")]
WAYS += [(torch.bfloat16, "packed_matmul"), (torch.bfloat16, "one_row_matmul")]


def products(raw: GPT) -> set[str]:
    """How the linear layers of a model multiply small batches: names of functions of cpu.py, or "usual"."""
    linears = [m for m in raw.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 4 * raw.config.n_layer + 1
    ways = [vars(m)["forward"].args[1] if "forward" in vars(m) else None for m in linears]
    return {getattr(way, "func", way).__qualname__.partition(".")[0] if way else "usual" for way in ways}


@needs_avx
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_out", [15, 32, 64, 61])
@pytest.mark.parametrize("rows", [(1,), (2,), (8,), (64,), (3, 5), (1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "way"), WAYS, ids=str)
def test_products_equal_float64(dtype: torch.dtype, way: str, rows: tuple[int, ...], n_out: int, bias: bool) -> None:
    if dtype == torch.bfloat16 and not runtime.cpu_has_bf16():
        pytest.skip("needs a CPU with units for bf16")
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*shape, 24, generator=generator).to(dtype) for shape in (rows, [n_out]))
    b = torch.randn(n_out, generator=generator).to(dtype) if bias else None
    expected = x.double() @ W.double().T + (0 if b is None else b.double())
    packed = [torch.ops.mkldnn._reorder_linear_weight(W, n) for n in (1, 8)]
    contiguous, strided = x, x.transpose(0, -1).contiguous().transpose(0, -1)
    for given, arranged in itertools.product((contiguous, strided), packed if way == "packed_matmul" else [W]):
        found = cpu.split_matmul(W, b)(given) if way == "split_matmul" else getattr(cpu, way)(given, arranged, b)
        assert found.dtype == dtype
        # sums of 24 products of order 1, rounded to 2^-24, and in bf16 once or twice to 2^-8
        bound = 1e-5 if dtype == torch.float32 else 2**-7 * expected.abs().clamp(min=1).max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    assert torch.backends.mkldnn.enabled


@needs_avx
@pytest.mark.parametrize(
    "instructions, n_rows, intel, fast",
    [("AVX2", 1, False, "split_matmul"), ("AVX2", 1, True, "usual"), ("AVX2", 2, True, "packed_matmul")]
    + [("AVX2", 65, False, "usual"), ("DEFAULT", 1, False, "usual")],
)
def test_generation_uses_fast_products(
    instructions: str, n_rows: int, intel: bool, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the time of a generation, with the weights at its start."""
    monkeypatch.setattr(cpu, "is_intel", lambda: intel)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", 0)  # a small head is left alone
    raw = rough_model(vocab_size=61)  # an odd size, like OpenAI's
    prompts = [random_ids(1 + n % 7, seed=n).tolist() for n in range(n_rows)]
    steps = generate(raw, prompts, 2)
    next(steps)
    assert products(raw) == {"usual"}  # of small matrices
    steps.close()
    monkeypatch.setattr(cpu, "MIN_WEIGHTS", 0)
    for _ in range(2):
        expected = [uncached(raw, p, 4 if n_rows > 2 else 20, seed) for seed, p in enumerate(prompts)]
        steps = generate(raw, prompts, len(expected[0]))
        tokens = [next(steps)]
        assert products(raw) == {fast}
        tokens += steps
        assert [list(row) for row in zip(*tokens)] == expected
        assert products(raw) == {"usual"} and not any("forward" in vars(m) for m in raw.modules())
        with torch.no_grad():
            raw.lm_head.weight.neg_()
    in_doubles = generate(raw.double(), prompts, 20)
    next(in_doubles)
    assert products(raw) == {"usual"}


@pytest.mark.skipif(not runtime.cpu_has_bf16(), reason="needs a CPU with units for bf16")
@pytest.mark.parametrize(
    "n_rows, intel, way", [(1, False, "one_row_matmul"), (1, True, "packed_matmul"), (2, False, "packed_matmul")]
)
@pytest.mark.parametrize("cast", [False, True])
def test_fast_products_in_bf16(cast: bool, n_rows: int, intel: bool, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of fp32 weights under autocast, and of bf16 weights, equal those without fast products to rounding."""
    monkeypatch.setattr(cpu, "is_intel", lambda: intel)
    monkeypatch.setattr(cpu, "MIN_WEIGHTS", 0)
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", 0)
    raw = rough_model(vocab_size=61)
    prompts = [random_ids(5, seed=n).tolist() for n in range(n_rows)]
    exact = decode_logits(raw, prompts)
    if cast:
        cast_linears(raw)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        usual = decode_logits(raw, prompts)
        for linear, forward in cpu.fast_linears(raw, n_rows).items():
            linear.forward = forward
        assert products(raw) == {way}
        fast = decode_logits(raw, prompts)
    assert fast.dtype == usual.dtype == torch.bfloat16
    # both are rounded to bf16 in the same places, so the errors are alike
    error, usual_error = ((x.float() - exact).square().mean().sqrt().item() for x in (fast, usual))
    assert 0 < error < 1.5 * usual_error


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (3, 5), (64,), (65,)], ids=str)
@torch.no_grad()
def test_int8_layer_equals_float64(rows: tuple[int, ...], bias: bool) -> None:
    generator, linear = torch.Generator().manual_seed(0), torch.nn.Linear(37, 61, bias=bias)
    linear.weight.copy_(torch.randn(61, 37, generator=generator) * torch.arange(61)[:, None])  # a row is zero
    x = torch.randn(*rows, 37, generator=generator)
    scale = linear.weight.abs().amax(1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (linear.weight / scale).round(), 0).double() * scale
    assert ((rounded - linear.weight).abs() <= scale / 2 * (1 + 1e-5)).all()
    expected = x.double() @ rounded.T + (0 if linear.bias is None else linear.bias.double())
    found = cpu.Int8Linear(linear)(x.transpose(0, -1).contiguous().transpose(0, -1))
    # sums of 37 products of order 60, rounded to 2^-24
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("mlp", [{}, dict(mlp="ndlinear", mlp_width=24, mlp_modes=3)], ids=["dense", "ndlinear"])
@pytest.mark.parametrize("small_vocab", [0, 1024])
def test_int8_model_equals_rounded_weights(small_vocab: int, mlp: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", small_vocab)
    raw = rough_model(vocab_size=61, **mlp)
    rounded, embedding = copy.deepcopy(raw), raw.transformer.wte.weight.clone()
    cpu.use_int8(raw)
    assert type(raw.lm_head) is (torch.nn.Linear if small_vocab else cpu.Int8Linear)
    for name, layer in rounded.named_modules():
        if isinstance(int8 := raw.get_submodule(name), cpu.Int8Linear):
            layer.weight = torch.nn.Parameter(int8.weight * int8.scale)
    assert torch.equal(raw.transformer.wte.weight, embedding)
    prompts = [random_ids(1 + 3 * n, seed=n).tolist() for n in range(2)]
    for rows in (prompts[:1], prompts):
        tokens = list(zip(*generate(raw, rows, 30)))
        assert tokens == [tuple(uncached(rounded, row, 30, seed)) for seed, row in enumerate(rows)]


def test_int8_weights_need_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.INT8_KERNEL.isascii()  # it is sent to the compiler in the locale's encoding
    cpu.int8_kernel.cache_clear()
    for compiler in ("nosuchcompiler", "false"):
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(ValueError, match="gcc"):
            cpu.use_int8(rough_model())
