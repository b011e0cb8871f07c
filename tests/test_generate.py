"""Generation against the loop without a cache and against the model's probabilities."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from test_model import ATTENTIONS, random_ids, rough_model

from neogpt import cpu
from neogpt import generate as generation
from neogpt.generate import KVCache, cast_linears, generate, sample
from neogpt.model import GPT, weight_matrices

SETTINGS = dict(temperature=1.0, top_k=0, top_p=1.0)  # sample from the model's probabilities


def tokens_of(raw: GPT, prompts: Sequence[Sequence[int]], n: int, **options: Any) -> list[list[int | None]]:
    """Each row's generated tokens."""
    return [list(row) for row in zip(*generate(raw, prompts, n, **options))]


def random_prompts(*lengths: int) -> list[list[int]]:
    """One prompt per length."""
    return [random_ids(n, seed=n).tolist() for n in lengths]


@torch.no_grad()
def uncached(raw: GPT, prompt: Sequence[int], n: int, seed: int = 0, **options: Any) -> list[int]:
    """The loop that `generate` must equal: one row, a full forward over the whole window at every step."""
    T, n_tokens = raw.config.block_size, raw.config.n_tokens
    uniforms = torch.rand(n, generator=torch.Generator().manual_seed(seed))
    window, out, settings = list(prompt)[-T:], [], SETTINGS | options
    processors = pytest.importorskip("transformers.generation.logits_process")
    penalize = processors.RepetitionPenaltyLogitsProcessor(settings.pop("repetition_penalty", 1.0))
    for step in range(n):
        if len(window) > T:
            window = window[-max(1, T // 2) :]
        logits = raw(torch.tensor([window]))[:, -1, :n_tokens]
        logits = penalize(torch.tensor([[*prompt, *out]]), logits)
        token = sample(logits, uniforms[step : step + 1], **settings).item()
        window.append(token)
        out.append(token)
    return out


OPTIONS = [dict(temperature=0), dict(), dict(temperature=0.7, top_k=9), dict(temperature=1.3, top_p=0.8)]
OPTIONS += [dict(temperature=0, repetition_penalty=1.3), dict(top_k=9, repetition_penalty=0.8)]
OPTIONS += [dict(repetition_penalty=3.0)]  # so large that negative logits matter


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cached_equals_uncached_token_for_token(options: dict, attention: str) -> None:
    """A ragged batch, prompts shorter and longer than the window, far past its end; also: the rows are independent."""
    raw, prompts = rough_model(attention=attention), random_prompts(1, 5, 15, 16, 17, 40)
    seeds = [11, 7, 5, 3, 2, 10**9]
    expected = [uncached(raw, p, 36, seed, **options) for p, seed in zip(prompts, seeds)]
    before = torch.get_rng_state()
    assert tokens_of(raw, prompts, 36, seeds=seeds, **options) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert len({tuple(row) for row in expected}) >= 5  # the rows differ


@pytest.mark.parametrize("chunk", [1, 2, 3, 16])
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("lengths", [(4, 4), (1, 3, 14)])
def test_cached_equals_uncached_in_small_windows_and_in_chunks(
    lengths: tuple[int, ...], block_size: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, prompts = rough_model(seed=1, block_size=block_size), random_prompts(*lengths)
    expected = [uncached(raw, p, 20, seed) for seed, p in enumerate(prompts)]
    monkeypatch.setitem(generation.CHUNK, "cpu", chunk)
    for n in (1, 2, 20):
        assert tokens_of(raw, prompts, n) == [row[:n] for row in expected]
    stop = expected[0][7]
    stopped = [row[: row.index(stop) + 1] if stop in row else row for row in expected]
    n_steps = max(map(len, stopped))
    assert tokens_of(raw, prompts, 20, stop=stop) == [row + [None] * (n_steps - len(row)) for row in stopped]
    assert tokens_of(raw, prompts[:1], 20, stop=stop) == stopped[:1]  # it ends with the last row


@pytest.mark.parametrize("small_vocab", [0, 64])
def test_cast_linears_equal_autocast(small_vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a small vocabulary stays fp32."""
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", small_vocab)
    raw = rough_model()
    idx = random_ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = raw(idx)
        cast_linears(raw)
        found = raw(idx)
    assert raw.lm_head.weight is raw.transformer.wte.weight
    assert all(linear.weight.dtype == torch.bfloat16 for linear in weight_matrices(raw).values())
    dtype = torch.float32 if small_vocab else torch.bfloat16
    assert found.dtype == expected.dtype == raw.lm_head.weight.dtype == dtype
    # if the embedding, tied to the head, is rounded too: 2^-9 of values of order 1
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)


def test_every_step_computes_one_token_per_row() -> None:
    """The hidden states of one position after the prompt, without gradients, and the head of the last position only."""
    raw, hidden, head = rough_model(), [], []
    raw.transformer.ln_f.register_forward_hook(lambda module, args, x: hidden.append((x.size(1), x.requires_grad)))
    raw.lm_head.register_forward_hook(lambda module, args, logits: head.append(logits.numel()))
    steps = generate(raw, [[1, 2, 3], [4]], 5)
    next(steps)
    assert hidden == [(3, False)]
    assert len(list(steps)) == 4
    assert hidden[1:] == [(1, False)] * 4 and head == [2 * 64] * 5
    assert list(generate(raw, [[1]], 0)) == []


@pytest.mark.parametrize("n_rows", [1, 2])
def test_an_abandoned_generator_leaves_the_model_trainable(n_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[list]:
        raw.zero_grad()
        raw(random_ids(2, 9), random_ids(2, 9, seed=1)).backward()
        return [p.grad.tolist() for p in raw.parameters()]

    monkeypatch.setattr(cpu, "MIN_WEIGHTS", 0)
    raw = rough_model()
    expected = gradients()
    steps = generate(raw, [[1, 2, 3]] * n_rows, 30)
    next(steps)
    assert torch.is_grad_enabled() and gradients() == expected
    next(steps)
    steps.close()
    assert gradients() == expected and raw.training


PROBS = torch.tensor([0.05, 0.5, 0.15, 0.3])  # unsorted
CUTS = {  # the number of the likeliest ids that stay
    1: [dict(top_p=1e-9), dict(top_p=0.45), dict(top_k=2, top_p=0.6)],  # top_p is a share of what top_k leaves: 5/8
    2: [dict(top_k=2), dict(top_p=0.55), dict(top_p=0.75)],  # the id that crosses the boundary stays
    3: [dict(top_k=3), dict(top_p=0.9)],
    4: [dict(top_k=4), dict(top_k=99), dict(top_p=0.96), dict(top_p=1.0), dict(temperature=0.5), dict(temperature=3.0)],
}
# after the temperature the probabilities go as their roots: .117 .371 .203 .287
CUTS[2] += [dict(temperature=2.0, top_p=0.45), dict(temperature=2.0, top_p=0.55)]
CUTS[3] += [dict(temperature=2.0, top_p=0.7)]


@pytest.mark.parametrize("n_kept", CUTS)
def test_temperature_top_k_and_top_p(n_kept: int) -> None:
    """Evenly spaced uniforms choose each id as often as its probability says, to one draw at either end."""
    uniforms = (torch.arange(10_000) + 0.5) / 10_000
    for options in CUTS[n_kept]:
        settings = SETTINGS | options
        weights = PROBS ** (1 / settings["temperature"])
        weights[weights.argsort()[: 4 - n_kept]] = 0
        ids = sample(PROBS.log().expand(10_000, -1), uniforms, **settings)
        found = torch.bincount(ids, minlength=4) / 10_000
        assert ((found > 0) == (weights > 0)).all(), options
        torch.testing.assert_close(found, weights / weights.sum(), atol=2e-4, rtol=0)


def test_sample_with_extreme_uniforms_and_temperatures() -> None:
    most = 1 - 2.0**-24  # the largest float32 below 1, and more than torch.rand gives
    logits = 3 * torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = float("-inf")
    for draw in (0.0, most):
        for options in (dict(), dict(top_k=90), dict(top_p=0.99), dict(top_k=70, top_p=0.3), dict(top_p=1e-320)):
            ids = sample(logits, torch.full((300,), draw), **SETTINGS | options)
            assert torch.isfinite(logits.gather(1, ids[:, None])).all()
    for temperature in (1e-3, 1e-20, 1e-45, 1e-300):  # the likeliest, whatever over- or underflows
        ids = sample(logits, torch.full((300,), 0.5), temperature, 0, 1.0)
        if temperature < 1e-3:
            assert torch.equal(ids, logits.argmax(-1))
    even = sample(torch.tensor([[1.0, 2.0]]).expand(2, 2), torch.tensor([0.4, 0.6]), 1e30, 0, 1.0)
    assert even.tolist() == [0, 1]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [(5,), (5, 5), (1, 9, 4)])
def test_generations_share_one_compilation(
    lengths: tuple[int, ...], attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of CUDA, with a static cache, on a CPU with a compiler that does nothing; past the window's end."""
    raw, counter = rough_model(attention=attention), torch._dynamo.testing.CompileCounter()
    batches = [random_prompts(*lengths), random_prompts(*[n + 1 for n in lengths])]
    expected = [tokens_of(raw, prompts, 30) for prompts in batches]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(generation, "KVCache", lambda n_layer, size, static: KVCache(n_layer, size, static=True))
    assert [tokens_of(raw, prompts, 30, compile=True) for prompts in batches] == expected
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("compile", [False, True])
def test_generation_on_cuda_equals_the_cpu(compile: bool, attention: str) -> None:
    raw, prompts = rough_model(attention=attention), random_prompts(1, 5, 16, 40)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # TF32 would round to 10 bits
    try:
        for options in (dict(temperature=0), dict(temperature=0.9, top_k=20)):
            expected = tokens_of(raw.cpu(), prompts, 40, **options)
            for n in (1, len(prompts)):
                assert tokens_of(raw.cuda(), prompts[:n], 40, compile=compile, **options) == expected[:n]
    finally:
        torch.set_float32_matmul_precision(precision)
