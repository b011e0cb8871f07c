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

T = 12


def tiny() -> model.GPT:
    """A tiny model in float64, where 1e-9 is far above rounding and far below any mistake. The rows of its embedding
    do not divide by the number of ranks.
    """
    return harness.tiny_model(scale=0.1, block_size=T, vocab_size=257).double()


def loss_fn(net: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The summed loss and sums of the targets; `poison` makes the loss or only its gradient non-finite."""
    loss, y = net(batch["x"], batch["y"], reduction="sum"), batch["y"].double()
    if batch.get("poison") == "loss":
        loss = loss * math.nan
    if batch.get("poison") == "gradient":
        loss.register_hook(lambda grad: grad * math.inf)
    return loss, dict(id=y[y >= 0].sum(), square=y[y >= 0].square().sum())


def make_rows(n_rows: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets of which about half, a different share in each row, are -100."""
    rng = torch.Generator().manual_seed(seed)
    xy = torch.randint(257, (n_rows, T + 1), generator=rng)
    x, y = xy[:, :-1], xy[:, 1:].clone()
    y[torch.rand(y.shape, generator=rng) < torch.rand(n_rows, 1, generator=rng)] = -100
    y[0], y[1, 1:] = torch.randint(257, (T,), generator=rng), -100  # all, and at most one
    return x, y


def split(x: Tensor, y: Tensor, sizes: list[int]) -> list[dict[str, Any]]:
    return [dict(x=xs, y=ys, n=int((ys != -100).sum())) for xs, ys in zip(x.split(sizes), y.split(sizes))]


def check_step(out: training.StepResult, params: dict[str, Tensor], x: Tensor, y: Tensor, clip: float) -> None:
    """Compare a step of SGD at a rate of 0.5 with a plain step on the mean over all targets of one large batch."""
    raw = tiny()
    loss = F.cross_entropy(raw(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    grads = torch.autograd.grad(loss, list(raw.parameters()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    scale = min(1.0, clip / norm) if clip else 1.0
    for (name, p), g in zip(raw.named_parameters(), grads):
        # clip_grad_norm_ adds 1e-6 to the norm; otherwise float64 rounding
        torch.testing.assert_close(params[name], p.detach() - 0.5 * scale * g, rtol=1e-9, atol=2e-6 * (clip or 1e-4))
    targets = y[y != -100].double()
    expected = [loss.item(), norm, targets.mean().item(), targets.square().mean().item()]
    assert [out.loss, out.grad_norm, *out.metrics.values()] == pytest.approx(expected, rel=1e-6)  # summed in float32
    assert (list(out.metrics), out.skipped, out.stop) == (["id", "square"], False, False)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize("where, kind", [(0, "adamw"), (1, "muon"), (2, "muon")])
def test_nonfinite_step_changes_nothing(poison: str, where: int, kind: str) -> None:
    def run(poisoned: bool) -> tuple[list[training.StepResult], Any]:
        raw, results = tiny(), []
        optimizers = optim.make_optimizers(raw, optimizer=kind, weight_decay=0.1)
        for step in (0, 1, 2) if poisoned else (0, 2):
            batches = split(*make_rows(8, seed=step), [3, 3, 2])
            batches[where]["poison"] = poison if step == 1 else None
            settings = dict(lr=1e-3 * (step + 1), grad_clip=1.0, rt=ALONE)
            results.append(training.train_step(raw, optimizers, batches, loss_fn, **settings)())
            assert {group["lr"] for o in optimizers for group in o.param_groups} == {settings["lr"]}
        return results, harness.bits([raw.state_dict(), [o.state_dict()["state"] for o in optimizers]])

    (results, state), (expected_results, expected_state) = run(True), run(False)
    bad = results.pop(1)
    assert bad.skipped and not math.isfinite(bad.grad_norm) and math.isfinite(bad.loss) == (poison == "gradient")
    assert (results, state) == (expected_results, expected_state)


# sequences of the micro-batches of both ranks
CUTS = {"even": ([3, 2, 1], [1, 4, 1]), "one and five": ([6], [1, 2, 1, 1, 1]), "uneven rows": ([9, 1], [2])}
CLIP = {"one and five": 0.0, "uneven rows": 1e3}  # no clipping; above the norm


def steps_on_rank(rt: runtime.Runtime) -> dict[str, tuple]:
    """One of two ranks: do its part of each step; return results and parameters."""
    x, y = make_rows(12)
    results = {}
    for name in (*CUTS, "loss", "gradient", "sharded gradient", "sharded", "stop"):
        raw, sizes, sharded = tiny(), CUTS.get(name, CUTS["even"]), name.startswith("sharded")
        net = training.wrap(raw, rt, sharded, recompute=False)
        optimizers = [torch.optim.SGD(raw.parameters(), fused=True)]
        if sharded:  # fused SGD cannot update shards; test_sharded.py compares the updates
            optimizers = optim.make_optimizers(raw, optimizer="muon", weight_decay=0.1)
        mine = slice(0, sum(sizes[0])) if rt.rank == 0 else slice(sum(sizes[0]), 12)
        batches = split(x[mine], y[mine], sizes[rt.rank])
        batches[0]["poison"] = name.removeprefix("sharded ") if rt.rank == 1 else None
        settings = dict(lr=0.5, grad_clip=CLIP.get(name, 1e-2), rt=rt, stop=name == "stop" and rt.rank == 1)
        out = training.train_step(net, optimizers, batches, loss_fn, **settings)()
        full = lambda p: p.detach().full_tensor() if runtime.is_sharded(p) else p.detach()  # noqa: E731
        results[name] = tuple(out), {name: full(p) for name, p in raw.named_parameters()}
    return results


def test_two_processes(tmp_path: Path) -> None:
    start = harness.bits({name: p.detach() for name, p in tiny().named_parameters()})
    ranks = harness.on_ranks(tmp_path, steps_on_rank)
    for results in ranks:
        found = {name: (training.StepResult(*out), params) for name, (out, params) in results.items()}
        for name in CUTS:
            check_step(*found[name], *make_rows(12), clip=CLIP.get(name, 1e-2))
        for name in ("loss", "gradient", "sharded gradient"):  # one non-finite rank skips the step on all
            assert found[name][0].skipped and harness.bits(found[name][1]) == start
        assert found["sharded"][0][:2] == pytest.approx(found["even"][0][:2], rel=1e-6)  # loss and norm
        assert found["stop"][0].stop and not found["stop"][0].skipped  # a stop on one rank reaches all
    assert all(harness.bits(ranks[0][name]) == harness.bits(ranks[1][name]) for name in CUTS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_bits(precision: str) -> None:
    rt, found, n_saved = ALONE._replace(precision=precision), [], []
    for recompute in (False, True):
        raw = harness.tiny_model(n_layer=4, n_embd=64)
        training.wrap(raw, rt, sharded=False, recompute=recompute)
        idx, saved = torch.arange(128).view(4, 32), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss, _ = training.backward(raw, dict(x=idx, y=idx + 1), loss_fn, 1.0, rt)
        found.append(harness.bits([loss, [p.grad for p in raw.parameters()]]))
        n_saved.append(sum(saved))
    assert found[0] == found[1] and n_saved[1] < 0.5 * n_saved[0]


@pytest.mark.parametrize("n_windows", [1, 7, 40])
def test_validation_loss_is_the_mean_over_the_first_windows(n_windows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(n_windows).integers(0, 257, 40 * T + 5).astype(np.uint16)
    val = data.Windows([data.Shard(Path("x"), len(tokens), 0, tokens)], T)
    raw = harness.tiny_model(scale=0.2, block_size=T)  # losses differ between windows
    windows = torch.from_numpy(tokens.astype(np.int64)).unfold(0, T + 1, T)[:n_windows]
    expected = F.cross_entropy(deepcopy(raw).double()(windows[:, :-1]).mT, windows[:, 1:]).item()
    monkeypatch.setattr(runtime, "all_reduce_sum", lambda x, rt: x)  # the share of each rank, summed below
    n_tokens = 10**7 if n_windows == 40 else n_windows * T + T - 1  # more than there are, or no multiple of T
    for world_size in (1, 2, 3, 50):
        for rows in (1, 3, 64):
            ranks = [ALONE._replace(rank=rank, world_size=world_size) for rank in range(world_size)]
            shares = [training.validate(raw, val, n_tokens, rows, rt) for rt in ranks]
            assert sum(shares) == pytest.approx(expected, rel=1e-6)  # float32 rounding
