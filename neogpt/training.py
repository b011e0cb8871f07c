"""The training step, the same for every stage and any number of ranks, and the validation loss."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neogpt import data, runtime

# loss_fn(model, micro_batch) -> (loss, metrics): the loss summed over the units of the micro-batch (target tokens or
# pairs), and detached sums of other quantities to log, by name. It runs under autocast.
LossFn = Callable[[nn.Module, dict[str, Any]], tuple[Tensor, dict[str, Tensor]]]


class Batch(NamedTuple):
    """The data of one optimizer step."""

    micro_batches: list[dict[str, Any]]  # of this rank: arguments of loss_fn; "n" is the number of units
    n_sequences: int  # of all ranks
    n_tokens: int  # of all ranks, without padding


class StepResult(NamedTuple):
    """The result of one training step, equal on all ranks."""

    loss: float  # mean over the units of the whole step
    grad_norm: float  # before clipping
    skipped: bool  # loss or gradient was not finite, and no parameter changed
    stop: bool  # a rank was asked to stop
    metrics: dict[str, float]  # means over the units of the whole step


def backward(
    net: nn.Module, batch: dict[str, Any], loss_fn: LossFn, scale: float | Tensor, rt: runtime.Runtime
) -> tuple[Tensor, dict]:
    """Forward and backward pass of scale · loss; returns the detached loss sum and the metrics."""
    with runtime.strict_determinism():
        with rt.autocast():
            loss, metrics = loss_fn(net, batch)
        (loss * scale).backward()
    return loss.detach(), metrics


def train_step(
    net: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    micro_batches: list[dict[str, Any]],
    loss_fn: LossFn,
    *,
    lr: float,
    grad_clip: float,
    rt: runtime.Runtime,
    stop: bool = False,
) -> Callable[[], StepResult]:
    """Queue one optimizer step over the micro-batches of all ranks; return a function that waits for its result.

    Equal to one large batch, however it is split: losses are summed and divided by the number of units in the whole
    step, because a mean of means would be wrong where micro-batches differ in units. grad_clip: largest gradient norm,
    0 for no limit. The optimizers must honor `optimizer.found_inf`.
    """
    n = sum(batch["n"] for batch in micro_batches)
    if rt.world_size > 1:
        n = runtime.all_reduce_sum(torch.full((), n, dtype=torch.float64, device=rt.device), rt)
    sums = torch.zeros(1, device=rt.device)  # of the loss, then of each metric
    for i, batch in enumerate(micro_batches):
        # gradients are reduced with the last micro-batch; DDP needs no_sync around the forward pass too
        accumulate = rt.world_size > 1 and i < len(micro_batches) - 1
        with net.no_sync() if accumulate else nullcontext():
            loss, metrics = backward(net, batch, loss_fn, rt.world_size / n, rt)  # DDP averages; we want the sum
        sums = sums + torch.stack([loss, *metrics.values()])
    norm = nn.utils.clip_grad_norm_(net.parameters(), grad_clip or math.inf)
    # one all-reduce, so that every rank has the same numbers and takes the same decision
    sums = runtime.all_reduce_sum(torch.cat([sums, sums.new_full((1,), stop)]), rt)
    numbers = torch.cat([torch.stack([norm, sums[-1], sums[0] / n]), sums[1:-1] / n])
    nonfinite = (~numbers[:3].isfinite()).any().float()  # on the device, so that nothing waits
    skip = rt.device.type == "mps" and bool(nonfinite)  # AdamW on MPS ignores found_inf
    for optimizer in optimizers:
        optimizer.found_inf = nonfinite  # if it is 1, the step changes nothing
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not skip:
            optimizer.step()
        optimizer.zero_grad()
    read = runtime.async_to_host(numbers)

    def result() -> StepResult:
        norm, stops, loss, *means = read()
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        return StepResult(loss, norm, skipped, stops > 0, dict(zip(metrics, means)))

    return result


@torch.no_grad()
def validate(net: nn.Module, val: data.Windows, n_tokens: int, B: int, rt: runtime.Runtime) -> float:
    """Mean loss, nats per token, over the first n_tokens of the validation windows, B windows at a time. If net is
    compiled, B must be the size of its micro-batches.
    """
    n = max(1, min(len(val), n_tokens // val.T))
    losses = [torch.zeros((), device=rt.device)]  # on the device, so that nothing waits
    for windows in torch.arange(n)[rt.rank :: rt.world_size].split(B):
        xy = runtime.to_device(torch.from_numpy(val.read(windows.numpy())), rt.device)  # (at most B, T + 1)
        xy = F.pad(xy, (0, 0, 0, B - len(xy)))  # a compiled model needs one shape
        y = xy[:, 1:].clone()
        y[len(windows) :] = -100
        with rt.autocast():
            losses.append(net(xy[:, :-1], y, reduction="sum"))
    return runtime.all_reduce_sum(torch.stack(losses).cpu().double().sum(), rt).item() / (n * val.T)
