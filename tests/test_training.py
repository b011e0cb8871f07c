"""The training step on one and two processes against one large batch, and the validation loss."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import ALONE
from torch import Tensor, nn

from neogpt import data, model, optim, runtime, training

ADAMW = dict(weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
T = 12


def tiny(seed: int = 0) -> model.GPT:
    """A tiny model in float64, where 1e-9 is far above rounding and far below any mistake."""
    return harness.tiny_model(seed, scale=0.1, block_size=T).double()


def loss_fn(net: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss of a batch; `poison` makes the loss or only its gradient non-finite."""
    loss = net(batch["x"], batch["y"], reduction="sum")[1]
    if batch.get("poison") == "loss":
        loss = loss * math.nan
    if batch.get("poison") == "gradient":
        loss.register_hook(lambda grad: grad * math.inf)
    mask = batch["y"] != -100
    return loss, dict(even=(mask & (batch["y"] % 2 == 0)).sum().double(), token=(mask * batch["y"]).sum().double())


def make_rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets of which about half, a different share in each row, are -100."""
    rng = torch.Generator().manual_seed(seed)
    xy = torch.randint(257, (n_rows, T + 1), generator=rng)
    x, y = xy[:, :-1], xy[:, 1:].clone()
    y[torch.rand(y.shape, generator=rng) < torch.rand(n_rows, 1, generator=rng)] = -100
    y[0], y[1, 1:] = torch.randint(257, (T,), generator=rng), -100  # all, and at most one
    return x, y


def split(x: Tensor, y: Tensor, sizes: list[int]) -> list[dict[str, Any]]:
    """Rows as micro-batches of these sizes."""
    return [dict(x=xs, y=ys, n=int((ys != -100).sum())) for xs, ys in zip(x.split(sizes), y.split(sizes))]


def big_batch_update(raw: model.GPT, x: Tensor, y: Tensor, lr: float, clip: float) -> tuple[dict, float, float]:
    """One plain SGD step on the mean over all targets: (parameters after it, loss, gradient norm)."""
    loss = F.cross_entropy(raw(x)[0].flatten(0, 1), y.flatten(), ignore_index=-100)
    params = dict(raw.named_parameters())
    grads = torch.autograd.grad(loss, list(params.values()))
    norm = math.sqrt(sum(float(g.detach().square().sum()) for g in grads))
    scale = min(1.0, clip / norm) if clip else 1.0
    return {n: (p - lr * scale * g).detach() for (n, p), g in zip(params.items(), grads)}, loss.item(), norm


def check_step(out: training.StepResult, params: dict[str, Tensor], x: Tensor, y: Tensor, clip: float) -> None:
    """Compare a step of SGD at a rate of 0.5 with one large batch."""
    after, loss, norm = big_batch_update(tiny(), x, y, lr=0.5, clip=clip)
    for name, p in params.items():
        # clip_grad_norm_ adds 1e-6 to the norm; otherwise float64 rounding
        torch.testing.assert_close(p.detach(), after[name], rtol=1e-9, atol=2e-6 * (clip or 1e-4))
    targets = y[y != -100]
    means = dict(even=(targets % 2 == 0).double().mean().item(), token=targets.double().mean().item())
    assert [out.loss, out.grad_norm] == pytest.approx([loss, norm], rel=1e-6)  # summed in float32
    assert out.metrics == pytest.approx(means, rel=1e-6)
    assert (out.skipped, out.stop) == (False, False)


# -----------------------------------------------------------------------------
# One process

SPLITS = [[8], [4, 4], [1] * 8, [1, 5, 2], [6, 1, 1]]


@pytest.mark.parametrize("clip", [0, 1e-2, 1e3], ids=["no clipping", "clipped", "below the limit"])
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_step_equals_one_large_batch(sizes: list[int], clip: float) -> None:
    raw, (x, y) = tiny(), make_rows(8, seed=1)
    sgd = [torch.optim.SGD(raw.parameters(), lr=123.0, fused=True)]
    out = training.train_step(raw, sgd, split(x, y, sizes), loss_fn, lr=0.5, grad_clip=clip, rt=ALONE)()
    check_step(out, dict(raw.named_parameters()), x, y, clip)
    assert all(p.grad is None or not p.grad.any() for p in raw.parameters())


def test_several_adamw_steps_equal_pytorchs() -> None:
    raw = tiny()
    other = deepcopy(raw)
    optimizers = optim.make_optimizers(raw, **ADAMW)
    params = {decay: [p for p in other.parameters() if (p.dim() > 1) == (decay > 0)] for decay in (0.1, 0.0)}
    groups = [dict(params=group, weight_decay=decay) for decay, group in params.items()]
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    for step in range(4):
        x, y = make_rows(8, seed=step)
        lr = 1e-2 / (step + 1)
        training.train_step(raw, optimizers, split(x, y, SPLITS[step + 1]), loss_fn, lr=lr, grad_clip=0, rt=ALONE)
        for group in reference.param_groups:
            group["lr"] = lr
        F.cross_entropy(other(x)[0].flatten(0, 1), y.flatten(), ignore_index=-100).backward()
        reference.step()
        reference.zero_grad()
    for a, b in zip(raw.parameters(), other.parameters()):
        # a gradient of zero up to rounding (the bias of the keys) is divided by at least eps: 1e-17 / 1e-8
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("where, kind", [(0, "adamw"), (1, "muon"), (2, "muon")])
def test_nonfinite_step_changes_nothing(poison: str, where: int, kind: str) -> None:
    raw, (x, y) = tiny(), make_rows(8, seed=1)
    optimizers = optim.make_optimizers(raw, optimizer=kind, **ADAMW)

    def step(poisoned: bool, lr: float) -> training.StepResult:
        batches = split(x, y, [3, 3, 2])
        if poisoned:
            batches[where]["poison"] = poison
        return training.train_step(raw, optimizers, batches, loss_fn, lr=lr, grad_clip=1.0, rt=ALONE)()

    def state() -> Any:
        return harness.bits([raw.state_dict(), [optimizer.state_dict()["state"] for optimizer in optimizers]])

    assert not step(False, 1e-3).skipped
    before, copies = state(), deepcopy([raw.state_dict(), [o.state_dict() for o in optimizers]])
    out = step(True, 1e-3)
    assert out.skipped and not math.isfinite(out.grad_norm) and math.isfinite(out.loss) == (poison == "gradient")
    assert state() == before

    assert not step(False, 2e-3).skipped  # nothing of the non-finite gradient is left for the next step
    after = state()
    raw.load_state_dict(copies[0])
    optimizers = optim.make_optimizers(raw, optimizer=kind, **ADAMW)
    for optimizer, saved in zip(optimizers, copies[1]):
        optimizer.load_state_dict(saved)
    step(False, 2e-3)
    assert state() == after


@pytest.mark.parametrize("stop", [True, False])
def test_learning_rate_and_stop(stop: bool) -> None:
    raw = tiny()
    optimizers = optim.make_optimizers(raw, optimizer="muon", **ADAMW)
    batches = split(*make_rows(4, seed=1), [4])
    read = training.train_step(raw, optimizers, batches, loss_fn, lr=0.25, grad_clip=1.0, rt=ALONE, stop=stop)
    assert [group["lr"] for o in optimizers for group in o.param_groups] == [0.25] * 3
    assert read().stop is stop


# -----------------------------------------------------------------------------
# Two processes

CUTS = {"even": ([3, 2, 1], [1, 4, 1]), "one and five": ([6], [1, 2, 1, 1, 1]), "uneven rows": ([9, 1], [2])}


def work(rt: runtime.Runtime) -> dict[str, tuple]:
    """One of two ranks: do its part of each step; return results and parameters."""
    x, y = make_rows(12, seed=3)
    results = {}
    for name in (*CUTS, "loss", "gradient", "stop"):
        sizes = CUTS.get(name, CUTS["even"])
        raw = tiny()
        optimizers = [torch.optim.SGD(raw.parameters(), fused=True)]
        mine = slice(0, sum(sizes[0])) if rt.rank == 0 else slice(sum(sizes[0]), 12)
        batches = split(x[mine], y[mine], sizes[rt.rank])
        batches[0]["poison"] = name if rt.rank == 1 else None
        settings = dict(lr=0.5, grad_clip=1e-2, rt=rt, stop=name == "stop" and rt.rank == 1)
        out = training.train_step(runtime.wrap(raw, rt, False), optimizers, batches, loss_fn, **settings)()
        results[name] = tuple(out), {name: p.detach().clone() for name, p in raw.named_parameters()}
    return results


def test_two_processes(tmp_path: Path) -> None:
    ranks = harness.on_ranks(tmp_path, work)
    x, y = make_rows(12, seed=3)
    start = harness.bits({name: p.detach() for name, p in tiny().named_parameters()})
    for results in ranks:
        found = {name: (training.StepResult(*out), params) for name, (out, params) in results.items()}
        for name in CUTS:
            check_step(*found[name], x, y, clip=1e-2)
        for name in ("loss", "gradient"):  # one non-finite rank skips the step on all
            assert found[name][0].skipped and harness.bits(found[name][1]) == start
        assert found["stop"][0].stop and not found["stop"][0].skipped  # a stop on one rank reaches all
    assert harness.bits(ranks[0]) == harness.bits(ranks[1])


# -----------------------------------------------------------------------------
# Validation


@pytest.mark.parametrize("n_windows", [1, 7, 40])
def test_validation_loss_is_the_mean_over_the_first_windows(n_windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(n_windows).integers(0, 257, 40 * T + 5).astype(np.uint16)
    val = data.Windows([data.Shard(Path("x"), len(tokens), 0, tokens)], T)
    raw = harness.tiny_model(scale=0.2, block_size=T)  # losses differ between windows
    exact, expected = deepcopy(raw).double(), []
    for i in range(n_windows):
        window = torch.from_numpy(tokens[i * T : i * T + T + 1].astype(np.int64))
        expected.append(F.cross_entropy(exact(window[None, :-1])[0][0], window[1:]).item())
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda x, rt: x)  # the share of each rank, summed below
    for world_size in (1, 2, 3, 50):
        for rows in (1, 3, 64):
            # not a whole number of windows, or more than there are
            n_tokens = 10**7 if n_windows == 40 else n_windows * T + T - 1
            ranks = [ALONE._replace(rank=rank, world_size=world_size) for rank in range(world_size)]
            shares = [training.validate(raw, val, n_tokens, rows, rt) for rt in ranks]
            assert sum(shares) == pytest.approx(np.mean(expected), rel=1e-6)  # float32 rounding
