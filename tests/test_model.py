"""The model against independent references: Hugging Face's GPT-2, closed forms, and loops without a cache."""

import math
import re
from dataclasses import asdict, replace
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neogpt.model import GPT, SIZES, GPTConfig, flash_attention, manual_attention, pad_vocab

ATTENTIONS = ("flash", "manual")


def shape(**changes: Any) -> GPTConfig:
    """A small configuration; 3 of the 64 rows of the embedding are padding."""
    small = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, n_tokens=61, vocab_size=64)
    return GPTConfig(**(small | changes))


def rough_model(seed: int = 0, **changes: Any) -> GPT:
    """A small model with large random parameters, so that every term affects the result.

    With GPT-2's initialization biases are 0 and attention is nearly uniform, which would hide errors.
    """
    return harness.tiny_model(seed, 0.3, **asdict(shape(**changes)))


def random_ids(*size: int, seed: int = 0, below: int = 61) -> Tensor:
    return torch.randint(below, size, generator=torch.Generator().manual_seed(seed))


# layers, heads, width and context of the papers (GPT-2; GPT-3, table 2.1; NdLinear); parameters, those of GPT-3 rounded
TABLE = {
    "gpt2": (12, 12, 768, 1024, 124_439_808),
    "gpt2-medium": (24, 16, 1024, 1024, 354_823_168),
    "gpt2-large": (36, 20, 1280, 1024, 774_030_080),
    "gpt2-xl": (48, 25, 1600, 1024, 1_557_611_200),
    "gpt3-1.3b": (24, 16, 2048, 2048, 1.3e9),
    "gpt3-2.7b": (32, 32, 2560, 2048, 2.7e9),
    "gpt3-6.7b": (32, 32, 4096, 2048, 6.7e9),
    "ndgpt2-96m": (12, 12, 768, 1024, 96_146_004),
    "ndgpt2-82m": (12, 12, 768, 1024, 81_981_156),
}


@pytest.mark.parametrize("name", TABLE)
def test_sizes_have_the_published_shapes_and_parameter_counts(name: str) -> None:
    *sizes, n_params = TABLE[name]
    with torch.device("meta"):
        raw = GPT(GPTConfig(**SIZES[name], vocab_size=50304 if name.startswith("nd") else 50257))
    c = raw.config
    assert [c.n_layer, c.n_head, c.n_embd, c.block_size] == sizes
    assert raw.n_params() == pytest.approx(n_params, rel=0.03 if isinstance(n_params, float) else 0)


def test_pad_vocab() -> None:
    assert [pad_vocab(n) for n in (1, 257, 1024, 1025, 50257, 50304)] == [1, 257, 1024, 1088, 50304, 50304]


NOT_SIZES = [0, -1, 1.5, 2.0, True, None, "12", 2**20 + 1, 10**30, float("nan")]
INVALID = [{f: v} for f in ("n_layer", "n_head", "n_embd", "block_size", "n_tokens", "vocab_size") for v in NOT_SIZES]
INVALID += [dict(n_embd=100, n_head=12), dict(attention="fast"), dict(attention=None), dict(n_tokens=50305)]


@pytest.mark.parametrize("changes", INVALID, ids=str)
def test_config_refuses_invalid_and_inconsistent_sizes(changes: dict[str, Any]) -> None:
    ((name, value), *_) = changes.items()
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}")):
        GPTConfig(**changes)
    GPTConfig(n_tokens=50304)  # the embedding need not be padded


@pytest.mark.parametrize("attend", [manual_attention, flash_attention])
@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (1, 5)])
def test_attention_equals_the_definition(attend: Any, T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (T, S, S))
    y = attend(q, k, v)
    for t in range(T):
        seen = S - T + t + 1
        scores = (q[:, :, t, None] * k[:, :, :seen]).sum(-1) / 2  # √hs = 2
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        torch.testing.assert_close(y[:, :, t], (weights[..., None] * v[:, :, :seen]).sum(2))
    if T < S:  # a mask hides keys of each row
        mask = torch.tensor([[True] * 5, [True, True, False, False, False]])[:, None, None]
        y = attend(q, k, v, mask)
        torch.testing.assert_close(y[:1], attend(q[:1], k[:1], v[:1]))
        torch.testing.assert_close(y[1:], attend(q[1:], k[1:, :, :2], v[1:, :, :2]))


