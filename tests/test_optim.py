"""Learning rate schedules, parameter groups, Muon, and masks of pruned weights."""

import math
from copy import deepcopy

import pytest
import torch
from harness import ND, bits, tiny_model
from torch import Tensor

from neogpt import model, optim


def test_schedules() -> None:
    cosine = optim.schedule("cosine", 110, 10, 2.0, min_lr_frac=0.1)
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2  # cos 45°
    expected = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 35: quarter, 60: 0.55, 110: 0.1, 500: 0.1}
    assert {step: cosine(step) / 2 for step in expected} == pytest.approx(expected)
    wsd = optim.schedule("wsd", 100, 4, 2.0, min_lr_frac=0.1, decay_frac=0.2)
    expected = {0: 0.25, 3: 1.0, 4: 1.0, 59: 1.0, 80: 1.0, 85: 0.775, 90: 0.55, 100: 0.1, 200: 0.1}
    assert {step: wsd(step) / 2 for step in expected} == pytest.approx(expected)
    all_warmup, constant = optim.schedule("cosine", 4, 4, 1.0), optim.schedule("wsd", 10, 0, 1.0, decay_frac=0.0)
    assert [all_warmup(3), all_warmup(4)] == [1.0, 1.0]  # no step is left to decay in
    assert [constant(0), constant(9), constant(10)] == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("shape", [{}, ND], ids=["dense", "ndlinear"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(shape: dict, kind: str) -> None:
    raw = tiny_model(**shape)
    raw.transformer.wpe.weight.requires_grad_(False)
    optimizers = optim.make_optimizers(raw, optimizer=kind, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-7)
    names = {id(p): name for name, p in raw.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    wte, matrices = {"transformer.wte.weight"}, {f"{name}.weight" for name in model.weight_matrices(raw)}
    others = {name for name in names.values() if name.endswith(".bias") or ".ln_" in name or ".modes.1." in name}
    expected = {"adamw": [wte | matrices, others], "muon": [wte, others, matrices]}
    assert [{names[id(p)] for p in group["params"]} for group in groups] == expected[kind]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1][: len(groups)]
    assert all((group["betas"], group["eps"]) == ((0.8, 0.9), 1e-7) for group in optimizers[0].param_groups)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_moments_are_counted_loaded_without_their_settings_or_refused(kind: str) -> None:
    raw = tiny_model()
    raw.transformer.wpe.weight.requires_grad_(False)
    optimizers, new = (optim.make_optimizers(raw, optimizer=kind, weight_decay=decay) for decay in (0.1, 0.3))
    raw(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64)).backward()
    for optimizer in optimizers:
        optimizer.step()
    moments = [optimizer.state_dict()["state"] for optimizer in optimizers]
    tensors = [x for state in moments for values in state.values() for x in values.values()]
    assert optim.n_moments(optimizers) == sum(x.numel() for x in tensors if x.dim())  # step counts have no dimension
    optim.load_moments(new, deepcopy(moments))
    assert new[0].param_groups[0]["weight_decay"] == 0.3
    assert bits([optimizer.state_dict()["state"] for optimizer in new]) == bits(moments)
    last = moments[-1][0]
    name = list(last)[-1]
    changes = [{name: last[name][:1]}, {name: last[name].t()}, {"other": last[name]}]
    wrong = [[*moments[:-1], moments[-1] | {0: last | change}] for change in changes]
    wrong += [moments[:-1], [*moments, {}], [*moments[:-1], {}], [*moments[:-1], moments[-1] | {99: last}]]
    for bad in wrong:
        with pytest.raises(ValueError, match="moments"):
            optim.load_moments(optimizers, bad)


def test_orthogonalize_nearly_singular_matrices_in_float32() -> None:
    """The Gram matrix squares the singular values: small ones must survive float32."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=rng) @ torch.randn(4, 128, generator=rng)
    x = x + 1e-3 * torch.randn(32, 128, generator=rng)
    exact = optim.newton_schulz(x.double()[None] / x.double().norm())[0]  # CUDA takes this path
    found, zero = optim.orthogonalize([x, torch.zeros(32, 8)])
    assert (found - exact).norm() < 1e-3 * exact.norm() and zero.isfinite().all()


def test_muon_equals_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch's orthogonalizes in bf16, which would hide all but two digits: here in float64
    monkeypatch.setattr(Tensor, "bfloat16", lambda x: x)
    raw = tiny_model().double()
    other, start = deepcopy(raw), deepcopy(raw)
    matrices = [f"{name}.weight" for name in model.weight_matrices(raw)]
    muon = optim.make_optimizers(raw, optimizer="muon", weight_decay=0.1)[1]
    settings = dict(lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    reference = torch.optim.Muon([other.get_parameter(name) for name in matrices], **settings)
    muon.param_groups[0]["lr"] = 0.02
    torch.manual_seed(1)
    for _ in range(4):
        for name in matrices:
            p = raw.get_parameter(name)
            p.grad = torch.randn_like(p)
            other.get_parameter(name).grad = p.grad.clone()
        muon.step()
        reference.step()
    for name in matrices:
        ours, theirs = (x.get_parameter(name) - start.get_parameter(name) for x in (raw, other))
        assert (ours - theirs).norm() < 1e-9 * theirs.norm()  # rounding, through five polynomials


@torch.no_grad()
def test_masks_of_pruned_matrices() -> None:
    raw = tiny_model()
    assert optim.zero_masks(raw) == {}
    assert optim.keep_zeros(optim.make_optimizers(raw, weight_decay=0.1), raw) == 0
    block = raw.transformer.h[0]
    block.attn.c_attn.weight.view(-1)[:8] = 0  # 1 % of 768 weights
    block.attn.c_proj.weight.view(-1)[:2] = 0  # 0.8 % of 256
    block.mlp.c_fc.weight.zero_()  # initialized with zeros, not pruned
    block.mlp.c_proj.weight[1:] = 0
    raw.transformer.wpe.weight[1:] = 0  # not a matrix of a block
    masks = optim.zero_masks(raw)
    assert masks.keys() == {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"}
    assert all(torch.equal(mask, raw.get_parameter(name) != 0) for name, mask in masks.items())
