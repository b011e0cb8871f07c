"""Fast matrix products for decoding on a CPU."""

import itertools

import pytest
import torch
from test_generate import uncached
from test_model import random_ids, rough_model

from neogpt import cpu, runtime
from neogpt.generate import KVCache, cast_linears, decode_one_token, generate, prefill, replaced_forwards
from neogpt.model import GPT


@torch.no_grad()
def decode_logits(raw: GPT, prompts: list[list[int]]) -> torch.Tensor:
    """The logits after the prompts and one more token."""
    cache = KVCache(raw.config.n_layer, raw.config.block_size)
    prefill(raw, prompts, cache)
    return decode_one_token(raw, torch.ones(len(prompts), dtype=torch.int64), cache)


needs_avx = pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="needs AVX")
needs_bf16 = pytest.mark.skipif(not runtime.cpu_has_bf16(), reason="needs a CPU with units for bf16")
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
    "instructions, n_rows, fast",
    [("AVX2", 1, "split_matmul"), ("AVX2", 2, "packed_matmul"), ("AVX2", 65, "usual"), ("DEFAULT", 1, "usual")],
)
def test_generation_uses_fast_products(
    instructions: str, n_rows: int, fast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the time of a generation, with the weights at its start."""
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


@needs_bf16
@pytest.mark.parametrize(("n_rows", "way"), [(1, "one_row_matmul"), (2, "packed_matmul")])
@pytest.mark.parametrize("cast", [False, True])
def test_fast_products_in_bf16(cast: bool, n_rows: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of fp32 weights under autocast, and of bf16 weights, equal those without fast products to rounding."""
    monkeypatch.setattr(cpu, "MIN_WEIGHTS", 0)
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", 0)
    raw = rough_model(vocab_size=61)
    prompts = [random_ids(5, seed=n).tolist() for n in range(n_rows)]
    exact = decode_logits(raw, prompts)
    if cast:
        cast_linears(raw, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        usual = decode_logits(raw, prompts)
        with replaced_forwards(cpu.fast_linears(raw, n_rows)):
            assert products(raw) == {way}
            fast = decode_logits(raw, prompts)
        assert products(raw) == {"usual"}
    assert fast.dtype == usual.dtype == torch.bfloat16
    # both are rounded to bf16 in the same places, so the errors are alike
    error, usual_error = ((x.float() - exact).square().mean().sqrt().item() for x in (fast, usual))
    assert 0 < error < 1.5 * usual_error