@pytest.mark.parametrize("T", [1, 256, 513])
@pytest.mark.parametrize("masked", ["", "each query", "all queries"])
def test_attention_in_bf16_on_a_cpu(masked: str, T: int) -> None:
    """One query, one chunk of queries, and three."""
    generator, S = torch.Generator().manual_seed(0), max(T, 20)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator).bfloat16().requires_grad_() for n in (T, S, S))
    mask = torch.rand(1, 1, T if masked == "each query" else 1, S, generator=generator) < 0.5 if masked else None
    mask = mask.index_fill(3, torch.tensor(0), True) if masked else None  # every query has a key
    with torch.autocast("cpu", torch.bfloat16):
        y = flash_attention(q, k, v, mask)
    expected = manual_attention(q.double(), k.double(), v.double(), mask)
    g = torch.randn(expected.shape, generator=generator)
    found = torch.autograd.grad((y.float() * g).sum(), (q, k, v))
    grads = torch.autograd.grad((expected * g).sum(), (q, k, v))
    for a, b in zip((y, *found), (expected, *grads)):
        # bf16 has 8 bits; the scores, of order 1, and the weights are rounded to it
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_loss_of_bf16_logits_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = rough_model()
    with torch.autocast("cpu", torch.bfloat16):  # a small vocabulary
        assert raw(random_ids(3, 7)).dtype == torch.float32
    monkeypatch.setattr("neogpt.model.SMALL_VOCAB", 0)
    idx, targets = random_ids(3, 7), random_ids(3, 7, seed=1)
    in_fp32 = raw(idx, targets).item()
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = raw(idx), raw(idx, targets)
    assert logits.dtype == torch.bfloat16
    expected = F.cross_entropy(logits.double().flatten(0, 1), targets.flatten()).item()
    assert loss.item() == pytest.approx(expected, rel=1e-6)  # fp32's rounding; in bf16 it would be 1e-3
    # bf16 keeps 8 bits: against fp32 the loss moves by a percent or so, not by more
    for half in (loss, raw.bfloat16()(idx, targets)):
        assert half.dtype == torch.float32 and half.item() == pytest.approx(in_fp32, rel=0.03)


def test_a_sequence_longer_than_block_size_is_refused() -> None:
    with pytest.raises(AssertionError, match="17 tokens"):
        rough_model()(random_ids(1, 17))


def test_initialization_is_gpt2s() -> None:
    torch.manual_seed(0)
    raw = GPT(shape(n_layer=8, n_embd=64, n_head=4, block_size=64, vocab_size=512, n_tokens=500))
    stds = dict(wte=0.02, wpe=0.02, c_attn=0.02, c_fc=0.02, c_proj=0.02 / 4)  # 1 / √(2 · 8 layers) = 1/4
    for name, p in raw.named_parameters():
        kind, what = name.split(".")[-2:]
        mean = float(kind.startswith("ln_") and what == "weight")
        std = 0.0 if kind.startswith("ln_") or what == "bias" else stds[kind]
        # five standard errors of a sample's deviation and mean
        assert abs(p.std().item() - std) <= 5 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item() - mean) <= 5 * std / math.sqrt(p.numel()), name
    loss = raw(random_ids(16, 16, below=500), random_ids(16, 16, seed=1, below=500))
    # a uniform guess: logits of deviation s = 0.02 · √64 add about s²/2 = 0.013; 256 targets scatter by s / 16 = 0.01
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def test_a_parameter_without_a_rule_is_refused() -> None:
    class Gated(GPT):
        def init_weights(self) -> None:
            self.gate = torch.nn.Parameter(torch.zeros(4))
            super().init_weights()

    with pytest.raises(AssertionError, match="gate"):
        Gated(shape())


def test_residual_stream_in_bf16() -> None:
    raw, idx = rough_model(residual="bf16"), random_ids(2, 16)
    reference = GPT.from_weights(replace(raw.config, residual="fp32"), raw.state_dict())
    assert torch.equal(raw(idx), reference(idx))  # nothing changes without autocast
    with torch.autocast("cpu", torch.bfloat16):
        assert raw.embed(idx).dtype == torch.bfloat16 and reference.embed(idx).dtype == torch.float32
        ours, theirs = raw(idx).float(), reference(idx).float()
    assert 0 < (ours - theirs).norm() < 0.02 * theirs.norm()  # bf16 rounds to 2^-9


def test_from_weights_refuses_other_names_shapes_and_dtypes() -> None:
    weights, name = rough_model().state_dict(), "transformer.h.1.mlp.c_fc.weight"
    w = weights[name]
    bad = [(name, weights | {name: p}) for p in (w.t(), w[:-1], w.to(torch.int8), w.double(), w.to_sparse(), [1.0])]
    bad += [(name, {k: p for k, p in weights.items() if k != name})]
    bad += [("_orig_mod.x", weights | {"_orig_mod.x": value}) for value in (torch.zeros(1), 5)]
    bad += [("wpe", weights | {"transformer.wpe.weight": torch.zeros(17, 16)})]
    for key, changed in bad:
        with pytest.raises(ValueError, match=key):
            GPT.from_weights(shape(), changed)
